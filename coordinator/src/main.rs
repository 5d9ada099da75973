//! The `coordinator` program: one machine's, or one of a fleet's over etcd.

use clap::Parser;
use coordinator::access::AccessArgs;
use coordinator::{Access, CoordinatorError, Options, STOP_LIMIT, Server};
use domain::SystemClock;
use security::args::EtcdArgs;
use std::fmt::Display;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;
use telemetry::End;
use telemetry::http::{self, Readiness};
#[cfg(feature = "etcd")]
use tokio::time::Instant;

/// Heartbeats in an assignment's lease: as many may be lost but one.
const HEARTBEATS: u32 = 5;
/// The pause between two tries to reach etcd.
#[cfg(feature = "etcd")]
const PAUSE: Duration = Duration::from_secs(1);
/// Schedules sweeps onto the agents that connect, and keeps what they send.
///
/// With --etcd several may run, on any machines that reach the store of --artifacts: one leads, the others stand by and
/// tell who. When the leader is gone, another goes on with everything within seconds; agents train on meanwhile.
#[derive(Debug, Parser)]
#[command(
    name = "coordinator",
    version,
    after_help = "Examples:
  coordinator --data-dir /var/lib/lorafleet
  coordinator --listen 0.0.0.0:7401 --advertise https://c1.example.org:7401 --tls-cert c1.crt --tls-key c1.key \\
      --tokens tokens.yaml --allow-hub all --etcd http://10.0.0.2:2379,http://10.0.0.3:2379 --artifacts s3://bucket/fleet

For s3:// and gs:// the environment has the credentials and the address: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION,
AWS_ENDPOINT_URL and AWS_ALLOW_HTTP=true (for MinIO and the like); GOOGLE_APPLICATION_CREDENTIALS; or the role of the machine.

Exit codes: 0 stopped when told to, 1 it could not go on, 2 usage, or the data directory is in use."
)]
struct Args {
    /// Address to serve at; port 0 takes a free one.
    #[arg(long, env = "LORAFLEET_LISTEN", default_value = "127.0.0.1:7401", value_name = "ADDRESS")]
    listen: SocketAddr,
    /// Seconds without a sign of life from an agent after which its trials go to others.
    #[arg(
        long,
        env = "LORAFLEET_ASSIGNMENT_LEASE",
        default_value_t = 10,
        value_name = "SECONDS",
        value_parser = clap::value_parser!(u64).range(1..=3600)
    )]
    assignment_lease: u64,
    /// Where the state, metrics and checkpoints of a single coordinator are kept. With --etcd nothing is kept there.
    #[arg(long, env = "LORAFLEET_DATA_DIR", default_value = "./lorafleet-data", value_name = "DIR")]
    data_dir: PathBuf,
    /// Address of /metrics, /healthz and /readyz; nothing is served there unless it is given.
    #[arg(long, env = "LORAFLEET_HTTP", value_name = "ADDRESS")]
    http: Option<SocketAddr>,
    #[command(flatten)]
    access: AccessArgs,
    #[command(flatten)]
    fleet: FleetArgs,
}

/// What makes it one of a fleet's.
#[derive(Debug, clap::Args)]
struct FleetArgs {
    /// Addresses of etcd, which then keeps the state and elects the leader.
    #[arg(
        long,
        env = "LORAFLEET_ETCD",
        value_delimiter = ',',
        value_name = "URL[,URL…]",
        requires = "artifacts"
    )]
    etcd: Vec<String>,
    /// What the keys in etcd begin with.
    #[arg(long, env = "LORAFLEET_ETCD_PREFIX", default_value = "/lorafleet", value_name = "PREFIX")]
    etcd_prefix: String,
    /// Seconds after its last sign of life that a leader counts as gone.
    #[arg(
        long,
        env = "LORAFLEET_ELECTION_TTL",
        default_value_t = 10,
        value_name = "SECONDS",
        value_parser = clap::value_parser!(u64).range(2..=300)
    )]
    election_ttl: u64,
    /// Where metrics and checkpoints are kept for every coordinator of the fleet: s3://BUCKET/PREFIX, gs://BUCKET/PREFIX, or
    /// a directory that all of them see.
    #[arg(long, env = "LORAFLEET_ARTIFACTS", value_name = "URL|DIR", requires = "etcd")]
    artifacts: Option<String>,
    /// Where others reach this coordinator: the address that it listens on, unless given.
    #[arg(long, env = "LORAFLEET_ADVERTISE", value_name = "URL")]
    advertise: Option<String>,
    #[command(flatten)]
    access: EtcdArgs,
}

/// A data directory that is somebody else's, or of a later version, is a wrong argument; all else is a failure.
fn end(error: CoordinatorError) -> End {
    if error.refuses_directory() { End::invalid(error) } else { End::failed(error) }
}

fn main() -> ExitCode {
    let args = Args::parse();
    let options = telemetry::Options {
        service: "lorafleet-coordinator",
        version: env!("CARGO_PKG_VERSION"),
        level: "info",
        scraped: args.http.is_some(),
    };
    telemetry::program::run(&options, run(args))
}

async fn run(args: Args) -> Result<(), End> {
    let access = args.access.access(args.listen).map_err(End::invalid)?;
    let options = Options {
        data_dir: args.data_dir,
        listen: args.listen,
        clock: Arc::new(SystemClock::new()),
        heartbeat: Duration::from_secs(args.assignment_lease) / HEARTBEATS,
        lease: Duration::from_secs(args.assignment_lease),
        access: access.clone(),
    };
    let ready = Readiness::not_yet("it has not started to serve");
    let work = async {
        if args.fleet.etcd.is_empty() {
            return alone(options, &ready).await;
        }
        in_fleet(options, &args.fleet, &ready).await
    };
    http::beside(args.http, ready.clone(), work).await
}

/// What a script waits for, on a line of its own.
#[allow(clippy::print_stdout, reason = "it is the program's answer")]
fn announce(what: impl Display) {
    println!("{what}");
}

fn listening(access: &Access, server: &Server) -> String {
    format!("listening on {}", access.url(server.address))
}

async fn alone(options: Options, ready: &Readiness) -> Result<(), End> {
    let mut interrupts = actor::Interrupts::new().map_err(End::failed)?;
    let scope = actor::Scope::new();
    let access = options.access.clone();
    let server = coordinator::start(options, scope.clone()).await.map_err(end)?;
    announce(listening(&access, &server));
    ready.look(server.health.look());
    let ended = tokio::select! {
        () = interrupts.next() => Ok(()),
        () = scope.cancelled() => Err(End::failed("the coordinator cannot go on; its last message says why")),
    };
    ready.not_now("it ends");
    scope.finish(STOP_LIMIT).await;
    ended
}

#[cfg(not(feature = "etcd"))]
async fn in_fleet(_: Options, _: &FleetArgs, _: &Readiness) -> Result<(), End> {
    Err(End::invalid("--etcd: this program was built without the feature `etcd`"))
}

/// Stands by and leads in turn, until it is told to stop.
#[cfg(feature = "etcd")]
async fn in_fleet(options: Options, args: &FleetArgs, ready: &Readiness) -> Result<(), End> {
    use coordinator::fleet::{self, Fleet, Post};
    use coordinator::place::{Place, PlaceError};
    use registry::etcd::{EtcdOptions, Members};
    use registry::{EtcdRegistry, RegistryError};

    let mut interrupts = actor::Interrupts::new().map_err(End::failed)?;
    let (client, user) = args.access.access(&args.etcd).map_err(End::invalid)?;
    // An etcd that does not answer is waited for; one whose address means nothing never will.
    for address in &args.etcd {
        client.endpoint(address).map_err(|error| End::invalid(format!("--etcd {address}: {error}")))?;
    }
    if let Some((_, password)) = &user {
        telemetry::secrets::keep(password.expose());
    }
    let cannot = |error: PlaceError| match error.is_settled() {
        true => End::invalid(error),
        false => End::failed(error),
    };
    let place = Place::parse(args.artifacts.as_deref().unwrap_or_default()).map_err(cannot)?;
    if let Place::Objects(objects) = &place {
        objects.probe().await.map_err(cannot)?;
    }
    let etcd = EtcdOptions {
        endpoints: args.etcd.clone(),
        prefix: args.etcd_prefix.clone(),
        ttl: Duration::from_secs(args.election_ttl),
        client,
        user,
    };
    // It outlives every leadership.
    let port = actor::Scope::new();
    let leadership = Arc::new(Members::open(&etcd).map_err(|error| end(error.into()))?);
    let post = Post::open(&options, args.advertise.clone(), leadership.clone(), &port).await.map_err(end)?;
    ready.look(post.look());
    announce(format!("listening on {}", options.access.url(post.address())));
    let mut connected = false;
    loop {
        // Ended after the coordinator: it writes to the last.
        let (scope, in_etcd) = (actor::Scope::new(), actor::Scope::new());
        let turn = async {
            // An etcd that is not there is waited for: whoever asks meanwhile is told.
            let registry = Arc::new(EtcdRegistry::open(&etcd, &in_etcd)?);
            let fleet = Fleet {
                registry: registry.clone(),
                last_known: Arc::new(registry.last_known()),
                leadership: leadership.clone(),
                last_members: Arc::new(registry.last_members()),
                place: place.clone(),
            };
            // A leader that is replaced while it takes up its work must not go on with it.
            let leader = tokio::select! {
                leader = fleet::start(options.clone(), fleet, &post, &scope) => leader,
                _ = registry.lost() => {
                    in_etcd.cancel();
                    return Ok(());
                }
            };
            connected |= registry.has_answered();
            let leader = leader?;
            announce("leading");
            let since = registry.lost().await;
            if let Err(error) = leader.retire(&post, since).await {
                tracing::warn!(%error, "what was known before is not told");
            }
            // What still waits to be written cannot be written any more, and etcd may be the one that does not answer.
            in_etcd.cancel();
            Ok::<_, CoordinatorError>(())
        };
        let ended = tokio::select! {
            ended = turn => Some(ended),
            () = interrupts.next() => None,
            // It says why, and is no leader any more.
            () = scope.cancelled() => Some(Ok(())),
            () = port.cancelled() => return Err(End::failed("nobody can be served; the last message says why")),
        };
        post.step_down();
        if ended.is_none() {
            ready.not_now("it ends");
            port.cancel();
        }
        let until = Instant::now() + STOP_LIMIT;
        let left = || until.saturating_duration_since(Instant::now());
        scope.finish(left()).await;
        in_etcd.finish(left()).await;
        match ended {
            None => {
                port.finish(left()).await;
                return Ok(());
            }
            Some(Ok(())) | Some(Err(CoordinatorError::Registry(RegistryError::Fenced { .. }))) => {}
            // Its scope was cancelled while it took over, by what found out that another leads.
            Some(Err(CoordinatorError::Gone(_))) => {}
            // Once it was there, it may come back. Before, its address may be wrong.
            Some(Err(error)) if connected && error.is_storage() => {
                tracing::warn!(%error, "trying again");
                tokio::select! {
                    () = tokio::time::sleep(PAUSE) => {}
                    () = interrupts.next() => return Ok(()),
                }
            }
            Some(Err(error)) => return Err(end(error)),
        }
        announce("standing by");
    }
}
