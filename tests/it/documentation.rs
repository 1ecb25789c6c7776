//! Consistency of the documentation: links, generated pages, widths, and names of tests, keys and figures.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use inventoryd::domain::catalog::Catalog;

use crate::support::binary;

const MAX_README_LINES: usize = 200;
/// Widest line of a code block or table that needs no sideways scrolling.
const MAX_COLUMNS: usize = 110;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Every page of the documentation by its path relative to the repository.
fn pages() -> BTreeMap<PathBuf, String> {
    let mut pages = BTreeMap::new();
    for folder in ["", ".github", "config", "deploy", "migrations", "tests", "tests/bench"] {
        for entry in std::fs::read_dir(root().join(folder)).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|extension| extension == "md") {
                let text = std::fs::read_to_string(&path).unwrap();
                pages.insert(path.strip_prefix(root()).unwrap().to_owned(), text);
            }
        }
    }
    pages
}

/// Lines of a page with their number and with whether they belong to a fenced code block.
fn lines(page: &str) -> impl Iterator<Item = (usize, bool, &str)> {
    let mut code = false;
    page.lines().enumerate().map(move |(index, line)| {
        let fence = line.trim_start().starts_with("```");
        code ^= fence;
        (index + 1, code || fence, line)
    })
}

/// Section of a page below a heading of the second level.
pub(crate) fn section<'a>(page: &'a str, heading: &str) -> &'a str {
    let (_, rest) = page.split_once(&format!("\n## {heading}\n")).expect("the page has the heading");
    rest.split("\n## ").next().unwrap_or(rest)
}

/// Fenced code blocks of a language.
pub(crate) fn blocks<'a>(page: &'a str, language: &str) -> Vec<&'a str> {
    let blocks = page.split("```").skip(1).step_by(2).filter_map(|block| block.split_once('\n'));
    blocks.filter(|(name, _)| *name == language).map(|(_, code)| code).collect()
}

/// Anchor that GitHub gives a heading.
fn anchor(heading: &str) -> String {
    let kept = heading.to_lowercase().chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c)).collect::<String>();
    kept.trim().replace(' ', "-")
}

fn anchors(page: &str) -> Vec<String> {
    let headings = lines(page).filter(|(_, code, line)| !code && line.starts_with('#'));
    headings.map(|(_, _, line)| anchor(line.trim_start_matches('#'))).collect()
}

#[test]
fn links_lead_to_files_and_headings() {
    let pages = pages();
    let mut checked = 0;
    for (path, page) in &pages {
        let prose = lines(page).filter(|(_, code, _)| !code);
        for (number, target) in prose.flat_map(|(number, _, line)| {
            let targets = line.split("](").skip(1).filter_map(|rest| rest.split_once(')'));
            targets.map(move |(target, _)| (number, target))
        }) {
            if target.contains("://") {
                continue;
            }
            checked += 1;
            let at = format!("{}:{number}: {target}", path.display());
            let (file, fragment) = target.split_once('#').unwrap_or((target, ""));
            let file = if file.is_empty() { root().join(path) } else { root().join(path).with_file_name(file) };
            let file = file.canonicalize().unwrap_or_else(|_| panic!("{at}: no such file"));
            let linked = pages.get(file.strip_prefix(root().canonicalize().unwrap()).unwrap());
            if !fragment.is_empty() {
                let found = linked.is_some_and(|linked| anchors(linked).iter().any(|anchor| anchor == fragment));
                assert!(found, "{at}: no such heading");
            }
        }
    }
    assert!(checked > 30, "only {checked} links were found");
}

#[test]
fn readme_is_short_and_shows_snippets_of_the_other_pages() {
    let pages = pages();
    let readme = &pages[Path::new("README.md")];
    let count = readme.lines().count();
    assert!(count <= MAX_README_LINES, "README.md has {count} lines, {MAX_README_LINES} at most");
    for (language, page) in [("sh", "config/README.md"), ("sql", "migrations/README.md")] {
        let snippets = blocks(readme, language);
        assert!(!snippets.is_empty(), "README.md has no {language}");
        for snippet in snippets.into_iter().filter(|snippet| !snippet.starts_with("./deploy/dev")) {
            assert!(pages[Path::new(page)].contains(snippet), "{page} lacks this snippet of README.md:\n{snippet}");
        }
    }
}

#[test]
fn code_blocks_and_tables_fit_the_page() {
    for (path, page) in pages() {
        for (number, code, line) in lines(&page) {
            let (columns, table) = (line.chars().count(), line.starts_with('|'));
            let fits = columns <= MAX_COLUMNS || !(code || table);
            assert!(fits, "{}:{number} has {columns} columns, {MAX_COLUMNS} at most", path.display());
        }
    }
}

/// `inventoryd explain` writes the pages of error codes and metrics.
#[test]
fn generated_pages_are_current() {
    for (page, option) in [("config/ERRORS.md", "--markdown"), ("deploy/METRICS.md", "--markdown=metrics")] {
        let output = Command::new(binary()).args(["explain", option]).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        let written = std::fs::read_to_string(root().join(page)).unwrap_or_default();
        let command = format!("run: cargo run -- explain {option} >{page}");
        assert!(written.as_bytes() == output.stdout, "{page} is out of date; {command}");
    }
}

#[test]
fn every_alert_names_its_page_and_is_tested() {
    let pages = pages();
    let read = |file| std::fs::read_to_string(root().join("deploy/prometheus").join(file)).unwrap();
    let (alerts, tests) = (read("alerts.yml"), read("alerts_test.yml"));
    let alerts: Vec<&str> = alerts.split("- alert: ").skip(1).collect();
    assert!(alerts.len() > 15, "only {} alerts were found", alerts.len());
    for alert in alerts {
        let name = alert.lines().next().unwrap();
        let url = alert.lines().find_map(|line| line.trim().strip_prefix("runbook_url: "));
        let (page, heading) =
            url.and_then(|url| url.split_once('#')).unwrap_or_else(|| panic!("{name}: no runbook_url"));
        let page = pages.get(Path::new(page)).unwrap_or_else(|| panic!("{name}: no page {page}"));
        assert!(anchors(page).iter().any(|anchor| anchor == heading), "{name}: no heading {heading}");
        assert!(tests.contains(&format!("alertname=\"{name}\", alertstate=\"firing\"")), "no test lets {name} fire");
    }
}

#[test]
fn figures_and_configuration_keys_are_real() {
    let pages = pages();
    let types = Catalog::built_in().types().count();
    for page in ["README.md", "config/README.md", "CHANGELOG.md"] {
        let page = &pages[Path::new(page)];
        assert!(page.contains(&format!("{types} policy types")), "there are {types} policy types");
    }
    let defaults: toml::Table = inventoryd::config::DEFAULTS.parse().unwrap();
    let is_key = |name: &str| {
        if name.contains(|c: char| !c.is_ascii_lowercase() && !"._".contains(c)) {
            return None;
        }
        let (section, key) = name.split_once('.')?;
        let section = defaults.get(section)?.as_table()?;
        Some(section.contains_key(key) || ["url_file", "token_file"].contains(&key))
    };
    let mut checked = 0;
    for (path, page) in &pages {
        for (number, _, line) in lines(page).filter(|(_, code, _)| !code) {
            for name in line.split('`').skip(1).step_by(2) {
                if let Some(real) = is_key(name) {
                    checked += 1;
                    assert!(real, "{}:{number}: no key {name}", path.display());
                }
            }
        }
    }
    assert!(checked > 15, "only {checked} keys were found");
}

#[test]
fn files_of_the_crate_documentation_exist() {
    let page = std::fs::read_to_string(root().join("src/lib.rs")).unwrap();
    let named = page.split(|c: char| !c.is_alphanumeric() && !"/._".contains(c)).filter(|name| name.ends_with(".rs"));
    let mut checked = 0;
    for name in named {
        checked += 1;
        assert!(root().join("src").join(name).exists() || root().join(name).exists(), "no file {name}");
    }
    assert!(checked > 30, "only {checked} files were found");
}

/// Names of tests in a page: `module::test`, where `*` stands for any part of a name.
fn named_tests(page: &str) -> impl Iterator<Item = (&str, &str)> {
    page.split('`').skip(1).step_by(2).filter_map(|name| name.split_once("::")).filter(|(_, test)| test.len() > 1)
}

fn matches(pattern: &str, name: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == name,
        Some((start, rest)) => {
            let Some(tail) = name.strip_prefix(start) else { return false };
            (0..=tail.len()).any(|at| tail.is_char_boundary(at) && matches(rest, &tail[at..]))
        }
    }
}

#[test]
fn every_test_that_is_named_exists() {
    let pages = pages();
    let mut checked = 0;
    for page in ["tests/README.md", "deploy/SCALING.md"] {
        for (module, pattern) in named_tests(&pages[Path::new(page)]) {
            let file = root().join("tests/it").join(format!("{module}.rs"));
            let code = std::fs::read_to_string(file).unwrap_or_else(|_| panic!("{page}: no module {module}"));
            let code = code.lines().filter(|line| !line.trim_start().starts_with("//"));
            // Whole words and not declarations only, because macros declare some of the tests.
            let mut words = code.flat_map(|line| line.split(|c: char| !c.is_alphanumeric() && c != '_'));
            assert!(words.any(|word| matches(pattern, word)), "{page}: no test {module}::{pattern}");
            checked += 1;
        }
    }
    assert!(checked > 30, "only {checked} names were found");
    assert!(!matches("the_way", "the_way_to_graph") && matches("*_twice", "acked_twice"), "names match as a whole");
}
