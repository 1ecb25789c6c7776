//! `inventoryd migrate`: brings the database's schema to this version.

use serde_json::json;

use super::{CliError, Context, Outcome};
use crate::store::Store;

/// Bring the database's schema to this version; does nothing if it is
#[derive(Debug, clap::Args)]
pub(super) struct Args {}

pub(super) async fn run(_: &Args, context: &mut Context<'_>) -> Result<Outcome, CliError> {
    let config = context.config()?;
    let store = Store::connect(&config.database)?;
    // Asked first, because a migration says of a database that is away only that it failed.
    store.ping().await?;
    store.migrate().await?;
    if context.out.is_json() {
        context.out.json(&json!({ "migrated": true }))?;
    } else {
        context.out.line("the database's schema is the one of this version")?;
    }
    Ok(Outcome::Done)
}
