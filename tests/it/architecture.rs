//! Architecture rules: import directions, vendor crates by module, file lengths.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

const MAX_LINES: usize = 400;

/// Layers of modules from top to bottom. A module may import modules of lower layers only.
const LAYERS: &[&[&str]] = &[
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

/// Vendor crates and the only modules that may name them.
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
    ("p12_keystore", &["graph"]),
    ("sd_notify", &["daemon"]),
    ("tracing_opentelemetry", &["telemetry"]),
    ("tracing_subscriber", &["telemetry"]),
];

/// Every file of `src` with its top-level module and its code, without unit tests and comments.
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
            let module = relative.iter().next().unwrap().to_str().unwrap().trim_end_matches(".rs").to_owned();
            let text = fs::read_to_string(&path).unwrap();
            let code = text.split("#[cfg(test)]\nmod tests").next().unwrap();
            let code: Vec<&str> = code.lines().filter(|line| !line.trim_start().starts_with("//")).collect();
            found.push((path.clone(), module, code.join("\n")));
        }
    }
    found
}

fn layer(module: &str) -> usize {
    let found = LAYERS.iter().position(|modules| modules.contains(&module));
    found.unwrap_or_else(|| panic!("src/{module} belongs to no layer"))
}

/// Top-level modules that a file's code names.
fn named_modules(code: &str) -> BTreeSet<&'static str> {
    let named =
        |module: &&&str| code.contains(&format!("crate::{module}")) || code.contains(&format!("inventoryd::{module}"));
    LAYERS.iter().flat_map(|modules| modules.iter()).filter(named).copied().collect()
}

#[test]
fn imports_run_downward_only() {
    for (path, module, code) in files().iter().filter(|(_, module, _)| module != "lib") {
        for named in named_modules(code).into_iter().filter(|named| named != module) {
            assert!(layer(named) > layer(module), "{}: src/{module} must not import src/{named}", path.display());
        }
    }
}

#[test]
fn no_two_modules_import_each_other() {
    let mut imports: BTreeMap<String, BTreeSet<&str>> = BTreeMap::new();
    for (_, module, code) in files() {
        imports.entry(module).or_default().extend(named_modules(&code));
    }
    for (module, imported) in &imports {
        for other in imported.iter().filter(|other| **other != module.as_str()) {
            let back = imports.get(*other).is_some_and(|of_other| of_other.contains(module.as_str()));
            assert!(!back, "src/{module} and src/{other} import each other");
        }
    }
}

/// Stems of the other files of the same folder that a file's code names.
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
        // Names in inner braces belong to the name before the brace.
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

/// Files of `module` that a file's code names by their full path, such as `crate::graph::limits::pause`.
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
fn no_import_cycles_within_a_module() {
    let mut imports: BTreeMap<PathBuf, BTreeSet<PathBuf>> = BTreeMap::new();
    for (path, module, code) in files() {
        // `super` of a `mod.rs`, and of a file directly in `src`, is another folder.
        if !path.ends_with("mod.rs") && !path.with_file_name(&module).with_extension("rs").is_file() {
            let neighbours = named_neighbours(&path, &code).into_iter();
            let mut named = named_by_path(&path, &module, &code);
            named.extend(neighbours.map(|name| path.with_file_name(name).with_extension("rs")));
            imports.insert(path.clone(), named);
        }
    }
    assert!(imports.values().map(BTreeSet::len).sum::<usize>() > 50, "too few imports were found");
    // Remove files that import no remaining file until none can be removed; the rest forms cycles.
    loop {
        let left: BTreeSet<PathBuf> = imports.keys().cloned().collect();
        imports.retain(|_, imported| imported.iter().any(|other| left.contains(other)));
        if imports.len() == left.len() {
            assert!(imports.is_empty(), "import cycle among {:?}", imports.keys());
            return;
        }
    }
}

#[test]
fn vendor_names_stay_in_their_modules() {
    for (path, module, code) in files() {
        for (vendor, modules) in VENDORS {
            let named = code.match_indices(&format!("{vendor}::")).any(|(at, _)| {
                !code[..at].ends_with("::")
                    && !code[..at].ends_with(|before: char| before.is_alphanumeric() || before == '_')
            });
            let allowed = !named || modules.contains(&module.as_str());
            assert!(allowed, "{}: {vendor} may be named in {modules:?} only", path.display());
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
fn the_repository_root_has_no_other_entries() {
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
            "unexpected entry in the repository root: {name}"
        );
    }
}

#[test]
fn graph_requests_use_get_only() {
    let verbs =
        [".post(", ".put(", ".patch(", ".delete(", "Method::POST", "Method::PUT", "Method::PATCH", "Method::DELETE"];
    for (path, _, code) in files().iter().filter(|(_, module, _)| module == "graph") {
        for verb in verbs {
            assert!(!code.contains(verb), "{}: {verb}", path.display());
        }
    }
}

/// Doc comments open with a noun phrase or a verb, which a reader finds by its subject: at most 3 % with a question word or a pronoun.
#[test]
fn doc_comments_name_their_subject() {
    const VAGUE: [&str; 7] = ["What ", "Whether ", "How ", "It ", "Its ", "Whose ", "Who "];
    let (mut opened, mut vague) = (0, Vec::new());
    for (file, _, _) in files() {
        let text = fs::read_to_string(&file).unwrap();
        let mut in_comment = false;
        for line in text.lines() {
            let doc = line.trim_start().strip_prefix("/// ").or_else(|| line.strip_prefix("//! "));
            if let Some(sentence) = doc.filter(|_| !in_comment) {
                opened += 1;
                if VAGUE.iter().any(|word| sentence.starts_with(word)) {
                    vague.push(format!("{}: {sentence}", file.display()));
                }
            }
            in_comment = line.trim_start().starts_with("//");
        }
    }
    assert!(opened > 1_000, "{opened} doc comments were found");
    assert!(vague.len() * 100 < opened * 3, "{} of {opened}: {vague:#?}", vague.len());
}
