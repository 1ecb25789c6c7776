//! Keeping the fleet in step: Graph's limits are shared by all replicas, and so is the news that Graph is to be left alone.

use std::time::Duration;

use tokio::sync::broadcast::error::RecvError;
use tokio_util::sync::CancellationToken;
use tracing::debug;

use crate::graph::{GraphClient, PauseNotice};
use crate::store::{Store, StoreError};

/// How often a replica says that it lives.
const SIGN_OF_LIFE: Duration = Duration::from_secs(15);
/// After so long without a sign it is not counted any more.
const SILENT_AFTER: Duration = Duration::from_secs(50);
/// How often the gates that others have closed are looked at.
const LOOK_AT_GATES: Duration = Duration::from_secs(3);

/// Tells the other replicas what this one learns of Graph's limits, and the other way round.
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

    /// Works until `stop`. A database that is away costs nothing but the sharing: each replica goes on by itself.
    pub async fn run(self, stop: &CancellationToken) {
        let mut changes = self.graph.pause_notices();
        let mut sign_of_life = tokio::time::interval(SIGN_OF_LIFE);
        let mut look_at_gates = tokio::time::interval(LOOK_AT_GATES);
        loop {
            let done = tokio::select! {
                () = stop.cancelled() => break,
                change = changes.recv() => self.announce(change).await,
                _ = sign_of_life.tick() => self.count().await,
                _ = look_at_gates.tick() => self.heed().await,
            };
            if let Err(error) = done {
                debug!(%error, "the fleet is not in step");
            }
        }
        if let Err(error) = self.store.leave_fleet(&self.replica).await {
            debug!(%error, "the fleet forgets this replica by itself");
        }
    }

    async fn announce(&self, change: Result<PauseNotice, RecvError>) -> Result<(), StoreError> {
        match change {
            Ok(change) => self.store.announce_pause(change.tenant_id, change.family, change.duration).await,
            // The newest matter, and they are still there.
            Err(_) => Ok(()),
        }
    }

    async fn count(&self) -> Result<(), StoreError> {
        let replicas = self.store.count_replicas(&self.replica, SILENT_AFTER).await?;
        self.graph.set_replicas(u32::try_from(replicas).unwrap_or(1));
        Ok(())
    }

    async fn heed(&self) -> Result<(), StoreError> {
        for gate in self.store.pauses().await? {
            self.graph.pause(gate.tenant_id, &gate.family, Duration::from_secs_f64(gate.left_s.max(0.0)));
        }
        Ok(())
    }
}
