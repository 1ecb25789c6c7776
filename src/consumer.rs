//! The pump: takes requests off the queue, at most `consumer.prefetch` at a time, has each run, and settles it.
//!
//! A session (connection, channel, topology, prefetch, consumer) is never mended. It is rebuilt on an error, when its
//! stream ends without our asking, and when requests are ready but nothing arrives. What is in hand goes on meanwhile:
//! its acknowledgement finds the channel gone, and the redelivery finds the run ended or at work.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, timeout};
use tokio_util::task::TaskTracker;
use tracing::{debug, info, warn};

use crate::backoff::{Waits, full_jitter};
use crate::broker::{Broker, BrokerError, Delivery, Publisher, Subscription};
use crate::config::{Config, seconds};
use crate::domain::clock::Deadline;
use crate::run::{Runner, Stop};
use crate::store::Store;
use crate::telemetry;

mod backpressure;
mod delivery_handler;
mod health;

use backpressure::Intake;
use delivery_handler::DeliveryHandler;
pub use health::ConsumerHealth;
use health::Paused;

const FIRST_WAIT: Duration = Duration::from_millis(200);
const LONGEST_WAIT: Duration = Duration::from_secs(30);
/// A session that stood so long was a good one: the next failure is a new one.
const GOOD_SESSION: Duration = Duration::from_secs(30);
/// How long runs have to hand themselves back once they are told to.
const HAND_BACK: Duration = Duration::from_secs(2);
/// What opening a session, or a question to the broker, may take: there may be several addresses, and slow answers.
const BROKER_PATIENCE: Duration = Duration::from_secs(120);
/// How long each part of a session has to close.
const CLOSE: Duration = Duration::from_millis(700);

/// Consumes requests until it is told to stop.
pub struct Consumer {
    broker: Broker,
    publisher: Publisher,
    runner: Runner,
    store: Store,
    settings: Settings,
    health: Arc<ConsumerHealth>,
}

#[derive(Debug, Clone, Copy)]
struct Settings {
    prefetch: u16,
    watchdog: Duration,
    drain: Duration,
    high_water: i64,
    /// How long a delivery may be in hand beyond its run: the broker takes back what is in hand for longer than
    /// `consumer.broker_timeout_s`. A third of it is for waiting before the run, a third for waiting out the database.
    spare: Duration,
}

/// Why the pump stands still.
enum LoopExit {
    Drain,
    /// The intake has closed or opened.
    IntakeChanged,
    Lost(&'static str, Option<BrokerError>),
}

impl Consumer {
    /// A consumer by the configuration; it does nothing before it is run.
    #[must_use]
    pub fn new(broker: Broker, publisher: Publisher, runner: Runner, store: Store, config: &Config) -> Self {
        let settings = Settings {
            prefetch: config.consumer.prefetch,
            watchdog: seconds(config.consumer.watchdog_s),
            drain: seconds(config.consumer.drain_s),
            high_water: config.outbox.high_water,
            spare: seconds(config.consumer.broker_timeout_s.saturating_sub(config.run.deadline_s)),
        };
        Self { broker, publisher, runner, store, settings, health: Arc::default() }
    }

    /// How it is, for others to look at.
    #[must_use]
    pub fn health(&self) -> Arc<ConsumerHealth> {
        Arc::clone(&self.health)
    }

    /// Consumes until it is told to stop. It returns once everything in hand is settled, at the latest a few seconds
    /// after the drain budget.
    pub async fn run(self, stop: Stop) {
        let trouble = Arc::new(Notify::new());
        let intake = Intake::new(self.store, self.settings.high_water, stop.quiet.subscribe(), Arc::clone(&trouble));
        let watched = intake.watch();
        let handler = DeliveryHandler {
            runner: self.runner,
            publisher: self.publisher,
            hold: self.settings.spare / 3,
            name: self.broker.client_name().to_owned(),
            health: Arc::clone(&self.health),
            intake: watched.clone(),
            trouble,
            drain: stop.drain.clone(),
            abort: stop.abort.child_token(),
        };
        let consume_loop = ConsumeLoop {
            broker: self.broker,
            settings: self.settings,
            health: self.health,
            intake: watched,
            permits: Arc::new(Semaphore::new(usize::from(self.settings.prefetch))),
            handler: Arc::new(handler),
            tasks: TaskTracker::new(),
            waiting: VecDeque::new(),
            stop,
        };
        tokio::select! {
            () = consume_loop.run() => {}
            () = intake.keep() => {}
        }
    }
}

struct ConsumeLoop {
    broker: Broker,
    settings: Settings,
    health: Arc<ConsumerHealth>,
    intake: watch::Receiver<Option<Paused>>,
    /// The cap on requests in hand. The broker's prefetch has the same number, but counts for a session: after a
    /// rebuild the runs of the one before are still in hand.
    permits: Arc<Semaphore>,
    handler: Arc<DeliveryHandler>,
    tasks: TaskTracker,
    /// Arrived, but without a permit; each with the moment until which it may wait.
    waiting: VecDeque<(Deadline, Delivery)>,
    stop: Stop,
}

impl ConsumeLoop {
    async fn run(mut self) {
        let health = Arc::clone(&self.health);
        let mut session = None;
        let mut waits = Waits::new(FIRST_WAIT, LONGEST_WAIT);
        loop {
            let begun = Instant::now();
            let opened = health.beating(BROKER_PATIENCE, self.open(&mut session)).await;
            let standstill = match opened {
                Ok(Some(subscription)) => self.consume(subscription).await,
                Ok(None) => self.wait_while_paused(&mut session).await,
                Err(error) => LoopExit::Lost("error", Some(error)),
            };
            match standstill {
                LoopExit::Drain => break,
                LoopExit::IntakeChanged => {}
                LoopExit::Lost(cause, error) => {
                    self.note_loss(cause, error);
                    session = None;
                    if begun.elapsed() >= GOOD_SESSION {
                        waits = Waits::new(FIRST_WAIT, LONGEST_WAIT);
                    }
                    let wait = full_jitter(waits.next_wait());
                    health.beating(LONGEST_WAIT, self.stop.drain.run_until_cancelled(sleep(wait))).await;
                }
            }
        }
        health.beating(self.settings.drain + BROKER_PATIENCE, self.drain(session)).await;
    }

    /// A subscription that takes requests, unless the intake is closed.
    async fn open<'a>(
        &mut self,
        session: &'a mut Option<Subscription>,
    ) -> Result<Option<&'a mut Subscription>, BrokerError> {
        let paused = *self.intake.borrow_and_update();
        self.health.set_paused(paused);
        if paused.is_some() || self.stop.drain.is_cancelled() {
            return Ok(None);
        }
        match session {
            Some(subscription) => subscription.resume().await?,
            None => {
                let drain = self.stop.drain.clone();
                let Some(subscribed) = drain.run_until_cancelled(self.broker.subscribe(self.settings.prefetch)).await
                else {
                    return Ok(None);
                };
                *session = Some(subscribed?);
                info!(version = self.broker.version(), prefetch = self.settings.prefetch, "subscribed");
            }
        }
        self.health.set_subscribed(true);
        Ok(session.as_mut())
    }

    /// Takes requests until something stands in the way.
    async fn consume(&mut self, session: &mut Subscription) -> LoopExit {
        let mut tick = interval(Duration::from_secs(1));
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut watchdog = Watchdog::new(self.settings.watchdog);
        let drain = self.stop.drain.clone();
        loop {
            self.health.heartbeat().beat();
            let permits = Arc::clone(&self.permits);
            tokio::select! {
                biased;
                () = drain.cancelled() => return LoopExit::Drain,
                changed = self.intake.changed() => {
                    if changed.is_err() || self.intake.borrow().is_some() {
                        return LoopExit::IntakeChanged;
                    }
                }
                permit = permits.acquire_owned(), if !self.waiting.is_empty() => {
                    let permit = permit.expect("nobody closes the semaphore");
                    if let Some((_, delivery)) = self.waiting.pop_front() {
                        self.handle_delivery(delivery, permit);
                    }
                }
                next = session.next() => match next {
                    Some(Ok(delivery)) => {
                        watchdog.pet();
                        // Taken at once if there is a permit; the stream is listened to in any case, for its end.
                        match Arc::clone(&self.permits).try_acquire_owned() {
                            Ok(permit) if self.waiting.is_empty() => self.handle_delivery(delivery, permit),
                            _ => self.waiting.push_back((Deadline::after(self.settings.spare / 3), delivery)),
                        }
                    }
                    Some(Err(error)) => return LoopExit::Lost("error", Some(error)),
                    None => return LoopExit::Lost("ended", None),
                },
                _ = tick.tick() => {
                    if let Err(error) = self.requeue_overdue().await {
                        return LoopExit::Lost("error", Some(error));
                    }
                    let expects = self.waiting.is_empty() && self.permits.available_permits() > 0;
                    let look = drain.run_until_cancelled(watchdog.look(session, expects));
                    let looked = self.health.beating(BROKER_PATIENCE, look).await;
                    match looked {
                        Some(Ok(false)) | None => {}
                        Some(Ok(true)) => return LoopExit::Lost("watchdog", None),
                        Some(Err(error)) => return LoopExit::Lost("error", Some(error)),
                    }
                }
            }
        }
    }

    fn handle_delivery(&self, delivery: Delivery, permit: OwnedSemaphorePermit) {
        self.tasks.spawn(Arc::clone(&self.handler).handle_delivery(delivery, permit));
    }

    /// Cancels the consumer, gives back what was not begun, and waits. The channel stays for what is in hand.
    async fn wait_while_paused(&mut self, session: &mut Option<Subscription>) -> LoopExit {
        if self.stop.drain.is_cancelled() {
            return LoopExit::Drain;
        }
        if self.health.subscribed() {
            let paused = self.intake.borrow().map(Paused::as_str);
            info!(paused, in_flight = self.health.in_flight(), "no new requests are taken for now");
        }
        self.health.set_subscribed(false);
        if let Err(error) = self.requeue_unstarted(session.as_mut()).await {
            return LoopExit::Lost("error", Some(error));
        }
        let lost = async {
            match session {
                Some(session) => session.next().await,
                None => std::future::pending().await,
            }
        };
        let change = async {
            tokio::select! {
                () = self.stop.drain.cancelled() => LoopExit::Drain,
                _ = self.intake.changed() => LoopExit::IntakeChanged,
                lost = lost => LoopExit::Lost("ended", lost.and_then(Result::err)),
            }
        };
        self.health.beating(Duration::MAX, change).await
    }

    async fn requeue_unstarted(&mut self, session: Option<&mut Subscription>) -> Result<(), BrokerError> {
        if let Some(session) = session {
            session.cancel().await?;
        }
        for (_, delivery) in self.waiting.drain(..) {
            // One of a session that is lost is back already.
            delivery.requeue().await?;
            telemetry::delivery("requeued");
        }
        Ok(())
    }

    /// After a rebuild the runs of the session before may be in hand for long: what would have to wait too long behind
    /// them is for another replica.
    async fn requeue_overdue(&mut self) -> Result<(), BrokerError> {
        while self.waiting.front().is_some_and(|(until, _)| until.passed()) {
            let Some((_, delivery)) = self.waiting.pop_front() else { break };
            delivery.requeue().await?;
            telemetry::delivery("requeued");
        }
        Ok(())
    }

    fn note_loss(&mut self, cause: &'static str, error: Option<BrokerError>) {
        self.health.set_subscribed(false);
        let what = error.map_or_else(|| what_ended(cause).to_owned(), |error| error.to_string());
        warn!(cause, problem = what, in_flight = self.health.in_flight(), "no subscription; trying again");
        self.health.set_problem(what);
        telemetry::resubscribed(cause);
        self.waiting.clear();
    }

    /// Finishes what is in hand, or hands it back when the budget is spent; then closes. The heartbeats go on to the
    /// end: without its channel nothing in hand could be settled.
    async fn drain(mut self, mut session: Option<Subscription>) {
        self.health.set_paused(Some(Paused::Draining));
        self.health.set_subscribed(false);
        info!(in_flight = self.health.in_flight(), budget_s = self.settings.drain.as_secs(), "draining");
        let begun = Instant::now();
        if let Err(error) = self.requeue_unstarted(session.as_mut()).await {
            debug!(%error, "the broker takes back what was not begun by itself");
        }
        self.tasks.close();
        let in_time = tokio::select! {
            () = self.tasks.wait() => true,
            () = sleep(self.settings.drain.saturating_sub(begun.elapsed())) => false,
            () = self.stop.abort.cancelled() => false,
        };
        if !in_time {
            warn!(in_flight = self.health.in_flight(), "handing back what is not finished");
            self.handler.abort.cancel();
            if timeout(HAND_BACK, self.tasks.wait()).await.is_err() {
                warn!(in_flight = self.health.in_flight(), "left to the broker, and to the end of their leases");
            }
        }
        if let Some(session) = session {
            session.close(CLOSE).await;
        }
    }
}

fn what_ended(cause: &str) -> &'static str {
    match cause {
        "watchdog" => "requests are ready, but none arrived",
        _ => "the broker ended the subscription: the queue was deleted or moved, or a delivery took too long",
    }
}

/// Notices a subscription that stands and brings nothing, although there is something to bring.
struct Watchdog {
    patience: Duration,
    last: Instant,
    suspicious: bool,
}

impl Watchdog {
    fn new(patience: Duration) -> Self {
        Self { patience, last: Instant::now(), suspicious: false }
    }

    /// Something arrived.
    fn pet(&mut self) {
        self.last = Instant::now();
        self.suspicious = false;
    }

    /// Whether the subscription is to be rebuilt. What is ready at one look may be on its way; at the second it is not.
    async fn look(&mut self, session: &Subscription, expects: bool) -> Result<bool, BrokerError> {
        if !expects {
            self.pet();
        }
        if self.last.elapsed() < self.patience {
            return Ok(false);
        }
        if session.ready().await? == 0 {
            self.pet();
            return Ok(false);
        }
        Ok(std::mem::replace(&mut self.suspicious, true))
    }
}
