//! The house: which room may know which, where vendor names may stand, and how large a file may grow.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

const MAX_LINES: usize = 400;

/// Rooms from the top of the house down; a room may know those of later lines. Rooms of one line don't know each other,
/// but for `relay` and the like, which are listed on lines of their own.
const FLOORS: &[&[&str]] = &[
    &["main"],
    &["cli"],
    &["daemon"],
    &["consumer", "relay", "janitor", "fleet", "http"],
    &["run"],
    &["graph", "store", "broker"],
    &["backoff"],
    &["telemetry"],
    &["config", "tls"],
    &["domain"],
];

/// Vendor crates and the only rooms that may name them.
const VENDORS: &[(&str, &[&str])] = &[
    ("lapin", &["broker"]),
    ("async_rs", &["broker"]),
    ("sqlx", &["store"]),
    ("reqwest", &["graph"]),
    ("azure_identity", &["graph"]),
    ("azure_core", &["graph"]),
    ("axum", &["http"]),
    ("backoff", &["backoff"]),
    ("clap", &["main", "cli"]),
    ("comfy_table", &["cli"]),
    ("indicatif", &["cli"]),
    ("metrics", &["telemetry"]),
    ("opentelemetry", &["telemetry"]),
    ("opentelemetry_otlp", &["telemetry"]),
    ("opentelemetry_sdk", &["telemetry"]),
    ("sd_notify", &["daemon"]),
    ("tracing_opentelemetry", &["telemetry"]),
    ("tracing_subscriber", &["telemetry"]),
];

/// Every production file with its room and its code, without the tests at its end and without comments.
fn files() -> Vec<(PathBuf, String, String)> {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut found = Vec::new();
    let mut folders = vec![src.clone()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let relative = path.strip_prefix(&src).unwrap();
            let room = relative.iter().next().unwrap().to_str().unwrap().trim_end_matches(".rs").to_owned();
            let text = fs::read_to_string(&path).unwrap();
            let code = text.split("#[cfg(test)]\nmod tests").next().unwrap();
            let code: Vec<&str> = code.lines().filter(|line| !line.trim_start().starts_with("//")).collect();
            found.push((path.clone(), room, code.join("\n")));
        }
    }
    found
}

fn floor(room: &str) -> usize {
    FLOORS.iter().position(|rooms| rooms.contains(&room)).unwrap_or_else(|| panic!("src/{room} stands on no floor"))
}

/// The rooms that a file's code names.
fn named_rooms(code: &str) -> BTreeSet<&'static str> {
    let named =
        |room: &&&str| code.contains(&format!("crate::{room}")) || code.contains(&format!("inventoryd::{room}"));
    FLOORS.iter().flat_map(|rooms| rooms.iter()).filter(named).copied().collect()
}

#[test]
fn imports_run_downward_only() {
    for (path, room, code) in files().iter().filter(|(_, room, _)| room != "lib") {
        for named in named_rooms(code).into_iter().filter(|named| named != room) {
            assert!(floor(named) > floor(room), "{}: src/{room} must not know src/{named}", path.display());
        }
    }
}

#[test]
fn nobody_imports_in_a_circle() {
    let mut knows: BTreeMap<String, BTreeSet<&str>> = BTreeMap::new();
    for (_, room, code) in files() {
        knows.entry(room).or_default().extend(named_rooms(&code));
    }
    for (room, known) in &knows {
        for other in known.iter().filter(|other| **other != room.as_str()) {
            let back = knows.get(*other).is_some_and(|of_other| of_other.contains(room.as_str()));
            assert!(!back, "src/{room} and src/{other} know each other");
        }
    }
}

/// The other files of its folder that a file's code names, by their stems.
fn named_neighbours(path: &Path, code: &str) -> BTreeSet<String> {
    let neighbour = |name: &str| path.with_file_name(name).with_extension("rs").is_file();
    let name_at = |text: &str| -> String { text.chars().take_while(|c| c.is_ascii_lowercase() || *c == '_').collect() };
    let mut named = BTreeSet::new();
    for (at, found) in code.match_indices("super::") {
        let rest = &code[at + found.len()..];
        let Some(list) = rest.strip_prefix('{') else {
            named.insert(name_at(rest));
            continue;
        };
        // What stands in inner braces belongs to the name before them.
        let mut depth = 0;
        for part in list.split_inclusive(['{', '}', ',']) {
            if depth == 0 {
                named.insert(name_at(part.trim_start()));
            }
            depth += i32::from(part.ends_with('{')) - i32::from(part.ends_with('}'));
            if depth < 0 {
                break;
            }
        }
    }
    named.retain(|name| neighbour(name) && path.file_stem() != Some(name.as_ref()));
    named
}

/// The files of `module` that a file's code names by their whole path, as `crate::graph::limits::pause`.
fn named_by_path(path: &Path, module: &str, code: &str) -> BTreeSet<PathBuf> {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let prefix = format!("crate::{module}::");
    let file_at = |rest: &str| -> Option<PathBuf> {
        let mut file = src.join(module);
        for segment in rest.split("::") {
            let name: String = segment.chars().take_while(|c| c.is_ascii_lowercase() || *c == '_').collect();
            file.push(name);
            if file.with_extension("rs").is_file() {
                return Some(file.with_extension("rs"));
            }
        }
        None
    };
    let named = code.match_indices(&prefix).filter_map(|(at, found)| file_at(&code[at + found.len()..]));
    named.filter(|file| file != path).collect()
}

#[test]
fn nor_do_the_files_of_a_room() {
    let mut knows: BTreeMap<PathBuf, BTreeSet<PathBuf>> = BTreeMap::new();
    for (path, room, code) in files() {
        // `super` of a folder's own mod.rs, and of a file at the top, is another folder.
        if !path.ends_with("mod.rs") && !path.with_file_name(&room).with_extension("rs").is_file() {
            let neighbours = named_neighbours(&path, &code).into_iter();
            let mut named = named_by_path(&path, &room, &code);
            named.extend(neighbours.map(|name| path.with_file_name(name).with_extension("rs")));
            knows.insert(path.clone(), named);
        }
    }
    assert!(knows.values().map(BTreeSet::len).sum::<usize>() > 50, "imports are found at all");
    // Take away who knows nobody that is left, until nobody can be taken away: what is left is a circle.
    loop {
        let left: BTreeSet<PathBuf> = knows.keys().cloned().collect();
        knows.retain(|_, known| known.iter().any(|other| left.contains(other)));
        if knows.len() == left.len() {
            assert!(knows.is_empty(), "these know each other in a circle: {:?}", knows.keys());
            return;
        }
    }
}

#[test]
fn vendor_names_stay_in_their_rooms() {
    for (path, room, code) in files() {
        for (vendor, rooms) in VENDORS {
            let named = code.match_indices(&format!("{vendor}::")).any(|(at, _)| {
                !code[..at].ends_with("::")
                    && !code[..at].ends_with(|before: char| before.is_alphanumeric() || before == '_')
            });
            assert!(!named || rooms.contains(&room.as_str()), "{}: {vendor} belongs to {rooms:?}", path.display());
        }
    }
}

#[test]
fn no_file_is_too_long() {
    for (path, _, _) in files() {
        let lines = fs::read_to_string(&path).unwrap().lines().count();
        assert!(lines <= MAX_LINES, "{} has {lines} lines, {MAX_LINES} at most", path.display());
    }
}

#[test]
fn the_top_of_the_repository_stays_as_it_is() {
    let allowed = [
        "Cargo.toml",
        "Cargo.lock",
        "src",
        "migrations",
        "config",
        "tests",
        "deploy",
        "README.md",
        "CHANGELOG.md",
        "LICENSE-MIT",
        "LICENSE-APACHE",
        "target",
    ];
    for entry in fs::read_dir(env!("CARGO_MANIFEST_DIR")).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        let generated = name == "proptest-regressions";
        assert!(
            allowed.contains(&name.as_str()) || name.starts_with('.') || generated,
            "{name} does not belong at the top"
        );
    }
}

#[test]
fn nothing_can_write_to_graph() {
    let verbs =
        [".post(", ".put(", ".patch(", ".delete(", "Method::POST", "Method::PUT", "Method::PATCH", "Method::DELETE"];
    for (path, _, code) in files().iter().filter(|(_, room, _)| room == "graph") {
        for verb in verbs {
            assert!(!code.contains(verb), "{}: {verb}", path.display());
        }
    }
}
