//! Documents of `/readyz` and `/status`, and the tracking of problems over time.

use std::collections::BTreeMap;

use parking_lot::Mutex;
use schemars::JsonSchema;
use serde::Serialize;
use tokio::time::Instant;
use uuid::Uuid;

/// Maximum number of pauses that are listed.
pub(super) const MAX_LISTED_PAUSES: usize = 100;

/// State of the consumer at a moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Consumption {
    /// True while there is a live subscription.
    pub subscribed: bool,
    /// Deliveries in flight.
    pub in_flight: usize,
    /// Deliveries held because the broker permanently refuses their copies.
    pub held: usize,
    /// Reason for a pause of consumption.
    pub paused: Option<String>,
    /// Reason for a missing subscription.
    pub problem: Option<String>,
    /// Reason for which runs could not progress lately, although the database responds.
    pub run_failure: Option<String>,
}

impl Consumption {
    /// Problem of the held deliveries, if there are any.
    pub(super) fn held_deliveries(&self) -> Option<String> {
        (self.held > 0).then(|| {
            format!(
                "{} deliveries are held, because the broker refuses their copies: the queues of inventory.retry and inventory.dead \
                 need room, the exchanges must exist, and this user needs write permission on them",
                self.held
            )
        })
    }
}

/// State of the outbox and of the runs, over all replicas.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Backlog {
    /// Events waiting to be published.
    pub outbox_unsent: i64,
    /// Age of the oldest waiting event, in seconds.
    pub outbox_oldest_s: f64,
    /// Running runs.
    pub running_runs: i64,
}

/// State of the database as seen by a probe.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum DatabaseState {
    /// The database responds.
    Ok,
    /// The database does not respond in time, or refuses the connection.
    Unreachable,
}

/// Part of the daemon that a problem concerns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Component {
    /// PostgreSQL.
    Database,
    /// Subscription to the request queue.
    Subscription,
    /// Acceptance of new requests, paused at present.
    Consumption,
    /// Runs that the database does not let progress, although it responds.
    Runs,
    /// Deliveries held because the broker permanently refuses their copies.
    HeldDeliveries,
    /// Shutdown in progress.
    Draining,
    /// Microsoft Graph or its token service, for one tenant or for all.
    Graph,
}

impl Component {
    /// False for a problem of a ready daemon, which resumes without a restart; an alert reports it.
    pub(super) const fn is_required(self) -> bool {
        !matches!(self, Self::Consumption | Self::Runs | Self::HeldDeliveries)
    }
}

/// A present problem.
#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
pub struct Problem {
    /// Part of the daemon.
    pub component: Component,
    /// Cause, in words.
    pub message: String,
    /// Seconds since the problem was first seen.
    pub since_s: u64,
}

/// Answer of `/readyz`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Readiness {
    pub(super) ready: bool,
    pub(super) missing: Vec<Component>,
    pub(super) problems: Vec<Problem>,
}

/// Versions of the servers that this replica is connected to; each is absent before the first connection.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, JsonSchema)]
pub struct Servers {
    /// PostgreSQL.
    pub postgresql: Option<ServerVersion>,
    /// RabbitMQ.
    pub rabbitmq: Option<ServerVersion>,
}

/// Version of a server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, JsonSchema)]
pub struct ServerVersion {
    /// Version that the server reports.
    pub version: String,
    /// False if it is newer than the versions that this daemon was tested on.
    pub tested: bool,
}

/// Pause of a tenant that Graph throttled, as this replica knows it.
#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
pub struct TenantPause {
    /// Tenant.
    pub tenant_id: Uuid,
    /// Family of Graph's limits that the pause is for.
    pub family: String,
    /// Seconds until the end of the pause.
    pub remaining_s: f64,
}

/// Answer of `/status`. Keys are only added within a version.
#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
#[schemars(title = "inventoryd status, version 1")]
pub struct Status {
    /// State of the database.
    pub database: DatabaseState,
    /// True while the daemon drains before it stops.
    pub draining: bool,
    /// Deliveries in flight on this replica.
    pub in_flight: usize,
    /// Deliveries held because the broker permanently refuses their copies.
    pub held: usize,
    /// Age of the oldest unpublished event in seconds, over all replicas; absent without the database.
    pub outbox_oldest_s: Option<f64>,
    /// Unpublished events over all replicas; absent without the database.
    pub outbox_unsent: Option<i64>,
    /// Reason for a pause of consumption.
    pub paused: Option<String>,
    /// Tenants whose requests wait because Graph throttled them, the longest pause first; at most 100 are listed.
    pub paused_tenants: Vec<TenantPause>,
    /// Reason for a missing subscription.
    pub problem: Option<String>,
    /// Present problems, each with its cause and duration.
    pub problems: Vec<Problem>,
    /// Versions of the servers.
    pub servers: Servers,
    /// Name of this replica.
    pub replica: String,
    /// Running runs over all replicas; absent without the database.
    pub running_runs: Option<i64>,
    /// True while there is a live subscription.
    pub subscribed: bool,
    /// Seconds since the start of this process.
    pub uptime_s: u64,
    /// Version of the daemon.
    pub version: String,
}

/// First sighting of each present problem.
#[derive(Debug, Default)]
pub(super) struct ProblemLog(Mutex<BTreeMap<Component, Instant>>);

impl ProblemLog {
    /// Adds the duration to each present problem, and forgets the ones that are over.
    pub(super) fn update(&self, present: Vec<(Component, String)>) -> Vec<Problem> {
        let mut seen = self.0.lock();
        seen.retain(|component, _| present.iter().any(|(other, _)| other == component));
        let dated = |(component, message)| {
            let since = seen.entry(component).or_insert_with(Instant::now);
            Problem { component, message, since_s: since.elapsed().as_secs() }
        };
        present.into_iter().map(dated).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_problem_keeps_its_start_until_it_is_over() {
        let log = ProblemLog::default();
        let present = || vec![(Component::Database, "x".to_owned())];
        log.update(present());
        tokio::time::advance(Duration::from_secs(7)).await;
        assert_eq!(log.update(present())[0].since_s, 7);
        log.update(Vec::new());
        assert_eq!(log.update(present())[0].since_s, 0);
    }
}
