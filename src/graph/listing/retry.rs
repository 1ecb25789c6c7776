//! One request, repeated until it succeeds or fails for good.

use std::time::{Duration, Instant};

use reqwest::Url;
use tracing::Instrument;
use uuid::Uuid;

use super::body_text::DecodeError;
use super::decode::DecodedPage;
use super::error::ListError;
use super::error_body::ErrorBody;
use crate::backoff::{Waits, full_jitter};
use crate::domain::failure::{ErrorCode, Failure};
use crate::graph::auth::token::Token;
use crate::graph::client::GraphReader;
use crate::graph::limits::family::Family;
use crate::graph::limits::pause::{RequestPermit, TenantLimits};
use crate::graph::transport::{Get, HttpResponse, TransportError};
use crate::telemetry::{self, spans};

/// Retries after a 500, a 408 or a response that cannot be decoded, which seldom succeed the next time.
const MAX_500_RETRIES: u32 = 2;

/// Page with the time just before its request was sent.
pub(in crate::graph) type Fetched = (DecodedPage, Instant);

/// Decoder of a response body.
pub(in crate::graph) type Decode<'a> = &'a (dyn Fn(Vec<u8>) -> Result<DecodedPage, DecodeError> + Send + Sync);

/// Failed attempt of a request.
enum AttemptError {
    /// Graph throttled the request, with this `Retry-After`.
    Throttled(Option<Duration>, Failure),
    /// A retry may succeed. `rarely` limits the number of retries further.
    Transient { rarely: bool, error: ListError },
    /// Graph rejected the token.
    Token(Failure),
    /// A retry cannot succeed.
    Permanent(ListError),
}

/// Progress of one request over its attempts.
struct RetryState {
    waits: Waits,
    failed: u32,
    failed_with_500: u32,
    token_renewed: bool,
    throttled: Option<Failure>,
}

/// Request for one page.
pub(in crate::graph) struct Request<'a> {
    pub(in crate::graph) url: &'a Url,
    /// Path for logs: next links contain names of the tenant.
    pub(in crate::graph) path: &'a str,
    /// Limits that the request counts against.
    pub(in crate::graph) family: Family,
    pub(in crate::graph) decode: Decode<'a>,
    /// `true` for a singleton, which 204 says does not exist.
    pub(in crate::graph) may_be_absent: bool,
    /// `false` for a second try of a list without its query options, which is made once.
    pub(in crate::graph) retry_500: bool,
}

impl GraphReader {
    /// Sends a request until it succeeds or fails for good.
    pub(in crate::graph) async fn get(&self, request: Request<'_>) -> Result<Fetched, ListError> {
        let span = spans::page(request.path);
        let got = self.get_with_retries(request).instrument(span.clone()).await;
        match &got {
            Ok((page, _)) => _ = span.record("objects", page.objects.len()),
            Err(error) => spans::failed(&span, error.failure.code),
        }
        got
    }

    async fn get_with_retries(&self, request: Request<'_>) -> Result<Fetched, ListError> {
        let limits = self.shared.limits.of(self.tenant_id, request.family);
        let waits = Waits::new(self.shared.first_wait, self.shared.max_wait);
        let failed_with_500 = if request.retry_500 { 0 } else { MAX_500_RETRIES };
        let mut state = RetryState { waits, failed: 0, failed_with_500, token_renewed: false, throttled: None };
        loop {
            let permit = self.acquire(&limits, &state).await?;
            let error = match self.attempt(&request).await {
                Ok(fetched) => {
                    permit.succeeded();
                    return Ok(fetched);
                }
                Err(error) => error,
            };
            if matches!(error, AttemptError::Throttled(..)) {
                permit.throttled();
            }
            drop(permit);
            self.wait_before_retry(error, &limits, &mut state).await?;
        }
    }

    /// Waits until the limits of the tenant allow another request.
    async fn acquire(&self, limits: &TenantLimits, state: &RetryState) -> Result<RequestPermit, ListError> {
        let acquired = tokio::time::timeout(self.budget.deadline.remaining(), limits.acquire(&self.budget)).await;
        // After a wait for the end of a pause, the throttling explains more than the deadline.
        let late = || state.throttled.clone().unwrap_or_else(|| ErrorCode::DeadlineExceeded.into());
        acquired.map_err(|_| ListError::from(late()))?.map_err(|left| {
            self.budget.record_retry_after(left);
            state.throttled.clone().unwrap_or_else(|| ErrorCode::GraphThrottled.into()).into()
        })
    }

    async fn attempt(&self, request: &Request<'_>) -> Result<Fetched, AttemptError> {
        let (http, generation) = self.shared.transport.client();
        let permanent = |failure: Failure| AttemptError::Permanent(failure.into());
        let token = self.shared.tokens.token(&self.token_source, &http, self.budget.deadline).await;
        let (tenant_id, credential) = self.token_source.subject();
        self.shared.problems.token_requested(tenant_id, credential, token.as_ref().err());
        let token = token.map_err(|error| {
            error.retry_after.inspect(|wait| self.budget.record_retry_after(*wait));
            permanent(error.failure)
        })?;
        let timeout = self.budget.deadline.remaining();
        if timeout.is_zero() {
            return Err(permanent(ErrorCode::DeadlineExceeded.into()));
        }
        let client_request_id = Uuid::new_v4();
        let get = Get { url: request.url, authorization: &token.header, client_request_id, timeout };
        self.budget.count_request();
        let requested_at = Instant::now();
        let response = self.shared.transport.get(&http, get).await;
        telemetry::graph_request_took(requested_at.elapsed());
        let log = RequestLog { path: request.path, client_request_id, took: requested_at.elapsed() };
        match response {
            Ok(response) => {
                self.shared.problems.graph_requested(None);
                if response.status == 503 {
                    // Another connection may lead to another server.
                    self.shared.transport.renew(generation);
                }
                self.judge(response, &token, request, &log).map(|page| (page, requested_at))
            }
            Err(error) => {
                log.failed(&error);
                if error == TransportError::TimedOut {
                    self.shared.transport.renew(generation);
                }
                Err(self.transport_failed(error))
            }
        }
    }

    fn transport_failed(&self, error: TransportError) -> AttemptError {
        telemetry::graph_request("failed");
        if error == TransportError::TooLarge {
            return AttemptError::Permanent(ErrorCode::GraphBadResponse.into());
        }
        if self.budget.deadline.passed() {
            return AttemptError::Permanent(ErrorCode::DeadlineExceeded.into());
        }
        let detail = match error {
            TransportError::Broken(reason) => reason,
            TransportError::TimedOut | TransportError::TooLarge => {
                "no response within graph.request_timeout_s".to_owned()
            }
        };
        self.shared.problems.graph_requested(Some(&detail));
        let error = ListError { detail: Some(detail), ..ErrorCode::GraphUnavailable.into() };
        AttemptError::Transient { rarely: false, error }
    }

    fn judge(
        &self,
        response: HttpResponse,
        token: &Token,
        request: &Request<'_>,
        log: &RequestLog<'_>,
    ) -> Result<DecodedPage, AttemptError> {
        let request_id = response.request_id.as_deref();
        if response.status == 200 {
            log.succeeded(request_id);
            telemetry::graph_request("ok");
            return (request.decode)(response.body).map_err(|error| undecodable(&error, request_id));
        }
        if response.status == 204 && request.may_be_absent {
            telemetry::graph_request("ok");
            return Ok(DecodedPage::default());
        }
        let body = ErrorBody::parse(&response.body);
        let (outcome, error) = match (response.status, response.retry_after) {
            // A 503 without Retry-After is the failure of one service, and no reason to pause the tenant.
            (429 | 509, retry_after) | (503, retry_after @ Some(_)) => {
                self.budget.count_throttled();
                let failure = body.failure(response.status, request_id, true);
                ("throttled", AttemptError::Throttled(retry_after, failure))
            }
            (status, _) => self.judge_error(status, body.list_error(status, request_id), &body, token),
        };
        log.refused(error.failure());
        telemetry::graph_request(outcome);
        Err(error)
    }

    fn judge_error(
        &self,
        status: u16,
        error: ListError,
        body: &ErrorBody,
        token: &Token,
    ) -> (&'static str, AttemptError) {
        match status {
            502..=504 => ("failed", AttemptError::Transient { rarely: false, error }),
            500 | 408 => ("failed", AttemptError::Transient { rarely: true, error }),
            401 if !body.means_forbidden() => {
                self.token_source.invalidate(token);
                ("refused", AttemptError::Token(error.failure))
            }
            // A gateway responded in place of Graph, which may respond itself the next time.
            _ if error.failure.code == ErrorCode::GraphBadResponse => {
                ("failed", AttemptError::Transient { rarely: true, error })
            }
            _ => ("refused", AttemptError::Permanent(error)),
        }
    }

    /// Waits before the next attempt, or returns the error if there is none.
    async fn wait_before_retry(
        &self,
        error: AttemptError,
        limits: &TenantLimits,
        state: &mut RetryState,
    ) -> Result<(), ListError> {
        match error {
            AttemptError::Permanent(error) => Err(error),
            AttemptError::Token(failure) => {
                if std::mem::replace(&mut state.token_renewed, true) {
                    Err(failure.into())
                } else {
                    Ok(())
                }
            }
            AttemptError::Transient { rarely, error } => {
                state.failed += 1;
                state.failed_with_500 += u32::from(rarely);
                let wait = full_jitter(state.waits.next_wait());
                let late = wait >= self.budget.deadline.remaining();
                if state.failed >= self.shared.max_attempts || state.failed_with_500 > MAX_500_RETRIES || late {
                    return Err(error);
                }
                tokio::time::sleep(wait).await;
                Ok(())
            }
            AttemptError::Throttled(retry_after, failure) => {
                let wait = retry_after.filter(|wait| !wait.is_zero()).unwrap_or_else(|| state.waits.next_wait());
                // Requests sent during throttling count and extend it: all requests of the tenant wait.
                limits.pause(wait);
                // The number of throttled attempts is not limited: budget and deadline of the run are.
                state.throttled = Some(failure);
                Ok(())
            }
        }
    }
}

/// Error of a 200 that cannot be decoded: cut, or broken off in its middle by an error or a gateway.
fn undecodable(error: &DecodeError, request_id: Option<&str>) -> AttemptError {
    let code = match error {
        DecodeError::Embedded(code) => code.as_deref(),
        DecodeError::Truncated | DecodeError::Malformed => None,
    };
    let failure = Failure::from_graph(ErrorCode::GraphBadResponse, 200, code, request_id);
    AttemptError::Transient { rarely: *error != DecodeError::Truncated, error: failure.into() }
}

impl AttemptError {
    fn failure(&self) -> &Failure {
        match self {
            Self::Throttled(_, failure) | Self::Token(failure) => failure,
            Self::Transient { error, .. } | Self::Permanent(error) => &error.failure,
        }
    }
}

/// Fields of the log lines about one request: ids, a status and words of our own.
struct RequestLog<'a> {
    path: &'a str,
    client_request_id: Uuid,
    took: Duration,
}

impl RequestLog<'_> {
    fn succeeded(&self, request_id: Option<&str>) {
        tracing::debug!(
            path = self.path, client_request_id = %self.client_request_id,
            request_id, took_ms = self.took.as_millis(), "Graph request succeeded"
        );
    }

    fn refused(&self, failure: &Failure) {
        tracing::info!(
            path = self.path, client_request_id = %self.client_request_id,
            request_id = failure.request_id, status = failure.http_status, graph_code = failure.graph_code,
            code = failure.code.as_str(), took_ms = self.took.as_millis(), "Graph request failed"
        );
    }

    fn failed(&self, error: &TransportError) {
        tracing::info!(
            path = self.path, client_request_id = %self.client_request_id,
            reason = ?error, took_ms = self.took.as_millis(), "no response from Graph"
        );
    }
}
