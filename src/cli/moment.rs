//! Times on the command line.

use std::str::FromStr;

use time::format_description::well_known::Rfc3339;
use time::{Duration, OffsetDateTime};

use crate::domain::clock;

/// Parses an RFC 3339 time, or an age such as `30m`, `24h` or `7d`.
pub(super) fn moment(text: &str) -> Result<OffsetDateTime, String> {
    if let Some(age) = age(text) {
        let now = OffsetDateTime::from_unix_timestamp(clock::wall_clock_unix_s()).map_err(|error| error.to_string())?;
        return now.checked_sub(age).ok_or_else(|| "too long ago".to_owned());
    }
    OffsetDateTime::parse(text, &Rfc3339).map_err(|_| {
        "expected an RFC 3339 time such as 2026-11-28T00:00:00Z, or an age such as 30m, 24h or 7d".to_owned()
    })
}

fn age(text: &str) -> Option<Duration> {
    let (count, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let seconds = match unit {
        "m" => 60,
        "h" => 3_600,
        "d" => 86_400,
        _ => return None,
    };
    u32::from_str(count).ok().map(|count| Duration::seconds(i64::from(count) * seconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_moment_is_a_time_or_an_age() {
        let (minutes, days) = (moment("90m").unwrap(), moment("7d").unwrap());
        assert!((minutes - days - Duration::seconds(7 * 86_400 - 90 * 60)).abs() <= Duration::seconds(2));
        assert_eq!(moment("2026-11-28T01:02:03+01:00").unwrap().unix_timestamp(), 1_795_824_123);
        for wrong in ["", "h", "yesterday", "-3h", "99999999999d", "2026-11-28"] {
            assert!(moment(wrong).is_err(), "{wrong}");
        }
        assert!(moment("4294967295d").is_err(), "before the first year");
    }
}
