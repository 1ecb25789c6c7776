//! Small runs, against two consumers written by hand.

use super::baseline::Lists;
use super::hand_written::{Effects, HandWritten, PREFETCH};
use super::report::{Line, Round, Target, median};
use super::rig::{Result, Rig};
use super::world::World;

const TENANTS: usize = 200;

/// Measures small runs a second.
pub async fn measure(rig: &Rig) -> Result<Vec<Line>> {
    let count = rig.scale.pick(1_000, 5_000, 5_000);
    let simulator = ["--objects".to_owned(), "10".to_owned()];
    let world = World::new(rig, "small_runs", TENANTS, &simulator).await?;
    let lists = Lists::first(1);
    let floor = HandWritten::new(&world, &lists, Effects::Same).await?;
    let bare = HandWritten::new(&world, &lists, Effects::Bare).await?;
    let daemon = world.daemon(&[("CONSUMER__PREFETCH", "32"), ("DATABASE__MAX_CONNECTIONS", "16")], 1).await?;
    // Warm-up: the daemon fetches its tokens, the simulator builds its pages.
    world.runs(&lists, "warm", TENANTS).await?;
    floor.round(&world, TENANTS).await?;
    bare.round(&world, TENANTS).await?;
    world.analyze().await?;
    let (mut against_floor, mut against_bare, mut cpu) = (Vec::new(), Vec::new(), Vec::new());
    let rate = |seconds: f64| count as f64 / seconds;
    for round in 0..rig.rounds {
        let (floor, bare) = (floor.round(&world, count).await?, bare.round(&world, count).await?);
        let before = daemon.cpu_s();
        let seconds = world.runs(&lists, &format!("r{round}"), count).await?;
        cpu.push((daemon.cpu_s() - before) / count as f64 * 1e6);
        against_floor.push(Round::against(rate(seconds), rate(floor)));
        against_bare.push(Round::against(rate(seconds), rate(bare)));
    }
    let cpu = median(cpu.into_iter()).unwrap_or_default();
    let note = format!(
        "{count} requests of {TENANTS} tenants, prefetch {PREFETCH}, against hand-written code with the same durable \
         effects: run in and out, ten items, one type, one event through an outbox; {cpu:.0} us of CPU a run"
    );
    let bare_note =
        "the same runs against consume, GET, two commits, ack: neither items nor types, and no event is published";
    Ok(vec![
        Line::new("small_runs", "runs/s", Target::RatioAtLeast(0.7), against_floor).note(note),
        Line::new("small_runs_bare", "runs/s", Target::Information, against_bare).note(bare_note),
    ])
}
