//! Small runs, against a consumer without any of the safety: consume, one GET, two commits, ack.

use std::sync::Arc;
use std::time::Instant;

use futures_util::StreamExt;
use lapin::Consumer;
use lapin::message::Delivery;
use lapin::options::{BasicAckOptions, BasicConsumeOptions, BasicPublishOptions, BasicQosOptions, QueueDeclareOptions};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel};
use sqlx::postgres::PgPool;
use tokio::task::JoinSet;
use uuid::Uuid;

use super::baseline::{Graph, Lists};
use super::report::{Line, Round, Target, median};
use super::rig::{Result, Rig};
use super::world::World;

const TENANTS: usize = 200;
const PREFETCH: u16 = 32;

/// Measures small runs a second.
pub async fn measure(rig: &Rig) -> Result<Vec<Line>> {
    let count = rig.scale.pick(1_000, 5_000, 5_000);
    let simulator = ["--objects".to_owned(), "10".to_owned()];
    let world = World::new(rig, "small_runs", TENANTS, &simulator).await?;
    let lists = Lists::first(1);
    let baseline = Arc::new(Baseline::new(&world, &lists).await?);
    let daemon = world.daemon(&[("CONSUMER__PREFETCH", "32"), ("DATABASE__MAX_CONNECTIONS", "16")], 1).await?;
    // Warm-up: both fetch tokens, the simulator builds its pages.
    ours(&world, &lists, "warm", TENANTS).await?;
    baseline.round(&world, TENANTS).await?;
    world.analyze().await?;
    let (mut rounds, mut cpu) = (Vec::new(), Vec::new());
    for round in 0..rig.rounds {
        let baseline = baseline.round(&world, count).await?;
        let before = daemon.cpu_s();
        let seconds = ours(&world, &lists, &format!("r{round}"), count).await?;
        cpu.push((daemon.cpu_s() - before) / count as f64 * 1e6);
        rounds.push(Round::against(count as f64 / seconds, count as f64 / baseline));
    }
    let cpu = median(cpu.into_iter()).unwrap_or_default();
    let note = format!(
        "{count} requests of {TENANTS} tenants, prefetch {PREFETCH}, against consume, GET, two commits, ack; {cpu:.0} us of CPU a run"
    );
    Ok(vec![Line::new("small_runs", "runs/s", Target::RatioAtLeast(0.75), rounds).note(note)])
}

async fn ours(world: &World, lists: &Lists, name: &str, count: usize) -> Result<f64> {
    let since = world.now().await?;
    for number in 0..count {
        world.publish(world.tenants[number % TENANTS], &format!("{name}.{number}"), &lists.types()).await?;
    }
    world.seconds_to_end(&format!("{name}."), count, since).await
}

/// Minimal consumer.
struct Baseline {
    graph: Graph,
    link: String,
    tokens: Vec<String>,
    tenants: Vec<Uuid>,
    db: PgPool,
    channel: Channel,
    queue: String,
}

impl Baseline {
    async fn new(world: &World, lists: &Lists) -> Result<Self> {
        world.execute(TABLES).await?;
        let graph = Graph::new(world)?;
        let mut tokens = Vec::new();
        for tenant in &world.tenants {
            tokens.push(graph.token(*tenant).await?);
        }
        let channel = world.connection.create_channel().await?;
        let queue = format!("{}baseline", world.prefix);
        let mut arguments = FieldTable::default();
        arguments.insert("x-queue-type".into(), AMQPValue::LongString("quorum".into()));
        let options = QueueDeclareOptions { durable: true, ..Default::default() };
        channel.queue_declare(queue.clone().into(), options, arguments).await?;
        channel.basic_qos(PREFETCH, BasicQosOptions { global: false }).await?;
        let link = graph.link(&lists.links[0]);
        Ok(Self { graph, link, tokens, tenants: world.tenants.clone(), db: world.db.clone(), channel, queue })
    }

    async fn round(self: &Arc<Self>, world: &World, count: usize) -> Result<f64> {
        let tag = Uuid::new_v4().to_string();
        let consumer = self
            .channel
            .basic_consume(
                self.queue.clone().into(),
                tag.clone().into(),
                BasicConsumeOptions::default(),
                FieldTable::default(),
            )
            .await?;
        let begun = Instant::now();
        for number in 0..count {
            let properties = BasicProperties::default().with_delivery_mode(2);
            let (key, body) = (self.queue.clone(), number.to_string());
            let options = BasicPublishOptions::default();
            world.channel.basic_publish("".into(), key.into(), options, body.as_bytes(), properties).await?;
        }
        self.take(consumer, count).await?;
        let seconds = begun.elapsed().as_secs_f64();
        self.channel.basic_cancel(tag.into(), Default::default()).await?;
        Ok(seconds)
    }

    async fn take(self: &Arc<Self>, mut consumer: Consumer, count: usize) -> Result<()> {
        let mut tasks = JoinSet::new();
        for _ in 0..count {
            let delivery = consumer.next().await.ok_or("the consumer was cancelled")??;
            let baseline = Arc::clone(self);
            tasks.spawn(async move { baseline.handle(delivery).await });
        }
        while let Some(done) = tasks.join_next().await {
            done??;
        }
        Ok(())
    }

    async fn handle(&self, delivery: Delivery) -> Result<()> {
        let number: usize = std::str::from_utf8(&delivery.data)?.parse()?;
        let (tenant, run) = (self.tenants[number % TENANTS], Uuid::now_v7());
        let begin =
            sqlx::query("insert into baseline_runs (tenant_id, id, key, status) values ($1, $2, $3, 'running')");
        begin.bind(tenant).bind(run).bind(run.to_string()).execute(&self.db).await?;
        let body = self.graph.get(&self.link, &self.tokens[number % TENANTS]).await?;
        let end = sqlx::query(
            "with ended as (update baseline_runs set status = 'success', items = $3, finished_at = now()
                             where tenant_id = $1 and id = $2 returning tenant_id, id)
             insert into baseline_outbox select tenant_id, id, $4 from ended",
        );
        let event = "x".repeat(1_500);
        end.bind(tenant).bind(run).bind(i64::try_from(body.len())?).bind(event).execute(&self.db).await?;
        delivery.ack(BasicAckOptions::default()).await?;
        Ok(())
    }
}

const TABLES: &str = "
create table baseline_runs (tenant_id uuid, id uuid, key text, status text, items bigint, finished_at timestamptz,
                        primary key (tenant_id, id), unique (tenant_id, key)) with (fillfactor = 50);
create table baseline_outbox (tenant_id uuid, id uuid, payload text, primary key (tenant_id, id))";
