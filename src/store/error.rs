//! Errors of the store, classified by what the caller can do about them.

/// A failed database operation.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The fence rejected a write: the run ended or was taken over. Nothing was written.
    #[error("the lease on the run is lost")]
    LeaseLost,
    /// The schema is not the one that this version needs.
    #[error("{0}")]
    Schema(String),
    /// A setting of the server, database or role on which correctness or durability depends.
    #[error("database: {0}")]
    Setting(String),
    /// An error of PostgreSQL or of the connection to it.
    #[error("database: {}", describe(.0))]
    Database(#[from] sqlx::Error),
    /// No response within the statement timeout.
    #[error("database: no response within the statement timeout")]
    Timeout,
    /// The database accepts connections but no writes.
    #[error("database: it is read-only")]
    ReadOnly,
    /// A row that no version of this daemon writes.
    #[error("database: a row cannot be read: {0}")]
    CorruptRow(String),
}

impl StoreError {
    /// True if the write was rejected because the run no longer belongs to this worker.
    #[must_use]
    pub fn is_lease_lost(&self) -> bool {
        matches!(self, Self::LeaseLost)
    }

    /// True if waiting cannot help: a wrong password, database, privilege, schema or setting.
    #[must_use]
    pub fn is_refusal(&self) -> bool {
        match self {
            Self::Schema(_) | Self::Setting(_) => true,
            // SQLSTATE classes: 28 authorisation, 3D no such database, 42 privileges and unknown names.
            Self::Database(sqlx::Error::Database(error)) => has_class(error.as_ref(), &["28", "3D", "42"]),
            _ => false,
        }
    }

    /// True if a healthy database would reject the same data again.
    #[must_use]
    pub fn is_data_rejected(&self) -> bool {
        match self {
            Self::CorruptRow(_) => true,
            // SQLSTATE classes: 21 cardinality, 22 data, 23 constraint. Privileges and the schema (42) can be repaired.
            Self::Database(sqlx::Error::Database(error)) => has_class(error.as_ref(), &["21", "22", "23"]),
            _ => false,
        }
    }

    /// True if another session held a lock for longer than the statement may wait for it.
    #[must_use]
    pub fn is_lock_timeout(&self) -> bool {
        matches!(self, Self::Database(sqlx::Error::Database(error)) if error.code().as_deref() == Some("55P03"))
    }
}

/// Text of an error, with the cure where the server's own words do not suggest it.
fn describe(error: &sqlx::Error) -> String {
    match error {
        // SQLSTATE 53300: too_many_connections, of the server, the role or the database.
        sqlx::Error::Database(error) if error.code().as_deref() == Some("53300") => format!(
            "connection limit reached: {}; raise the limit, or lower database.max_connections or the number of replicas",
            error.message()
        ),
        sqlx::Error::Database(error) => match error.code().as_deref().map(cure) {
            Some(cure) if !cure.is_empty() => format!("{}; {cure}", error.message()),
            _ => error.message().to_owned(),
        },
        other => other.to_string(),
    }
}

/// Cure of an error by its SQLSTATE; empty where the text of the server suggests it, or the cause is not known.
fn cure(code: &str) -> &'static str {
    match code {
        "28P01" | "28000" => "correct the user and password of database.url",
        "3D000" => "correct the database of database.url, or create it",
        "42501" => "migrate as the owner of the tables, and grant the daemon its role with deploy/sql/roles.sql",
        "53100" => "free the disk of the database",
        _ => "",
    }
}

fn has_class(error: &dyn sqlx::error::DatabaseError, classes: &[&str]) -> bool {
    error.code().is_some_and(|code| classes.iter().any(|class| code.starts_with(class)))
}

/// Wraps an error of decoding a row.
pub(super) fn corrupt_row(error: impl std::fmt::Display) -> StoreError {
    StoreError::CorruptRow(error.to_string())
}
