//! Present problems with Graph and its token service, for an operator who asks for the state of the daemon.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use uuid::Uuid;

use super::auth::token_failure::TokenFailure;
use crate::domain::failure::ErrorCode;

/// Time for which a failed request counts as a present problem: a tenant that is no longer requested has none.
const REMEMBERED_FOR: Duration = Duration::from_secs(24 * 3_600);
/// Maximum number of problems that are listed.
const MAX_LISTED: usize = 20;

/// Present problem with Graph or the token service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GraphProblem {
    /// Cause and cure.
    pub message: String,
    /// Time since the first failed request.
    pub since: Duration,
}

/// Failed requests without a successful one after them.
#[derive(Debug, Default)]
pub(super) struct ProblemRegistry {
    tokens: Mutex<BTreeMap<(String, Uuid), FailedSince>>,
    connection: Mutex<Option<FailedSince>>,
}

#[derive(Debug, Clone)]
struct FailedSince {
    first: Instant,
    last: Instant,
    message: String,
}

impl FailedSince {
    fn record(earlier: Option<&Self>, message: String) -> Self {
        let now = Instant::now();
        Self { first: earlier.map_or(now, |earlier| earlier.first), last: now, message }
    }

    fn is_present(&self) -> bool {
        self.last.elapsed() < REMEMBERED_FOR
    }
}

impl ProblemRegistry {
    /// Records the result of a request for a token. The end of a run's time says nothing about the credential.
    pub(super) fn token_requested(&self, tenant_id: Uuid, credential: &str, failure: Option<&TokenFailure>) {
        let (mut tokens, key) = (self.tokens.lock(), (credential.to_owned(), tenant_id));
        match failure {
            None => drop(tokens.remove(&key)),
            Some(failure) if failure.failure.code == ErrorCode::DeadlineExceeded => {}
            Some(failure) => {
                let (cause, cure) = failure.explain(credential);
                let number = failure.failure.graph_code.as_deref().map(|code| format!(" ({code})")).unwrap_or_default();
                let record =
                    FailedSince::record(tokens.get(&key), format!("{}{number}: {cause} {cure}", failure.failure.code));
                tokens.insert(key, record);
            }
        }
    }

    /// Records whether Graph responded at all.
    pub(super) fn graph_requested(&self, failure: Option<&str>) {
        let mut connection = self.connection.lock();
        *connection = failure.map(|reason| {
            let message = format!("no response from Graph: {reason}; check the network and graph.proxy");
            FailedSince::record(connection.as_ref(), message)
        });
    }

    /// Problems that are present, one for all tenants of a credential that fail for the same reason.
    pub(super) fn present(&self) -> Vec<GraphProblem> {
        let mut by_reason: BTreeMap<(String, String), Vec<(Uuid, Instant)>> = BTreeMap::new();
        for ((credential, tenant_id), failed) in self.tokens.lock().iter().filter(|(_, failed)| failed.is_present()) {
            let reason = (credential.clone(), failed.message.clone());
            by_reason.entry(reason).or_default().push((*tenant_id, failed.first));
        }
        let of_tokens = by_reason.into_iter().filter_map(|((credential, message), tenants)| {
            let (tenant_id, first) = tenants.iter().min_by_key(|(_, first)| *first)?;
            let others = match tenants.len() {
                1 => String::new(),
                count => format!(" and {} more", count - 1),
            };
            let message = format!("no token with credential {credential} for tenant {tenant_id}{others}: {message}");
            Some(GraphProblem { message, since: first.elapsed() })
        });
        let connection = self.connection.lock().clone().filter(FailedSince::is_present);
        let connection =
            connection.map(|failed| GraphProblem { message: failed.message, since: failed.first.elapsed() });
        connection.into_iter().chain(of_tokens).take(MAX_LISTED).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::failure::Failure;

    fn failure(number: &str) -> TokenFailure {
        let failure = Failure::from_graph(ErrorCode::CredentialUnavailable, 401, Some(number), None);
        TokenFailure { failure, ..ErrorCode::CredentialUnavailable.into() }
    }

    fn messages(problems: &ProblemRegistry) -> Vec<String> {
        problems.present().into_iter().map(|problem| problem.message).collect()
    }

    #[test]
    fn tenants_with_the_same_problem_are_one_line_until_a_token_is_issued() {
        let problems = ProblemRegistry::default();
        let tenants: Vec<Uuid> = (1..=3).map(Uuid::from_u128).collect();
        for tenant in &tenants {
            problems.token_requested(*tenant, "default", Some(&failure("AADSTS7000222")));
        }
        problems.token_requested(tenants[0], "emea", Some(&failure("AADSTS700016")));
        problems.token_requested(tenants[0], "other", Some(&ErrorCode::DeadlineExceeded.into()));
        let shown = messages(&problems);
        assert_eq!(shown.len(), 2, "{shown:?}");
        assert!(shown[0].contains("and 2 more: credential_unavailable (AADSTS7000222)"), "{shown:?}");
        assert!(shown[0].contains("has expired") && shown[0].contains("Create a new secret"), "{shown:?}");
        assert!(shown[1].contains("credential emea"), "{shown:?}");
        for tenant in &tenants {
            problems.token_requested(*tenant, "default", None);
        }
        problems.token_requested(tenants[0], "emea", None);
        assert_eq!(problems.present(), []);
    }

    #[test]
    fn a_broken_connection_is_a_problem_until_graph_responds() {
        let problems = ProblemRegistry::default();
        problems.graph_requested(Some("graph.example refused the connection"));
        assert!(messages(&problems)[0].contains("refused the connection"));
        problems.graph_requested(None);
        assert_eq!(problems.present(), []);
    }

    #[test]
    fn the_list_is_bounded() {
        let problems = ProblemRegistry::default();
        for n in 0..100 {
            problems.token_requested(Uuid::from_u128(n), &format!("credential-{n}"), Some(&failure("AADSTS90002")));
        }
        assert_eq!(problems.present().len(), MAX_LISTED);
    }
}
