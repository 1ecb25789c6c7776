//! `inventoryd missing`: items that the latest completed run of a selection no longer observed.

use schemars::JsonSchema;
use serde::Serialize;
use uuid::Uuid;

use super::ids::IdPrefix;
use super::output::{or_dash, yes};
use super::selection::SelectionArgs;
use super::{CliError, Context, Outcome};
use crate::domain::run::RunStatus;
use crate::store::{MissingItem, Run};

/// List the items of a tenant that are missing, relative to the latest completed run of a selection
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Tenant id, or a unique prefix
    #[arg(long, value_name = "GUID")]
    tenant: IdPrefix,
    /// Selection hash [default: the tenant's only selection]
    #[arg(long, value_name = "HASH", conflicts_with_all = ["types", "category", "all", "no_foundations", "foundations_only"])]
    selection_hash: Option<String>,
    #[command(flatten)]
    selection: SelectionArgs,
}

/// Missing items, as printed with `--json`.
#[derive(Debug, Serialize, JsonSchema)]
#[schemars(title = "inventoryd missing, version 1")]
pub(super) struct Document<'a> {
    /// The tenant.
    tenant_id: Uuid,
    /// Hash of the selection.
    selection_hash: &'a str,
    /// Latest completed run of the selection.
    run_id: Uuid,
    /// Status of that run.
    run_status: RunStatus,
    /// End of that run, RFC 3339.
    run_finished_at: Option<&'a str>,
    /// Number of items missing with high confidence.
    high: usize,
    /// Number of items missing with low confidence.
    low: usize,
    /// The items.
    items: &'a [MissingItem],
}

pub(super) async fn run(args: &Args, context: &mut Context<'_>) -> Result<Outcome, CliError> {
    let wanted = match &args.selection_hash {
        Some(hash) => Some(hash.to_ascii_lowercase()),
        None if args.selection.is_absent() => None,
        None => Some(args.selection.to_selection()?.hash()),
    };
    let store = context.store().await?;
    let tenant_id = args.tenant.registered_tenant(&store).await?;
    let latest = choose(store.latest_runs(tenant_id).await?, wanted.as_deref()).map_err(CliError::Failed)?;
    let items = store.missing(tenant_id, &latest.selection_hash).await?;
    print(&latest, &items, context)?;
    Ok(Outcome::Done)
}

/// Run that "missing" refers to. The absence of a run is an error, to distinguish it from an empty result.
fn choose(mut latest: Vec<Run>, wanted: Option<&str>) -> Result<Run, String> {
    if let Some(hash) = wanted {
        latest.retain(|run| run.selection_hash == hash);
        return latest
            .pop()
            .ok_or_else(|| format!("no completed run of selection {hash}; request one with `inventoryd request`"));
    }
    match latest.len() {
        0 => Err("no completed run of this tenant; request one with `inventoryd request`".to_owned()),
        1 => Ok(latest.remove(0)),
        _ => {
            let each =
                |run: &Run| format!("--selection-hash {}  {}", run.selection_hash, run.selection.canonical_json());
            let each: Vec<String> = latest.iter().map(each).collect();
            Err(format!("the tenant has {} selections; choose one:\n{}", each.len(), each.join("\n")))
        }
    }
}

fn print(latest: &Run, items: &[MissingItem], context: &mut Context<'_>) -> Result<(), CliError> {
    let high = items.iter().filter(|item| item.confidence == "high").count();
    if context.out.is_json() {
        return context.out.json(&Document {
            tenant_id: latest.tenant_id,
            selection_hash: &latest.selection_hash,
            run_id: latest.run_id,
            run_status: latest.status,
            run_finished_at: latest.finished_at.as_deref(),
            high,
            low: items.len() - high,
            items,
        });
    }
    let times = context.out.times();
    if !items.is_empty() {
        let header = ["type", "name", "id", "last seen", "confidence", "type complete"];
        context.out.rows(header, &["type complete", "last seen"], items, |item| {
            [
                item.policy_type.clone(),
                or_dash(item.display_name.as_ref()),
                item.external_id.clone(),
                times.show(&item.last_seen_at),
                item.confidence.clone(),
                yes(item.type_complete),
            ]
        })?;
    }
    context.out.line(format_args!(
        "{} missing ({high} high confidence, {} low), relative to run {} of {}, {}",
        items.len(),
        items.len() - high,
        latest.run_id,
        times.show(&latest.started_at),
        latest.status.as_str()
    ))
}
