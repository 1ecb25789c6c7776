//! What a state of the model holds. Every moment is kept as a distance from now, so that time can go on for ever
//! within a finite number of states.

use crate::design::Design;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct State {
    /// Kept in order: as requests of one tenant they differ in nothing but what has become of them.
    pub requests: [Request; 2],
    /// Kept in order for the same reason: states that differ in who is who are one state.
    pub workers: [Worker; 3],
    pub relays: [Relay; 2],
    /// Faults that may still happen.
    pub faults_left: u8,
    /// The promises of a single step that were broken on the way here.
    pub broken: u8,
}

/// A promise that can be judged only while a step is taken, as a bit of [`State::broken`].
#[derive(Clone, Copy, Debug)]
pub enum Breach {
    StaleItems = 1,
    StaleEnd = 2,
    StaleRenewal = 4,
    StaleHandBack = 8,
    TerminalChanged = 16,
    Revived = 32,
    HandedBackRunDisplaced = 64,
    WaitingRunEnded = 128,
}

/// One request with all that the broker and the database know of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Request {
    /// Copies of its message that wait in the requests queue.
    pub ready: u8,
    /// Copies on the retry ladder, by the ticks that they still have to wait, less one.
    pub parked: [u8; 2],
    /// Whether a fault has destroyed a copy.
    pub lost: bool,
    /// Its row in `inventory_sync_runs`.
    pub run: Option<Run>,
    /// Its rows in `outbox_events`.
    pub outbox: Outbox,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Run {
    pub status: Status,
    pub attempt: u8,
    pub interruptions: u8,
    /// `lease_owner is null`
    pub handed_back: bool,
    /// Ticks until `lease_expires_at`; not above zero means expired.
    pub lease: i8,
    /// Leases that were given on it so far: names the one rightful writer even where a broken design gives two of them
    /// the same attempt.
    pub grant: u8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Status {
    Running,
    /// By its worker: success, partial or failed.
    Done,
    /// By an admission that found its attempts used up.
    GivenUp,
    /// By an admission of another request of its selection.
    Displaced,
    /// By the janitor.
    Abandoned,
    Skipped,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Outbox {
    /// Rows; the design allows one.
    pub rows: u8,
    /// Ticks until `claimed_until`.
    pub claimed: u8,
    /// `sent_at is not null`
    pub sent: bool,
    /// Whether the broker has stored the event.
    pub stored: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Worker {
    pub phase: Phase,
    pub renewal: Renewal,
    /// Whether the broker still counts the delivery as this worker's.
    pub in_hand: bool,
    /// Stopped by SIGSTOP or by a long stall; what it sent before is still on the wire.
    pub paused: bool,
    /// A lease that it has given up because the database was away, and still has to hand back.
    pub orphan: Option<Lease>,
}

/// Where a worker is in the recipe of `src/run/mod.rs`. `trust` is the ticks until its own deadline.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Phase {
    Idle,
    /// Its admission is on the way to the database.
    Asking {
        request: u8,
        trust: u8,
    },
    /// The database has granted the lease, the worker has not heard of it yet.
    Granted {
        lease: Lease,
        trust: u8,
    },
    Working {
        lease: Lease,
        trust: u8,
    },
    /// What had to be durable is; the message has to be settled.
    Settling {
        request: u8,
        how: Settle,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Lease {
    pub request: u8,
    pub attempt: u8,
    pub grant: u8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Settle {
    Ack,
    Nack,
    /// A copy to the retry ladder, then ack.
    Park,
    /// Only in a broken design: the event in a transaction of its own, then ack.
    Announce,
}

/// A renewal on its way, with the ticks that the worker may trust the lease if it is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Renewal {
    None,
    Asked(u8),
    Kept(u8),
}

/// A relay and the request whose event it has in hand.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Relay {
    Idle,
    Claimed(u8),
    Confirmed(u8),
}

impl State {
    pub fn breach(&mut self, breach: Breach) {
        self.broken |= breach as u8;
    }

    pub fn has(&self, breach: Breach) -> bool {
        self.broken & breach as u8 != 0
    }

    pub fn run(&self, request: u8) -> Option<&Run> {
        self.requests[usize::from(request)].run.as_ref()
    }

    pub fn run_mut(&mut self, request: u8) -> Option<&mut Run> {
        self.requests[usize::from(request)].run.as_mut()
    }

    /// The one state that stands for all that differ from this in who is who. Requests, workers and relays beyond those
    /// of the design are in no order with the others, and stay where they are.
    pub fn in_order(mut self, design: &Design) -> Self {
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

    /// Nothing is to be handed back of them, whenever it is tried.
    fn forget_orphans_of_ended_runs(&mut self) {
        let requests = self.requests;
        let running = |lease: &Lease| requests[usize::from(lease.request)].run.is_some_and(|run| run.running());
        for worker in &mut self.workers {
            worker.orphan = worker.orphan.filter(running);
        }
    }

    /// Copies of a request's message, wherever they are.
    pub fn copies(&self, request: usize) -> usize {
        let waiting = &self.requests[request];
        let in_hand = |worker: &&Worker| worker.in_hand && worker.phase.request() == Some(request);
        usize::from(waiting.ready)
            + waiting.parked.iter().map(|copies| usize::from(*copies)).sum::<usize>()
            + self.workers.iter().filter(in_hand).count()
    }
}

impl Run {
    pub fn running(&self) -> bool {
        self.status == Status::Running
    }

    pub fn alive(&self) -> bool {
        self.running() && self.lease > 0
    }

    /// Whether `lease` is the one right to write to this run.
    pub fn belongs_to(&self, lease: Lease) -> bool {
        self.running() && self.grant == lease.grant
    }
}

impl Worker {
    pub const IDLE: Self =
        Self { phase: Phase::Idle, renewal: Renewal::None, in_hand: false, paused: false, orphan: None };

    pub fn is_idle(&self) -> bool {
        self.phase == Phase::Idle
    }

    /// Has settled, and is free for the next message.
    pub fn rest(&mut self) {
        *self = Self { orphan: self.orphan, ..Self::IDLE };
    }

    /// Goes on to settle the message; what its lease was is of no interest any more.
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
            Self::Asking { request, .. } | Self::Settling { request, .. } => *request = 1 - *request,
            Self::Granted { lease, .. } | Self::Working { lease, .. } => lease.request = 1 - lease.request,
        }
    }

    pub fn request(self) -> Option<usize> {
        match self {
            Self::Idle => None,
            Self::Asking { request, .. } | Self::Settling { request, .. } => Some(usize::from(request)),
            Self::Granted { lease, .. } | Self::Working { lease, .. } => Some(usize::from(lease.request)),
        }
    }
}
