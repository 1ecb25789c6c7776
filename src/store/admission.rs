//! Admission: one transaction that decides what becomes of a request, serialised per tenant by its `tenants` row. Where
//! nothing stands in the way it is one statement.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use sqlx::PgConnection;
use tracing::warn;
use uuid::Uuid;

use super::recording::RunRow;
use super::transaction::Transaction;
use super::{Store, StoreError, run_types, runs};
use crate::config::WhenFull;
use crate::domain::failure::ErrorCode;
use crate::domain::request::SyncRequest;
use crate::domain::run::{Lease, RunStatus, TypeOutcome};
use crate::telemetry;

/// What a replica brings to every admission.
#[derive(Debug, Clone)]
pub struct AdmissionRules {
    /// The replica's name, written on the leases that it gets.
    pub owner: String,
    /// Seconds that a lease lasts.
    pub lease_s: u64,
    /// Workers that a run may lose.
    pub max_attempts: i32,
    /// Running runs of a tenant that has no limit of its own.
    pub tenant_max_runs: u32,
    /// Running runs over all tenants; 0 is no limit.
    pub fleet_max_runs: u32,
    /// What happens over a limit.
    pub when_full: WhenFull,
    /// Seconds that a request may be deferred in all.
    pub defer_max_s: u64,
}

/// A request that asks to be admitted.
#[derive(Debug, Clone, Copy)]
pub struct Applicant<'a> {
    /// The request.
    pub request: &'a SyncRequest,
    /// The hash of its selection.
    pub selection_hash: &'a str,
    /// Its W3C trace context.
    pub traceparent: Option<&'a str>,
    /// Seconds that it was deferred so far.
    pub deferred_s: u64,
}

/// What became of a request.
#[derive(Debug)]
pub enum Admission {
    /// It has a lease on a run.
    Admitted(Admitted),
    /// A skipped run was recorded and announced.
    Skipped(ErrorCode),
    /// Its run had lost too many workers: it was ended and announced.
    GivenUp,
    /// Its run has ended before.
    Duplicate,
    /// Another worker is on its run.
    Busy,
    /// It is over a limit and may ask again.
    Deferred(ErrorCode),
    /// Nobody registered the tenant.
    UnknownTenant,
    /// The key was used for another selection.
    Conflict,
}

/// A lease on a run, and what earlier attempts have finished of it.
#[derive(Debug)]
pub struct Admitted {
    /// The right to write.
    pub lease: Lease,
    /// Taken before the lease was asked for: counted from here, it ends before the database gives it away.
    pub granted: Instant,
    /// The credential that reads the tenant.
    pub credential: String,
    /// Types that an earlier attempt has finished.
    pub finished: BTreeMap<String, TypeOutcome>,
}

struct TenantRow {
    enabled: bool,
    credential: String,
    max_runs: i64,
}

struct SameKey {
    id: Uuid,
    selection_hash: String,
    running: bool,
    lease_alive: bool,
    handed_back: bool,
    attempts_left: bool,
}

struct SameSelection {
    id: Uuid,
    /// Its worker holds it, or has handed it back in order: then its message is in the queue, and it will be taken over.
    expected: bool,
}

/// What there is already.
struct Found {
    same_key: Option<SameKey>,
    same_selection: Option<SameSelection>,
    /// Runs of the tenant's other selections that have not ended. One whose worker is gone keeps its place: it may be
    /// taken over at any moment, and is not asked again then.
    others: i64,
}

impl Store {
    /// Decides what becomes of a request, with the database's clock alone.
    ///
    /// # Errors
    /// If the database is away; then nothing was decided.
    pub async fn admit(&self, rules: &AdmissionRules, applicant: &Applicant<'_>) -> Result<Admission, StoreError> {
        if let Some(admitted) = self.in_time(self.admit_at_once(rules, applicant)).await? {
            return Ok(Admission::Admitted(admitted));
        }
        let announced = AtomicBool::new(false);
        let case =
            Case { rules, applicant, deployment: &self.deployment, granted: Instant::now(), announced: &announced };
        let decided = self.in_time(async {
            let mut transaction = Transaction::begin(&self.work).await?;
            let admission = case.decide(&mut transaction).await?;
            transaction.commit().await?;
            Ok(admission)
        });
        let admission = decided.await?;
        if announced.into_inner() {
            self.event_committed.notify_one();
        }
        Ok(admission)
    }

    /// Admits a request that nothing stands in the way of, in one round trip; any other is left to the full decision.
    async fn admit_at_once(
        &self,
        rules: &AdmissionRules,
        applicant: &Applicant<'_>,
    ) -> Result<Option<Admitted>, StoreError> {
        if rules.fleet_max_runs > 0 {
            return Ok(None);
        }
        let (granted, request) = (Instant::now(), applicant.request);
        let lease = Lease { tenant_id: request.tenant_id, run_id: Uuid::now_v7(), attempt: 1 };
        let credential = sqlx::query_scalar!(
            "select inventory_admit_at_once($1, $2, $3, $4, $5::text::jsonb, $6, $7, $8, $9, $10, $11, $12)",
            lease.tenant_id,
            lease.run_id,
            request.idempotency_key,
            applicant.selection_hash,
            request.selection.canonical_json(),
            rules.owner,
            rules.lease_s as f64,
            i64::from(rules.tenant_max_runs),
            request.correlation_id,
            request.requested_by,
            applicant.traceparent,
            env!("CARGO_PKG_VERSION")
        )
        .fetch_one(&self.work)
        .await?;
        Ok(credential.map(|credential| Admitted { lease, granted, credential, finished: BTreeMap::new() }))
    }
}

/// A request under decision.
struct Case<'a> {
    rules: &'a AdmissionRules,
    applicant: &'a Applicant<'a>,
    deployment: &'a str,
    granted: Instant,
    /// Whether an event was written.
    announced: &'a AtomicBool,
}

impl Case<'_> {
    async fn decide(&self, db: &mut PgConnection) -> Result<Admission, StoreError> {
        let (rules, tenant_id) = (self.rules, self.applicant.request.tenant_id);
        let Some(tenant) = lock_tenant(db, tenant_id, rules.tenant_max_runs).await? else {
            return Ok(Admission::UnknownTenant);
        };
        let found = look(db, self.applicant, rules.max_attempts).await?;
        if let Some(same_key) = found.same_key {
            return self.decide_same_key(db, &tenant, same_key).await;
        }
        if !tenant.enabled {
            return self.skip(db, ErrorCode::TenantDisabled).await;
        }
        if let Some(code) = self.over_limit(db, &tenant, &found).await? {
            let deferred = rules.when_full == WhenFull::Defer && self.applicant.deferred_s < rules.defer_max_s;
            return if deferred { Ok(Admission::Deferred(code)) } else { self.skip(db, code).await };
        }
        let lease = Lease { tenant_id, run_id: Uuid::now_v7(), attempt: 1 };
        insert_run(db, lease.run_id, self.applicant, Some(rules)).await?;
        Ok(self.admitted(lease, &tenant, BTreeMap::new()))
    }

    fn admitted(&self, lease: Lease, tenant: &TenantRow, finished: BTreeMap<String, TypeOutcome>) -> Admission {
        Admission::Admitted(Admitted { lease, granted: self.granted, credential: tenant.credential.clone(), finished })
    }

    async fn decide_same_key(
        &self,
        db: &mut PgConnection,
        tenant: &TenantRow,
        same_key: SameKey,
    ) -> Result<Admission, StoreError> {
        if same_key.selection_hash != self.applicant.selection_hash {
            return Ok(Admission::Conflict);
        }
        if !same_key.running {
            return Ok(Admission::Duplicate);
        }
        if same_key.lease_alive {
            return Ok(Admission::Busy);
        }
        if !same_key.attempts_left && !same_key.handed_back {
            self.end_lost(db, same_key.id).await?;
            return Ok(Admission::GivenUp);
        }
        let lease = take_over(db, self.rules, self.applicant.request.tenant_id, same_key.id).await?;
        let finished = run_types::finished(db, &lease).await?;
        Ok(self.admitted(lease, tenant, finished))
    }

    /// The first limit that stands in the way. A run of the same selection whose worker is lost is ended on the way.
    async fn over_limit(
        &self,
        db: &mut PgConnection,
        tenant: &TenantRow,
        found: &Found,
    ) -> Result<Option<ErrorCode>, StoreError> {
        match &found.same_selection {
            Some(run) if run.expected => return Ok(Some(ErrorCode::LockContended)),
            Some(run) => {
                self.end_lost(db, run.id).await?;
                warn!(run_id = %run.id, "a run of the same selection had lost its worker and is ended");
                telemetry::run_ended(RunStatus::Failed);
                telemetry::run_error(ErrorCode::WorkerLost);
            }
            None => {}
        }
        if found.others >= tenant.max_runs {
            return Ok(Some(ErrorCode::ConcurrencyLimitTenant));
        }
        Ok(fleet_is_full(db, self.rules.fleet_max_runs).await?.then_some(ErrorCode::ConcurrencyLimitGlobal))
    }

    async fn end_lost(&self, db: &mut PgConnection, run_id: Uuid) -> Result<(), StoreError> {
        self.announced.store(true, Ordering::Relaxed);
        runs::end_lost(db, self.deployment, self.applicant.request.tenant_id, run_id).await
    }

    async fn skip(&self, db: &mut PgConnection, code: ErrorCode) -> Result<Admission, StoreError> {
        let (run_id, tenant_id) = (Uuid::now_v7(), self.applicant.request.tenant_id);
        insert_run(db, run_id, self.applicant, None).await?;
        let run = sqlx::query_as!(
            RunRow,
            r#"update inventory_sync_runs set had_errors = true, error_codes = array[$3], finished_at = started_at
                where tenant_id = $1 and id = $2
               returning selection_hash, selection_payload, idempotency_key, correlation_id, requested_by, traceparent, status,
                  had_errors, error_codes, items_observed_count, items_upserted_count, items_created_count,
                  items_changed_count, errors_count, graph_requests_count, graph_throttled_count, graph_throttle_wait_ms,
                  items_unclassified_count, graph_select_refused_count, retry_after_s, attempt, started_at, finished_at,
                  daemon_version, '{}'::text[] as "suspicious!", 0::bigint as "missing_high!", 0::bigint as "missing_low!""#,
            tenant_id,
            run_id,
            code.as_str()
        )
        .fetch_one(&mut *db)
        .await?;
        self.announced.store(true, Ordering::Relaxed);
        runs::announce(db, self.deployment, (tenant_id, run_id), (run, Vec::new())).await?;
        Ok(Admission::Skipped(code))
    }
}

async fn lock_tenant(db: &mut PgConnection, tenant_id: Uuid, max_runs: u32) -> Result<Option<TenantRow>, StoreError> {
    let tenant = sqlx::query_as!(
        TenantRow,
        r#"select enabled, credential, coalesce(max_concurrent_runs::bigint, $2) as "max_runs!" from tenants
            where tenant_id = $1 for update"#,
        tenant_id,
        i64::from(max_runs)
    );
    Ok(tenant.fetch_optional(db).await?)
}

/// Everything that decides, in one statement after the tenant's row is locked. A run of the same selection is of no
/// interest beside one of the same key, and is not locked then.
async fn look(db: &mut PgConnection, applicant: &Applicant<'_>, max_attempts: i32) -> Result<Found, StoreError> {
    let found = sqlx::query!(
        r#"with same_key as materialized (
             select id, selection_hash, status = 'running' as running,
                    coalesce(lease_expires_at > clock_timestamp(), false) as lease_alive,
                    lease_owner is null as handed_back, attempt - interruptions < $4 as attempts_left
               from inventory_sync_runs where tenant_id = $1 and idempotency_key = $2 for update),
           same_selection as materialized (
             select id, lease_expires_at > clock_timestamp() or lease_owner is null as expected from inventory_sync_runs
              where tenant_id = $1 and selection_hash = $3 and status = 'running' and not exists (select from same_key)
                for update)
           select k.id as "key_id?", k.selection_hash as "key_hash?", k.running as "key_running?",
                  k.lease_alive as "key_alive?", k.handed_back as "key_handed_back?", k.attempts_left as "key_attempts_left?",
                  s.id as "selection_id?", s.expected as "selection_expected?",
                  (select count(*) from inventory_sync_runs
                    where tenant_id = $1 and status = 'running' and selection_hash <> $3) as "others!"
             from (select) one left join same_key k on true left join same_selection s on true"#,
        applicant.request.tenant_id,
        applicant.request.idempotency_key,
        applicant.selection_hash,
        max_attempts
    )
    .fetch_one(db)
    .await?;
    let same_key = found.key_id.map(|id| SameKey {
        id,
        selection_hash: found.key_hash.unwrap_or_default(),
        running: found.key_running.unwrap_or_default(),
        lease_alive: found.key_alive.unwrap_or_default(),
        handed_back: found.key_handed_back.unwrap_or_default(),
        attempts_left: found.key_attempts_left.unwrap_or_default(),
    });
    let same_selection =
        found.selection_id.map(|id| SameSelection { id, expected: found.selection_expected.unwrap_or_default() });
    Ok(Found { same_key, same_selection, others: found.others })
}

/// The next attempt of a run whose worker is gone. A worker that handed it back in order does not count as lost.
async fn take_over(
    db: &mut PgConnection,
    rules: &AdmissionRules,
    tenant_id: Uuid,
    run_id: Uuid,
) -> Result<Lease, StoreError> {
    let attempt = sqlx::query_scalar!(
        "update inventory_sync_runs
            set attempt = attempt + 1, interruptions = interruptions + (lease_owner is null)::int, lease_owner = $3,
                lease_expires_at = clock_timestamp() + make_interval(secs => $4)
          where tenant_id = $1 and id = $2 and status = 'running' returning attempt",
        tenant_id,
        run_id,
        rules.owner,
        rules.lease_s as f64
    )
    .fetch_one(db)
    .await?;
    Ok(Lease { tenant_id, run_id, attempt })
}

/// The strict limit over all tenants: their rows don't serialise one another, the fleet's one row does.
async fn fleet_is_full(db: &mut PgConnection, max_runs: u32) -> Result<bool, StoreError> {
    if max_runs == 0 {
        return Ok(false);
    }
    sqlx::query!("select only_row from inventory_fleet for update").fetch_one(&mut *db).await?;
    let running =
        sqlx::query_scalar!(r#"select count(*) as "count!" from inventory_sync_runs where status = 'running'"#)
            .fetch_one(db)
            .await?;
    Ok(running >= i64::from(max_runs))
}

/// A run with a lease by `rules`, or a skipped one without.
async fn insert_run(
    db: &mut PgConnection,
    run_id: Uuid,
    applicant: &Applicant<'_>,
    rules: Option<&AdmissionRules>,
) -> Result<(), StoreError> {
    let request = applicant.request;
    sqlx::query!(
        "insert into inventory_sync_runs (tenant_id, id, idempotency_key, selection_hash, selection_payload, status,
            lease_owner, lease_expires_at, correlation_id, requested_by, traceparent, daemon_version, finished_at)
         values ($1, $2, $3, $4, $5::text::jsonb, case when $6::text is null then 'skipped' else 'running' end, $6,
            clock_timestamp() + make_interval(secs => $7), $8, $9, $10, $11,
            case when $6::text is null then clock_timestamp() end)",
        request.tenant_id,
        run_id,
        request.idempotency_key,
        applicant.selection_hash,
        request.selection.canonical_json(),
        rules.map(|rules| rules.owner.as_str()),
        rules.map(|rules| rules.lease_s as f64),
        request.correlation_id,
        request.requested_by,
        applicant.traceparent,
        env!("CARGO_PKG_VERSION")
    )
    .execute(db)
    .await?;
    Ok(())
}
