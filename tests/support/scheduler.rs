//! A scheduler that outlives its broker: it publishes a request again and again until it is confirmed.

use std::time::Duration;

use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
use lapin::{BasicProperties, Channel, Connection, ConnectionProperties};
use serde_json::Value;
use tokio::time::{sleep, timeout};
use uuid::Uuid;

use super::world::World;

/// Longest that any answer of the broker is waited for; then another connection is tried.
const ANSWER: Duration = Duration::from_secs(5);

/// Publishes requests, whatever happens to the broker meanwhile.
pub struct Scheduler {
    urls: Vec<String>,
    exchange: String,
    link: Option<(Connection, Channel)>,
    turn: usize,
}

impl Scheduler {
    /// A scheduler that knows these nodes.
    pub fn on(urls: &[&str], prefix: &str) -> Self {
        let urls = urls.iter().map(|url| (*url).to_owned()).collect();
        Self { urls, exchange: format!("{prefix}inventory.sync"), link: None, turn: 0 }
    }

    /// Publishes a request; a repeat is harmless, because the key makes it a duplicate.
    pub async fn publish(&mut self, request: &Value) {
        self.publish_bytes(request.to_string().as_bytes()).await;
    }

    /// Publishes any bytes.
    pub async fn publish_bytes(&mut self, body: &[u8]) {
        while !matches!(timeout(ANSWER, self.try_to(body)).await, Ok(Ok(true))) {
            self.link = None;
            self.turn += 1;
            sleep(Duration::from_millis(100)).await;
        }
    }

    async fn try_to(&mut self, body: &[u8]) -> lapin::Result<bool> {
        let (_, channel) = match &self.link {
            Some(link) => link,
            None => {
                let url = &self.urls[self.turn % self.urls.len()];
                let connection = Connection::connect(url, ConnectionProperties::default()).await?;
                let channel = connection.create_channel().await?;
                channel.confirm_select(ConfirmSelectOptions::default()).await?;
                self.link.insert((connection, channel))
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

/// `count` requests of as many tenants, which no limit stands in the way of, and their keys.
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
