//! Batches of short calls: calls that arrive while a batch is being executed form the next one, which is one statement.
//!
//! Most of the cost of a short call is its transaction: under load, one for several is cheaper, and without load each call is a
//! batch of its own. A batch that fails or takes too long is rolled back, and each of its calls is executed alone, so that one that is
//! locked, slow or rejected does not affect the others.

use std::time::{Duration, Instant};

use sqlx::postgres::{PgConnection, PgPool};
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;
use uuid::Uuid;

use super::StoreError;

/// Calls of one batch.
const MAX_CALLS: usize = 16;
/// Time that one batch may delay the next. The server cancels its statement after this time; its commit may take longer.
pub(super) const MAX_DELAY: Duration = Duration::from_secs(2);

/// Row of a function that executes a batch.
pub(super) trait Batched: Sized + Send + 'static {
    /// Executes the calls of a JSON array; returns a row for each, in their order.
    fn execute(connection: &mut PgConnection, calls: String) -> impl Future<Output = sqlx::Result<Vec<Self>>> + Send;
}

/// Batches of one kind of call, whose result is a row `R`.
#[derive(Debug)]
pub(super) struct Batcher<R>(mpsc::Sender<Call<R>>);

/// A call that waits for its batch.
#[derive(Debug)]
struct Call<R> {
    tenant_id: Uuid,
    arguments: String,
    reply: oneshot::Sender<Result<Option<Executed<R>>, StoreError>>,
}

/// An executed call.
#[derive(Debug)]
pub(super) struct Executed<R> {
    /// Time before the statement was sent.
    pub(super) sent: Instant,
    pub(super) row: R,
}

impl<R> Clone for Batcher<R> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<R: Batched> Batcher<R> {
    /// A batcher that uses the connections of `pool` until its last clone is dropped.
    pub(super) fn new(pool: &PgPool, statement_limit: Duration) -> Self {
        let (sender, waiting) = mpsc::channel(MAX_CALLS);
        tokio::spawn(execute_batches(pool.clone(), statement_limit, waiting));
        Self(sender)
    }

    /// Executes a call, given as a JSON object, in a batch. `None`: it had no effect, and the caller executes it alone.
    ///
    /// # Errors
    /// No reply: the call may have been executed.
    pub(super) async fn execute(&self, tenant_id: Uuid, arguments: String) -> Result<Option<Executed<R>>, StoreError> {
        let (reply, result) = oneshot::channel();
        if self.0.send(Call { tenant_id, arguments, reply }).await.is_err() {
            return Ok(None);
        }
        result.await.unwrap_or_else(|_| Err(StoreError::Batch("database: no reply".to_owned())))
    }
}

/// Executes batches one after another until no sender is left. If the database does not support them, each call is executed alone.
async fn execute_batches<R: Batched>(pool: PgPool, statement_limit: Duration, mut waiting: mpsc::Receiver<Call<R>>) {
    loop {
        let mut batch = Vec::with_capacity(MAX_CALLS);
        if waiting.recv_many(&mut batch, MAX_CALLS).await == 0 {
            return;
        }
        // A task of its own: a batch that waits for a slow commit or on a dead connection completes while others are executed.
        let execution = tokio::spawn(execute_batch(pool.clone(), statement_limit, batch));
        if let Ok(Ok(Supported(false))) = timeout(MAX_DELAY, execution).await {
            break;
        }
    }
    while let Some(call) = waiting.recv().await {
        call.reply(Ok(None));
    }
}

/// Result of a batch: `false` if this database cannot execute any.
struct Supported(bool);

async fn execute_batch<R: Batched>(pool: PgPool, statement_limit: Duration, mut batch: Vec<Call<R>>) -> Supported {
    batch.retain(|call| !call.reply.is_closed());
    // Replicas lock the rows of the tenants that their batches have in common in the same order.
    batch.sort_by_key(|call| call.tenant_id);
    let calls: Vec<&str> = batch.iter().map(|call| call.arguments.as_str()).collect();
    let calls = format!("[{}]", calls.join(","));
    let Ok(mut connection) = pool.acquire().await else {
        // Nothing was sent. The connections for single calls may be open; if not, each caller gets the cause.
        batch.into_iter().for_each(|call| call.reply(Ok(None)));
        return Supported(true);
    };
    let sent = Instant::now();
    let executed = timeout(statement_limit, R::execute(&mut connection, calls)).await;
    match executed.map_or(Err(StoreError::Timeout), |executed| executed.map_err(StoreError::from)) {
        Ok(rows) => batch.into_iter().zip(rows).for_each(|(call, row)| call.reply(Ok(Some(Executed { sent, row })))),
        Err(error) if error.is_rolled_back() => {
            tracing::debug!(%error, calls = batch.len(), "batch rolled back; executing each call alone");
            batch.into_iter().for_each(|call| call.reply(Ok(None)));
            return Supported(!error.is_unsupported());
        }
        Err(error) => {
            let error = error.to_string();
            batch.into_iter().for_each(|call| call.reply(Err(StoreError::Batch(error.clone()))));
        }
    }
    Supported(true)
}

impl<R> Call<R> {
    fn reply(self, reply: Result<Option<Executed<R>>, StoreError>) {
        // Fails if the caller has gone.
        let _ = self.reply.send(reply);
    }
}
