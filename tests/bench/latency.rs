//! Latency of an idle daemon from request to start and from end to event, against one plain message.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use futures_util::StreamExt;
use lapin::options::{BasicConsumeOptions, BasicPublishOptions};
use lapin::types::FieldTable;
use lapin::{BasicProperties, Consumer};
use serde_json::Value;

use super::baseline::{Graph, Lists};
use super::report::{Line, Round, Target, median};
use super::rig::{Result, Rig};
use super::world::World;

/// Measures both latencies.
pub async fn measure(rig: &Rig) -> Result<Vec<Line>> {
    let messages = rig.scale.pick(10, 40, 40);
    let world = World::new(rig, "latency", 1, &["--objects".to_owned(), "10".to_owned()]).await?;
    let (graph, lists) = (Graph::new(&world)?, Lists::first(1));
    let mut events = consumer(&world, "events", true).await?;
    let mut plain = consumer(&world, "baseline", false).await?;
    let _daemon = world.daemon(&[], 1).await?;
    request_latency(&world, &graph, &lists, &mut events, "warm").await?;
    let (mut begins, mut ends) = (Vec::new(), Vec::new());
    for round in 0..rig.rounds {
        let (mut baseline, mut begin, mut end) = (Vec::new(), Vec::new(), Vec::new());
        for number in 0..messages {
            tokio::time::sleep(Duration::from_millis(40)).await;
            baseline.push(baseline_message(&world, &mut plain).await?);
            tokio::time::sleep(Duration::from_millis(40)).await;
            let (begun, ended) =
                request_latency(&world, &graph, &lists, &mut events, &format!("r{round}.{number}.")).await?;
            begin.push(begun);
            end.push(ended);
        }
        let middle = |values: Vec<f64>| median(values.into_iter()).unwrap_or(f64::NAN) * 1_000.0;
        let baseline = middle(baseline);
        begins.push(Round::against(middle(begin), baseline));
        ends.push(Round::against(middle(end), baseline));
    }
    let note = format!("p50 of {messages} a round");
    Ok(vec![
        Line::new("latency_begin", "ms", Target::RatioAtMost(3.0), begins)
            .note(format!("publish to first Graph request, against one plain message; {note}")),
        Line::new("latency_end", "ms", Target::RatioAtMost(3.0), ends)
            .note(format!("end of a run to its event received, against one plain message; {note}")),
    ])
}

/// Measures the seconds from publishing a request to its first Graph request, and from the run's end to its event.
async fn request_latency(
    world: &World,
    graph: &Graph,
    lists: &Lists,
    events: &mut Consumer,
    key: &str,
) -> Result<(f64, f64)> {
    let published = unix_s();
    world.publish(world.tenants[0], key, &lists.types()).await?;
    let event =
        tokio::time::timeout(Duration::from_secs(20), events.next()).await?.ok_or("the consumer was cancelled")??;
    let received = unix_s();
    let event: Value = serde_json::from_slice(&event.data)?;
    let run = event["id"].as_str().ok_or("the event has no id")?;
    let ended = format!("select extract(epoch from finished_at)::float8 from inventory_sync_runs where id = '{run}'");
    let ended = world.float(&ended).await?;
    let requests = graph.http.get(graph.link("admin/requests?last=1")).send().await?.bytes().await?;
    let requests: Value = serde_json::from_slice(&requests)?;
    let asked = requests[0]["unix_ms"].as_f64().ok_or("the simulator recorded no request")?;
    // The simulator truncates to milliseconds; half a millisecond is the mean loss.
    Ok(((asked + 0.5) / 1_000.0 - published, received - ended))
}

async fn baseline_message(world: &World, consumer: &mut Consumer) -> Result<f64> {
    let properties = BasicProperties::default().with_delivery_mode(2);
    let (queue, body) = (format!("{}baseline", world.prefix), "x".repeat(300));
    let published = unix_s();
    let options = BasicPublishOptions::default();
    world.channel.basic_publish("".into(), queue.into(), options, body.as_bytes(), properties).await?;
    consumer.next().await.ok_or("the consumer was cancelled")??;
    Ok(unix_s() - published)
}

/// Consumes a quorum queue, bound to all events if `of_events`.
async fn consumer(world: &World, name: &str, of_events: bool) -> Result<Consumer> {
    let channel = world.connection.create_channel().await?;
    let queue = format!("{}{name}", world.prefix);
    world.declare_queue(&queue).await?;
    if of_events {
        world.bind_events(&queue).await?;
    }
    let options = BasicConsumeOptions { no_ack: true, ..Default::default() };
    Ok(channel.basic_consume(queue.into(), name.into(), options, FieldTable::default()).await?)
}

#[expect(clippy::disallowed_methods, reason = "compared with the clocks of the simulator and the database")]
fn unix_s() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}
