//! Many small runs, beside what is left of one without everything that makes it safe: consume, one GET, two commits, ack.

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

use super::raw::{Graph, Lists};
use super::report::{Line, Round, Target, median};
use super::rig::{Outcome, Rig};
use super::world::World;

const TENANTS: usize = 200;
const PREFETCH: u16 = 32;

/// Measures the line.
pub async fn measure(rig: &Rig) -> Outcome<Vec<Line>> {
    let count = rig.scale.pick(1_000, 5_000, 5_000);
    let simulator = ["--objects".to_owned(), "10".to_owned()];
    let world = World::new(rig, "small_runs", TENANTS, &simulator).await?;
    let lists = Lists::first(1);
    let bare = Arc::new(Bare::new(&world, &lists).await?);
    let daemon = world.daemon(&[("CONSUMER__PREFETCH", "32"), ("DATABASE__MAX_CONNECTIONS", "16")], 1).await?;
    // Tokens and pages are there before anything counts.
    ours(&world, &lists, "warm", TENANTS).await?;
    bare.round(&world, TENANTS).await?;
    world.analyze().await?;
    let (mut rounds, mut cpu) = (Vec::new(), Vec::new());
    for round in 0..rig.rounds {
        let raw = bare.round(&world, count).await?;
        let before = daemon.cpu_s();
        let seconds = ours(&world, &lists, &format!("r{round}"), count).await?;
        cpu.push((daemon.cpu_s() - before) / count as f64 * 1e6);
        rounds.push(Round::beside(count as f64 / seconds, count as f64 / raw));
    }
    let cpu = median(cpu.into_iter()).unwrap_or_default();
    let note = format!("{count} requests of {TENANTS} tenants, prefetch {PREFETCH}; {cpu:.0} us of CPU a run");
    Ok(vec![Line::new("small_runs", "runs/s", Target::RatioAtLeast(0.75), rounds).note(note)])
}

async fn ours(world: &World, lists: &Lists, name: &str, count: usize) -> Outcome<f64> {
    let since = world.now().await?;
    for number in 0..count {
        world.publish(world.tenants[number % TENANTS], &format!("{name}.{number}"), &lists.types()).await?;
    }
    world.seconds_to_end(&format!("{name}."), count, since).await
}

/// The bare life of a run.
struct Bare {
    graph: Graph,
    link: String,
    tokens: Vec<String>,
    tenants: Vec<Uuid>,
    db: PgPool,
    channel: Channel,
    queue: String,
}

impl Bare {
    async fn new(world: &World, lists: &Lists) -> Outcome<Self> {
        world.execute(TABLES).await?;
        let graph = Graph::new(world)?;
        let mut tokens = Vec::new();
        for tenant in &world.tenants {
            tokens.push(graph.token(*tenant).await?);
        }
        let channel = world.connection.create_channel().await?;
        let queue = format!("{}bare", world.prefix);
        let mut arguments = FieldTable::default();
        arguments.insert("x-queue-type".into(), AMQPValue::LongString("quorum".into()));
        let options = QueueDeclareOptions { durable: true, ..Default::default() };
        channel.queue_declare(queue.clone().into(), options, arguments).await?;
        channel.basic_qos(PREFETCH, BasicQosOptions { global: false }).await?;
        let link = graph.link(&lists.links[0]);
        Ok(Self { graph, link, tokens, tenants: world.tenants.clone(), db: world.db.clone(), channel, queue })
    }

    async fn round(self: &Arc<Self>, world: &World, count: usize) -> Outcome<f64> {
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

    async fn take(self: &Arc<Self>, mut consumer: Consumer, count: usize) -> Outcome<()> {
        let mut tasks = JoinSet::new();
        for _ in 0..count {
            let delivery = consumer.next().await.ok_or("the queue is gone")??;
            let bare = Arc::clone(self);
            tasks.spawn(async move { bare.handle(delivery).await });
        }
        while let Some(done) = tasks.join_next().await {
            done??;
        }
        Ok(())
    }

    async fn handle(&self, delivery: Delivery) -> Outcome<()> {
        let number: usize = std::str::from_utf8(&delivery.data)?.parse()?;
        let (tenant, run) = (self.tenants[number % TENANTS], Uuid::now_v7());
        let begin = sqlx::query("insert into bare_runs (tenant_id, id, key, status) values ($1, $2, $3, 'running')");
        begin.bind(tenant).bind(run).bind(run.to_string()).execute(&self.db).await?;
        let body = self.graph.get(&self.link, &self.tokens[number % TENANTS]).await?;
        let end = sqlx::query(
            "with ended as (update bare_runs set status = 'success', items = $3, finished_at = now()
                             where tenant_id = $1 and id = $2 returning tenant_id, id)
             insert into bare_outbox select tenant_id, id, $4 from ended",
        );
        let event = "x".repeat(1_500);
        end.bind(tenant).bind(run).bind(i64::try_from(body.len())?).bind(event).execute(&self.db).await?;
        delivery.ack(BasicAckOptions::default()).await?;
        Ok(())
    }
}

const TABLES: &str = "
create table bare_runs (tenant_id uuid, id uuid, key text, status text, items bigint, finished_at timestamptz,
                        primary key (tenant_id, id), unique (tenant_id, key)) with (fillfactor = 50);
create table bare_outbox (tenant_id uuid, id uuid, payload text, primary key (tenant_id, id))";
