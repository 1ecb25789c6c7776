//! Publisher that survives broker restarts: each request is retried until it is confirmed.

use std::time::Duration;

use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
use lapin::{BasicProperties, Channel, Connection, ConnectionProperties};
use serde_json::Value;
use tokio::time::{sleep, timeout};
use uuid::Uuid;

use super::world::World;

/// Longest wait for a confirm before reconnecting.
const CONFIRM_TIMEOUT: Duration = Duration::from_secs(5);

/// Publishes requests, retrying on every broker failure.
pub struct Scheduler {
    urls: Vec<String>,
    exchange: String,
    connection: Option<(Connection, Channel)>,
    next_url: usize,
}

impl Scheduler {
    /// Creates a scheduler that tries these nodes in turn.
    pub fn on(urls: &[&str], prefix: &str) -> Self {
        let urls = urls.iter().map(|url| (*url).to_owned()).collect();
        Self { urls, exchange: format!("{prefix}inventory.sync"), connection: None, next_url: 0 }
    }

    /// Publishes a request; a repeat is harmless because the idempotency key marks it as a duplicate.
    pub async fn publish(&mut self, request: &Value) {
        self.publish_bytes(request.to_string().as_bytes()).await;
    }

    /// Publishes raw bytes.
    pub async fn publish_bytes(&mut self, body: &[u8]) {
        while !matches!(timeout(CONFIRM_TIMEOUT, self.try_publish(body)).await, Ok(Ok(true))) {
            self.connection = None;
            self.next_url += 1;
            sleep(Duration::from_millis(100)).await;
        }
    }

    async fn try_publish(&mut self, body: &[u8]) -> lapin::Result<bool> {
        let (_, channel) = match &self.connection {
            Some(connection) => connection,
            None => {
                let url = &self.urls[self.next_url % self.urls.len()];
                let connection = Connection::connect(url, ConnectionProperties::default()).await?;
                let channel = connection.create_channel().await?;
                channel.confirm_select(ConfirmSelectOptions::default()).await?;
                self.connection.insert((connection, channel))
            }
        };
        let options = BasicPublishOptions { mandatory: true, ..Default::default() };
        let properties = BasicProperties::default().with_delivery_mode(2);
        let publish =
            channel.basic_publish(self.exchange.as_str().into(), "sync.requested".into(), options, body, properties);
        let confirmation = publish.await?.await?;
        Ok(confirmation.is_ack() && confirmation.take_message().is_none())
    }
}

/// Registers `count` tenants and builds one request for each, so that no per-tenant limit applies; returns keys and
/// requests.
pub async fn requests(world: &World, name: &str, count: usize, types: &[&str]) -> (Vec<String>, Vec<Value>) {
    let mut all = (Vec::new(), Vec::new());
    for number in 0..count {
        let (tenant, key) = (Uuid::new_v4(), format!("{name}{number}"));
        world.register(tenant, None).await;
        all.1.push(World::request_of(tenant, &key, types));
        all.0.push(key);
    }
    all
}
