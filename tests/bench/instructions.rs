//! Instructions that the daemon executes for an item and for a small run, by where they are spent. Valgrind counts them:
//! unlike times, counts repeat, whatever else the machine does.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::fs;
use std::process::Command;

use super::baseline::Lists;
use super::process::Process;
use super::report::{Line, Round, Target};
use super::rig::{Result, Rig, text};
use super::world::World;

const TYPES: usize = 30;
const OBJECTS: usize = 20_000;
const TENANTS: usize = 200;
const RUNS: usize = 500;

/// Parts of the daemon, and the crates that they consist of.
const PARTS: &[(&str, &str)] = &[
    ("daemon", "inventoryd"),
    ("json", "serde_json serde serde_core"),
    ("inflate", "flate2 zlib_rs crc32fast"),
    ("http", "reqwest hyper hyper_util h2 http http_body http_body_util tower tower_http bytes"),
    ("tls", "rustls ring tokio_rustls hyper_rustls"),
    ("sql", "sqlx sqlx_core sqlx_postgres"),
    ("amqp", "lapin amq_protocol amq_protocol_types async_rs nom cookie_factory pinky_swear"),
    ("tasks", "tokio tokio_util mio parking_lot parking_lot_core futures_util futures_core futures_channel"),
    ("logs", "tracing tracing_core tracing_subscriber tracing_opentelemetry opentelemetry opentelemetry_sdk metrics"),
    ("std", "core alloc std hashbrown memchr"),
];

/// Counts the instructions of both.
pub async fn measure(rig: &Rig) -> Result<Vec<Line>> {
    if !Command::new("valgrind").arg("--version").output().is_ok_and(|output| output.status.success()) {
        return Ok(vec![Line::skipped("instructions", "skipped: valgrind is not installed".to_owned())]);
    }
    let per_list = OBJECTS / TYPES;
    let big = ["--objects".to_owned(), per_list.to_string(), "--page-size".to_owned(), "100".to_owned()];
    let world = World::new(rig, "instructions_item", 1, &big).await?;
    let (instructions, parts) = count(rig, &world, &Lists::first(TYPES), 1).await?;
    let items = per_list * TYPES;
    let line = |name: &str, instructions: u64, units: usize, target| {
        Line::new(name, "instructions", target, vec![Round::absolute(instructions as f64 / units as f64)])
    };
    let item = line("instructions_item", instructions, items, Target::Information)
        .note(format!("for each of {items} items of one run, nothing changed: {parts}"));
    drop(world);
    let small = ["--objects".to_owned(), "10".to_owned()];
    let world = World::new(rig, "instructions_run", TENANTS, &small).await?;
    let (instructions, parts) = count(rig, &world, &Lists::first(1), RUNS).await?;
    let run = line("instructions_run", instructions, RUNS, Target::Information)
        .note(format!("for each of {RUNS} runs of one page: {parts}"));
    Ok(vec![item, run])
}

/// Counts the instructions of `runs` runs, and lists the share of each part.
async fn count(rig: &Rig, world: &World, lists: &Lists, runs: usize) -> Result<(u64, String)> {
    let file = rig.folder.join(format!("{}callgrind", world.prefix));
    let out = format!("--callgrind-out-file={}", text(&file)?);
    // Valgrind counts an instruction that copies a whole block once for each byte: the C library copies without it.
    let copying =
        "GLIBC_TUNABLES=glibc.cpu.x86_rep_movsb_threshold=1000000000:glibc.cpu.x86_rep_stosb_threshold=1000000000";
    let valgrind = ["env", copying, "valgrind", "--tool=callgrind", "--instr-atstart=no", &out];
    let settings = [("CONSUMER__PREFETCH", "32"), ("DATABASE__MAX_CONNECTIONS", "16")];
    let daemon = world.daemon_under(&valgrind, &settings).await?;
    // Warm-up: the daemon fetches its tokens and prepares its statements, the simulator builds its pages.
    world.runs(lists, "warm", runs.max(world.tenants.len())).await?;
    control(&daemon, "--instr=on")?;
    world.runs(lists, "counted", runs).await?;
    control(&daemon, "--instr=off")?;
    daemon.stop().await?;
    let profile = fs::read_to_string(&file)?;
    let mut parts: BTreeMap<&str, u64> = BTreeMap::new();
    for (function, instructions) in by_function(&profile) {
        *parts.entry(part_of(function)).or_default() += instructions;
    }
    let total: u64 = parts.values().sum();
    let mut parts: Vec<(&str, u64)> = parts.into_iter().collect();
    parts.sort_by_key(|(_, instructions)| Reverse(*instructions));
    let share =
        |(part, instructions): &(&str, u64)| format!("{part} {:.1} %", 100.0 * *instructions as f64 / total as f64);
    let parts: Vec<String> = parts.iter().map(share).collect();
    Ok((total, parts.join(", ")))
}

fn control(daemon: &Process, command: &str) -> Result<()> {
    let output = Command::new("callgrind_control").args([command, &daemon.id().to_string()]).output()?;
    if !output.status.success() {
        return Err(format!("callgrind_control {command}: {}", String::from_utf8_lossy(&output.stderr)).into());
    }
    Ok(())
}

/// Sums a profile's instructions by function, without those of called functions.
fn by_function(profile: &str) -> BTreeMap<&str, u64> {
    let (mut names, mut sums) = (BTreeMap::new(), BTreeMap::new());
    let (mut function, mut after_call) = ("", false);
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
            after_call = true;
        } else if line.starts_with(|first: char| first.is_ascii_digit() || "+-*".contains(first)) {
            // The line after a call has the cost of the called function.
            if !std::mem::take(&mut after_call) {
                let cost = line.split(' ').nth(1).and_then(|cost| cost.parse().ok()).unwrap_or(0);
                *sums.entry(function).or_insert(0) += cost;
            }
        }
    }
    sums
}

/// Part of the daemon that a function belongs to, by the crate at the start of its path.
fn part_of(function: &str) -> &'static str {
    let path = function.trim_start_matches(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    let path = path.trim_start_matches("mut ").trim_start_matches("dyn ");
    let name = path.split(|c: char| !c.is_ascii_alphanumeric() && c != '_').next().unwrap_or_default();
    let of_crate = |(_, crates): &&(&str, &str)| crates.split(' ').any(|known| known == name);
    match PARTS.iter().find(of_crate) {
        Some((part, _)) => part,
        None if name.starts_with("ring_") => "tls",
        None if name.contains("alloc") || name.contains("free") => "allocation",
        None if name.contains("mem") => "copies",
        None => "rest",
    }
}
