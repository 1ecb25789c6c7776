//! Configuration of a model: its size, its faults, and the guard that a mutant lacks.

/// Configuration of one check.
#[derive(Clone, Copy, Debug)]
pub struct Design {
    pub requests: usize,
    pub workers: usize,
    pub relays: usize,
    pub clock: Clock,
    /// Maximum number of faults.
    pub faults: u8,
    /// Kinds of faults.
    pub kinds: &'static [Fault],
    /// True if all requests have the same selection.
    pub same_selection: bool,
    /// `limits.tenant_max_runs`; all requests belong to one tenant.
    pub tenant_limit: u8,
    /// True if renewals and other short statements complete before time passes, as on a healthy host. Batches may still
    /// take any time.
    pub prompt: bool,
    /// Guard that is removed.
    pub without: Option<Guard>,
    /// Property that is checked in addition.
    pub extra: Option<ExtraProperty>,
}

/// Durations in ticks. Only their order matters; a finer clock distinguishes more interleavings.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    /// Lease duration in the database (`run.lease_s`).
    pub lease: i8,
    /// Local deadline of a worker, shorter than the lease.
    pub deadline: u8,
    /// Delay of a retry tier: at most two.
    pub retry_delay: usize,
    /// Time after lease expiry, and between repeats, at which the janitor republishes a request.
    pub republish: i8,
    /// Time after which an unconfirmed event is due again (`outbox.claim_s`).
    pub claim: u8,
}

impl Clock {
    pub const FINE: Self = Self { lease: 3, deadline: 2, retry_delay: 2, republish: 3, claim: 2 };
    pub const COARSE: Self = Self { lease: 2, deadline: 1, retry_delay: 1, republish: 2, claim: 1 };
}

/// Attempts of a run that may lose their worker (`run.max_attempts`).
pub const MAX_ATTEMPTS: u8 = 2;

/// Property that is checked only on request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExtraProperty {
    /// Live leases stay within the limit: every running run counts, live or expired.
    LimitHolds,
    /// No run loses a worker without a fault, and a fault costs at most one worker.
    OnlyFaultsCostAttempts,
}

/// Kind of fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// A process dies; another starts in its place.
    Crash,
    /// A process is suspended and may resume at any later time.
    Pause,
    /// A process shuts down and releases its run.
    Shutdown,
    /// A database connection breaks and its session keeps the run's row locked until the server notices.
    LingeringLock,
    /// The broker connection is lost with an unacked delivery, which is redelivered.
    ConnectionLost,
    /// The broker loses a message.
    LostMessage,
    /// The database commits and the response is lost.
    LostResponse,
    /// The database is unavailable.
    DatabaseUnavailable,
    /// A publish has no confirm.
    LostConfirm,
}

impl Fault {
    pub const ALL: &[Self] = &[
        Self::Crash,
        Self::Pause,
        Self::Shutdown,
        Self::ConnectionLost,
        Self::LostMessage,
        Self::LostResponse,
        Self::DatabaseUnavailable,
        Self::LingeringLock,
        Self::LostConfirm,
    ];
}

/// Mechanism that a mutant removes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Guard {
    /// Item writes check status and attempt.
    ItemFence,
    /// The fence of an item write does not block the renewal of the lease (`for key share`).
    KeyShareFence,
    /// A take-over waits for the batch in flight (`for update`).
    TakeOverLock,
    /// Orphaned leases are not released on the connection that renews.
    SeparateReleaseConnection,
    /// Finishing a run checks the attempt.
    FinishFence,
    /// Finishing a run checks that it is running.
    FinishStatusCheck,
    /// Renewals check the attempt.
    RenewalFence,
    /// Renewals reject an expired lease.
    RenewalExpiryCheck,
    /// Releasing a lease checks the attempt.
    ReleaseFence,
    /// A take-over increments the attempt.
    AttemptIncrement,
    /// The number of attempts is limited.
    AttemptLimit,
    /// A key whose run is terminal is a duplicate.
    IdempotencyKey,
    /// A selection has at most one running run.
    SelectionLock,
    /// The run ends before its message is acked.
    CommitBeforeAck,
    /// The retry copy is published before the message is acked.
    RetryCopyBeforeAck,
    /// The transaction that ends a run enqueues its event.
    EventInTransaction,
    /// The janitor republishes the request of a run whose lease has expired.
    Republish,
    /// The janitor waits before it republishes a request.
    RepublishDelay,
    /// The janitor ends no run.
    JanitorEndsNothing,
    /// A request that finds a run of its selection with attempts left is contended, whatever the state of the lease.
    ContendedWhileRestartable,
    /// A worker has a local deadline.
    LocalDeadline,
    /// The local deadline counts from before the request was sent.
    DeadlineFromSendTime,
    /// The local clock advances while the process is suspended.
    ClockCountsSuspend,
    /// The outbox row is deleted only after the confirm.
    ConfirmBeforeDelete,
    /// An event that was not confirmed becomes due again.
    DueAgain,
}

impl Design {
    pub fn keeps(&self, guard: Guard) -> bool {
        self.without != Some(guard)
    }

    pub fn without(self, guard: Guard) -> Self {
        Self { without: Some(guard), ..self }
    }

    pub fn requiring(self, property: ExtraProperty) -> Self {
        Self { extra: Some(property), ..self }
    }
}
