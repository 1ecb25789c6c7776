//! Scaling over replicas while Graph responds slowly.

use super::baseline::Lists;
use super::process::Process;
use super::report::{Line, Round, Target};
use super::rig::{Result, Rig};
use super::world::World;

const TENANTS: usize = 64;

/// Measures the runs a second of two and four replicas, against two and four times those of one.
pub async fn measure(rig: &Rig) -> Result<Vec<Line>> {
    let pages = rig.scale.pick(8, 20, 20);
    let simulator =
        ["--latency-ms", "50", "--page-size", "5", "--objects", &(pages * 5).to_string()].map(str::to_owned);
    let world = World::new(rig, "replicas", TENANTS, &simulator).await?;
    let lists = Lists::without_page_size(1);
    let (mut two, mut four) = (Vec::new(), Vec::new());
    for round in 0..rig.rounds {
        let mut rates = Vec::new();
        for replicas in [1, 2, 4] {
            rates.push(rate(&world, &lists, replicas, &format!("r{round}.{replicas}")).await?);
        }
        two.push(Round::against(rates[1], rates[0] * 2.0));
        four.push(Round::against(rates[2], rates[0] * 4.0));
    }
    let note = format!(
        "{TENANTS} tenants, lists of {pages} pages, responses after 50 ms, prefetch 8; against a multiple of one replica"
    );
    Ok(vec![
        Line::new("replicas_2", "runs/s", Target::RatioAtLeast(0.9), two).note(note.clone()),
        Line::new("replicas_4", "runs/s", Target::RatioAtLeast(0.9), four).note(note),
    ])
}

async fn rate(world: &World, lists: &Lists, replicas: u32, name: &str) -> Result<f64> {
    let mut daemons: Vec<Process> = Vec::new();
    for already in 0..replicas {
        daemons.push(world.daemon(&[], already + 1).await?);
    }
    // Warm-up: every replica opens its connections and prepares its statements.
    each_tenant(world, lists, &format!("warm.{name}.")).await?;
    let seconds = each_tenant(world, lists, &format!("{name}.")).await?;
    for daemon in daemons {
        daemon.stop().await?;
    }
    Ok(TENANTS as f64 / seconds)
}

/// Runs one request per tenant; returns the seconds until all have ended.
async fn each_tenant(world: &World, lists: &Lists, prefix: &str) -> Result<f64> {
    let since = world.now().await?;
    for (number, tenant) in world.tenants.iter().enumerate() {
        world.publish(*tenant, &format!("{prefix}{number}"), &lists.types()).await?;
    }
    world.seconds_to_end(prefix, TENANTS, since).await
}
