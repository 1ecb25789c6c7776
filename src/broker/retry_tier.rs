//! Retry tiers: delays of the retry queues, and the tier of a busy or deferred request.

/// Delay of a retry queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RetryTier {
    /// 5 seconds.
    FiveSeconds,
    /// 30 seconds.
    ThirtySeconds,
    /// 2 minutes.
    TwoMinutes,
    /// 10 minutes.
    TenMinutes,
}

impl RetryTier {
    /// All tiers, shortest first.
    pub const ALL: [Self; 4] = [Self::FiveSeconds, Self::ThirtySeconds, Self::TwoMinutes, Self::TenMinutes];

    /// Delay in seconds.
    #[must_use]
    pub const fn seconds(self) -> u64 {
        match self {
            Self::FiveSeconds => 5,
            Self::ThirtySeconds => 30,
            Self::TwoMinutes => 120,
            Self::TenMinutes => 600,
        }
    }

    /// Tier for a request whose run is in progress elsewhere: 5 seconds once, then 30, since runs take minutes.
    #[must_use]
    pub const fn while_busy(retries: u32) -> Self {
        if retries == 0 { Self::FiveSeconds } else { Self::ThirtySeconds }
    }

    /// Tier for a request over a limit: one step longer per retry, up to the longest.
    #[must_use]
    pub const fn while_deferred(retries: u32) -> Self {
        match retries {
            0 => Self::FiveSeconds,
            1 => Self::ThirtySeconds,
            2 => Self::TwoMinutes,
            _ => Self::TenMinutes,
        }
    }

    /// Routing key on the retry exchange and last part of the queue's name.
    pub(super) const fn suffix(self) -> &'static str {
        match self {
            Self::FiveSeconds => "5s",
            Self::ThirtySeconds => "30s",
            Self::TwoMinutes => "2m",
            Self::TenMinutes => "10m",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retry_tiers_grow_with_the_number_of_retries() {
        let busy: Vec<u64> = (0..4).map(|retries| RetryTier::while_busy(retries).seconds()).collect();
        assert_eq!(busy, [5, 30, 30, 30]);
        let deferred: Vec<u64> = (0..6).map(|retries| RetryTier::while_deferred(retries).seconds()).collect();
        assert_eq!(deferred, [5, 30, 120, 600, 600, 600]);
    }
}
