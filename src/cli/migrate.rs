//! `inventoryd migrate`: migrates the database schema to this version.

use serde_json::json;

use super::{CliError, Context, Outcome};
use crate::store::Store;

/// Migrate the database schema to this version; idempotent
#[derive(Debug, clap::Args)]
pub(super) struct Args {}

pub(super) async fn run(_: &Args, context: &mut Context<'_>) -> Result<Outcome, CliError> {
    let config = context.config()?;
    let store = Store::connect(&config.database)?;
    // Checked first for a precise error: a migration against an unreachable database reports only that it failed.
    store.ping().await?;
    store.migrate().await?;
    if context.out.is_json() {
        context.out.json(&json!({ "migrated": true }))?;
    } else {
        context.out.line("the database schema is up to date")?;
    }
    Ok(Outcome::Done)
}
