//! Actions of the model, the source file that implements each, and the conditions that enable them.

use crate::design::{Design, Fault, Guard};
use crate::state::{Lease, Phase, Relay, Renewal, Settle, State, Worker};

/// One step of the model. `usize` is the index of a worker or a relay, `u8` that of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Delivers a message to a worker, which requests admission (`src/consumer.rs`).
    Deliver(usize, u8),
    /// Commits the admission (`src/store/admission.rs`).
    Admit(usize),
    /// Starts the run and sets the worker's local deadline (`src/run/lease.rs`).
    StartRun(usize),
    /// Starts to upsert a batch of items (`src/store/items.rs`).
    StartBatch(usize),
    /// Commits a batch.
    CommitBatch(u8),
    /// Commits the end of the run together with the last batch of items (`src/store/run_outcome.rs`).
    FinishRun(usize),
    /// Notes the time and sends a renewal (`src/run/lease.rs`).
    SendRenewal(usize),
    /// Commits a renewal (`src/store/leases.rs`); a refused one is tried again until the local deadline.
    CommitRenewal(usize),
    /// Extends the local deadline after a renewal (`src/run/lease.rs`).
    ReceiveRenewal(usize),
    /// Stops the worker at its local deadline (`src/run/lease.rs`).
    StopAtDeadline(usize),
    /// Settles the delivery; a retry copy is published first and the delivery is acked by the next step.
    Settle(usize),
    /// Acks the message of a run in progress; only a mutant does this.
    AckEarly(usize),
    /// Releases the lease at an orderly stop; the process restarts at once (`src/run/mod.rs`).
    ReleaseLease(usize),
    /// Fails to release the lease at a stop.
    ReleaseFails(usize),
    /// Releases an orphaned lease once the database answers again (`src/run/lease.rs`).
    ReleaseOrphan(usize),
    /// Commits the end of the run and loses the response: the lease is orphaned and the same delivery is admitted again.
    FinishResponseLost(usize),
    /// Loses the response to a committed admission, which is then repeated.
    AdmitResponseLost(usize),
    /// Finds the database unavailable: the lease is orphaned and the same delivery is admitted again.
    DatabaseUnavailable(usize),
    /// Breaks the database connection of a run, whose session keeps the row locked.
    LingeringLock(usize),
    /// Ends a dead session, because the server has noticed.
    EndLingeringLock(u8),
    /// Publishes a second retry copy because the first was stored but not confirmed.
    RetryCopyUnconfirmed(usize),
    /// Gives up on the confirm of a retry copy and requeues the delivery.
    RetryCopyGivenUp(usize),
    /// Requeues a worker's delivery because its broker connection was lost or its heartbeats stopped.
    ConnectionLost(usize),
    /// Kills a process (SIGKILL).
    Crash(usize),
    /// Suspends a process (SIGSTOP, or a stalled host).
    Pause(usize),
    /// Resumes a suspended process (SIGCONT).
    Resume(usize),
    /// Loses a message copy in the broker: a purged queue, a lost disk.
    LoseMessage(u8),
    /// Republishes the request of a lost run (`src/janitor.rs`).
    Republish(u8),
    /// Ends a lost run without a restart; only a mutant does this.
    EndAbandoned(u8),
    /// Ends the process that was to publish an event from memory.
    ForgetEvent(u8),
    /// Claims an event, from memory or because it is due (`src/relay.rs`).
    Claim(usize, u8),
    /// Publishes the event and receives the confirm.
    Publish(usize),
    /// Publishes the event without a confirm, stored or not; it becomes due again.
    PublishUnconfirmed(usize, bool),
    /// Publishes an event that the broker refuses or can't route.
    PublishRefused(usize),
    /// Deletes the outbox row of a confirmed event (`src/store/outbox.rs`).
    DeleteEvent(usize),
    /// Ends a relay between claim and deletion: its process dies.
    RelayCrash(usize),
    /// Advances the clocks of the database and of every host.
    Tick,
}

impl Action {
    fn fault(self) -> Option<Fault> {
        Some(match self {
            Self::Crash(_) | Self::RelayCrash(_) | Self::ForgetEvent(_) => Fault::Crash,
            Self::Pause(_) => Fault::Pause,
            Self::ReleaseLease(_) => Fault::Shutdown,
            Self::ConnectionLost(_) => Fault::ConnectionLost,
            Self::LoseMessage(_) => Fault::LostMessage,
            Self::FinishResponseLost(_) | Self::AdmitResponseLost(_) => Fault::LostResponse,
            Self::LingeringLock(_) => Fault::LingeringLock,
            Self::DatabaseUnavailable(_) | Self::ReleaseFails(_) => Fault::DatabaseUnavailable,
            Self::RetryCopyUnconfirmed(_)
            | Self::RetryCopyGivenUp(_)
            | Self::PublishUnconfirmed(..)
            | Self::PublishRefused(_) => Fault::LostConfirm,
            _ => return None,
        })
    }
}

impl Action {
    /// True for statements and messages that take no time worth modelling on a healthy host.
    fn is_short(self) -> bool {
        matches!(
            self,
            Self::Admit(_)
                | Self::StartRun(_)
                | Self::SendRenewal(_)
                | Self::CommitRenewal(_)
                | Self::ReceiveRenewal(_)
                | Self::Settle(_)
        )
    }
}

/// Collects the enabled actions, without the faults that this design excludes.
struct EnabledActions<'a> {
    design: &'a Design,
    state: &'a State,
    actions: &'a mut Vec<Action>,
}

impl Design {
    pub fn enabled(&self, state: &State, actions: &mut Vec<Action>) {
        let mut enabled = EnabledActions { design: self, state, actions };
        for number in 0..self.workers {
            let worker = &state.workers[number];
            // Workers are sorted, so equal ones are adjacent; one of them is enough.
            if number == 0 || *worker != state.workers[number - 1] {
                enabled.add_worker_actions(number, worker);
            }
        }
        for number in 0..self.relays {
            if number == 0 || state.relays[number] != state.relays[number - 1] {
                enabled.add_relay_actions(number);
            }
        }
        for request in enabled.requests() {
            let waiting = &state.requests[usize::from(request)];
            if waiting.ready > 0 || waiting.retrying.iter().any(|copies| *copies > 0) {
                enabled.add(Action::LoseMessage(request));
            }
            enabled.add_run_actions(request);
        }
        let urgent = self.prompt && actions.iter().any(|action| action.is_short());
        if !urgent && !state.workers.iter().any(|worker| self.must_stop_now(worker)) {
            actions.push(Action::Tick);
        }
    }

    /// Distinguishes faults, which are limited in number, from steps that always remain possible.
    pub fn is_fault(&self, state: &State, action: Action) -> bool {
        // A suspended process sends no heartbeats, so the broker always closes its connection in the end.
        let given_up = matches!(action, Action::ConnectionLost(number) if state.workers[number].paused);
        action.fault().is_some() && !given_up
    }

    /// True for a running process at its local deadline: it stops before more time passes.
    fn must_stop_now(&self, worker: &Worker) -> bool {
        matches!(worker.phase, Phase::Running { deadline: 0, .. }) && !worker.paused && self.keeps(Guard::LocalDeadline)
    }
}

impl EnabledActions<'_> {
    fn requests(&self) -> std::ops::Range<u8> {
        0..self.design.requests as u8
    }

    fn add(&mut self, action: Action) {
        let suppressed = |fault| self.state.faults_left == 0 || !self.design.kinds.contains(&fault);
        if !self.design.is_fault(self.state, action) || !action.fault().is_some_and(suppressed) {
            self.actions.push(action);
        }
    }

    fn add_worker_actions(&mut self, number: usize, worker: &Worker) {
        let free = |lease: Lease| self.state.run(lease.request).is_some_and(|run| !run.locked);
        if worker.orphan.is_some_and(free) && !worker.paused {
            self.add(Action::ReleaseOrphan(number));
        }
        if worker.is_idle() {
            for request in self.requests().filter(|request| self.state.requests[usize::from(*request)].ready > 0) {
                self.add(Action::Deliver(number, request));
            }
            return;
        }
        self.add_actions_already_sent(number, worker);
        if worker.in_flight {
            self.add(Action::ConnectionLost(number));
        }
        self.add(Action::Crash(number));
        if worker.paused {
            self.add(Action::Resume(number));
        } else {
            self.add(Action::Pause(number));
            self.add_actions_of_running_process(number, worker);
        }
    }

    /// Adds statements that were sent before and that the database may still execute for a suspended worker.
    fn add_actions_already_sent(&mut self, number: usize, worker: &Worker) {
        match worker.phase {
            Phase::AwaitingAdmission { .. } => self.add(Action::Admit(number)),
            Phase::Running { lease, .. } => {
                self.add_write_actions(number, lease);
                if matches!(worker.renewal, Renewal::Sent(_)) && self.design.can_renew(self.state, worker, lease) {
                    self.add(Action::CommitRenewal(number));
                }
            }
            Phase::Idle | Phase::Admitted { .. } | Phase::Settling { .. } => {}
        }
    }

    fn add_write_actions(&mut self, number: usize, lease: Lease) {
        let Some(run) = self.state.run(lease.request) else { return };
        if self.design.can_start_batch(self.state, lease) {
            self.add(Action::StartBatch(number));
        }
        // A worker ends the run once its own batches are committed.
        let own_batches = run.batches > 0 && run.batches_of == lease.generation;
        if !run.locked && !own_batches {
            self.add(Action::FinishRun(number));
            self.add(Action::FinishResponseLost(number));
        }
    }

    fn add_run_actions(&mut self, request: u8) {
        let row = self.state.requests[usize::from(request)];
        if row.run.is_some_and(|run| run.batches > 0) {
            self.add(Action::CommitBatch(request));
        }
        if row.run.is_some_and(|run| run.locked) {
            self.add(Action::EndLingeringLock(request));
        }
        if self.design.is_lost(self.state, request) {
            if !self.design.keeps(Guard::JanitorEndsNothing) && row.run.is_some_and(|run| !run.in_use()) {
                self.add(Action::EndAbandoned(request));
            } else if self.design.keeps(Guard::Republish) {
                self.add(Action::Republish(request));
            }
        }
        if row.outbox.in_memory {
            self.add(Action::ForgetEvent(request));
        }
    }

    fn add_actions_of_running_process(&mut self, number: usize, worker: &Worker) {
        match worker.phase {
            Phase::Idle => {}
            Phase::AwaitingAdmission { .. } => self.add(Action::DatabaseUnavailable(number)),
            Phase::Admitted { .. } => {
                self.add(Action::StartRun(number));
                self.add(Action::AdmitResponseLost(number));
            }
            Phase::Running { lease, deadline } => self.add_lease_holder_actions(number, lease, deadline),
            Phase::Settling { how, .. } => {
                self.add(Action::Settle(number));
                if how == Settle::ScheduleRetry {
                    self.add(Action::RetryCopyUnconfirmed(number));
                    self.add(Action::RetryCopyGivenUp(number));
                }
            }
        }
    }

    fn add_lease_holder_actions(&mut self, number: usize, lease: Lease, deadline: u8) {
        let worker = &self.state.workers[number];
        match worker.renewal {
            // A renewal within the tick of the previous one would change nothing.
            Renewal::None if deadline < self.design.clock.deadline => self.add(Action::SendRenewal(number)),
            Renewal::None | Renewal::Sent(_) => {}
            Renewal::Granted(_) => self.add(Action::ReceiveRenewal(number)),
        }
        if self.design.must_stop_now(worker) {
            self.add(Action::StopAtDeadline(number));
        }
        if !self.design.keeps(Guard::CommitBeforeAck) && worker.in_flight {
            self.add(Action::AckEarly(number));
        }
        if self.state.run(lease.request).is_some_and(|run| !run.locked) {
            self.add(Action::ReleaseLease(number));
        }
        self.add(Action::ReleaseFails(number));
        self.add(Action::DatabaseUnavailable(number));
        self.add(Action::LingeringLock(number));
    }

    fn add_relay_actions(&mut self, number: usize) {
        match self.state.relays[number] {
            Relay::Idle => {
                for request in self.requests().filter(|request| self.design.is_due(self.state, *request)) {
                    self.add(Action::Claim(number, request));
                }
            }
            Relay::Claimed(_) => {
                self.add(Action::Publish(number));
                self.add(Action::PublishUnconfirmed(number, true));
                self.add(Action::PublishUnconfirmed(number, false));
                self.add(Action::PublishRefused(number));
                self.add(Action::RelayCrash(number));
                if !self.design.keeps(Guard::ConfirmBeforeDelete) {
                    self.add(Action::DeleteEvent(number));
                }
            }
            Relay::Confirmed(_) => {
                self.add(Action::DeleteEvent(number));
                self.add(Action::RelayCrash(number));
            }
        }
    }
}
