//! One link, tried until it is answered or given up.

use std::time::{Duration, Instant};

use reqwest::Url;
use tracing::Instrument;
use uuid::Uuid;

use super::answer::{Refusal, Told};
use super::client::GraphReader;
use super::crowd::Permit;
use super::page::{Parsed, Unreadable};
use super::throttle::{Family, Lane};
use super::token::Token;
use super::transport::{Answer, Get, NoAnswer};
use crate::backoff::{Waits, full_jitter};
use crate::domain::failure::{ErrorCode, Failure};
use crate::telemetry::{self, spans};

/// 500 and 408 are seldom better the next time: so many retries and no more.
const SCARCE_RETRIES: u32 = 2;

/// How an answer is read.
pub(super) type Read<'a> = &'a (dyn Fn(Vec<u8>) -> Result<Parsed, Unreadable> + Send + Sync);

/// What a try came to, if not to an answer.
enum Missed {
    /// Graph asks to be left alone, perhaps for so long.
    Throttled(Option<Duration>, Failure),
    /// The next try may go better; of a scarce one there are few.
    Broken { scarce: bool, failure: Failure },
    /// The token was refused.
    Token(Failure),
    /// Trying again is no use.
    Refused(Refusal),
}

/// What the tries of one request have used up.
struct Tries {
    waits: Waits,
    broken: u32,
    scarce: u32,
    token_renewed: bool,
    throttled: Option<Failure>,
}

/// One link to follow.
pub(super) struct Request<'a> {
    pub(super) url: &'a Url,
    /// What logs may say about it: next links hold names of the tenant.
    pub(super) path: &'a str,
    /// The limits that it counts against.
    pub(super) family: Family,
    /// How its answer is read.
    pub(super) read: Read<'a>,
}

impl GraphReader {
    /// Follows one link, as often as it takes and makes sense.
    pub(super) async fn get(&self, request: Request<'_>) -> Result<Parsed, Refusal> {
        let span = spans::page(request.path);
        let got = self.try_until_answered(request).instrument(span.clone()).await;
        match &got {
            Ok(parsed) => _ = span.record("objects", parsed.objects.len()),
            Err(refusal) => spans::failed(&span, refusal.failure.code),
        }
        got
    }

    async fn try_until_answered(&self, request: Request<'_>) -> Result<Parsed, Refusal> {
        let lane = self.shared.throttle.lane(self.tenant_id, request.family);
        let waits = Waits::new(self.shared.first_wait, self.shared.most_wait);
        let mut tries = Tries { waits, broken: 0, scarce: 0, token_renewed: false, throttled: None };
        loop {
            let permit = self.enter(&lane, &tries).await?;
            let missed = match self.try_once(&request).await {
                Ok(parsed) => {
                    permit.answered();
                    return Ok(parsed);
                }
                Err(missed) => missed,
            };
            if matches!(missed, Missed::Throttled(..)) {
                permit.throttled();
            }
            drop(permit);
            self.before_next(missed, &lane, &mut tries).await?;
        }
    }

    /// Waits until Graph's limits, and what it has asked for, let another request go.
    async fn enter(&self, lane: &Lane, tries: &Tries) -> Result<Permit, Refusal> {
        let entered = tokio::time::timeout(self.spending.deadline.remaining(), lane.enter(&self.spending)).await;
        // If the time was spent waiting for Graph to take requests again, that is the better reason.
        let too_late = || tries.throttled.clone().unwrap_or_else(|| ErrorCode::DeadlineExceeded.into());
        entered.map_err(|_| Refusal::from(too_late()))?.map_err(|left| {
            self.spending.gave_up(left);
            tries.throttled.clone().unwrap_or_else(|| ErrorCode::GraphThrottled.into()).into()
        })
    }

    async fn try_once(&self, request: &Request<'_>) -> Result<Parsed, Missed> {
        let (http, generation) = self.shared.connections.client();
        let final_failure = |failure: Failure| Missed::Refused(failure.into());
        let token = self.shared.tokens.token(&self.token_source, &http, self.spending.deadline).await;
        let token = token.map_err(final_failure)?;
        let at_most = self.spending.deadline.remaining();
        if at_most.is_zero() {
            return Err(final_failure(ErrorCode::DeadlineExceeded.into()));
        }
        let client_request_id = Uuid::new_v4();
        let get = Get { url: request.url, authorization: &token.header, client_request_id, at_most };
        self.spending.request();
        let started = Instant::now();
        let answer = self.shared.connections.get(&http, get).await;
        telemetry::graph_request_took(started.elapsed());
        let logged = Logged { path: request.path, client_request_id, took: started.elapsed() };
        match answer {
            Ok(answer) => {
                if answer.status == 503 {
                    // Graph's advice: come back over another connection, it may lead to another server.
                    self.shared.connections.renew(generation);
                }
                self.judge(answer, &token, request.read, &logged)
            }
            Err(no_answer) => {
                logged.no_answer(no_answer);
                if no_answer == NoAnswer::TimedOut {
                    self.shared.connections.renew(generation);
                }
                Err(self.missed(no_answer))
            }
        }
    }

    fn missed(&self, no_answer: NoAnswer) -> Missed {
        telemetry::graph_request("failed");
        if no_answer == NoAnswer::TooLarge {
            return Missed::Refused(ErrorCode::GraphBadResponse.into());
        }
        if self.spending.deadline.passed() {
            return Missed::Refused(ErrorCode::DeadlineExceeded.into());
        }
        Missed::Broken { scarce: false, failure: ErrorCode::GraphUnavailable.into() }
    }

    fn judge(&self, answer: Answer, token: &Token, read: Read<'_>, logged: &Logged<'_>) -> Result<Parsed, Missed> {
        let request_id = answer.request_id.as_deref();
        if answer.status == 200 {
            logged.good(request_id);
            telemetry::graph_request("ok");
            return read(answer.body).map_err(|unreadable| {
                let failure = Failure::from_graph(ErrorCode::GraphBadResponse, 200, None, request_id);
                match unreadable {
                    Unreadable::Cut => Missed::Broken { scarce: false, failure },
                    Unreadable::NotAPage => Missed::Refused(failure.into()),
                }
            });
        }
        let told = Told::read(&answer.body);
        let refusal = told.refusal(answer.status, request_id);
        logged.refused(&refusal.failure);
        let (outcome, missed) = match answer.status {
            429 | 503 | 509 => {
                self.spending.throttled();
                ("throttled", Missed::Throttled(answer.retry_after, refusal.failure))
            }
            502 | 504 => ("failed", Missed::Broken { scarce: false, failure: refusal.failure }),
            500 | 408 => ("failed", Missed::Broken { scarce: true, failure: refusal.failure }),
            401 if !told.means_forbidden() => {
                self.token_source.forget(token);
                ("refused", Missed::Token(refusal.failure))
            }
            _ => ("refused", Missed::Refused(refusal)),
        };
        telemetry::graph_request(outcome);
        Err(missed)
    }

    /// Waits for the next try, or says why there is none.
    async fn before_next(&self, missed: Missed, lane: &Lane, tries: &mut Tries) -> Result<(), Refusal> {
        match missed {
            Missed::Refused(refusal) => Err(refusal),
            Missed::Token(failure) => {
                if std::mem::replace(&mut tries.token_renewed, true) {
                    Err(failure.into())
                } else {
                    Ok(())
                }
            }
            Missed::Broken { scarce, failure } => {
                tries.broken += 1;
                tries.scarce += u32::from(scarce);
                let wait = full_jitter(tries.waits.next_wait());
                let too_late = wait >= self.spending.deadline.remaining();
                if tries.broken >= self.shared.max_tries || tries.scarce > SCARCE_RETRIES || too_late {
                    return Err(failure.into());
                }
                tokio::time::sleep(wait).await;
                Ok(())
            }
            Missed::Throttled(asked, failure) => {
                let asked = asked.filter(|wait| !wait.is_zero()).unwrap_or_else(|| tries.waits.next_wait());
                // Calls made while throttled count, and lengthen the penalty: nobody of the tenant goes before that.
                lane.close(asked);
                // How often is no matter: the run's budget and deadline say how long it may be waited for.
                tries.throttled = Some(failure);
                Ok(())
            }
        }
    }
}

/// What a log line says about a try: ids, a status and words of our own.
struct Logged<'a> {
    path: &'a str,
    client_request_id: Uuid,
    took: Duration,
}

impl Logged<'_> {
    fn good(&self, request_id: Option<&str>) {
        tracing::debug!(
            path = self.path, client_request_id = %self.client_request_id,
            request_id, took_ms = self.took.as_millis(), "Graph answered"
        );
    }

    fn refused(&self, failure: &Failure) {
        tracing::info!(
            path = self.path, client_request_id = %self.client_request_id,
            request_id = failure.request_id, status = failure.http_status, graph_code = failure.graph_code,
            code = failure.code.as_str(), took_ms = self.took.as_millis(), "Graph refused"
        );
    }

    fn no_answer(&self, no_answer: NoAnswer) {
        tracing::info!(
            path = self.path, client_request_id = %self.client_request_id,
            why = ?no_answer, took_ms = self.took.as_millis(), "no answer from Graph"
        );
    }
}
