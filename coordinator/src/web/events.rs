//! Answers that go on, as server-sent events: `event:` names what `data:`, a line of JSON, is. Each answer is made by a task
//! that ends with the server, or when nobody reads any more.

use super::importance::Importance;
use super::{Refusal, form};
use crate::actors::sweep::{Change, View};
use crate::error::Result;
use crate::grpc::Services;
use domain::metric::MetricPoint;
use domain::sweep::Sweep;
use domain::trial::Trial;
use domain::{Attempt, SweepId, TrialId};
use flate2::Compression;
use flate2::write::GzEncoder;
use futures::StreamExt;
use http_body::Frame;
use http_body_util::StreamBody;
use proto::v1::fleet_service_server::FleetService;
use proto::v1::sweep_service_server::SweepService;
use proto::v1::trial_service_server::TrialService;
use proto::{convert, v1};
use serde_json::{Value, json};
use std::collections::{BTreeMap, HashMap};
use std::convert::Infallible;
use std::io::Write as _;
use std::time::Duration;
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{broadcast, mpsc};
use tokio::time::{Instant, MissedTickBehavior};
use tokio_stream::wrappers::ReceiverStream;
use tonic::body::Body;
use tonic::codegen::Bytes;
use tonic::codegen::http::header::{self, HeaderValue};
use tonic::codegen::http::{Response, StatusCode};
use tonic::{Request, Status};

/// Pieces that may wait for a slow reader.
const BUFFER: usize = 16;
/// Rows of the first piece, which is on the screen before the others are made.
const FIRST_ROWS: usize = 200;
/// Rows of each other piece.
const ROWS: usize = 2000;
/// For how long changes are gathered: more often nobody looks.
const GATHER: Duration = Duration::from_millis(200);
/// Silence after which a word is sent, so that a reader that is gone is noticed, and one that is there knows.
const SILENCE: Duration = Duration::from_secs(15);
/// The time between two looks at the lists of sweeps and agents, of whose changes nobody tells.
const LOOK: Duration = Duration::from_secs(1);

/// Whoever read is gone.
struct Gone;

/// The way to a reader.
struct Out {
    pieces: mpsc::Sender<Bytes>,
    zip: Option<GzEncoder<Vec<u8>>>,
}

impl Out {
    async fn send(&mut self, event: &str, data: &Value) -> std::result::Result<(), Gone> {
        self.write(format!("event: {event}\ndata: {data}\n\n")).await
    }

    /// A word without meaning.
    async fn still_here(&mut self) -> std::result::Result<(), Gone> {
        self.write(":\n\n".into()).await
    }

    async fn write(&mut self, text: String) -> std::result::Result<(), Gone> {
        let piece = match &mut self.zip {
            None => text.into(),
            Some(zip) => {
                // A vector takes whatever is written to it.
                zip.write_all(text.as_bytes()).and_then(|()| zip.flush()).map_err(|_| Gone)?;
                std::mem::take(zip.get_mut()).into()
            }
        };
        self.pieces.send(piece).await.map_err(|_| Gone)
    }

    /// Says why nothing follows, if that is an error. Who is gone does not hear it.
    async fn end(mut self, why: Option<Status>) {
        if let Some(status) = why {
            let _ = self.send("error", &json!({ "error": status.message() })).await;
        }
        if let Some(zip) = self.zip.take()
            && let Ok(last) = zip.finish()
        {
            let _ = self.pieces.send(last.into()).await;
        }
    }
}

/// Answers with what a task tells.
fn told<F>(services: Services, zipped: bool, tell: impl FnOnce(Services, Out) -> F) -> Response<Body>
where
    F: Future<Output = ()> + Send + 'static,
{
    let (pieces, stream) = mpsc::channel(BUFFER);
    let zip = zipped.then(|| GzEncoder::new(Vec::new(), Compression::default()));
    let scope = services.scope.clone();
    let gone = pieces.clone();
    let telling = tell(services, Out { pieces, zip });
    scope.clone().spawn("page", async move {
        tokio::select! {
            () = scope.cancelled() => {}
            () = gone.closed() => {}
            () = telling => {}
        }
    });
    let frames = ReceiverStream::new(stream).map(|piece| Ok::<_, Infallible>(Frame::data(piece)));
    let mut answer = super::answer(StatusCode::OK, "text/event-stream", Bytes::new())
        .map(|_| Body::new(StreamBody::new(frames)));
    if zipped {
        answer.headers_mut().insert(header::CONTENT_ENCODING, HeaderValue::from_static("gzip"));
    }
    answer
}

/// The newest sweeps and all agents, and what changes in the lists.
pub fn overview(services: Services, zipped: bool) -> Response<Body> {
    told(services, zipped, |services, mut out| async move {
        let why = tell_overview(&services, &mut out).await.ok();
        out.end(why).await;
    })
}

async fn tell_overview(services: &Services, out: &mut Out) -> std::result::Result<Status, Gone> {
    let (mut sweeps, mut agents) = (List::default(), List::default());
    let mut looks = tokio::time::interval(LOOK);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut said = Instant::now();
    let mut first = true;
    loop {
        looks.tick().await;
        let listed = match lists(services).await {
            Ok(listed) => listed,
            Err(status) => return Ok(status),
        };
        let news = [("sweeps", sweeps.news(listed.0)), ("agents", agents.news(listed.1))];
        for (event, mut news) in news {
            news["whole"] = json!(first);
            if first || news["changed"] != json!([]) || news["gone"] != json!([]) {
                out.send(event, &news).await?;
                said = Instant::now();
            }
        }
        first = false;
        if said.elapsed() >= SILENCE {
            out.still_here().await?;
            said = Instant::now();
        }
    }
}

async fn lists(services: &Services) -> std::result::Result<(Vec<Value>, Vec<Value>), Status> {
    let request = Request::new(v1::ListSweepsRequest::default());
    let sweeps = services.list_sweeps(request).await?.into_inner().sweeps;
    let mut agents = Vec::new();
    let mut request = v1::ListAgentsRequest { page_size: 1000, page_token: String::new() };
    loop {
        let page = services.list_agents(Request::new(request.clone())).await?.into_inner();
        agents.extend(page.agents.iter().map(form::agent));
        if page.next_page_token.is_empty() {
            return Ok((sweeps.iter().map(form::sweep).collect(), agents));
        }
        request.page_token = page.next_page_token;
    }
}

/// A list as a reader knows it.
#[derive(Default)]
struct List(HashMap<String, Value>);

impl List {
    /// What a reader does not know of a list yet.
    fn news(&mut self, items: Vec<Value>) -> Value {
        let mut before = std::mem::take(&mut self.0);
        let mut changed = Vec::new();
        for item in items {
            let id = item["id"].as_str().unwrap_or_default().to_string();
            if before.remove(&id).as_ref() != Some(&item) {
                changed.push(item.clone());
            }
            self.0.insert(id, item);
        }
        let gone: Vec<_> = before.into_keys().collect();
        json!({ "changed": changed, "gone": gone })
    }
}

/// A sweep and its trials as they stand, and what changes until it is over.
pub async fn changes(
    services: Services,
    sweep: &str,
    zipped: bool,
) -> std::result::Result<Response<Body>, Refusal> {
    let id = SweepId::new(sweep);
    let first = services.desk.directory.watch(&id).await?;
    Ok(told(services, zipped, |services, mut out| async move {
        let why = tell_changes(&services, &id, first, &mut out).await.err();
        out.end(why.map(Status::from)).await;
    }))
}

type Watched = (View, Option<broadcast::Receiver<Change>>);

/// As `WatchSweep`: a picture, then changes. Whoever lags gets a fresh picture.
async fn tell_changes(services: &Services, id: &SweepId, first: Watched, out: &mut Out) -> Result<()> {
    let (mut view, mut changes) = first;
    loop {
        let over = view.sweep.state.is_terminal();
        let mut table = form::Table::of(&view);
        if picture(services, &view, &mut table, out).await.is_err() {
            return Ok(());
        }
        let mut importance = Importance::of(&view);
        drop(view);
        let followed = match changes {
            Some(changes) if !over => follow(services, &mut table, &mut importance, changes, out).await,
            _ => Followed::ToTheEnd,
        };
        match followed {
            Followed::ToTheEnd => {
                // A reader that is gone knows enough.
                if let Some(news) = importance.news() {
                    let _ = out.send("importance", &news).await;
                }
                let _ = out.send("over", &json!({})).await;
                return Ok(());
            }
            Followed::ReaderGone => return Ok(()),
            Followed::Lagged => (view, changes) = services.desk.directory.watch(id).await?,
        }
    }
}

/// A sweep, with what it waits for as that is now; nothing of that from a server that is ending.
async fn shown(services: &Services, sweep: &Sweep) -> Value {
    form::sweep(&services.shown(sweep).await.unwrap_or_else(|_| convert::sweep(sweep)))
}

async fn picture(
    services: &Services,
    view: &View,
    table: &mut form::Table,
    out: &mut Out,
) -> std::result::Result<(), Gone> {
    out.send("picture", &json!({ "trials": view.trials.len() })).await?;
    out.send("sweep", &shown(services, &view.sweep).await).await?;
    if let Some(lanes) = table.lanes() {
        out.send("lanes", &lanes).await?;
    }
    let (first, others) = view.trials.split_at(view.trials.len().min(FIRST_ROWS));
    for records in std::iter::once(first).chain(others.chunks(ROWS)) {
        let rows: Vec<_> = records.iter().map(|record| table.row(&record.trial, record.value)).collect();
        out.send("trials", &form::columns(&rows)).await?;
    }
    out.send("complete", &json!({})).await
}

enum Followed {
    ToTheEnd,
    Lagged,
    ReaderGone,
}

/// What has changed since it was last told.
#[derive(Default)]
struct News {
    sweep: Option<Box<Sweep>>,
    trials: BTreeMap<TrialId, (Box<Trial>, Option<f64>)>,
    points: Vec<(TrialId, Attempt, MetricPoint)>,
}

impl News {
    fn take(&mut self, change: Change) {
        match change {
            Change::Sweep(sweep) => self.sweep = Some(sweep),
            Change::Trial(trial, value) => drop(self.trials.insert(trial.id.clone(), (trial, value))),
            Change::Progress(trial, attempt, point) => self.points.push((trial, attempt, point)),
        }
    }

    fn is_empty(&self) -> bool {
        self.sweep.is_none() && self.trials.is_empty() && self.points.is_empty()
    }
}

async fn follow(
    services: &Services,
    table: &mut form::Table,
    importance: &mut Importance,
    mut changes: broadcast::Receiver<Change>,
    out: &mut Out,
) -> Followed {
    let mut news = News::default();
    let mut due = Instant::now() + SILENCE;
    loop {
        let change = tokio::select! {
            change = changes.recv() => Some(change),
            () = tokio::time::sleep_until(due) => None,
            () = importance.due() => {
                if let Some(news) = importance.news()
                    && out.send("importance", &news).await.is_err()
                {
                    return Followed::ReaderGone;
                }
                continue;
            }
        };
        let over = matches!(&change, Some(Ok(Change::Sweep(sweep))) if sweep.state.is_terminal());
        match change {
            Some(Ok(change)) => {
                if news.is_empty() {
                    due = Instant::now() + GATHER;
                }
                importance.hear(&change);
                news.take(change);
                if !over {
                    continue;
                }
            }
            // Closed: the sweep's actor is gone, so that a fresh picture is the last.
            Some(Err(RecvError::Lagged(_) | RecvError::Closed)) => return Followed::Lagged,
            None => {}
        }
        let sent = match news.is_empty() {
            true => out.still_here().await,
            false => tell(services, std::mem::take(&mut news), table, out).await,
        };
        due = Instant::now() + SILENCE;
        match sent {
            Err(Gone) => return Followed::ReaderGone,
            Ok(()) if over => return Followed::ToTheEnd,
            Ok(()) => {}
        }
    }
}

async fn tell(
    services: &Services,
    news: News,
    table: &mut form::Table,
    out: &mut Out,
) -> std::result::Result<(), Gone> {
    if !news.trials.is_empty() {
        let rows: Vec<_> = news.trials.values().map(|(trial, value)| table.row(trial, *value)).collect();
        if let Some(lanes) = table.lanes() {
            out.send("lanes", &lanes).await?;
        }
        out.send("trials", &form::columns(&rows)).await?;
    }
    if !news.points.is_empty() {
        let points: Vec<_> =
            news.points.iter().map(|(trial, attempt, point)| form::point(trial, *attempt, point)).collect();
        out.send("points", &json!(points)).await?;
    }
    match news.sweep {
        Some(sweep) => out.send("sweep", &shown(services, &sweep).await).await,
        None => Ok(()),
    }
}

/// A trial's log, and what is added to it until the trial is over.
pub async fn log(
    services: Services,
    sweep: &str,
    number: u32,
    zipped: bool,
) -> std::result::Result<Response<Body>, Refusal> {
    let trial_id = TrialId::of(&SweepId::new(sweep), number).to_string();
    let request = v1::GetTrialLogRequest { trial_id, follow: true };
    let mut entries = services.get_trial_log(Request::new(request)).await?.into_inner();
    Ok(told(services, zipped, |_, mut out| async move {
        let why = loop {
            let sent = match tokio::time::timeout(SILENCE, entries.next()).await {
                Ok(Some(Ok(entry))) => out.send("entry", &form::entry(&entry)).await,
                Ok(Some(Err(status))) => break Some(status),
                Ok(None) => out.send("over", &json!({})).await.and(Err(Gone)),
                Err(_) => out.still_here().await,
            };
            if sent.is_err() {
                break None;
            }
        };
        out.end(why).await;
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_tells_what_is_new() {
        let item = |id: &str, state: &str| json!({ "id": id, "state": state });
        let mut list = List::default();
        let rows = [
            (vec![item("a", "running"), item("b", "running")], vec!["a", "b"], vec![]),
            (vec![item("a", "running"), item("b", "running")], vec![], vec![]),
            (vec![item("c", "running"), item("b", "completed")], vec!["c", "b"], vec!["a"]),
            (vec![], vec![], vec!["b", "c"]),
        ];
        for (items, changed, gone) in rows {
            let news = list.news(items);
            let ids: Vec<_> =
                news["changed"].as_array().unwrap().iter().map(|item| item["id"].as_str().unwrap()).collect();
            let mut left: Vec<_> =
                news["gone"].as_array().unwrap().iter().map(|id| id.as_str().unwrap()).collect();
            left.sort_unstable();
            assert_eq!((ids, left), (changed, gone));
        }
    }
}
