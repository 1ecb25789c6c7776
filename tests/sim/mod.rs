//! Simulator of Microsoft Graph and its token service over HTTPS on 127.0.0.1: tokens, paged Intune lists, errors,
//! throttling, and faults by rule.
//!
//! The simulator imports nothing of the program under test. Paths and objects come from the fixture files. Every GUID is a
//! tenant with its own objects, which are generated from the seed on each request and need no memory. `bin.rs` runs it as a program; tests include this file with `#[path = "../sim/mod.rs"] mod sim;`.
//!
//! A request goes `server -> graph -> (token, limits, rules, faults) -> page -> (select, world, paging) -> reply`.
#![allow(dead_code, unused_imports, reason = "the program and the tests include this file; each uses a part of it")]

mod admin;
mod cache;
mod errors;
mod faults;
mod fixtures;
mod graph;
mod limits;
mod page;
mod paging;
mod reply;
mod rules;
mod seed;
mod select;
mod server;
mod stats;
mod template;
#[cfg(test)]
mod tests;
mod text;
mod tls;
mod token;
mod world;

use std::net::{Ipv4Addr, SocketAddr};
use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde_json::Value;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use uuid::Uuid;

use self::world::Place;

pub use self::{
    fixtures::Fixtures,
    limits::{Limits, RetryAfterForm},
    page::PageSizes,
    rules::{Action, ActiveRule, Endpoint, ErrorBody, Rule},
    stats::{RequestRecord, State, TenantState},
    world::{Sizes, Which},
};

/// Error that prevents the start of the simulator.
pub type SimError = Box<dyn std::error::Error + Send + Sync>;

/// Configuration of a simulator.
#[derive(Clone, Debug)]
pub struct SimConfig {
    /// Address to listen on; port 0 takes a free port.
    pub listen: SocketAddr,
    /// Application that is issued tokens.
    pub client_id: String,
    /// Client secret of the application.
    pub client_secret: String,
    /// Seed of all ids, names and random decisions.
    pub seed: u64,
    /// Numbers of objects.
    pub sizes: Sizes,
    /// Page lengths.
    pub page_sizes: PageSizes,
    /// Delay of every response.
    pub latency_ms: u64,
    /// Lifetime of tokens.
    pub token_lifetime_s: u64,
    /// Real throttling, if any.
    pub limits: Option<Limits>,
    /// Rules from the start.
    pub rules: Vec<Rule>,
    /// Source of the collections.
    pub fixtures: Fixtures,
}

impl Default for SimConfig {
    fn default() -> Self {
        SimConfig {
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            client_id: "11111111-2222-4333-8444-555555555555".to_owned(),
            client_secret: "simulated-secret".to_owned(),
            seed: 1,
            sizes: Sizes { default: 12, ..Sizes::default() },
            page_sizes: PageSizes::default(),
            latency_ms: 0,
            token_lifetime_s: 3_599,
            limits: None,
            rules: Vec::new(),
            fixtures: Fixtures::default(),
        }
    }
}

/// Running simulator. Clones share it; it stops when the last one is dropped.
///
/// Queries and changes are methods of [`Shared`].
#[derive(Clone, Debug)]
pub struct Sim {
    shared: Arc<Shared>,
    server: Arc<Server>,
}

#[derive(Debug)]
struct Server {
    address: SocketAddr,
    task: JoinHandle<()>,
}

/// State shared by requests, remote control and tests.
#[derive(Debug)]
pub struct Shared {
    world: world::World,
    rules: rules::Rules,
    stats: stats::Stats,
    tokens: token::Tokens,
    throttle: limits::Throttle,
    pages: cache::Pages,
    page_sizes: PageSizes,
    latency_ms: AtomicU64,
    requests_begun: AtomicU64,
    ca_pem: String,
}

impl Sim {
    /// Starts a simulator on the current runtime.
    pub async fn start(config: SimConfig) -> Result<Sim, SimError> {
        let catalog = fixtures::Catalog::load(&config.fixtures)?;
        let (ca_pem, tls) = tls::make()?;
        let listener = TcpListener::bind(config.listen).await.map_err(|error| format!("{}: {error}", config.listen))?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            world: world::World::new(catalog, config.seed, config.sizes),
            rules: rules::Rules::new(config.seed),
            stats: stats::Stats::default(),
            tokens: token::Tokens::new(&config.client_id, &config.client_secret, config.token_lifetime_s),
            throttle: limits::Throttle::default(),
            pages: cache::Pages::default(),
            page_sizes: config.page_sizes,
            latency_ms: AtomicU64::new(config.latency_ms),
            requests_begun: AtomicU64::new(0),
            ca_pem,
        });
        shared.set_limits(config.limits);
        for rule in config.rules {
            shared.add_rule(rule);
        }
        let task = tokio::spawn(server::serve(listener, tls, Arc::clone(&shared)));
        Ok(Sim { shared, server: Arc::new(Server { address, task }) })
    }

    /// `https://127.0.0.1:<port>`, the root of both Graph and the token service.
    pub fn base_url(&self) -> String {
        format!("https://{}", self.server.address)
    }

    /// Address of [`Sim::base_url`], for a proxy.
    pub fn address(&self) -> SocketAddr {
        self.server.address
    }

    /// Stops listening and cuts every connection.
    pub fn shutdown(&self) {
        self.server.task.abort();
    }
}

impl Deref for Sim {
    type Target = Shared;

    fn deref(&self) -> &Shared {
        &self.shared
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Shared {
    /// The certificate authority to trust.
    pub fn ca_pem(&self) -> &str {
        &self.ca_pem
    }

    /// Appends a rule and returns its number.
    pub fn add_rule(&self, rule: Rule) -> u64 {
        self.rules.add(rule)
    }

    /// Removes one rule, or all; returns how many were removed.
    pub fn remove_rules(&self, id: Option<u64>) -> usize {
        self.rules.remove(id)
    }

    /// Rules, each with the number of requests that matched and of faults applied.
    pub fn rules(&self) -> Vec<ActiveRule> {
        self.rules.list()
    }

    /// Recorded requests (the last 50,000), oldest first.
    pub fn requests(&self) -> Vec<RequestRecord> {
        self.stats.requests(usize::MAX)
    }

    /// The last requests, oldest first.
    pub fn recent_requests(&self, last: usize) -> Vec<RequestRecord> {
        self.stats.requests(last)
    }

    /// The counters.
    pub fn state(&self) -> State {
        self.stats.state()
    }

    /// Resets the counters and the recorded requests.
    pub fn reset_counters(&self) {
        self.stats.reset();
    }

    /// Supported paths; those of child collections contain `{parent_id}`.
    pub fn collections(&self) -> Vec<String> {
        self.world.catalog.collections().iter().map(|collection| collection.path.clone()).collect()
    }

    /// The objects of a tenant's collection as they are, with everything that a list without `$select` shows.
    ///
    /// Here and below a collection is a path, with or without its API version; a child's has the parent's id in it.
    pub fn objects(&self, tenant: Uuid, collection: &str) -> Result<Vec<Value>, String> {
        let (found, path) = self.find(collection)?;
        let view = self.world.view(Place { tenant, found, path: &path });
        Ok(view.values(&view.compile(None), &view.page(0, usize::MAX).0))
    }

    /// The ids of the objects of a tenant's collection as they are.
    pub fn object_ids(&self, tenant: Uuid, collection: &str) -> Result<Vec<String>, String> {
        let (found, path) = self.find(collection)?;
        let view = self.world.view(Place { tenant, found, path: &path });
        Ok(view.page(0, usize::MAX).0.into_iter().map(|index| view.id(index)).collect())
    }

    /// Deletes objects and returns their ids.
    pub fn delete_objects(&self, tenant: Uuid, collection: &str, which: Which) -> Result<Vec<String>, String> {
        let (found, path) = self.find(collection)?;
        self.world.delete(Place { tenant, found, path: &path }, &which)
    }

    /// Renames one object and returns its id.
    pub fn rename_object(&self, tenant: Uuid, collection: &str, which: Which, name: &str) -> Result<String, String> {
        let (found, path) = self.find(collection)?;
        self.world.rename(Place { tenant, found, path: &path }, &which, name)
    }

    /// Appends objects and returns their ids.
    pub fn add_objects(&self, tenant: Uuid, collection: &str, count: u32) -> Result<Vec<String>, String> {
        let (found, path) = self.find(collection)?;
        Ok(self.world.add(Place { tenant, found, path: &path }, count))
    }

    /// Sets how many objects there are, for one tenant or all and one collection or all, and forgets the deletions,
    /// renames and additions that this covers. Without a collection each of its kinds stays there at least once,
    /// unless `count` is 0.
    pub fn set_size(&self, tenant: Option<Uuid>, collection: Option<&str>, count: u32) -> Result<(), String> {
        let path = collection.map(|collection| self.find(collection)).transpose()?.map(|(_, path)| path);
        self.world.resize(tenant, path.as_deref(), count);
        Ok(())
    }

    /// Sets the delay of every response.
    pub fn set_latency_ms(&self, ms: u64) {
        self.latency_ms.store(ms, Ordering::Relaxed);
    }

    /// Sets or lifts real throttling.
    pub fn set_limits(&self, limits: Option<Limits>) {
        self.throttle.set(limits);
    }

    /// The real throttling in force.
    pub fn limits(&self) -> Option<Limits> {
        self.throttle.get()
    }

    /// Sets the lifetime of tokens issued from now on.
    pub fn set_token_lifetime_s(&self, lifetime_s: u64) {
        self.tokens.set_lifetime_s(lifetime_s);
    }

    /// Revokes the tokens of one tenant, or all.
    pub fn expire_tokens(&self, tenant: Option<Uuid>) {
        self.tokens.expire(tenant);
    }

    fn next_request_id(&self) -> Uuid {
        let number = self.requests_begun.fetch_add(1, Ordering::Relaxed);
        seed::guid(seed::mix(self.world.seed() ^ (number >> 32)), number as u32)
    }

    fn find(&self, collection: &str) -> Result<(usize, String), String> {
        self.world.catalog.find_loosely(collection).ok_or_else(|| format!("there is no collection {collection}"))
    }
}
