//! `inventoryd runs`: lists, shows and follows runs.

use clap::Subcommand;
use uuid::Uuid;

use super::ids::{IdPrefix, unknown_run};
use super::output::{Times, or_dash, seconds};
use super::progress::{Follow, follow};
use super::{CliError, Context, Outcome, run_diff};
use crate::domain::run::{RunStatus, TypeOutcome};
use crate::store::{Run, RunDetails, RunFilter, Store};

/// List runs, show one, watch one to its end
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// List runs, newest first
    List(List),
    /// Show a run and each of its types
    Show(Show),
    /// Follow a run to its end; exit code 0 if it succeeds
    Watch(Watch),
    /// Compare two completed runs of a selection: new, changed and missing items
    Diff(run_diff::Args),
}

#[derive(Debug, clap::Args)]
struct List {
    /// Only runs of this tenant; a unique prefix of its id is enough
    #[arg(long, value_name = "GUID")]
    tenant: Option<IdPrefix>,
    /// Only runs with this status: running, success, partial, failed or skipped
    #[arg(long)]
    status: Option<RunStatus>,
    /// Maximum number of runs
    #[arg(long, default_value_t = 20, value_name = "COUNT")]
    limit: u32,
}

#[derive(Debug, clap::Args)]
struct Show {
    /// Run id, or a unique prefix
    #[arg(value_name = "RUN")]
    run_id: IdPrefix,
}

#[derive(Debug, clap::Args)]
struct Watch {
    /// Run id, or a unique prefix [default: the newest running run]
    #[arg(value_name = "RUN")]
    run_id: Option<IdPrefix>,
    /// Tenant of the run, if no run id is given
    #[arg(long, value_name = "GUID", conflicts_with = "run_id")]
    tenant: Option<IdPrefix>,
}

pub(super) async fn run(args: Args, context: &mut Context<'_>) -> Result<Outcome, CliError> {
    match args.action {
        Action::List(args) => list(args, context).await,
        Action::Show(args) => show(&args, context).await,
        Action::Watch(args) => watch(&args, context).await,
        Action::Diff(args) => run_diff::run(&args, context).await,
    }
}

async fn list(args: List, context: &mut Context<'_>) -> Result<Outcome, CliError> {
    let store = context.store().await?;
    let tenant_id = tenant_of(args.tenant, &store).await?;
    let runs = store.list_runs(&RunFilter { tenant_id, status: args.status, limit: args.limit }).await?;
    let times = context.out.times();
    let header = ["run", "tenant", "key", "status", "items", "new", "changed", "codes", "took", "started"];
    let optional = ["key", "took", "changed", "new", "codes", "tenant", "items"];
    context.out.rows(header, &optional, &runs, |run| {
        [
            run.run_id.to_string(),
            run.tenant_name.clone(),
            run.idempotency_key.clone(),
            run.status.as_str().to_owned(),
            run.counters.items_observed_count.to_string(),
            run.counters.items_created_count.to_string(),
            run.counters.items_changed_count.to_string(),
            run.error_codes.join(" "),
            seconds(run.duration_s),
            times.show(&run.started_at),
        ]
    })?;
    Ok(Outcome::Done)
}

async fn tenant_of(prefix: Option<IdPrefix>, store: &Store) -> Result<Option<Uuid>, CliError> {
    match prefix {
        Some(prefix) => Ok(Some(prefix.tenant(store).await?)),
        None => Ok(None),
    }
}

async fn show(args: &Show, context: &mut Context<'_>) -> Result<Outcome, CliError> {
    let store = context.store().await?;
    let run_id = args.run_id.run(&store).await?;
    let details = store.show_run(run_id).await?.ok_or_else(|| unknown_run(run_id))?;
    print(&details, context)?;
    Ok(Outcome::Done)
}

async fn watch(args: &Watch, context: &mut Context<'_>) -> Result<Outcome, CliError> {
    let (store, catalog) = (context.store().await?, context.config()?.graph.catalog()?);
    let run_id = match args.run_id {
        Some(run_id) => run_id.run(&store).await?,
        None => {
            let tenant_id = tenant_of(args.tenant, &store).await?;
            let filter = RunFilter { tenant_id, status: Some(RunStatus::Running), limit: 1 };
            let newest = store.list_runs(&filter).await?.pop();
            newest
                .ok_or_else(|| CliError::Failed("no run is in progress; `inventoryd runs list` lists runs".to_owned()))?
                .run_id
        }
    };
    let details =
        follow(&Follow { store: &store, catalog: &catalog }, run_id).await?.ok_or_else(|| unknown_run(run_id))?;
    print(&details, context)?;
    Ok(by_status(details.run.status))
}

/// Maps the status of a run to the result of a command that waited for it.
pub(super) fn by_status(status: RunStatus) -> Outcome {
    if status == RunStatus::Success { Outcome::Done } else { Outcome::Unsuccessful }
}

/// Prints a run and its types.
pub(super) fn print(details: &RunDetails, context: &mut Context<'_>) -> Result<(), CliError> {
    if context.out.is_json() {
        return context.out.json(details);
    }
    let times = context.out.times();
    context.out.table(["run", &details.run.run_id.to_string()], &[], facts(&details.run, times))?;
    if details.types.is_empty() {
        return Ok(());
    }
    let header = ["type", "status", "items", "new", "changed", "errors", "code", "note"];
    context.out.table(header, &["errors", "changed", "new", "note"], details.types.iter().map(type_row))
}

fn facts(run: &Run, times: Times) -> Vec<[String; 2]> {
    let (counters, usage) = (&run.counters, &run.usage);
    let throttled = format!(
        "{} requests, {} throttled, waited {}",
        usage.graph_requests_count,
        usage.graph_throttled_count,
        seconds(usage.graph_throttle_wait_ms as f64 / 1000.0)
    );
    let items = format!(
        "{} observed, {} new, {} changed",
        counters.items_observed_count, counters.items_created_count, counters.items_changed_count
    );
    let lease = run.lease_owner.as_deref().zip(run.lease_left_s);
    let facts = [
        ("tenant", Some(format!("{} ({})", run.tenant_id, run.tenant_name))),
        ("status", Some(run.status.as_str().to_owned())),
        ("errors", Some(format!("{} {}", counters.errors_count, run.error_codes.join(" ")))),
        ("items", Some(items)),
        ("graph", Some(throttled)),
        ("retry after", run.retry_after_s.map(|s| format!("{s}s"))),
        ("selection", Some(run.selection.canonical_json())),
        ("selection hash", Some(run.selection_hash.clone())),
        ("key", Some(run.idempotency_key.clone())),
        ("correlation id", run.correlation_id.clone()),
        ("requested by", run.requested_by.clone()),
        ("started", Some(times.show_exactly(&run.started_at))),
        ("finished", run.finished_at.as_deref().map(|at| times.show_exactly(at))),
        ("took", Some(seconds(run.duration_s))),
        ("lease", lease.map(|(owner, left)| format!("{owner}, expires in {}", seconds(left)))),
        ("attempt", Some(run.attempt.to_string())),
        ("daemon", Some(run.daemon_version.clone())),
    ];
    facts.into_iter().filter_map(|(name, value)| Some([name.to_owned(), value?.trim().to_owned()])).collect()
}

fn type_row(outcome: &TypeOutcome) -> [String; 8] {
    let counters = &outcome.counters;
    let failure = outcome.failure.as_ref();
    let labelled = |name: &str, value: Option<String>| value.map(|value| format!("{name} {value}"));
    let notes = [
        outcome.suspicious_drop.then(|| "suspicious drop".to_owned()),
        labelled("HTTP", failure.and_then(|f| f.http_status).map(|status| status.to_string())),
        failure.and_then(|f| f.graph_code.clone()),
        labelled("request", failure.and_then(|f| f.request_id.clone())),
    ];
    [
        outcome.policy_type.clone(),
        outcome.status.as_str().to_owned(),
        counters.items_observed_count.to_string(),
        counters.items_created_count.to_string(),
        counters.items_changed_count.to_string(),
        counters.errors_count.to_string(),
        or_dash(failure.map(|f| f.code).as_ref()),
        notes.into_iter().flatten().collect::<Vec<_>>().join(", "),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::failure::{ErrorCode, Failure};
    use crate::domain::run::TypeCounters;

    #[test]
    fn only_success_exits_0() {
        assert_eq!(by_status(RunStatus::Success), Outcome::Done);
        for status in [RunStatus::Partial, RunStatus::Failed, RunStatus::Skipped, RunStatus::Running] {
            assert_eq!(by_status(status), Outcome::Unsuccessful);
        }
    }

    #[test]
    fn a_failed_type_shows_status_code_and_request_id() {
        let id = "8b6f3b4c-0000-4000-8000-000000000001";
        let failure = Failure::from_graph(ErrorCode::GraphForbidden, 403, Some("Forbidden"), Some(id));
        let row = type_row(&TypeOutcome::failed("mobileApp", TypeCounters::default(), failure));
        assert_eq!(row[6], "graph_forbidden");
        assert_eq!(row[7], format!("HTTP 403, Forbidden, request {id}"));
    }
}
