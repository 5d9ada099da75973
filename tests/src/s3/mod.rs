//! A store that speaks S3's protocol on a free port of this machine: as much of it as object_store asks for, as strictly
//! as S3 is where that matters to us (create-only puts, the least size of a part, pages of listings), and faults on
//! demand. It is no store to keep anything in: all of it is in memory, and signatures are looked for but not computed.

mod text;

use http_body_util::BodyExt;
use hyper::body::{Body, Bytes, Frame, Incoming, SizeHint};
use hyper::header::{AUTHORIZATION, IF_NONE_MATCH, RANGE};
use hyper::http::response::Builder;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::thread::JoinHandle;
use text::{decoded, elements, escaped, hex};
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, oneshot};
use tokio::task::JoinSet;

/// The one bucket.
pub const BUCKET: &str = "fleet";
/// The id of the one key that is let in.
pub const KEY: &str = "a-key-of-tests";
/// What is to be signed with.
pub const SECRET: &str = "a-secret-of-tests";

/// Bytes that each part of an upload has at least, but the last.
const LEAST_PART: usize = 5 << 20;
/// Objects in a page of a listing; S3 has 1,000.
const PAGE: usize = 7;
const DAY: &str = "Thu, 01 Jan 2026 00:00:00 GMT";

/// What goes wrong with a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Nothing is done, and this is the answer.
    Status(u16),
    /// It is done, and the connection ends without an answer.
    Lost,
    /// The connection ends in the middle of the answer's body.
    Truncated,
    /// A byte in the middle of the answer's body is another.
    Corrupted,
    /// An object is replaced that was to be created only.
    Replaced,
}

/// A request that waits for the test.
#[derive(Debug, Clone)]
pub struct Held {
    arrived: Arc<Semaphore>,
    released: Arc<Semaphore>,
}

impl Held {
    /// Returns once the request is here.
    ///
    /// # Panics
    /// Never: the semaphore is not closed.
    #[allow(clippy::expect_used, reason = "a test fails by panicking")]
    pub async fn arrived(&self) {
        self.arrived.acquire().await.expect("it is not closed").forget();
    }

    /// Lets it go on.
    pub fn release(&self) {
        self.released.add_permits(1);
    }
}

#[derive(Debug)]
enum Order {
    Fail(Fault),
    Hold(Held),
}

/// Orders for the next requests of a method whose key has this in it.
#[derive(Debug)]
struct Expected {
    method: &'static str,
    key: String,
    times: usize,
    order: Order,
}

#[derive(Debug, Default)]
struct State {
    objects: BTreeMap<String, Bytes>,
    /// Uploads in parts by their ids, each with its key.
    uploads: BTreeMap<String, (String, BTreeMap<u32, Bytes>)>,
    ids: u64,
    expected: Vec<Expected>,
    /// Method and key of each request.
    requests: Vec<(String, String)>,
}

/// The store. It ends when it is dropped.
#[derive(Debug)]
pub struct S3 {
    /// Where it serves, as `http://127.0.0.1:<port>`.
    pub endpoint: String,
    state: Arc<Mutex<State>>,
    stop: Option<oneshot::Sender<Infallible>>,
    thread: Option<JoinHandle<()>>,
}

impl S3 {
    /// Starts one with an empty bucket, on a thread of its own.
    ///
    /// # Panics
    /// It does not start.
    #[allow(clippy::expect_used, reason = "a test fails by panicking")]
    pub fn start() -> Self {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port is free");
        listener.set_nonblocking(true).expect("it is a socket");
        let endpoint = format!("http://{}", listener.local_addr().expect("it is bound"));
        let state = Arc::<Mutex<State>>::default();
        let (stop, stopped) = oneshot::channel();
        let (runtime, served) =
            (tokio::runtime::Builder::new_current_thread().enable_all().build(), state.clone());
        let runtime = runtime.expect("a runtime starts");
        let thread = std::thread::spawn(move || {
            runtime.block_on(async {
                let listener = TcpListener::from_std(listener).expect("it is a socket");
                tokio::select! {
                    () = accept(listener, served) => {}
                    _ = stopped => {}
                }
            });
        });
        Self { endpoint, state, stop: Some(stop), thread: Some(thread) }
    }

    /// The variables by which a program finds it.
    pub fn variables(&self) -> [(&'static str, &str); 4] {
        [
            ("AWS_ENDPOINT_URL", &self.endpoint),
            ("AWS_ALLOW_HTTP", "true"),
            ("AWS_ACCESS_KEY_ID", KEY),
            ("AWS_SECRET_ACCESS_KEY", SECRET),
        ]
    }

    /// Lets the next requests of a method whose key (with the query) has `key` in it fail.
    pub fn fail(&self, method: &'static str, key: &str, fault: Fault, times: usize) {
        self.expect(method, key, times, Order::Fail(fault));
    }

    /// Lets the next such request wait, before anything is done.
    pub fn hold(&self, method: &'static str, key: &str) -> Held {
        let held = Held { arrived: Arc::new(Semaphore::new(0)), released: Arc::new(Semaphore::new(0)) };
        self.expect(method, key, 1, Order::Hold(held.clone()));
        held
    }

    /// Nothing fails any more.
    pub fn heal(&self) {
        self.state().expected.clear();
    }

    /// The keys of all objects that have this in them.
    pub fn keys(&self, part: &str) -> Vec<String> {
        self.state().objects.keys().filter(|key| key.contains(part)).cloned().collect()
    }

    /// Sets an object, or removes it.
    pub fn set(&self, key: &str, content: Option<&[u8]>) {
        match content {
            Some(bytes) => drop(self.state().objects.insert(key.into(), Bytes::copy_from_slice(bytes))),
            None => drop(self.state().objects.remove(key)),
        }
    }

    /// Uploads in parts that were begun, and neither completed nor given up.
    pub fn uploads(&self) -> usize {
        self.state().uploads.len()
    }

    /// Requests so far of a method whose key (with the query) has this in it.
    pub fn requests(&self, method: &str, key: &str) -> usize {
        self.state().requests.iter().filter(|(m, k)| m == method && k.contains(key)).count()
    }

    fn expect(&self, method: &'static str, key: &str, times: usize, order: Order) {
        self.state().expected.push(Expected { method, key: key.into(), times, order });
    }

    fn state(&self) -> MutexGuard<'_, State> {
        locked(&self.state)
    }
}

impl Drop for S3 {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            // It panics only if a test's machine has no sockets, and then nothing worked.
            let _ = thread.join();
        }
    }
}

fn locked(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn accept(listener: TcpListener, state: Arc<Mutex<State>>) {
    let mut connections = JoinSet::new();
    while let Ok((stream, _)) = listener.accept().await {
        let state = state.clone();
        connections.spawn(async move {
            let service = service_fn(move |request| answer(state.clone(), request));
            // That a connection breaks is what some tests are about.
            let _ = hyper::server::conn::http1::Builder::new()
                .serve_connection(TokioIo::new(stream), service)
                .await;
        });
    }
}

/// A body, which may break off.
struct Content {
    bytes: Option<Bytes>,
    breaks: bool,
}

impl Body for Content {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        Poll::Ready(match self.bytes.take() {
            Some(bytes) => Some(Ok(Frame::data(bytes))),
            None if self.breaks => Some(Err(broken())),
            None => None,
        })
    }

    fn size_hint(&self) -> SizeHint {
        match &self.bytes {
            // How long it would have been stands in the header.
            _ if self.breaks => SizeHint::default(),
            bytes => SizeHint::with_exact(bytes.as_ref().map_or(0, Bytes::len) as u64),
        }
    }
}

fn broken() -> io::Error {
    io::Error::other("on purpose")
}

/// A request that was taken apart.
struct Asked {
    method: String,
    /// Without the bucket.
    key: String,
    query: BTreeMap<String, String>,
    create_only: bool,
    range: Option<String>,
    body: Bytes,
}

/// Status, headers, body.
type Done = (StatusCode, Vec<(&'static str, String)>, Bytes);

async fn answer(state: Arc<Mutex<State>>, request: Request<Incoming>) -> io::Result<Response<Content>> {
    let (head, body) = request.into_parts();
    let body = body.collect().await.map_err(io::Error::other)?.to_bytes();
    let header = |name: &str| head.headers.get(name).and_then(|value| value.to_str().ok()).map(String::from);
    let path = decoded(head.uri.path());
    let (bucket, key) =
        path.trim_start_matches('/').split_once('/').unwrap_or((path.trim_start_matches('/'), ""));
    let text = head.uri.query().unwrap_or_default();
    let pairs = text.split('&').filter(|pair| !pair.is_empty());
    let query =
        pairs.map(|pair| pair.split_once('=').unwrap_or((pair, ""))).map(|(k, v)| (decoded(k), decoded(v)));
    let mut asked = Asked {
        method: head.method.to_string(),
        key: key.into(),
        query: query.collect(),
        create_only: header(IF_NONE_MATCH.as_str()).as_deref() == Some("*"),
        range: header(RANGE.as_str()),
        body,
    };
    let order = ordered(&state, &asked.method, &format!("{key}?{text}"));
    if let Some(Order::Hold(held)) = &order {
        held.arrived.add_permits(1);
        // It is never closed.
        let _ = held.released.acquire().await.map(tokio::sync::SemaphorePermit::forget);
    }
    asked.create_only &= !matches!(order, Some(Order::Fail(Fault::Replaced)));
    let let_in = header(AUTHORIZATION.as_str())
        .is_some_and(|signed| signed.starts_with(&format!("AWS4-HMAC-SHA256 Credential={KEY}/")));
    let signed = header("x-amz-content-sha256").filter(|hash| hash.len() == 64);
    let changed = signed.is_some_and(|hash| hash != hex(&Sha256::digest(&asked.body)));
    let done = match &order {
        Some(Order::Fail(Fault::Status(code))) => {
            refused(StatusCode::from_u16(*code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR), "InternalError")
        }
        _ if !let_in => refused(StatusCode::FORBIDDEN, "AccessDenied"),
        _ if bucket != BUCKET => refused(StatusCode::NOT_FOUND, "NoSuchBucket"),
        _ if changed => refused(StatusCode::BAD_REQUEST, "XAmzContentSHA256Mismatch"),
        _ => locked(&state).do_it(&asked),
    };
    let (status, headers, mut bytes) = done;
    let mut builder: Builder = Response::builder().status(status);
    for (name, value) in headers {
        builder = builder.header(name, value);
    }
    let mut breaks = false;
    match order {
        Some(Order::Fail(Fault::Lost)) => return Err(broken()),
        Some(Order::Fail(Fault::Truncated)) => {
            builder = builder.header("content-length", bytes.len());
            bytes.truncate(bytes.len() / 2);
            breaks = true;
        }
        Some(Order::Fail(Fault::Corrupted)) => {
            let mut other = bytes.to_vec();
            let middle = other.len() / 2;
            other.iter_mut().skip(middle).take(1).for_each(|byte| *byte = !*byte);
            bytes = other.into();
        }
        _ => {}
    }
    builder.body(Content { bytes: Some(bytes), breaks }).map_err(io::Error::other)
}

/// What was ordered for such a request, counted off.
fn ordered(state: &Mutex<State>, method: &str, key: &str) -> Option<Order> {
    let mut state = locked(state);
    state.requests.push((method.into(), key.into()));
    let at = state.expected.iter().position(|e| e.method == method && key.contains(&e.key))?;
    let expected = &mut state.expected[at];
    expected.times -= 1;
    let order = match &expected.order {
        Order::Fail(fault) => Order::Fail(*fault),
        Order::Hold(held) => Order::Hold(held.clone()),
    };
    if expected.times == 0 {
        state.expected.remove(at);
    }
    Some(order)
}

impl State {
    fn do_it(&mut self, asked: &Asked) -> Done {
        let query = |name: &str| asked.query.get(name).map(String::as_str);
        match (asked.method.as_str(), query("uploadId")) {
            ("GET", _) if query("list-type") == Some("2") => self.list(asked),
            ("GET" | "HEAD", _) => self.get(asked),
            ("PUT", Some(id)) => self.put_part(id, query("partNumber").unwrap_or_default(), &asked.body),
            ("PUT", None) => self.put(asked),
            ("DELETE", Some(id)) => match self.uploads.remove(id) {
                Some(_) => (StatusCode::NO_CONTENT, Vec::new(), Bytes::new()),
                None => refused(StatusCode::NOT_FOUND, "NoSuchUpload"),
            },
            ("DELETE", None) => {
                self.objects.remove(&asked.key);
                (StatusCode::NO_CONTENT, Vec::new(), Bytes::new())
            }
            ("POST", Some(id)) => self.complete(id, &asked.body),
            ("POST", None) if query("uploads").is_some() => {
                self.ids += 1;
                let id = format!("upload-{}", self.ids);
                self.uploads.insert(id.clone(), (asked.key.clone(), BTreeMap::new()));
                xml("InitiateMultipartUploadResult", &format!("<UploadId>{id}</UploadId>"))
            }
            ("POST", None) if query("delete").is_some() => {
                let keys = elements(&asked.body, "Key");
                keys.iter().for_each(|key| drop(self.objects.remove(key)));
                let deleted =
                    keys.iter().map(|key| format!("<Deleted><Key>{}</Key></Deleted>", escaped(key)));
                xml("DeleteResult", &deleted.collect::<String>())
            }
            _ => refused(StatusCode::NOT_IMPLEMENTED, "NotImplemented"),
        }
    }

    fn get(&self, asked: &Asked) -> Done {
        let Some(object) = self.objects.get(&asked.key) else {
            return refused(StatusCode::NOT_FOUND, "NoSuchKey");
        };
        let mut headers = vec![("etag", etag(object)), ("last-modified", DAY.into())];
        let range = asked.range.as_deref().and_then(|range| range.strip_prefix("bytes=")?.split_once('-'));
        let Some((from, to)) = range else { return (StatusCode::OK, headers, object.clone()) };
        let (from, last) = (from.parse().unwrap_or(0), object.len().saturating_sub(1));
        let to = to.parse().unwrap_or(last).min(last);
        if from > to || object.is_empty() {
            return refused(StatusCode::RANGE_NOT_SATISFIABLE, "InvalidRange");
        }
        headers.push(("content-range", format!("bytes {from}-{to}/{}", object.len())));
        (StatusCode::PARTIAL_CONTENT, headers, object.slice(from..=to))
    }

    fn put(&mut self, asked: &Asked) -> Done {
        if asked.create_only && self.objects.contains_key(&asked.key) {
            return refused(StatusCode::PRECONDITION_FAILED, "PreconditionFailed");
        }
        let etag = etag(&asked.body);
        self.objects.insert(asked.key.clone(), asked.body.clone());
        (StatusCode::OK, vec![("etag", etag)], Bytes::new())
    }

    fn put_part(&mut self, id: &str, number: &str, body: &Bytes) -> Done {
        let (Some((_, parts)), Ok(number)) = (self.uploads.get_mut(id), number.parse()) else {
            return refused(StatusCode::NOT_FOUND, "NoSuchUpload");
        };
        parts.insert(number, body.clone());
        (StatusCode::OK, vec![("etag", etag(body))], Bytes::new())
    }

    fn complete(&mut self, id: &str, body: &Bytes) -> Done {
        let Some((key, parts)) = self.uploads.get(id) else {
            return refused(StatusCode::NOT_FOUND, "NoSuchUpload");
        };
        let numbers: Vec<u32> =
            elements(body, "PartNumber").iter().flat_map(|number| number.parse()).collect();
        let named: Option<Vec<&Bytes>> = numbers.iter().map(|number| parts.get(number)).collect();
        let tags = elements(body, "ETag");
        let Some(named) = named.filter(|named| named.iter().map(|part| etag(part)).eq(tags)) else {
            return refused(StatusCode::BAD_REQUEST, "InvalidPart");
        };
        let Some((_, before)) = named.split_last() else {
            return refused(StatusCode::BAD_REQUEST, "MalformedXML");
        };
        if before.iter().any(|part| part.len() < LEAST_PART) {
            return refused(StatusCode::BAD_REQUEST, "EntityTooSmall");
        }
        let (key, object) =
            (key.clone(), Bytes::from(named.iter().flat_map(|part| part.to_vec()).collect::<Vec<_>>()));
        let tag = format!("<ETag>{}</ETag>", escaped(&etag(&object)));
        self.objects.insert(key, object);
        self.uploads.remove(id);
        xml("CompleteMultipartUploadResult", &tag)
    }

    fn list(&self, asked: &Asked) -> Done {
        let query = |name: &str| asked.query.get(name).map(String::as_str).unwrap_or_default();
        let (prefix, delimiter) = (query("prefix"), query("delimiter"));
        let after = query("continuation-token").max(query("start-after"));
        let (mut content, mut folders, mut last, mut more) =
            (String::new(), BTreeSet::new(), String::new(), false);
        let mut room = PAGE;
        for (key, object) in &self.objects {
            let Some(rest) = key.strip_prefix(prefix).filter(|_| key.as_str() > after) else { continue };
            let folder = rest.split_once(delimiter).filter(|_| !delimiter.is_empty());
            let folder = folder.map(|(folder, _)| format!("{prefix}{folder}{delimiter}"));
            if room == 0 && folder.as_ref().is_none_or(|folder| !folders.contains(folder)) {
                more = true;
                break;
            }
            last.clone_from(key);
            match folder {
                Some(folder) => room -= usize::from(folders.insert(folder)),
                None => {
                    room -= 1;
                    let (key, tag) = (escaped(key), escaped(&etag(object)));
                    content += &format!(
                        "<Contents><Key>{key}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>\
                         <ETag>{tag}</ETag><Size>{}</Size></Contents>",
                        object.len()
                    );
                }
            }
        }
        for folder in folders {
            content += &format!("<CommonPrefixes><Prefix>{}</Prefix></CommonPrefixes>", escaped(&folder));
        }
        content += &format!("<IsTruncated>{more}</IsTruncated>");
        if more {
            content += &format!("<NextContinuationToken>{}</NextContinuationToken>", escaped(&last));
        }
        xml("ListBucketResult", &content)
    }
}

fn xml(root: &str, content: &str) -> Done {
    let text = format!("<?xml version=\"1.0\" encoding=\"UTF-8\"?><{root}>{content}</{root}>");
    (StatusCode::OK, vec![("content-type", "application/xml".into())], text.into())
}

/// As S3 does, it repeats whose key signed the request.
fn refused(status: StatusCode, code: &str) -> Done {
    let key = format!("<AWSAccessKeyId>{KEY}</AWSAccessKeyId>");
    let (_, headers, body) = xml("Error", &format!("<Code>{code}</Code>{key}"));
    (status, headers, body)
}

/// Length, first and last bytes tell objects of tests apart.
fn etag(bytes: &[u8]) -> String {
    let mut digest = Sha256::new();
    digest.update(bytes.len().to_le_bytes());
    digest.update(&bytes[..bytes.len().min(4096)]);
    digest.update(&bytes[bytes.len().saturating_sub(4096)..]);
    format!("\"{}\"", &hex(&digest.finalize())[..32])
}
