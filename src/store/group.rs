//! Groups: calls that arrive while others are being made are made together by the next statement.
//!
//! Most of the cost of a short call is its transaction: under load, one for several is cheaper, and without load a call is a group
//! of its own. If a group fails or takes long, nothing of it was written and each of its calls is made by itself, so that one
//! that is locked, slow or refused does not affect the others.

use std::time::{Duration, Instant};

use sqlx::postgres::{PgConnection, PgPool};
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;
use uuid::Uuid;

use super::StoreError;

/// Calls of one statement.
const MAX_CALLS: usize = 16;

/// Row of a function that makes calls of one kind together.
pub(super) trait Grouped: Sized + Send + 'static {
    /// Makes the calls of a JSON array; returns a row for each, in their order.
    fn make(connection: &mut PgConnection, calls: String) -> impl Future<Output = sqlx::Result<Vec<Self>>> + Send;
}

/// Calls of one kind, each with a row `R`; clones share them.
#[derive(Debug)]
pub(super) struct Group<R>(mpsc::Sender<Call<R>>);

/// A call that waits for its group.
#[derive(Debug)]
struct Call<R> {
    tenant_id: Uuid,
    json: String,
    reply: oneshot::Sender<Result<Option<Made<R>>, StoreError>>,
}

/// A call that was made.
#[derive(Debug)]
pub(super) struct Made<R> {
    /// Time before the statement was sent.
    pub(super) begun: Instant,
    pub(super) row: R,
}

impl<R> Clone for Group<R> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<R: Grouped> Group<R> {
    /// Groups that are made one after another, on a connection of `pool`.
    pub(super) fn new(pool: &PgPool, statement_limit: Duration) -> Self {
        let (sender, waiting) = mpsc::channel(MAX_CALLS);
        tokio::spawn(make_groups(pool.clone(), statement_limit, waiting));
        Self(sender)
    }

    /// Makes a call together with those that wait. `None`: it was not made, and the caller makes it by itself.
    ///
    /// # Errors
    /// No reply: the call may have been made.
    pub(super) async fn make(&self, tenant_id: Uuid, json: String) -> Result<Option<Made<R>>, StoreError> {
        let (reply, row) = oneshot::channel();
        if self.0.send(Call { tenant_id, json, reply }).await.is_err() {
            return Ok(None);
        }
        row.await.unwrap_or_else(|_| Err(StoreError::Group("database: no reply".to_owned())))
    }
}

/// Makes groups until the store is dropped, or its database proves unable to.
async fn make_groups<R: Grouped>(pool: PgPool, statement_limit: Duration, mut waiting: mpsc::Receiver<Call<R>>) {
    let mut group = Vec::with_capacity(MAX_CALLS);
    while waiting.recv_many(&mut group, MAX_CALLS).await > 0 {
        group.retain(|call: &Call<R>| !call.reply.is_closed());
        // Groups of several replicas lock the rows of the tenants that they have in common in this order.
        group.sort_by_key(|call| call.tenant_id);
        let json: Vec<&str> = group.iter().map(|call| call.json.as_str()).collect();
        let calls = format!("[{}]", json.join(","));
        let Ok(mut connection) = pool.acquire().await else {
            // Nothing was sent. Other connections may be open, or their failure is named to each caller.
            group.drain(..).for_each(|call| call.reply(Ok(None)));
            continue;
        };
        let begun = Instant::now();
        let made = timeout(statement_limit, R::make(&mut connection, calls)).await;
        match made.map_or(Err(StoreError::Timeout), |made| made.map_err(StoreError::from)) {
            Ok(rows) => group.drain(..).zip(rows).for_each(|(call, row)| call.reply(Ok(Some(Made { begun, row })))),
            Err(error) if error.is_rolled_back() => {
                tracing::debug!(%error, calls = group.len(), "a group was rolled back; each of its calls is made by itself");
                group.drain(..).for_each(|call| call.reply(Ok(None)));
                if error.is_unsupported() {
                    waiting.close();
                    while let Some(call) = waiting.recv().await {
                        call.reply(Ok(None));
                    }
                    return;
                }
            }
            Err(error) => {
                let error = error.to_string();
                group.drain(..).for_each(|call| call.reply(Err(StoreError::Group(error.clone()))));
            }
        }
    }
}

impl<R> Call<R> {
    fn reply(self, reply: Result<Option<Made<R>>, StoreError>) {
        // Fails if the caller has gone.
        let _ = self.reply.send(reply);
    }
}
