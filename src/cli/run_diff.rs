//! `inventoryd runs diff`: new, changed and missing items between two runs of one selection.

use schemars::JsonSchema;
use serde::Serialize;
use uuid::Uuid;

use super::ids::{IdPrefix, unknown_run};
use super::output::or_dash;
use super::{CliError, Context, Outcome};
use crate::domain::run::RunStatus;
use crate::store::{Change, Run, RunDiff, Store};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Id of a completed run, or a unique prefix
    #[arg(value_name = "RUN")]
    one: IdPrefix,
    /// Id of another completed run of the same tenant and selection; the order does not matter
    #[arg(value_name = "RUN")]
    other: IdPrefix,
}

/// Differences between two runs, as printed with `--json`.
#[derive(Debug, Serialize, JsonSchema)]
#[schemars(title = "inventoryd runs diff, version 1")]
pub(super) struct Document {
    /// The tenant.
    tenant_id: Uuid,
    /// Hash of the selection of both runs.
    selection_hash: String,
    /// The run that started first.
    old_run_id: Uuid,
    /// The run that started later.
    new_run_id: Uuid,
    /// Number of new items.
    new_count: usize,
    /// Number of changed items.
    changed_count: usize,
    /// Number of missing items.
    missing_count: usize,
    #[serde(flatten)]
    diff: RunDiff,
}

pub(super) async fn run(args: &Args, context: &mut Context<'_>) -> Result<Outcome, CliError> {
    let store = context.store().await?;
    let mut runs = [completed(args.one, &store).await?, completed(args.other, &store).await?];
    runs.sort_by(|one, other| one.started_at.cmp(&other.started_at));
    let [old, new] = runs;
    check_comparable(&old, &new).map_err(CliError::Failed)?;
    let diff = store.diff_runs(old.tenant_id, old.run_id, new.run_id).await?;
    let count = |change| diff.differences.iter().filter(|one| one.change == change).count();
    let document = Document {
        tenant_id: old.tenant_id,
        selection_hash: old.selection_hash,
        old_run_id: old.run_id,
        new_run_id: new.run_id,
        new_count: count(Change::New),
        changed_count: count(Change::Changed),
        missing_count: count(Change::Missing),
        diff,
    };
    if context.out.is_json() { context.out.json(&document) } else { print(&document, context) }?;
    Ok(Outcome::Done)
}

async fn completed(id: IdPrefix, store: &Store) -> Result<Run, CliError> {
    let run_id = id.run(store).await?;
    let run = store.show_run(run_id).await?.ok_or_else(|| unknown_run(run_id))?.run;
    match run.status {
        RunStatus::Success | RunStatus::Partial | RunStatus::Failed => Ok(run),
        status => {
            Err(CliError::Failed(format!("run {run_id} is {}: only completed runs can be compared", status.as_str())))
        }
    }
}

fn check_comparable(old: &Run, new: &Run) -> Result<(), String> {
    if old.run_id == new.run_id {
        return Err("both ids name the same run; name two".to_owned());
    }
    if old.tenant_id != new.tenant_id {
        return Err("the runs belong to different tenants; name two runs of one tenant".to_owned());
    }
    if old.selection_hash != new.selection_hash {
        return Err(format!(
            "the runs have different selections ({} and {}); name two runs of one selection",
            old.selection.canonical_json(),
            new.selection.canonical_json()
        ));
    }
    Ok(())
}

fn print(document: &Document, context: &mut Context<'_>) -> Result<(), CliError> {
    let (times, diff) = (context.out.times(), &document.diff);
    if !diff.differences.is_empty() {
        let header = ["change", "type", "name", "id", "when"];
        context.out.rows(header, &["when", "id"], &diff.differences, |one| {
            let change = match one.change {
                Change::New => "new",
                Change::Changed => "changed",
                Change::Missing => "missing",
            };
            let name = or_dash(one.display_name.as_ref());
            [change.to_owned(), one.policy_type.clone(), name, one.external_id.clone(), times.show(&one.at)]
        })?;
    }
    context.out.line(format_args!(
        "{} new, {} changed, {} missing in {} types",
        document.new_count,
        document.changed_count,
        document.missing_count,
        diff.compared_types.len()
    ))?;
    if !diff.types_not_compared.is_empty() {
        context.out.line(format_args!(
            "not compared, because one of the runs has no complete list: {}",
            diff.types_not_compared.join(", ")
        ))?;
    }
    if diff.changed_later_count > 0 {
        context.out.line(format_args!(
            "{} items changed after the later run; whether they had changed before is not stored",
            diff.changed_later_count
        ))?;
    }
    if diff.seen_later_count > 0 {
        context.out.line(format_args!(
            "{} items were observed again after the later run; whether it missed one of them is not stored",
            diff.seen_later_count
        ))?;
    }
    Ok(())
}
