//! Errors of the store, classified by what the caller can do about them.

use std::io;

use crate::tls::find_error;

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
    /// The batch that the call was part of got no reply.
    #[error("{0}")]
    Batch(String),
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

    /// True if the server rejected the statement, so that it had no effect.
    pub(super) fn is_rolled_back(&self) -> bool {
        match self {
            // SQLSTATE class 08: a pooler lost the server, perhaps after the commit; 40003: the server does not know.
            Self::Database(sqlx::Error::Database(error)) => !has_class(error.as_ref(), &["08", "40003"]),
            _ => false,
        }
    }

    /// True if this database cannot execute the statement: a distributed one cannot lock rows of several nodes.
    pub(super) fn is_unsupported(&self) -> bool {
        matches!(self, Self::Database(sqlx::Error::Database(error)) if error.code().as_deref() == Some("0A000"))
    }

    /// True if another session held a lock for longer than the statement may wait for it.
    #[must_use]
    pub fn is_lock_timeout(&self) -> bool {
        matches!(self, Self::Database(sqlx::Error::Database(error)) if error.code().as_deref() == Some("55P03"))
    }
}

/// Text of an error, with the cure where the server's own words do not suggest it.
fn describe(error: &sqlx::Error) -> String {
    let (cause, cure) = match error {
        sqlx::Error::Database(error) => {
            (error.message().to_owned(), cure(error.code().as_deref().unwrap_or_default(), error.message()))
        }
        sqlx::Error::PoolTimedOut => (
            "no connection within database.acquire_timeout_s".to_owned(),
            "`inventoryd check --connect` names the cause",
        ),
        sqlx::Error::Io(_) | sqlx::Error::Tls(_) => (error.to_string(), cure_of_connection(error)),
        other => (other.to_string(), ""),
    };
    if cure.is_empty() { cause } else { format!("{cause}; {cure}") }
}

/// Cure of an error by its SQLSTATE; empty where the text of the server suggests it, or the cause is not known.
fn cure(code: &str, message: &str) -> &'static str {
    match code {
        "28000" if message.contains("pg_hba.conf") && message.contains("no encryption") => {
            "allow this user, database and host in pg_hba.conf; if its entry demands TLS, set sslmode=require in database.url"
        }
        "28000" if message.contains("pg_hba.conf") => "allow this user, database and host in pg_hba.conf",
        "28000" if message.contains("client certificate") => "set sslcert and sslkey in database.url",
        "28000" if message.contains("role") => "correct the user of database.url, or create the role with login",
        "28P01" | "28000" => "correct the user and password of database.url",
        "3D000" => "correct the database of database.url, or create it",
        "42501" if message.contains("permission denied for database") => "grant the user connect on the database",
        "42501" => "migrate as the owner of the tables, and grant the daemon its role with deploy/sql/roles.sql",
        // too_many_connections, of the server, the role or the database.
        "53300" => {
            "connection limit reached: raise the limit, or lower database.max_connections or the number of replicas"
        }
        "53100" => "free the disk of the database",
        _ => "",
    }
}

/// Cure of a connection that failed or broke.
fn cure_of_connection(error: &sqlx::Error) -> &'static str {
    use rustls::CertificateError::{NotValidForName, NotValidForNameContext, UnknownIssuer};
    use rustls::Error::InvalidCertificate;
    match find_error::<rustls::Error>(error) {
        Some(InvalidCertificate(UnknownIssuer)) => {
            return "set sslrootcert in database.url to the authority of the server's certificate";
        }
        Some(InvalidCertificate(NotValidForName | NotValidForNameContext { .. })) => {
            return "use a name of the server's certificate as the host in database.url, or sslmode=verify-ca";
        }
        Some(_) => {
            return "replace the certificate of the server, or correct sslmode, sslcert and sslkey in database.url";
        }
        None => {}
    }
    let text = error.to_string();
    match find_error::<io::Error>(error).map(io::Error::kind) {
        Some(io::ErrorKind::ConnectionRefused) => "start PostgreSQL, or correct the host and port in database.url",
        _ if text.contains("failed to lookup address") => {
            "correct the host in database.url, or the DNS of this machine"
        }
        _ if text.contains("does not support TLS") => {
            "enable ssl on the server, or set sslmode=disable in database.url"
        }
        _ => "check that PostgreSQL is running and that database.url is correct",
    }
}

fn has_class(error: &dyn sqlx::error::DatabaseError, classes: &[&str]) -> bool {
    error.code().is_some_and(|code| classes.iter().any(|class| code.starts_with(class)))
}

/// Wraps an error of decoding a row.
pub(super) fn corrupt_row(error: impl std::fmt::Display) -> StoreError {
    StoreError::CorruptRow(error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_refusal_of_a_connection_names_its_cure() {
        let refused = "for host \"10.0.0.7\", user \"a\", database \"d\"";
        for (code, message, expected) in [
            ("28P01", "password authentication failed for user \"a\"", "user and password of database.url"),
            ("28000", "role \"a\" does not exist", "user of database.url"),
            ("28000", "role \"a\" is not permitted to log in", "role with login"),
            ("28000", &format!("no pg_hba.conf entry {refused}, no encryption"), "sslmode=require"),
            ("28000", &format!("pg_hba.conf rejects connection {refused}, SSL encryption"), "in pg_hba.conf"),
            ("28000", "connection requires a valid client certificate", "sslcert"),
            ("3D000", "database \"d\" does not exist", "database of database.url"),
            ("42501", "permission denied for database \"d\"", "connect on the database"),
            ("42501", "permission denied for table runs", "deploy/sql/roles.sql"),
            ("53300", "sorry, too many clients already", "database.max_connections"),
            ("53300", "too many connections for role \"a\"", "connection limit reached"),
        ] {
            assert!(cure(code, message).contains(expected), "{code} {message}");
        }
        assert_eq!(cure("57P03", "the database system is starting up"), "", "waiting is the cure");
    }

    #[test]
    fn a_failed_connection_is_explained_by_its_kind() {
        let tls = |error| sqlx::Error::Tls(Box::new(io::Error::other(rustls::Error::InvalidCertificate(error))));
        for (error, expected) in [
            (sqlx::Error::Io(io::ErrorKind::ConnectionRefused.into()), "start PostgreSQL"),
            (sqlx::Error::Io(io::ErrorKind::ConnectionReset.into()), "PostgreSQL is running"),
            (sqlx::Error::Tls("server does not support TLS".into()), "sslmode=disable"),
            (tls(rustls::CertificateError::UnknownIssuer), "sslrootcert"),
            (tls(rustls::CertificateError::NotValidForName), "name of the server's certificate"),
            (tls(rustls::CertificateError::Expired), "replace the certificate"),
            (sqlx::Error::PoolTimedOut, "check --connect"),
        ] {
            let text = StoreError::from(error).to_string();
            assert!(text.contains(expected), "{expected} is not in {text}");
        }
    }
}
