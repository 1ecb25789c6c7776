//! State of the model. Times are stored relative to now, which keeps the number of states finite.

use crate::design::{Design, MAX_ATTEMPTS};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct State {
    /// Sorted: requests of one tenant are interchangeable (symmetry reduction).
    pub requests: [Request; 2],
    /// Sorted, as `requests`.
    pub workers: [Worker; 3],
    pub relays: [Relay; 2],
    /// Number of faults that may still occur.
    pub faults_left: u8,
    /// Bit set of recorded [`Violation`]s.
    pub broken: u16,
}

/// Violation that is visible only during a step, as a bit of [`State::broken`].
#[derive(Clone, Copy, Debug)]
pub enum Violation {
    StaleItems = 1,
    StaleEnd = 2,
    StaleRenewal = 4,
    StaleRelease = 8,
    TerminalChanged = 16,
    Revived = 32,
    RestartableRunEnded = 64,
    EventChanged = 128,
}

/// One request: its messages, its run and its event.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Request {
    /// Copies of the message in the requests queue.
    pub ready: u8,
    /// Copies in a retry tier, indexed by the remaining ticks minus one.
    pub retrying: [u8; 2],
    /// True after a fault destroyed a copy.
    pub lost: bool,
    /// Row in `inventory_sync_runs`.
    pub run: Option<Run>,
    /// Event of the run in the outbox.
    pub outbox: Outbox,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Run {
    pub status: Status,
    pub attempt: u8,
    pub interruptions: u8,
    /// True once the lease was released.
    pub released: bool,
    /// Ticks until `lease_expires_at`; zero or less means expired.
    pub lease: i8,
    /// Batches in flight; each holds a lock on the row until it commits.
    pub batches: u8,
    /// Generation of the batches in flight; zero without any.
    pub batches_of: u8,
    /// True while a dead session holds the row.
    pub locked: bool,
    /// Number of leases granted so far. Identifies the only legitimate writer, even in a mutant that grants one attempt
    /// twice.
    pub generation: u8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Status {
    Running,
    /// Ended by its worker: success, partial or failed.
    Finished,
    /// Ended by an admission that found no attempts left.
    AttemptsExhausted,
    /// Ended by the admission of another request of the selection.
    Superseded,
    /// Ended by the janitor; only a mutant does this.
    Abandoned,
    Skipped,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Outbox {
    /// Number of rows inserted; the design allows one.
    pub rows: u8,
    /// Ticks until the event is due.
    pub due_in: u8,
    /// True while the process that ended the run has yet to publish the event from memory.
    pub in_memory: bool,
    /// True once the row is deleted because the event was confirmed.
    pub deleted: bool,
    /// Content of the event that the broker has stored.
    pub stored: Option<Status>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Worker {
    pub phase: Phase,
    pub renewal: Renewal,
    /// True while the broker counts the delivery as unacked by this worker.
    pub in_flight: bool,
    /// Suspended by SIGSTOP or a long stall; statements sent before may still execute.
    pub paused: bool,
    /// Lease abandoned because the database was unavailable, to be released later.
    pub orphan: Option<Lease>,
}

/// Phase of a worker's delivery (`src/run/mod.rs`). `deadline` counts the ticks until its local deadline.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Phase {
    Idle,
    /// The admission was sent to the database.
    AwaitingAdmission {
        request: u8,
        deadline: u8,
    },
    /// The database has granted the lease; the response is on the way.
    Admitted {
        lease: Lease,
        deadline: u8,
    },
    Running {
        lease: Lease,
        deadline: u8,
    },
    /// Everything durable is committed; the message must be settled.
    Settling {
        request: u8,
        how: Settle,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Lease {
    pub request: u8,
    pub attempt: u8,
    pub generation: u8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Settle {
    Ack,
    Nack,
    /// Publish a copy to a retry tier, then ack.
    ScheduleRetry,
    /// Enqueue the event in a separate transaction, then ack; only a mutant does this.
    EnqueueEvent,
}

/// Renewal in progress, with the local deadline that it sets when granted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Renewal {
    None,
    Sent(u8),
    Granted(u8),
}

/// State of a relay, with the request whose event it is publishing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Relay {
    Idle,
    Claimed(u8),
    Confirmed(u8),
}

impl State {
    pub fn record_violation(&mut self, violation: Violation) {
        self.broken |= violation as u16;
    }

    pub fn violated(&self, violation: Violation) -> bool {
        self.broken & violation as u16 != 0
    }

    pub fn run(&self, request: u8) -> Option<&Run> {
        self.requests[usize::from(request)].run.as_ref()
    }

    pub fn run_mut(&mut self, request: u8) -> Option<&mut Run> {
        self.requests[usize::from(request)].run.as_mut()
    }

    /// Canonical representative under permutation of requests, workers and relays (symmetry reduction). Slots beyond the
    /// design's size stay in place.
    pub fn canonical(mut self, design: &Design) -> Self {
        self.forget_orphans_of_ended_runs();
        if design.requests == 2 && self.requests[0] > self.requests[1] {
            self.requests.swap(0, 1);
            for worker in &mut self.workers {
                worker.phase.swap_requests();
                if let Some(lease) = &mut worker.orphan {
                    lease.request = 1 - lease.request;
                }
            }
            for relay in &mut self.relays {
                relay.swap_requests();
            }
        }
        self.workers[..design.workers].sort_unstable();
        self.relays[..design.relays].sort_unstable();
        self
    }

    /// Drops orphaned leases of ended runs: releasing them has no effect.
    fn forget_orphans_of_ended_runs(&mut self) {
        let requests = self.requests;
        let running = |lease: &Lease| requests[usize::from(lease.request)].run.is_some_and(|run| run.running());
        for worker in &mut self.workers {
            worker.orphan = worker.orphan.filter(running);
        }
    }

    /// Number of attempts that lost their worker, over all runs.
    pub fn lost_attempts(&self) -> u8 {
        self.requests.iter().filter_map(|request| request.run).map(|run| run.attempt - run.interruptions - 1).sum()
    }

    /// Number of copies of a request's message, in queues and unacked.
    pub fn copies(&self, request: usize) -> usize {
        let waiting = &self.requests[request];
        let in_flight = |worker: &&Worker| worker.in_flight && worker.phase.request() == Some(request);
        usize::from(waiting.ready)
            + waiting.retrying.iter().map(|copies| usize::from(*copies)).sum::<usize>()
            + self.workers.iter().filter(in_flight).count()
    }
}

impl Run {
    pub fn running(&self) -> bool {
        self.status == Status::Running
    }

    pub fn alive(&self) -> bool {
        self.running() && self.lease > 0
    }

    pub fn attempts_left(&self) -> bool {
        self.attempt - self.interruptions < MAX_ATTEMPTS
    }

    /// True while another session holds the row in a mode that a take-over conflicts with.
    pub fn in_use(&self) -> bool {
        self.locked || self.batches > 0
    }

    /// True if `lease` is the only lease that may write to this run.
    pub fn belongs_to(&self, lease: Lease) -> bool {
        self.running() && self.generation == lease.generation
    }
}

impl Worker {
    pub const IDLE: Self =
        Self { phase: Phase::Idle, renewal: Renewal::None, in_flight: false, paused: false, orphan: None };

    pub fn is_idle(&self) -> bool {
        self.phase == Phase::Idle
    }

    /// Makes the worker ready for the next message; an orphaned lease is kept.
    pub fn become_idle(&mut self) {
        *self = Self { orphan: self.orphan, ..Self::IDLE };
    }

    /// Moves on to settling the message and drops the lease.
    pub fn settle(&mut self, request: u8, how: Settle) {
        self.phase = Phase::Settling { request, how };
        self.renewal = Renewal::None;
    }
}

impl Relay {
    fn swap_requests(&mut self) {
        if let Self::Claimed(request) | Self::Confirmed(request) = self {
            *request = 1 - *request;
        }
    }
}

impl Phase {
    fn swap_requests(&mut self) {
        match self {
            Self::Idle => {}
            Self::AwaitingAdmission { request, .. } | Self::Settling { request, .. } => *request = 1 - *request,
            Self::Admitted { lease, .. } | Self::Running { lease, .. } => lease.request = 1 - lease.request,
        }
    }

    pub fn request(self) -> Option<usize> {
        match self {
            Self::Idle => None,
            Self::AwaitingAdmission { request, .. } | Self::Settling { request, .. } => Some(usize::from(request)),
            Self::Admitted { lease, .. } | Self::Running { lease, .. } => Some(usize::from(lease.request)),
        }
    }
}
