//! Graph client behind an HTTP proxy that accepts CONNECT only.

use std::net::SocketAddr;
use std::sync::Arc;

use inventoryd::domain::failure::ErrorCode;
use parking_lot::Mutex;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream};

use crate::graph_client::{PLAIN, TENANT, World, temporary_file};
use crate::sim::SimConfig;

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

#[tokio::test]
async fn a_proxy_that_refuses_says_why() {
    for (status, reason) in
        [("407 Proxy Authentication Required", "graph.proxy_credential_file"), ("403 Forbidden", "the proxy refused")]
    {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let proxy = format!("http://{}", listener.local_addr().unwrap());
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let mut client = BufReader::new(client);
                let mut head = String::new();
                while !head.ends_with("\r\n\r\n") && client.read_line(&mut head).await.is_ok_and(|bytes| bytes > 0) {}
                let page = "<html>blocked by policy</html>";
                let answer = format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\n\r\n{page}", page.len());
                let _ = client.write_all(answer.as_bytes()).await;
            }
        });
        let world = World::with(SimConfig::default(), &[("proxy", &proxy), ("max_tries", "1")]).await;
        let failure = world.client().token_roles(TENANT, "default").await.unwrap_err();
        assert_eq!(failure.failure.code, ErrorCode::TokenServiceUnavailable);
        assert!(failure.detail.as_deref().is_some_and(|detail| detail.contains(reason)), "{failure:?}");
    }
}
