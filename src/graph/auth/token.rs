//! Token cache: one token per tenant and credential, requested once however many lists wait for it, and renewed
//! before it expires.
//!
//! `azure_identity` caches tokens as well, but a credential of its keeps the secret that it was created with. Here each
//! request creates a new credential, so that a replaced secret or certificate is used without a restart.

use std::collections::HashMap;
use std::error::Error as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use azure_core::base64::decode_url_safe;
use azure_core::error::ErrorKind;
use azure_core::http::headers::{HeaderName, Headers, RETRY_AFTER};
use parking_lot::{Mutex, RwLock};
use reqwest::Client;
use reqwest::header::HeaderValue;
use serde::Deserialize;
use uuid::Uuid;

use super::aadsts;
use super::credential::Credentials;
use super::token_failure::TokenFailure;
use super::token_service::TokenServiceClient;
use crate::backoff::{Waits, full_jitter};
use crate::config::{GraphConfig, seconds};
use crate::domain::clock::{Deadline, wall_clock_unix_s};
use crate::domain::failure::{ErrorCode, Failure};
use crate::graph::limits::retry_after;
use crate::telemetry;

/// A token is renewed this long before it expires, or after four fifths of its lifetime if that is short.
const RENEW_BEFORE_EXPIRY: Duration = Duration::from_secs(300);
/// Time for which a failed request answers all other lists of a run as well.
const FAILURE_CACHED_FOR: Duration = Duration::from_secs(5);

/// Time until a new run is worthwhile after an outage of the token service that came without `Retry-After`.
const RETRY_AFTER_OUTAGE: Duration = Duration::from_secs(60);

/// Cache of all tokens of this process.
pub(in crate::graph) struct TokenCache {
    credentials: Credentials,
    scope: String,
    first_wait: Duration,
    max_wait: Duration,
    max_attempts: u32,
    sources: Mutex<HashMap<(Uuid, String), Arc<TokenSource>>>,
    serial: AtomicU64,
}

/// Token of one tenant and credential.
pub(in crate::graph) struct TokenSource {
    tenant_id: Uuid,
    credential: String,
    token: RwLock<Option<Token>>,
    /// Locked by the task that requests a token; holds the last failure and until when it is returned.
    requesting: tokio::sync::Mutex<Option<(Deadline, TokenFailure)>>,
}

/// Access token, ready to be sent. The header is marked as sensitive, so that no log shows it.
#[derive(Clone)]
pub(in crate::graph) struct Token {
    pub(in crate::graph) header: HeaderValue,
    serial: u64,
    renew_from: Deadline,
    expires: Deadline,
}

/// Failed request for a token.
enum TokenError {
    /// A later attempt may succeed.
    Transient(TokenFailure),
    Permanent(TokenFailure),
}

impl TokenCache {
    pub(in crate::graph) fn new(config: &GraphConfig) -> Self {
        Self {
            credentials: Credentials::new(config),
            scope: format!("{}/.default", config.base_url()),
            first_wait: Duration::from_secs_f64(config.backoff_first_s),
            max_wait: Duration::from_secs_f64(config.backoff_max_s).min(seconds(config.request_timeout_s)),
            max_attempts: config.max_tries,
            sources: Mutex::default(),
            serial: AtomicU64::new(1),
        }
    }

    /// Problems of the configured credentials that show without a network.
    pub(in crate::graph) fn credential_problems(&self, http: &Client) -> Vec<String> {
        self.credentials.problems(http)
    }

    /// Source of a tenant's tokens with the named credential.
    pub(in crate::graph) fn source(&self, tenant_id: Uuid, credential: &str) -> Arc<TokenSource> {
        let mut sources = self.sources.lock();
        let source = sources.entry((tenant_id, credential.to_owned())).or_insert_with(|| {
            Arc::new(TokenSource {
                tenant_id,
                credential: credential.to_owned(),
                token: RwLock::default(),
                requesting: tokio::sync::Mutex::default(),
            })
        });
        Arc::clone(source)
    }

    /// Returns a valid token, requesting one if there is none before the deadline.
    pub(in crate::graph) async fn token(
        &self,
        source: &TokenSource,
        http: &Client,
        deadline: Deadline,
    ) -> Result<Token, TokenFailure> {
        let token = self.cached_or_new(source, http, deadline);
        let late = |_| TokenFailure::from(ErrorCode::DeadlineExceeded);
        tokio::time::timeout(deadline.remaining(), token).await.map_err(late)?
    }

    async fn cached_or_new(
        &self,
        source: &TokenSource,
        http: &Client,
        deadline: Deadline,
    ) -> Result<Token, TokenFailure> {
        let cached = source.cached();
        let mut last_failure = match &cached {
            Some(token) if !token.renew_from.passed() => return Ok(token.clone()),
            // Another task renews the token; the cached one is valid until then.
            Some(token) => match source.requesting.try_lock() {
                Ok(requesting) => requesting,
                Err(_) => return Ok(token.clone()),
            },
            None => source.requesting.lock().await,
        };
        if let Some(token) = source.cached().filter(|token| !token.renew_from.passed()) {
            return Ok(token);
        }
        if let Some((_, failure)) = last_failure.as_ref().filter(|(until, _)| !until.passed()) {
            return cached.ok_or_else(|| failure.clone());
        }
        match self.request(source, http, deadline).await {
            Ok(token) => {
                telemetry::graph_token("ok");
                *last_failure = None;
                *source.token.write() = Some(token.clone());
                Ok(token)
            }
            Err(failure) => {
                telemetry::graph_token("failed");
                *last_failure = Some((Deadline::after(FAILURE_CACHED_FOR), failure.clone()));
                cached.ok_or(failure)
            }
        }
    }

    /// Requests a token until one is issued or the attempts are used up.
    async fn request(&self, source: &TokenSource, http: &Client, deadline: Deadline) -> Result<Token, TokenFailure> {
        let mut waits = Waits::new(self.first_wait, self.max_wait);
        let mut attempts = 1;
        loop {
            let failure = match self.request_once(source, http).await {
                Ok(token) => return Ok(token),
                Err(TokenError::Permanent(failure)) => return Err(failure),
                Err(TokenError::Transient(failure)) => failure,
            };
            let wait = waits.next_wait();
            let wait = failure.retry_after.unwrap_or(wait / 2) + full_jitter(wait / 2);
            if attempts >= self.max_attempts || wait >= deadline.remaining() {
                let retry_after = failure.retry_after.or(Some(RETRY_AFTER_OUTAGE));
                return Err(TokenFailure { retry_after, ..failure });
            }
            attempts += 1;
            tokio::time::sleep(wait).await;
        }
    }

    async fn request_once(&self, source: &TokenSource, http: &Client) -> Result<Token, TokenError> {
        // A new credential has no cached token and reads its files again, which may have been replaced.
        let service = self.credentials.client(&source.credential, http).map_err(|problem| source.unusable(&problem))?;
        let credential = self.credentials.create(source.tenant_id, &source.credential, &service);
        let credential = credential.map_err(|problem| source.unusable(&problem))?;
        let token = credential.get_token(&[self.scope.as_str()], None).await;
        let token = token.map_err(|error| source.failed(&error, &service))?;
        let lifetime_s = token.expires_on.unix_timestamp() - wall_clock_unix_s();
        let lifetime = Duration::from_secs(u64::try_from(lifetime_s).unwrap_or_default());
        let text = token.token.secret();
        let tenant_id = Claims::parse(text).and_then(|claims| claims.tid);
        if tenant_id.is_some_and(|tenant_id| tenant_id != source.tenant_id) {
            // A managed identity belongs to one tenant, whichever tenant it is asked for.
            return Err(source.unusable("the token service issued a token for another tenant"));
        }
        let mut header = HeaderValue::from_str(&format!("Bearer {text}"))
            .map_err(|_| source.unusable("the token service issued a malformed token"))?;
        header.set_sensitive(true);
        let renew_after = lifetime.saturating_sub(RENEW_BEFORE_EXPIRY).max(lifetime.mul_f64(0.8));
        Ok(Token {
            header,
            serial: self.serial.fetch_add(1, Ordering::Relaxed),
            renew_from: Deadline::after(renew_after),
            expires: Deadline::after(lifetime),
        })
    }
}

impl TokenSource {
    fn cached(&self) -> Option<Token> {
        self.token.read().clone().filter(|token| !token.expires.passed())
    }

    /// Tenant that the tokens are for, and name of the credential.
    pub(in crate::graph) fn subject(&self) -> (Uuid, &str) {
        (self.tenant_id, &self.credential)
    }

    /// Drops a token that Graph rejected; a newer one is kept.
    pub(in crate::graph) fn invalidate(&self, rejected: &Token) {
        self.token.write().take_if(|token| token.serial == rejected.serial);
    }

    /// Permanent failure, described in our own words.
    fn unusable(&self, problem: &str) -> TokenError {
        tracing::warn!(credential = self.credential, "no token: {problem}");
        let detail = Some(problem.to_owned());
        TokenError::Permanent(TokenFailure { detail, ..ErrorCode::CredentialUnavailable.into() })
    }

    /// Failure of a request to the token service: its `AADSTS` number is kept, its text is not. A service that is down,
    /// unreachable or throttles says nothing about the credential.
    fn failed(&self, error: &azure_core::Error, service: &TokenServiceClient) -> TokenError {
        let ((status, number, retry_after), detail) = (response_of(error), service.problem());
        let is_transient = matches!(status, Some(408 | 429 | 500..))
            || number.is_some_and(aadsts::is_transient)
            || (status.is_none() && detail.is_some());
        let graph_code = number.map(|number| format!("AADSTS{number}"));
        let advice = graph_code.as_deref().and_then(aadsts::token_advice);
        let (cause, cure) = (advice.map(|advice| advice.cause).or(detail.as_deref()), advice.map(|advice| advice.cure));
        tracing::warn!(
            credential = self.credential,
            status,
            graph_code,
            cause,
            cure,
            "the token service issued no token"
        );
        let code = if is_transient { ErrorCode::TokenServiceUnavailable } else { ErrorCode::CredentialUnavailable };
        let failure = match status {
            Some(status) => Failure::from_graph(code, status, graph_code.as_deref(), None),
            None => code.into(),
        };
        let failure = TokenFailure { failure, detail, retry_after };
        if is_transient { TokenError::Transient(failure) } else { TokenError::Permanent(failure) }
    }
}

impl Token {
    /// Application permissions in the token, if it can be parsed: Microsoft reserves the right to make it opaque.
    pub(in crate::graph) fn roles(&self) -> Option<Vec<String>> {
        let text = self.header.to_str().ok()?.strip_prefix("Bearer ")?;
        Claims::parse(text).map(|claims| claims.roles)
    }
}

/// Claims of a token that is a JSON Web Token.
#[derive(Deserialize)]
struct Claims {
    tid: Option<Uuid>,
    #[serde(default)]
    roles: Vec<String>,
}

impl Claims {
    fn parse(token: &str) -> Option<Self> {
        let claims = token.split('.').nth(1)?;
        serde_json::from_slice(&decode_url_safe(claims).ok()?).ok()
    }
}

/// HTTP status, `AADSTS` number and `Retry-After` of the response behind an error, if there was one.
fn response_of(error: &azure_core::Error) -> (Option<u16>, Option<u32>, Option<Duration>) {
    let mut layer = Some(error);
    while let Some(error) = layer {
        if let ErrorKind::HttpResponse { status, error_code, raw_response } = error.kind() {
            let first = error_code.as_deref().and_then(|codes| codes.split(',').next());
            let retry_after = raw_response.as_ref().and_then(|response| retry_after_of(response.headers()));
            return (Some((*status).into()), first.and_then(|number| number.parse().ok()), retry_after);
        }
        layer = error.source().and_then(|source| source.downcast_ref());
    }
    (None, None, None)
}

fn retry_after_of(headers: &Headers) -> Option<Duration> {
    let date = headers.get_optional_str(&HeaderName::from_static("date"));
    retry_after::parse(headers.get_optional_str(&RETRY_AFTER)?, date)
}

#[cfg(test)]
mod tests {
    use azure_core::base64::encode_url_safe;

    use super::*;

    fn token(claims: &str) -> Token {
        let text = format!("Bearer x.{}.y", encode_url_safe(claims));
        let soon = Deadline::after(Duration::from_secs(60));
        Token { header: HeaderValue::from_str(&text).unwrap(), serial: 1, renew_from: soon, expires: soon }
    }

    #[test]
    fn roles_are_parsed_unless_the_token_is_opaque() {
        let roles = token(r#"{"tid":"6a5b1a3e-3e24-4d1c-9d7b-0c3f1a2b3c4d","roles":["A.Read.All"]}"#).roles();
        assert_eq!(roles, Some(vec!["A.Read.All".to_owned()]));
        assert_eq!(token(r#"{"aud":"x"}"#).roles(), Some(Vec::new()), "a token without any role is possible");
        for opaque in ["Bearer opaque", "Bearer a.b.c", "Bearer "] {
            let token = Token { header: HeaderValue::from_static(opaque), ..token("{}") };
            assert_eq!(token.roles(), None, "{opaque}");
        }
    }
}
