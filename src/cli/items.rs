//! `inventoryd items`: lists the items of a tenant.

use clap::Subcommand;
use time::OffsetDateTime;

use super::ids::IdPrefix;
use super::moment::moment;
use super::output::or_dash;
use super::{CliError, Context, Outcome};
use crate::store::{Item, ItemFilter};

/// List the items of a tenant: what exists, what changed, what is missing
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// List the items of a tenant, by type and name
    List(List),
}

#[derive(Debug, clap::Args)]
struct List {
    /// Tenant id, or a unique prefix
    #[arg(long, value_name = "GUID")]
    tenant: IdPrefix,
    /// Only items of these policy types, separated by commas
    #[arg(long = "type", value_name = "TYPE", value_delimiter = ',')]
    policy_types: Vec<String>,
    /// Only items that appeared or changed at this time or later: RFC 3339, or an age such as 24h or 7d
    #[arg(long, value_name = "TIME", value_parser = moment)]
    changed_since: Option<OffsetDateTime>,
    /// Items that the latest complete list of their type no longer contained, instead of the current ones
    #[arg(long, conflicts_with = "changed_since")]
    missing: bool,
    /// Print comma-separated values with a header
    #[arg(long, conflicts_with = "json")]
    csv: bool,
}

const CSV_HEADER: [&str; 9] = [
    "policy_type",
    "external_id",
    "display_name",
    "category",
    "platform",
    "first_seen_at",
    "last_changed_at",
    "last_seen_at",
    "last_seen_run_id",
];

pub(super) async fn run(args: Args, context: &mut Context<'_>) -> Result<Outcome, CliError> {
    let Action::List(args) = args.action;
    let store = context.store().await?;
    let filter = ItemFilter {
        tenant_id: args.tenant.registered_tenant(&store).await?,
        policy_types: args.policy_types,
        changed_since: args.changed_since,
        missing: args.missing,
    };
    let items = store.list_items(&filter).await?;
    if args.csv { print_csv(&items, context) } else { print_table(&items, context) }?;
    Ok(Outcome::Done)
}

fn print_table(items: &[Item], context: &mut Context<'_>) -> Result<(), CliError> {
    let times = context.out.times();
    let header = ["type", "name", "id", "platform", "first seen", "changed", "last seen"];
    context.out.rows(header, &["first seen", "platform", "last seen", "changed"], items, |item| {
        [
            item.policy_type.clone(),
            or_dash(item.display_name.as_ref()),
            item.external_id.clone(),
            or_dash(item.platform.as_ref()),
            times.show(&item.first_seen_at),
            times.show(&item.last_changed_at),
            times.show(&item.last_seen_at),
        ]
    })
}

fn print_csv(items: &[Item], context: &mut Context<'_>) -> Result<(), CliError> {
    context.out.csv_row(&CSV_HEADER)?;
    for item in items {
        let run_id = item.last_seen_run_id.to_string();
        context.out.csv_row(&[
            &item.policy_type,
            &item.external_id,
            item.display_name.as_deref().unwrap_or_default(),
            &item.category,
            item.platform.as_deref().unwrap_or_default(),
            &item.first_seen_at,
            &item.last_changed_at,
            &item.last_seen_at,
            &run_id,
        ])?;
    }
    Ok(())
}
