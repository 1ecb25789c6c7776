//! A transaction on a connection of its own, which never goes back to its pool open.

use std::ops::{Deref, DerefMut};

use sqlx::pool::PoolConnection;
use sqlx::postgres::PgPool;
use sqlx::{Executor, PgConnection, Postgres};

use super::StoreError;

/// An open transaction. Unless it is committed its connection is closed, which ends it on the server as well.
///
/// sqlx would roll it back and lend the connection again. But a `begin` that is cancelled half way leaves a transaction
/// that its client does not know of (sqlx 0.9.0), and whoever got the connection next would write into it. To roll
/// back every connection that comes back would be a round trip for every statement; to close the few that were
/// cancelled or have failed costs nothing while all is well.
pub(super) struct Transaction {
    connection: PoolConnection<Postgres>,
    open: bool,
}

impl Transaction {
    pub(super) async fn begin(pool: &PgPool) -> Result<Self, StoreError> {
        // From here on it counts as open, however far the statement gets.
        let mut transaction = Self { connection: pool.acquire().await?, open: true };
        transaction.connection.execute("begin").await?;
        Ok(transaction)
    }

    pub(super) async fn commit(mut self) -> Result<(), StoreError> {
        self.connection.execute("commit").await?;
        self.open = false;
        Ok(())
    }
}

impl Deref for Transaction {
    type Target = PgConnection;

    fn deref(&self) -> &PgConnection {
        &self.connection
    }
}

impl DerefMut for Transaction {
    fn deref_mut(&mut self) -> &mut PgConnection {
        &mut self.connection
    }
}

impl Drop for Transaction {
    fn drop(&mut self) {
        if self.open {
            self.connection.close_on_drop();
        }
    }
}
