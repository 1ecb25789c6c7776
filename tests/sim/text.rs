//! Small text matters: percent-encoding as Intune does it, times, base64url.

use time::OffsetDateTime;

/// Percent-encodes everything but unreserved characters.
pub fn percent_encode(text: &str) -> String {
    let mut out = String::with_capacity(text.len() * 3);
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

/// Undoes one level of percent-encoding; what is not an escape stays as it is.
pub fn percent_decode(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let escape = text.get(at + 1..at + 3).filter(|_| bytes[at] == b'%');
        match escape.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
            Some(byte) => {
                out.push(byte);
                at += 3;
            }
            None => {
                out.push(bytes[at]);
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// Now, by the only clock of the simulator.
#[expect(
    clippy::disallowed_methods,
    reason = "a server in its own right, which imports nothing of the program's clock"
)]
pub fn now() -> OffsetDateTime {
    OffsetDateTime::now_utc()
}

/// Now, in UTC and to the second, without a zone: `2026-11-23T08:25:45`.
pub fn now_iso() -> String {
    let now = now();
    let (hour, minute, second) = now.to_hms();
    format!("{}T{hour:02}:{minute:02}:{second:02}", now.date())
}

/// Decodes base64url without padding, as the parts of a JWT are.
pub fn base64url_decode(text: &str) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(text.len() * 3 / 4);
    let (mut bits, mut held) = (0_u32, 0_u32);
    for byte in text.trim_end_matches('=').bytes() {
        let value = match byte {
            b'A'..=b'Z' => byte - b'A',
            b'a'..=b'z' => byte - b'a' + 26,
            b'0'..=b'9' => byte - b'0' + 52,
            b'-' => 62,
            b'_' => 63,
            _ => return None,
        };
        bits = (bits << 6) | u32::from(value);
        held += 6;
        if held >= 8 {
            held -= 8;
            out.push((bits >> held) as u8);
            bits &= (1 << held) - 1;
        }
    }
    Some(out)
}

/// Encodes bytes as base64url without padding.
pub fn base64url_encode(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let mut out = String::with_capacity(bytes.len() * 4 / 3 + 2);
    for chunk in bytes.chunks(3) {
        let bits = chunk.iter().fold(0_u32, |bits, byte| (bits << 8) | u32::from(*byte)) << (8 * (3 - chunk.len()));
        let digits = (0..=chunk.len()).map(|place| DIGITS[(bits >> (18 - 6 * place) & 63) as usize]);
        out.extend(digits.map(char::from));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percent_encoding_comes_back_from_two_levels() {
        let plain = "[cosmosdb][{\"a\":\"né +/%\"}]";
        let twice = percent_encode(&percent_encode(plain));
        assert!(twice.starts_with("%255Bcosmosdb%255D"));
        assert_eq!(percent_decode(&percent_decode(&twice)), plain);
        assert_eq!(percent_decode("100%zz%4"), "100%zz%4");
    }

    #[test]
    fn base64url_decodes_jwt_parts_and_refuses_other_text() {
        assert_eq!(base64url_decode("eyJhbGciOiJQUzI1NiJ9").as_deref(), Some(&br#"{"alg":"PS256"}"#[..]));
        assert_eq!(base64url_decode("a+b"), None);
        for bytes in [&b""[..], b"a", b"ab", b"abc", &[0xff, 0xfe, 0xfd, 0xfc]] {
            assert_eq!(base64url_decode(&base64url_encode(bytes)).as_deref(), Some(bytes));
        }
    }
}
