//! Recorded requests and responses: counters, and the last requests.

use std::collections::{BTreeMap, VecDeque};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::text::now;

const LOG_LENGTH: usize = 50_000;

/// One request as it was answered.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RequestRecord {
    /// Time of arrival, in Unix milliseconds.
    pub unix_ms: u64,
    /// HTTP method.
    pub method: String,
    /// The tenant of its token.
    pub tenant: Option<Uuid>,
    /// Version and path.
    pub path: String,
    /// The raw query; the token of a next link is cut out of it.
    pub query: String,
    /// The page of the listing, from 1.
    pub page: u32,
    /// Status of the response; 0 for a connection that was cut.
    pub status: u16,
    /// The client's id for it, empty if it sent none.
    pub client_request_id: String,
    /// `HTTP/1.1` or `HTTP/2.0`.
    pub http_version: String,
    /// Number of the connection that it came on.
    pub connection: u64,
    /// `Prefer` header.
    pub prefer: String,
    /// `User-Agent` header.
    #[serde(default)]
    pub user_agent: String,
}

/// Counters of one tenant.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct TenantState {
    /// Graph requests.
    pub requests: u64,
    /// Those answered 200.
    pub answered: u64,
    /// Those answered 429, by a rule or by a limit.
    pub throttled: u64,
    /// Those that came before a limit's `Retry-After` was over.
    pub early: u64,
    /// Objects sent.
    pub objects: u64,
    /// Tokens issued.
    pub tokens: u64,
    /// Requests in flight now, and at most.
    pub in_flight: u64,
    /// The most requests that were in flight at one time.
    pub concurrent_max: u64,
    /// Path, then status, then how often.
    pub paths: BTreeMap<String, BTreeMap<u16, u64>>,
}

/// Counters of everything.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct State {
    /// Graph requests.
    pub requests: u64,
    /// Token requests.
    pub token_requests: u64,
    /// Tokens issued.
    pub tokens_issued: u64,
    /// Graph requests that were not GET; a client that only reads has none.
    pub non_get: u64,
    /// Graph requests without a good token.
    pub unauthorized: u64,
    /// Requests in flight now.
    pub in_flight: u64,
    /// The most requests that were in flight at one time.
    pub concurrent_max: u64,
    /// By tenant.
    pub tenants: BTreeMap<Uuid, TenantState>,
}

/// The counters and the log.
#[derive(Debug, Default)]
pub struct Stats {
    inner: Mutex<(State, VecDeque<RequestRecord>)>,
}

/// Counts a request as in flight for as long as it lives.
#[derive(Debug)]
pub struct InFlight<'a> {
    stats: &'a Stats,
    tenant: Option<Uuid>,
}

impl Stats {
    /// The counters as they are.
    pub fn state(&self) -> State {
        self.with(|state, _| state.clone())
    }

    /// The last requests, oldest first.
    pub fn requests(&self, last: usize) -> Vec<RequestRecord> {
        self.with(|_, log| log.iter().skip(log.len().saturating_sub(last)).cloned().collect())
    }

    /// Forgets all counters (not those of requests in flight) and the log.
    pub fn reset(&self) {
        self.with(|state, log| {
            let in_flight = state.in_flight;
            *state = State { in_flight, ..State::default() };
            log.clear();
        });
    }

    /// Counts a Graph request as begun.
    pub fn begin(&self, tenant: Option<Uuid>) -> InFlight<'_> {
        self.with(|state, _| {
            state.in_flight += 1;
            state.concurrent_max = state.concurrent_max.max(state.in_flight);
            if let Some(tenant) = tenant {
                let own = state.tenants.entry(tenant).or_default();
                own.in_flight += 1;
                own.concurrent_max = own.concurrent_max.max(own.in_flight);
            }
        });
        InFlight { stats: self, tenant }
    }

    /// Counts a Graph request as answered, with so many objects.
    pub fn graph(&self, record: RequestRecord, objects: u64) {
        self.with(|state, log| {
            state.requests += 1;
            state.non_get += u64::from(record.method != "GET");
            state.unauthorized += u64::from(record.tenant.is_none());
            if let Some(tenant) = record.tenant {
                let own = state.tenants.entry(tenant).or_default();
                own.requests += 1;
                own.answered += u64::from(record.status == 200);
                own.throttled += u64::from(record.status == 429);
                own.objects += objects;
                let statuses = match own.paths.get_mut(&record.path) {
                    Some(statuses) => statuses,
                    None => own.paths.entry(record.path.clone()).or_default(),
                };
                *statuses.entry(record.status).or_default() += 1;
            }
            remember(log, record);
        });
    }

    /// Counts a token request as answered.
    pub fn token(&self, record: RequestRecord) {
        self.with(|state, log| {
            state.token_requests += 1;
            if record.status == 200 {
                state.tokens_issued += 1;
                if let Some(tenant) = record.tenant {
                    state.tenants.entry(tenant).or_default().tokens += 1;
                }
            }
            remember(log, record);
        });
    }

    /// Counts a request that came before its `Retry-After` was over.
    pub fn early(&self, tenant: Uuid) {
        self.with(|state, _| state.tenants.entry(tenant).or_default().early += 1);
    }

    fn with<T>(&self, work: impl FnOnce(&mut State, &mut VecDeque<RequestRecord>) -> T) -> T {
        let mut inner = self.inner.lock();
        let (state, log) = &mut *inner;
        work(state, log)
    }
}

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        self.stats.with(|state, _| {
            state.in_flight = state.in_flight.saturating_sub(1);
            if let Some(own) = self.tenant.and_then(|tenant| state.tenants.get_mut(&tenant)) {
                own.in_flight = own.in_flight.saturating_sub(1);
            }
        });
    }
}

/// Now, in Unix milliseconds.
pub fn unix_ms() -> u64 {
    u64::try_from(now().unix_timestamp_nanos() / 1_000_000).unwrap_or_default()
}

fn remember(log: &mut VecDeque<RequestRecord>, record: RequestRecord) {
    if log.len() == LOG_LENGTH {
        log.pop_front();
    }
    log.push_back(record);
}
