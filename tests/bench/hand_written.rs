//! Consumers written by hand, which small runs are compared with: a floor with the same durable effects as the daemon,
//! and a bare consumer that lacks most of them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use futures_util::future::{join_all, try_join_all};
use inventoryd::domain::catalog::Catalog;
use inventoryd::domain::item::RawObject;
use inventoryd::domain::policy_type::PolicyType;
use lapin::message::Delivery;
use lapin::options::{
    BasicAckOptions, BasicConsumeOptions, BasicPublishOptions, BasicQosOptions, ConfirmSelectOptions,
};
use lapin::types::FieldTable;
use lapin::{BasicProperties, Channel};
use serde::Deserialize;
use serde_json::value::RawValue;
use sqlx::postgres::{PgConnectOptions, PgPool, PgPoolOptions};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use uuid::Uuid;

use super::baseline::{Graph, Lists};
use super::rig::Result;
use super::world::{CONNECTIONS, World};

/// Deliveries in flight, of the daemon too.
pub const PREFETCH: u16 = 32;
/// Size of a common event.
const EVENT_BYTES: usize = 1_500;
/// Time in which events gather, as in the daemon: each batch costs a commit.
const GATHER: Duration = Duration::from_millis(50);
/// Events of one batch.
const EVENTS: usize = 100;

/// Effects of a consumer on the database and the broker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effects {
    /// Everything that the daemon leaves behind: the run in and out, its objects, the row of its type, and an event
    /// that is due until the broker has confirmed it. In the fewest commits, without leases, fences and limits.
    Same,
    /// A run in and out, and an event that nobody publishes.
    Bare,
}

/// Consumer of a queue of its own.
pub struct HandWritten {
    effects: Effects,
    graph: Graph,
    link: String,
    policy_type: Arc<PolicyType>,
    tenants: Vec<(Uuid, String)>,
    db: PgPool,
    channel: Channel,
    queue: String,
    events: String,
}

/// Page of a list.
#[derive(Deserialize)]
struct Page<'a> {
    #[serde(borrow)]
    value: Vec<&'a RawValue>,
}

impl HandWritten {
    /// Creates the consumer's tables and queue, and fetches a token for each tenant.
    pub async fn new(world: &World, lists: &Lists, effects: Effects) -> Result<Arc<Self>> {
        world.execute(TABLES).await?;
        let graph = Graph::new(world)?;
        let mut tenants = Vec::new();
        for tenant in &world.tenants {
            tenants.push((*tenant, graph.token(*tenant).await?));
        }
        let channel = world.connection.create_channel().await?;
        let queue = format!("{}hand-written.{effects:?}", world.prefix);
        world.declare_queue(&queue).await?;
        channel.basic_qos(PREFETCH, BasicQosOptions { global: false }).await?;
        channel.confirm_select(ConfirmSelectOptions::default()).await?;
        // As in the daemon: no ping before a statement, and one plan for all.
        let options: PgConnectOptions = world.database_url.parse()?;
        let options = options.options([("plan_cache_mode", "force_generic_plan")]);
        let pool = PgPoolOptions::new().max_connections(CONNECTIONS).test_before_acquire(false);
        Ok(Arc::new(Self {
            effects,
            link: graph.link(&lists.links[0]),
            graph,
            policy_type: Arc::clone(Catalog::built_in().get(&lists.keys[0]).ok_or("an unknown type")?),
            tenants,
            db: pool.connect_with(options).await?,
            channel,
            queue,
            events: format!("{}inventory.events", world.prefix),
        }))
    }

    /// Publishes and handles `count` requests; returns the seconds until the last is acknowledged.
    pub async fn round(self: &Arc<Self>, world: &World, count: usize) -> Result<f64> {
        let (ended, runs) = mpsc::unbounded_channel();
        let relay = tokio::spawn(Arc::clone(self).publish_events(runs));
        let begun = Instant::now();
        tokio::try_join!(self.publish_requests(world, count), self.consume(count, ended))?;
        let seconds = begun.elapsed().as_secs_f64();
        relay.await??;
        Ok(seconds)
    }

    async fn publish_requests(&self, world: &World, count: usize) -> Result<()> {
        for number in 0..count {
            let properties = BasicProperties::default().with_delivery_mode(2);
            let (key, body) = (self.queue.clone(), number.to_string());
            let options = BasicPublishOptions::default();
            world.channel.basic_publish("".into(), key.into(), options, body.as_bytes(), properties).await?;
        }
        Ok(())
    }

    async fn consume(self: &Arc<Self>, count: usize, ended: mpsc::UnboundedSender<(Uuid, Uuid)>) -> Result<()> {
        let tag = Uuid::new_v4().to_string();
        let (options, arguments) = (BasicConsumeOptions::default(), FieldTable::default());
        let mut deliveries =
            self.channel.basic_consume(self.queue.clone().into(), tag.clone().into(), options, arguments).await?;
        let mut tasks = JoinSet::new();
        for _ in 0..count {
            let delivery = deliveries.next().await.ok_or("the consumer was cancelled")??;
            let (consumer, ended) = (Arc::clone(self), ended.clone());
            tasks.spawn(async move { consumer.handle(delivery, ended).await });
        }
        while let Some(done) = tasks.join_next().await {
            done??;
        }
        self.channel.basic_cancel(tag.into(), Default::default()).await?;
        Ok(())
    }

    async fn handle(&self, delivery: Delivery, ended: mpsc::UnboundedSender<(Uuid, Uuid)>) -> Result<()> {
        let number: usize = std::str::from_utf8(&delivery.data)?.parse()?;
        let (tenant, token) = &self.tenants[number % self.tenants.len()];
        let run = Uuid::now_v7();
        let begin =
            sqlx::query("insert into hand_written_runs (tenant_id, id, key, status) values ($1, $2, $3, 'running')");
        begin.bind(tenant).bind(run).bind(run.to_string()).execute(&self.db).await?;
        let body = self.graph.get(&self.link, token).await?;
        match self.effects {
            Effects::Same => {
                self.store(*tenant, run, &body).await?;
                ended.send((*tenant, run))?;
            }
            Effects::Bare => self.end(*tenant, run, &body).await?,
        }
        delivery.ack(BasicAckOptions::default()).await?;
        Ok(())
    }

    /// Writes the objects and the row of the type, ends the run and makes its event due, in one commit.
    async fn store(&self, tenant: Uuid, run: Uuid, body: &[u8]) -> Result<()> {
        let page: Page<'_> = serde_json::from_slice(body)?;
        let (mut ids, mut names, mut platforms, mut metas) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for text in page.value {
            let object = RawObject::parse(text.get()).map_err(|_| "not an object")?;
            let item = object.observe(&self.policy_type).map_err(|_| "an object without an id")?;
            ids.push(item.external_id);
            names.push(item.display_name);
            platforms.push(item.platform);
            metas.push(item.meta);
        }
        let end = sqlx::query(END).bind(tenant).bind(run).bind(&self.policy_type.key).bind(&self.policy_type.category);
        end.bind(&ids).bind(&names).bind(&platforms).bind(&metas).execute(&self.db).await?;
        Ok(())
    }

    async fn end(&self, tenant: Uuid, run: Uuid, body: &[u8]) -> Result<()> {
        let end = sqlx::query(
            "with ended as (update hand_written_runs set status = 'success', items = $3, finished_at = now()
                             where tenant_id = $1 and id = $2 returning tenant_id, id)
             insert into bare_outbox select tenant_id, id, $4 from ended",
        );
        let event = "x".repeat(EVENT_BYTES);
        end.bind(tenant).bind(run).bind(i64::try_from(body.len())?).bind(event).execute(&self.db).await?;
        Ok(())
    }

    /// Publishes the events of runs in batches, and removes them from the outbox once they are confirmed.
    async fn publish_events(self: Arc<Self>, mut runs: mpsc::UnboundedReceiver<(Uuid, Uuid)>) -> Result<()> {
        let mut batch = Vec::new();
        while runs.recv_many(&mut batch, EVENTS).await > 0 {
            let body = vec![b'x'; EVENT_BYTES];
            let publishes = batch.iter().map(|(tenant, run): &(Uuid, Uuid)| {
                let properties = BasicProperties::default().with_delivery_mode(2);
                let properties = properties.with_message_id(run.to_string().into());
                let options = BasicPublishOptions { mandatory: true, ..Default::default() };
                let key = format!("run.completed.success.{tenant}");
                self.channel.basic_publish(self.events.clone().into(), key.into(), options, &body, properties)
            });
            let confirms = try_join_all(publishes).await?;
            for confirm in join_all(confirms).await {
                if !confirm?.is_ack() {
                    return Err("the broker refused an event".into());
                }
            }
            let (tenants, ids): (Vec<Uuid>, Vec<Uuid>) = batch.drain(..).unzip();
            let remove = sqlx::query(
                "delete from hand_written_outbox o using unnest($1::uuid[], $2::uuid[]) k(tenant_id, run_id)
                  where o.tenant_id = k.tenant_id and o.run_id = k.run_id",
            );
            remove.bind(tenants).bind(ids).execute(&self.db).await?;
            tokio::time::sleep(GATHER).await;
        }
        Ok(())
    }
}

const END: &str = "
with items as (
  insert into hand_written_items as i (tenant_id, policy_type, external_id, display_name, category, platform, meta_jsonb,
         first_seen_at, last_changed_at, last_seen_at, last_seen_run_id)
  select $1, $3, u.id, u.name, $4, u.platform, u.meta::jsonb, now(), now(), now(), $2
    from unnest($5::text[], $6::text[], $7::text[], $8::text[]) u(id, name, platform, meta)
  on conflict (tenant_id, policy_type, external_id) do update set
    display_name = excluded.display_name, category = excluded.category, platform = excluded.platform,
    meta_jsonb = excluded.meta_jsonb, last_seen_at = excluded.last_seen_at, last_seen_run_id = excluded.last_seen_run_id),
types as (
  insert into hand_written_types (tenant_id, run_id, policy_type, status, items)
  values ($1, $2, $3, 'complete', cardinality($5::text[]))),
due as (
  insert into hand_written_outbox (tenant_id, run_id) values ($1, $2))
update hand_written_runs set status = 'success', items = cardinality($5::text[]), finished_at = clock_timestamp()
 where tenant_id = $1 and id = $2";

const TABLES: &str = "
create table if not exists hand_written_runs (
  tenant_id uuid, id uuid, key text, status text, items bigint, finished_at timestamptz,
  primary key (tenant_id, id), unique (tenant_id, key)) with (fillfactor = 50);
create table if not exists hand_written_types (
  tenant_id uuid, run_id uuid, policy_type text, status text, items bigint, primary key (tenant_id, run_id, policy_type));
create table if not exists hand_written_items (like inventory_items including all) with (fillfactor = 50);
create table if not exists hand_written_outbox (tenant_id uuid, run_id uuid, primary key (tenant_id, run_id));
create table if not exists bare_outbox (tenant_id uuid, id uuid, payload text, primary key (tenant_id, id))";
