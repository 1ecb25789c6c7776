//! `deploy/dev soak [minutes]`: injects random faults into four replicas under load, then checks the invariants and prints
//! them with their counts. Exit code 1 if one is broken.
#![expect(clippy::unwrap_used, reason = "a failed check of the harness ends the soak")]
#![expect(clippy::disallowed_methods, reason = "the faults are random")]
#![allow(dead_code, reason = "the harness is shared with the tests; the soak uses part of it")]

#[path = "../sim/mod.rs"]
mod sim;
#[path = "../support/mod.rs"]
mod support;

mod archive;
mod changes;
mod faults;
mod fleet;
mod load;
mod verdict;

use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio::time::sleep;

use archive::Archive;
use faults::Faults;
use fleet::Fleet;
use load::{Load, Published};
use sim::SimConfig;
use support::events::Subscriber;
use support::invariants;
use support::servers::Private;
use support::world::World;
use verdict::{Verdict, number};

/// Longest time from the last fault until every run has ended and every event is published.
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
    println!("starting a private PostgreSQL and RabbitMQ");
    let postgres = Private::start("postgres", "soak-postgres").await;
    let rabbitmq = Private::start("rabbitmq", "soak-rabbitmq").await;
    let world = Arc::new(World::on(SimConfig::default(), &postgres.url, &rabbitmq.url).await);
    let archive = Archive::create(&world).await;
    invariants::record_history(&world).await;
    let events = Subscriber::durable(&[&rabbitmq.url], &world.prefix).await;
    println!("{minutes} minutes of faults over {} replicas", fleet::REPLICAS);

    let begun = Instant::now();
    let (stop_all, stop) = watch::channel(false);
    let (published, progress) = watch::channel(0);
    let load = Load::prepare(&world, &rabbitmq.url).await;
    let changes = tokio::spawn(changes::make(Arc::clone(&world), load.changing_tenants().to_vec(), stop.clone()));
    let burst = load.burst();
    let load = tokio::spawn(load.publish(stop.clone(), published));
    let fleet = Fleet::start(&world).await;
    let faults =
        tokio::spawn(Faults::new(Arc::clone(&world), fleet, (postgres, rabbitmq), archive, burst).await.inject(stop));
    while begun.elapsed() < duration && !faults.is_finished() {
        sleep(PROGRESS_EVERY.min(duration)).await;
        report(&world, &events, begun, *progress.borrow()).await;
    }
    stop_all.send_replace(true);
    // `faults` owns the fleet and the servers, which must live until the verdict.
    let Ok(faults) = faults.await else {
        println!("a replica or a server failed: see the panic above");
        return ExitCode::FAILURE;
    };
    let published: Published = load.await.expect("the load task does not panic");
    let changes = changes.await.expect("the changes task does not panic");
    println!("fault injection ended: {} messages published; waiting until all work is done", published.messages);
    let settling = Instant::now();
    while settling.elapsed() < SETTLING
        && !(settled(&world, &published, &events).await && faults.archive().expired(&world).await == Some(0))
    {
        sleep(Duration::from_secs(1)).await;
    }
    println!("settled after {:.0} s", settling.elapsed().as_secs_f64());
    faults.print();
    let verdict = Verdict::of(&world, &published, &events, (&changes, faults.archive())).await;
    verdict.print();
    if !verdict.holds() {
        faults.dump_diagnostics().await;
    }
    faults.stop_fleet().await;
    if verdict.holds() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Tells whether no work is left.
async fn settled(world: &World, published: &Published, events: &Subscriber) -> bool {
    let open = "select count(*) from soak_runs where status = 'running'";
    let unsent = "select count(*) from outbox";
    let runs = number(world, "select count(*) from soak_runs").await;
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
    let ended = number(world, "select count(*) from soak_runs where finished_at is not null").await;
    let running = number(world, "select count(*) from soak_runs where status = 'running'").await;
    let unsent = number(world, "select count(*) from outbox").await;
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
