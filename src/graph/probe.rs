//! Trying what a tenant allows: one page of a list, and the permissions in a token.

use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;

use super::client::GraphClient;
use super::spending::RunBudget;
use crate::domain::catalog::Collection;
use crate::domain::clock::Deadline;
use crate::domain::failure::Failure;

/// Somebody is waiting for the answer at a terminal.
const PATIENCE: Duration = Duration::from_secs(60);
const THROTTLE_PATIENCE: Duration = Duration::from_secs(30);

/// Why a list could not be tried, and what would help.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}", failure.code)]
pub struct ProbeFailure {
    /// What a run would record.
    pub failure: Failure,
    /// The application permissions of which Graph itself says that one must be granted; often it says nothing.
    pub missing_permissions: Vec<String>,
}

impl GraphClient {
    /// Reads one page of a list, as a run would begin to, and says how many objects are on it.
    ///
    /// # Errors
    /// The failure that a run would end with.
    pub async fn probe(
        &self,
        tenant_id: Uuid,
        credential: &str,
        collection: &Arc<Collection>,
    ) -> Result<usize, ProbeFailure> {
        let budget = RunBudget { deadline: Deadline::after(PATIENCE), throttle_budget: THROTTLE_PATIENCE };
        let mut pages = self.reader(tenant_id, credential, budget).pages(collection);
        match pages.step().await {
            Ok(page) => Ok(page.map_or(0, |page| page.objects.len())),
            Err(refusal) => Err(ProbeFailure { failure: refusal.failure, missing_permissions: refusal.permissions }),
        }
    }

    /// The application permissions in the tenant's token; nothing if the token can't be read, which Graph reserves the
    /// right to.
    ///
    /// # Errors
    /// If there is no token.
    pub async fn token_roles(&self, tenant_id: Uuid, credential: &str) -> Result<Option<Vec<String>>, Failure> {
        let (http, _) = self.0.connections.client();
        let source = self.0.tokens.source(tenant_id, credential);
        let token = self.0.tokens.token(&source, &http, Deadline::after(PATIENCE)).await?;
        Ok(token.roles())
    }
}
