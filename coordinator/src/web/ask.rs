//! What a request asks for. Each thing is a method of the gRPC services, whose row in the guard's table says who may.

use tonic::codegen::http::Method;

/// What may be asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ask {
    /// The server, and who asks.
    Server,
    /// All sweeps and agents, and how they change.
    Overview,
    /// One sweep with its document.
    Sweep,
    /// A sweep and its trials, and how they change.
    Changes,
    /// One trial in full.
    Trial,
    /// A trial's curve.
    Metrics,
    /// A trial's log, and what is added to it.
    Log,
    /// Changes of a sweep.
    Pause,
    Resume,
    Cancel,
    Extend,
    /// Changes of a trial.
    Stop,
    Retry,
}

/// What is asked for, and of which sweep and trial.
#[derive(Debug, PartialEq, Eq)]
pub struct Asked {
    /// What.
    pub what: Ask,
    /// The sweep's id, if it is about one.
    pub sweep: String,
    /// The trial's number, if it is about one.
    pub number: u32,
}

impl Ask {
    /// What a request asks for; `None`: nothing that there is. Ids have no characters that a path would have to quote.
    pub fn of(method: &Method, path: &str) -> Option<Asked> {
        let path = path.strip_prefix("/api/")?;
        let parts: Vec<_> = path.split('/').collect();
        let reads = *method == Method::GET;
        if !reads && *method != Method::POST {
            return None;
        }
        let (what, sweep, number) = match (reads, parts.as_slice()) {
            (true, ["server"]) => (Self::Server, "", ""),
            (true, ["events"]) => (Self::Overview, "", ""),
            (true, ["sweeps", sweep]) => (Self::Sweep, *sweep, ""),
            (true, ["sweeps", sweep, "events"]) => (Self::Changes, *sweep, ""),
            (true, ["sweeps", sweep, "trials", number]) => (Self::Trial, *sweep, *number),
            (true, ["sweeps", sweep, "trials", number, "metrics"]) => (Self::Metrics, *sweep, *number),
            (true, ["sweeps", sweep, "trials", number, "log"]) => (Self::Log, *sweep, *number),
            (false, ["sweeps", sweep, "pause"]) => (Self::Pause, *sweep, ""),
            (false, ["sweeps", sweep, "resume"]) => (Self::Resume, *sweep, ""),
            (false, ["sweeps", sweep, "cancel"]) => (Self::Cancel, *sweep, ""),
            (false, ["sweeps", sweep, "extend"]) => (Self::Extend, *sweep, ""),
            (false, ["sweeps", sweep, "trials", number, "stop"]) => (Self::Stop, *sweep, *number),
            (false, ["sweeps", sweep, "trials", number, "retry"]) => (Self::Retry, *sweep, *number),
            _ => return None,
        };
        let number = if number.is_empty() { 0 } else { number.parse().ok()? };
        Some(Asked { what, sweep: sweep.into(), number })
    }

    /// The method of the gRPC services that is the same.
    pub fn method(self) -> &'static str {
        match self {
            Self::Server => "/lorafleet.v1.FleetService/GetServerInfo",
            // Whoever may list sweeps may list agents; a test says so.
            Self::Overview => "/lorafleet.v1.SweepService/ListSweeps",
            Self::Sweep => "/lorafleet.v1.SweepService/GetSweep",
            Self::Changes => "/lorafleet.v1.SweepService/WatchSweep",
            Self::Trial => "/lorafleet.v1.TrialService/GetTrial",
            Self::Metrics => "/lorafleet.v1.TrialService/GetTrialMetrics",
            Self::Log => "/lorafleet.v1.TrialService/GetTrialLog",
            Self::Pause => "/lorafleet.v1.SweepService/PauseSweep",
            Self::Resume => "/lorafleet.v1.SweepService/ResumeSweep",
            Self::Cancel => "/lorafleet.v1.SweepService/CancelSweep",
            Self::Extend => "/lorafleet.v1.SweepService/ExtendSweep",
            Self::Stop => "/lorafleet.v1.TrialService/StopTrial",
            Self::Retry => "/lorafleet.v1.TrialService/RetryTrial",
        }
    }

    /// Whether it changes something.
    pub fn changes(self) -> bool {
        matches!(self, Self::Pause | Self::Resume | Self::Cancel | Self::Extend | Self::Stop | Self::Retry)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::grpc::guard::Who;

    #[test]
    fn what_paths_ask_for() {
        let rows = [
            ("GET", "/api/server", Some((Ask::Server, "", 0))),
            ("GET", "/api/events", Some((Ask::Overview, "", 0))),
            ("GET", "/api/sweeps/a.b-1f", Some((Ask::Sweep, "a.b-1f", 0))),
            ("GET", "/api/sweeps/a-1/events", Some((Ask::Changes, "a-1", 0))),
            ("GET", "/api/sweeps/a-1/trials/7", Some((Ask::Trial, "a-1", 7))),
            ("GET", "/api/sweeps/a-1/trials/7/metrics", Some((Ask::Metrics, "a-1", 7))),
            ("GET", "/api/sweeps/a-1/trials/7/log", Some((Ask::Log, "a-1", 7))),
            ("POST", "/api/sweeps/a-1/pause", Some((Ask::Pause, "a-1", 0))),
            ("POST", "/api/sweeps/a-1/resume", Some((Ask::Resume, "a-1", 0))),
            ("POST", "/api/sweeps/a-1/cancel", Some((Ask::Cancel, "a-1", 0))),
            ("POST", "/api/sweeps/a-1/extend", Some((Ask::Extend, "a-1", 0))),
            ("POST", "/api/sweeps/a-1/trials/7/stop", Some((Ask::Stop, "a-1", 7))),
            ("POST", "/api/sweeps/a-1/trials/7/retry", Some((Ask::Retry, "a-1", 7))),
            // A link, or an image on a page of another site, asks with GET.
            ("GET", "/api/sweeps/a-1/cancel", None),
            ("HEAD", "/api/server", None),
            ("OPTIONS", "/api/sweeps/a-1/cancel", None),
            ("POST", "/api/sweeps/a-1", None),
            ("GET", "/api/sweeps/a-1/trials/x", None),
            ("GET", "/api/sweeps/a-1/trials/7/metrics/more", None),
            ("GET", "/server", None),
            ("POST", "/lorafleet.v1.SweepService/CancelSweep", None),
        ];
        for (method, path, want) in rows {
            let asked = Ask::of(&method.parse().unwrap(), path);
            let want = want.map(|(what, sweep, number)| Asked { what, sweep: sweep.into(), number });
            assert_eq!(asked, want, "{method} {path}");
            let Some(asked) = asked else { continue };
            assert!(Who::of(asked.what.method()).is_some(), "{path}: the guard knows its method");
            assert_eq!(asked.what.changes(), method == "POST", "{path}");
        }
        let agents = Who::of("/lorafleet.v1.FleetService/ListAgents");
        assert_eq!(Who::of(Ask::Overview.method()), agents, "one stream tells of both");
    }
}
