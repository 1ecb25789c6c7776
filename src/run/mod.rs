//! A run from request to terminal state: the only place that knows the order of things.

mod collect;
mod lease;
mod list;

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;
use tracing::{Instrument, error, info, info_span, warn};

pub use lease::LeaseKeeper;

use crate::config::{Config, seconds};
use crate::domain::catalog::{Catalog, Scope};
use crate::domain::clock::Deadline;
use crate::domain::failure::{DeadReason, ErrorCode, Rejection};
use crate::domain::request::SyncRequest;
use crate::domain::run::{RunReport, RunStatus};
use crate::graph::{GraphClient, RunBudget};
use crate::store::{Admission, AdmissionRules, Admitted, Applicant, Store, StoreError, SuspiciousDrop};
use crate::telemetry::{self, spans};
use collect::Collector;

/// A message as it came from the queue.
#[derive(Debug, Clone, Copy)]
pub struct Incoming<'a> {
    /// The body.
    pub body: &'a [u8],
    /// The AMQP content type.
    pub content_type: Option<&'a str>,
    /// W3C trace context of the publisher.
    pub traceparent: Option<&'a str>,
    /// Seconds that the message has been deferred so far.
    pub deferred_s: u64,
}

/// What is to become of a message. Whatever had to be durable is committed by then.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Disposition {
    /// Its run is in a terminal state, with its event.
    Ended(RunStatus),
    /// Its run was in a terminal state before.
    Duplicate,
    /// Another worker is on its run: ask again soon.
    Busy,
    /// A limit stands in the way: ask again later.
    Deferred(ErrorCode),
    /// It can never be run.
    Rejected(Rejection),
    /// Somebody else is to have it.
    HandBack(HandBackReason),
    /// The database is away, or takes no writes: nothing can be decided.
    StoreAway,
    /// The database refuses what this request comes to, and would again.
    Defect,
}

/// Why a message goes back to the queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HandBackReason {
    /// The lease was lost; the run is somebody else's.
    LeaseLost,
    /// This process stops.
    Stopping,
}

/// The two ways in which a daemon is told to stop.
#[derive(Debug, Clone, Default)]
pub struct Stop {
    /// Take nothing new, finish what is in hand.
    pub drain: CancellationToken,
    /// Hand everything back now.
    pub abort: CancellationToken,
    /// Take nothing new while this is `true`, but neither drain nor end.
    pub quiet: tokio::sync::watch::Sender<bool>,
}

/// Takes requests through the whole recipe.
#[derive(Debug, Clone)]
pub struct Runner(Arc<Recipe>);

#[derive(Debug)]
struct Recipe {
    store: Store,
    graph: GraphClient,
    catalog: Catalog,
    leases: LeaseKeeper,
    rules: AdmissionRules,
    settings: RunSettings,
}

/// What every run of this process goes by.
#[derive(Debug, Clone, Copy)]
struct RunSettings {
    deadline: Duration,
    throttle_budget: Duration,
    concurrent_lists: usize,
    batch_rows: usize,
    suspicious_drop: SuspiciousDrop,
}

impl Runner {
    /// A runner that signs its leases as `owner`.
    #[must_use]
    pub fn new(config: &Config, owner: &str, store: Store, graph: GraphClient, catalog: Catalog) -> Self {
        let leases = LeaseKeeper::new(store.clone(), owner, config.run.lease_s);
        let rules = AdmissionRules {
            owner: owner.to_owned(),
            lease_s: config.run.lease_s,
            max_attempts: config.run.max_attempts,
            tenant_max_runs: config.limits.tenant_max_runs,
            fleet_max_runs: config.limits.fleet_max_runs,
            when_full: config.limits.when_full,
            defer_max_s: config.limits.defer_max_s,
        };
        let settings = RunSettings {
            deadline: seconds(config.run.deadline_s),
            throttle_budget: seconds(config.graph.throttle_budget_s),
            concurrent_lists: config.run.concurrent_lists,
            batch_rows: config.run.batch_rows,
            suspicious_drop: SuspiciousDrop {
                share: config.run.suspicious_drop_share,
                min_items: config.run.suspicious_drop_min_items,
            },
        };
        Self(Arc::new(Recipe { store, graph, catalog, leases, rules, settings }))
    }

    /// What keeps the leases of this process; it has to be run beside the runs.
    #[must_use]
    pub fn leases(&self) -> LeaseKeeper {
        self.0.leases.clone()
    }

    /// Takes one message through the recipe: parse, resolve, admit, collect, end. `abort` makes it hand its run back.
    pub async fn handle(&self, incoming: Incoming<'_>, abort: &CancellationToken) -> Disposition {
        let request = match SyncRequest::parse(incoming.content_type, incoming.body) {
            Ok(request) => request,
            Err(rejection) => return Disposition::Rejected(rejection),
        };
        let span = info_span!("run", tenant_id = %request.tenant_id, idempotency_key = request.idempotency_key,
            correlation_id = request.correlation_id, run_id = tracing::field::Empty);
        self.0.handle(&request, incoming, abort).instrument(span).await
    }
}

impl Recipe {
    async fn handle(&self, request: &SyncRequest, incoming: Incoming<'_>, abort: &CancellationToken) -> Disposition {
        let scope = self.catalog.resolve(&request.selection);
        if scope.is_empty() {
            let detail = "`selection` selects nothing: it names foundations alone, and include_foundations is false";
            return Disposition::Rejected(Rejection::new(DeadReason::InvalidRequest, detail));
        }
        let ours = spans::traceparent();
        let applicant = Applicant {
            request,
            selection_hash: &request.selection.hash(),
            traceparent: ours.as_deref().or(incoming.traceparent),
            deferred_s: incoming.deferred_s,
        };
        self.leases.hand_back_orphans().await;
        match self.store.admit(&self.rules, &applicant).await {
            Ok(Admission::Admitted(admitted)) => self.run(admitted, &scope, abort).await,
            Ok(admission) => turned_away(&admission),
            Err(error) => undecided(&error),
        }
    }

    /// Works under a lease until the run ends, the lease is lost or this process stops.
    async fn run(&self, admitted: Admitted, scope: &Scope, abort: &CancellationToken) -> Disposition {
        let lease = admitted.lease;
        tracing::Span::current().record("run_id", tracing::field::display(lease.run_id));
        info!(attempt = lease.attempt, lists = scope.listings.len(), "run begins");
        let held = self.leases.hold(lease, admitted.granted);
        let ended = tokio::select! {
            ended = self.collect_and_finish(&admitted, scope) => ended,
            () = held.lost() => Err(StoreError::LeaseLost),
            () = abort.cancelled() => return self.hand_back(&admitted).await,
        };
        match ended {
            Ok(report) => {
                record_end(&report, admitted.granted);
                Disposition::Ended(report.status())
            }
            Err(StoreError::LeaseLost) => {
                warn!("lease lost: the run is left to whoever has it");
                telemetry::lease_lost();
                Disposition::HandBack(HandBackReason::LeaseLost)
            }
            Err(error) => {
                // A defect would come again at once: it waits for the end of its lease, and costs an attempt.
                if !error.is_defect() {
                    self.leases.orphan(lease);
                }
                undecided(&error)
            }
        }
    }

    async fn collect_and_finish(&self, admitted: &Admitted, scope: &Scope) -> Result<RunReport, StoreError> {
        let budget = RunBudget {
            deadline: Deadline::from_start(admitted.granted, self.settings.deadline),
            throttle_budget: self.settings.throttle_budget,
        };
        let reader = self.graph.reader(admitted.lease.tenant_id, &admitted.credential, budget);
        let collector = Collector::new(&self.store, admitted.lease, reader, self.settings);
        collector.collect(scope, &admitted.finished).await
    }

    async fn hand_back(&self, admitted: &Admitted) -> Disposition {
        info!("stopping: the run is handed back");
        if let Err(error) = self.store.hand_back_lease(&admitted.lease).await {
            warn!(%error, "the lease could not be handed back; it runs out by itself");
        }
        Disposition::HandBack(HandBackReason::Stopping)
    }
}

/// What an admission that gives no lease comes to.
fn turned_away(admission: &Admission) -> Disposition {
    match admission {
        Admission::Admitted(_) => unreachable!("the caller has taken the lease"),
        Admission::Skipped(code) => {
            info!(%code, "run skipped");
            telemetry::run_ended(RunStatus::Skipped);
            telemetry::run_error(*code);
            Disposition::Ended(RunStatus::Skipped)
        }
        Admission::GivenUp => {
            warn!("run ended: it has lost too many workers");
            telemetry::run_ended(RunStatus::Failed);
            telemetry::run_error(ErrorCode::WorkerLost);
            Disposition::Ended(RunStatus::Failed)
        }
        Admission::Duplicate => Disposition::Duplicate,
        Admission::Busy => Disposition::Busy,
        Admission::Deferred(code) => Disposition::Deferred(*code),
        Admission::UnknownTenant => Disposition::Rejected(Rejection::new(
            DeadReason::UnknownTenant,
            "`tenant_id` is not registered: `inventoryd tenant add` registers it",
        )),
        Admission::Conflict => Disposition::Rejected(Rejection::new(
            DeadReason::IdempotencyConflict,
            "`idempotency_key` was used before by this tenant for another selection: give new work a new key",
        )),
    }
}

fn undecided(error: &StoreError) -> Disposition {
    if error.is_defect() {
        error!(%error, "the database refuses what this request comes to");
        Disposition::Defect
    } else {
        warn!(%error, "the database is away");
        Disposition::StoreAway
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
