//! A run from request to terminal state: the only module that knows the order of the steps.

mod collect;
mod lease;
mod list;
mod page_memory;

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, error, info, info_span, warn};
use uuid::Uuid;

pub use lease::LeaseKeeper;

use crate::config::{Config, seconds};
use crate::domain::catalog::{Catalog, Scope};
use crate::domain::clock::Deadline;
use crate::domain::failure::{DeadReason, ErrorCode, Rejection};
use crate::domain::request::SyncRequest;
use crate::domain::run::{RunKey, RunReport, RunStatus};
use crate::graph::{GraphClient, RunBudget};
use crate::store::{
    Admission, AdmissionRequest, AdmissionRules, Admitted, RunEnd, Store, StoreError, SuspiciousDropRule,
};
use crate::telemetry::{self, spans};
use collect::Collector;

/// Limit of remembered admissions without a reply; without the memory of one its run waits for the end of its lease.
const MAX_UNANSWERED: usize = 10_000;

/// A message from the queue.
#[derive(Debug, Clone, Copy)]
pub struct Incoming<'a> {
    /// Body.
    pub body: &'a [u8],
    /// AMQP content type.
    pub content_type: Option<&'a str>,
    /// AMQP content encoding.
    pub content_encoding: Option<&'a str>,
    /// W3C trace context of the publisher.
    pub traceparent: Option<&'a str>,
    /// Seconds that the message has been deferred so far.
    pub deferred_s: u64,
}

/// Decision about a message, returned after its durable effects are committed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Disposition {
    /// The run reached a terminal state, and the event is due.
    Ended(RunStatus),
    /// The run was in a terminal state before.
    Duplicate,
    /// Another worker has its run: retry soon.
    InProgressElsewhere,
    /// A limit is reached: retry later.
    Deferred(ErrorCode),
    /// The request can never be run.
    Rejected(Rejection),
    /// The message goes back to the queue, for any replica.
    HandBack(HandBackReason),
    /// The database is unavailable, read-only or full, for the given reason: nothing can be decided.
    DatabaseUnavailable(String),
    /// The database rejected the data of the run; retrying cannot succeed.
    DataRejected,
}

/// Reason for which a message goes back to the queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HandBackReason {
    /// The lease was lost: another replica has the run.
    LeaseLost,
    /// This process stops.
    Stopping,
}

/// Signals that stop or pause a daemon.
#[derive(Debug, Clone, Default)]
pub struct Stop {
    /// Take no new requests, finish those in flight.
    pub drain: CancellationToken,
    /// Hand every run back now.
    pub abort: CancellationToken,
    /// While `true`: take no new requests, without draining.
    pub paused: tokio::sync::watch::Sender<bool>,
}

/// Handles requests; clones share everything.
#[derive(Debug, Clone)]
pub struct Runner(Arc<RunnerInner>);

#[derive(Debug)]
struct RunnerInner {
    store: Store,
    graph: GraphClient,
    catalog: Catalog,
    leases: LeaseKeeper,
    rules: AdmissionRules,
    settings: RunSettings,
    /// Runs that this process has ended, for the relay to publish their events.
    ended: mpsc::Sender<RunKey>,
    /// Tenant and key of requests whose admission failed without a reply.
    unanswered: Mutex<HashSet<(Uuid, String)>>,
}

/// Settings of every run of this process.
#[derive(Debug, Clone, Copy)]
struct RunSettings {
    deadline: Duration,
    throttle_budget: Duration,
    concurrent_lists: usize,
    batch_rows: usize,
    end: RunEnd,
}

impl Runner {
    /// A runner that signs its leases as `owner` and reports each run that it ended to `ended`.
    #[must_use]
    pub fn new(
        config: &Config,
        owner: &str,
        (store, graph): (Store, GraphClient),
        catalog: Catalog,
        ended: mpsc::Sender<RunKey>,
    ) -> Self {
        let leases = LeaseKeeper::new(store.clone(), owner, config.run.lease_s);
        let rules = AdmissionRules {
            owner: owner.to_owned(),
            lease_s: config.run.lease_s,
            max_attempts: config.run.max_attempts,
            tenant_max_runs: config.limits.tenant_max_runs,
            fleet_max_runs: config.limits.fleet_max_runs,
            when_full: config.limits.when_full,
            defer_max_s: config.limits.defer_max_s,
            event_due_s: config.outbox.claim_s,
        };
        let settings = RunSettings {
            deadline: seconds(config.run.deadline_s),
            throttle_budget: seconds(config.graph.throttle_budget_s),
            concurrent_lists: config.run.concurrent_lists,
            batch_rows: config.run.batch_rows,
            end: RunEnd {
                suspicious_drop: SuspiciousDropRule {
                    share: config.run.suspicious_drop_share,
                    min_items: config.run.suspicious_drop_min_items,
                },
                event_due_s: config.outbox.claim_s,
            },
        };
        Self(Arc::new(RunnerInner {
            store,
            graph,
            catalog,
            leases,
            rules,
            settings,
            ended,
            unanswered: Mutex::default(),
        }))
    }

    /// Keeper of the leases of this process; it must run while there are runs.
    #[must_use]
    pub fn leases(&self) -> LeaseKeeper {
        self.0.leases.clone()
    }

    /// Handles one message: parse, resolve, admit, collect, end. `abort` makes it hand its run back.
    pub async fn handle(&self, incoming: Incoming<'_>, abort: &CancellationToken) -> Disposition {
        let parsed = SyncRequest::parse_encoded(incoming.content_type, incoming.content_encoding, incoming.body);
        let request = match parsed {
            Ok(request) => request,
            Err(rejection) => return Disposition::Rejected(rejection),
        };
        let span = info_span!("run", tenant_id = %request.tenant_id, idempotency_key = request.idempotency_key,
            correlation_id = request.correlation_id, run_id = tracing::field::Empty);
        self.0.handle(&request, incoming, abort).instrument(span).await
    }
}

impl RunnerInner {
    async fn handle(&self, request: &SyncRequest, incoming: Incoming<'_>, abort: &CancellationToken) -> Disposition {
        let scope = match self.catalog.resolve_request(&request.selection) {
            Ok(scope) => scope,
            Err(rejection) => return Disposition::Rejected(rejection),
        };
        let current_span = spans::traceparent();
        let admission_request = AdmissionRequest {
            request,
            selection_hash: &request.selection.hash(),
            traceparent: current_span.as_deref().or(incoming.traceparent),
            deferred_s: incoming.deferred_s,
        };
        // First, because the run of this very message may be one of them.
        self.leases.hand_back_orphans().await;
        match self.admit(&admission_request, &scope).await {
            Ok(Admission::Admitted(admitted)) => self.run(admitted, &scope, abort).await,
            Ok(declined) => self.declined(&declined),
            // Another session holds the tenant's row: that concerns this tenant, not the database.
            Err(error) if error.is_lock_timeout() => {
                warn!(%error, "the tenant is locked by another session; retrying later");
                Disposition::InProgressElsewhere
            }
            Err(error) => database_failure(&error),
        }
    }

    /// Admits a request. A run that has used up its attempts is failed on the way, and a lease whose admission got no reply is
    /// handed back; then the request is admitted again.
    async fn admit(&self, request: &AdmissionRequest<'_>, scope: &Scope) -> Result<Admission, StoreError> {
        let key = (request.request.tenant_id, request.request.idempotency_key.clone());
        let admission = self.store.admit(&self.rules, request).await.inspect_err(|_| {
            // The admission may be committed. Bounded: keys of messages that another replica received are never removed.
            let mut unanswered = self.unanswered.lock();
            if unanswered.len() >= MAX_UNANSWERED {
                unanswered.clear();
            }
            unanswered.insert(key.clone());
        })?;
        let was_unanswered = self.unanswered.lock().remove(&key);
        match admission {
            Admission::Exhausted(run) => self.fail_lost_run(run, scope).await?,
            Admission::HeldHere(lease) if was_unanswered && !self.leases.holds(&lease) => {
                self.leases.hand_back(&lease).await;
            }
            decided => return Ok(decided),
        }
        self.store.admit(&self.rules, request).await
    }

    /// Fails a run that has used up its attempts. Its selection is that of the request, and so are its types.
    async fn fail_lost_run(&self, run: RunKey, scope: &Scope) -> Result<(), StoreError> {
        if self.store.fail_lost_run(run, &scope.policy_types()).await? {
            warn!(run_id = %run.run_id, "run failed: it lost its worker too often");
            telemetry::run_ended(RunStatus::Failed);
            telemetry::run_error(ErrorCode::WorkerLost);
            self.report_end(run);
        }
        Ok(())
    }

    /// Runs under a lease until the run ends, the lease is lost or this process stops.
    async fn run(&self, admitted: Admitted, scope: &Scope, abort: &CancellationToken) -> Disposition {
        let lease = admitted.lease;
        tracing::Span::current().record("run_id", tracing::field::display(lease.run_id));
        info!(attempt = lease.attempt, lists = scope.listings.len(), "run started");
        let held = self.leases.hold(lease, admitted.granted);
        let ended = tokio::select! {
            // Polled first: a run whose end is committed has ended, even if its lease was lost meanwhile.
            biased;
            ended = self.collect_and_end(&admitted, scope) => ended,
            () = held.lost() => Err(StoreError::LeaseLost),
            () = abort.cancelled() => {
                info!("stopping; handing the run back");
                self.leases.hand_back(&lease).await;
                return Disposition::HandBack(HandBackReason::Stopping);
            }
        };
        match ended {
            Ok(report) => {
                self.report_end(lease.run());
                record_end(&report, admitted.granted);
                Disposition::Ended(report.status())
            }
            Err(StoreError::LeaseLost) => {
                warn!("lease lost; leaving the run to the replica that takes it over");
                telemetry::lease_lost();
                Disposition::HandBack(HandBackReason::LeaseLost)
            }
            Err(error) => {
                // Rejected data would be rejected again at once: the run waits for the end of its lease, which costs an attempt.
                if !error.is_data_rejected() {
                    self.leases.orphan(lease);
                }
                database_failure(&error)
            }
        }
    }

    /// Deadline and throttle budget count over all attempts of the run.
    async fn collect_and_end(&self, admitted: &Admitted, scope: &Scope) -> Result<RunReport, StoreError> {
        let waited = Duration::from_millis(admitted.throttle_wait_ms.unsigned_abs());
        let budget = RunBudget {
            deadline: Deadline::from_start(admitted.granted, self.settings.deadline.saturating_sub(admitted.age)),
            throttle_budget: self.settings.throttle_budget.saturating_sub(waited),
        };
        if self.tenant_was_idle(admitted).await? {
            self.graph.tenant_was_idle(admitted.lease.tenant_id);
        }
        let reader = self.graph.reader(admitted.lease.tenant_id, &admitted.credential, budget);
        let collector = Collector::new(&self.store, admitted, reader, self.settings);
        collector.collect(scope, &admitted.finished).await
    }

    /// Returns `true` if this process is new, and none has read the tenant within the windows of Graph's limits. A process that
    /// is older, or has read the tenant, knows what was sent.
    async fn tenant_was_idle(&self, admitted: &Admitted) -> Result<bool, StoreError> {
        match self.graph.predecessor_counts_for(admitted.lease.tenant_id) {
            Some(window) if admitted.lease.attempt == 1 => {
                self.store.tenant_was_idle(admitted.lease.run(), window, self.settings.deadline).await
            }
            _ => Ok(false),
        }
    }

    /// Notifies the relay. If it cannot keep up, the event is found in the outbox once it is due.
    fn report_end(&self, run: RunKey) {
        let _ = self.ended.try_send(run);
    }

    /// Maps an admission without a lease to what happens to the message.
    fn declined(&self, admission: &Admission) -> Disposition {
        match admission {
            Admission::Admitted(_) => unreachable!("the caller has taken the lease"),
            Admission::Skipped(code, run) => {
                info!(%code, "run skipped");
                self.report_end(*run);
                telemetry::run_ended(RunStatus::Skipped);
                telemetry::run_error(*code);
                Disposition::Ended(RunStatus::Skipped)
            }
            Admission::Duplicate => Disposition::Duplicate,
            // An exhausted run that could not be failed is being taken over or ended at this moment.
            Admission::InProgress | Admission::HeldHere(_) | Admission::Exhausted(_) => {
                Disposition::InProgressElsewhere
            }
            Admission::Deferred(code) => Disposition::Deferred(*code),
            Admission::UnknownTenant => Disposition::Rejected(Rejection::new(
                DeadReason::UnknownTenant,
                "`tenant_id` is not registered: register it with `inventoryd tenant add`",
            )),
            Admission::IdempotencyConflict => Disposition::Rejected(Rejection::new(
                DeadReason::IdempotencyConflict,
                "`idempotency_key` was used before by this tenant for another selection: use a new key for new work",
            )),
        }
    }
}

fn database_failure(error: &StoreError) -> Disposition {
    if error.is_data_rejected() {
        error!(%error, "the database rejected the run's data");
        Disposition::DataRejected
    } else {
        warn!(%error, "the database is unavailable");
        Disposition::DatabaseUnavailable(error.to_string())
    }
}

fn record_end(report: &RunReport, granted: Instant) {
    let (status, totals) = (report.status(), report.totals());
    let codes: Vec<_> = report.error_codes().into_iter().collect();
    info!(
        status = status.as_str(),
        observed = totals.items_observed_count,
        created = totals.items_created_count,
        changed = totals.items_changed_count,
        errors = totals.errors_count,
        codes = codes.join(","),
        "run ended"
    );
    telemetry::run_ended(status);
    telemetry::run_took(status, granted.elapsed());
    for code in codes.iter().filter_map(|code| code.parse().ok()) {
        telemetry::run_error(code);
    }
}
