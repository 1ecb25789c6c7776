//! The handle on Graph, and the reader that one run has of it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use reqwest::Url;
use tokio::sync::broadcast;
use uuid::Uuid;

use super::spending::{RunBudget, Spending};
use super::throttle::{GateChange, Throttle};
use super::token::{TokenSource, Tokens};
use super::transport::{Connections, GraphError};
use crate::config::GraphConfig;
use crate::domain::clock::Deadline;
use crate::domain::run::GraphUsage;
use crate::telemetry;

/// Rings and clouds differ in what they know: what one tenant's Graph refuses another's may take, and this one's may
/// tomorrow.
const REFUSED_FOR: Duration = Duration::from_secs(24 * 3_600);

/// A tenant, and version and path of one of its lists.
type Unselectable = (Uuid, String, String);

/// Microsoft Graph as this process sees it: its connections, tokens and what it has learned. Cheap to clone.
#[derive(Clone)]
pub struct GraphClient(pub(super) Arc<Shared>);

/// What all readers have in common.
pub(super) struct Shared {
    pub(super) base: Url,
    pub(super) connections: Connections,
    pub(super) tokens: Tokens,
    pub(super) throttle: Throttle,
    pub(super) max_tries: u32,
    pub(super) first_wait: Duration,
    pub(super) most_wait: Duration,
    pub(super) max_pages: u32,
    /// Lists whose `$select` was refused, and until when that is believed.
    unselectable: Mutex<HashMap<Unselectable, Deadline>>,
}

impl GraphClient {
    /// Makes a client; nothing is sent yet.
    ///
    /// # Errors
    /// If the extra certificate authority can't be read, or TLS can't be set up.
    pub fn new(config: &GraphConfig) -> Result<Self, GraphError> {
        let base = Url::parse(config.base_url()).map_err(|_| GraphError::BaseUrl(config.base_url().to_owned()))?;
        Ok(Self(Arc::new(Shared {
            base,
            connections: Connections::new(config)?,
            tokens: Tokens::new(config),
            throttle: Throttle::new(config),
            max_tries: config.max_tries,
            first_wait: Duration::from_secs_f64(config.backoff_first_s),
            most_wait: Duration::from_secs_f64(config.backoff_max_s),
            max_pages: config.max_pages,
            unselectable: Mutex::default(),
        })))
    }

    /// The reader of one run.
    #[must_use]
    pub fn reader(&self, tenant_id: Uuid, credential: &str, budget: RunBudget) -> GraphReader {
        GraphReader {
            shared: Arc::clone(&self.0),
            token_source: self.0.tokens.source(tenant_id, credential),
            spending: Arc::new(Spending::new(budget)),
            tenant_id,
        }
    }

    /// Divides Graph's limits by the number of replicas that read the same tenants, this one included.
    pub fn set_replicas(&self, replicas: u32) {
        self.0.throttle.set_replicas(replicas);
    }

    /// Every gate that Graph closes from now on, for the other replicas to know.
    #[must_use]
    pub fn gate_changes(&self) -> broadcast::Receiver<GateChange> {
        self.0.throttle.changes()
    }

    /// Closes a gate that Graph closed for another replica, for so long from now. Unknown families are ignored: they
    /// are of another version.
    pub fn close_gate(&self, tenant_id: Uuid, family: &str, closed_for: Duration) {
        self.0.throttle.close(tenant_id, family, closed_for);
    }
}

impl std::fmt::Debug for GraphClient {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("GraphClient").field("base_url", &self.0.base.as_str()).finish_non_exhaustive()
    }
}

/// One run's view of Graph: its tenant, its credential and what it may spend. Clones share the account.
#[derive(Clone)]
pub struct GraphReader {
    pub(super) shared: Arc<Shared>,
    pub(super) token_source: Arc<TokenSource>,
    pub(super) spending: Arc<Spending>,
    pub(super) tenant_id: Uuid,
}

impl GraphReader {
    /// What the run has cost Graph so far.
    #[must_use]
    pub fn usage(&self) -> GraphUsage {
        self.spending.usage()
    }

    /// After how many seconds it is worth asking again, once a list was given up because Graph throttles.
    #[must_use]
    pub fn retry_after_s(&self) -> Option<i32> {
        self.spending.retry_after_s()
    }

    /// Whether a list may be asked with `$select`, as far as this process knows.
    pub(super) fn is_selectable(&self, version: &str, path: &str) -> bool {
        let key = (self.tenant_id, version.to_owned(), path.to_owned());
        let refused = self.shared.unselectable.lock().unwrap_or_else(PoisonError::into_inner);
        refused.get(&key).is_none_or(|until| until.passed())
    }

    /// Remembers that this tenant's Graph refuses the `$select` of a list.
    pub(super) fn select_refused(&self, version: &str, path: &str) {
        let key = (self.tenant_id, version.to_owned(), path.to_owned());
        let mut refused = self.shared.unselectable.lock().unwrap_or_else(PoisonError::into_inner);
        refused.retain(|_, until| !until.passed());
        refused.insert(key, Deadline::after(REFUSED_FOR));
        drop(refused);
        self.spending.select_refused();
        telemetry::graph_select_refused();
        tracing::warn!(version, path, "$select was refused; asking without it for a day");
    }
}

impl std::fmt::Debug for GraphReader {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("GraphReader").field("tenant_id", &self.tenant_id).finish_non_exhaustive()
    }
}
