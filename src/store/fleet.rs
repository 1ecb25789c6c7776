//! State that replicas share: who is running, and the pauses that Graph asked for.

use std::time::Duration;

use uuid::Uuid;

use super::{Store, StoreError};

/// Longest pause that is believed; a row can hold anything, `infinity` included.
const MAX_PAUSE_S: f64 = 86_400.0;

/// A pause that some replica announced.
#[derive(Debug, Clone, PartialEq)]
pub struct TenantPause {
    /// The tenant.
    pub tenant_id: Uuid,
    /// Throttling family of Graph.
    pub family: String,
    /// Remaining seconds, by the database clock.
    pub left_s: f64,
}

impl Store {
    /// Records a heartbeat of `replica` and returns the number of replicas with one within `silent_after`, this one included.
    pub async fn count_replicas(&self, replica: &str, silent_after: Duration) -> Result<i64, StoreError> {
        let count = sqlx::query_scalar!(
            r#"with me as (
                 insert into daemon_replicas values ($1, clock_timestamp())
                 on conflict (replica) do update set seen_at = excluded.seen_at),
               gone as (
                 delete from daemon_replicas where replica <> $1 and seen_at < clock_timestamp() - interval '1 hour')
               select count(*) + 1 as "count!" from daemon_replicas
                where replica <> $1 and seen_at > clock_timestamp() - make_interval(secs => $2)"#,
            replica,
            silent_after.as_secs_f64()
        );
        self.with_timeout(async { Ok(count.fetch_one(&self.control).await?) }).await
    }

    /// Removes `replica`. If this fails it stops counting once its heartbeat is old.
    pub async fn leave_fleet(&self, replica: &str) -> Result<(), StoreError> {
        sqlx::query!("delete from daemon_replicas where replica = $1", replica).execute(&self.control).await?;
        Ok(())
    }

    /// Announces a pause to every replica; a longer one stays.
    pub async fn announce_pause(&self, tenant_id: Uuid, family: &str, pause: Duration) -> Result<(), StoreError> {
        sqlx::query!(
            "insert into tenant_pauses as p values ($1, $2, clock_timestamp() + make_interval(secs => $3))
             on conflict (tenant_id, family) do update set paused_until = excluded.paused_until
              where p.paused_until < excluded.paused_until",
            tenant_id,
            family,
            pause.as_secs_f64().min(MAX_PAUSE_S)
        )
        .execute(&self.control)
        .await?;
        Ok(())
    }

    /// Pauses that have not ended.
    pub async fn pauses(&self) -> Result<Vec<TenantPause>, StoreError> {
        let pauses = sqlx::query_as!(
            TenantPause,
            r#"select tenant_id, family,
                      extract(epoch from least(paused_until, clock_timestamp() + make_interval(secs => $1)) - clock_timestamp())::float8
                        as "left_s!"
                 from tenant_pauses where paused_until > clock_timestamp()"#,
            MAX_PAUSE_S
        );
        self.with_timeout(async { Ok(pauses.fetch_all(&self.control).await?) }).await
    }
}
