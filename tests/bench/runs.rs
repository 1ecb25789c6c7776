//! Small runs, against two consumers written by hand.

use super::baseline::Lists;
use super::hand_written::{Effects, HandWritten, PREFETCH};
use super::process::{Process, cpu_s_of, cpu_s_of_server};
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
    let machine = Machine::new(rig, &world, &daemon)?;
    let (mut against_floor, mut against_bare, mut ours, mut theirs) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let rate = |seconds: f64| count as f64 / seconds;
    for round in 0..rig.rounds {
        let mut used = machine.used();
        let floor = floor.round(&world, count).await?;
        theirs.push(machine.since(&mut used));
        let bare = bare.round(&world, count).await?;
        machine.since(&mut used);
        let seconds = world.runs(&lists, &format!("r{round}"), count).await?;
        ours.push(machine.since(&mut used));
        against_floor.push(Round::against(rate(seconds), rate(floor)));
        against_bare.push(Round::against(rate(seconds), rate(bare)));
    }
    let note = format!(
        "{count} requests of {TENANTS} tenants, prefetch {PREFETCH}, against hand-written code with the same durable \
         effects: run in and out, ten items, one type, one event through an outbox; us of CPU a run: {}; of the \
         hand-written code: {}",
        each(&ours, count),
        each(&theirs, count)
    );
    let bare_note =
        "the same runs against consume, GET, two commits, ack: neither items nor types, and no event is published";
    Ok(vec![
        Line::new("small_runs", "runs/s", Target::RatioAtLeast(0.7), against_floor).note(note),
        Line::new("small_runs_bare", "runs/s", Target::Information, against_bare).note(bare_note),
    ])
}

/// Programs that take part in a run.
const PROGRAMS: [&str; 5] = ["daemon", "PostgreSQL", "RabbitMQ", "simulator", "benchmark"];

/// Seconds of processor time by program.
type Used = [f64; PROGRAMS.len()];

/// Processes that take part in a run.
struct Machine<'a> {
    daemon: &'a Process,
    postgres: u32,
    rabbitmq: u32,
    simulator: &'a Process,
}

impl<'a> Machine<'a> {
    fn new(rig: &Rig, world: &'a World, daemon: &'a Process) -> Result<Self> {
        let (postgres, rabbitmq) = (rig.server_process("postgres")?, rig.server_process("rabbitmq")?);
        Ok(Self { daemon, postgres, rabbitmq, simulator: &world.simulator })
    }

    fn used(&self) -> Used {
        let servers = [self.postgres, self.rabbitmq].map(cpu_s_of_server);
        let benchmark = cpu_s_of(std::process::id());
        [self.daemon.cpu_s(), servers[0], servers[1], self.simulator.cpu_s(), benchmark]
    }

    /// Time used since `used`, which becomes the time used until now.
    fn since(&self, used: &mut Used) -> Used {
        let before = std::mem::replace(used, self.used());
        std::array::from_fn(|program| used[program] - before[program])
    }
}

/// Medians for each of `count` runs, by program.
fn each(rounds: &[Used], count: usize) -> String {
    let each = PROGRAMS.iter().enumerate().map(|(program, name)| {
        let seconds = median(rounds.iter().map(|used| used[program])).unwrap_or_default();
        format!("{name} {:.0}", seconds / count as f64 * 1e6)
    });
    each.collect::<Vec<_>>().join(", ")
}
