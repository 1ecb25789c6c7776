//! Subscriber to run-completed events, as another service would implement it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use lapin::options::{BasicAckOptions, BasicConsumeOptions, QueueBindOptions, QueueDeclareOptions};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{Connection, ConnectionProperties};
use parking_lot::Mutex;
use serde_json::Value;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

use super::eventually;

/// Time for the broker to answer a command.
const ANSWER: Duration = Duration::from_secs(10);
/// Silence after which a durable subscriber reconnects, as every consumer should: RabbitMQ may count an event as delivered to a
/// consumer that the restart of a queue has cut off.
const SILENCE: Duration = Duration::from_secs(20);

/// Collects every event received, in order, repeats included.
pub struct Subscriber {
    received: Arc<Mutex<Vec<Value>>>,
    _connection: Option<Connection>,
    reconnecting: Option<JoinHandle<()>>,
}

impl Drop for Subscriber {
    fn drop(&mut self) {
        if let Some(task) = &self.reconnecting {
            task.abort();
        }
    }
}

impl Subscriber {
    /// Subscribes to every event with an exclusive queue.
    pub async fn new(amqp_url: &str, prefix: &str) -> Self {
        Self::bound(amqp_url, prefix, "run.completed.#").await
    }

    /// Subscribes with an exclusive queue to the events that match `binding`.
    pub async fn bound(amqp_url: &str, prefix: &str, binding: &str) -> Self {
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
            .expect("a queue is declared");
        let exchange = format!("{prefix}inventory.events");
        let (name, options) = (queue.name().clone(), QueueBindOptions::default());
        channel
            .queue_bind(name.clone(), exchange.into(), binding.into(), options, FieldTable::default())
            .await
            .expect("the exchange exists");
        let options = BasicConsumeOptions { no_ack: true, ..Default::default() };
        let mut deliveries = channel
            .basic_consume(name, "".into(), options, FieldTable::default())
            .await
            .expect("the consumer is registered");
        let received = Arc::new(Mutex::new(Vec::new()));
        let log = Arc::clone(&received);
        tokio::spawn(async move {
            let _channel = channel;
            while let Some(Ok(delivery)) = deliveries.next().await {
                let event = serde_json::from_slice(&delivery.data).expect("an event is JSON");
                log.lock().push(event);
            }
        });
        Self { received, _connection: Some(connection), reconnecting: None }
    }

    /// Subscribes with a durable queue that survives restarts of the broker; reconnects to the URLs in turn.
    pub async fn durable(urls: &[&str], prefix: &str) -> Self {
        let (received, bound) = (Arc::default(), Arc::new(tokio::sync::Notify::new()));
        let (log, ready, prefix) = (Arc::clone(&received), Arc::clone(&bound), prefix.to_owned());
        let urls: Vec<String> = urls.iter().map(|url| (*url).to_owned()).collect();
        let task = tokio::spawn(async move {
            for url in urls.iter().cycle() {
                // Any error ends in a reconnect.
                let _ = receive(url, &prefix, &log, &ready).await;
                sleep(Duration::from_millis(200)).await;
            }
        });
        bound.notified().await;
        Self { received, _connection: None, reconnecting: Some(task) }
    }

    /// Returns every event received so far.
    pub fn received(&self) -> Vec<Value> {
        self.received.lock().clone()
    }

    /// Returns the first event of every id, as a deduplicating subscriber would keep it.
    pub fn distinct(&self) -> BTreeMap<String, Value> {
        let mut distinct = BTreeMap::new();
        for event in self.received() {
            distinct.entry(event["id"].as_str().expect("an event has an id").to_owned()).or_insert(event);
        }
        distinct
    }

    /// Waits for the event of a run.
    pub async fn event_of(&self, run: &Value) -> Value {
        let id = run["id"].as_str().expect("a run has an id");
        eventually("the run's event arrives", || async { self.distinct().remove(id) }).await
    }
}

/// Receives from one node until the first error or silence.
async fn receive(
    url: &str,
    prefix: &str,
    log: &Mutex<Vec<Value>>,
    ready: &tokio::sync::Notify,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let connect = Connection::connect(url, ConnectionProperties::default());
    let connection = timeout(Duration::from_secs(5), connect).await??;
    let channel = timeout(ANSWER, connection.create_channel()).await??;
    let queue = format!("{prefix}subscriber");
    let mut arguments = FieldTable::default();
    arguments.insert("x-queue-type".into(), AMQPValue::LongString("quorum".into()));
    let declare = channel.queue_declare(queue.as_str().into(), QueueDeclareOptions::durable(), arguments);
    timeout(ANSWER, declare).await??;
    let (exchange, nothing) = (format!("{prefix}inventory.events"), FieldTable::default());
    let options = QueueBindOptions::default();
    let bind =
        channel.queue_bind(queue.as_str().into(), exchange.into(), "run.completed.#".into(), options, nothing.clone());
    timeout(ANSWER, bind).await??;
    let consume = channel.basic_consume(queue.into(), "".into(), BasicConsumeOptions::default(), nothing);
    let mut deliveries = timeout(ANSWER, consume).await??;
    ready.notify_one();
    while let Some(delivery) = timeout(SILENCE, deliveries.next()).await? {
        let delivery = delivery?;
        log.lock().push(serde_json::from_slice(&delivery.data)?);
        delivery.ack(BasicAckOptions::default()).await?;
    }
    Ok(())
}
