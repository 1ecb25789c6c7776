//! Load: requests of many tenants, of which most are new, some repeat and some are invalid.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use lapin::options::QueueDeclareOptions;
use lapin::types::FieldTable;
use lapin::{Connection, ConnectionProperties};
use rand::random_range;
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::time::sleep;
use uuid::Uuid;

use crate::changes::CHANGING;
use crate::support::raw_amqp;
use crate::support::scheduler::Scheduler;
use crate::support::world::World;

/// Policy types whose lists have twelve objects each in the simulator.
pub const TYPES: [&str; 3] = ["mobileApp", "deviceShellScript", "deviceHealthScript"];
const TENANTS: usize = 150;
/// Tenants whose objects change; they get a third of the requests, of several selections.
const CHANGING_TENANTS: usize = 6;
const PER_SECOND: f64 = 8.0;

/// Published messages, grouped by their expected outcome.
#[derive(Default)]
pub struct Published {
    /// Count of all messages, repeats included.
    pub messages: usize,
    /// Keys that must create one run each.
    pub accepted: BTreeSet<String>,
    /// Keys used for two selections: one of the two creates the run, the other becomes a dead letter.
    pub conflicts: BTreeSet<String>,
    /// Bodies that must become dead letters.
    pub invalid: BTreeSet<String>,
    /// Count of messages whose properties a client library cannot parse; their bodies are in `invalid`.
    pub unreadable: usize,
    /// Count of repeated messages.
    pub repeats: usize,
}

/// Publisher of the load.
pub struct Load {
    world: Arc<World>,
    scheduler: Scheduler,
    tenants: Vec<Uuid>,
    recent: Vec<Value>,
    published: Published,
    burst: Arc<AtomicUsize>,
}

impl Load {
    /// Registers the tenants: every fifth is limited to one run at a time, one is disabled.
    pub async fn prepare(world: &Arc<World>, url: &str) -> Self {
        let mut tenants = vec![world.tenant];
        for number in 1..TENANTS {
            let tenant = Uuid::new_v4();
            world.register(tenant, (number % 5 == 0).then_some(1)).await;
            tenants.push(tenant);
        }
        world.execute(&format!("update tenants set enabled = false where tenant_id = '{}'", tenants[1])).await;
        let scheduler = Scheduler::on(&[url], &world.prefix);
        Self {
            world: Arc::clone(world),
            scheduler,
            tenants,
            recent: Vec::new(),
            published: Published::default(),
            burst: Arc::default(),
        }
    }

    /// Tenants whose objects change.
    pub fn changing_tenants(&self) -> &[Uuid] {
        &self.tenants[TENANTS - CHANGING_TENANTS..]
    }

    /// Number of requests to publish without a pause.
    pub fn burst(&self) -> Arc<AtomicUsize> {
        Arc::clone(&self.burst)
    }

    /// Publishes until `stop`.
    pub async fn publish(mut self, stop: watch::Receiver<bool>, progress: watch::Sender<usize>) -> Published {
        while !*stop.borrow() {
            if random_range(0..50) == 0 {
                self.publish_unreadable().await;
            } else {
                let body = self.next_body();
                self.scheduler.publish_bytes(body.as_bytes()).await;
            }
            self.published.messages += 1;
            progress.send_replace(self.published.messages);
            if self.burst.load(Ordering::Relaxed) > 0 {
                self.burst.fetch_sub(1, Ordering::Relaxed);
            } else {
                sleep(Duration::from_secs_f64(2.0 * rand::random::<f64>() / PER_SECOND)).await;
            }
        }
        self.published
    }

    /// Publishes a valid request with properties that a client library cannot parse.
    async fn publish_unreadable(&mut self) {
        let body = self.request(self.published.messages).to_string();
        let body = self.invalid(body);
        self.published.unreadable += 1;
        let mut kinds = raw_amqp::unreadable();
        let (properties, _) = kinds.swap_remove(random_range(0..kinds.len()));
        while !raw_amqp::try_publish(&self.world, body.as_bytes(), properties.clone()).await {
            sleep(Duration::from_millis(100)).await;
        }
    }

    fn next_body(&mut self) -> String {
        let number = self.published.messages;
        match random_range(0..100) {
            0..3 => self.invalid(format!("{{ \"number\": {number}, nope")),
            3..5 => {
                let mut request = self.request(number);
                request["selection"]["policy_types"] = json!("mobileApp");
                self.invalid(request.to_string())
            }
            5..7 => self.invalid(World::request_of(Uuid::new_v4(), &format!("unknown-{number}"), &TYPES).to_string()),
            7..9 if !self.recent.is_empty() => {
                let mut request = self.repeat();
                let key = request["idempotency_key"].as_str().expect("a request has a key").to_owned();
                request["selection"]["policy_types"] = json!(["deviceConfiguration"]);
                self.published.conflicts.insert(key);
                request.to_string()
            }
            9..20 if !self.recent.is_empty() => {
                self.published.repeats += 1;
                self.repeat().to_string()
            }
            _ => {
                let request = self.request(number);
                self.published.accepted.insert(format!("k{number}"));
                self.recent.push(request.clone());
                if self.recent.len() > 200 {
                    self.recent.remove(0);
                }
                request.to_string()
            }
        }
    }

    fn invalid(&mut self, body: String) -> String {
        self.published.invalid.insert(body.clone());
        body
    }

    fn request(&self, number: usize) -> Value {
        let mut types: Vec<&str> = TYPES.into_iter().filter(|_| rand::random()).collect();
        let tenant = if random_range(0..3) == 0 {
            // Each selection of these tenants lists the changing objects.
            types.push(CHANGING);
            self.changing_tenants()[random_range(0..CHANGING_TENANTS)]
        } else {
            self.tenants[random_range(0..self.tenants.len())]
        };
        World::request_of(tenant, &format!("k{number}"), if types.is_empty() { &TYPES } else { &types })
    }

    fn repeat(&self) -> Value {
        self.recent[random_range(0..self.recent.len())].clone()
    }
}

/// Counts the messages of a queue over a new connection, because the broker may have been killed since the last call.
pub async fn depth(world: &World, queue: &str) -> u32 {
    let ask = async {
        let connection = Connection::connect(&world.amqp_url, ConnectionProperties::default()).await?;
        let channel = connection.create_channel().await?;
        let name = format!("{}inventory.{queue}", world.prefix);
        let options = QueueDeclareOptions { passive: true, ..Default::default() };
        Ok::<_, lapin::Error>(channel.queue_declare(name.into(), options, FieldTable::default()).await?.message_count())
    };
    ask.await.unwrap_or(u32::MAX / 8)
}
