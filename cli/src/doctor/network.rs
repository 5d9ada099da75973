//! What this machine reaches, and the addresses that it would serve at.

use super::Finding;
use crate::client::{Connection, ServerArgs};
use domain::{Clock, SystemClock, Timestamp};
use proto::v1;
use security::Client;
use security::args::EtcdArgs;
use std::io::ErrorKind;
use std::net::{SocketAddr, TcpListener};
use std::time::Duration;
use tonic::transport::Uri;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;

/// The time in which something answers, or is not there.
pub(super) const LIMIT: Duration = Duration::from_secs(5);
/// Clocks that differ by more make hours in logs and records mislead. Leases do not go by them.
const SKEW: Duration = Duration::from_secs(5);

/// Whether the address is free that a flag names.
pub(super) fn address(listen: SocketAddr, flag: &str) -> Finding {
    const CHECK: &str = "address";
    match TcpListener::bind(listen) {
        Ok(_) => Finding::good(CHECK, format!("{listen} is free to serve at")),
        Err(error) if error.kind() == ErrorKind::AddrInUse => Finding::warning(
            CHECK,
            format!("{listen} is in use"),
            format!("if that is not the server that you mean, choose another {flag}"),
        ),
        Err(error) => Finding::bad(CHECK, format!("{listen}: {error}"), format!("choose another {flag}")),
    }
}

/// The server that is named, if one is.
pub(super) async fn server(args: &ServerArgs) -> Vec<Finding> {
    const CHECK: &str = "server";
    let endpoint = match args.endpoint() {
        Ok(None) => return vec![Finding::good(CHECK, "none is named; `run` starts its own")],
        Ok(Some(endpoint)) => endpoint,
        Err(failure) => {
            return vec![Finding::bad(CHECK, failure.message(), "mend it with `lorafleet context`")];
        }
    };
    const REMEDY: &str = "see that it runs, that the address is right, and that no firewall is between";
    let limit = LIMIT * endpoint.split(',').count() as u32;
    match within(limit, talk(&endpoint, args, REMEDY)).await {
        Ok(findings) => findings,
        Err(why) => vec![Finding::bad(CHECK, format!("{endpoint}: {why}"), REMEDY)],
    }
}

async fn talk(endpoint: &str, args: &ServerArgs, remedy: &'static str) -> Vec<Finding> {
    const CHECK: &str = "server";
    let connection = match Connection::open(args).await {
        Ok(connection) => connection,
        Err(failure) => return vec![Finding::bad(CHECK, failure.message(), remedy)],
    };
    let asked = SystemClock::new().now();
    match connection.fleet().get_server_info(v1::GetServerInfoRequest {}).await {
        Err(status) => {
            let failure = crate::Failure::from(status);
            let remedy = "ask who runs it for a token or a certificate (docs/security.md)";
            vec![Finding::bad(CHECK, format!("{endpoint}: {}", failure.message()), remedy)]
        }
        Ok(answer) => {
            let date = answer.metadata().get("date").and_then(|date| date.to_str().ok()).map(String::from);
            let info = answer.into_inner();
            let mut findings = vec![version(endpoint, &info.version, env!("CARGO_PKG_VERSION"))];
            if let Some(trouble) = info.trouble {
                let remedy = "it goes on by itself once it can write (docs/operations.md)";
                findings.push(Finding::bad(CHECK, format!("it cannot write: {trouble}"), remedy));
            }
            findings.extend(date.and_then(|date| clock(&date, asked)));
            findings
        }
    }
}

fn version(endpoint: &str, theirs: &str, ours: &str) -> Finding {
    let found = format!("{endpoint} answers, version {theirs}");
    match theirs == ours {
        true => Finding::good("server", found),
        false => Finding::warning(
            "server",
            format!("{found}; this is {ours}"),
            "use the same version on both sides (docs/fleet.md, upgrades)",
        ),
    }
}

/// The server's clock beside ours. `date` is that of its answer, which knows seconds alone.
fn clock(date: &str, asked: Timestamp) -> Option<Finding> {
    let theirs = chrono::DateTime::parse_from_rfc2822(date).ok()?.timestamp_millis();
    // Half a second is what cutting off the rest of the second takes on average.
    let ahead = (theirs + 500 - asked.0 as i64) as f64 / 1e3;
    if ahead.abs() <= SKEW.as_secs_f64() {
        return Some(Finding::good("clock", "agrees with the server's"));
    }
    let found = match ahead > 0.0 {
        true => format!("{ahead:.0} s behind the server's"),
        false => format!("{:.0} s ahead of the server's", -ahead),
    };
    Some(Finding::warning(
        "clock",
        found,
        "let both machines set their clocks by NTP (chrony, systemd-timesyncd)",
    ))
}

/// Each etcd that is named.
pub(super) async fn etcd(addresses: &[String], access: &EtcdArgs) -> Vec<Finding> {
    const CHECK: &str = "etcd";
    if addresses.is_empty() {
        return Vec::new();
    }
    let client = match access.access(addresses) {
        Ok((client, _)) => client,
        Err(error) => return vec![Finding::bad(CHECK, error.to_string(), "mend the flag")],
    };
    let mut findings = Vec::new();
    for address in addresses {
        let served = within(LIMIT, is_served(address, &client)).await.and_then(|served| served);
        findings.push(match served {
            Ok(()) => Finding::good(CHECK, format!("{address} is healthy")),
            Err(why) => {
                let remedy = "see that it runs, that it listens on that address, and that it has a majority";
                Finding::bad(CHECK, format!("{address}: {why}"), remedy)
            }
        });
    }
    findings
}

/// etcd answers gRPC's own question after health, without a user.
async fn is_served(address: &str, client: &Client) -> Result<(), String> {
    let endpoint = client.endpoint(address).map_err(|error| error.to_string())?;
    let channel = endpoint.connect().await;
    let explained = |error: &(dyn std::error::Error + 'static)| security::explain(error);
    let channel = channel.map_err(|error| explained(&error).unwrap_or_else(|| "nobody answers".into()))?;
    let answer = HealthClient::new(channel).check(HealthCheckRequest::default()).await;
    let answer = answer.map_err(|status| {
        explained(&status).unwrap_or_else(|| format!("{:?}: {}", status.code(), status.message()))
    })?;
    match answer.into_inner().status() {
        tonic_health::pb::health_check_response::ServingStatus::Serving => Ok(()),
        other => Err(format!("it says {}", other.as_str_name())),
    }
}

/// What telemetry goes to, by the standard variables.
pub(super) async fn collector() -> Vec<Finding> {
    const CHECK: &str = "collector";
    let endpoints = match telemetry::settings::endpoints(|name| std::env::var(name).ok()) {
        Ok(endpoints) => endpoints,
        Err(error) => return vec![Finding::bad(CHECK, error.to_string(), "mend the variable")],
    };
    if endpoints.is_empty() {
        return vec![Finding::good(
            CHECK,
            "none is named (OTEL_EXPORTER_OTLP_ENDPOINT); nothing is exported",
        )];
    }
    let mut findings = Vec::new();
    for endpoint in endpoints {
        findings.push(match within(LIMIT, reach(&endpoint)).await.and_then(|reached| reached) {
            Ok(()) => Finding::good(CHECK, format!("{endpoint} is reached")),
            Err(why) => Finding::warning(
                CHECK,
                format!("{endpoint}: {why}"),
                "start it, or mend OTEL_EXPORTER_OTLP_ENDPOINT; training goes on without it",
            ),
        });
    }
    findings
}

/// Whether somebody listens at a URL.
async fn reach(url: &str) -> Result<(), String> {
    let uri: Uri = url.parse().map_err(|error| format!("is no URL: {error}"))?;
    let host = uri.host().ok_or("is no URL with a host")?.trim_matches(['[', ']']);
    let port = uri.port_u16().unwrap_or(if uri.scheme_str() == Some("https") { 443 } else { 80 });
    tokio::net::TcpStream::connect((host, port)).await.map(drop).map_err(|error| error.to_string())
}

/// What comes within a time.
pub(super) async fn within<T>(limit: Duration, work: impl Future<Output = T>) -> Result<T, String> {
    let late = |_| format!("nobody answers within {} s", limit.as_secs());
    tokio::time::timeout(limit, work).await.map_err(late)
}

#[cfg(test)]
mod tests {
    use super::super::Verdict;
    use super::*;

    #[test]
    fn clocks() {
        let at = |seconds: u64| Timestamp(seconds * 1000);
        // 1,000,000,000 s.
        let date = "Sun, 09 Sep 2001 01:46:40 GMT";
        for (asked, verdict, found) in [
            (1_000_000_000, Verdict::Good, "agrees"),
            (1_000_000_004, Verdict::Good, "agrees"),
            (1_000_000_060, Verdict::Warning, "60 s ahead of the server's"),
            (999_999_940, Verdict::Warning, "60 s behind the server's"),
        ] {
            let finding = clock(date, at(asked)).unwrap();
            assert!(finding.verdict == verdict && finding.found.contains(found), "{asked}: {finding:?}");
        }
        assert_eq!(clock("yesterday", at(0)), None);
    }

    #[test]
    fn versions() {
        assert_eq!(version("here", "1.2.3", "1.2.3").verdict, Verdict::Good);
        let other = version("here", "1.3.0", "1.2.3");
        assert!(
            other.verdict == Verdict::Warning && other.found.contains("1.3.0; this is 1.2.3"),
            "{other:?}"
        );
    }

    #[tokio::test]
    async fn what_listens_is_reached_and_what_does_not_is_said() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let taken = listener.local_addr().unwrap();
        let finding = address(taken, "--listen");
        assert!(finding.verdict == Verdict::Warning && finding.remedy.contains("--listen"), "{finding:?}");
        assert_eq!(reach(&format!("http://{taken}")).await, Ok(()));
        drop(listener);
        assert_eq!(address(taken, "--http").verdict, Verdict::Good);
        assert!(reach(&format!("http://{taken}")).await.unwrap_err().contains("refused"));
        assert!(reach("collector").await.is_err());
        let client = Client::default();
        let why = is_served(&format!("http://{taken}"), &client).await.unwrap_err();
        assert!(why.contains("nobody answers"), "{why}");
        let why = is_served("ftp://x", &client).await.unwrap_err();
        assert!(why.contains("ftp:// is not known"), "{why}");
    }

    /// One that takes connections and says nothing holds nobody up.
    #[tokio::test(start_paused = true)]
    async fn who_says_nothing_is_given_up() {
        let silent = TcpListener::bind("127.0.0.1:0").unwrap();
        for scheme in ["http", "https"] {
            let url = format!("{scheme}://{}", silent.local_addr().unwrap());
            let findings = etcd(std::slice::from_ref(&url), &EtcdArgs::default()).await;
            assert!(findings[0].found.contains("nobody answers within 5 s"), "{findings:?}");
            let args = crate::client::ServerArgs::of(&url);
            let findings = server(&args).await;
            assert!(findings[0].found.contains("nobody answers within 5 s"), "{findings:?}");
        }
    }
}
