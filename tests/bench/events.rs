//! Events out of the outbox, beside the same bytes published with confirms and nothing else.

use std::time::{Duration, Instant};

use lapin::BasicProperties;
use lapin::options::{BasicPublishOptions, QueueBindOptions, QueueDeclareOptions, QueuePurgeOptions};
use lapin::types::{AMQPValue, FieldTable};

use super::report::{Line, Round, Target};
use super::rig::{Outcome, Rig};
use super::world::World;

/// A common event has some 1,500 bytes.
const BYTES: usize = 1_500;

/// Measures the line.
pub async fn measure(rig: &Rig) -> Outcome<Vec<Line>> {
    let count = rig.scale.pick(5_000, 20_000, 20_000);
    let world = World::new(rig, "outbox", 1, &[]).await?;
    let queue = subscriber(&world).await?;
    // What a daemon ends itself it is woken for; these rows it has to find.
    let _daemon = world.daemon(&[("OUTBOX__POLL_MS", "10")], 1).await?;
    relayed(&world, count).await?;
    purge(&world, &queue).await?;
    world.analyze().await?;
    let mut rounds = Vec::new();
    for _ in 0..rig.rounds {
        let raw = bare(&world, count).await?;
        purge(&world, &queue).await?;
        let ours = relayed(&world, count).await?;
        purge(&world, &queue).await?;
        rounds.push(Round::beside(count as f64 / ours, count as f64 / raw));
    }
    let note = format!("{count} events of {BYTES} bytes into one quorum queue");
    Ok(vec![Line::new("outbox", "events/s", Target::RatioAtLeast(0.7), rounds).note(note)])
}

/// A durable queue for all events, as a subscriber would have it.
async fn subscriber(world: &World) -> Outcome<String> {
    let queue = format!("{}subscriber", world.prefix);
    let mut arguments = FieldTable::default();
    arguments.insert("x-queue-type".into(), AMQPValue::LongString("quorum".into()));
    let options = QueueDeclareOptions { durable: true, ..Default::default() };
    world.channel.queue_declare(queue.clone().into(), options, arguments).await?;
    let (exchange, all) = (format!("{}inventory.events", world.prefix), "run.completed.#");
    let options = QueueBindOptions::default();
    world.channel.queue_bind(queue.clone().into(), exchange.into(), all.into(), options, FieldTable::default()).await?;
    Ok(queue)
}

async fn purge(world: &World, queue: &str) -> Outcome<()> {
    world.channel.queue_purge(queue.into(), QueuePurgeOptions::default()).await?;
    Ok(())
}

async fn bare(world: &World, count: usize) -> Outcome<f64> {
    let (exchange, body) = (format!("{}inventory.events", world.prefix), "x".repeat(BYTES));
    let key = format!("run.completed.success.{}", world.tenants[0]);
    let begun = Instant::now();
    let mut confirms = Vec::new();
    for number in 0..count {
        let properties = BasicProperties::default().with_delivery_mode(2).with_message_id(number.to_string().into());
        let options = BasicPublishOptions { mandatory: true, ..Default::default() };
        let (exchange, key) = (exchange.clone().into(), key.clone().into());
        confirms.push(world.channel.basic_publish(exchange, key, options, body.as_bytes(), properties).await?);
    }
    for confirm in confirms {
        confirm.await?;
    }
    Ok(begun.elapsed().as_secs_f64())
}

async fn relayed(world: &World, count: usize) -> Outcome<f64> {
    world.execute("truncate outbox_events").await?;
    let since = world.now().await?;
    let tenant = world.tenants[0];
    world
        .execute(&format!(
            "insert into outbox_events (tenant_id, id, routing_key, payload)
             select '{tenant}', gen_random_uuid(), 'run.completed.success.{tenant}', repeat('x', {BYTES})
               from generate_series(1, {count})"
        ))
        .await?;
    let committed = world.now().await?;
    let unsent = "select exists (select from outbox_events where sent_at is null)::int::float8";
    while world.float(unsent).await? > 0.0 {
        if world.now().await? - since > 120.0 {
            return Err("the outbox does not get empty".into());
        }
        // The rows know when they were sent: this only asks whether all are.
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    Ok(world.float("select extract(epoch from max(sent_at))::float8 from outbox_events").await? - committed)
}
