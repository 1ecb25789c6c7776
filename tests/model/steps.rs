//! What an action does to the state.

use stateright::{Model, Property};

use crate::actions::Action;
use crate::database::Admission;
use crate::design::{Design, Guard, MAX_ATTEMPTS};
use crate::properties;
use crate::state::{Lease, Outbox, Phase, Relay, Renewal, Request, Run, Settle, State, Worker};

impl Model for Design {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        let mut requests = [Request::default(); 2];
        requests[..self.requests].fill(Request { ready: 1, ..Request::default() });
        let (workers, relays) = ([Worker::IDLE; 3], [Relay::Idle; 2]);
        vec![State { requests, workers, relays, faults_left: self.faults, broken: 0 }]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        self.possible(state, actions);
    }

    fn next_state(&self, state: &State, action: Action) -> Option<State> {
        let mut next = *state;
        self.step(&mut next, action);
        if self.is_fault(state, action) {
            next.faults_left -= 1;
        }
        let next = next.in_order(self);
        (next != *state).then_some(next)
    }

    fn within_boundary(&self, state: &State) -> bool {
        // No design that holds comes here; a broken one could go on for ever.
        let most = MAX_ATTEMPTS + self.faults + 1;
        state.requests.iter().filter_map(|request| request.run).all(|run| run.grant <= most)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        properties::of(self)
    }
}

impl Design {
    fn step(&self, state: &mut State, action: Action) {
        match action {
            Action::LoseMessage(request) => lose_message(&mut state.requests[usize::from(request)]),
            Action::Janitor(request) => self.end_abandoned(state, request),
            Action::Claim(number, _)
            | Action::Publish(number)
            | Action::PublishUnknown(number, _)
            | Action::Release(number)
            | Action::Mark(number)
            | Action::RelayGone(number) => self.step_relay(state, action, number),
            Action::Tick => self.tick(state),
            Action::Deliver(number, request) => {
                state.requests[usize::from(request)].ready -= 1;
                let phase = Phase::Asking { request, trust: self.clock.trust };
                state.workers[number] = Worker { phase, in_hand: true, ..state.workers[number] };
            }
            Action::Cut(number) => requeue(state, number),
            Action::Crash(number) => {
                requeue(state, number);
                state.workers[number] = Worker::IDLE;
            }
            Action::Pause(number) => state.workers[number].paused = true,
            Action::Resume(number) => state.workers[number].paused = false,
            Action::Settle(number) => self.settle(state, number),
            Action::ParkUnknown(number) => self.park(state, number),
            Action::ParkGivenUp(number) | Action::HandBackUnheard(number) => give_up(state, number),
            Action::Admit(number) => self.step_admission(state, number),
            Action::Begin(number) => self.begin(state, number),
            Action::AdmitUnheard(number) => self.ask_again(state, number),
            Action::StoreAway(number) => self.give_up_for_now(state, number),
            Action::HandBackOrphan(number) => {
                if let Some(lease) = state.workers[number].orphan.take() {
                    self.hand_back(state, lease);
                }
            }
            _ => self.step_working(state, action),
        }
    }

    fn step_admission(&self, state: &mut State, number: usize) {
        let Phase::Asking { request, trust } = state.workers[number].phase else { return };
        let admission = self.admit(state, request);
        let worker = &mut state.workers[number];
        match admission {
            Admission::Granted(lease) => worker.phase = Phase::Granted { lease, trust },
            Admission::Over => worker.settle(request, Settle::Ack),
            Admission::Busy if self.keeps(Guard::ParkBeforeAck) => worker.settle(request, Settle::Park),
            Admission::Busy => worker.settle(request, Settle::Ack),
        }
    }

    fn begin(&self, state: &mut State, number: usize) {
        let Phase::Granted { lease, trust } = state.workers[number].phase else { return };
        let trust = self.trust(trust);
        state.workers[number].phase = Phase::Working { lease, trust };
    }

    /// What an answer to a question with `left` to trust by now is worth.
    fn trust(&self, left: u8) -> u8 {
        if self.keeps(Guard::TrustFromAsking) { left } else { self.clock.trust }
    }

    fn step_working(&self, state: &mut State, action: Action) {
        let (Action::Write(number)
        | Action::Finish(number)
        | Action::FinishUnheard(number)
        | Action::AskRenewal(number)
        | Action::Renew(number)
        | Action::HearRenewal(number)
        | Action::StopItself(number)
        | Action::AckEarly(number)
        | Action::HandBack(number)) = action
        else {
            return;
        };
        let Phase::Working { lease, .. } = state.workers[number].phase else { return };
        match action {
            Action::Write(_) => {
                if !self.write_items(state, lease) {
                    give_up(state, number);
                }
            }
            Action::Finish(_) => self.finish(state, number, lease),
            Action::FinishUnheard(_) => {
                self.finish_run(state, lease);
                self.give_up_for_now(state, number);
            }
            Action::AskRenewal(_) => state.workers[number].renewal = Renewal::Asked(self.clock.trust),
            Action::Renew(_) => self.answer_renewal(state, number, lease),
            Action::HearRenewal(_) => self.hear_renewal(&mut state.workers[number], lease),
            Action::StopItself(_) => give_up(state, number),
            Action::AckEarly(_) => state.workers[number].in_hand = false,
            _ => {
                self.hand_back(state, lease);
                give_up(state, number);
            }
        }
    }

    fn finish(&self, state: &mut State, number: usize, lease: Lease) {
        let how = match self.finish_run(state, lease) {
            true if self.keeps(Guard::EventInTransaction) => Settle::Ack,
            true => Settle::Announce,
            false => Settle::Nack,
        };
        state.workers[number].settle(lease.request, how);
    }

    fn answer_renewal(&self, state: &mut State, number: usize, lease: Lease) {
        let Renewal::Asked(trust) = state.workers[number].renewal else { return };
        if self.renew(state, lease) {
            state.workers[number].renewal = Renewal::Kept(trust);
        } else {
            give_up(state, number);
        }
    }

    fn hear_renewal(&self, worker: &mut Worker, lease: Lease) {
        let Renewal::Kept(left) = worker.renewal else { return };
        worker.phase = Phase::Working { lease, trust: self.trust(left) };
        worker.renewal = Renewal::None;
    }

    /// An ack or a nack on a lost connection reaches nobody: the broker has given the message to others before.
    fn settle(&self, state: &mut State, number: usize) {
        let Phase::Settling { request, how } = state.workers[number].phase else { return };
        match how {
            Settle::Ack => state.workers[number].rest(),
            Settle::Nack => {
                requeue(state, number);
                state.workers[number].rest();
            }
            Settle::Park => {
                self.park(state, number);
                state.workers[number].settle(request, Settle::Ack);
            }
            Settle::Announce => {
                self.announce(state, request);
                state.workers[number].settle(request, Settle::Ack);
            }
        }
    }

    fn give_up_for_now(&self, state: &mut State, number: usize) {
        if let Phase::Working { lease, .. } = state.workers[number].phase {
            state.workers[number].orphan = Some(lease);
        }
        self.ask_again(state, number);
    }

    /// With its delivery still in hand a worker asks for admission once more; else others have the message.
    fn ask_again(&self, state: &mut State, number: usize) {
        let worker = state.workers[number];
        match worker.phase.request() {
            Some(request) if worker.in_hand && !matches!(worker.phase, Phase::Asking { .. }) => {
                let phase = Phase::Asking { request: request as u8, trust: self.clock.trust };
                state.workers[number] = Worker { phase, renewal: Renewal::None, ..worker };
            }
            _ => give_up(state, number),
        }
    }

    fn park(&self, state: &mut State, number: usize) {
        if let Some(request) = state.workers[number].phase.request() {
            state.requests[request].parked[self.clock.rung - 1] += 1;
        }
    }

    fn step_relay(&self, state: &mut State, action: Action, number: usize) {
        if let Action::Claim(_, request) = action {
            self.claim(state, request);
            state.relays[number] = Relay::Claimed(request);
            return;
        }
        let (Relay::Claimed(request) | Relay::Confirmed(request)) = state.relays[number] else { return };
        let outbox = &mut state.requests[usize::from(request)].outbox;
        match action {
            Action::Publish(_) => {
                outbox.stored = true;
                state.relays[number] = Relay::Confirmed(request);
            }
            Action::PublishUnknown(_, stored) => {
                outbox.stored |= stored;
                state.relays[number] = Relay::Idle;
            }
            Action::Release(_) => {
                self.release(state, request);
                state.relays[number] = Relay::Idle;
            }
            Action::Mark(_) => {
                self.mark_sent(state, request);
                state.relays[number] = Relay::Idle;
            }
            _ => state.relays[number] = Relay::Idle,
        }
    }

    fn tick(&self, state: &mut State) {
        for request in &mut state.requests {
            request.ready += request.parked[0];
            request.parked = [request.parked[1], 0];
            if let Some(run) = request.run.as_mut().filter(|run| run.running()) {
                *run = Run { lease: (run.lease - 1).max(-self.clock.abandoned), ..*run };
            }
            if self.keeps(Guard::ClaimExpiry) {
                request.outbox = Outbox { claimed: request.outbox.claimed.saturating_sub(1), ..request.outbox };
            }
        }
        let stands = |worker: &Worker| worker.paused && !self.keeps(Guard::ClockRunsOn);
        for worker in state.workers.iter_mut().filter(|worker| !stands(worker)) {
            self.age(worker);
        }
    }

    fn age(&self, worker: &mut Worker) {
        match &mut worker.phase {
            Phase::Working { .. } if !self.keeps(Guard::OwnDeadline) => {}
            Phase::Asking { trust, .. } | Phase::Granted { trust, .. } | Phase::Working { trust, .. } => {
                *trust = trust.saturating_sub(1);
            }
            Phase::Idle | Phase::Settling { .. } => {}
        }
        if let Renewal::Asked(left) | Renewal::Kept(left) = &mut worker.renewal {
            *left = left.saturating_sub(1);
        }
    }
}

/// Leaves the run to whoever has it, and the message to whoever gets it next.
fn give_up(state: &mut State, number: usize) {
    if let Some(request) = state.workers[number].phase.request() {
        state.workers[number].settle(request as u8, Settle::Nack);
    }
}

/// The broker takes a delivery back and has it ready for the next one.
fn requeue(state: &mut State, number: usize) {
    let worker = &mut state.workers[number];
    if std::mem::take(&mut worker.in_hand)
        && let Some(request) = worker.phase.request()
    {
        state.requests[request].ready += 1;
    }
}

fn lose_message(request: &mut Request) {
    request.lost = true;
    if request.ready > 0 {
        request.ready -= 1;
    } else if let Some(copies) = request.parked.iter_mut().find(|copies| **copies > 0) {
        *copies -= 1;
    }
}
