//! Database transactions: each function models one transaction or statement of `src/store/` with its guards.

use crate::design::{Design, ExtraProperty, Guard, MAX_ATTEMPTS};
use crate::state::{Lease, Run, State, Status, Violation};

/// Result of an admission.
#[derive(Clone, Copy, Debug)]
pub enum Admission {
    Granted(Lease),
    /// The request needs no work: skipped, failed or a duplicate.
    Over,
    Busy,
}

impl Design {
    /// Admits a request (`src/store/admission.rs`).
    pub fn admit(&self, state: &mut State, request: u8) -> Admission {
        match state.run(request).copied() {
            Some(run) => self.admit_again(state, request, run),
            None => self.admit_first(state, request),
        }
    }

    /// Admits a request whose run exists.
    fn admit_again(&self, state: &mut State, request: u8, run: Run) -> Admission {
        if !run.running() {
            if self.keeps(Guard::IdempotencyKey) {
                return Admission::Over;
            }
            state.record_violation(Violation::TerminalChanged);
        }
        if run.alive() {
            return Admission::Busy;
        }
        let attempts_left = run.attempt - run.interruptions < MAX_ATTEMPTS || !self.keeps(Guard::AttemptLimit);
        if !attempts_left && !run.released {
            self.fail_lost_run(state, request, Status::AttemptsExhausted);
            return Admission::Over;
        }
        Admission::Granted(self.take_over(state, request, run))
    }

    /// Takes over a run whose lease has expired, under the next attempt.
    fn take_over(&self, state: &mut State, request: u8, run: Run) -> Lease {
        let attempt = if self.keeps(Guard::AttemptIncrement) { run.attempt + 1 } else { run.attempt };
        let generation = run.generation + 1;
        let interruptions = run.interruptions + u8::from(run.released);
        let taken = Run {
            status: Status::Running,
            attempt,
            interruptions,
            released: false,
            lease: self.clock.lease,
            generation,
        };
        state.requests[usize::from(request)].run = Some(taken);
        Lease { request, attempt, generation }
    }

    /// Inserts a run, running or skipped.
    fn admit_first(&self, state: &mut State, request: u8) -> Admission {
        if self.over_limit(state, request) {
            self.insert(state, request, Status::Skipped, 0);
            self.enqueue_event(state, request);
            return Admission::Over;
        }
        self.insert(state, request, Status::Running, self.clock.lease);
        Admission::Granted(Lease { request, attempt: 1, generation: 1 })
    }

    fn over_limit(&self, state: &mut State, request: u8) -> bool {
        let locks = self.same_selection && self.keeps(Guard::SelectionLock);
        for other in (0..self.requests as u8).filter(|other| locks && *other != request) {
            let Some(run) = state.run(other).copied().filter(Run::running) else { continue };
            if run.alive() || run.released {
                return true;
            }
            self.fail_lost_run(state, other, Status::Superseded);
        }
        let count = state.requests.iter().filter_map(|other| other.run).filter(Run::running).count();
        count >= usize::from(self.tenant_limit)
    }

    fn insert(&self, state: &mut State, request: u8, status: Status, lease: i8) {
        let run = Run { status, attempt: 1, interruptions: 0, released: false, lease, generation: 1 };
        state.requests[usize::from(request)].run = Some(run);
    }

    /// Renews a lease (`src/store/leases.rs`).
    pub fn renew(&self, state: &mut State, lease: Lease) -> bool {
        let Some(run) = state.run(lease.request).copied() else { return false };
        let fenced = run.attempt == lease.attempt && !run.released || !self.keeps(Guard::RenewalFence);
        let in_time = run.lease > 0 || !self.keeps(Guard::RenewalExpiryCheck);
        if !run.running() || !fenced || !in_time {
            return false;
        }
        if !run.belongs_to(lease) {
            state.record_violation(Violation::StaleRenewal);
        }
        if run.lease <= 0 {
            state.record_violation(Violation::Revived);
        }
        state.requests[usize::from(lease.request)].run = Some(Run { lease: self.clock.lease, ..run });
        true
    }

    /// Upserts items under the fence (`src/store/items.rs`); recording a finished type has the same fence.
    pub fn write_items(&self, state: &mut State, lease: Lease) -> bool {
        let Some(run) = state.run(lease.request).copied() else { return false };
        let accepted = run.running() && run.attempt == lease.attempt || !self.keeps(Guard::ItemFence);
        if accepted && !run.belongs_to(lease) {
            state.record_violation(Violation::StaleItems);
        }
        accepted
    }

    /// Ends a run and enqueues its event in one transaction (`src/store/runs.rs`).
    pub fn finish_run(&self, state: &mut State, lease: Lease) -> bool {
        let Some(run) = state.run(lease.request).copied() else { return false };
        let status_fits = run.running() || !self.keeps(Guard::FinishStatusCheck);
        let fenced = run.attempt == lease.attempt || !self.keeps(Guard::FinishFence);
        if !status_fits || !fenced {
            return false;
        }
        if !run.belongs_to(lease) {
            state.record_violation(Violation::StaleEnd);
        }
        self.end(state, lease.request, Status::Finished);
        if self.keeps(Guard::EventInTransaction) {
            self.enqueue_event(state, lease.request);
        }
        true
    }

    /// Ends a run as `worker_lost`.
    fn fail_lost_run(&self, state: &mut State, request: u8, status: Status) {
        let released = state.run(request).is_some_and(|run| run.released);
        match (status, self.extra) {
            (Status::Superseded, Some(ExtraProperty::ReleasedRunContinues)) if released => {
                state.record_violation(Violation::ReleasedRunSuperseded);
            }
            (Status::Abandoned, Some(ExtraProperty::QueuedRunContinues))
                if state.requests[usize::from(request)].ready > 0 =>
            {
                state.record_violation(Violation::QueuedRunEnded);
            }
            _ => {}
        }
        self.end(state, request, status);
        self.enqueue_event(state, request);
    }

    /// Sets the terminal status.
    fn end(&self, state: &mut State, request: u8, status: Status) {
        let Some(run) = state.run_mut(request) else { return };
        let had_ended = !run.running();
        // Nothing reads the lease of a terminal run; resetting it merges equivalent states.
        *run = Run { status, lease: 0, released: false, ..*run };
        if had_ended {
            state.record_violation(Violation::TerminalChanged);
        }
    }

    /// Enqueues the run-completed event.
    pub fn enqueue_event(&self, state: &mut State, request: u8) {
        let outbox = &mut state.requests[usize::from(request)].outbox;
        outbox.rows = (outbox.rows + 1).min(2);
    }

    /// Releases a lease (`src/store/leases.rs`).
    pub fn release_lease(&self, state: &mut State, lease: Lease) {
        let Some(run) = state.run(lease.request).copied() else { return };
        let fenced = run.attempt == lease.attempt || !self.keeps(Guard::ReleaseFence);
        if !run.running() || !fenced {
            return;
        }
        if !run.belongs_to(lease) {
            state.record_violation(Violation::StaleRelease);
        }
        state.requests[usize::from(lease.request)].run = Some(Run { released: true, lease: 0, ..run });
    }

    /// True for a run that the janitor would end.
    pub fn is_abandoned(&self, state: &State, request: u8) -> bool {
        let patience = if self.keeps(Guard::JanitorGracePeriod) { -self.clock.abandoned } else { self.clock.lease };
        self.keeps(Guard::Janitor) && state.run(request).is_some_and(|run| run.running() && run.lease <= patience)
    }

    /// Ends an abandoned run (`src/store/runs.rs`).
    pub fn end_abandoned(&self, state: &mut State, request: u8) {
        self.fail_lost_run(state, request, Status::Abandoned);
    }

    /// True for an event that a relay may claim.
    pub fn is_due(&self, state: &State, request: u8) -> bool {
        let outbox = &state.requests[usize::from(request)].outbox;
        outbox.rows > 0 && !outbox.sent && outbox.claimed == 0
    }

    /// Claims an event (`src/store/outbox.rs`).
    pub fn claim(&self, state: &mut State, request: u8) {
        state.requests[usize::from(request)].outbox.claimed = self.clock.claim;
    }

    /// Defers an event that could not be published.
    pub fn release(&self, state: &mut State, request: u8) {
        self.claim(state, request);
    }

    /// Marks an event as sent.
    pub fn mark_sent(&self, state: &mut State, request: u8) {
        let outbox = &mut state.requests[usize::from(request)].outbox;
        outbox.sent = true;
        outbox.claimed = 0;
    }
}
