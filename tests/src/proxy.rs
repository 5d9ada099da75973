//! A way between two programs that can be cut: nothing passes then, and neither side is told.

use std::net::SocketAddr;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

/// The way. It ends when it is dropped.
#[derive(Debug)]
pub struct Proxy {
    /// Where it begins.
    pub address: SocketAddr,
    to: watch::Sender<Option<SocketAddr>>,
    is_cut: watch::Sender<bool>,
    _tasks: JoinSet<()>,
}

impl Proxy {
    /// A way to a place that is told later.
    ///
    /// # Panics
    /// It does not start.
    #[allow(clippy::expect_used, reason = "a test fails by panicking")]
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port is free");
        let address = listener.local_addr().expect("it is bound");
        let ((to, place), (is_cut, cut)) = (watch::channel(None), watch::channel(false));
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                connections.spawn(carry(stream, place.clone(), cut.clone()));
            }
        });
        Self { address, to, is_cut, _tasks: tasks }
    }

    /// Says where it leads.
    pub fn lead(&self, to: SocketAddr) {
        self.to.send_replace(Some(to));
    }

    /// Lets nothing pass from now on, or all of it again, with what waits.
    pub fn cut(&self, is_cut: bool) {
        self.is_cut.send_replace(is_cut);
    }
}

async fn carry(
    near: TcpStream,
    mut place: watch::Receiver<Option<SocketAddr>>,
    mut cut: watch::Receiver<bool>,
) {
    let to = place.wait_for(Option::is_some).await.ok().and_then(|place| *place);
    let Some(to) = to else { return };
    if !open(&mut cut).await {
        return;
    }
    // Nobody may listen there: then the connection ends.
    let Ok(far) = TcpStream::connect(to).await else { return };
    let ((from_near, to_near), (from_far, to_far)) = (near.into_split(), far.into_split());
    tokio::join!(pass(from_near, to_far, cut.clone()), pass(from_far, to_near, cut));
}

/// Returns once the way is open; false if it has ended.
async fn open(cut: &mut watch::Receiver<bool>) -> bool {
    cut.wait_for(|is_cut| !is_cut).await.is_ok()
}

/// One direction of a connection, to its end.
async fn pass(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    mut cut: watch::Receiver<bool>,
) {
    let mut bytes = vec![0; 1 << 16];
    while let Ok(count @ 1..) = from.read(&mut bytes).await {
        if !open(&mut cut).await || to.write_all(&bytes[..count]).await.is_err() {
            return;
        }
    }
    open(&mut cut).await;
    // The other side may have ended it.
    let _ = to.shutdown().await;
}
