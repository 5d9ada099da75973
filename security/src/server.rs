//! A server's connections: plain, or in TLS with certificates that are read again when they change.

use crate::watched::Watched;
use crate::{FileError, pem};
use futures::FutureExt;
use futures::stream::{self, FuturesUnordered, StreamExt};
use std::collections::hash_map::Entry;
use std::collections::{HashMap, VecDeque};
use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::Instant;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::{self, ServerConfig};
use tokio_rustls::server::TlsStream;
use tonic::transport::server::{Connected, TcpConnectInfo};

/// The time in which both sides must agree on a connection.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);
/// Connections that may be about to be agreed on; whoever comes later waits.
const HANDSHAKES: usize = 1024;
/// Those of one client's network; more of it wait until one of them is over.
const HANDSHAKES_OF_ONE: usize = 128;
/// Those that wait so; more of it are closed at once.
const WAITING_OF_ONE: usize = 1024;
/// The time between two warnings that a network has so many.
const WARN_PAUSE: Duration = Duration::from_secs(60);
/// The pause after the system refused a connection: it has no more file descriptors.
const PAUSE: Duration = Duration::from_millis(100);
/// What of a client that was refused is still read, so that it hears why: closing with bytes unread takes back what was
/// sent last.
const LINGER_BYTES: u64 = 64 << 10;
/// The time that this may take.
const LINGER: Duration = Duration::from_secs(1);

/// The files of a server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerFiles {
    /// Its certificate, and those between it and an authority that clients know.
    pub cert: PathBuf,
    /// The certificate's private key.
    pub key: PathBuf,
    /// Authorities of which each client must show a certificate; `None`: clients show none.
    pub client_ca: Option<PathBuf>,
}

/// A server's certificate, as its files are now.
#[derive(Debug)]
pub struct ServerTls(Watched<ServerConfig>);

impl ServerTls {
    /// Reads the files. Changes of them hold for connections that are made afterwards.
    ///
    /// # Errors
    /// A file cannot be used.
    pub fn open(files: ServerFiles) -> Result<Self, FileError> {
        let paths = [Some(&files.cert), Some(&files.key), files.client_ca.as_ref()];
        let paths = paths.into_iter().flatten().cloned().collect();
        Ok(Self(Watched::open(paths, move || config(&files))?))
    }
}

fn config(files: &ServerFiles) -> Result<ServerConfig, FileError> {
    let provider = Arc::new(ring::default_provider());
    let unusable = |error: rustls::Error| FileError::new(&files.cert, unusable(files, &error));
    let config = ServerConfig::builder_with_provider(provider.clone()).with_safe_default_protocol_versions();
    let config = config.map_err(unusable)?;
    let config = match &files.client_ca {
        None => config.with_no_client_auth(),
        Some(ca) => {
            let roots = Arc::new(pem::roots(ca)?);
            let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider).build();
            config.with_client_cert_verifier(verifier.map_err(|error| FileError::new(ca, error))?)
        }
    };
    let pair = config.with_single_cert(pem::certificates(&files.cert)?, pem::key(&files.key)?);
    let mut config = pair.map_err(unusable)?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(config)
}

fn unusable(files: &ServerFiles, error: &rustls::Error) -> String {
    match error {
        rustls::Error::InconsistentKeys(_) => {
            format!(
                "{} is the key of another certificate; write both, then it is read again",
                files.key.display()
            )
        }
        error => error.to_string(),
    }
}

/// A connection of a client, agreed on.
pub struct Connection {
    io: Io,
    peer: SocketAddr,
    local: Option<SocketAddr>,
}

enum Io {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

/// The network of a client, as far as one person has it: an address of IPv4, and what a line of IPv6 is given, a /64.
pub fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() & (u128::MAX << 64)).into(),
        address => address,
    }
}

/// The connections of a network that are about to be agreed on, and those that wait for their turn.
#[derive(Default)]
struct OfOne {
    under_way: usize,
    waiting: VecDeque<(TcpStream, SocketAddr)>,
}

/// The connections to a listener, for a server that ends with them. A client that stalls keeps none of another network
/// waiting, however many connections it makes, and one that is refused is told why, here and there.
pub fn incoming(
    listener: TcpListener,
    tls: Option<Arc<ServerTls>>,
) -> impl stream::Stream<Item = io::Result<Connection>> {
    let networks = HashMap::<IpAddr, OfOne>::new();
    let state = (listener, FuturesUnordered::new(), networks, None::<Instant>);
    stream::unfold(state, move |(listener, mut handshakes, mut networks, mut warned)| {
        let tls = tls.clone();
        async move {
            let begin = |network, (stream, peer)| {
                let config = tls.as_ref().map(|tls| tls.0.current());
                agree(stream, peer, config).map(move |agreed| (network, agreed))
            };
            loop {
                tokio::select! {
                    accepted = listener.accept(), if handshakes.len() < HANDSHAKES => match accepted {
                        Ok((stream, peer)) => {
                            let network = network(peer.ip());
                            let of_one = networks.entry(network).or_default();
                            if of_one.under_way < HANDSHAKES_OF_ONE {
                                of_one.under_way += 1;
                                handshakes.push(begin(network, (stream, peer)));
                                continue;
                            }
                            if warned.is_none_or(|at| at.elapsed() >= WARN_PAUSE) {
                                warned = Some(Instant::now());
                                tracing::warn!(%network, "{HANDSHAKES_OF_ONE} connections agree on TLS; more of it wait");
                            }
                            if of_one.waiting.len() < WAITING_OF_ONE {
                                of_one.waiting.push_back((stream, peer));
                            }
                        }
                        Err(error) => {
                            tracing::warn!(%error, "a connection was not taken");
                            tokio::time::sleep(PAUSE).await;
                        }
                    },
                    Some((network, agreed)) = handshakes.next() => {
                        if let Entry::Occupied(mut of_one) = networks.entry(network) {
                            match of_one.get_mut().waiting.pop_front() {
                                Some(next) => handshakes.push(begin(network, next)),
                                None => of_one.get_mut().under_way -= 1,
                            }
                            if of_one.get().under_way == 0 {
                                of_one.remove();
                            }
                        }
                        if let Some(connection) = agreed {
                            return Some((Ok(connection), (listener, handshakes, networks, warned)));
                        }
                    }
                }
            }
        }
    })
}

async fn agree(stream: TcpStream, peer: SocketAddr, tls: Option<Arc<ServerConfig>>) -> Option<Connection> {
    // An answer is sent at once: it would otherwise wait some 40 ms for the other side's acknowledgement of its head.
    let local = stream.set_nodelay(true).and_then(|()| stream.local_addr()).ok();
    let Some(tls) = tls else { return Some(Connection { io: Io::Plain(stream), peer, local }) };
    let agreed = TlsAcceptor::from(tls).accept(stream).into_fallible();
    match tokio::time::timeout(HANDSHAKE_LIMIT, agreed).await {
        Ok(Ok(stream)) => Some(Connection { io: Io::Tls(Box::new(stream)), peer, local }),
        Ok(Err((error, stream))) => {
            tracing::info!(%peer, why = refusal(&error), "a client was refused");
            let _ = tokio::time::timeout(LINGER, linger(stream)).await;
            None
        }
        Err(_) => {
            tracing::info!(%peer, "a client did not agree on TLS in time");
            None
        }
    }
}

/// What a person on the server's side can do about a client that was refused.
fn refusal(error: &io::Error) -> String {
    use rustls::{CertificateError, Error, InvalidMessage};
    let why = error.get_ref().and_then(|inner| inner.downcast_ref::<Error>());
    match why {
        Some(Error::InvalidMessage(InvalidMessage::InvalidContentType)) => {
            "it does not speak TLS; it must be given the address with https://".into()
        }
        Some(Error::NoCertificatesPresented) => "it shows no certificate; it needs --cert and --key".into(),
        Some(Error::InvalidCertificate(CertificateError::UnknownIssuer)) => {
            "its certificate is of no authority in --client-ca".into()
        }
        _ => error.to_string(),
    }
}

async fn linger(mut stream: TcpStream) -> io::Result<()> {
    stream.shutdown().await?;
    tokio::io::copy(&mut stream.take(LINGER_BYTES), &mut tokio::io::sink()).await?;
    Ok(())
}

impl Connected for Connection {
    type ConnectInfo = TcpConnectInfo;

    fn connect_info(&self) -> TcpConnectInfo {
        TcpConnectInfo { local_addr: self.local, remote_addr: Some(self.peer) }
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match &mut self.get_mut().io {
            Io::Plain(stream) => Pin::new(stream).poll_read(context, into),
            Io::Tls(stream) => Pin::new(stream).poll_read(context, into),
        }
    }
}

impl AsyncWrite for Connection {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match &mut self.get_mut().io {
            Io::Plain(stream) => Pin::new(stream).poll_write(context, bytes),
            Io::Tls(stream) => Pin::new(stream).poll_write(context, bytes),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match &mut self.get_mut().io {
            Io::Plain(stream) => Pin::new(stream).poll_write_vectored(context, pieces),
            Io::Tls(stream) => Pin::new(stream).poll_write_vectored(context, pieces),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match &self.io {
            Io::Plain(stream) => stream.is_write_vectored(),
            Io::Tls(stream) => stream.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().io {
            Io::Plain(stream) => Pin::new(stream).poll_flush(context),
            Io::Tls(stream) => Pin::new(stream).poll_flush(context),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().io {
            Io::Plain(stream) => Pin::new(stream).poll_shutdown(context),
            Io::Tls(stream) => Pin::new(stream).poll_shutdown(context),
        }
    }
}
