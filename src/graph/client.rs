//! Graph client of the process, and the reader of one run.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use reqwest::Url;
use tokio::sync::{broadcast, mpsc};
use uuid::Uuid;

use super::auth::token::{TokenCache, TokenSource};
use super::limits::budget::{BudgetTracker, RunBudget};
use super::limits::pause::PauseNotice;
use super::limits::registry::LimitRegistry;
use super::limits::turns::TurnRequest;
use super::problems::{GraphProblem, ProblemRegistry};
use super::transport::{GraphError, HttpTransport};
use crate::config::GraphConfig;
use crate::domain::clock::Deadline;
use crate::domain::run::GraphUsage;
use crate::telemetry;

/// Time for which a refused query option is remembered. Graph's rings and clouds differ: a list that refuses `$select`
/// in one tenant may accept it in another, or tomorrow.
const REFUSAL_REMEMBERED_FOR: Duration = Duration::from_secs(24 * 3_600);

/// Tenant, API version and path of a list.
type ListKey = (Uuid, String, String);

/// Query options that a list is requested with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct QueryOptions {
    pub(super) select: bool,
    pub(super) top: bool,
}

impl QueryOptions {
    const ALL: Self = Self { select: true, top: true };

    /// Options in both.
    pub(super) fn and(self, other: Self) -> Self {
        Self { select: self.select && other.select, top: self.top && other.top }
    }

    /// Options to try after a refusal: `$select` is dropped first, then `$top`. `None` if there are none left.
    pub(super) fn reduced(self) -> Option<Self> {
        match self {
            Self { select: true, top } => Some(Self { select: false, top }),
            Self { top: true, .. } => Some(Self { select: false, top: false }),
            _ => None,
        }
    }
}

/// Microsoft Graph as this process sees it: connections, tokens, limits. Cheap to clone.
#[derive(Clone)]
pub struct GraphClient(pub(super) Arc<Shared>);

/// State shared by all readers.
pub(super) struct Shared {
    pub(super) base: Url,
    pub(super) transport: HttpTransport,
    pub(super) tokens: TokenCache,
    pub(super) limits: LimitRegistry,
    pub(super) problems: ProblemRegistry,
    pub(super) max_attempts: u32,
    pub(super) first_wait: Duration,
    pub(super) max_wait: Duration,
    pub(super) max_pages: u32,
    /// Query options of lists that refused some, with the time until which that is remembered.
    accepted_options: Mutex<HashMap<ListKey, (QueryOptions, Deadline)>>,
}

impl GraphClient {
    /// Creates a client; nothing is sent yet.
    pub fn new(config: &GraphConfig) -> Result<Self, GraphError> {
        let base = Url::parse(config.base_url()).map_err(|_| GraphError::BaseUrl(config.base_url().to_owned()))?;
        Ok(Self(Arc::new(Shared {
            base,
            transport: HttpTransport::new(config)?,
            tokens: TokenCache::new(config),
            limits: LimitRegistry::new(config),
            problems: ProblemRegistry::default(),
            max_attempts: config.max_tries,
            first_wait: Duration::from_secs_f64(config.backoff_first_s),
            max_wait: Duration::from_secs_f64(config.backoff_max_s),
            max_pages: config.max_pages,
            accepted_options: Mutex::default(),
        })))
    }

    /// Reader of one run.
    #[must_use]
    pub fn reader(&self, tenant_id: Uuid, credential: &str, budget: RunBudget) -> GraphReader {
        GraphReader {
            shared: Arc::clone(&self.0),
            token_source: self.0.tokens.source(tenant_id, credential),
            budget: Arc::new(BudgetTracker::new(budget)),
            tenant_id,
        }
    }

    /// Divides Graph's limits by the number of replicas that read the same tenants, this one included.
    pub fn set_replicas(&self, replicas: u32) {
        self.0.limits.set_replicas(replicas);
    }

    /// Time for which an earlier process may still have requests in a window of Graph's limits of a tenant; `None` if this
    /// process is older than that, or has read the tenant before.
    #[must_use]
    pub fn predecessor_counts_for(&self, tenant_id: Uuid) -> Option<Duration> {
        self.0.limits.predecessor_counts_for(tenant_id)
    }

    /// Gives a tenant that no other process has read within that time all of its limits at once.
    pub fn tenant_was_idle(&self, tenant_id: Uuid) {
        self.0.limits.tenant_was_idle(tenant_id);
    }

    /// Receiver of the requests for turns of limits that are too low to be divided. Without one, or if a request is
    /// dropped, this replica uses its own part.
    #[must_use]
    pub fn turn_requests(&self) -> mpsc::Receiver<TurnRequest> {
        self.0.limits.turn_requests()
    }

    /// Receiver of every pause that Graph asks this replica for, to be announced to the other replicas.
    #[must_use]
    pub fn pause_notices(&self) -> broadcast::Receiver<PauseNotice> {
        self.0.limits.notices()
    }

    /// Problems that are present: credentials without a token, no connection to Graph.
    #[must_use]
    pub fn problems(&self) -> Vec<GraphProblem> {
        self.0.problems.present()
    }

    /// Pauses that have not ended, the longest first; those that other replicas announced are included.
    #[must_use]
    pub fn pauses(&self) -> Vec<PauseNotice> {
        self.0.limits.pauses()
    }

    /// Applies a pause that another replica announced. Unknown families belong to another version and are ignored.
    pub fn pause(&self, tenant_id: Uuid, family: &str, duration: Duration) {
        self.0.limits.pause(tenant_id, family, duration);
    }
}

impl std::fmt::Debug for GraphClient {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("GraphClient").field("base_url", &self.0.base.as_str()).finish_non_exhaustive()
    }
}

/// Access of one run to Graph: tenant, credential and budget. Clones share the budget.
#[derive(Clone)]
pub struct GraphReader {
    pub(super) shared: Arc<Shared>,
    pub(super) token_source: Arc<TokenSource>,
    pub(super) budget: Arc<BudgetTracker>,
    pub(super) tenant_id: Uuid,
}

impl GraphReader {
    /// Requests and waits of the run so far.
    #[must_use]
    pub fn usage(&self) -> GraphUsage {
        self.budget.usage()
    }

    /// Seconds until a new run is worthwhile, once a list was given up because of throttling.
    #[must_use]
    pub fn retry_after_s(&self) -> Option<i32> {
        self.budget.retry_after_s()
    }

    /// Query options that a list accepts, as far as this process knows.
    pub(super) fn accepted_options(&self, version: &str, path: &str) -> QueryOptions {
        let key = (self.tenant_id, version.to_owned(), path.to_owned());
        let known = self.shared.accepted_options.lock().get(&key).copied();
        known.filter(|(_, until)| !until.passed()).map_or(QueryOptions::ALL, |(accepted, _)| accepted)
    }

    /// Remembers that a list of this tenant succeeds only with these query options.
    pub(super) fn options_refused(&self, version: &str, path: &str, accepted: QueryOptions) {
        let key = (self.tenant_id, version.to_owned(), path.to_owned());
        let mut known = self.shared.accepted_options.lock();
        known.retain(|_, (_, until)| !until.passed());
        known.insert(key, (accepted, Deadline::after(REFUSAL_REMEMBERED_FOR)));
        drop(known);
        self.budget.count_options_refused();
        telemetry::graph_select_refused();
        let QueryOptions { select, top } = accepted;
        tracing::warn!(
            version,
            path,
            select,
            top,
            "query options were refused; requesting the list without them for a day"
        );
    }
}

impl std::fmt::Debug for GraphReader {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("GraphReader").field("tenant_id", &self.tenant_id).finish_non_exhaustive()
    }
}
