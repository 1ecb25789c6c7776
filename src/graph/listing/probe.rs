//! Probe of a tenant's access: one page of a list, and the permissions in the token.

use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;

use super::error::ListError;
use crate::domain::catalog::{Collection, Listing};
use crate::domain::clock::Deadline;
use crate::domain::failure::Failure;
use crate::graph::auth::token_failure::TokenFailure;
use crate::graph::client::GraphClient;
use crate::graph::limits::budget::RunBudget;

/// Time limits of a probe, whose result an operator waits for.
const DEADLINE: Duration = Duration::from_secs(60);
const THROTTLE_BUDGET: Duration = Duration::from_secs(30);

/// Failed probe of a list.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}", failure.code)]
pub struct ProbeFailure {
    /// Failure that a run would record.
    pub failure: Failure,
    /// Reason of a failed connection, in our own words.
    pub detail: Option<String>,
    /// Application permissions of which Graph says that one must be granted; often it names none.
    pub missing_permissions: Vec<String>,
}

impl GraphClient {
    /// Reads the first page of a list as a run would, and returns the number of its objects.
    pub async fn probe(
        &self,
        tenant_id: Uuid,
        credential: &str,
        collection: &Arc<Collection>,
    ) -> Result<usize, ProbeFailure> {
        let budget = RunBudget { deadline: Deadline::after(DEADLINE), throttle_budget: THROTTLE_BUDGET };
        let listing = Arc::new(Listing::of_all_types(collection));
        let mut pages = self.reader(tenant_id, credential, budget).pages(&listing).one_by_one();
        match pages.next_page().await {
            Ok(page) => Ok(page.map_or(0, |page| page.objects.len())),
            Err(ListError { failure, detail, permissions, .. }) => {
                Err(ProbeFailure { failure, detail, missing_permissions: permissions })
            }
        }
    }

    /// Application permissions in the tenant's token; `None` if the token is opaque, which Microsoft may make it.
    pub async fn token_roles(&self, tenant_id: Uuid, credential: &str) -> Result<Option<Vec<String>>, TokenFailure> {
        let (http, _) = self.0.transport.client();
        let source = self.0.tokens.source(tenant_id, credential);
        let token = self.0.tokens.token(&source, &http, Deadline::after(DEADLINE)).await?;
        Ok(token.roles())
    }

    /// Problems of the configured credentials that show without a network: missing or unreadable files, empty ids.
    #[must_use]
    pub fn credential_problems(&self) -> Vec<String> {
        let (http, _) = self.0.transport.client();
        self.0.tokens.credential_problems(&http)
    }
}
