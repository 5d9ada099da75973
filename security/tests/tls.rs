//! TLS between real sockets: who is let in, what is said where it fails, and certificates that change.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use actor::Scope;
use security::client::AddressError;
use security::server::ServerFiles;
use security::watched::INTERVAL;
use security::{Client, ServerTls};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tests::after;
use tests::certificates::{Authority, Pair};
use tests::log::Log;
use tokio::io::AsyncReadExt;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_rustls::rustls::{self, ClientConfig};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;

fn files(pair: &Pair, client_ca: Option<&Path>) -> ServerFiles {
    ServerFiles {
        cert: pair.cert.clone(),
        key: pair.key.clone(),
        client_ca: client_ca.map(Path::to_path_buf),
    }
}

/// A server of gRPC on a free port, until the scope ends.
async fn serve(tls: Option<ServerFiles>, scope: &Scope) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let tls = tls.map(|files| Arc::new(ServerTls::open(files).unwrap()));
    let (_, health) = tonic_health::server::health_reporter();
    let server = tonic::transport::Server::builder().add_service(health);
    let incoming = Box::pin(security::incoming(listener, tls));
    let stop = scope.clone();
    scope.spawn("server", async move {
        server.serve_with_incoming_shutdown(incoming, async move { stop.cancelled().await }).await.unwrap();
    });
    address
}

/// What comes of a call: nothing, or what a person is told.
async fn call(client: &Client, address: &str) -> Result<(), String> {
    let endpoint = client.endpoint(address).unwrap().connect_timeout(Duration::from_secs(5));
    let told = |error: &(dyn std::error::Error + 'static)| {
        security::explain(error).unwrap_or_else(|| format!("unexplained: {error:?}"))
    };
    let channel = endpoint.connect().await.map_err(|error| told(&error))?;
    let called = HealthClient::new(channel).check(HealthCheckRequest { service: String::new() }).await;
    called.map(drop).map_err(|status| told(&status))
}

#[tokio::test]
async fn who_is_let_in_and_what_the_others_are_told() {
    let dir = tempfile::tempdir().unwrap();
    let (ours, theirs) = (Authority::new(dir.path(), "ours"), Authority::new(dir.path(), "theirs"));
    let scope = Scope::new();
    let good = ours.issue("server");
    let plain = serve(None, &scope).await;
    let tls = serve(Some(files(&good, None)), &scope).await;
    let mutual = serve(Some(files(&good, Some(&ours.ca))), &scope).await;
    let expired = serve(Some(files(&ours.issue_expired("old"), None)), &scope).await;
    let elsewhere = serve(Some(files(&ours.issue_for("other", &["other.example.org"]), None)), &scope).await;

    let trusting = Client { ca: Some(ours.ca.clone()), ..Client::default() };
    let showing = |pair: Pair| Client { identity: Some(pair.both()), ..trusting.clone() };
    let mine = showing(ours.issue("client"));
    let rows: &[(&str, &Client, &str, SocketAddr, Option<&str>)] = &[
        ("plaintext", &Client::default(), "http", plain, None),
        ("TLS", &trusting, "https", tls, None),
        ("a certificate that nobody asks for", &mine, "https", tls, None),
        ("mutual TLS", &mine, "https", mutual, None),
        ("no certificate", &trusting, "https", mutual, Some("show one with --cert and --key")),
        ("another's", &showing(theirs.issue("x")), "https", mutual, Some("authority of its --client-ca")),
        ("an old one", &showing(ours.issue_expired("y")), "https", mutual, Some("renew it")),
        ("no authority", &Client::default(), "https", tls, Some("with --ca")),
        (
            "the wrong one",
            &Client { ca: Some(theirs.ca.clone()), ..Client::default() },
            "https",
            tls,
            Some("with --ca"),
        ),
        ("expired", &trusting, "https", expired, Some("has expired; replace its file on the server")),
        ("another name", &trusting, "https", elsewhere, Some("other.example.org")),
        ("TLS to plaintext", &trusting, "https", plain, Some("write the address with http://")),
        ("plaintext to TLS", &Client::default(), "http", tls, Some("write the address with https://")),
        ("plaintext to mutual TLS", &Client::default(), "http", mutual, Some("with https://")),
    ];
    for (what, client, scheme, address, want) in rows {
        let done = call(client, &format!("{scheme}://localhost:{}", address.port())).await;
        match (want, done) {
            (None, done) => assert_eq!(done, Ok(()), "{what}"),
            (Some(want), done) => {
                let said = done.expect_err(what);
                assert!(said.contains(want), "{what}: {said}");
            }
        }
    }
    assert!(scope.finish(Duration::from_secs(10)).await);
}

/// The certificate that a new connection is shown.
async fn shown(authority: &Authority, address: SocketAddr) -> CertificateDer<'static> {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(&authority.ca).unwrap()).unwrap();
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let stream = TcpStream::connect(address).await.unwrap();
    let name = ServerName::try_from("localhost").unwrap();
    let stream = TlsConnector::from(Arc::new(config)).connect(name, stream).await.unwrap();
    stream.get_ref().1.peer_certificates().unwrap()[0].clone()
}

#[tokio::test]
async fn certificates_rotate_under_a_live_server() {
    let log = Log::listen();
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::new(dir.path(), "ours");
    let (used, second, third) =
        (authority.issue("used"), authority.issue("second"), authority.issue("third"));
    let der = |pair: &Pair| CertificateDer::from_pem_file(&pair.cert).unwrap();
    let first = der(&used);
    let scope = Scope::new();
    let address = serve(Some(files(&used, None)), &scope).await;
    let client = Client { ca: Some(authority.ca.clone()), ..Client::default() };
    let endpoint = client.endpoint(&format!("https://{address}")).unwrap();
    // Open all the while.
    let mut open = HealthClient::new(endpoint.connect().await.unwrap());
    assert_eq!(shown(&authority, address).await, first);

    used.replace_by(&second);
    after(INTERVAL).await;
    assert_eq!(shown(&authority, address).await, der(&second));

    // Half of a change, and no change at all: the last whole one stays, and the log says why.
    std::fs::copy(&third.cert, &used.cert).unwrap();
    after(INTERVAL).await;
    assert_eq!(shown(&authority, address).await, der(&second));
    assert!(log.text().contains("is the key of another certificate"), "{}", log.text());
    std::fs::write(&used.cert, "nothing of the kind").unwrap();
    for _ in 0..2 {
        after(INTERVAL).await;
        assert_eq!(shown(&authority, address).await, der(&second));
    }
    let said = log.text().matches("holds no certificate").count();
    assert_eq!(said, 1, "once for each change: {}", log.text());
    std::fs::remove_file(&used.cert).unwrap();
    after(INTERVAL).await;
    assert_eq!(shown(&authority, address).await, der(&second));

    used.replace_by(&third);
    after(INTERVAL).await;
    assert_eq!(shown(&authority, address).await, der(&third));
    open.check(HealthCheckRequest { service: String::new() }).await.unwrap();
    let key = std::fs::read_to_string(&third.key).unwrap();
    assert!(!log.text().contains(key.lines().nth(1).unwrap()), "a key is in the log");
    assert!(scope.finish(Duration::from_secs(10)).await);
}

/// Many silent connections of one address cost others nothing and end by themselves; one of the same address waits for them,
/// and is then served.
#[tokio::test]
async fn clients_that_stall_keep_nobody_waiting() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::new(dir.path(), "ours");
    let scope = Scope::new();
    let address = serve(Some(files(&authority.issue("server"), None)), &scope).await;
    let stalls = async |from: &str| {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind(format!("{from}:0").parse().unwrap()).unwrap();
        socket.connect(address).await.unwrap()
    };
    let client = Client { ca: Some(authority.ca.clone()), ..Client::default() };
    let endpoint = format!("https://{address}");
    let mut silent = Vec::new();
    for _ in 0..100 {
        silent.push(stalls("127.0.0.1").await);
    }
    assert_eq!(call(&client, &endpoint).await, Ok(()));

    for from in ["127.0.0.2"; 200] {
        silent.push(stalls(from).await);
    }
    assert_eq!(call(&client, &endpoint).await, Ok(()), "another address");
    for _ in 0..100 {
        silent.push(stalls("127.0.0.1").await);
    }
    let mut waits = Box::pin(call(&client, &endpoint));
    assert!(tokio::time::timeout(Duration::from_millis(200), &mut waits).await.is_err(), "200 of it stall");

    after(Duration::from_secs(11)).await;
    assert_eq!(waits.await, Ok(()), "once they are over");
    after(Duration::from_secs(11)).await;
    for stream in &mut silent {
        assert!(matches!(stream.read(&mut [0]).await, Ok(0) | Err(_)));
    }
    scope.cancel();
}

/// Agents behind one address that all come back at once, as after their coordinator was replaced.
#[tokio::test]
async fn many_clients_of_one_address_are_all_served() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::new(dir.path(), "ours");
    let scope = Scope::new();
    let address = serve(Some(files(&authority.issue("server"), None)), &scope).await;
    let client = Client { ca: Some(authority.ca.clone()), ..Client::default() };
    let endpoint = format!("https://{address}");
    let calls = futures::future::join_all((0..300).map(|_| call(&client, &endpoint))).await;
    assert_eq!(calls.iter().filter(|call| call.is_err()).count(), 0);
    scope.cancel();
}

#[test]
fn files_and_addresses_that_cannot_be_used() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::new(dir.path(), "ours");
    let (one, other) = (authority.issue("one"), authority.issue("other"));
    let empty = dir.path().join("empty.pem");
    std::fs::write(&empty, "").unwrap();
    let rows = [
        (&one.cert, &other.key, None, "is the key of another certificate"),
        (&one.key, &one.key, None, "holds no certificate"),
        (&one.cert, &one.cert, None, "holds no private key"),
        (&one.cert, &one.key, Some(&empty), "empty.pem: holds no certificate"),
        (&dir.path().join("gone"), &one.key, None, "gone: No such file"),
    ];
    for (cert, key, client_ca, want) in rows {
        let files = ServerFiles { cert: cert.clone(), key: key.clone(), client_ca: client_ca.cloned() };
        let error = ServerTls::open(files).unwrap_err().to_string();
        assert!(error.contains(want), "{error}");
    }

    let none = Client::default();
    let trusting = Client { ca: Some(authority.ca.clone()), ..Client::default() };
    let blind = Client { ca: Some(empty), ..Client::default() };
    let rows = [
        (&none, "http://10.0.0.5:7401", Ok("http://10.0.0.5:7401/")),
        (&none, "localhost:7401", Ok("http://localhost:7401/")),
        (&none, "127.0.0.1:7401", Ok("http://127.0.0.1:7401/")),
        (&none, "[::1]:7401", Ok("http://[::1]:7401/")),
        (&none, "10.0.0.5:7401", Ok("https://10.0.0.5:7401/")),
        (&trusting, "fleet.example.org:7401", Ok("https://fleet.example.org:7401/")),
        (&trusting, "http://127.0.0.1:7401", Ok("http://127.0.0.1:7401/")),
        (&trusting, "http://10.0.0.5:7401", Err("is not encrypted")),
        (&blind, "https://10.0.0.5:7401", Err("empty.pem")),
        (&none, "ftp://10.0.0.5", Err("ftp:// is not known")),
        (&none, "not an address", Err("write https://HOST:PORT")),
        (&none, "", Err("write https://HOST:PORT")),
    ];
    for (client, address, want) in rows {
        let found: Result<_, AddressError> = client.endpoint(address);
        match (want, found) {
            (Ok(want), found) => assert_eq!(found.unwrap().uri().to_string(), want),
            (Err(want), found) => {
                let error = found.expect_err(address).to_string();
                assert!(error.contains(want), "{address}: {error}");
            }
        }
    }
}
