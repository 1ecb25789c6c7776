//! Registered tenants.

use schemars::JsonSchema;
use serde::Serialize;
use uuid::Uuid;

use super::{Store, StoreError};
use crate::domain::event::rfc3339;

/// A tenant to register.
#[derive(Debug, Clone)]
pub struct NewTenant {
    /// Entra directory id.
    pub tenant_id: Uuid,
    /// Name for people.
    pub display_name: String,
    /// Name of the credential used to read it.
    pub credential: String,
    /// Limit of concurrent runs; none means `limits.tenant_max_runs`.
    pub max_concurrent_runs: Option<i32>,
}

/// A registered tenant.
#[derive(Debug, Clone, Serialize, JsonSchema)]
pub struct Tenant {
    /// Entra directory id.
    pub tenant_id: Uuid,
    /// Name for people.
    pub display_name: String,
    /// False if its requests are skipped.
    pub enabled: bool,
    /// Limit of concurrent runs; none means `limits.tenant_max_runs`.
    pub max_concurrent_runs: Option<i32>,
    /// Name of the credential used to read it.
    pub credential: String,
    /// Time of registration, RFC 3339.
    pub created_at: String,
    /// Number of items ever observed.
    pub items_count: i64,
}

impl Store {
    /// Registers a tenant, or gives a registered one a new name, credential and limit.
    pub async fn add_tenant(&self, tenant: &NewTenant) -> Result<(), StoreError> {
        sqlx::query!(
            "insert into tenants (tenant_id, display_name, credential, max_concurrent_runs) values ($1, $2, $3, $4)
             on conflict (tenant_id) do update set display_name = excluded.display_name,
                credential = excluded.credential, max_concurrent_runs = excluded.max_concurrent_runs",
            tenant.tenant_id,
            tenant.display_name,
            tenant.credential,
            tenant.max_concurrent_runs
        )
        .execute(&self.control)
        .await?;
        Ok(())
    }

    /// Tenants, sorted by name.
    pub async fn list_tenants(&self) -> Result<Vec<Tenant>, StoreError> {
        let rows = sqlx::query!(
            r#"select t.tenant_id, t.display_name, t.enabled, t.max_concurrent_runs, t.credential, t.created_at,
                      (select count(*) from inventory_items i where i.tenant_id = t.tenant_id) as "items_count!"
                 from tenants t order by t.display_name, t.tenant_id"#
        )
        .fetch_all(&self.control)
        .await?;
        let tenants = rows.into_iter().map(|row| Tenant {
            tenant_id: row.tenant_id,
            display_name: row.display_name,
            enabled: row.enabled,
            max_concurrent_runs: row.max_concurrent_runs,
            credential: row.credential,
            created_at: rfc3339(row.created_at),
            items_count: row.items_count,
        });
        Ok(tenants.collect())
    }

    /// Ids of all tenants.
    pub async fn tenant_ids(&self) -> Result<Vec<Uuid>, StoreError> {
        Ok(sqlx::query_scalar!("select tenant_id from tenants").fetch_all(&self.control).await?)
    }

    /// Enables or disables a tenant; returns whether it is registered.
    pub async fn set_tenant_enabled(&self, tenant_id: Uuid, enabled: bool) -> Result<bool, StoreError> {
        let changed = sqlx::query!("update tenants set enabled = $2 where tenant_id = $1", tenant_id, enabled);
        Ok(changed.execute(&self.control).await?.rows_affected() == 1)
    }

    /// Name of the credential of a tenant, if it is registered.
    pub async fn tenant_credential(&self, tenant_id: Uuid) -> Result<Option<String>, StoreError> {
        let credential = sqlx::query_scalar!("select credential from tenants where tenant_id = $1", tenant_id);
        Ok(credential.fetch_optional(&self.control).await?)
    }
}
