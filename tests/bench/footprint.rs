//! Footprint of a replica: memory during a run, cost while idle, and time to start.

use std::time::Duration;

use sqlx::{Connection, PgConnection, Row};

use super::baseline::Lists;
use super::report::{Line, Round, Target, median};
use super::rig::{Result, Rig};
use super::world::World;

/// Lists of the compared runs. Each list has at least a thousand objects, so that pages of the maximum length, 999, occur in
/// both: the comparison varies the length of lists, not of pages.
const LISTS: usize = 20;

/// Measures the peak memory of a run, against a run a tenth as long.
pub async fn memory(rig: &Rig) -> Result<Vec<Line>> {
    let (small, large) = (20_000, 200_000);
    let (mut few, mut many) = (Vec::new(), Vec::new());
    for (name, objects, peaks) in [("memory_few", small, &mut few), ("memory_many", large, &mut many)] {
        let per_list = objects / LISTS;
        let simulator = ["--objects".to_owned(), per_list.to_string(), "--page-size".to_owned(), "100".to_owned()];
        let world = World::new(rig, name, 1, &simulator).await?;
        let lists = Lists::first(LISTS);
        for round in 0..rig.rounds {
            let daemon = world.daemon(&[], 1).await?;
            let (key, since) = (format!("r{round}."), world.now().await?);
            world.publish(world.tenants[0], &key, &lists.types()).await?;
            world.seconds_to_end(&key, 1, since).await?;
            peaks.push(daemon.peak_mib()?);
            daemon.stop().await?;
        }
    }
    let rounds = many.iter().zip(&few).map(|(many, few)| Round::against(*many, *few)).collect();
    let peaks = many.iter().copied().map(Round::absolute).collect();
    let note = format!("peak of a run over {large} objects in {LISTS} lists, against {small}");
    Ok(vec![
        Line::new("memory", "MiB", Target::RatioAtMost(1.15), rounds).note(note),
        Line::new("memory_peak", "MiB", Target::AtMost(64.0), peaks).note("that peak alone"),
    ])
}

/// Measures the cost of a replica without work.
pub async fn idle(rig: &Rig) -> Result<Vec<Line>> {
    const STATEMENTS: &str =
        "select sum(xact_commit + xact_rollback)::float8 from pg_stat_database where datname = 'idle'";
    let world = World::new(rig, "idle", 1, &[]).await?;
    let mut apart = PgConnection::connect(&rig.postgres).await?;
    world.db.close().await;
    let daemon = world.daemon(&[], 1).await?;
    // The server's statistics lag by up to ten seconds; afterwards the start is counted.
    tokio::time::sleep(Duration::from_secs(11)).await;
    let window = Duration::from_secs(rig.scale.pick(6, 20, 20));
    let (mut cpu, mut queries) = (Vec::new(), Vec::new());
    for _ in 0..rig.rounds {
        let cpu_before = daemon.cpu_s();
        let before: f64 = sqlx::query(STATEMENTS).fetch_one(&mut apart).await?.get(0);
        tokio::time::sleep(window).await;
        cpu.push(Round::absolute((daemon.cpu_s() - cpu_before) / window.as_secs_f64() * 100.0));
        let after: f64 = sqlx::query(STATEMENTS).fetch_one(&mut apart).await?.get(0);
        queries.push(Round::absolute((after - before) / window.as_secs_f64()));
    }
    let note = format!(
        "transactions of a replica without work, as the server counts them, in windows of {} s",
        window.as_secs()
    );
    Ok(vec![
        Line::new("idle_cpu", "% of a core", Target::AtMost(0.3), cpu).note("processor time of a replica without work"),
        Line::new("idle_queries", "a second", Target::AtMost(2.0), queries).note(note),
    ])
}

/// Measures the time from the start of the process to its first admitted request, which is already in the queue.
pub async fn start(rig: &Rig) -> Result<Vec<Line>> {
    let world = World::new(rig, "start", 1, &[]).await?;
    let lists = Lists::first(1);
    let mut rounds = Vec::new();
    for round in 0..=rig.rounds {
        let key = format!("r{round}.");
        world.publish(world.tenants[0], &key, &lists.types()).await?;
        let since = world.now().await?;
        let daemon = world.launch(&[])?;
        world.seconds_to_end(&key, 1, since).await?;
        let started = format!(
            "select extract(epoch from started_at)::float8 from inventory_sync_runs where idempotency_key = '{key}'"
        );
        rounds.push((world.float(&started).await? - since) * 1_000.0);
        daemon.stop().await?;
    }
    // The first round warms the database and the file cache.
    rounds.remove(0);
    let spread = median(rounds.iter().copied()).unwrap_or_default();
    let rounds = rounds.into_iter().map(Round::absolute).collect();
    let line = Line::new("start", "ms", Target::AtMost(300.0), rounds);
    Ok(vec![line.note(format!("start of the process to its first admitted request; median {spread:.0} ms"))])
}
