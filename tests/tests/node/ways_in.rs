//! The ways in: TLS, the Unix socket, and a connection that lives long.

use std::path::Path;
use std::process::Command;

use bytes::Bytes;
use kvkeep_client::{Call, Client, ClientConfig, GetItem};
use kvkeep_core::{Class, InstanceId};
use kvkeep_proto::v1;
use kvkeep_proto::v1::admin_client::AdminClient;
use kvkeep_proto::v1::blocks_client::BlocksClient;
use kvkeep_tests::{Node, Options, formats, payload, raw, skipped};
use tonic::transport::Endpoint;

const TOKEN: &str = "acme-0123456789abcdef";

/// A certificate for this host and its key, mode 0600; `false` where nothing here can make one.
fn certificate(cert: &Path, key: &Path) -> bool {
    let made = Command::new("openssl")
        .args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"])
        .args(["-subj", "/CN=kvkeep", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"])
        .args(["-addext", "basicConstraints=critical,CA:FALSE"])
        .arg("-keyout")
        .arg(key)
        .arg("-out")
        .arg(cert)
        .output();
    made.is_ok_and(|o| o.status.success())
        && Command::new("chmod").arg("600").arg(key).status().is_ok_and(|status| status.success())
}

/// With TLS on, who trusts the certificate and has the token gets in, and nobody else: not in the clear, not without the
/// token, not without the certificate.
#[tokio::test]
async fn tls_lets_in_who_trusts_the_certificate_and_has_the_token() {
    let folder = tempfile::tempdir().unwrap();
    let (cert, key) = (folder.path().join("cert.pem"), folder.path().join("key.pem"));
    if !certificate(&cert, &key) {
        return skipped("tls_lets_in_who_trusts_the_certificate_and_has_the_token", "no openssl to make a certificate");
    }
    let environment = [("KVKEEP_TLS_CERT", &cert), ("KVKEEP_TLS_KEY", &key)]
        .map(|(name, path)| (name.into(), path.display().to_string()));
    let tokens = vec![format!("acme {TOKEN}")];
    let node = Node::start(Options { tokens, environment: environment.into(), ..Options::default() });
    let config = |secure: bool, token: Option<&str>, ca: bool| ClientConfig {
        token: token.map(str::to_owned),
        ca_file: ca.then(|| cert.clone()),
        ..ClientConfig::to(format!("{}://{}", if secure { "https" } else { "http" }, node.endpoint()))
    };
    let client = Client::connect(config(true, Some(TOKEN), true)).await.unwrap();
    let namespace = super::namespace(&client, &formats::plain(4096)).await;
    let keys = payload::chain(1, 4);
    super::store(&namespace, &keys, 4096, Class::Durable).await;
    assert_eq!(super::found(&namespace, &keys, 4096).await, 4);
    for (what, refused) in [
        ("in the clear", config(false, Some(TOKEN), false)),
        ("without the token", config(true, None, true)),
        ("without the certificate", config(true, Some(TOKEN), false)),
    ] {
        assert!(Client::connect(refused).await.is_err(), "{what}");
    }
}

/// The server's own user needs no token on the Unix socket, and is an administrator there.
#[tokio::test]
async fn the_unix_socket_knows_its_peer() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("kvkeepd.sock");
    let environment = vec![("KVKEEP_UNIX_SOCKET".to_owned(), socket.display().to_string())];
    let tokens = vec![format!("acme {TOKEN}")];
    let _node = Node::start(Options { tokens, environment, ..Options::default() });
    let channel = Endpoint::from_shared(format!("unix://{}", socket.display())).unwrap().connect().await.unwrap();
    let mut admin = AdminClient::new(channel.clone());
    let before = admin.status(v1::StatusRequest {}).await.unwrap_err();
    assert_eq!(raw::detail(&before).kind, "hello_required");
    let hello = BlocksClient::new(channel).hello(raw::hello(InstanceId([3; 16]))).await.unwrap().into_inner();
    assert_eq!(hello.tenant, "default");
    assert_eq!(admin.status(v1::StatusRequest {}).await.unwrap().into_inner().state, "serving");
}

/// 1,500 small gets, one after the other, on one connection: HTTP/2 gives up a connection on which some 1,000 streams were
/// reset, which is what a client does that stops reading when it has what it wanted.
#[tokio::test]
async fn thousands_of_gets_leave_the_connection_alive() {
    let node = Node::start(Options::default());
    let client = node.client().await;
    let namespace = super::namespace(&client, &formats::plain(4096)).await;
    let keys = payload::chain(1, 2);
    super::store(&namespace, &keys, 4096, Class::Cache).await;
    let item: [GetItem; 1] = [GetItem::of(Bytes::clone(&keys[0]))];
    for i in 0..1500 {
        let parts = namespace.get(&item, None, &Call::default()).await.unwrap_or_else(|e| panic!("get {i}: {e}"));
        assert!(parts[0].is_hit(), "get {i}");
    }
}

/// A start that finds its port taken leaves nothing in memory.
#[tokio::test]
async fn a_start_that_fails_leaves_nothing_behind() {
    let node = Node::start(Options::default());
    let mut second = Node::new(Options { listen: node.endpoint(), ..Options::default() });
    let said = second.try_restart().unwrap_err();
    assert!(said.contains("cannot listen"), "{said}");
    let left: Vec<_> = std::fs::read_dir(second.arena_dir()).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
}
