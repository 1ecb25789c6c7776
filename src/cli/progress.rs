//! Progress of a run: live bars on a terminal, otherwise one line per completed type.

use std::collections::{BTreeMap, BTreeSet};
use std::io::IsTerminal;
use std::time::Duration;

use indicatif::{HumanCount, MultiProgress, ProgressBar, ProgressStyle};
use uuid::Uuid;

use super::{CliError, note};
use crate::domain::catalog::Catalog;
use crate::domain::run::{RunStatus, TypeOutcome, TypeStatus};
use crate::domain::selection::Selection;
use crate::store::{RunDetails, Store, TenantPause};

/// Polling interval; each poll counts the observed items in the database.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Sources of a run's progress.
pub(super) struct Follow<'a> {
    pub(super) store: &'a Store,
    pub(super) catalog: &'a Catalog,
}

/// Shows a run's progress on standard error until it ends, and returns its details; none if the run does not exist.
pub(super) async fn follow(at: &Follow<'_>, run_id: Uuid) -> Result<Option<RunDetails>, CliError> {
    let Some(mut details) = at.store.show_run(run_id).await? else { return Ok(None) };
    let mut bars = Bars::new(&details.run.selection, at.catalog);
    while details.run.status == RunStatus::Running {
        let gates = at.store.pauses().await?;
        bars.show(&details, throttled(&gates, details.run.tenant_id));
        tokio::time::sleep(LOOK_EVERY).await;
        let Some(newer) = at.store.show_run(run_id).await? else { return Ok(None) };
        details = newer;
    }
    bars.finish(&details);
    Ok(Some(details))
}

/// Spinner shown during a wait.
pub(super) fn spinner(text: String) -> ProgressBar {
    let bar = ProgressBar::new_spinner().with_message(text).with_style(style("{spinner} {msg}"));
    bar.enable_steady_tick(Duration::from_millis(120));
    bar
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).expect("the templates of this file are well formed")
}

/// Progress bars: one for the run, and one for each type in progress; bars for all types would not fit.
struct Bars {
    all: MultiProgress,
    total: ProgressBar,
    reading: BTreeMap<String, ProgressBar>,
    ended: BTreeSet<String>,
    plain: bool,
}

impl Bars {
    fn new(selection: &Selection, catalog: &Catalog) -> Self {
        let all = MultiProgress::new();
        let total = all.add(ProgressBar::new(types_in(selection, catalog)));
        total.set_style(style("{bar:24} {pos}/{len} types  {elapsed}  {msg}"));
        let plain = !std::io::stderr().is_terminal();
        Self { all, total, reading: BTreeMap::new(), ended: BTreeSet::new(), plain }
    }

    fn show(&mut self, details: &RunDetails, throttled: Option<String>) {
        self.end_types(details);
        let mut observed = 0;
        for (policy_type, count) in &details.observed_so_far {
            observed += count;
            if self.ended.contains(policy_type) {
                continue;
            }
            let bar = self.reading.entry(policy_type.clone()).or_insert_with(|| {
                let bar = self.all.add(spinner(String::new()));
                bar.set_style(style("  {spinner} {prefix:36} {msg} objects"));
                bar.with_prefix(policy_type.clone())
            });
            bar.set_message(HumanCount(unsigned(*count)).to_string());
        }
        let run = &details.run;
        self.total.set_message(format!(
            "{} objects  attempt {} on {}{}",
            HumanCount(unsigned(observed)),
            run.attempt,
            run.lease_owner.as_deref().unwrap_or("no worker"),
            throttled.unwrap_or_default()
        ));
    }

    /// Prints each completed type once, above the bars.
    fn end_types(&mut self, details: &RunDetails) {
        for outcome in &details.types {
            if !self.ended.insert(outcome.policy_type.clone()) {
                continue;
            }
            if let Some(bar) = self.reading.remove(&outcome.policy_type) {
                bar.finish_and_clear();
                self.all.remove(&bar);
            }
            let line = type_line(outcome);
            if self.plain {
                note(line);
            } else {
                // Fails only if the terminal was closed.
                let _ = self.all.println(line);
            }
        }
        self.total.set_position(self.ended.len() as u64);
    }

    fn finish(mut self, details: &RunDetails) {
        self.end_types(details);
        for bar in self.reading.values() {
            bar.finish_and_clear();
        }
        self.total.finish_and_clear();
    }
}

/// Longest remaining pause of the tenant, if Graph throttles it.
fn throttled(gates: &[TenantPause], tenant_id: Uuid) -> Option<String> {
    let longest = gates.iter().filter(|gate| gate.tenant_id == tenant_id).map(|gate| gate.left_s).reduce(f64::max)?;
    Some(format!("  throttled for {longest:.0} s"))
}

fn unsigned(count: i64) -> u64 {
    u64::try_from(count).unwrap_or(0)
}

fn types_in(selection: &Selection, catalog: &Catalog) -> u64 {
    let scope = catalog.resolve(selection);
    (scope.listings.iter().map(|listing| listing.selected.len()).sum::<usize>() + scope.unsupported.len()) as u64
}

fn type_line(outcome: &TypeOutcome) -> String {
    let count = HumanCount(unsigned(outcome.counters.items_observed_count));
    let (mark, end) = match (&outcome.failure, outcome.status) {
        (None, _) if outcome.suspicious_drop => ("!", "  suspicious drop".to_owned()),
        (None, _) => ("✓", String::new()),
        (Some(failure), TypeStatus::Complete) => ("!", format!("  {}", failure.code)),
        (Some(failure), TypeStatus::NotApplicable) => ("-", format!("  not applicable, {}", failure.code)),
        (Some(failure), TypeStatus::Failed) => ("✗", format!("  {}", failure.code)),
    };
    format!("  {mark} {:36} {count} objects{end}", outcome.policy_type)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::failure::ErrorCode;
    use crate::domain::run::TypeCounters;

    #[test]
    fn a_type_line_shows_the_outcome() {
        let counters = TypeCounters { items_observed_count: 12_345, ..TypeCounters::default() };
        let failed = TypeOutcome::failed("mobileApp", counters, ErrorCode::GraphThrottled.into());
        let line = type_line(&failed);
        assert!(line.contains("✗ mobileApp") && line.ends_with("12,345 objects  graph_throttled"), "{line}");
        let complete = TypeOutcome::complete("mobileApp", counters, None);
        assert!(type_line(&complete).ends_with("12,345 objects"));
        let absent = TypeOutcome::not_applicable("mobileApp", counters, ErrorCode::GraphNotApplicable.into());
        assert!(type_line(&absent).contains("- mobileApp"), "{}", type_line(&absent));
    }

    #[test]
    fn the_longest_gate_of_the_tenant_is_shown() {
        let gate =
            |tenant: u128, left_s| TenantPause { tenant_id: Uuid::from_u128(tenant), family: String::new(), left_s };
        let gates = [gate(1, 2.0), gate(1, 7.4), gate(2, 60.0)];
        assert_eq!(throttled(&gates, Uuid::from_u128(1)).as_deref(), Some("  throttled for 7 s"));
        assert_eq!(throttled(&gates, Uuid::from_u128(3)), None);
    }

    #[test]
    fn bar_length_equals_the_number_of_types() {
        let selection = Selection {
            categories: BTreeSet::new(),
            include_foundations: false,
            policy_types: ["mobileApp".to_owned(), "noSuchType".to_owned()].into(),
        };
        assert_eq!(types_in(&selection, &Catalog::built_in()), 2);
    }
}
