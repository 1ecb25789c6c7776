//! Parser for `Retry-After` in every form that Graph has been seen to send.

use std::time::{Duration, SystemTime};

use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// Upper bound of a wait; no run lasts longer.
const MAX: Duration = Duration::from_secs(3_600);

/// Parses `Retry-After`: seconds, a fraction of them, the same with the word "seconds", an HTTP or ISO 8601 date, or one
/// of these repeated (`2, 2`: a proxy has merged two headers), of which the longest wait counts. Rounds up to whole
/// seconds.
///
/// A date is compared with the `Date` of the same response and never with the local clock, which may be wrong; without
/// that header it counts as absent.
pub(in crate::graph) fn parse(value: &str, date_of_response: Option<&str>) -> Option<Duration> {
    if let Some(wait) = parse_one(value, date_of_response) {
        return Some(wait);
    }
    // A date has a comma of its own, hence one value is tried first.
    let parts = value.split(',').filter(|part| !part.trim().is_empty());
    parts.map(|part| parse_one(part, date_of_response)).collect::<Option<Vec<_>>>()?.into_iter().max()
}

fn parse_one(value: &str, date_of_response: Option<&str>) -> Option<Duration> {
    let value = value.trim().trim_matches('"').trim();
    let number = value.trim_end_matches(|c: char| c.is_ascii_alphabetic()).trim_end();
    let unit = value[number.len()..].trim_start().to_ascii_lowercase();
    if ["", "s", "sec", "secs", "second", "seconds"].contains(&unit.as_str())
        && let Ok(seconds) = number.parse::<f64>()
        && seconds.is_finite()
    {
        return Some(Duration::from_secs_f64(seconds.clamp(0.0, MAX.as_secs_f64()).ceil()));
    }
    let iso = || OffsetDateTime::parse(value, &Rfc3339).ok().map(SystemTime::from);
    let until = httpdate::parse_http_date(value).ok().or_else(iso)?;
    let now = httpdate::parse_http_date(date_of_response?.trim()).ok()?;
    let wait = until.duration_since(now).unwrap_or_default().min(MAX);
    Some(Duration::from_secs_f64(wait.as_secs_f64().ceil()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const NOW: &str = "Mon, 23 Nov 2026 10:00:00 GMT";

    fn seconds(value: &str) -> Option<u64> {
        parse(value, Some(NOW)).map(|wait| wait.as_secs())
    }

    #[test]
    fn every_form_is_parsed_and_rounded_up() {
        assert_eq!(seconds("7"), Some(7));
        assert_eq!(seconds(" 7 "), Some(7));
        assert_eq!(seconds("0"), Some(0));
        assert_eq!(seconds("2.128"), Some(3));
        assert_eq!(seconds("0.2"), Some(1));
        assert_eq!(seconds("30 seconds"), Some(30));
        assert_eq!(seconds("30seconds"), Some(30));
        assert_eq!(seconds("1 Second"), Some(1));
        assert_eq!(seconds("5 secs"), Some(5));
        assert_eq!(seconds("\"5\""), Some(5));
        assert_eq!(seconds("2026-11-23T10:00:42Z"), Some(42));
        assert_eq!(seconds("2026-11-23T11:00:42.5+01:00"), Some(43));
        assert_eq!(seconds("Mon, 23 Nov 2026 10:00:42 GMT"), Some(42));
    }

    #[test]
    fn long_and_past_values_are_clamped() {
        assert_eq!(seconds("1e12"), Some(3_600));
        assert_eq!(seconds("-5"), Some(0));
        assert_eq!(seconds("Tue, 23 Nov 2027 10:00:00 GMT"), Some(3_600));
        assert_eq!(seconds("Mon, 23 Nov 2026 09:00:00 GMT"), Some(0));
    }

    #[test]
    fn a_repeated_header_counts_once() {
        assert_eq!(seconds("2, 2"), Some(2));
        assert_eq!(seconds("2,5"), Some(5));
        assert_eq!(seconds("2, soon"), None);
        assert_eq!((seconds("2,"), seconds(", 3"), seconds(",")), (Some(2), Some(3), None));
        let date = "Mon, 23 Nov 2026 10:00:42 GMT";
        assert_eq!(seconds(date), Some(42));
    }

    #[test]
    fn unparsable_values_count_as_absent() {
        for value in ["", "soon", "5 minutes", "inf", "NaN", "seconds"] {
            assert_eq!(seconds(value), None, "{value:?}");
        }
        assert_eq!(parse("Mon, 23 Nov 2026 10:00:42 GMT", None), None, "a date needs the Date header");
    }

    proptest! {
        #[test]
        fn any_wait_is_whole_seconds_and_at_most_an_hour(
            value in prop_oneof![
                any::<String>(), "-?[0-9.]{0,30}(e[0-9]{1,3})? ?(s|seconds?)?",
                "(Mon|Tue), [0-3][0-9] (Nov|Feb) [0-9]{4} [0-2][0-9]:[0-6][0-9]:[0-6][0-9] GMT"],
            date in prop::option::of(Just(NOW)),
        ) {
            if let Some(wait) = parse(&value, date) {
                prop_assert!(wait <= MAX && wait.subsec_nanos() == 0, "{wait:?}");
            }
        }
    }
}
