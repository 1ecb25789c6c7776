//! `inventoryd tenant`: registers tenants and enables or disables them.

use clap::Subcommand;
use serde_json::json;
use uuid::Uuid;

use super::ids::{IdPrefix, unknown_tenant};
use super::output::{or_dash, yes};
use super::{CliError, Context, Outcome, note};
use crate::config::credential_by_name;
use crate::store::{NewTenant, Store, Tenant};

/// Register tenants, list them, enable and disable them
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Register a tenant, or change the given values of a registered one
    Add(Add),
    /// List the tenants
    List,
    /// Enable requests for a tenant
    Enable(Which),
    /// Disable a tenant: its requests are recorded as skipped, with an event
    Disable(Which),
}

#[derive(Debug, clap::Args)]
struct Add {
    /// Tenant id (Entra directory id)
    #[arg(value_name = "GUID", value_parser = directory_id)]
    tenant_id: Uuid,
    /// Display name [default: the id]
    #[arg(long, value_parser = label::<200>)]
    name: Option<String>,
    /// Name of a credential in graph.credentials [default: default]
    #[arg(long, value_name = "NAME", value_parser = label::<100>)]
    credential: Option<String>,
    /// Maximum concurrent runs [default: limits.tenant_max_runs]
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(i32).range(1..))]
    max_runs: Option<i32>,
}

/// Validates a tenant id by the rules of a request.
fn directory_id(text: &str) -> Result<Uuid, String> {
    match Uuid::try_parse(text) {
        Ok(id) if text.len() == 36 && !id.is_nil() => Ok(id),
        _ => Err("expected the GUID of a directory, such as 6a5b1a3e-3e24-4d1c-9d7b-0c3f1a2b3c4d".to_owned()),
    }
}

/// Validates a text for its database column.
fn label<const MOST: usize>(text: &str) -> Result<String, String> {
    let fits = (1..=MOST).contains(&text.chars().count()) && !text.chars().any(char::is_control);
    if fits { Ok(text.to_owned()) } else { Err(format!("1 to {MOST} characters without control characters")) }
}

#[derive(Debug, clap::Args)]
struct Which {
    /// Tenant id, or a unique prefix
    #[arg(value_name = "GUID")]
    tenant_id: IdPrefix,
}

pub(super) async fn run(args: Args, context: &mut Context<'_>) -> Result<Outcome, CliError> {
    let store = context.store().await?;
    match args.action {
        Action::Add(args) => add(args, &store, context).await,
        Action::List => list(&store, context).await,
        Action::Enable(Which { tenant_id }) => set_enabled(tenant_id, true, &store, context).await,
        Action::Disable(Which { tenant_id }) => set_enabled(tenant_id, false, &store, context).await,
    }?;
    Ok(Outcome::Done)
}

async fn add(args: Add, store: &Store, context: &mut Context<'_>) -> Result<(), CliError> {
    let credentials = context.config()?.graph.credentials;
    let registered = store.list_tenants().await?.into_iter().find(|tenant| tenant.tenant_id == args.tenant_id);
    let is_new = registered.is_none();
    let tenant = merge(args, registered);
    if credential_by_name(&credentials, &tenant.credential).is_none() {
        note(format_args!(
            "note: graph.credentials.{} is not in this configuration; make sure that it is in the daemon's",
            tenant.credential
        ));
    }
    store.add_tenant(&tenant).await?;
    if context.out.is_json() {
        return context.out.json(&json!({
            "tenant_id": tenant.tenant_id, "display_name": tenant.display_name, "credential": tenant.credential,
            "max_concurrent_runs": tenant.max_concurrent_runs, "new": is_new }));
    }
    let what = if is_new { "registered" } else { "changed" };
    context.out.line(format_args!("{what} {} ({})", tenant.tenant_id, tenant.display_name))
}

/// Applies the given values; the others keep their current values.
fn merge(args: Add, registered: Option<Tenant>) -> NewTenant {
    let (name, credential, max_runs) = match registered {
        Some(tenant) => (tenant.display_name, tenant.credential, tenant.max_concurrent_runs),
        None => (args.tenant_id.to_string(), "default".to_owned(), None),
    };
    NewTenant {
        tenant_id: args.tenant_id,
        display_name: args.name.unwrap_or(name),
        credential: args.credential.unwrap_or(credential),
        max_concurrent_runs: args.max_runs.or(max_runs),
    }
}

async fn list(store: &Store, context: &mut Context<'_>) -> Result<(), CliError> {
    let tenants = store.list_tenants().await?;
    let header = ["tenant", "name", "enabled", "credential", "max runs", "items", "registered"];
    let times = context.out.times();
    context.out.rows(header, &["registered", "credential", "max runs", "enabled"], &tenants, |tenant| {
        [
            tenant.tenant_id.to_string(),
            tenant.display_name.clone(),
            yes(tenant.enabled),
            tenant.credential.clone(),
            or_dash(tenant.max_concurrent_runs.as_ref()),
            tenant.items_count.to_string(),
            times.show(&tenant.created_at),
        ]
    })
}

async fn set_enabled(id: IdPrefix, enabled: bool, store: &Store, context: &mut Context<'_>) -> Result<(), CliError> {
    let id = id.tenant(store).await?;
    if !store.set_tenant_enabled(id, enabled).await? {
        return Err(unknown_tenant(id));
    }
    if context.out.is_json() {
        return context.out.json(&json!({ "tenant_id": id, "enabled": enabled }));
    }
    context.out.line(format_args!("{} {id}", if enabled { "enabled" } else { "disabled" }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_that_no_request_may_name_are_refused() {
        assert!(directory_id("6a5b1a3e-3e24-4d1c-9d7b-0c3f1a2b3c4d").is_ok());
        for wrong in [Uuid::nil().to_string().as_str(), "{6a5b1a3e-3e24-4d1c-9d7b-0c3f1a2b3c4d}", "contoso", ""] {
            assert!(directory_id(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn adding_again_changes_only_given_values() {
        let args = |name: Option<&str>| Add {
            tenant_id: Uuid::from_u128(7),
            name: name.map(str::to_owned),
            credential: None,
            max_runs: None,
        };
        let new = merge(args(None), None);
        assert_eq!((new.display_name, new.credential), (Uuid::from_u128(7).to_string(), "default".to_owned()));
        let registered = Tenant {
            tenant_id: Uuid::from_u128(7),
            display_name: "Contoso".to_owned(),
            enabled: false,
            max_concurrent_runs: Some(3),
            credential: "emea".to_owned(),
            created_at: String::new(),
            items_count: 0,
        };
        let changed = merge(args(Some("Fabrikam")), Some(registered));
        assert_eq!((changed.display_name.as_str(), changed.credential.as_str()), ("Fabrikam", "emea"));
        assert_eq!(changed.max_concurrent_runs, Some(3));
    }
}
