//! Properties of the server, database, role and session that the SQL depends on: pinned on every connection where a client can
//! set them, checked by `migrate`, `check` and `serve` where it cannot.

use sqlx::PgConnection;

use super::StoreError;

/// Settings of every connection. sqlx itself pins `client_encoding`, `DateStyle`, `TimeZone` and `extra_float_digits`.
pub(super) const PINNED: &[(&str, &str)] = &[
    // Admission and fences rely on each statement seeing what committed while it waited for a lock.
    ("default_transaction_isolation", "read committed"),
    // A request is acknowledged once its run is committed: the commit must survive a crash of the server. Only the commit of an
    // admission does not wait: see inventory_admit.
    ("synchronous_commit", "on"),
    // statement_timeout bounds every wait; a lock timeout below it would turn a slow batch into an outage.
    ("lock_timeout", "0"),
    ("idle_session_timeout", "0"),
    // The policies for the role of the daemon let it see every tenant; "off" would turn each statement into an error.
    ("row_security", "on"),
    ("client_min_messages", "error"),
    // Short statements by key: compiling them takes longer than executing them.
    ("jit", "off"),
];

/// Setting of the connections of runs, whose statements all go by keys. One plan serves all calls, and it may be made while a table
/// is so small that scanning it is cheaper.
pub(super) const PINNED_FOR_RUNS: &[(&str, &str)] = &[("enable_seqscan", "off")];

/// Settings of the connection that migrates: a migration may take as long as it needs, and creates heap tables.
pub(super) const PINNED_FOR_MIGRATION: &[(&str, &str)] = &[
    ("statement_timeout", "0"),
    ("idle_in_transaction_session_timeout", "0"),
    ("default_table_access_method", "heap"),
    ("default_tablespace", ""),
];

/// Oldest server that is supported, as `server_version_num`.
const OLDEST_SERVER: i32 = 150_000;

/// True for the major versions of PostgreSQL that the tests run on, oldest and newest, and those between them.
pub(super) fn is_tested(version: u32) -> bool {
    (15..=18).contains(&(version / 10_000))
}

/// Properties that only the server, the database or the role can change.
#[derive(Debug)]
pub(super) struct ServerProperties {
    pub(super) version: i32,
    encoding: String,
    /// `off` loses committed transactions in a crash of the server.
    synchronous_commit: String,
    /// Anything but `origin` skips foreign keys and triggers.
    session_replication_role: String,
    /// Since PostgreSQL 17; milliseconds, 0 for none.
    transaction_timeout_ms: i64,
    statement_timeout_ms: i64,
    /// Read-only by a setting, as opposed to a standby, which is waited for.
    read_only_by_default: bool,
    fsync: bool,
    full_page_writes: bool,
    autovacuum: bool,
}

impl ServerProperties {
    pub(super) async fn read(connection: &mut PgConnection) -> Result<Self, StoreError> {
        let properties = sqlx::query_as!(
            Self,
            r#"select current_setting('server_version_num')::int as "version!", current_setting('server_encoding') as "encoding!",
                      current_setting('synchronous_commit') as "synchronous_commit!",
                      current_setting('session_replication_role') as "session_replication_role!",
                      coalesce((select setting::bigint from pg_settings where name = 'transaction_timeout'), 0)
                        as "transaction_timeout_ms!",
                      coalesce((select setting::bigint from pg_settings where name = 'statement_timeout'), 0)
                        as "statement_timeout_ms!",
                      current_setting('default_transaction_read_only')::bool and not pg_is_in_recovery()
                        as "read_only_by_default!",
                      current_setting('fsync')::bool as "fsync!", current_setting('full_page_writes')::bool as "full_page_writes!",
                      current_setting('autovacuum')::bool as "autovacuum!""#
        );
        properties.fetch_one(connection).await.map_err(|error| match &error {
            // SQLSTATE 25P04: the transaction timeout is so short that its own value cannot be read.
            sqlx::Error::Database(refused) if refused.code().as_deref() == Some("25P04") => StoreError::Setting(
                "transaction_timeout is too short for any statement: `alter role … set transaction_timeout = 0`"
                    .to_owned(),
            ),
            _ => error.into(),
        })
    }

    /// The first property that breaks a promise, with its cure.
    pub(super) fn check(&self) -> Result<(), StoreError> {
        let problem = if self.version < OLDEST_SERVER {
            format!("PostgreSQL {} is too old: use version 15 or newer", self.version / 10_000)
        } else if self.encoding != "UTF8" {
            format!(
                "the encoding of the database is {}, which cannot hold every name: create it with \
                 `create database … encoding 'UTF8' template template0`",
                self.encoding
            )
        } else if self.read_only_by_default {
            "default_transaction_read_only is on, so nothing can be written: \
             `alter role … set default_transaction_read_only = off`"
                .to_owned()
        } else if self.synchronous_commit == "off" {
            "synchronous_commit is off, so a crash of the server loses runs whose requests are acknowledged: \
             `alter role … set synchronous_commit = on`"
                .to_owned()
        } else if self.session_replication_role != "origin" {
            format!(
                "session_replication_role is {}, which skips foreign keys: `alter role … reset session_replication_role`",
                self.session_replication_role
            )
        } else if (1..self.statement_timeout_ms).contains(&self.transaction_timeout_ms) {
            format!(
                "transaction_timeout is {} ms, less than database.statement_timeout_s: \
                 `alter role … set transaction_timeout = 0`",
                self.transaction_timeout_ms
            )
        } else {
            return Ok(());
        };
        Err(StoreError::Setting(problem))
    }

    /// Settings of the server that an operator may have chosen, and should know of.
    pub(super) fn warnings(&self) -> Vec<&'static str> {
        let doubtful = [
            (
                !is_tested(self.version.cast_unsigned()),
                "PostgreSQL is newer than the versions that were tested, 15 to 18",
            ),
            (!self.fsync, "fsync is off: a crash of the server can lose or corrupt the inventory"),
            (!self.full_page_writes, "full_page_writes is off: a crash of the server can corrupt the inventory"),
            (!self.autovacuum, "autovacuum is off: tables grow without bound unless something else vacuums them"),
        ];
        doubtful.into_iter().filter_map(|(applies, warning)| applies.then_some(warning)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn healthy() -> ServerProperties {
        ServerProperties {
            version: OLDEST_SERVER,
            encoding: "UTF8".to_owned(),
            synchronous_commit: "on".to_owned(),
            session_replication_role: "origin".to_owned(),
            transaction_timeout_ms: 0,
            statement_timeout_ms: 60_000,
            read_only_by_default: false,
            fsync: true,
            full_page_writes: true,
            autovacuum: true,
        }
    }

    #[test]
    fn each_property_is_refused_with_its_name_and_cure() {
        assert!(healthy().check().is_ok());
        assert!(healthy().warnings().is_empty());
        assert_eq!(ServerProperties { version: 190_000, ..healthy() }.warnings().len(), 1);
        assert!(ServerProperties { transaction_timeout_ms: 60_000, ..healthy() }.check().is_ok());
        let refused = [
            (ServerProperties { version: OLDEST_SERVER - 1, ..healthy() }, "PostgreSQL 14 is too old"),
            (ServerProperties { encoding: "LATIN1".to_owned(), ..healthy() }, "encoding 'UTF8'"),
            (ServerProperties { encoding: "SQL_ASCII".to_owned(), ..healthy() }, "SQL_ASCII"),
            (ServerProperties { read_only_by_default: true, ..healthy() }, "set default_transaction_read_only = off"),
            (ServerProperties { synchronous_commit: "off".to_owned(), ..healthy() }, "synchronous_commit = on"),
            (
                ServerProperties { session_replication_role: "replica".to_owned(), ..healthy() },
                "session_replication_role",
            ),
            (ServerProperties { transaction_timeout_ms: 59_999, ..healthy() }, "transaction_timeout is 59999 ms"),
        ];
        for (properties, named) in refused {
            let error = properties.check().unwrap_err();
            assert!(error.is_refusal() && error.to_string().contains(named), "{error}");
        }
    }

    #[test]
    fn doubtful_server_settings_are_warned_of() {
        assert_eq!(healthy().warnings(), [""; 0]);
        let doubtful = ServerProperties { fsync: false, full_page_writes: false, autovacuum: false, ..healthy() };
        assert_eq!(doubtful.warnings().len(), 3);
    }
}
