//! What README promises is what the code has.

use inventoryd::domain::catalog::Catalog;
use inventoryd::domain::failure::{DeadReason, ErrorCode};
use inventoryd::telemetry::METRICS;

const README: &str = include_str!("../../README.md");

/// The rows of README whose first cell is in backquotes and fulfils `test`.
fn rows(test: impl Fn(&str) -> bool) -> Vec<&'static str> {
    let cell =
        |line: &'static str| line.strip_prefix("| `").and_then(|rest| rest.split_once('`')).map(|(name, _)| name);
    README.lines().filter(|line| cell(line).is_some_and(&test)).collect()
}

#[test]
fn every_metric_stands_there_as_it_is() {
    let listed = rows(|name| name.starts_with("inventoryd_"));
    let real: Vec<String> = METRICS
        .iter()
        .map(|metric| {
            let label = metric.label.map(|label| format!("`{}`", label.name)).unwrap_or_default();
            let kind = format!("{:?}", metric.kind).to_lowercase();
            format!("| `{}` | {kind} | {} | {} |", metric.name, label, metric.help)
        })
        .collect();
    assert_eq!(listed, real);
}

#[test]
fn every_code_stands_there_with_its_cause_and_remedy() {
    let errors = ErrorCode::ALL.iter().map(|code| (code.as_str(), code.cause(), code.remedy()));
    let reasons = DeadReason::ALL.iter().map(|reason| (reason.as_str(), reason.cause(), reason.remedy()));
    let real: Vec<String> =
        errors.chain(reasons).map(|(code, cause, remedy)| format!("| `{code}` | {cause} | {remedy} |")).collect();
    let known = |name: &str| name.parse::<ErrorCode>().is_ok() || name.parse::<DeadReason>().is_ok();
    assert_eq!(rows(known), real);
}

#[test]
fn figures_and_names_in_the_text_are_real() {
    let types = Catalog::built_in().types().count();
    assert!(README.contains(&format!("{types} kinds of them")), "there are {types} policy types");
    let lines = format!("`inventoryd types | wc -l` says {}, {types} types and the table's frame", types + 4);
    assert!(README.replace('\n', " ").replace("  ", " ").contains(&lines), "{lines}");
    for key in [
        "consumer.prefetch",
        "consumer.drain_s",
        "limits.when_full",
        "limits.defer_max_s",
        "limits.fleet_max_runs",
        "retention.runs_days",
    ] {
        let (section, name) = key.split_once('.').unwrap();
        let defaults: toml::Table = inventoryd::config::DEFAULTS.parse().unwrap();
        assert!(README.contains(key) && defaults[section].get(name).is_some(), "{key}");
    }
}

/// A fault that README says is tested is tested.
#[test]
fn every_test_that_is_named_is_there() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it");
    let growth = include_str!("../../deploy/SCALING.md");
    let column = README
        .lines()
        .chain(growth.lines())
        .filter(|line| line.starts_with("| "))
        .filter_map(|line| line.rsplit(" | ").next());
    let names: Vec<&str> = column.flat_map(|cell| cell.split('`')).filter(|name| name.contains("::")).collect();
    assert!(names.len() > 10, "{names:?}");
    for name in names {
        let (module, test) = name.split_once("::").unwrap();
        let text = std::fs::read_to_string(folder.join(format!("{module}.rs"))).unwrap_or_else(|_| panic!("{name}"));
        assert!(text.contains(test.trim_matches('*')), "{name} is not there");
    }
}
