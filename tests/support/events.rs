//! A subscriber to run-completed events, as another service would be one.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use futures_util::StreamExt;
use lapin::options::{BasicConsumeOptions, QueueBindOptions, QueueDeclareOptions};
use lapin::types::FieldTable;
use lapin::{Connection, ConnectionProperties};
use serde_json::Value;

use super::eventually;

/// Everything that arrived, in order, repeats included.
pub struct Subscriber {
    received: Arc<Mutex<Vec<Value>>>,
    _connection: Connection,
}

impl Subscriber {
    /// Binds a queue of its own to every event; the exchange is made as the daemon makes it.
    pub async fn new(amqp_url: &str, prefix: &str) -> Self {
        let connection =
            Connection::connect(amqp_url, ConnectionProperties::default()).await.expect("the broker answers");
        let channel = connection.create_channel().await.expect("a channel opens");
        let queue = channel
            .queue_declare(
                "".into(),
                QueueDeclareOptions { exclusive: true, ..Default::default() },
                FieldTable::default(),
            )
            .await
            .expect("a queue is made");
        let exchange = format!("{prefix}inventory.events");
        let (name, options) = (queue.name().clone(), QueueBindOptions::default());
        channel
            .queue_bind(name.clone(), exchange.into(), "run.completed.#".into(), options, FieldTable::default())
            .await
            .expect("the exchange is there");
        let options = BasicConsumeOptions { no_ack: true, ..Default::default() };
        let mut deliveries =
            channel.basic_consume(name, "".into(), options, FieldTable::default()).await.expect("consuming begins");
        let received = Arc::new(Mutex::new(Vec::new()));
        let log = Arc::clone(&received);
        tokio::spawn(async move {
            let _channel = channel;
            while let Some(Ok(delivery)) = deliveries.next().await {
                let event = serde_json::from_slice(&delivery.data).expect("an event is JSON");
                log.lock().expect("no test holds the lock while it fails").push(event);
            }
        });
        Self { received, _connection: connection }
    }

    /// Everything that arrived so far.
    pub fn received(&self) -> Vec<Value> {
        self.received.lock().expect("no test holds the lock while it fails").clone()
    }

    /// What a subscriber that dedupes by id has: the first event of every id.
    pub fn distinct(&self) -> BTreeMap<String, Value> {
        let mut distinct = BTreeMap::new();
        for event in self.received() {
            distinct.entry(event["id"].as_str().expect("an event has an id").to_owned()).or_insert(event);
        }
        distinct
    }

    /// The event of a run once it has arrived.
    pub async fn event_of(&self, run: &Value) -> Value {
        let id = run["id"].as_str().expect("a run has an id");
        eventually("the run's event arrives", || async { self.distinct().remove(id) }).await
    }
}
