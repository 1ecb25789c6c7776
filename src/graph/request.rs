//! One link, tried until it is answered or given up.

use std::time::{Duration, Instant};

use reqwest::Url;
use uuid::Uuid;

use super::answer::{Refusal, Told};
use super::client::GraphReader;
use super::page::{Parsed, Unreadable};
use super::token::Token;
use super::transport::{Answer, Get, NoAnswer};
use crate::backoff::{Waits, full_jitter};
use crate::domain::failure::{ErrorCode, Failure};
use crate::telemetry;

/// 500 and 408 are seldom better the next time: so many retries and no more.
const SCARCE_RETRIES: u32 = 2;

/// How an answer is read.
pub(super) type Read<'a> = &'a (dyn Fn(&[u8]) -> Result<Parsed, Unreadable> + Send + Sync);

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
    made: u32,
    scarce: u32,
    token_renewed: bool,
}

impl GraphReader {
    /// Follows one link. `path` is what logs may say about it: next links hold names of the tenant.
    pub(super) async fn get(&self, url: &Url, path: &str, read: Read<'_>) -> Result<Parsed, Refusal> {
        let mut tries = Tries {
            waits: Waits::new(self.shared.first_wait, self.shared.most_wait),
            made: 0,
            scarce: 0,
            token_renewed: false,
        };
        loop {
            tries.made += 1;
            match self.try_once(url, path, read).await {
                Ok(parsed) => return Ok(parsed),
                Err(missed) => self.before_next(missed, &mut tries).await?,
            }
        }
    }

    async fn try_once(&self, url: &Url, path: &str, read: Read<'_>) -> Result<Parsed, Missed> {
        let (http, generation) = self.shared.connections.client();
        let final_failure = |failure: Failure| Missed::Refused(failure.into());
        let token = self.shared.tokens.token(&self.token_source, &http, self.spending.deadline).await;
        let token = token.map_err(final_failure)?;
        let at_most = self.spending.deadline.remaining();
        if at_most.is_zero() {
            return Err(final_failure(ErrorCode::DeadlineExceeded.into()));
        }
        let client_request_id = Uuid::new_v4();
        let get = Get { url, authorization: &token.header, client_request_id, at_most };
        self.spending.request();
        let started = Instant::now();
        let answer = self.shared.connections.get(&http, get).await;
        telemetry::graph_request_took(started.elapsed());
        let logged = Logged { reader: self, path, client_request_id, took: started.elapsed() };
        match answer {
            Ok(answer) => {
                if answer.status == 503 {
                    // Graph's advice: come back over another connection, it may lead to another server.
                    self.shared.connections.renew(generation);
                }
                self.judge(answer, &token, read, &logged)
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
            return read(&answer.body).map_err(|unreadable| {
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
    async fn before_next(&self, missed: Missed, tries: &mut Tries) -> Result<(), Refusal> {
        let used_up = tries.made >= self.shared.max_tries;
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
                tries.scarce += u32::from(scarce);
                let wait = full_jitter(tries.waits.next_wait());
                let too_late = wait >= self.spending.deadline.remaining();
                if used_up || tries.scarce > SCARCE_RETRIES || too_late {
                    return Err(failure.into());
                }
                tokio::time::sleep(wait).await;
                Ok(())
            }
            Missed::Throttled(asked, failure) => {
                let asked = asked.unwrap_or_else(|| tries.waits.next_wait());
                // Never earlier than asked: calls made while throttled count, and lengthen the penalty.
                let wait = asked + full_jitter((asked / 10).max(self.shared.first_wait));
                let paid = if used_up { None } else { self.spending.pay(wait) };
                let Some(new) = paid else {
                    self.spending.gave_up(asked);
                    return Err(failure.into());
                };
                telemetry::graph_throttle_wait(u64::try_from(new.as_millis()).unwrap_or(u64::MAX));
                tokio::time::sleep(wait).await;
                Ok(())
            }
        }
    }
}

/// What a log line says about a try: ids, a status and words of our own.
struct Logged<'a> {
    reader: &'a GraphReader,
    path: &'a str,
    client_request_id: Uuid,
    took: Duration,
}

impl Logged<'_> {
    fn good(&self, request_id: Option<&str>) {
        tracing::debug!(
            tenant_id = %self.reader.tenant_id, path = self.path, client_request_id = %self.client_request_id,
            request_id, took_ms = self.took.as_millis(), "Graph answered"
        );
    }

    fn refused(&self, failure: &Failure) {
        tracing::info!(
            tenant_id = %self.reader.tenant_id, path = self.path, client_request_id = %self.client_request_id,
            request_id = failure.request_id, status = failure.http_status, graph_code = failure.graph_code,
            code = failure.code.as_str(), took_ms = self.took.as_millis(), "Graph refused"
        );
    }

    fn no_answer(&self, no_answer: NoAnswer) {
        tracing::info!(
            tenant_id = %self.reader.tenant_id, path = self.path, client_request_id = %self.client_request_id,
            why = ?no_answer, took_ms = self.took.as_millis(), "no answer from Graph"
        );
    }
}
