//! Tokens: one for each tenant and credential, asked for by one at a time and renewed before it ends.

use std::collections::HashMap;
use std::error::Error as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use azure_core::base64::decode_url_safe;
use azure_core::error::ErrorKind;
use azure_core::http::headers::{HeaderName, Headers, RETRY_AFTER};
use reqwest::Client;
use reqwest::header::HeaderValue;
use serde::Deserialize;
use uuid::Uuid;

use super::credential::Credentials;
use super::retry_after;
use crate::backoff::{Waits, full_jitter};
use crate::config::{GraphConfig, seconds};
use crate::domain::clock::{Deadline, wall_clock_unix_s};
use crate::domain::failure::{ErrorCode, Failure};
use crate::telemetry;

/// A token is renewed so long before its end, or after four fifths of its life if that is short.
const RENEW_BEFORE_END: Duration = Duration::from_secs(300);
/// A refusal is believed for so long, so that the many lists of a run don't all ask again.
const BELIEVE_REFUSAL: Duration = Duration::from_secs(5);

/// Where all tokens come from.
pub(super) struct Tokens {
    credentials: Credentials,
    scope: String,
    first_wait: Duration,
    most_wait: Duration,
    max_tries: u32,
    sources: Mutex<HashMap<(Uuid, String), Arc<TokenSource>>>,
    serial: AtomicU64,
}

/// The token of one tenant and credential.
pub(super) struct TokenSource {
    tenant_id: Uuid,
    credential: String,
    token: RwLock<Option<Token>>,
    /// Whoever holds it asks for a token; in it, the last refusal and how long it is believed.
    asking: tokio::sync::Mutex<Option<(Deadline, Failure)>>,
}

/// A token as it is sent. Its header is marked as a secret and shows itself to no log.
#[derive(Clone)]
pub(super) struct Token {
    pub(super) header: HeaderValue,
    serial: u64,
    renew_from: Deadline,
    ends: Deadline,
}

enum Refused {
    /// The next try may go better, after this long if the token service said so.
    ForNow(Option<Duration>, Failure),
    ForGood(Failure),
}

impl Tokens {
    pub(super) fn new(config: &GraphConfig) -> Self {
        Self {
            credentials: Credentials::new(config),
            scope: format!("{}/.default", config.base_url()),
            first_wait: Duration::from_secs_f64(config.backoff_first_s),
            most_wait: Duration::from_secs_f64(config.backoff_max_s).min(seconds(config.request_timeout_s)),
            max_tries: config.max_tries,
            sources: Mutex::default(),
            serial: AtomicU64::new(1),
        }
    }

    /// The source of a tenant's tokens by the credential of that name.
    pub(super) fn source(&self, tenant_id: Uuid, credential: &str) -> Arc<TokenSource> {
        let mut sources = self.sources.lock().unwrap_or_else(PoisonError::into_inner);
        let source = sources.entry((tenant_id, credential.to_owned())).or_insert_with(|| {
            Arc::new(TokenSource {
                tenant_id,
                credential: credential.to_owned(),
                token: RwLock::default(),
                asking: tokio::sync::Mutex::default(),
            })
        });
        Arc::clone(source)
    }

    /// A token that is good now, if there is one before the deadline.
    pub(super) async fn token(&self, of: &TokenSource, http: &Client, deadline: Deadline) -> Result<Token, Failure> {
        let token = self.held_or_new(of, http, deadline);
        let late = |_| Failure::from(ErrorCode::DeadlineExceeded);
        tokio::time::timeout(deadline.remaining(), token).await.map_err(late)?
    }

    async fn held_or_new(&self, of: &TokenSource, http: &Client, deadline: Deadline) -> Result<Token, Failure> {
        let held = of.held();
        let mut last_refusal = match &held {
            Some(token) if !token.renew_from.passed() => return Ok(token.clone()),
            // Somebody is renewing it already: what is left of it will do for now.
            Some(token) => match of.asking.try_lock() {
                Ok(asking) => asking,
                Err(_) => return Ok(token.clone()),
            },
            None => of.asking.lock().await,
        };
        if let Some(token) = of.held().filter(|token| !token.renew_from.passed()) {
            return Ok(token);
        }
        if let Some((_, failure)) = last_refusal.as_ref().filter(|(until, _)| !until.passed()) {
            return held.ok_or_else(|| failure.clone());
        }
        match self.ask(of, http, deadline).await {
            Ok(token) => {
                telemetry::graph_token("ok");
                *last_refusal = None;
                *of.token.write().unwrap_or_else(PoisonError::into_inner) = Some(token.clone());
                Ok(token)
            }
            Err(failure) => {
                telemetry::graph_token("failed");
                *last_refusal = Some((Deadline::after(BELIEVE_REFUSAL), failure.clone()));
                held.ok_or(failure)
            }
        }
    }

    /// Asks until there is a token, or the tries are used up.
    async fn ask(&self, of: &TokenSource, http: &Client, deadline: Deadline) -> Result<Token, Failure> {
        let mut waits = Waits::new(self.first_wait, self.most_wait);
        let mut tries = 1;
        loop {
            let (asked, failure) = match self.ask_once(of, http).await {
                Ok(token) => return Ok(token),
                Err(Refused::ForGood(failure)) => return Err(failure),
                Err(Refused::ForNow(asked, failure)) => (asked, failure),
            };
            let wait = waits.next_wait();
            let wait = asked.unwrap_or(wait / 2) + full_jitter(wait / 2);
            if tries >= self.max_tries || wait >= deadline.remaining() {
                return Err(failure);
            }
            tries += 1;
            tokio::time::sleep(wait).await;
        }
    }

    async fn ask_once(&self, of: &TokenSource, http: &Client) -> Result<Token, Refused> {
        // A credential made anew holds no token of its own and reads its files again, which may have been replaced.
        let credential = self.credentials.make(of.tenant_id, &of.credential, http);
        let credential = credential.map_err(|problem| of.unusable(&problem))?;
        let token = credential.get_token(&[self.scope.as_str()], None).await.map_err(|error| of.refusal(&error))?;
        let good_for_s = token.expires_on.unix_timestamp() - wall_clock_unix_s();
        let good_for = Duration::from_secs(u64::try_from(good_for_s).unwrap_or_default());
        let text = token.token.secret();
        let other_tenant = Claims::read(text).and_then(|claims| claims.tid).filter(|tid| *tid != of.tenant_id);
        if other_tenant.is_some() {
            // A managed identity knows one tenant only, whatever it is asked for.
            return Err(of.unusable("the token service gave one for another tenant"));
        }
        let mut header = HeaderValue::from_str(&format!("Bearer {text}"))
            .map_err(|_| of.unusable("the token service gave something that is none"))?;
        header.set_sensitive(true);
        let renew_after = good_for.saturating_sub(RENEW_BEFORE_END).max(good_for.mul_f64(0.8));
        Ok(Token {
            header,
            serial: self.serial.fetch_add(1, Ordering::Relaxed),
            renew_from: Deadline::after(renew_after),
            ends: Deadline::after(good_for),
        })
    }
}

impl TokenSource {
    fn held(&self) -> Option<Token> {
        let token = self.token.read().unwrap_or_else(PoisonError::into_inner).clone();
        token.filter(|token| !token.ends.passed())
    }

    /// Forgets a token that Graph refused; one that came after it is kept.
    pub(super) fn forget(&self, refused: &Token) {
        let mut token = self.token.write().unwrap_or_else(PoisonError::into_inner);
        token.take_if(|token| token.serial == refused.serial);
    }

    /// A failure of ours, in words of ours.
    fn unusable(&self, problem: &str) -> Refused {
        tracing::warn!(credential = self.credential, "no token: {problem}");
        Refused::ForGood(ErrorCode::CredentialUnavailable.into())
    }

    /// What the token service's refusal comes to: its `AADSTS` number, and none of its words.
    fn refusal(&self, error: &azure_core::Error) -> Refused {
        let (status, aadsts, asked) = told(error);
        let code = aadsts.map(|number| format!("AADSTS{number}"));
        tracing::warn!(credential = self.credential, status, code, "no token from the token service");
        let failure = match status {
            Some(status) => Failure::from_graph(ErrorCode::CredentialUnavailable, status, code.as_deref(), None),
            None => ErrorCode::CredentialUnavailable.into(),
        };
        match status {
            Some(408 | 429 | 500..) | None => Refused::ForNow(asked, failure),
            Some(_) => Refused::ForGood(failure),
        }
    }
}

impl Token {
    /// The application permissions that the token carries, if it can be read at all: tokens for Graph are opaque.
    pub(super) fn roles(&self) -> Option<Vec<String>> {
        let text = self.header.to_str().ok()?.strip_prefix("Bearer ")?;
        Claims::read(text).map(|claims| claims.roles)
    }
}

/// The claims of a token that is a JSON Web Token after all.
#[derive(Deserialize)]
struct Claims {
    tid: Option<Uuid>,
    #[serde(default)]
    roles: Vec<String>,
}

impl Claims {
    fn read(token: &str) -> Option<Self> {
        let claims = token.split('.').nth(1)?;
        serde_json::from_slice(&decode_url_safe(claims).ok()?).ok()
    }
}

/// HTTP status, `AADSTS` number and `Retry-After` of the answer behind an error, if there was one.
fn told(error: &azure_core::Error) -> (Option<u16>, Option<u32>, Option<Duration>) {
    let mut layer = Some(error);
    while let Some(error) = layer {
        if let ErrorKind::HttpResponse { status, error_code, raw_response } = error.kind() {
            let first = error_code.as_deref().and_then(|codes| codes.split(',').next());
            let asked = raw_response.as_ref().and_then(|response| wait(response.headers()));
            return (Some((*status).into()), first.and_then(|number| number.parse().ok()), asked);
        }
        layer = error.source().and_then(|source| source.downcast_ref());
    }
    (None, None, None)
}

fn wait(headers: &Headers) -> Option<Duration> {
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
        Token { header: HeaderValue::from_str(&text).unwrap(), serial: 1, renew_from: soon, ends: soon }
    }

    #[test]
    fn roles_are_read_where_a_token_can_be_read() {
        let roles = token(r#"{"tid":"6a5b1a3e-3e24-4d1c-9d7b-0c3f1a2b3c4d","roles":["A.Read.All"]}"#).roles();
        assert_eq!(roles, Some(vec!["A.Read.All".to_owned()]));
        assert_eq!(token(r#"{"aud":"x"}"#).roles(), Some(Vec::new()), "a token without any role is possible");
        for opaque in ["Bearer opaque", "Bearer a.b.c", "Bearer "] {
            let token = Token { header: HeaderValue::from_static(opaque), ..token("{}") };
            assert_eq!(token.roles(), None, "{opaque}");
        }
    }
}
