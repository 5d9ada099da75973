//! A fake of an MLflow tracking server: the few paths of its REST API that an export calls, answered as MLflow 3.17 answers
//! them, on a thread of the test. What a real one would refuse it refuses, and a point that comes twice is kept twice.
//! The real one is in `tests/tools/exports.py`.

use serde_json::{Map, Value, json};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

/// A fake server, until the test ends.
pub struct Mlflow {
    pub uri: String,
    state: Arc<Mutex<State>>,
}

/// What it holds.
#[derive(Default)]
pub struct State {
    /// Experiments by name; `lifecycle_stage` among their fields.
    pub experiments: Map<String, Value>,
    /// Runs in the order in which they were made, as a search answers them, but with every point of every metric.
    pub runs: Vec<Value>,
    /// Each call's path, and who called.
    pub calls: Vec<(String, Option<String>)>,
    /// Batches of metrics that are still answered well; of the next, half is stored and 503 answered.
    pub batches: Option<usize>,
    /// What every call is answered, if not what it asks for.
    pub answer: Option<(u16, &'static str)>,
}

impl Mlflow {
    pub fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let uri = format!("http://{}", listener.local_addr().unwrap());
        let state = Arc::new(Mutex::new(State::default()));
        let shared = state.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                // A caller that was stopped is gone.
                let _ = serve(stream.unwrap(), &shared);
            }
        });
        Self { uri, state }
    }

    /// What it holds now.
    pub fn with<T>(&self, work: impl FnOnce(&mut State) -> T) -> T {
        work(&mut self.state.lock().unwrap())
    }
}

fn serve(stream: TcpStream, state: &Mutex<State>) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream);
    let (mut head, mut line) = (Vec::new(), String::new());
    while reader.read_line(&mut line)? > 2 {
        head.push(std::mem::take(&mut line));
    }
    let header = |name: &str| {
        let found = head.iter().filter_map(|line| line.split_once(':'));
        let mut found = found.filter(|(key, _)| key.eq_ignore_ascii_case(name));
        found.next().map(|(_, value)| value.trim().to_string())
    };
    let mut body = vec![0; header("content-length").map_or(0, |length| length.parse().unwrap())];
    reader.read_exact(&mut body)?;
    let Some(target) = head.first().and_then(|line| line.split(' ').nth(1)) else { return Ok(()) };
    let body: Value = serde_json::from_slice(&body).unwrap_or_default();
    let mut state = state.lock().unwrap();
    state.calls.push((target.to_string(), header("authorization")));
    let (status, answer) = match state.answer {
        Some((status, text)) => (status, text.to_string()),
        None => match state.call(target.strip_prefix("/api/2.0/mlflow/").unwrap_or_default(), &body) {
            Ok(answer) => (200, answer.to_string()),
            Err((status, code, message)) => {
                (status, json!({ "error_code": code, "message": message }).to_string())
            }
        },
    };
    let length = answer.len();
    let head = format!("HTTP/1.1 {status} x\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n");
    reader.get_mut().write_all(format!("{head}{answer}").as_bytes())
}

type Refusal = (u16, &'static str, String);

impl State {
    fn call(&mut self, path: &str, body: &Value) -> Result<Value, Refusal> {
        let invalid = |message: String| (400, "INVALID_PARAMETER_VALUE", message);
        match path.split_once('?').unwrap_or((path, "")) {
            ("experiments/get-by-name", query) => {
                let name = query.strip_prefix("experiment_name=").unwrap_or_default();
                let unknown = (404, "RESOURCE_DOES_NOT_EXIST", format!("no experiment {name}"));
                let found = self.experiments.get(name).ok_or(unknown)?;
                Ok(json!({ "experiment": found }))
            }
            ("experiments/create", _) => {
                let (name, id) = (body["name"].as_str().unwrap(), self.experiments.len().to_string());
                let made = json!({ "experiment_id": id, "name": name, "lifecycle_stage": "active" });
                self.experiments.insert(name.into(), made);
                Ok(json!({ "experiment_id": id }))
            }
            ("runs/create", _) => {
                let id = format!("run{}", self.runs.len());
                let mut tags = body["tags"].as_array().unwrap().clone();
                tags.push(json!({ "key": "mlflow.runName", "value": body["run_name"] }));
                let info = json!({
                    "run_id": id, "run_name": body["run_name"], "experiment_id": body["experiment_id"],
                    "status": "RUNNING", "start_time": body["start_time"],
                });
                let data = json!({ "tags": tags, "params": [], "metrics": [] });
                self.runs.push(json!({ "info": info, "data": data }));
                Ok(json!({ "run": self.runs.last() }))
            }
            ("runs/search", _) => {
                let filter = body["filter"].as_str().unwrap();
                let (key, value) = filter.split_once(" = ").unwrap();
                let key = key.strip_prefix("tags.`").unwrap().trim_end_matches('`');
                let tag = json!({ "key": key, "value": value.trim_matches('\'') });
                let tagged = |run: &&Value| run["data"]["tags"].as_array().unwrap().contains(&tag);
                let found: Vec<_> = self.runs.iter().filter(tagged).map(latest).collect();
                // A page has two.
                let at: usize = body["page_token"].as_str().map_or(0, |token| token.parse().unwrap());
                let mut answer = json!({ "runs": found.iter().skip(at).take(2).collect::<Vec<_>>() });
                if at + 2 < found.len() {
                    answer["next_page_token"] = json!((at + 2).to_string());
                }
                Ok(answer)
            }
            ("runs/log-batch", _) => {
                let items = |key: &str| body[key].as_array().cloned().unwrap_or_default();
                let (params, mut metrics, tags) = (items("params"), items("metrics"), items("tags"));
                let all = params.len() + metrics.len() + tags.len();
                if all > 1000 || params.len() > 100 || tags.len() > 100 {
                    return Err(invalid(format!("a batch of {all}")));
                }
                let cut = self.batches == Some(0) && !metrics.is_empty();
                if cut {
                    metrics.truncate(metrics.len() / 2);
                } else if !metrics.is_empty() {
                    self.batches = self.batches.map(|batches| batches - 1);
                }
                let data = &mut self.run(body)?["data"];
                for param in params {
                    let list = data["params"].as_array_mut().unwrap();
                    match list.iter().find(|has| has["key"] == param["key"]) {
                        None => list.push(param),
                        Some(has) if *has == param => {}
                        Some(has) => return Err(invalid(format!("{has} cannot become {param}"))),
                    }
                }
                for tag in tags {
                    let list = data["tags"].as_array_mut().unwrap();
                    list.retain(|has| has["key"] != tag["key"]);
                    list.push(tag);
                }
                data["metrics"].as_array_mut().unwrap().extend(metrics);
                match cut {
                    true => Err((503, "TEMPORARILY_UNAVAILABLE", "the database is locked".into())),
                    false => Ok(json!({})),
                }
            }
            ("runs/update", _) => {
                let info = &mut self.run(body)?["info"];
                for key in ["status", "end_time"] {
                    if let Some(value) = body.get(key) {
                        info[key] = value.clone();
                    }
                }
                Ok(json!({ "run_info": info }))
            }
            _ => Err((404, "ENDPOINT_NOT_FOUND", path.into())),
        }
    }

    fn run(&mut self, body: &Value) -> Result<&mut Value, Refusal> {
        let unknown = (404, "RESOURCE_DOES_NOT_EXIST", format!("no run {}", body["run_id"]));
        self.runs.iter_mut().find(|run| run["info"]["run_id"] == body["run_id"]).ok_or(unknown)
    }
}

/// A run as a search answers it: of each metric, the last point.
fn latest(run: &Value) -> Value {
    let mut last: Map<String, Value> = Map::new();
    for metric in run["data"]["metrics"].as_array().unwrap() {
        let key = metric["key"].as_str().unwrap();
        if last.get(key).is_none_or(|last| last["step"].as_u64() <= metric["step"].as_u64()) {
            last.insert(key.into(), metric.clone());
        }
    }
    let mut run = run.clone();
    run["data"]["metrics"] = last.into_iter().map(|(_, metric)| metric).collect();
    run
}
