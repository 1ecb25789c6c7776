//! Instructions that the daemon executes for one item and for one small run, by where they are spent. Valgrind counts
//! them: unlike times, counts hardly depend on the machine and on what else it does.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use super::baseline::Lists;
use super::process::Process;
use super::report::{Line, Round, Target};
use super::rig::{Result, Rig, text};
use super::world::World;

const TYPES: usize = 30;
const OBJECTS: usize = 20_000;
const TENANTS: usize = 50;
const RUNS: usize = 500;
/// Name of what no entry of [`PARTS`] describes.
const REST: &str = "rest";

/// Parts of the daemon and the crates (or, without a crate, the functions) that they consist of.
const PARTS: &[(&str, &[&str])] = &[
    ("tls", &["rustls", "ring", "tokio_rustls", "hyper_rustls"]),
    (
        "http",
        &[
            "h2",
            "hyper",
            "hyper_util",
            "http",
            "http_body",
            "http_body_util",
            "reqwest",
            "tower_http",
            "tower",
            "bytes",
        ],
    ),
    ("inflate", &["flate2", "miniz_oxide", "zlib_rs", "async_compression", "compression_codecs", "crc32fast"]),
    ("json", &["serde_json", "serde", "serde_core"]),
    ("daemon", &["inventoryd"]),
    ("sql", &["sqlx", "sqlx_core", "sqlx_postgres"]),
    ("amqp", &["lapin", "amq_protocol", "amq_protocol_types", "async_rs", "executor_trait", "nom", "cookie_factory"]),
    (
        "tasks",
        &[
            "tokio",
            "tokio_util",
            "tokio_stream",
            "mio",
            "parking_lot",
            "parking_lot_core",
            "futures_util",
            "futures_channel",
        ],
    ),
    (
        "logs",
        &[
            "tracing",
            "tracing_core",
            "tracing_subscriber",
            "tracing_opentelemetry",
            "metrics",
            "metrics_exporter_prometheus",
            "metrics_util",
            "opentelemetry",
        ],
    ),
    ("std", &["core", "alloc", "std", "hashbrown", "memchr"]),
    (
        "allocation",
        &[
            "malloc",
            "free",
            "realloc",
            "calloc",
            "_int_malloc",
            "_int_free",
            "_int_realloc",
            "malloc_consolidate",
            "unlink_chunk",
            "_int_free_merge_chunk",
            "_int_free_create_chunk",
        ],
    ),
    (
        "copies",
        &[
            "memcpy",
            "memmove",
            "__memcpy_avx_unaligned_erms",
            "__memmove_avx_unaligned_erms",
            "memset",
            "__memset_avx2_unaligned_erms",
            "memcmp",
            "bcmp",
            "__memcmp_avx2_movbe",
        ],
    ),
];

/// Measures both.
pub async fn measure(rig: &Rig) -> Result<Vec<Line>> {
    if !Command::new("valgrind").arg("--version").output().is_ok_and(|output| output.status.success()) {
        return Ok(vec![Line::skipped("instructions", "skipped: valgrind is not installed".to_owned())]);
    }
    let per_list = OBJECTS / TYPES;
    let simulator = ["--objects".to_owned(), per_list.to_string(), "--page-size".to_owned(), "100".to_owned()];
    let world = World::new(rig, "instructions_item", 1, &simulator).await?;
    let mut lines = profile(rig, &world, "instructions_item", (&Lists::first(TYPES), 1, per_list * TYPES)).await?;
    drop(world);
    let simulator = ["--objects".to_owned(), "10".to_owned()];
    let world = World::new(rig, "instructions_run", TENANTS, &simulator).await?;
    lines.extend(profile(rig, &world, "instructions_run", (&Lists::first(1), RUNS, RUNS)).await?);
    Ok(lines)
}

/// Counts the instructions of `runs` runs over unchanged objects, for each of `units`.
async fn profile(
    rig: &Rig,
    world: &World,
    name: &str,
    (lists, runs, units): (&Lists, usize, usize),
) -> Result<Vec<Line>> {
    let file = rig.folder.join(format!("{name}.callgrind"));
    let out = format!("--callgrind-out-file={}", text(&file)?);
    let valgrind = ["valgrind", "--tool=callgrind", "--instr-atstart=no", &out];
    let daemon =
        world.daemon_under(&valgrind, &[("CONSUMER__PREFETCH", "32"), ("DATABASE__MAX_CONNECTIONS", "16")]).await?;
    // Warm-up: the daemon fetches its tokens and prepares its statements, the simulator builds its pages.
    world.runs(lists, "warm", runs.max(world.tenants.len())).await?;
    control(&daemon, "--instr=on")?;
    world.runs(lists, "counted", runs).await?;
    control(&daemon, "--instr=off")?;
    daemon.stop().await?;
    let costs = self_costs(&fs::read_to_string(&file)?);
    let unit = |instructions: u64| vec![Round::absolute(instructions as f64 / units as f64)];
    let total = Line::new(name, "instructions", Target::Information, unit(costs.values().sum()));
    let mut lines = vec![total.note(format!("{runs} runs, {units} units, nothing changed; by part:"))];
    let mut by_part: BTreeMap<&str, u64> = BTreeMap::new();
    for (function, instructions) in &costs {
        *by_part.entry(part_of(function)).or_default() += instructions;
    }
    for part in PARTS.iter().map(|(part, _)| *part).chain([REST]) {
        let line = Line::new(
            &format!("{name}_{part}"),
            "instructions",
            Target::Information,
            unit(by_part.get(part).copied().unwrap_or(0)),
        );
        lines.push(line);
    }
    Ok(lines)
}

fn control(daemon: &Process, command: &str) -> Result<()> {
    let output = Command::new("callgrind_control").args([command, &daemon.id().to_string()]).output()?;
    if !output.status.success() {
        return Err(format!("callgrind_control {command}: {}", String::from_utf8_lossy(&output.stderr)).into());
    }
    Ok(())
}

/// Sums a profile's instructions by function, without those of called functions.
fn self_costs(profile: &str) -> BTreeMap<&str, u64> {
    let (mut names, mut costs) = (BTreeMap::new(), BTreeMap::new());
    let (mut function, mut is_call) = ("", false);
    for line in profile.lines() {
        if let Some(named) = line.strip_prefix("fn=").or_else(|| line.strip_prefix("cfn=")) {
            // A name is written once, after its number.
            let (number, name) = named.split_once(' ').unwrap_or((named, ""));
            if !name.is_empty() {
                names.insert(number, name);
            }
            if line.starts_with("fn=") {
                function = names.get(number).copied().unwrap_or_default();
            }
        } else if line.starts_with("calls=") {
            is_call = true;
        } else if line.starts_with(|first: char| first.is_ascii_digit() || "+-*".contains(first)) {
            // The line after a call has the cost of the called function.
            if !std::mem::take(&mut is_call) {
                let cost: u64 = line.split(' ').nth(1).and_then(|cost| cost.parse().ok()).unwrap_or(0);
                *costs.entry(function).or_insert(0) += cost;
            }
        }
    }
    costs
}

/// Part of the daemon that a function belongs to.
fn part_of(function: &str) -> &'static str {
    let path =
        function.trim_start_matches(['<', '&', '(', '[', ' ']).trim_start_matches("mut ").trim_start_matches("dyn ");
    let end = path.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(path.len());
    let name = &path[..end];
    let name = if name.starts_with("ring_core") { "ring" } else { name };
    PARTS.iter().find(|(_, crates)| crates.contains(&name)).map_or(REST, |(part, _)| part)
}
