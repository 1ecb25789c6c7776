//! Effects of the actions on the state.

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
        self.enabled(state, actions);
    }

    fn next_state(&self, state: &State, action: Action) -> Option<State> {
        let mut next = *state;
        self.step(&mut next, action);
        if self.is_fault(state, action) {
            next.faults_left -= 1;
        }
        let next = next.canonical(self);
        (next != *state).then_some(next)
    }

    fn within_boundary(&self, state: &State) -> bool {
        // Bounds the attempts of mutants, which may be unlimited; a correct design stays below.
        let most = MAX_ATTEMPTS + self.faults + 1;
        state.requests.iter().filter_map(|request| request.run).all(|run| run.generation <= most)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        properties::of(self)
    }
}

impl Design {
    fn step(&self, state: &mut State, action: Action) {
        match action {
            Action::LoseMessage(request) => lose_message(&mut state.requests[usize::from(request)]),
            Action::EndAbandoned(request) => self.end_abandoned(state, request),
            Action::Republish(request) => self.republish(state, request),
            Action::CommitBatch(request) => self.commit_batch(state, request),
            Action::ForgetEvent(request) => state.requests[usize::from(request)].outbox.in_memory = false,
            Action::EndLingeringLock(request) => {
                if let Some(run) = state.run_mut(request) {
                    run.locked = false;
                }
            }
            Action::Claim(number, _)
            | Action::Publish(number)
            | Action::PublishUnconfirmed(number, _)
            | Action::PublishRefused(number)
            | Action::DeleteEvent(number)
            | Action::RelayCrash(number) => self.step_relay(state, action, number),
            Action::Tick => self.tick(state),
            Action::Deliver(number, request) => {
                state.requests[usize::from(request)].ready -= 1;
                let phase = Phase::AwaitingAdmission { request, deadline: self.clock.deadline };
                state.workers[number] = Worker { phase, in_flight: true, ..state.workers[number] };
            }
            Action::ConnectionLost(number) => requeue(state, number),
            Action::Crash(number) => {
                requeue(state, number);
                state.workers[number] = Worker::IDLE;
            }
            Action::Pause(number) => state.workers[number].paused = true,
            Action::Resume(number) => state.workers[number].paused = false,
            Action::Settle(number) => self.settle(state, number),
            Action::RetryCopyUnconfirmed(number) => self.schedule_retry(state, number),
            Action::RetryCopyGivenUp(number) | Action::ReleaseFails(number) => requeue_message(state, number),
            Action::Admit(number) => self.step_admission(state, number),
            Action::StartRun(number) => self.start_run(state, number),
            Action::AdmitResponseLost(number) => self.retry_admission(state, number),
            Action::DatabaseUnavailable(number) => self.abandon_lease(state, number),
            Action::ReleaseOrphan(number) => {
                if let Some(lease) = state.workers[number].orphan.take() {
                    self.release_lease(state, lease);
                }
            }
            _ => self.step_working(state, action),
        }
    }

    fn step_admission(&self, state: &mut State, number: usize) {
        let Phase::AwaitingAdmission { request, deadline } = state.workers[number].phase else { return };
        let admission = self.admit(state, request);
        let worker = &mut state.workers[number];
        match admission {
            Admission::Granted(lease) => worker.phase = Phase::Admitted { lease, deadline },
            Admission::Over => worker.settle(request, Settle::Ack),
            Admission::Busy if self.keeps(Guard::RetryCopyBeforeAck) => worker.settle(request, Settle::ScheduleRetry),
            Admission::Busy => worker.settle(request, Settle::Ack),
        }
    }

    fn start_run(&self, state: &mut State, number: usize) {
        let Phase::Admitted { lease, deadline } = state.workers[number].phase else { return };
        let deadline = self.deadline(deadline);
        state.workers[number].phase = Phase::Running { lease, deadline };
    }

    /// Local deadline set by a response whose request was sent `left` ticks before its deadline.
    fn deadline(&self, left: u8) -> u8 {
        if self.keeps(Guard::DeadlineFromSendTime) { left } else { self.clock.deadline }
    }

    fn step_working(&self, state: &mut State, action: Action) {
        let (Action::StartBatch(number)
        | Action::LingeringLock(number)
        | Action::FinishRun(number)
        | Action::FinishResponseLost(number)
        | Action::SendRenewal(number)
        | Action::CommitRenewal(number)
        | Action::ReceiveRenewal(number)
        | Action::StopAtDeadline(number)
        | Action::AckEarly(number)
        | Action::ReleaseLease(number)) = action
        else {
            return;
        };
        let Phase::Running { lease, .. } = state.workers[number].phase else { return };
        match action {
            Action::LingeringLock(_) => {
                if let Some(run) = state.run_mut(lease.request) {
                    run.locked = run.running();
                }
                self.abandon_lease(state, number);
            }
            Action::StartBatch(_) => {
                if !self.start_batch(state, lease) {
                    requeue_message(state, number);
                }
            }
            Action::FinishRun(_) => self.finish(state, number, lease),
            Action::FinishResponseLost(_) => {
                self.finish_run(state, lease);
                self.abandon_lease(state, number);
            }
            Action::SendRenewal(_) => state.workers[number].renewal = Renewal::Sent(self.clock.deadline),
            Action::CommitRenewal(_) => self.commit_renewal(state, number, lease),
            Action::ReceiveRenewal(_) => self.receive_renewal(&mut state.workers[number], lease),
            Action::StopAtDeadline(_) => requeue_message(state, number),
            Action::AckEarly(_) => state.workers[number].in_flight = false,
            _ => {
                self.release_lease(state, lease);
                requeue_message(state, number);
            }
        }
    }

    fn finish(&self, state: &mut State, number: usize, lease: Lease) {
        let how = match self.finish_run(state, lease) {
            true if self.keeps(Guard::EventInTransaction) => Settle::Ack,
            true => Settle::EnqueueEvent,
            false => Settle::Nack,
        };
        state.workers[number].settle(lease.request, how);
    }

    fn commit_renewal(&self, state: &mut State, number: usize, lease: Lease) {
        let Renewal::Sent(deadline) = state.workers[number].renewal else { return };
        // A refused renewal is tried again until the local deadline: the row may have been locked for a moment.
        let renewed = self.renew(state, lease);
        state.workers[number].renewal = if renewed { Renewal::Granted(deadline) } else { Renewal::None };
    }

    fn receive_renewal(&self, worker: &mut Worker, lease: Lease) {
        let Renewal::Granted(left) = worker.renewal else { return };
        worker.phase = Phase::Running { lease, deadline: self.deadline(left) };
        worker.renewal = Renewal::None;
    }

    /// Settles the delivery. On a lost connection this has no effect: the broker has requeued the message.
    fn settle(&self, state: &mut State, number: usize) {
        let Phase::Settling { request, how } = state.workers[number].phase else { return };
        match how {
            Settle::Ack => state.workers[number].become_idle(),
            Settle::Nack => {
                requeue(state, number);
                state.workers[number].become_idle();
            }
            Settle::ScheduleRetry => {
                self.schedule_retry(state, number);
                state.workers[number].settle(request, Settle::Ack);
            }
            Settle::EnqueueEvent => {
                self.enqueue_event(state, request);
                state.workers[number].settle(request, Settle::Ack);
            }
        }
    }

    fn abandon_lease(&self, state: &mut State, number: usize) {
        if let Phase::Running { lease, .. } = state.workers[number].phase {
            state.workers[number].orphan = Some(lease);
        }
        self.retry_admission(state, number);
    }

    /// Requests admission again for a delivery that is still unacked; otherwise the broker has requeued it.
    fn retry_admission(&self, state: &mut State, number: usize) {
        let worker = state.workers[number];
        match worker.phase.request() {
            Some(request) if worker.in_flight && !matches!(worker.phase, Phase::AwaitingAdmission { .. }) => {
                let phase = Phase::AwaitingAdmission { request: request as u8, deadline: self.clock.deadline };
                state.workers[number] = Worker { phase, renewal: Renewal::None, ..worker };
            }
            _ => requeue_message(state, number),
        }
    }

    fn schedule_retry(&self, state: &mut State, number: usize) {
        if let Some(request) = state.workers[number].phase.request() {
            state.requests[request].retrying[self.clock.retry_delay - 1] += 1;
        }
    }

    fn step_relay(&self, state: &mut State, action: Action, number: usize) {
        if let Action::Claim(_, request) = action {
            self.claim(state, request);
            state.relays[number] = Relay::Claimed(request);
            return;
        }
        let (Relay::Claimed(request) | Relay::Confirmed(request)) = state.relays[number] else { return };
        match action {
            Action::Publish(_) => {
                self.store_event(state, request);
                state.relays[number] = Relay::Confirmed(request);
            }
            Action::PublishUnconfirmed(_, stored) => {
                if stored {
                    self.store_event(state, request);
                }
                state.relays[number] = Relay::Idle;
            }
            Action::PublishRefused(_) => {
                self.release(state, request);
                state.relays[number] = Relay::Idle;
            }
            Action::DeleteEvent(_) => {
                self.delete_event(state, request);
                state.relays[number] = Relay::Idle;
            }
            _ => state.relays[number] = Relay::Idle,
        }
    }

    fn tick(&self, state: &mut State) {
        for request in &mut state.requests {
            request.ready += request.retrying[0];
            request.retrying = [request.retrying[1], 0];
            if let Some(run) = request.run.as_mut().filter(|run| run.running()) {
                *run = Run { lease: (run.lease - 1).max(-self.clock.republish), ..*run };
            }
            if self.keeps(Guard::DueAgain) {
                request.outbox = Outbox { due_in: request.outbox.due_in.saturating_sub(1), ..request.outbox };
            }
        }
        let stands = |worker: &Worker| worker.paused && !self.keeps(Guard::ClockCountsSuspend);
        for worker in state.workers.iter_mut().filter(|worker| !stands(worker)) {
            self.advance_clock(worker);
        }
    }

    fn advance_clock(&self, worker: &mut Worker) {
        match &mut worker.phase {
            Phase::Running { .. } if !self.keeps(Guard::LocalDeadline) => {}
            Phase::AwaitingAdmission { deadline, .. }
            | Phase::Admitted { deadline, .. }
            | Phase::Running { deadline, .. } => {
                *deadline = deadline.saturating_sub(1);
            }
            Phase::Idle | Phase::Settling { .. } => {}
        }
        if let Renewal::Sent(left) | Renewal::Granted(left) = &mut worker.renewal {
            *left = left.saturating_sub(1);
        }
    }
}

/// Stops working on the run and requeues the message.
fn requeue_message(state: &mut State, number: usize) {
    if let Some(request) = state.workers[number].phase.request() {
        state.workers[number].settle(request as u8, Settle::Nack);
    }
}

/// Makes an unacked delivery ready again.
fn requeue(state: &mut State, number: usize) {
    let worker = &mut state.workers[number];
    if std::mem::take(&mut worker.in_flight)
        && let Some(request) = worker.phase.request()
    {
        state.requests[request].ready += 1;
    }
}

fn lose_message(request: &mut Request) {
    request.lost = true;
    if request.ready > 0 {
        request.ready -= 1;
    } else if let Some(copies) = request.retrying.iter_mut().find(|copies| **copies > 0) {
        *copies -= 1;
    }
}
