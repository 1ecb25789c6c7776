//! The benchmark: `deploy/dev bench [--quick|--full] [LINE...]`.
//!
//! Most lines are ratios against a baseline measured in the same run, alternating with the daemon round by round; the
//! median counts. The servers are private and durable; the daemon and the Graph simulator are release builds in processes
//! of their own. The table goes to the terminal and to `tests/bench/README.md`, the rounds to `target/bench/report.json`.

mod baseline;
mod events;
mod fleet;
mod footprint;
mod growth;
mod hand_written;
mod ingest;
mod instructions;
mod latency;
mod peer;
mod process;
mod reads;
mod replicas;
mod report;
mod rig;
mod runs;
mod tenant_time;
mod throttled;
mod world;

use std::process::ExitCode;

use clap::Parser;

use report::{Line, Report};
use rig::{Result, Rig, Scale};

/// Lines in the order of measurement.
const LINES: &[&str] = &[
    "ingest_fresh",
    "resync_unchanged",
    "resync_1pct_changed",
    "small_runs",
    "memory",
    "idle",
    "missing",
    "admission",
    "reads",
    "outbox",
    "latency",
    "start",
    "replicas",
    "fleet_idle",
    "backlog",
    "tenant_time",
    "throttled",
    "peer_celery",
    "instructions",
];

/// Measures the daemon against baselines of its parts.
#[derive(Debug, Parser)]
#[command(name = "bench")]
struct Args {
    /// Use small sizes, for a few minutes in all; lines that need longer run only if named.
    #[arg(long, conflicts_with = "full")]
    quick: bool,
    /// Use the big tables too: 5 million runs, 10 million items.
    #[arg(long)]
    full: bool,
    /// Rounds per line.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Lines to measure; all by default.
    #[arg(value_parser = clap::builder::PossibleValuesParser::new(LINES))]
    lines: Vec<String>,
}

#[tokio::main]
async fn main() -> ExitCode {
    inventoryd::tls::install_provider();
    match measure(Args::parse()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn measure(args: Args) -> Result<()> {
    let scale = match (args.quick, args.full) {
        (true, _) => Scale::Quick,
        (_, true) => Scale::Full,
        _ => Scale::Usual,
    };
    let rig = Rig::start(scale, args.rounds.max(1))?;
    let mut report = Report::new(&rig).await?;
    let wanted = |name: &str| match args.lines.as_slice() {
        [] => !(scale == Scale::Quick && name == "throttled"),
        named => named.iter().any(|line| line == name),
    };
    let resyncs: Vec<&str> = LINES[..3].iter().copied().filter(|name| wanted(name)).collect();
    if !resyncs.is_empty() {
        report.add("ingest", ingest::measure(&rig, &resyncs).await);
    }
    for name in LINES[3..].iter().copied().filter(|name| wanted(name)) {
        let begun = std::time::Instant::now();
        report.add(name, line(&rig, name).await);
        eprintln!("  {name}: {} s", begun.elapsed().as_secs());
    }
    report.finish(&rig, args.lines.is_empty() && scale != Scale::Quick)
}

async fn line(rig: &Rig, name: &str) -> Result<Vec<Line>> {
    match name {
        "small_runs" => runs::measure(rig).await,
        "memory" => footprint::memory(rig).await,
        "idle" => footprint::idle(rig).await,
        "start" => footprint::start(rig).await,
        "missing" => growth::missing(rig).await,
        "admission" => growth::admission(rig).await,
        "reads" => reads::measure(rig).await,
        "outbox" => events::measure(rig).await,
        "latency" => latency::measure(rig).await,
        "replicas" => replicas::measure(rig).await,
        "fleet_idle" => fleet::idle(rig).await,
        "backlog" => fleet::backlog(rig).await,
        "tenant_time" => tenant_time::measure(rig).await,
        "throttled" => throttled::measure(rig).await,
        "instructions" => instructions::measure(rig).await,
        _ => peer::measure(rig).await,
    }
}
