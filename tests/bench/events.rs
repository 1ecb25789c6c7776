//! Throughput of the outbox relay, against publishing the same bytes with confirms.

use std::time::{Duration, Instant};

use lapin::BasicProperties;
use lapin::options::{BasicPublishOptions, QueuePurgeOptions};

use super::report::{Line, Round, Target};
use super::rig::{Result, Rig};
use super::world::World;

/// Size of a common event.
const BYTES: usize = 1_500;

/// Measures the line.
pub async fn measure(rig: &Rig) -> Result<Vec<Line>> {
    let count = rig.scale.pick(5_000, 20_000, 20_000);
    let world = World::new(rig, "outbox", 1, &[]).await?;
    let queue = subscriber(&world).await?;
    // The relay is woken for runs that its own process ends; these rows it must find by polling.
    let _daemon = world.daemon(&[("OUTBOX__POLL_MS", "10")], 1).await?;
    relayed(&world, count).await?;
    purge(&world, &queue).await?;
    world.analyze().await?;
    let mut rounds = Vec::new();
    for _ in 0..rig.rounds {
        let baseline = publish_directly(&world, count).await?;
        purge(&world, &queue).await?;
        let ours = relayed(&world, count).await?;
        purge(&world, &queue).await?;
        rounds.push(Round::against(count as f64 / ours, count as f64 / baseline));
    }
    let note = format!(
        "{count} events of {BYTES} bytes into one quorum queue, against publishing the same bytes with confirms"
    );
    Ok(vec![Line::new("outbox", "events/s", Target::RatioAtLeast(0.7), rounds).note(note)])
}

/// Declares a durable queue for all events, as a subscriber would.
async fn subscriber(world: &World) -> Result<String> {
    let queue = format!("{}subscriber", world.prefix);
    world.declare_queue(&queue).await?;
    world.bind_events(&queue).await?;
    Ok(queue)
}

async fn purge(world: &World, queue: &str) -> Result<()> {
    world.channel.queue_purge(queue.into(), QueuePurgeOptions::default()).await?;
    Ok(())
}

async fn publish_directly(world: &World, count: usize) -> Result<f64> {
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

async fn relayed(world: &World, count: usize) -> Result<f64> {
    world.execute("truncate outbox").await?;
    let since = world.now().await?;
    let tenant = world.tenants[0];
    world
        .execute(&format!(
            "with skipped as (
               insert into inventory_sync_runs (tenant_id, id, idempotency_key, selection_hash, selection_payload, status,
                      daemon_version, finished_at)
               select '{tenant}', id, id, repeat('0', 64), '{{}}', 'skipped', 'bench', clock_timestamp()
                 from (select gen_random_uuid() as id from generate_series(1, {count})) ids
               returning tenant_id, id)
             insert into outbox (tenant_id, run_id, due_at) select tenant_id, id, clock_timestamp() from skipped"
        ))
        .await?;
    let committed = world.now().await?;
    let unsent = "select exists (select from outbox)::int::float8";
    while world.float(unsent).await? > 0.0 {
        if world.now().await? - since > 120.0 {
            return Err("the outbox was not empty within 120 s".into());
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Ok(world.now().await? - committed)
}
