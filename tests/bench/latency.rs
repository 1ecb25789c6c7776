//! How long an idle daemon takes to begin, and to say that it has ended; beside one bare message.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use futures_util::StreamExt;
use lapin::options::{BasicConsumeOptions, BasicPublishOptions, QueueBindOptions, QueueDeclareOptions};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Consumer};
use serde_json::Value;

use super::raw::{Graph, Lists};
use super::report::{Line, Round, Target, median};
use super::rig::{Outcome, Rig};
use super::world::World;

/// Measures both halves.
pub async fn measure(rig: &Rig) -> Outcome<Vec<Line>> {
    let messages = rig.scale.pick(10, 40, 40);
    let world = World::new(rig, "latency", 1, &["--objects".to_owned(), "10".to_owned()]).await?;
    let (graph, lists) = (Graph::new(&world)?, Lists::first(1));
    let mut events = consumer(&world, "events", true).await?;
    let mut bare = consumer(&world, "bare", false).await?;
    let _daemon = world.daemon(&[], 1).await?;
    one(&world, &graph, &lists, &mut events, "warm").await?;
    let (mut begins, mut ends) = (Vec::new(), Vec::new());
    for round in 0..rig.rounds {
        let (mut raw, mut begin, mut end) = (Vec::new(), Vec::new(), Vec::new());
        for number in 0..messages {
            tokio::time::sleep(Duration::from_millis(40)).await;
            raw.push(bare_one(&world, &mut bare).await?);
            tokio::time::sleep(Duration::from_millis(40)).await;
            let (begun, ended) = one(&world, &graph, &lists, &mut events, &format!("r{round}.{number}.")).await?;
            begin.push(begun);
            end.push(ended);
        }
        let middle = |values: Vec<f64>| median(values.into_iter()).unwrap_or(f64::NAN) * 1_000.0;
        let raw = middle(raw);
        begins.push(Round::beside(middle(begin), raw));
        ends.push(Round::beside(middle(end), raw));
    }
    let note = format!("p50 of {messages} a round");
    Ok(vec![
        Line::new("latency_begin", "ms", Target::RatioAtMost(3.0), begins)
            .note(format!("publish to first Graph request; {note}")),
        Line::new("latency_end", "ms", Target::RatioAtMost(3.0), ends).note(format!("end to event received; {note}")),
    ])
}

/// Seconds from the publish of a request to its first question to Graph, and from its end to its event.
async fn one(world: &World, graph: &Graph, lists: &Lists, events: &mut Consumer, key: &str) -> Outcome<(f64, f64)> {
    let published = unix_s();
    world.publish(world.tenants[0], key, &lists.types()).await?;
    let event = tokio::time::timeout(Duration::from_secs(20), events.next()).await?.ok_or("the queue is gone")??;
    let received = unix_s();
    let event: Value = serde_json::from_slice(&event.data)?;
    let run = event["id"].as_str().ok_or("an event has an id")?;
    let ended = format!("select extract(epoch from finished_at)::float8 from inventory_sync_runs where id = '{run}'");
    let ended = world.float(&ended).await?;
    let requests = graph.http.get(graph.link("admin/requests?last=1")).send().await?.bytes().await?;
    let requests: Value = serde_json::from_slice(&requests)?;
    let asked = requests[0]["unix_ms"].as_f64().ok_or("the simulator remembers a request")?;
    // The simulator counts whole milliseconds; half of one is what it loses.
    Ok(((asked + 0.5) / 1_000.0 - published, received - ended))
}

async fn bare_one(world: &World, consumer: &mut Consumer) -> Outcome<f64> {
    let properties = BasicProperties::default().with_delivery_mode(2);
    let (queue, body) = (format!("{}bare", world.prefix), "x".repeat(300));
    let published = unix_s();
    let options = BasicPublishOptions::default();
    world.channel.basic_publish("".into(), queue.into(), options, body.as_bytes(), properties).await?;
    consumer.next().await.ok_or("the queue is gone")??;
    Ok(unix_s() - published)
}

/// A consumer on a quorum queue, of all events or of its own.
async fn consumer(world: &World, name: &str, of_events: bool) -> Outcome<Consumer> {
    let channel = world.connection.create_channel().await?;
    let queue = format!("{}{name}", world.prefix);
    let mut arguments = FieldTable::default();
    arguments.insert("x-queue-type".into(), AMQPValue::LongString("quorum".into()));
    let options = QueueDeclareOptions { durable: true, ..Default::default() };
    channel.queue_declare(queue.clone().into(), options, arguments).await?;
    if of_events {
        let (exchange, options) = (format!("{}inventory.events", world.prefix), QueueBindOptions::default());
        let all = "run.completed.#".into();
        channel.queue_bind(queue.clone().into(), exchange.into(), all, options, FieldTable::default()).await?;
    }
    let options = BasicConsumeOptions { no_ack: true, ..Default::default() };
    Ok(channel.basic_consume(queue.into(), name.into(), options, FieldTable::default()).await?)
}

#[expect(clippy::disallowed_methods, reason = "it is compared with the clocks of the simulator and the database")]
fn unix_s() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}
