//! What can happen: every action with the code that it stands for, and when it is possible.

use crate::design::{Design, Fault, Guard};
use crate::state::{Phase, Relay, Renewal, Settle, State, Worker};

/// One step of the whole. `usize` is a worker or a relay, `u8` a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// `consumer.rs`: `Pump::attend` hands a delivery to a worker, which asks for admission.
    Deliver(usize, u8),
    /// `store/admission.rs`: `Store::admit` commits, at once or after the full decision.
    Admit(usize),
    /// `run/mod.rs`: `Recipe::run` begins, `LeaseKeeper::hold` sets the worker's own deadline.
    Begin(usize),
    /// `store/items.rs`: `upsert_items`
    Write(usize),
    /// `store/runs.rs`: `finish_run` commits, with what the last list has left to write.
    Finish(usize),
    /// `run/lease.rs`: `LeaseKeeper::renew` notes the time and sends its statement.
    AskRenewal(usize),
    /// `store/leases.rs`: `renew_leases` commits; a refusal cancels `Holding::revoked`.
    Renew(usize),
    /// `run/lease.rs`: `LeaseKeeper::apply` moves the deadline.
    HearRenewal(usize),
    /// `run/lease.rs`: `HeldLease::lost` returns because the deadline has passed.
    StopItself(usize),
    /// `consumer/attend.rs`: `settle`; a request that is busy is parked first and acked with the next step.
    Settle(usize),
    /// Only in a broken design: the ack of a message whose run is still going on.
    AckEarly(usize),
    /// `run/mod.rs`: `Recipe::hand_back`; the process starts again at once.
    HandBack(usize),
    /// `run/mod.rs`: `Recipe::hand_back` whose statement fails.
    HandBackUnheard(usize),
    /// `run/lease.rs`: `hand_back_orphans`
    HandBackOrphan(usize),
    /// `run/mod.rs`: `store_away` after a commit of `finish_run` whose answer was lost; the lease is orphaned, and
    /// `consumer/attend.rs`: `handle` asks for admission again with the same delivery.
    FinishUnheard(usize),
    /// `run/mod.rs`: `store_away` after a commit of `admit` whose answer was lost: asked again, with no lease known.
    AdmitUnheard(usize),
    /// `run/mod.rs`: `store_away` because nothing could be asked; the lease is orphaned, and asked again until `HOLD`.
    StoreAway(usize),
    /// `consumer/attend.rs`: `copy_then_ack` makes a copy again that was stored, but not confirmed.
    ParkUnknown(usize),
    /// `consumer/attend.rs`: `copy_then_ack` has lost its patience.
    ParkGivenUp(usize),
    /// The broker gives a worker's delivery to others: its connection is lost, or its heartbeats stay away.
    Cut(usize),
    /// kill -9
    Crash(usize),
    /// kill -STOP, or a stall of the host
    Pause(usize),
    /// kill -CONT
    Resume(usize),
    /// The broker loses a copy: a queue is purged or deleted, a disk is gone.
    LoseMessage(u8),
    /// `janitor.rs`: `look_round`; `store/runs.rs`: `end_if_still_abandoned`
    Janitor(u8),
    /// `relay.rs`: `round` begins; `store/outbox.rs`: `claim_events`
    Claim(usize, u8),
    /// `relay.rs`: `Publisher::publish` answers `Fate::Confirmed`.
    Publish(usize),
    /// `relay.rs`: it answers `Fate::Unknown`, whether the event was stored or not; the claim runs out by itself.
    PublishUnknown(usize, bool),
    /// `relay.rs`: it answers `Fate::Refused` or `Fate::Unroutable`; `store/outbox.rs`: `release_events`
    Release(usize),
    /// `relay.rs`: `round` ends; `store/outbox.rs`: `mark_sent`
    Mark(usize),
    /// `relay.rs`: `round` fails half way, or its process dies.
    RelayGone(usize),
    /// The database's clock and every host's go on.
    Tick,
}

impl Action {
    fn fault(self) -> Option<Fault> {
        Some(match self {
            Self::Crash(_) | Self::RelayGone(_) => Fault::Crash,
            Self::Pause(_) => Fault::Pause,
            Self::HandBack(_) => Fault::Stop,
            Self::Cut(_) => Fault::Cut,
            Self::LoseMessage(_) => Fault::LostMessage,
            Self::FinishUnheard(_) | Self::AdmitUnheard(_) => Fault::LostAnswer,
            Self::StoreAway(_) | Self::HandBackUnheard(_) => Fault::StoreAway,
            Self::ParkUnknown(_) | Self::ParkGivenUp(_) | Self::PublishUnknown(..) | Self::Release(_) => {
                Fault::LostConfirm
            }
            _ => return None,
        })
    }
}

/// Collects what is possible, and leaves out what this design is spared.
struct Possible<'a> {
    design: &'a Design,
    state: &'a State,
    actions: &'a mut Vec<Action>,
}

impl Design {
    pub fn possible(&self, state: &State, actions: &mut Vec<Action>) {
        let mut possible = Possible { design: self, state, actions };
        for number in 0..self.workers {
            let worker = &state.workers[number];
            // Two workers in one state do the same; they stand side by side.
            if number == 0 || *worker != state.workers[number - 1] {
                possible.by_worker(number, worker);
            }
        }
        for number in 0..self.relays {
            if number == 0 || state.relays[number] != state.relays[number - 1] {
                possible.by_relay(number);
            }
        }
        for request in possible.requests() {
            let waiting = &state.requests[usize::from(request)];
            if waiting.ready > 0 || waiting.parked.iter().any(|copies| *copies > 0) {
                possible.add(Action::LoseMessage(request));
            }
            if self.is_abandoned(state, request) {
                possible.add(Action::Janitor(request));
            }
        }
        if !state.workers.iter().any(|worker| self.must_stop(worker)) {
            possible.add(Action::Tick);
        }
    }

    /// Everything else goes on happening in a world without new faults.
    pub fn is_fault(&self, state: &State, action: Action) -> bool {
        // The broker gives up on a process that is stopped as a matter of course: its heartbeats stay away.
        let given_up = matches!(action, Action::Cut(number) if state.workers[number].paused);
        action.fault().is_some() && !given_up
    }

    /// Whether a worker is awake at its own deadline: it stops before any more time passes.
    fn must_stop(&self, worker: &Worker) -> bool {
        matches!(worker.phase, Phase::Working { trust: 0, .. }) && !worker.paused && self.keeps(Guard::OwnDeadline)
    }
}

impl Possible<'_> {
    fn requests(&self) -> std::ops::Range<u8> {
        0..self.design.requests as u8
    }

    fn add(&mut self, action: Action) {
        let spared = |fault| self.state.faults_left == 0 || !self.design.kinds.contains(&fault);
        if !self.design.is_fault(self.state, action) || !action.fault().is_some_and(spared) {
            self.actions.push(action);
        }
    }

    fn by_worker(&mut self, number: usize, worker: &Worker) {
        if worker.orphan.is_some() && !worker.paused {
            self.add(Action::HandBackOrphan(number));
        }
        if worker.is_idle() {
            for request in self.requests().filter(|request| self.state.requests[usize::from(*request)].ready > 0) {
                self.add(Action::Deliver(number, request));
            }
            return;
        }
        self.on_the_wire(number, worker);
        if worker.in_hand {
            self.add(Action::Cut(number));
        }
        self.add(Action::Crash(number));
        if worker.paused {
            self.add(Action::Resume(number));
        } else {
            self.add(Action::Pause(number));
            self.awake(number, worker);
        }
    }

    /// What the database may still do for a worker that sleeps, because it was sent before.
    fn on_the_wire(&mut self, number: usize, worker: &Worker) {
        match worker.phase {
            Phase::Asking { .. } => self.add(Action::Admit(number)),
            Phase::Working { .. } => {
                self.add(Action::Write(number));
                self.add(Action::Finish(number));
                self.add(Action::FinishUnheard(number));
                if matches!(worker.renewal, Renewal::Asked(_)) {
                    self.add(Action::Renew(number));
                }
            }
            Phase::Idle | Phase::Granted { .. } | Phase::Settling { .. } => {}
        }
    }

    fn awake(&mut self, number: usize, worker: &Worker) {
        match worker.phase {
            Phase::Idle => {}
            Phase::Asking { .. } => self.add(Action::StoreAway(number)),
            Phase::Granted { .. } => {
                self.add(Action::Begin(number));
                self.add(Action::AdmitUnheard(number));
            }
            Phase::Working { trust, .. } => self.working(number, worker, trust),
            Phase::Settling { how, .. } => {
                self.add(Action::Settle(number));
                if how == Settle::Park {
                    self.add(Action::ParkUnknown(number));
                    self.add(Action::ParkGivenUp(number));
                }
            }
        }
    }

    fn working(&mut self, number: usize, worker: &Worker, trust: u8) {
        match worker.renewal {
            // One that is asked in the tick of the last one would change nothing.
            Renewal::None if trust < self.design.clock.trust => self.add(Action::AskRenewal(number)),
            Renewal::None | Renewal::Asked(_) => {}
            Renewal::Kept(_) => self.add(Action::HearRenewal(number)),
        }
        if self.design.must_stop(worker) {
            self.add(Action::StopItself(number));
        }
        if !self.design.keeps(Guard::CommitBeforeAck) && worker.in_hand {
            self.add(Action::AckEarly(number));
        }
        self.add(Action::HandBack(number));
        self.add(Action::HandBackUnheard(number));
        self.add(Action::StoreAway(number));
    }

    fn by_relay(&mut self, number: usize) {
        match self.state.relays[number] {
            Relay::Idle => {
                for request in self.requests().filter(|request| self.design.is_due(self.state, *request)) {
                    self.add(Action::Claim(number, request));
                }
            }
            Relay::Claimed(_) => {
                self.add(Action::Publish(number));
                self.add(Action::PublishUnknown(number, true));
                self.add(Action::PublishUnknown(number, false));
                self.add(Action::Release(number));
                self.add(Action::RelayGone(number));
                if !self.design.keeps(Guard::ConfirmBeforeMark) {
                    self.add(Action::Mark(number));
                }
            }
            Relay::Confirmed(_) => {
                self.add(Action::Mark(number));
                self.add(Action::RelayGone(number));
            }
        }
    }
}
