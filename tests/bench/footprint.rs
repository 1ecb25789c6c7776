//! What a replica needs: memory in a run of any length, next to nothing while it waits, and no time to start.

use std::time::Duration;

use sqlx::{Connection, PgConnection, Row};

use super::raw::Lists;
use super::report::{Line, Round, Target, median};
use super::rig::{Outcome, Rig};
use super::world::World;

/// Lists of the runs whose memory is compared. Each has a thousand objects at least, so that the longest pages, of 999, are
/// in both: what is compared is how long the lists are, not how long their pages are.
const LISTS: usize = 20;

/// The most memory that a run takes, ten times longer than another.
pub async fn memory(rig: &Rig) -> Outcome<Vec<Line>> {
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
    let rounds = many.iter().zip(&few).map(|(many, few)| Round::beside(*many, *few)).collect();
    let peaks = many.iter().copied().map(Round::alone).collect();
    let note = format!("{large} objects in a run of {LISTS} lists, beside {small}");
    Ok(vec![
        Line::new("memory", "MiB", Target::RatioAtMost(1.15), rounds).note(note),
        Line::new("memory_peak", "MiB", Target::AtMost(64.0), peaks),
    ])
}

/// What a replica costs that has nothing to do.
pub async fn idle(rig: &Rig) -> Outcome<Vec<Line>> {
    const STATEMENTS: &str =
        "select sum(xact_commit + xact_rollback)::float8 from pg_stat_database where datname = 'idle'";
    let world = World::new(rig, "idle", 1, &[]).await?;
    let mut apart = PgConnection::connect(&rig.postgres).await?;
    world.db.close().await;
    let daemon = world.daemon(&[], 1).await?;
    // What starting has cost is counted by then.
    tokio::time::sleep(Duration::from_secs(11)).await;
    let window = Duration::from_secs(rig.scale.pick(6, 20, 20));
    let (mut cpu, mut queries) = (Vec::new(), Vec::new());
    for _ in 0..rig.rounds {
        let cpu_before = daemon.cpu_s();
        let before: f64 = sqlx::query(STATEMENTS).fetch_one(&mut apart).await?.get(0);
        tokio::time::sleep(window).await;
        cpu.push(Round::alone((daemon.cpu_s() - cpu_before) / window.as_secs_f64() * 100.0));
        let after: f64 = sqlx::query(STATEMENTS).fetch_one(&mut apart).await?.get(0);
        queries.push(Round::alone((after - before) / window.as_secs_f64()));
    }
    let note = format!("windows of {} s; transactions, as the server counts them", window.as_secs());
    Ok(vec![
        Line::new("idle_cpu", "% of a core", Target::AtMost(0.3), cpu),
        Line::new("idle_queries", "a second", Target::AtMost(2.0), queries).note(note),
    ])
}

/// From the start of the process to its first admitted request, which waits in the queue already.
pub async fn start(rig: &Rig) -> Outcome<Vec<Line>> {
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
    // The first one warms the database and the file cache.
    rounds.remove(0);
    let spread = median(rounds.iter().copied()).unwrap_or_default();
    let rounds = rounds.into_iter().map(Round::alone).collect();
    let line = Line::new("start", "ms", Target::AtMost(300.0), rounds);
    Ok(vec![line.note(format!("exec to admitted: {spread:.0} ms"))])
}
