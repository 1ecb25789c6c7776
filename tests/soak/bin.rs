//! `deploy/dev soak [minutes]`: random faults over four replicas for as long as you like, then the invariants with their
//! counts. Exit code 1 if one of them is broken.
#![allow(dead_code, reason = "the harness is shared with the tests; this uses a part of it")]

#[path = "../sim/mod.rs"]
mod sim;
#[path = "../support/mod.rs"]
mod support;

mod faults;
mod fleet;
mod load;
mod verdict;

use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio::time::sleep;

use faults::Faults;
use fleet::Fleet;
use load::{Load, Published};
use sim::SimConfig;
use support::events::Subscriber;
use support::invariants;
use support::servers::Private;
use support::world::World;
use verdict::{Verdict, number};

/// How long everything may take to come to its end once the faults are over.
const SETTLING: Duration = Duration::from_secs(240);
const PROGRESS_EVERY: Duration = Duration::from_secs(10);

#[tokio::main]
async fn main() -> ExitCode {
    let minutes = match std::env::args().nth(1).as_deref().unwrap_or("10").parse::<f64>() {
        Ok(minutes) if minutes > 0.0 => minutes,
        _ => {
            eprintln!("usage: soak [MINUTES]");
            return ExitCode::from(2);
        }
    };
    let duration = Duration::from_secs_f64(minutes * 60.0);
    println!("starting a PostgreSQL and a RabbitMQ of our own");
    let postgres = Private::start("postgres", "soak-postgres").await;
    let rabbitmq = Private::start("rabbitmq", "soak-rabbitmq").await;
    let world = Arc::new(World::on(SimConfig::default(), &postgres.url, &rabbitmq.url).await);
    invariants::record_history(&world).await;
    let events = Subscriber::durable(&[&rabbitmq.url], &world.prefix).await;
    println!("{minutes} minutes of faults over {} replicas", fleet::REPLICAS);

    let begun = Instant::now();
    let (over, stop) = watch::channel(false);
    let (published, progress) = watch::channel(0);
    let load = Load::prepare(&world, &rabbitmq.url).await;
    let load = tokio::spawn(load.publish(stop.clone(), published));
    let fleet = Fleet::start(&world).await;
    let faults = tokio::spawn(Faults::new(Arc::clone(&world), fleet, postgres, rabbitmq).strike(stop));
    while begun.elapsed() < duration && !faults.is_finished() {
        sleep(PROGRESS_EVERY.min(duration)).await;
        report(&world, &events, begun, *progress.borrow()).await;
    }
    over.send_replace(true);
    // The fleet and the servers live until the verdict.
    let Ok(faults) = faults.await else {
        println!("the fleet or a server did not behave as it must: see above");
        return ExitCode::FAILURE;
    };
    let published: Published = load.await.expect("the load does not fail");
    println!("faults are over: {} messages published; waiting for the end of it all", published.messages);
    let settling = Instant::now();
    while settling.elapsed() < SETTLING && !settled(&world, &published, &events).await {
        sleep(Duration::from_secs(1)).await;
    }
    println!("settled after {:.0} s", settling.elapsed().as_secs_f64());
    faults.print();
    let verdict = Verdict::of(&world, &published, &events).await;
    verdict.print();
    if !verdict.holds() {
        faults.explain().await;
    }
    faults.end().await;
    if verdict.holds() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Whether nothing is left to be done.
async fn settled(world: &World, published: &Published, events: &Subscriber) -> bool {
    let open = "select count(*) from inventory_sync_runs where status = 'running'";
    let unsent = "select count(*) from outbox_events where sent_at is null";
    let runs = number(world, "select count(*) from inventory_sync_runs").await;
    let waiting = async {
        let mut sum = 0;
        for queue in ["sync.requests", "retry.5s", "retry.30s", "retry.2m", "retry.10m"] {
            sum += load::depth(world, queue).await;
        }
        sum
    };
    number(world, open).await == Some(0)
        && number(world, unsent).await == Some(0)
        && runs.is_some_and(|runs| usize::try_from(runs).is_ok_and(|runs| runs >= published.accepted.len()))
        && runs.is_some_and(|runs| events.distinct().len() as i64 == runs)
        && waiting.await == 0
}

async fn report(world: &World, events: &Subscriber, begun: Instant, published: usize) {
    let ended = number(world, "select count(*) from inventory_sync_runs where finished_at is not null").await;
    let running = number(world, "select count(*) from inventory_sync_runs where status = 'running'").await;
    let unsent = number(world, "select count(*) from outbox_events where sent_at is null").await;
    let show = |value: Option<i64>| value.map_or_else(|| "-".to_owned(), |value| value.to_string());
    println!(
        "{:>5} s  published {published:>6}  ended {:>6}  running {:>3}  events {:>6}  unsent {:>4}",
        begun.elapsed().as_secs(),
        show(ended),
        show(running),
        events.received().len(),
        show(unsent)
    );
}
