//! The design under check: its size, the faults that may befall it, and the guard that a mutant does without.

/// What is checked.
#[derive(Clone, Copy, Debug)]
pub struct Design {
    pub requests: usize,
    pub workers: usize,
    pub relays: usize,
    pub clock: Clock,
    /// How many faults may happen in all.
    pub faults: u8,
    /// Which ones.
    pub kinds: &'static [Fault],
    /// Whether the requests are of one selection.
    pub same_selection: bool,
    /// `limits.tenant_max_runs`; the requests are of one tenant.
    pub tenant_limit: u8,
    /// The guard that is left out.
    pub without: Option<Guard>,
    /// A promise that is asked for on top of the others.
    pub also: Option<Promise>,
}

/// How long things last, in ticks. What counts is which is longer: a finer clock only tells more moments apart.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    /// How long the database honours a lease (`run.lease_s`).
    pub lease: i8,
    /// How long a worker trusts it: less than the database does (`LeaseKeeper::trusted_for`).
    pub trust: u8,
    /// How long a copy is on a rung of the retry ladder: two at most.
    pub rung: usize,
    /// How long after the end of its lease the janitor ends a run (`run.abandoned_after_s`): longer than a rung.
    pub abandoned: i8,
    /// How long a relay has an event to itself (`outbox.claim_s`).
    pub claim: u8,
}

impl Clock {
    pub const FINE: Self = Self { lease: 3, trust: 2, rung: 2, abandoned: 3, claim: 2 };
    pub const COARSE: Self = Self { lease: 2, trust: 1, rung: 1, abandoned: 2, claim: 1 };
}

/// Workers that a run may lose (`run.max_attempts`).
pub const MAX_ATTEMPTS: u8 = 2;

/// A promise that is asked for on top of what must always hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Promise {
    /// No more runs are at work than the limit allows: every running run counts, whether its lease is alive or not.
    LimitHolds,
    /// A run that was handed back in order counts as one that is at work, until it is taken over or abandoned.
    HandedBackRunGoesOn,
    /// Not kept, and not to be kept short of asking the queue.
    WaitingRunGoesOn,
}

/// What may go wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// A process dies; another starts in its place.
    Crash,
    /// A process is stopped and may go on at any later time.
    Pause,
    /// A process is told to stop, and hands its run back.
    Stop,
    /// The connection to the broker is lost with a delivery on it: its ack never arrives, it is delivered again.
    Cut,
    /// The broker loses a message for good.
    LostMessage,
    /// The database has committed, and the worker does not learn of it.
    LostAnswer,
    /// The database does not do what it was asked.
    StoreAway,
    /// A publish has no known outcome.
    LostConfirm,
}

impl Fault {
    pub const ALL: &[Self] = &[
        Self::Crash,
        Self::Pause,
        Self::Stop,
        Self::Cut,
        Self::LostMessage,
        Self::LostAnswer,
        Self::StoreAway,
        Self::LostConfirm,
    ];
}

/// What holds the design together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Guard {
    /// An item write checks status and attempt.
    ItemFence,
    /// The end of a run checks the attempt.
    EndFence,
    /// The end of a run checks that it has not ended.
    EndStatus,
    /// A renewal checks the attempt.
    RenewalFence,
    /// A renewal takes no expired lease back.
    RenewalExpiry,
    /// A hand-back checks the attempt.
    HandBackFence,
    /// A take-over is a new attempt.
    NewAttempt,
    /// A run may lose so many workers and no more.
    AttemptLimit,
    /// A terminal run is not run again for its key.
    Deduplication,
    /// One running run of a selection.
    SelectionLock,
    /// The run is ended before its message is acked.
    CommitBeforeAck,
    /// The copy is on the ladder before the message is acked.
    ParkBeforeAck,
    /// The event is written by the transaction that ends the run.
    EventInTransaction,
    /// The janitor leaves a run alone whose lease is alive.
    JanitorPatience,
    /// There is a janitor.
    Janitor,
    /// A worker has a deadline of its own.
    OwnDeadline,
    /// The deadline is counted from before the database was asked.
    TrustFromAsking,
    /// The deadline's clock goes on while the process does not.
    ClockRunsOn,
    /// The broker has confirmed an event before it is marked sent.
    ConfirmBeforeMark,
    /// A claim on an event runs out.
    ClaimExpiry,
}

impl Design {
    pub fn keeps(&self, guard: Guard) -> bool {
        self.without != Some(guard)
    }

    pub fn without(self, guard: Guard) -> Self {
        Self { without: Some(guard), ..self }
    }

    pub fn promising(self, promise: Promise) -> Self {
        Self { also: Some(promise), ..self }
    }
}
