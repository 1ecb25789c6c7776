//! Graph client behind an HTTP proxy that accepts CONNECT only.

use std::net::SocketAddr;
use std::process::Output;
use std::sync::Arc;

use inventoryd::domain::failure::ErrorCode;
use parking_lot::Mutex;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream};

use crate::graph_client::{PLAIN, TENANT, World, temporary_file};
use crate::sim::SimConfig;
use crate::support::binary;

/// `Proxy-Authorization` for `user:password`.
const AUTHORIZATION: &str = "Basic dXNlcjpwYXNzd29yZA==";

/// Proxy with the request heads that it has received.
#[derive(Clone, Default)]
struct Connects(Arc<Mutex<Vec<String>>>);

impl Connects {
    async fn start(&self) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (address, connects) = (listener.local_addr().unwrap(), self.clone());
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                tokio::spawn(connects.clone().tunnel(client));
            }
        });
        address
    }

    async fn tunnel(self, client: TcpStream) {
        let mut client = BufReader::new(client);
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") && client.read_line(&mut head).await.is_ok_and(|bytes| bytes > 0) {}
        self.0.lock().push(head.clone());
        let Some(target) = head.strip_prefix("CONNECT ").and_then(|rest| rest.split(' ').next()) else { return };
        if head.contains("authorization") && !head.contains(AUTHORIZATION) {
            return;
        }
        let mut server = TcpStream::connect(target).await.unwrap();
        client.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await.unwrap();
        let _ = copy_bidirectional(&mut client, &mut server).await;
    }

    fn heads(&self) -> Vec<String> {
        self.0.lock().clone()
    }
}

#[tokio::test]
async fn graph_and_token_service_are_reached_through_the_proxy() {
    let connects = Connects::default();
    let proxy = format!("http://{}", connects.start().await);
    let credential = temporary_file("proxy", "user:password\n");
    let settings = [("proxy", proxy.as_str()), ("proxy_credential_file", credential.to_str().unwrap())];
    let world = World::with(SimConfig::default(), &settings).await;
    assert!(!world.read(PLAIN).await.unwrap().is_empty());
    let heads = connects.heads();
    assert!(!heads.is_empty() && heads.iter().all(|head| head.contains(AUTHORIZATION)), "{heads:?}");
    assert!(heads.iter().all(|head| head.contains(&world.sim.address().to_string())), "{heads:?}");
}

#[tokio::test]
async fn hosts_of_no_proxy_are_reached_directly() {
    let connects = Connects::default();
    let proxy = format!("http://{}", connects.start().await);
    let world = World::with(SimConfig::default(), &[("proxy", &proxy), ("no_proxy", "127.0.0.1")]).await;
    assert!(!world.read(PLAIN).await.unwrap().is_empty());
    assert_eq!(connects.heads().len(), 0);
}

#[tokio::test]
async fn a_proxy_that_is_down_is_named() {
    let world = World::with(SimConfig::default(), &[("proxy", "http://127.0.0.1:9"), ("max_tries", "1")]).await;
    let failure = world.client().token_roles(TENANT, "default").await.unwrap_err();
    assert_eq!(failure.failure.code, ErrorCode::TokenServiceUnavailable);
    assert!(failure.detail.as_deref().is_some_and(|detail| detail.contains("proxy")), "{failure:?}");
}

/// Starts a server that gives the same answer to every request; returns its address and the request heads.
async fn answering(answer: String) -> (SocketAddr, Connects) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (address, requests) = (listener.local_addr().unwrap(), Connects::default());
    let heads = requests.clone();
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            let mut client = BufReader::new(client);
            let mut head = String::new();
            while !head.ends_with("\r\n\r\n") && client.read_line(&mut head).await.is_ok_and(|bytes| bytes > 0) {}
            heads.0.lock().push(head);
            let _ = client.write_all(answer.as_bytes()).await;
        }
    });
    (address, requests)
}

#[tokio::test]
async fn a_proxy_that_refuses_says_why() {
    for (status, reason) in
        [("407 Proxy Authentication Required", "graph.proxy_credential_file"), ("403 Forbidden", "the proxy refused")]
    {
        let page = "<html>blocked by policy</html>";
        let answer = format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\n\r\n{page}", page.len());
        let proxy = format!("http://{}", answering(answer).await.0);
        let world = World::with(SimConfig::default(), &[("proxy", &proxy), ("max_tries", "1")]).await;
        let failure = world.client().token_roles(TENANT, "default").await.unwrap_err();
        assert_eq!(failure.failure.code, ErrorCode::TokenServiceUnavailable);
        assert!(failure.detail.as_deref().is_some_and(|detail| detail.contains(reason)), "{failure:?}");
    }
}

/// Runs `doctor` for one type, with a managed identity, in an environment that names another proxy.
async fn doctor_with_managed_identity(world: &World, proxy: &str, metadata: &str, arguments: &[&str]) -> Output {
    let base_url = world.sim.base_url();
    let ca_file = temporary_file("ca.pem", world.sim.ca_pem());
    let settings = [
        ("CLOUD", "custom"),
        ("BASE_URL", &base_url),
        ("AUTHORITY", &base_url),
        ("CA_FILE", ca_file.to_str().unwrap()),
        ("MAX_TRIES", "1"),
        ("PROXY", proxy),
        ("CREDENTIALS__DEFAULT__KIND", "managed_identity"),
    ];
    let settings = settings.map(|(key, value)| (format!("INVENTORYD__GRAPH__{key}"), value));
    let tenant = TENANT.to_string();
    let mut command = tokio::process::Command::new(binary());
    command.args(["doctor", "--tenant", &tenant, "--credential", "default", "--types", "mobileApp"]).args(arguments);
    command.env_clear().envs(settings).env("IDENTITY_ENDPOINT", metadata).env("IDENTITY_HEADER", "local");
    for variable in ["http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"] {
        command.env(variable, "http://127.0.0.1:9");
    }
    command.output().await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn no_proxy_is_used_for_the_metadata_service() {
    // Any token does: the simulator rejects it, which takes a request to Graph. Its expiry is later than the vendor accepts.
    let token =
        r#"{"access_token":"opaque","expires_on":"99999999999999999999","token_type":"Bearer","resource":"graph"}"#;
    let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{token}", token.len());
    let (metadata, asked) = answering(answer).await;
    let connects = Connects::default();
    let proxy = format!("http://{}", connects.start().await);
    let world = World::start().await;
    let metadata = format!("http://{metadata}/token");
    let shown = doctor_with_managed_identity(&world, &proxy, &metadata, &["--json"]).await;
    let document: serde_json::Value =
        serde_json::from_slice(&shown.stdout).unwrap_or_else(|error| panic!("{error}: {shown:?}"));
    assert_eq!(document["types"][0]["code"], "graph_unauthorized", "{document}");
    assert_eq!(document["proxy"], proxy, "{document}");
    let shown = doctor_with_managed_identity(&world, &proxy, &metadata, &[]).await;
    let text = String::from_utf8_lossy(&shown.stdout);
    assert!(text.contains(&format!("through the proxy {proxy}")), "{shown:?}");

    let (asked, heads) = (asked.heads(), connects.heads());
    assert!(asked.iter().all(|head| head.starts_with("GET /token?")), "an origin, not a proxy, is asked: {asked:?}");
    assert!(asked.len() >= 2 && asked.iter().all(|head| head.contains("x-identity-header: local")), "{asked:?}");
    let graph = format!("CONNECT {} ", world.sim.address());
    assert!(heads.len() >= 2 && heads.iter().all(|head| head.starts_with(&graph)), "{heads:?}");
}
