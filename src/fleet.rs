//! State shared by the replicas: their number, by which the rate limits of Graph are divided, the turns of limits too low for
//! that, and the pauses that Graph asked for.

use std::time::Duration;

use tokio::sync::broadcast::error::RecvError;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tracing::debug;

use crate::graph::{GraphClient, PauseNotice, TurnRequest};
use crate::store::{Store, StoreError};

const HEARTBEAT_INTERVAL: Duration = Duration::from_secs(15);
/// Age of a heartbeat from which its replica is no longer counted.
const HEARTBEAT_EXPIRES_AFTER: Duration = Duration::from_secs(50);
const PAUSE_POLL_INTERVAL: Duration = Duration::from_secs(3);

/// Exchanges heartbeats and pauses with the other replicas.
#[derive(Debug)]
pub struct Fleet {
    store: Store,
    graph: GraphClient,
    replica: String,
}

impl Fleet {
    /// The fleet as seen by `replica`.
    #[must_use]
    pub fn new(store: Store, graph: GraphClient, replica: &str) -> Self {
        Self { store, graph, replica: replica.to_owned() }
    }

    /// Runs until `stop`. While the database is unavailable each replica uses its own pauses and the last known number.
    pub async fn run(self, stop: &CancellationToken) {
        let granting = grant_turns(self.store.clone(), self.graph.turn_requests());
        let _granting = AbortOnDropHandle::new(tokio::spawn(granting));
        let mut notices = self.graph.pause_notices();
        let mut heartbeat = tokio::time::interval(HEARTBEAT_INTERVAL);
        let mut pause_poll = tokio::time::interval(PAUSE_POLL_INTERVAL);
        loop {
            let done = tokio::select! {
                () = stop.cancelled() => break,
                notice = notices.recv() => self.announce(notice).await,
                _ = heartbeat.tick() => self.count_replicas().await,
                _ = pause_poll.tick() => self.apply_pauses().await,
            };
            if let Err(error) = done {
                debug!(%error, "state of the replicas not exchanged");
            }
        }
        if let Err(error) = self.store.leave_fleet(&self.replica).await {
            debug!(%error, "the heartbeat of this replica was not removed; it expires");
        }
    }

    async fn announce(&self, notice: Result<PauseNotice, RecvError>) -> Result<(), StoreError> {
        match notice {
            Ok(notice) => self.store.announce_pause(notice.tenant_id, notice.family, notice.duration).await,
            // Some were dropped: the newest ones matter, and are still in the channel.
            Err(_) => Ok(()),
        }
    }

    async fn count_replicas(&self) -> Result<(), StoreError> {
        let replicas = self.store.count_replicas(&self.replica, HEARTBEAT_EXPIRES_AFTER).await?;
        self.graph.set_replicas(u32::try_from(replicas).unwrap_or(1));
        Ok(())
    }

    async fn apply_pauses(&self) -> Result<(), StoreError> {
        for pause in self.store.pauses().await? {
            self.graph.pause(pause.tenant_id, &pause.family, Duration::from_secs_f64(pause.left_s.max(0.0)));
        }
        Ok(())
    }
}

/// Grants turns through the database until the client is dropped. A request that gets none uses the part of its own replica.
pub async fn grant_turns(store: Store, mut requests: mpsc::Receiver<TurnRequest>) {
    let mut granting = JoinSet::new();
    while let Some(request) = requests.recv().await {
        let store = store.clone();
        granting.spawn(async move {
            match store.take_turn(request.tenant_id, request.family, request.interval).await {
                // The requester may have given up meanwhile: its turn stays unused.
                Ok(wait) => _ = request.reply.send(wait),
                Err(error) => debug!(%error, "turn not granted"),
            }
        });
        while granting.try_join_next().is_some() {}
    }
}
