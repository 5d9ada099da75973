//! The way to a server: the one named by `--endpoint`, the one that serves the data directory, or one started
//! in this process for as long as the command runs.

use crate::embedded::Embedded;
use crate::interrupt::Requests;
use crate::output::say;
use crate::stale::Warned;
use crate::{Failure, context};
use proto::STALE_SECONDS;
use proto::status::{LEADER, STANDBY_REASON, TAKING_OVER_REASON};
use proto::v1::adapter_service_client::AdapterServiceClient;
use proto::v1::data_service_client::DataServiceClient;
use proto::v1::fleet_service_client::FleetServiceClient;
use proto::v1::sweep_service_client::SweepServiceClient;
use proto::v1::trial_service_client::TrialServiceClient;
use security::Client;
use security::args::ClientArgs;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;
use telemetry::grpc::Traced;
use tonic::transport::Endpoint;
use tonic::{Code, Status};
use tonic_types::StatusExt;

/// Which server a command talks to.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct ServerArgs {
    /// A server's address, such as https://fleet.example.org:7401, or those of a fleet's coordinators, of which the leading one is
    /// found. Without it, the context in use, or the data directory's own server.
    #[arg(long, env = "LORAFLEET_ENDPOINT", value_name = "URL[,URL…]")]
    endpoint: Option<String>,
    /// Where sweeps, metrics and adapters are kept when no endpoint is given: ./lorafleet-data unless given. Goes before
    /// the context in use.
    #[arg(long, alias = "data_dir", env = "LORAFLEET_DATA_DIR", value_name = "DIR")]
    data_dir: Option<PathBuf>,
    #[command(flatten)]
    client: ClientArgs,
}

/// A server that was named, and how it is talked to.
struct Named {
    endpoint: String,
    client: Client,
}

impl ServerArgs {
    /// The server that is named, by an argument, the environment or the context in use. `None`: the data directory's
    /// own.
    ///
    /// # Errors
    /// The contexts cannot be read.
    pub(crate) fn endpoint(&self) -> Result<Option<String>, Failure> {
        Ok(self.named()?.map(|named| named.endpoint))
    }

    /// Those that name a server.
    #[cfg(test)]
    pub(crate) fn of(endpoint: &str) -> Self {
        Self { endpoint: Some(endpoint.into()), data_dir: None, client: ClientArgs::default() }
    }

    fn named(&self) -> Result<Option<Named>, Failure> {
        let client = self.client.client();
        match (&self.endpoint, &self.data_dir) {
            (Some(endpoint), _) => Ok(Some(Named { endpoint: endpoint.clone(), client })),
            (None, Some(_)) => Ok(None),
            (None, None) => Ok(context::current()?.map(|server| Named {
                client: client.or(context::client(&server)),
                endpoint: server.endpoint,
            })),
        }
    }

    /// The data directory.
    pub(crate) fn data_dir(&self) -> &Path {
        self.data_dir.as_deref().unwrap_or(Path::new(DATA_DIR))
    }
}

/// The data directory unless another is named.
pub(crate) const DATA_DIR: &str = "./lorafleet-data";

/// A connection, over which calls say which command they belong to, and answers whether they are old.
pub(crate) type Channel = Warned<Line>;

type Line = Traced<security::Line>;

/// The time in which a connection is made.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);

/// The time after which a silent connection is asked whether it is there, and in which it answers.
const KEEP_ALIVE: Duration = Duration::from_secs(20);

/// How often a coordinator that takes over is asked again, after a pause that it names itself: half a minute in all.
const TAKING_OVER_ASKED: u32 = 10;

/// The file in a data directory that says where its server listens, while it does.
pub(crate) const ENDPOINT_FILE: &str = "endpoint";

/// An open connection, and the embedded server behind it if there is one.
pub(crate) struct Connection {
    channel: Channel,
    embedded: Option<Embedded>,
}

impl Connection {
    /// Connects to the server that the arguments name. With no endpoint and nobody serving the data
    /// directory, a coordinator is started on it in this process, without an agent.
    pub(crate) async fn open(args: &ServerArgs) -> Result<Self, Failure> {
        let data_dir = args.data_dir();
        if let Some(named) = &args.named()? {
            return Ok(Self { channel: connect(named).await?, embedded: None });
        }
        if let Some(channel) = serving(data_dir, &args.client.client()).await? {
            return Ok(Self { channel, embedded: None });
        }
        if !data_dir.is_dir() {
            return Err(Failure::unreachable(format!(
                "there is no data directory {}; name one with --data-dir, or a server with --endpoint",
                data_dir.display()
            )));
        }
        Self::to_embedded(Embedded::coordinator(data_dir).await?).await
    }

    /// Connects again to a server that was gone, if it is there; none is started in this process.
    pub(crate) async fn again(args: &ServerArgs) -> Option<Self> {
        let channel = match &args.named().ok()? {
            Some(named) => connect(named).await.ok(),
            None => serving(args.data_dir(), &args.client.client()).await.ok()?,
        };
        Some(Self { channel: channel?, embedded: None })
    }

    /// A connection to a server in this process, which is stopped if there is none to be had.
    pub(crate) async fn to_embedded(embedded: Embedded) -> Result<Self, Failure> {
        match connect_here(&embedded.endpoint(), &Client::default()).await {
            Ok(channel) => Ok(Self { channel, embedded: Some(embedded) }),
            Err(failure) => {
                embedded.stop().await;
                Err(failure)
            }
        }
    }

    /// Connects to a server on this machine.
    pub(crate) async fn to(endpoint: &str) -> Result<Self, Failure> {
        Ok(Self { channel: connect_here(endpoint, &Client::default()).await?, embedded: None })
    }

    /// The connection itself; clones share it.
    pub(crate) fn channel(&self) -> Channel {
        self.channel.clone()
    }

    /// Whether the server is one in this process without an agent: nothing trains while it serves.
    pub(crate) fn trains_nothing(&self) -> bool {
        self.embedded.as_ref().is_some_and(|embedded| !embedded.has_agent())
    }

    /// Works with a connection that is closed whichever way the work ends, an interruption included.
    ///
    /// # Errors
    /// There is no server, or those of the work.
    pub(crate) async fn with<T>(
        args: &ServerArgs,
        work: impl AsyncFnOnce(&Self) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        let mut requests = Requests::new()?;
        let connection = Self::open(args).await?;
        let result = tokio::select! {
            result = connection.after_trouble(work(&connection)) => result,
            () = requests.next() => Err(Failure::interrupted("interrupted")),
        };
        connection.close(&mut requests).await;
        result
    }

    /// Works after saying what the server cannot write at the moment, if anything.
    async fn after_trouble<T>(&self, work: impl Future<Output = T>) -> T {
        let info = self.fleet().get_server_info(proto::v1::GetServerInfoRequest {}).await;
        // A server that does not answer this says so to the verb itself.
        if let Some(trouble) = info.ok().and_then(|info| info.into_inner().trouble) {
            say!("the server cannot write at the moment, and goes on when it can: {trouble}");
        }
        work.await
    }

    /// Stops the embedded server, if there is one: its trials are checkpointed. A request to stop ends the
    /// wait for that.
    pub(crate) async fn close(self, requests: &mut Requests) {
        drop(self.channel);
        if let Some(embedded) = self.embedded {
            tokio::select! {
                () = embedded.stop() => {}
                () = requests.next() => {}
            }
        }
    }

    /// Calls about sweeps.
    pub(crate) fn sweeps(&self) -> SweepServiceClient<Channel> {
        SweepServiceClient::new(self.channel.clone())
    }

    /// Calls about trials.
    pub(crate) fn trials(&self) -> TrialServiceClient<Channel> {
        TrialServiceClient::new(self.channel.clone())
    }

    /// Calls about adapters.
    pub(crate) fn adapters(&self) -> AdapterServiceClient<Channel> {
        AdapterServiceClient::new(self.channel.clone())
    }

    /// Calls about uploaded data.
    pub(crate) fn data(&self) -> DataServiceClient<Channel> {
        DataServiceClient::new(self.channel.clone())
    }

    /// Calls about agents and the server.
    pub(crate) fn fleet(&self) -> FleetServiceClient<Channel> {
        FleetServiceClient::new(self.channel.clone())
    }
}

/// Refuses a data directory that a server uses.
///
/// # Errors
/// One answers.
pub(crate) async fn refuse_in_use(data_dir: &Path) -> Result<(), Failure> {
    match serving(data_dir, &Client::default()).await {
        Ok(None) => Ok(()),
        // It wants to know who asks: it is there.
        Ok(Some(_)) | Err(_) => Err(Failure::invalid(format!(
            "{} is in use by a running LoraFleet; `lorafleet submit` gives it a sweep, or choose another \
             --data-dir",
            data_dir.display()
        ))),
    }
}

/// A connection to whoever serves the data directory now.
///
/// # Errors
/// Somebody does, and does not let this client in.
pub(crate) async fn serving(data_dir: &Path, client: &Client) -> Result<Option<Channel>, Failure> {
    let Ok(endpoint) = std::fs::read_to_string(data_dir.join(ENDPOINT_FILE)) else { return Ok(None) };
    // A token that cannot be used says nothing of whether somebody serves.
    client.credentials().map_err(Failure::invalid)?;
    // A file left behind by a killed server names an address where nobody, or a stranger, listens.
    let Ok(channel) = connect_here(&dialled(endpoint.trim()), client).await else { return Ok(None) };
    let mut fleet = FleetServiceClient::new(channel.clone());
    let info = match fleet.get_server_info(proto::v1::GetServerInfoRequest {}).await {
        Ok(info) => info.into_inner(),
        Err(status) if matches!(status.code(), Code::Unauthenticated | Code::PermissionDenied) => {
            return Err(status.into());
        }
        Err(_) => return Ok(None),
    };
    let path = |path: &Path| std::fs::canonicalize(path).ok();
    let same = path(Path::new(&info.data_dir)).is_some_and(|found| Some(found) == path(data_dir));
    Ok(same.then_some(channel))
}

/// The address of a server on this machine as it is dialled: one that listens at every address is reached at this machine's
/// own.
fn dialled(endpoint: &str) -> String {
    let Some((scheme, address)) = endpoint.split_once("://") else { return endpoint.into() };
    let here = match address.parse() {
        Ok(SocketAddr::V4(all)) if all.ip().is_unspecified() => (Ipv4Addr::LOCALHOST, all.port()).into(),
        Ok(SocketAddr::V6(all)) if all.ip().is_unspecified() => (Ipv6Addr::LOCALHOST, all.port()).into(),
        Ok(address) => address,
        Err(_) => return endpoint.into(),
    };
    format!("{scheme}://{here}")
}

/// A server's addresses as they are connected to; commas stand between them.
///
/// # Errors
/// One is none, or a certificate cannot be used.
pub(crate) fn check_endpoint(endpoint: &str, client: &Client) -> Result<Vec<Endpoint>, Failure> {
    let one = |address: &str| {
        let endpoint =
            client.endpoint(address).map_err(|error| Failure::invalid(format!("--endpoint: {error}")))?;
        // A server that is gone without a word is noticed while it is waited for.
        let endpoint = endpoint.http2_keep_alive_interval(KEEP_ALIVE).keep_alive_timeout(KEEP_ALIVE);
        Ok(endpoint.connect_timeout(CONNECT_LIMIT))
    };
    endpoint.split(',').map(str::trim).map(one).collect()
}

/// Connects to a server on this machine, to which a token says who calls, if it wants one.
async fn connect_here(endpoint: &str, client: &Client) -> Result<Channel, Failure> {
    let client = Client { token: client.token.clone(), ..Client::default() };
    connect(&Named { endpoint: endpoint.into(), client }).await
}

/// Connects to the one that leads; where none is known to, to one that tells what it last knew.
async fn connect(Named { endpoint, client }: &Named) -> Result<Channel, Failure> {
    if let Ok(Some(token)) = client.secret() {
        telemetry::secrets::keep(token.expose());
    }
    let (mut refusal, mut old) = (None, None);
    for address in check_endpoint(endpoint, client)? {
        let line = match address.connect().await {
            Ok(channel) => Traced::client(client.line(channel).map_err(Failure::invalid)?, address.uri()),
            Err(error) => {
                refusal =
                    refusal.or(security::explain(&error).map(|why| format!("{}: {why}", address.uri())));
                continue;
            }
        };
        let standby = match standing(&line).await {
            Standing::Serves => return Ok(Warned::new(line)),
            Standing::TellsWhatItKnew => {
                old.get_or_insert(line);
                continue;
            }
            Standing::Refuses(status) => status,
        };
        // It knows the leader, whose address may not be among ours.
        let leader = standby.get_details_error_info().and_then(|mut info| info.metadata.remove(LEADER));
        if let Some(leader) = leader
            && let Some(address) = check_endpoint(&leader, client)?.pop()
            && let Ok(channel) = address.connect().await
            && let Ok(line) = client.line(channel).map(|line| Traced::client(line, address.uri()))
            && matches!(standing(&line).await, Standing::Serves)
        {
            return Ok(Warned::new(line));
        }
        refusal = Some(standby.message().to_string());
    }
    old.map(Warned::new).ok_or_else(|| {
        Failure::unreachable(refusal.unwrap_or_else(|| {
            format!("no server answers at {endpoint}; is it running, and the port right?")
        }))
    })
}

/// How a server stands.
enum Standing {
    /// It leads, or is no coordinator of a fleet. What else is wrong with it, whoever calls is told.
    Serves,
    /// It led.
    TellsWhatItKnew,
    /// It does not lead, or not yet.
    Refuses(Status),
}

/// Asks a server how it stands. One that takes over is waited for.
async fn standing(line: &Line) -> Standing {
    let mut fleet = FleetServiceClient::new(line.clone());
    let mut asked = 1;
    loop {
        let status = match fleet.get_server_info(proto::v1::GetServerInfoRequest {}).await {
            Ok(answer) if answer.metadata().contains_key(STALE_SECONDS) => return Standing::TellsWhatItKnew,
            Ok(_) => return Standing::Serves,
            Err(status) => status,
        };
        let pause = status.get_details_retry_info().and_then(|retry| retry.retry_delay);
        match (not_leading(&status).as_deref(), pause) {
            (None, _) => return Standing::Serves,
            (Some(TAKING_OVER_REASON), Some(pause)) if asked < TAKING_OVER_ASKED => {
                tokio::time::sleep(pause).await;
                asked += 1;
            }
            (Some(_), _) => return Standing::Refuses(status),
        }
    }
}

/// The reason of a refusal by a coordinator that does not lead, or not yet.
fn not_leading(status: &Status) -> Option<String> {
    let reason = status.get_details_error_info()?.reason;
    [STANDBY_REASON, TAKING_OVER_REASON].contains(&reason.as_str()).then_some(reason)
}

impl From<Status> for Failure {
    fn from(status: Status) -> Self {
        if let Some(why) = security::explain(&status) {
            return Failure::unreachable(why);
        }
        let violations = status.get_details_bad_request().map(|b| b.field_violations).unwrap_or_default();
        let reason = status.get_details_error_info().map(|info| info.reason).unwrap_or_default();
        match status.code() {
            Code::Unavailable if reason == proto::status::STORAGE_REASON => Failure::failed(status.message()),
            Code::InvalidArgument if !violations.is_empty() => {
                let lines: Vec<_> =
                    violations.iter().map(|v| format!("{}: {}", v.field, v.description)).collect();
                Failure::invalid(lines.join("\n"))
            }
            Code::InvalidArgument
            | Code::NotFound
            | Code::FailedPrecondition
            | Code::Unauthenticated
            | Code::PermissionDenied => Failure::invalid(status.message()),
            // Of one that answers what it knew, and changes nothing.
            Code::Unavailable if not_leading(&status).is_some() => Failure::unreachable(status.message()),
            Code::Unavailable => Failure::unreachable(format!("the server is gone: {}", status.message())),
            // No server says so: the connection ended before the call was sent, and why it did was not read any more.
            Code::Cancelled => Failure::unreachable(
                "the server closed the connection before it answered; if it speaks TLS, write the address with https://, and \
                 if it wants a certificate of its clients, show one with --cert and --key",
            ),
            code => Failure::failed(format!("{code:?}: {}", status.message())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use security::client::Token;

    #[test]
    fn where_a_server_is_dialled() {
        for (written, want) in [
            ("http://0.0.0.0:7401", "http://127.0.0.1:7401"),
            ("http://[::]:7401", "http://[::1]:7401"),
            ("http://127.0.0.1:7401", "http://127.0.0.1:7401"),
            ("http://10.0.0.5:7401", "http://10.0.0.5:7401"),
            ("http://[::1]:7401", "http://[::1]:7401"),
            ("nonsense", "nonsense"),
        ] {
            assert_eq!(dialled(written), want);
        }
    }

    /// Whose token cannot be read is told so, and not that nobody serves.
    #[tokio::test]
    async fn a_token_that_cannot_be_read_is_said() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(ENDPOINT_FILE), "http://127.0.0.1:1\n").unwrap();
        let client = Client { token: Some(Token::File("gone".into())), ..Client::default() };
        let unsendable =
            Client { token: Some(Token::Given("a\u{1}".to_string().into())), ..Client::default() };
        for (client, want) in [(&client, "gone: No such file"), (&unsendable, "the token is none")] {
            let failure = serving(dir.path(), client).await.err().unwrap();
            assert!(format!("{failure:?}").contains(want), "{failure:?}");
        }
        assert!(serving(dir.path(), &Client::default()).await.unwrap().is_none());
    }
}
