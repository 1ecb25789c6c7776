//! Text helpers: percent-encoding as in the links of Intune, and times.

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};
use time::OffsetDateTime;

/// Bytes that Intune escapes in its links: all but the unreserved characters of RFC 3986.
const ESCAPED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// Percent-encodes everything but unreserved characters.
pub fn percent_encode(text: &str) -> String {
    utf8_percent_encode(text, ESCAPED).to_string()
}

/// Decodes one level of percent-encoding; text that is not an escape is kept.
pub fn percent_decode(text: &str) -> String {
    percent_decode_str(text).decode_utf8_lossy().into_owned()
}

/// Current time; the only clock of the simulator.
#[expect(clippy::disallowed_methods, reason = "the simulator imports nothing of the program under test")]
pub fn now() -> OffsetDateTime {
    OffsetDateTime::now_utc()
}

/// Current time in UTC, to the second and without a zone: `2026-11-23T08:25:45`.
pub fn now_iso() -> String {
    let now = now();
    let (hour, minute, second) = now.to_hms();
    format!("{}T{hour:02}:{minute:02}:{second:02}", now.date())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_levels_of_percent_encoding_round_trip() {
        let plain = "[cosmosdb][{\"a\":\"né +/%\"}]";
        let twice = percent_encode(&percent_encode(plain));
        assert!(twice.starts_with("%255Bcosmosdb%255D"));
        assert_eq!(percent_decode(&percent_decode(&twice)), plain);
        assert_eq!(percent_decode("100%zz%4"), "100%zz%4");
    }
}
