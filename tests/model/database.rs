//! Database transactions: each function models one transaction or statement of `src/store/` with its guards.

use crate::design::{Design, Guard};
use crate::state::{Lease, Run, State, Status, Violation, Worker};

/// Result of an admission.
#[derive(Clone, Copy, Debug)]
pub enum Admission {
    Granted(Lease),
    /// The request needs no work: skipped, failed or a duplicate.
    Over,
    /// Another worker is on the run, or its row is in use.
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
        // The lease is read without a lock; the row of an expired one is locked, or skipped if it is in use.
        if run.alive() || self.is_in_use(&run) {
            return Admission::Busy;
        }
        let attempts_left = run.attempts_left() || !self.keeps(Guard::AttemptLimit);
        if !attempts_left && !run.released {
            self.fail_lost_run(state, request, Status::AttemptsExhausted);
            return Admission::Over;
        }
        Admission::Granted(self.take_over(state, request, run))
    }

    /// True if a take-over must wait for another session (`for update` conflicts with the fence's `for key share`).
    fn is_in_use(&self, run: &Run) -> bool {
        if self.keeps(Guard::TakeOverLock) { run.in_use() } else { run.locked }
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
            ..run
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
            let restartable = run.attempts_left() && self.keeps(Guard::ContendedWhileRestartable);
            if run.alive() || run.released || restartable || self.is_in_use(&run) {
                return true;
            }
            self.fail_lost_run(state, other, Status::Superseded);
        }
        let count = state.requests.iter().filter_map(|other| other.run).filter(Run::running).count();
        count >= usize::from(self.tenant_limit)
    }

    fn insert(&self, state: &mut State, request: u8, status: Status, lease: i8) {
        let run = Run {
            status,
            attempt: 1,
            interruptions: 0,
            released: false,
            lease,
            batches: 0,
            batches_of: 0,
            locked: false,
            generation: 1,
        };
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

    /// True if the row is free for a renewal: the fence of a batch must not be in its way.
    pub fn can_renew(&self, state: &State, worker: &Worker, lease: Lease) -> bool {
        let locked = |request: u8| state.run(request).is_some_and(|run| run.locked);
        let fenced = state.run(lease.request).is_some_and(|run| run.batches > 0) && !self.keeps(Guard::KeyShareFence);
        // A release that waits for a lock keeps the connection.
        let connection_in_use = worker.orphan.is_some_and(|orphan| locked(orphan.request));
        !locked(lease.request) && !fenced && (!connection_in_use || self.keeps(Guard::SeparateReleaseConnection))
    }

    /// True if another batch may start: the model bounds their number, and mixes no generations.
    pub fn can_start_batch(&self, state: &State, lease: Lease) -> bool {
        // Two overlap, so that the row need never be free.
        let most = if self.prompt { 2 } else { 1 };
        state.run(lease.request).is_some_and(|run| {
            !run.locked && run.batches < most && (run.batches == 0 || run.batches_of == lease.generation)
        })
    }

    /// Starts the statement that upserts a batch of items under the fence (`src/store/items.rs`); recording a finished type
    /// has the same fence.
    pub fn start_batch(&self, state: &mut State, lease: Lease) -> bool {
        let Some(run) = state.run_mut(lease.request) else { return false };
        let accepted = run.running() && run.attempt == lease.attempt || !self.keeps(Guard::ItemFence);
        if accepted {
            run.batches += 1;
            run.batches_of = lease.generation;
        }
        accepted
    }

    /// Commits a batch that was started before.
    pub fn commit_batch(&self, state: &mut State, request: u8) {
        let Some(run) = state.run_mut(request) else { return };
        let stale = !run.running() || run.generation != run.batches_of;
        run.batches -= 1;
        if run.batches == 0 {
            run.batches_of = 0;
        }
        if stale {
            state.record_violation(Violation::StaleItems);
        }
    }

    /// Ends a run and enqueues its event in one transaction (`src/store/run_outcome.rs`).
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
        if state.run(request).is_some_and(|run| run.released || run.attempts_left()) {
            state.record_violation(Violation::RestartableRunEnded);
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

    /// Inserts the outbox row. The process that ends the run publishes the event at once; others find it only later.
    pub fn enqueue_event(&self, state: &mut State, request: u8) {
        let outbox = &mut state.requests[usize::from(request)].outbox;
        outbox.rows = (outbox.rows + 1).min(2);
        outbox.due_in = self.clock.claim;
        outbox.in_memory = self.relays > 0;
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

    /// True for a run whose request the janitor republishes. Copies beyond two behave alike and are left out, which keeps
    /// the number of states finite.
    pub fn is_lost(&self, state: &State, request: u8) -> bool {
        let threshold = if self.keeps(Guard::RepublishDelay) { -self.clock.republish } else { self.clock.lease };
        state.run(request).is_some_and(|run| run.running() && run.lease <= threshold)
            && state.copies(usize::from(request)) < 2
    }

    /// Publishes the request of a lost run again, from its row (`src/janitor.rs`).
    pub fn republish(&self, state: &mut State, request: u8) {
        state.requests[usize::from(request)].ready += 1;
        if let Some(run) = state.run_mut(request) {
            // The next copy follows after the same time.
            run.lease = if run.lease <= -self.clock.republish { 0 } else { run.lease };
        }
    }

    /// Ends a run without a restart; only a mutant does this.
    pub fn end_abandoned(&self, state: &mut State, request: u8) {
        self.fail_lost_run(state, request, Status::Abandoned);
    }

    /// True for an event that a relay may publish: from memory, or because it is due.
    pub fn is_due(&self, state: &State, request: u8) -> bool {
        let outbox = &state.requests[usize::from(request)].outbox;
        outbox.rows > 0 && !outbox.deleted && (outbox.due_in == 0 || outbox.in_memory)
    }

    /// Builds the event from the run's row and stores it in the broker.
    pub fn store_event(&self, state: &mut State, request: u8) {
        let status = state.run(request).map(|run| run.status);
        let outbox = &mut state.requests[usize::from(request)].outbox;
        let before = std::mem::replace(&mut outbox.stored, status);
        if before.is_some_and(|before| Some(before) != status) {
            state.record_violation(Violation::EventChanged);
        }
    }

    /// Claims an event: no other relay publishes it until it is due again (`src/store/outbox.rs`).
    pub fn claim(&self, state: &mut State, request: u8) {
        let outbox = &mut state.requests[usize::from(request)].outbox;
        outbox.due_in = self.clock.claim;
        outbox.in_memory = false;
    }

    /// Defers an event that could not be published.
    pub fn release(&self, state: &mut State, request: u8) {
        self.claim(state, request);
    }

    /// Deletes the outbox row of a confirmed event.
    pub fn delete_event(&self, state: &mut State, request: u8) {
        let outbox = &mut state.requests[usize::from(request)].outbox;
        outbox.deleted = true;
        outbox.due_in = 0;
        outbox.in_memory = false;
    }
}
