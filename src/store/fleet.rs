//! What replicas know of each other: how many they are, and where Graph asked to be left alone.

use std::time::Duration;

use uuid::Uuid;

use super::{Store, StoreError};

/// A gate that some replica has closed.
#[derive(Debug, Clone, PartialEq)]
pub struct ClosedGate {
    /// The tenant.
    pub tenant_id: Uuid,
    /// Which limits of Graph.
    pub family: String,
    /// Seconds that it stays closed, by the database's clock.
    pub left_s: f64,
}

impl Store {
    /// Says that `replica` lives, and counts those that said so within `silent_after`, this one included.
    ///
    /// # Errors
    /// If the database is away.
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
        self.in_time(async { Ok(count.fetch_one(&self.control).await?) }).await
    }

    /// Says that `replica` lives no more.
    ///
    /// # Errors
    /// If the database is away; then it is forgotten after its silence.
    pub async fn leave_fleet(&self, replica: &str) -> Result<(), StoreError> {
        sqlx::query!("delete from daemon_replicas where replica = $1", replica).execute(&self.control).await?;
        Ok(())
    }

    /// Closes a gate for every replica; a longer closure stays.
    ///
    /// # Errors
    /// If the database is away.
    pub async fn close_gate(&self, tenant_id: Uuid, family: &str, closed_for: Duration) -> Result<(), StoreError> {
        sqlx::query!(
            "insert into tenant_gates as g values ($1, $2, clock_timestamp() + make_interval(secs => $3))
             on conflict (tenant_id, family) do update set closed_until = excluded.closed_until
              where g.closed_until < excluded.closed_until",
            tenant_id,
            family,
            closed_for.as_secs_f64()
        )
        .execute(&self.control)
        .await?;
        Ok(())
    }

    /// Every gate that is closed.
    ///
    /// # Errors
    /// If the database is away.
    pub async fn closed_gates(&self) -> Result<Vec<ClosedGate>, StoreError> {
        let gates = sqlx::query_as!(
            ClosedGate,
            r#"select tenant_id, family, extract(epoch from closed_until - clock_timestamp())::float8 as "left_s!"
                 from tenant_gates where closed_until > clock_timestamp()"#
        );
        self.in_time(async { Ok(gates.fetch_all(&self.control).await?) }).await
    }
}
