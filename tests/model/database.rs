//! PostgreSQL's part: each function is one transaction or statement of `src/store/`, with the guards that it holds.

use crate::design::{Design, Guard, MAX_ATTEMPTS, Promise};
use crate::state::{Breach, Lease, Run, State, Status};

/// What an admission comes to.
#[derive(Clone, Copy, Debug)]
pub enum Admission {
    Granted(Lease),
    /// A skipped, given up or repeated request.
    Over,
    Busy,
}

impl Design {
    /// `store/admission.rs`: `Case::decide`
    pub fn admit(&self, state: &mut State, request: u8) -> Admission {
        match state.run(request).copied() {
            Some(run) => self.admit_again(state, request, run),
            None => self.admit_first(state, request),
        }
    }

    /// `store/admission.rs`: `Case::decide_same_key`
    fn admit_again(&self, state: &mut State, request: u8, run: Run) -> Admission {
        if !run.running() {
            if self.keeps(Guard::Deduplication) {
                return Admission::Over;
            }
            state.breach(Breach::TerminalChanged);
        }
        if run.alive() {
            return Admission::Busy;
        }
        let attempts_left = run.attempt - run.interruptions < MAX_ATTEMPTS || !self.keeps(Guard::AttemptLimit);
        if !attempts_left && !run.handed_back {
            self.end_lost(state, request, Status::GivenUp);
            return Admission::Over;
        }
        Admission::Granted(self.take_over(state, request, run))
    }

    /// `store/admission.rs`: `take_over`
    fn take_over(&self, state: &mut State, request: u8, run: Run) -> Lease {
        let attempt = if self.keeps(Guard::NewAttempt) { run.attempt + 1 } else { run.attempt };
        let grant = run.grant + 1;
        let interruptions = run.interruptions + u8::from(run.handed_back);
        let taken =
            Run { status: Status::Running, attempt, interruptions, handed_back: false, lease: self.clock.lease, grant };
        state.requests[usize::from(request)].run = Some(taken);
        Lease { request, attempt, grant }
    }

    /// `store/admission.rs`: `Case::over_limit`, `insert_run` and `Case::skip`
    fn admit_first(&self, state: &mut State, request: u8) -> Admission {
        if self.over_limit(state, request) {
            self.insert(state, request, Status::Skipped, 0);
            self.announce(state, request);
            return Admission::Over;
        }
        self.insert(state, request, Status::Running, self.clock.lease);
        Admission::Granted(Lease { request, attempt: 1, grant: 1 })
    }

    fn over_limit(&self, state: &mut State, request: u8) -> bool {
        let locks = self.same_selection && self.keeps(Guard::SelectionLock);
        for other in (0..self.requests as u8).filter(|other| locks && *other != request) {
            let Some(run) = state.run(other).copied().filter(Run::running) else { continue };
            if run.alive() || run.handed_back {
                return true;
            }
            self.end_lost(state, other, Status::Displaced);
        }
        let count = state.requests.iter().filter_map(|other| other.run).filter(Run::running).count();
        count >= usize::from(self.tenant_limit)
    }

    fn insert(&self, state: &mut State, request: u8, status: Status, lease: i8) {
        let run = Run { status, attempt: 1, interruptions: 0, handed_back: false, lease, grant: 1 };
        state.requests[usize::from(request)].run = Some(run);
    }

    /// `store/leases.rs`: `renew_leases`
    pub fn renew(&self, state: &mut State, lease: Lease) -> bool {
        let Some(run) = state.run(lease.request).copied() else { return false };
        let fenced = run.attempt == lease.attempt && !run.handed_back || !self.keeps(Guard::RenewalFence);
        let in_time = run.lease > 0 || !self.keeps(Guard::RenewalExpiry);
        if !run.running() || !fenced || !in_time {
            return false;
        }
        if !run.belongs_to(lease) {
            state.breach(Breach::StaleRenewal);
        }
        if run.lease <= 0 {
            state.breach(Breach::Revived);
        }
        state.requests[usize::from(lease.request)].run = Some(Run { lease: self.clock.lease, ..run });
        true
    }

    /// `store/items.rs`: `upsert_items`; `store/recording.rs`: `record` has the same fence.
    pub fn write_items(&self, state: &mut State, lease: Lease) -> bool {
        let Some(run) = state.run(lease.request).copied() else { return false };
        let accepted = run.running() && run.attempt == lease.attempt || !self.keeps(Guard::ItemFence);
        if accepted && !run.belongs_to(lease) {
            state.breach(Breach::StaleItems);
        }
        accepted
    }

    /// `store/runs.rs`: `finish_run`, whose fence is `recording::record`; what was left to write of the last list is
    /// written in the same transaction, under the same fence as any other
    pub fn finish_run(&self, state: &mut State, lease: Lease) -> bool {
        let Some(run) = state.run(lease.request).copied() else { return false };
        let status_fits = run.running() || !self.keeps(Guard::EndStatus);
        let fenced = run.attempt == lease.attempt || !self.keeps(Guard::EndFence);
        if !status_fits || !fenced {
            return false;
        }
        if !run.belongs_to(lease) {
            state.breach(Breach::StaleEnd);
        }
        self.end(state, lease.request, Status::Done);
        if self.keeps(Guard::EventInTransaction) {
            self.announce(state, lease.request);
        }
        true
    }

    /// `store/runs.rs`: `end_lost`
    fn end_lost(&self, state: &mut State, request: u8, status: Status) {
        let handed_back = state.run(request).is_some_and(|run| run.handed_back);
        match (status, self.also) {
            (Status::Displaced, Some(Promise::HandedBackRunGoesOn)) if handed_back => {
                state.breach(Breach::HandedBackRunDisplaced);
            }
            (Status::Abandoned, Some(Promise::WaitingRunGoesOn)) if state.requests[usize::from(request)].ready > 0 => {
                state.breach(Breach::WaitingRunEnded);
            }
            _ => {}
        }
        self.end(state, request, status);
        self.announce(state, request);
    }

    /// `store/runs.rs`: `end`
    fn end(&self, state: &mut State, request: u8, status: Status) {
        let Some(run) = state.run_mut(request) else { return };
        let had_ended = !run.running();
        // What an ended run's lease was is read by nobody: forgotten, it makes no states of its own.
        *run = Run { status, lease: 0, handed_back: false, ..*run };
        if had_ended {
            state.breach(Breach::TerminalChanged);
        }
    }

    /// `store/runs.rs`: `announce`
    pub fn announce(&self, state: &mut State, request: u8) {
        let outbox = &mut state.requests[usize::from(request)].outbox;
        outbox.rows = (outbox.rows + 1).min(2);
    }

    /// `store/leases.rs`: `hand_back_lease`
    pub fn hand_back(&self, state: &mut State, lease: Lease) {
        let Some(run) = state.run(lease.request).copied() else { return };
        let fenced = run.attempt == lease.attempt || !self.keeps(Guard::HandBackFence);
        if !run.running() || !fenced {
            return;
        }
        if !run.belongs_to(lease) {
            state.breach(Breach::StaleHandBack);
        }
        state.requests[usize::from(lease.request)].run = Some(Run { handed_back: true, lease: 0, ..run });
    }

    /// `store/runs.rs`: whether `end_abandoned_runs` finds the run
    pub fn is_abandoned(&self, state: &State, request: u8) -> bool {
        let patience = if self.keeps(Guard::JanitorPatience) { -self.clock.abandoned } else { self.clock.lease };
        self.keeps(Guard::Janitor) && state.run(request).is_some_and(|run| run.running() && run.lease <= patience)
    }

    /// `store/runs.rs`: `end_if_still_abandoned`
    pub fn end_abandoned(&self, state: &mut State, request: u8) {
        self.end_lost(state, request, Status::Abandoned);
    }

    /// `store/outbox.rs`: whether `claim_events` finds the event
    pub fn is_due(&self, state: &State, request: u8) -> bool {
        let outbox = &state.requests[usize::from(request)].outbox;
        outbox.rows > 0 && !outbox.sent && outbox.claimed == 0
    }

    /// `store/outbox.rs`: `claim_events`
    pub fn claim(&self, state: &mut State, request: u8) {
        state.requests[usize::from(request)].outbox.claimed = self.clock.claim;
    }

    /// `store/outbox.rs`: `release_events`
    pub fn release(&self, state: &mut State, request: u8) {
        self.claim(state, request);
    }

    /// `store/outbox.rs`: `mark_sent`
    pub fn mark_sent(&self, state: &mut State, request: u8) {
        let outbox = &mut state.requests[usize::from(request)].outbox;
        outbox.sent = true;
        outbox.claimed = 0;
    }
}
