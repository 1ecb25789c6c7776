//! State that replicas share: who is running, the pauses that Graph asked for, and turns of limits that are too low to be
//! divided.

use std::time::Duration;

use uuid::Uuid;

use super::{Store, StoreError};
use crate::domain::run::RunKey;

/// Longest pause that is believed; a row can hold anything, `infinity` included.
const MAX_PAUSE_S: f64 = 86_400.0;

/// Longest wait for a turn that is believed, for the same reason and because the clock may have been set back.
const MAX_TURN_WAIT_S: f64 = 600.0;
/// Ending of the family under which the next turn is kept: until then no replica sends a request, as in a pause.
const TURN: &str = "_turn";

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
                 from tenant_pauses where paused_until > clock_timestamp() and right(family, length($2)) <> $2"#,
            MAX_PAUSE_S,
            TURN
        );
        self.with_timeout(async { Ok(pauses.fetch_all(&self.control).await?) }).await
    }

    /// Takes the next turn of a tenant and family, `interval` before the one after it, and returns the wait until then.
    pub async fn take_turn(&self, tenant_id: Uuid, family: &str, interval: Duration) -> Result<Duration, StoreError> {
        // The row's lock orders the replicas; clock_timestamp() is read after the wait for it.
        let wait_s = sqlx::query_scalar!(
            r#"insert into tenant_pauses as p values ($1, $2, clock_timestamp() + make_interval(secs => $3))
               on conflict (tenant_id, family) do update
                 set paused_until = make_interval(secs => $3)
                       + greatest(least(p.paused_until, clock_timestamp() + make_interval(secs => $4)), clock_timestamp())
               returning extract(epoch from paused_until - clock_timestamp())::float8 - $3 as "wait_s!""#,
            tenant_id,
            format!("{family}{TURN}"),
            interval.as_secs_f64(),
            MAX_TURN_WAIT_S
        );
        let wait_s = self.with_timeout(async { Ok(wait_s.fetch_one(&self.control).await?) }).await?;
        Ok(Duration::from_secs_f64(wait_s.clamp(0.0, MAX_TURN_WAIT_S)))
    }

    /// Returns `true` if no run of the tenant but `run` was at work within `window`. Runs that began more than
    /// `longest_run` before it have ended.
    pub async fn tenant_was_idle(
        &self,
        run: RunKey,
        window: Duration,
        longest_run: Duration,
    ) -> Result<bool, StoreError> {
        let idle = sqlx::query_scalar!(
            r#"select not exists (select from inventory_sync_runs where tenant_id = $1 and id <> $2 and status = 'running')
                  and not exists (select from inventory_sync_runs
                                   where tenant_id = $1 and id <> $2 and status not in ('running', 'skipped')
                                     and id >= inventory_run_id_at(clock_timestamp() - make_interval(secs => $3) - make_interval(secs => $4))
                                     and finished_at > clock_timestamp() - make_interval(secs => $3)) as "idle!""#,
            run.tenant_id,
            run.run_id,
            window.as_secs_f64(),
            longest_run.as_secs_f64()
        );
        self.with_timeout(async { Ok(idle.fetch_one(&self.control).await?) }).await
    }
}
