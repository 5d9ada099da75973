//! The live page, as a browser speaks to it: HTTP/1.1 on the address of the services.

use super::agent::{FakeAgent, hello};
use super::fixture::{Fixture, LONG, PATIENCE, access_by, grid, write_tokens};
use config::tokens::Role;
use coordinator::Access;
use coordinator::web::{assets, is_served};
use domain::trial::TrialConfig;
use proto::v1;
use proto::v1::SweepState;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// A request that a browser on this machine may make.
const FROM_HERE: &str = "Host: localhost:7401\r\n";
const JSON: &str = "Host: localhost:7401\r\nContent-Type: application/json\r\n";

pub struct Answer {
    code: u16,
    head: String,
    body: String,
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|why| panic!("{why}: {}", self.body))
    }

    fn error(&self) -> String {
        self.json()["error"].as_str().unwrap().to_string()
    }

    fn header(&self, name: &str) -> Option<&str> {
        let mut fields = self.head.lines().filter_map(|line| line.split_once(": "));
        fields.find(|(known, _)| known.eq_ignore_ascii_case(name)).map(|(_, value)| value)
    }
}

/// Begins a request. `path` is method and path.
async fn open(fixture: &Fixture, path: &str, headers: &str, body: &str) -> TcpStream {
    let mut stream = TcpStream::connect(fixture.address()).await.unwrap();
    let length = body.len();
    let head = format!("{path} HTTP/1.1\r\n{headers}Connection: close\r\nContent-Length: {length}\r\n\r\n");
    stream.write_all(format!("{head}{body}").as_bytes()).await.unwrap();
    stream
}

pub async fn ask(fixture: &Fixture, path: &str, headers: &str, body: &str) -> Answer {
    let mut stream = open(fixture, path, headers, body).await;
    let mut bytes = Vec::new();
    let read = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut bytes)).await;
    read.unwrap_or_else(|_| panic!("{path} does not end")).unwrap();
    let text = String::from_utf8_lossy(&bytes);
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("{path}: {text}"));
    let code = head.split(' ').nth(1).unwrap().parse().unwrap();
    Answer { code, head: head.into(), body: body.into() }
}

async fn get(fixture: &Fixture, path: &str) -> Answer {
    ask(fixture, &format!("GET {path}"), FROM_HERE, "").await
}

async fn post(fixture: &Fixture, path: &str, body: &Value) -> Answer {
    ask(fixture, &format!("POST {path}"), JSON, &body.to_string()).await
}

/// A stream of events as it comes.
pub struct Events {
    stream: TcpStream,
    text: String,
    /// Events that came and that nobody has asked for yet.
    kept: Vec<String>,
}

impl Events {
    async fn open(fixture: &Fixture, path: &str) -> Self {
        Self::open_as(fixture, path, FROM_HERE).await
    }

    pub async fn open_as(fixture: &Fixture, path: &str, headers: &str) -> Self {
        let stream = open(fixture, &format!("GET {path}"), headers, "").await;
        Self { stream, text: String::new(), kept: Vec::new() }
    }

    /// The data of the first event of that name that `wanted` accepts, of those that were not passed over yet. Events of
    /// other names that come before it are kept: which come together is a matter of time.
    pub async fn next(&mut self, name: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        let beginning = format!("event: {name}\ndata: ");
        loop {
            while let Some((event, rest)) = self.text.split_once("\n\n") {
                self.kept.push(event.to_string());
                self.text = rest.to_string();
            }
            let mut found = None;
            self.kept.retain(|event| {
                let data = event.split_once(&beginning).map(|(_, data)| data);
                let Some(data) = data.filter(|_| found.is_none()) else { return true };
                found = Some(serde_json::from_str::<Value>(data).unwrap()).filter(&wanted);
                false
            });
            if let Some(found) = found {
                return found;
            }
            let mut bytes = vec![0; 1 << 16];
            let read = tokio::time::timeout(PATIENCE, self.stream.read(&mut bytes)).await;
            let read = read.unwrap_or_else(|_| panic!("no {name} in time; there was {}", self.text)).unwrap();
            assert!(read > 0, "the stream ended before {name}: {}", self.text);
            self.text += &String::from_utf8_lossy(&bytes[..read]);
        }
    }
}

#[tokio::test]
async fn a_browser_loads_the_page_once_and_nothing_from_elsewhere() {
    let fixture = Fixture::start(LONG).await;
    let mut bytes = 0;
    for (path, kind, text) in assets::FILES {
        let plain = get(&fixture, path).await;
        assert_eq!((plain.code, plain.header("content-type")), (200, Some(*kind)), "{path}");
        assert_eq!(plain.header("content-length"), Some(text.len().to_string().as_str()), "{path}");
        let policy = plain.header("content-security-policy").unwrap();
        assert!(policy.contains("default-src 'none'") && !policy.contains("unsafe"), "{path}: {policy}");
        let zipped = format!("{FROM_HERE}Accept-Encoding: gzip, deflate, br\r\n");
        let zipped = ask(&fixture, &format!("GET {path}"), &zipped, "").await;
        assert_eq!(zipped.header("content-encoding"), Some("gzip"), "{path}");
        bytes += zipped.header("content-length").unwrap().parse::<usize>().unwrap();
        let tag = plain.header("etag").unwrap();
        let again = format!("{FROM_HERE}If-None-Match: {tag}\r\n");
        assert_eq!(ask(&fixture, &format!("GET {path}"), &again, "").await.code, 304, "{path}");
    }
    assert!(bytes < 100_000, "{bytes} bytes");
    for path in [
        "/nothing",
        "/assets/",
        "/assets/../page.css",
        "/api/nothing",
        "/lorafleet.v1.SweepService/ListSweeps",
    ] {
        assert_eq!(get(&fixture, path).await.code, 404, "{path}");
    }
}

#[tokio::test]
async fn a_sweep_is_followed_and_changed() {
    let fixture = Fixture::start(LONG).await;
    let mut overview = Events::open(&fixture, "/api/events").await;
    overview.next("sweeps", |news| news["changed"] == json!([])).await;
    let sweep = fixture.submit(&grid(&[2, 4])).await;
    let id = &sweep.id;
    let listed = |news: &Value| news["changed"][0]["id"] == json!(id);
    let first = overview.next("sweeps", listed).await["changed"][0].clone();
    assert_eq!(
        (&first["state"], &first["metric"], &first["max_trials"]),
        (&json!("running"), &json!("eval/loss"), &json!(2))
    );

    for (what, state) in
        [("pause", SweepState::Paused), ("pause", SweepState::Paused), ("resume", SweepState::Running)]
    {
        let answer = post(&fixture, &format!("/api/sweeps/{id}/{what}"), &json!({})).await;
        assert_eq!((answer.code, fixture.sweep(id).await.state()), (200, state), "{what}");
    }
    let mut spec = get(&fixture, &format!("/api/sweeps/{id}")).await.json()["spec"].clone();
    spec["parameters"] = json!({ "lora_rank": [2, 4, 8] });
    let extend = json!({ "request_id": uuid::Uuid::new_v4().to_string(), "spec": spec });
    let answer = post(&fixture, &format!("/api/sweeps/{id}/extend"), &extend).await;
    assert_eq!((answer.code, fixture.sweep(id).await.max_trials), (200, Some(3)), "{}", answer.body);
    spec["name"] = json!("another");
    let extend = json!({ "request_id": uuid::Uuid::new_v4().to_string(), "spec": spec });
    let answer = post(&fixture, &format!("/api/sweeps/{id}/extend"), &extend).await;
    assert!(answer.code == 400 && answer.error().starts_with("spec.name: "), "{}", answer.body);
    assert_eq!(ask(&fixture, &format!("POST /api/sweeps/{id}/extend"), JSON, "{").await.code, 400);
    assert_eq!(post(&fixture, "/api/sweeps/none-1/pause", &json!({})).await.code, 404);
    assert_eq!(get(&fixture, "/api/sweeps/none-1/events").await.code, 404);

    let mut agent = FakeAgent::connect(&fixture, hello("a", 1, vec![])).await;
    let news = overview.next("agents", |news| news["changed"][0]["connected"] == json!(true)).await;
    assert_eq!(news["changed"][0]["devices"][0]["accelerator"], json!("CPU"));
    let assign = agent.assigned().await;
    let mut events = Events::open(&fixture, &format!("/api/sweeps/{id}/events")).await;
    let rows = events.next("trials", |_| true).await;
    let of_first = |rows: &Value, column: &str| rows["columns"][column][0].clone();
    assert_eq!((of_first(&rows, "n"), &rows["parameters"]["lora_rank"][0]), (json!(1), &json!(2)), "{rows}");
    assert_eq!(of_first(&rows, "lane"), json!(0), "{rows}");
    assert_eq!(events.next("lanes", |_| true).await, json!([["a", "cpu"]]));
    events.next("complete", |_| true).await;
    assert_eq!(events.next("importance", |_| true).await, json!({ "trials": 0, "parts": [] }));
    let mut log = Events::open(&fixture, &format!("/api/sweeps/{id}/trials/1/log")).await;
    assert_eq!(log.next("entry", |_| true).await["event"], json!("proposed"));
    agent.train(&assign, 1.25).await;
    let points = events.next("points", |_| true).await;
    assert_eq!((&points[0]["n"], &points[0]["attempt"]), (&json!(1), &json!(1)));
    assert!(points[0]["values"]["eval/loss"].is_number(), "{points}");
    let over =
        |rows: &Value| of_first(rows, "n") == json!(1) && of_first(rows, "state") == json!("completed");
    let row = events.next("trials", over).await;
    assert!(of_first(&row, "value").is_number() && of_first(&row, "took").is_number(), "{row}");
    assert_eq!(of_first(&row, "lane"), json!(0), "{row}");
    log.next("over", |_| true).await;

    let curve = get(&fixture, &format!("/api/sweeps/{id}/trials/1/metrics")).await.json();
    assert_eq!(curve["step"], json!([1, 2, 3, 4, 5, 6]));
    assert_eq!(curve["values"]["eval/loss"][0], json!(2.25), "{curve}");
    let trial = get(&fixture, &format!("/api/sweeps/{id}/trials/1")).await.json();
    assert_eq!((&trial["config"]["lora_rank"], &trial["state"]), (&json!(2), &json!("completed")));
    assert!(trial["config"]["lora_alpha"].is_number(), "every parameter in force: {trial}");
    let stop = post(&fixture, &format!("/api/sweeps/{id}/trials/1/stop"), &json!({})).await;
    assert_eq!(stop.code, 409, "{}", stop.body);

    let assign = agent.assigned().await;
    agent.start(&assign).await;
    let answer = post(&fixture, &format!("/api/sweeps/{id}/cancel"), &json!({})).await;
    assert_eq!(answer.code, 200, "{}", answer.body);
    agent.stopped().await;
    agent.finish(&assign, v1::Ending::Stopped, None).await;
    events.next("sweep", |sweep| sweep["state"] == json!("cancelled")).await;
    events.next("over", |_| true).await;
    overview.next("sweeps", |news| news["changed"][0]["state"] == json!("cancelled")).await;
}

/// The numbers of the page and of the report are those of one calculation. A grid of ten, of which the first is the best:
/// 0.0816 and 0.0625 by the formula of choices.
#[tokio::test]
async fn parameters_matter_as_the_report_says() {
    let fixture = Fixture::start(LONG).await;
    let mut document = grid(&[2, 4, 8, 16, 32]);
    document["parameters"]["learning_rate"] = json!([0.001, 0.002]);
    let id = fixture.submit(&document).await.id;
    let mut agent = FakeAgent::connect(&fixture, hello("a", 1, vec![])).await;
    for _ in 0..10 {
        let assign = agent.assigned().await;
        let config = assign.config.clone();
        let config: TrialConfig = proto::convert::from_document("config", config).unwrap();
        agent.train(&assign, f64::from(config.lora_rank) + 100.0 * config.learning_rate).await;
    }
    fixture.watch(&id).await.end().await;
    let mut events = Events::open(&fixture, &format!("/api/sweeps/{id}/events")).await;
    let want = json!({ "trials": 10, "parts": [["lora_rank", 0.566], ["learning_rate", 0.434]] });
    assert_eq!(events.next("importance", |_| true).await, want);
    events.next("over", |_| true).await;

    let format = v1::ReportFormat::Markdown.into();
    let request = v1::GetReportRequest { sweep_id: id, format };
    let mut pieces = fixture.sweeps().get_report(request).await.unwrap().into_inner();
    let mut report = Vec::new();
    while let Some(piece) = pieces.message().await.unwrap() {
        report.extend(piece.chunk);
    }
    let report = String::from_utf8(report).unwrap();
    for row in ["| lora\\_rank | 56.6 % |", "| learning\\_rate | 43.4 % |"] {
        assert!(report.contains(row), "{row} is not in\n{report}");
    }
}

#[tokio::test]
async fn pages_of_other_sites_ask_in_vain() {
    let fixture = Fixture::start(LONG).await;
    let sweep = fixture.submit(&grid(&[2])).await;
    let pause = format!("POST /api/sweeps/{}/pause", sweep.id);
    let json = "Content-Type: application/json\r\n";
    for (path, headers, want) in [
        ("GET /api/server", "Host: 127.0.0.1:7401\r\n".to_string(), 200),
        ("GET /api/server", "Host: [::1]:7401\r\n".into(), 200),
        ("GET /api/server", format!("{FROM_HERE}Sec-Fetch-Site: same-origin\r\n"), 200),
        // A name that was made to lead here.
        ("GET /api/server", "Host: attacker.example\r\n".into(), 403),
        ("GET /api/server", "Host: 127.0.0.1.attacker.example\r\n".into(), 403),
        ("GET /api/server", "Host: 192.168.1.7:7401\r\n".into(), 403),
        ("GET /api/server", String::new(), 403),
        ("GET /api/server", format!("{FROM_HERE}Sec-Fetch-Site: cross-site\r\n"), 403),
        ("GET /api/server", format!("{FROM_HERE}Sec-Fetch-Site: same-site\r\n"), 403),
        (pause.as_str(), format!("{FROM_HERE}{json}Origin: http://attacker.example\r\n"), 403),
        // Another program's page on this machine.
        (pause.as_str(), format!("{FROM_HERE}{json}Origin: http://localhost:3000\r\n"), 403),
        (pause.as_str(), format!("{FROM_HERE}{json}Origin: null\r\n"), 403),
        // What a form can say without asking first.
        (pause.as_str(), format!("{FROM_HERE}Content-Type: text/plain\r\n"), 415),
        (pause.as_str(), FROM_HERE.into(), 415),
        ("POST /lorafleet.v1.SweepService/CancelSweep", FROM_HERE.into(), 404),
        ("OPTIONS /api/sweeps/x/pause", FROM_HERE.into(), 404),
    ] {
        let answer = ask(&fixture, path, &headers, "").await;
        assert_eq!(answer.code, want, "{path} {headers}: {}", answer.body);
        assert!(answer.header("access-control-allow-origin").is_none());
        assert_eq!(fixture.sweep(&sweep.id).await.state(), SweepState::Running, "{path} {headers}");
    }
    let own = format!("{JSON}Origin: http://localhost:7401\r\nSec-Fetch-Site: same-origin\r\n");
    assert_eq!(ask(&fixture, &pause, &own, "{}").await.code, 200);
    assert_eq!(fixture.sweep(&sweep.id).await.state(), SweepState::Paused);
}

#[tokio::test]
async fn a_token_may_ask_what_its_role_may_call() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("tokens.yaml");
    let known =
        [("vi", Role::Viewer), ("sub", Role::Submitter), ("op", Role::Operator), ("gpu", Role::Agent)];
    write_tokens(&file, &known);
    let fixture = Fixture::start_guarded(LONG, access_by(&file), "op").await;
    let id = fixture.submit(&grid(&[2])).await.id;
    // Nobody has to show who they are for what is the same for all.
    assert_eq!(get(&fixture, "/").await.code, 200);
    let pause = format!("POST /api/sweeps/{id}/pause");
    let read = format!("GET /api/sweeps/{id}");
    for (token, reads, changes) in [
        (None, 401, 401),
        (Some("unknown"), 401, 401),
        (Some("vi"), 200, 403),
        (Some("sub"), 200, 200),
        (Some("op"), 200, 200),
        (Some("gpu"), 403, 403),
    ] {
        // With tokens a server has whatever name it has.
        let named = JSON.replace("localhost:7401", "fleet.example.org");
        let headers =
            token.map_or(named.clone(), |token| format!("{named}Authorization: Bearer {token}\r\n"));
        assert_eq!(ask(&fixture, &read, &headers, "").await.code, reads, "{token:?}");
        let answer = ask(&fixture, &pause, &headers, "{}").await;
        assert_eq!(answer.code, changes, "{token:?}: {}", answer.body);
        if changes == 200 {
            let server = ask(&fixture, "GET /api/server", &headers, "").await.json();
            assert_eq!((&server["user"], &server["may_change"]), (&json!(token), &json!(true)));
        }
    }
}

#[test]
fn beyond_this_machine_the_page_is_for_tokens_alone() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("tokens.yaml");
    write_tokens(&file, &[("op", Role::Operator)]);
    for (listen, tokens, want) in [
        ("127.0.0.1:7401", false, true),
        ("[::1]:7401", false, true),
        ("0.0.0.0:7401", false, false),
        ("192.168.1.7:7401", false, false),
        ("[::]:7401", false, false),
        ("0.0.0.0:7401", true, true),
        ("127.0.0.1:7401", true, true),
    ] {
        let access = if tokens { access_by(&file) } else { Access::default() };
        assert_eq!(is_served(listen.parse().unwrap(), &access), want, "{listen} {tokens}");
    }
}
