//! Admission: decides what happens to a request, in one function of the database that is serialised per tenant.

use std::collections::BTreeMap;
use std::time::Instant;

use serde::Serialize;
use sqlx::PgConnection;
use time::OffsetDateTime;
use uuid::Uuid;

use super::batcher::{Batched, Executed};
use super::run_row::outcomes_of;
use super::{Store, StoreError, error::corrupt_row};
use crate::config::WhenFull;
use crate::domain::clock::ObservationClock;
use crate::domain::failure::ErrorCode;
use crate::domain::request::SyncRequest;
use crate::domain::run::{Lease, RunKey, TypeOutcome};
use crate::domain::selection::Selection;

/// Rules that a replica applies to every admission.
#[derive(Debug, Clone)]
pub struct AdmissionRules {
    /// Name of the replica, recorded on its leases.
    pub owner: String,
    /// Duration of a lease in seconds.
    pub lease_s: u64,
    /// Limit of attempts of a run; orderly hand-backs do not count.
    pub max_attempts: i32,
    /// Limit of concurrent runs of a tenant that has no limit of its own.
    pub tenant_max_runs: u32,
    /// Limit of concurrent runs over all tenants; 0 is no limit.
    pub fleet_max_runs: u32,
    /// Treatment of a request over a limit.
    pub when_full: WhenFull,
    /// Seconds that a request may be deferred in all.
    pub defer_max_s: u64,
    /// Seconds that the replica has to publish the event of a skipped run before others may.
    pub event_due_s: u64,
}

/// A request to be admitted.
#[derive(Debug, Clone, Copy)]
pub struct AdmissionRequest<'a> {
    /// The request.
    pub request: &'a SyncRequest,
    /// Hash of its selection.
    pub selection_hash: &'a str,
    /// W3C trace context.
    pub traceparent: Option<&'a str>,
    /// Seconds that the request was deferred so far.
    pub deferred_s: u64,
}

/// Decision about a request.
#[derive(Debug)]
pub enum Admission {
    /// The run may start, under a lease.
    Admitted(Admitted),
    /// A skipped run was recorded and its event is due.
    Skipped(ErrorCode, RunKey),
    /// This run, of the same key or selection, has used up its attempts: fail it, then ask again.
    Exhausted(RunKey),
    /// The run of the key is in a terminal state.
    Duplicate,
    /// Another worker has the run of the key.
    InProgress,
    /// This replica has a lease on the run of the key.
    HeldHere(Lease),
    /// A limit is reached, and the request may be retried later.
    Deferred(ErrorCode),
    /// The tenant is not registered.
    UnknownTenant,
    /// The key was used for another selection.
    IdempotencyConflict,
}

/// A lease on a run, and the state that earlier attempts left.
#[derive(Debug)]
pub struct Admitted {
    /// Right to write, with its fencing token.
    pub lease: Lease,
    /// Time before the lease was requested: counted from here it ends before the database gives it to another replica.
    pub granted: Instant,
    /// Credential of the tenant.
    pub credential: String,
    /// Time since the run was first admitted, which counts against its deadline.
    pub age: std::time::Duration,
    /// Milliseconds that earlier attempts waited because of throttling.
    pub throttle_wait_ms: i64,
    /// Database time of observations.
    pub clock: ObservationClock,
    /// Outcomes of the types that an earlier attempt finished.
    pub finished: BTreeMap<String, TypeOutcome>,
}

/// Row of `inventory_admit`.
#[derive(Debug)]
pub(super) struct Decision {
    decision: String,
    error_code: Option<String>,
    run_id: Option<Uuid>,
    attempt: Option<i32>,
    credential: Option<String>,
    decided_at: Option<OffsetDateTime>,
    started_at: Option<OffsetDateTime>,
    throttle_wait_ms: Option<i64>,
}

impl Store {
    /// Decides about a request; all times are those of the database.
    ///
    /// # Errors
    /// [`StoreError::is_lock_timeout`] if another session holds the tenant's row. After any other error the request may be admitted: the
    /// reply was lost.
    pub async fn admit(
        &self,
        rules: &AdmissionRules,
        admission: &AdmissionRequest<'_>,
    ) -> Result<Admission, StoreError> {
        let call = AdmissionCall::of(rules, admission);
        let json = serde_json::to_string(&call).expect("strings and numbers always serialise");
        let Executed { sent, row: decided } = match self.admissions.execute(call.tenant_id, json).await? {
            Some(executed) => executed,
            None => self.admit_alone(&call).await?,
        };
        let mut result = decided.into_admission(call.tenant_id, sent)?;
        if let Admission::Admitted(admitted) = &mut result
            && admitted.lease.attempt > 1
        {
            let run = [admitted.lease.run()];
            let mut connection = self.work.acquire().await?;
            let mut outcomes = self.with_timeout(outcomes_of(&mut connection, &run)).await?;
            let finished = outcomes.remove(&run[0]).unwrap_or_default();
            admitted.finished = finished.into_iter().map(|outcome| (outcome.policy_type.clone(), outcome)).collect();
        }
        Ok(result)
    }

    /// Admits a request whose batch had no effect: another session holds the row of one of its tenants, or one of its calls failed.
    async fn admit_alone(&self, call: &AdmissionCall<'_>) -> Result<Executed<Decision>, StoreError> {
        let mut connection = self.work.acquire().await?;
        let sent = Instant::now();
        let decided = sqlx::query_as!(
            Decision,
            r#"select decision as "decision!", error_code, run_id, attempt, credential, decided_at, started_at, throttle_wait_ms
                 from inventory_admit($1, $2, $3, $4::text::jsonb, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15)"#,
            call.tenant_id,
            call.idempotency_key,
            call.selection_hash,
            call.selection.canonical_json(),
            call.correlation_id,
            call.requested_by,
            call.traceparent,
            call.owner,
            call.lease_s as f64,
            call.max_attempts,
            i64::from(call.tenant_max_runs),
            i64::from(call.fleet_max_runs),
            call.may_defer,
            call.event_due_s as f64,
            call.daemon_version
        )
        .fetch_one(&mut *connection);
        self.with_timeout(async { Ok(Executed { sent, row: decided.await? }) }).await
    }
}

impl Batched for Decision {
    async fn execute(connection: &mut PgConnection, requests: String) -> sqlx::Result<Vec<Self>> {
        let decided = sqlx::query_as!(
            Decision,
            r#"select decision as "decision!", error_code, run_id, attempt, credential, decided_at, started_at, throttle_wait_ms
                 from inventory_admit_batch($1::text::jsonb)"#,
            requests
        );
        decided.fetch_all(connection).await
    }
}

/// Arguments of `inventory_admit`.
#[derive(Serialize)]
struct AdmissionCall<'a> {
    tenant_id: Uuid,
    idempotency_key: &'a str,
    selection_hash: &'a str,
    selection: &'a Selection,
    correlation_id: Option<&'a str>,
    requested_by: Option<&'a str>,
    traceparent: Option<&'a str>,
    owner: &'a str,
    lease_s: u64,
    max_attempts: i32,
    tenant_max_runs: u32,
    fleet_max_runs: u32,
    may_defer: bool,
    event_due_s: u64,
    daemon_version: &'static str,
}

impl<'a> AdmissionCall<'a> {
    fn of(rules: &'a AdmissionRules, admission: &AdmissionRequest<'a>) -> Self {
        let request = admission.request;
        Self {
            tenant_id: request.tenant_id,
            idempotency_key: &request.idempotency_key,
            selection_hash: admission.selection_hash,
            selection: &request.selection,
            correlation_id: request.correlation_id.as_deref(),
            requested_by: request.requested_by.as_deref(),
            traceparent: admission.traceparent,
            owner: &rules.owner,
            lease_s: rules.lease_s,
            max_attempts: rules.max_attempts,
            tenant_max_runs: rules.tenant_max_runs,
            fleet_max_runs: rules.fleet_max_runs,
            may_defer: rules.when_full == WhenFull::Defer && admission.deferred_s < rules.defer_max_s,
            event_due_s: rules.event_due_s,
            daemon_version: env!("CARGO_PKG_VERSION"),
        }
    }
}

impl Decision {
    fn into_admission(self, tenant_id: Uuid, granted: Instant) -> Result<Admission, StoreError> {
        let missing = || corrupt_row("inventory_admit returned a decision without its values");
        let run = || self.run_id.map(|run_id| RunKey { tenant_id, run_id }).ok_or_else(missing);
        let code = || self.error_code.as_deref().and_then(|code| code.parse().ok()).ok_or_else(missing);
        Ok(match self.decision.as_str() {
            "admitted" => {
                let (Some(attempt), Some(started_at), Some(decided_at)) =
                    (self.attempt, self.started_at, self.decided_at)
                else {
                    return Err(missing());
                };
                Admission::Admitted(Admitted {
                    lease: Lease { tenant_id, run_id: run()?.run_id, attempt },
                    granted,
                    credential: self.credential.clone().unwrap_or_default(),
                    // Negative if the clock of the server was set back: then nothing has passed.
                    age: (decided_at - started_at).try_into().unwrap_or_default(),
                    throttle_wait_ms: self.throttle_wait_ms.unwrap_or_default(),
                    clock: ObservationClock::new(started_at, decided_at, Instant::now()),
                    finished: BTreeMap::new(),
                })
            }
            "skipped" => Admission::Skipped(code()?, run()?),
            "exhausted" => Admission::Exhausted(run()?),
            "duplicate" => Admission::Duplicate,
            "in_progress" => Admission::InProgress,
            "held_here" => {
                let attempt = self.attempt.ok_or_else(missing)?;
                Admission::HeldHere(Lease { tenant_id, run_id: run()?.run_id, attempt })
            }
            "deferred" => Admission::Deferred(code()?),
            "unknown_tenant" => Admission::UnknownTenant,
            "idempotency_conflict" => Admission::IdempotencyConflict,
            other => return Err(corrupt_row(format_args!("inventory_admit decided {other:?}"))),
        })
    }
}
