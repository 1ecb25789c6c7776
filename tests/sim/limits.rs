//! Throttling as in the real service: requests per tenant and window, and the effect of requests sent too early.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::text::now;

/// Paths that Intune counts with its devices, not with its policies.
const DEVICES: [&str; 8] = [
    "managedDevices",
    "detectedApps",
    "applePushNotificationCertificate",
    "deviceHealthScripts",
    "deviceManagementScripts",
    "deviceComplianceScripts",
    "deviceShellScripts",
    "deviceCustomAttributeShellScripts",
];

/// The limits of one app in one tenant; the defaults are those of the real service. 0 is no limit.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// The window of the two Intune limits.
    pub window_ms: u64,
    /// Requests to policies and apps in a window.
    pub intune: usize,
    /// Requests to devices and scripts in a window.
    pub devices: usize,
    /// Requests to Conditional Access per second; its 429 never says how long to wait.
    pub conditional_access: usize,
    /// Form of `Retry-After` in a 429.
    pub retry_after: RetryAfterForm,
}

/// Form of `Retry-After` in a 429.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RetryAfterForm {
    /// Whole seconds, rounded up.
    #[default]
    Seconds,
    /// Seconds with three digits after the point.
    Fraction,
    /// An HTTP date.
    Date,
    /// Nothing.
    None,
}

/// Refusal of a request over a limit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused {
    /// The header, if there is one.
    pub retry_after: Option<String>,
    /// `true` if the request came before the wait of an earlier refusal was over.
    pub is_early: bool,
}

/// The limits in force and what was used of them.
#[derive(Debug, Default)]
pub struct Throttle {
    inner: Mutex<Used>,
}

#[derive(Debug, Default)]
struct Used {
    limits: Option<Limits>,
    buckets: HashMap<(Uuid, Family), Bucket>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Family {
    Intune,
    Devices,
    ConditionalAccess,
}

#[derive(Debug, Default)]
struct Bucket {
    calls: VecDeque<Instant>,
    closed_until: Option<Instant>,
}

impl Default for Limits {
    fn default() -> Self {
        let retry_after = RetryAfterForm::Seconds;
        Limits { window_ms: 20_000, intune: 1_000, devices: 2_000, conditional_access: 1, retry_after }
    }
}

impl Throttle {
    /// Sets or lifts the limits; what was used before is forgotten.
    pub fn set(&self, limits: Option<Limits>) {
        let mut inner = self.inner.lock();
        *inner = Used { limits, buckets: HashMap::new() };
    }

    /// The limits in force.
    pub fn get(&self) -> Option<Limits> {
        self.inner.lock().limits.clone()
    }

    /// Counts one request, and refuses it if it is one too many or comes too early.
    pub fn admit(&self, tenant: Uuid, path: &str) -> Result<(), Refused> {
        self.admit_at(tenant, path, Instant::now())
    }

    fn admit_at(&self, tenant: Uuid, path: &str, now: Instant) -> Result<(), Refused> {
        let mut inner = self.inner.lock();
        let Used { limits, buckets } = &mut *inner;
        let Some(limits) = limits else { return Ok(()) };
        let family = family(path);
        let (most, window_ms) = match family {
            Family::Intune => (limits.intune, limits.window_ms),
            Family::Devices => (limits.devices, limits.window_ms),
            Family::ConditionalAccess => (limits.conditional_access, 1_000),
        };
        if most == 0 {
            return Ok(());
        }
        let window = Duration::from_millis(window_ms);
        let (wait, is_early) = match buckets.entry((tenant, family)).or_default().take(now, most, window) {
            Ok(()) => return Ok(()),
            Err(refused) => refused,
        };
        let form = if family == Family::ConditionalAccess { RetryAfterForm::None } else { limits.retry_after };
        Err(Refused { retry_after: form.write(wait), is_early })
    }
}

impl Bucket {
    /// Counts one request in the window, or returns the wait and whether the caller was told to wait before.
    fn take(&mut self, now: Instant, most: usize, window: Duration) -> Result<(), (Duration, bool)> {
        while self.calls.front().is_some_and(|call| now.duration_since(*call) >= window) {
            self.calls.pop_front();
        }
        let is_early = self.closed_until.is_some_and(|until| now < until);
        // Calls made while throttled count like any other.
        self.calls.push_back(now);
        if self.calls.len() <= most && !is_early {
            return Ok(());
        }
        while self.calls.len() > most {
            self.calls.pop_front();
        }
        let oldest = self.calls.front().copied().unwrap_or(now);
        let wait = window.saturating_sub(now.duration_since(oldest)).max(Duration::from_millis(1));
        self.closed_until = Some(now + wait);
        Err((wait, is_early))
    }
}

impl RetryAfterForm {
    fn write(self, wait: Duration) -> Option<String> {
        match self {
            RetryAfterForm::None => None,
            RetryAfterForm::Seconds => Some(wait.as_secs_f64().ceil().to_string()),
            RetryAfterForm::Fraction => Some(format!("{:.3}", wait.as_secs_f64() + 0.001)),
            RetryAfterForm::Date => Some(http_date_in(wait)),
        }
    }
}

/// The HTTP date that is so far ahead; dates have whole seconds, so it is rounded up.
pub fn http_date_in(wait: Duration) -> String {
    httpdate::fmt_http_date((now() + wait + Duration::from_millis(999)).into())
}

fn family(path: &str) -> Family {
    if path.contains("/conditionalAccess/") {
        Family::ConditionalAccess
    } else if DEVICES.iter().any(|name| path.contains(name)) {
        Family::Devices
    } else {
        Family::Intune
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATH: &str = "beta/deviceManagement/intents";

    #[test]
    fn the_window_fills_refuses_and_opens_again() {
        let throttle = Throttle::default();
        throttle.set(Some(Limits { intune: 2, window_ms: 1_000, ..Limits::default() }));
        let (tenant, start) = (Uuid::from_u128(7), Instant::now());
        let at = |ms| throttle.admit_at(tenant, PATH, start + Duration::from_millis(ms));
        assert_eq!(at(0), Ok(()));
        assert_eq!(at(10), Ok(()));
        assert_eq!(at(20), Err(Refused { retry_after: Some("1".into()), is_early: false }));
        assert!(at(30).is_err_and(|refused| refused.is_early));
        assert_eq!(at(1_200), Ok(()));
        assert_eq!(throttle.admit_at(Uuid::from_u128(8), PATH, start), Ok(()));
    }

    #[test]
    fn conditional_access_never_says_how_long() {
        let throttle = Throttle::default();
        throttle.set(Some(Limits::default()));
        let path = "v1.0/identity/conditionalAccess/policies";
        let (tenant, now) = (Uuid::from_u128(7), Instant::now());
        assert_eq!(throttle.admit_at(tenant, path, now), Ok(()));
        assert_eq!(throttle.admit_at(tenant, path, now).map_err(|refused| refused.retry_after), Err(None));
    }
}
