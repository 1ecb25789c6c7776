//! Consume loop: takes at most `consumer.prefetch` requests at a time, runs each and settles it.
//!
//! A session (connection, channel, topology, prefetch, consumer) is never repaired. It is rebuilt after an error, when
//! its stream ends unexpectedly, and when requests are ready but none arrives. Deliveries in flight continue meanwhile:
//! their acknowledgements fail, and the redelivery finds the run terminal or in progress.

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
mod loop_exit;
mod watchdog;

use backpressure::Intake;
use delivery_handler::DeliveryHandler;
pub use health::ConsumerHealth;
use health::Paused;
use loop_exit::{LoopExit, what_ended};
use watchdog::{Check, Watchdog};

const FIRST_BACKOFF: Duration = Duration::from_millis(200);
const MAX_BACKOFF: Duration = Duration::from_secs(30);
/// Session lifetime after which the reconnect backoff starts anew.
const STABLE_SESSION: Duration = Duration::from_secs(30);
/// Maximum number of held deliveries that extend the prefetch.
const MAX_HELD: u16 = 256;
/// Time after which a session is widened although its first run is still in progress.
const SLOW_START: Duration = Duration::from_secs(1);
/// Time that runs have to stop after `abort`.
const ABORT_GRACE: Duration = Duration::from_secs(2);
/// Heartbeat allowance for one broker operation: there may be several addresses, each with its own timeouts.
const BROKER_ALLOWANCE: Duration = Duration::from_secs(120);
/// Time limit for closing the channel, and again for the connection.
const CLOSE_TIMEOUT: Duration = Duration::from_millis(700);

/// Consumer of the requests queue.
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
    /// Time a delivery may be in flight beyond its run's deadline: after `consumer.broker_timeout_s` the broker closes
    /// the channel. One third is for waiting before the run, one third for waiting for the database.
    spare: Duration,
}

impl Consumer {
    /// Creates a consumer; [`Consumer::run`] starts it.
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

    /// State of this consumer for readiness and `/status`.
    #[must_use]
    pub fn health(&self) -> Arc<ConsumerHealth> {
        Arc::clone(&self.health)
    }

    /// Consumes until `stop.drain`. Returns once all deliveries in flight are settled, a few seconds after the drain
    /// budget at the latest.
    pub async fn run(self, stop: Stop) {
        let (trouble, settled) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
        let intake = Intake::new(self.store, self.settings.high_water, stop.paused.subscribe(), Arc::clone(&trouble));
        let watched = intake.watch();
        let handler = DeliveryHandler {
            runner: self.runner,
            publisher: self.publisher,
            hold: self.settings.spare / 3,
            name: self.broker.client_name().to_owned(),
            health: Arc::clone(&self.health),
            intake: watched.clone(),
            trouble,
            settled: Arc::clone(&settled),
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
            settled,
            stop,
        };
        tokio::select! {
            () = consume_loop.run() => {}
            () = intake.run() => {}
        }
    }
}

struct ConsumeLoop {
    broker: Broker,
    settings: Settings,
    health: Arc<ConsumerHealth>,
    intake: watch::Receiver<Option<Paused>>,
    /// Cap on deliveries in flight. The broker's prefetch is the same number but counts per session: after a rebuild
    /// the runs of the previous session are still in flight.
    permits: Arc<Semaphore>,
    handler: Arc<DeliveryHandler>,
    tasks: TaskTracker,
    /// Deliveries without a permit, each with the deadline of its wait.
    waiting: VecDeque<(Deadline, Delivery)>,
    /// Notified after every settled delivery.
    settled: Arc<Notify>,
    stop: Stop,
}

impl ConsumeLoop {
    async fn run(mut self) {
        let health = Arc::clone(&self.health);
        let mut session = None;
        let mut waits = Waits::new(FIRST_BACKOFF, MAX_BACKOFF);
        loop {
            let begun = Instant::now();
            let opened = health.beating(BROKER_ALLOWANCE, self.open(&mut session)).await;
            let exit = match opened {
                Ok(Some(subscription)) => self.consume(subscription).await,
                Ok(None) => self.wait_while_paused(&mut session).await,
                Err(error) => LoopExit::Lost("error", Some(error)),
            };
            match exit {
                LoopExit::Drain => break,
                LoopExit::IntakeChanged => {}
                LoopExit::Lost(cause, error) => {
                    self.note_loss(cause, error);
                    session = None;
                    if begun.elapsed() >= STABLE_SESSION {
                        waits = Waits::new(FIRST_BACKOFF, MAX_BACKOFF);
                    }
                    let wait = full_jitter(waits.next_wait());
                    health.beating(MAX_BACKOFF, self.stop.drain.run_until_cancelled(sleep(wait))).await;
                }
            }
        }
        health.beating(self.settings.drain + BROKER_ALLOWANCE, self.drain(session)).await;
    }

    /// Opens or resumes the subscription; `None` while intake is paused or the daemon drains.
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
                info!(
                    version = self.broker.version().map(|(version, _)| version),
                    prefetch = self.settings.prefetch,
                    "subscribed"
                );
            }
        }
        self.health.set_subscribed(true);
        Ok(session.as_mut())
    }

    /// Takes requests until the intake pauses, the session is lost or the daemon drains.
    async fn consume(&mut self, session: &mut Subscription) -> LoopExit {
        let mut tick = interval(Duration::from_secs(1));
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut watchdog = Watchdog::new(self.settings.watchdog);
        let drain = self.stop.drain.clone();
        let mut first_arrival: Option<Instant> = None;
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
                    let permit = permit.expect("the semaphore is never closed");
                    if let Some((_, delivery)) = self.waiting.pop_front() {
                        self.handle_delivery(delivery, permit);
                    }
                }
                next = session.next() => match next {
                    Some(Ok(delivery)) => {
                        watchdog.note_activity();
                        first_arrival.get_or_insert_with(Instant::now);
                        self.accept(delivery);
                    }
                    Some(Err(error)) => return LoopExit::Lost("error", Some(error)),
                    None => return LoopExit::Lost("ended", None),
                },
                () = self.settled.notified(), if session.narrow() && first_arrival.is_some() => {
                    if let Err(error) = self.widen(session).await {
                        return LoopExit::Lost("error", Some(error));
                    }
                }
                _ = tick.tick() => {
                    let settled_in = first_arrival.is_some_and(|at| at.elapsed() >= SLOW_START);
                    match self.tend(session, &mut watchdog, settled_in).await {
                        Ok(false) => {}
                        Ok(true) => return LoopExit::Lost("watchdog", None),
                        Err(error) => return LoopExit::Lost("error", Some(error)),
                    }
                }
            }
        }
    }

    /// Applies the prefetch that is due, requeues what is overdue and checks the subscription. True if it must be rebuilt.
    async fn tend(
        &mut self,
        session: &mut Subscription,
        watchdog: &mut Watchdog,
        settled_in: bool,
    ) -> Result<bool, BrokerError> {
        if session.narrow() && settled_in || !session.narrow() && session.extra() != self.extra() {
            self.widen(session).await?;
        }
        self.requeue_overdue().await?;
        let (free, held) = (self.permits.available_permits(), self.health.held());
        let expects = Watchdog::expects(self.waiting.len(), free, held);
        let idle = free == usize::from(self.settings.prefetch) && held == 0;
        let check = self.stop.drain.run_until_cancelled(watchdog.check(session, expects, idle));
        match self.health.beating(BROKER_ALLOWANCE, check).await.transpose()? {
            Some(Check::Stalled) => return Ok(true),
            Some(Check::Passed(deliveries)) => deliveries.into_iter().for_each(|delivery| self.accept(delivery)),
            None => {}
        }
        Ok(false)
    }

    /// Prefetch for deliveries that are held without a slot.
    fn extra(&self) -> u16 {
        u16::try_from(self.health.held()).unwrap_or(u16::MAX).min(MAX_HELD)
    }

    /// Applies the full prefetch: a delivery of this session was settled, or has been in flight for a while.
    async fn widen(&mut self, session: &mut Subscription) -> Result<(), BrokerError> {
        for delivery in session.widen(self.extra()).await? {
            self.accept(delivery);
        }
        Ok(())
    }

    /// Starts a delivery if there is a free permit. The stream is polled without one too: only it reports its own end.
    fn accept(&mut self, delivery: Delivery) {
        match Arc::clone(&self.permits).try_acquire_owned() {
            Ok(permit) if self.waiting.is_empty() => self.handle_delivery(delivery, permit),
            _ => self.waiting.push_back((Deadline::after(self.settings.spare / 3), delivery)),
        }
    }

    fn handle_delivery(&self, delivery: Delivery, permit: OwnedSemaphorePermit) {
        self.tasks.spawn(Arc::clone(&self.handler).handle_delivery(delivery, permit));
    }

    /// Cancels the consumer, requeues what was not started, and waits for the intake. The channel stays open for
    /// deliveries in flight.
    async fn wait_while_paused(&mut self, session: &mut Option<Subscription>) -> LoopExit {
        if self.stop.drain.is_cancelled() {
            return LoopExit::Drain;
        }
        if self.health.subscribed() {
            let paused = self.intake.borrow().map(Paused::as_str);
            info!(paused, in_flight = self.health.in_flight(), "intake paused");
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
            // Fails only if the session was lost, and then the broker has requeued it.
            delivery.requeue().await?;
            telemetry::delivery("requeued");
        }
        Ok(())
    }

    /// Requeues deliveries that waited too long for a permit: after a rebuild, runs of the previous session may hold
    /// the permits for long, and another replica may be free.
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
        warn!(cause, problem = what, in_flight = self.health.in_flight(), "subscription lost; reconnecting");
        self.health.set_problem(what);
        telemetry::resubscribed(cause);
        self.waiting.clear();
    }

    /// Waits for deliveries in flight, aborts them when the drain budget is spent, then closes the session. The
    /// connection stays open to the end: without its channel nothing could be settled.
    async fn drain(mut self, mut session: Option<Subscription>) {
        self.health.set_paused(Some(Paused::Draining));
        self.health.set_subscribed(false);
        info!(in_flight = self.health.in_flight(), budget_s = self.settings.drain.as_secs(), "draining");
        let begun = Instant::now();
        if let Err(error) = self.requeue_unstarted(session.as_mut()).await {
            debug!(%error, "requeue failed; the broker requeues when the channel closes");
        }
        self.tasks.close();
        let in_time = tokio::select! {
            () = self.tasks.wait() => true,
            () = sleep(self.settings.drain.saturating_sub(begun.elapsed())) => false,
            () = self.stop.abort.cancelled() => false,
        };
        if !in_time {
            warn!(in_flight = self.health.in_flight(), "drain budget spent; aborting unfinished runs");
            self.handler.abort.cancel();
            if timeout(ABORT_GRACE, self.tasks.wait()).await.is_err() {
                warn!(in_flight = self.health.in_flight(), "runs did not stop in time; their leases expire");
            }
        }
        if let Some(session) = session {
            session.close(CLOSE_TIMEOUT).await;
        }
    }
}
