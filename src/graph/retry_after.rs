//! `Retry-After` in every form that has been seen of Graph.

use std::time::Duration;

/// The longest wait that is believed; nothing of ours runs longer.
const MOST: Duration = Duration::from_secs(3_600);

/// Reads `Retry-After`: seconds, a fraction of them, the same with the word "seconds", or an HTTP date. Rounded up to
/// whole seconds, so that nobody comes back too early.
///
/// A date is measured against the `Date` of the same answer and never against a clock of ours, which may be wrong;
/// without that header it counts as not given.
pub(super) fn parse(value: &str, date_of_answer: Option<&str>) -> Option<Duration> {
    let value = value.trim();
    let number = value.trim_end_matches(|c: char| c.is_ascii_alphabetic()).trim_end();
    let unit = value[number.len()..].trim_start().to_ascii_lowercase();
    if ["", "s", "second", "seconds"].contains(&unit.as_str())
        && let Ok(seconds) = number.parse::<f64>()
        && seconds.is_finite()
    {
        return Some(Duration::from_secs_f64(seconds.clamp(0.0, MOST.as_secs_f64()).ceil()));
    }
    let until = httpdate::parse_http_date(value).ok()?;
    let now = httpdate::parse_http_date(date_of_answer?.trim()).ok()?;
    Some(until.duration_since(now).unwrap_or_default().min(MOST))
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
    fn every_form_is_read_and_rounded_up() {
        assert_eq!(seconds("7"), Some(7));
        assert_eq!(seconds(" 7 "), Some(7));
        assert_eq!(seconds("0"), Some(0));
        assert_eq!(seconds("2.128"), Some(3));
        assert_eq!(seconds("0.2"), Some(1));
        assert_eq!(seconds("30 seconds"), Some(30));
        assert_eq!(seconds("30seconds"), Some(30));
        assert_eq!(seconds("1 Second"), Some(1));
        assert_eq!(seconds("Mon, 23 Nov 2026 10:00:42 GMT"), Some(42));
    }

    #[test]
    fn what_is_too_long_or_past_is_clamped() {
        assert_eq!(seconds("1e12"), Some(3_600));
        assert_eq!(seconds("-5"), Some(0));
        assert_eq!(seconds("Tue, 23 Nov 2027 10:00:00 GMT"), Some(3_600));
        assert_eq!(seconds("Mon, 23 Nov 2026 09:00:00 GMT"), Some(0));
    }

    #[test]
    fn what_can_not_be_read_counts_as_not_given() {
        for value in ["", "soon", "5 minutes", "inf", "NaN", "seconds"] {
            assert_eq!(seconds(value), None, "{value:?}");
        }
        assert_eq!(parse("Mon, 23 Nov 2026 10:00:42 GMT", None), None, "there is no clock to measure a date against");
    }

    proptest! {
        #[test]
        fn whatever_it_says_the_wait_is_in_whole_seconds_and_an_hour_at_most(
            value in prop_oneof![
                any::<String>(), "-?[0-9.]{0,30}(e[0-9]{1,3})? ?(s|seconds?)?",
                "(Mon|Tue), [0-3][0-9] (Nov|Feb) [0-9]{4} [0-2][0-9]:[0-6][0-9]:[0-6][0-9] GMT"],
            date in prop::option::of(Just(NOW)),
        ) {
            if let Some(wait) = parse(&value, date) {
                prop_assert!(wait <= MOST && wait.subsec_nanos() == 0, "{wait:?}");
            }
        }
    }
}
