//! Failure of a list, and what the pager can do about it.

use crate::domain::failure::{ErrorCode, Failure};

/// Failure of a list.
#[derive(Debug)]
pub(in crate::graph) struct ListError {
    /// Failure that the run records.
    pub(in crate::graph) failure: Failure,
    /// Recovery that is open to the pager.
    pub(in crate::graph) recovery: Recovery,
    /// Reason of a failed connection, in our own words.
    pub(in crate::graph) detail: Option<String>,
    /// Application permissions of which Graph names one as missing.
    pub(in crate::graph) permissions: Vec<String>,
}

/// Recovery from a failed request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::graph) enum Recovery {
    /// The request may succeed without `$select` or `$top`: both are hints, and services behind Graph reject them in
    /// many ways.
    WithoutOptions,
    /// The page token has expired: the list can be restarted from its first page.
    Restart,
    /// Graph says that nothing exists under the link.
    NotFound,
    /// None.
    None,
}

impl From<Failure> for ListError {
    fn from(failure: Failure) -> Self {
        Self { failure, recovery: Recovery::None, detail: None, permissions: Vec::new() }
    }
}

impl From<ErrorCode> for ListError {
    fn from(code: ErrorCode) -> Self {
        Failure::from(code).into()
    }
}
