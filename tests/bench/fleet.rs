//! Many replicas without work, and a long queue whose replicas are restarted while they drain it.

use std::time::{Duration, Instant};

use sqlx::Row;

use super::baseline::Lists;
use super::process::cpu_s_of;
use super::report::{Line, Round, Target};
use super::rig::{Result, Rig};
use super::world::{DEADLINE, World};

const REPLICAS: u32 = 64;
const TENANTS: usize = 1_000;

/// Measures the load that many replicas without work put on the database, each against that of a single one.
pub async fn idle(rig: &Rig) -> Result<Vec<Line>> {
    let world = World::new(rig, "fleet_idle", 1, &[]).await?;
    let window = Duration::from_secs(rig.scale.pick(6, 20, 20));
    let mut daemons = vec![world.daemon(&[], 1).await?];
    let mut one = Vec::new();
    for _ in 0..rig.rounds {
        one.push(Load::over(&world, window).await?);
    }
    for already in 1..REPLICAS {
        daemons.push(world.daemon(&[], already + 1).await?);
    }
    let connections = world.float(CONNECTIONS).await? / f64::from(REPLICAS);
    let (mut queries, mut cpu) = (Vec::new(), Vec::new());
    for one in &one {
        let all = Load::over(&world, window).await?;
        queries.push(Round::against(all.queries_per_s / f64::from(REPLICAS), one.queries_per_s));
        cpu.push(Round::absolute(all.server_cpu * 100.0));
    }
    for daemon in daemons {
        daemon.stop().await?;
    }
    let note = format!(
        "transactions of each of {REPLICAS} replicas without work, against a single one; {connections:.1} connections each"
    );
    Ok(vec![
        Line::new("fleet_idle_queries", "a second", Target::RatioAtMost(1.1), queries).note(note),
        Line::new("fleet_idle_server_cpu", "% of a core", Target::AtMost(25.0), cpu)
            .note(format!("processor time of PostgreSQL for {REPLICAS} replicas without work")),
    ])
}

/// Connections of the daemons.
const CONNECTIONS: &str = "select count(*)::float8 from pg_stat_activity where datname = current_database() and application_name = 'inventoryd'";

/// Load on the database over some time.
struct Load {
    queries_per_s: f64,
    /// Cores.
    server_cpu: f64,
}

impl Load {
    async fn over(world: &World, window: Duration) -> Result<Self> {
        // The server's statistics lag by up to ten seconds; afterwards the starts are counted.
        tokio::time::sleep(Duration::from_secs(11)).await;
        let before = Self::total(world).await?;
        tokio::time::sleep(window).await;
        let after = Self::total(world).await?;
        let seconds = window.as_secs_f64();
        Ok(Self {
            queries_per_s: (after.queries_per_s - before.queries_per_s) / seconds,
            server_cpu: (after.server_cpu - before.server_cpu) / seconds,
        })
    }

    /// Transactions and seconds of processor time since the start of the server.
    async fn total(world: &World) -> Result<Self> {
        let queries =
            "select sum(xact_commit + xact_rollback)::float8 from pg_stat_database where datname = current_database()";
        let backends = sqlx::query("select pid from pg_stat_activity where datname = current_database()");
        let backends = backends.fetch_all(&world.db).await?;
        let cpu = backends.iter().map(|row| cpu_s_of(row.get::<i32, _>(0).unsigned_abs())).sum();
        Ok(Self { queries_per_s: world.float(queries).await?, server_cpu: cpu })
    }
}

/// Measures the runs a second while two replicas drain a long queue, against a short one. In the middle of the long one each
/// replica is restarted.
pub async fn backlog(rig: &Rig) -> Result<Vec<Line>> {
    let (short, long) = rig.scale.pick((1_000, 5_000), (5_000, 100_000), (5_000, 100_000));
    let simulator = ["--objects".to_owned(), "10".to_owned()];
    let world = World::new(rig, "backlog", TENANTS, &simulator).await?;
    let lists = Lists::first(1);
    drain(&world, &lists, "warm", TENANTS, false).await?;
    world.analyze().await?;
    let (mut rates, mut peaks) = (Vec::new(), Vec::new());
    for round in 0..rig.scale.pick(1, 1, 3) {
        let before = drain(&world, &lists, &format!("short{round}"), short, false).await?;
        let with_backlog = drain(&world, &lists, &format!("long{round}"), long, true).await?;
        rates.push(Round::against(with_backlog.runs_per_s, before.runs_per_s));
        peaks.push(Round::absolute(with_backlog.peak_mib));
    }
    let again = world.float("select count(*)::float8 from inventory_sync_runs where attempt > 1").await?;
    let note = format!(
        "{long} requests of {TENANTS} tenants in the queue, two replicas, each restarted once; against {short}; \
         {again} runs had a second attempt"
    );
    Ok(vec![
        Line::new("backlog", "runs/s", Target::RatioAtLeast(0.8), rates).note(note),
        Line::new("backlog_memory", "MiB", Target::AtMost(64.0), peaks).note("peak of a replica during that"),
    ])
}

/// Result of draining a queue.
struct Drained {
    runs_per_s: f64,
    peak_mib: f64,
}

/// Publishes `count` requests, then starts two replicas and waits for the end of every run.
async fn drain(world: &World, lists: &Lists, name: &str, count: usize, restart: bool) -> Result<Drained> {
    let prefix = format!("{name}.");
    for number in 0..count {
        world.publish(world.tenants[number % TENANTS], &format!("{prefix}{number}"), &lists.types()).await?;
    }
    world.channel.wait_for_confirms().await?;
    let since = world.now().await?;
    let mut replicas = [world.daemon(&[], 1).await?, world.daemon(&[], 2).await?];
    let mut peak_mib: f64 = 0.0;
    if restart {
        for (index, part) in [(0, 3), (1, 2)] {
            ended(world, since, count / part).await?;
            peak_mib = peak_mib.max(replicas[index].peak_mib()?);
            let successor = world.launch(&[])?;
            std::mem::replace(&mut replicas[index], successor).stop().await?;
        }
    }
    let seconds = world.seconds_to_end(&prefix, count, since).await?;
    for replica in replicas {
        peak_mib = peak_mib.max(replica.peak_mib()?);
        replica.stop().await?;
    }
    Ok(Drained { runs_per_s: count as f64 / seconds, peak_mib })
}

/// Waits until `count` runs that were admitted after `since` have ended.
async fn ended(world: &World, since: f64, count: usize) -> Result<()> {
    let query = format!(
        "select count(*)::float8 from inventory_sync_runs
          where id >= inventory_run_id_at(to_timestamp({since})) and status <> 'running'"
    );
    let begun = Instant::now();
    while world.float(&query).await? < count as f64 {
        if begun.elapsed() > DEADLINE {
            return Err(format!("fewer than {count} runs have ended").into());
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    Ok(())
}
