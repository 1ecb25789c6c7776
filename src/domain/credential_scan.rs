//! Recognition of credentials in texts that are about to be stored.

use std::sync::LazyLock;

use memchr::memmem::Finder;

/// Beginnings of two kinds of credentials. Many kept texts are searched for them, so the searches are prepared.
static PEM: LazyLock<Finder<'_>> = LazyLock::new(|| Finder::new("-----BEGIN"));
static JWT: LazyLock<Finder<'_>> = LazyLock::new(|| Finder::new("eyJ"));

/// Marks: characters that a credential of some kind contains, one bit each.
const SPACE: u8 = 1;
const DASH: u8 = 2;
const DOT: u8 = 4;
const LETTER_B: u8 = 8;
const LETTER_J: u8 = 16;

/// Mark of each byte.
const MARKS: [u8; 256] = {
    let mut marks = [0; 256];
    marks[b' ' as usize] = SPACE;
    marks[b'-' as usize] = DASH;
    marks[b'.' as usize] = DOT;
    marks[b'b' as usize] = LETTER_B;
    marks[b'B' as usize] = LETTER_B;
    marks[b'J' as usize] = LETTER_J;
    marks
};

/// Returns `true` for a text with a bearer token, a JSON Web Token or a private key.
pub(super) fn looks_like_credential(text: &str) -> bool {
    // One pass tells that most ids, times, names and values need no search at all.
    let found = text.bytes().fold(0, |found, byte| found | MARKS[usize::from(byte)]);
    let has = |marks| found & marks == marks;
    (has(SPACE | LETTER_B) && holds_bearer(text))
        || (has(SPACE | DASH | LETTER_B) && holds_private_key(text))
        || (has(DOT | LETTER_J) && holds_jwt(text))
}

/// `Bearer` and a space, as in a header. In another case it is also an English word: then a header's name before it, or
/// a word after it that is no English one, tells a credential.
fn holds_bearer(text: &str) -> bool {
    const BEARER: &str = "bearer ";
    memchr::memchr2_iter(b'b', b'B', text.as_bytes()).any(|start| {
        let end = start + BEARER.len();
        let Some(word) = text.get(start..end).filter(|word| word.eq_ignore_ascii_case(BEARER)) else { return false };
        let before = text[..start].trim_end().to_ascii_lowercase();
        let next = text[end..].split_whitespace().next().unwrap_or_default();
        let is_token = next.len() >= 20 || next.bytes().any(|byte| byte.is_ascii_digit() || b"._~+/=".contains(&byte));
        word.starts_with("Bearer") || before.ends_with("authorization:") || is_token
    })
}

fn holds_private_key(text: &str) -> bool {
    PEM.find(text.as_bytes()).is_some() && text.contains("PRIVATE KEY")
}

/// A JWT: three base64url segments joined by dots, the first of which is a JSON object (`{"` encodes to `eyJ`).
fn holds_jwt(text: &str) -> bool {
    let segment = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
    JWT.find_iter(text.as_bytes()).any(|start| {
        let mut segments = text[start..].split('.');
        let head = segments.next().is_some_and(|s| s.len() >= 8 && s.bytes().all(segment));
        let body = segments.next().is_some_and(|s| s.len() >= 2 && s.bytes().all(segment));
        head && body && segments.next().and_then(|s| s.bytes().next()).is_some_and(segment)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_are_recognised() {
        for text in [
            "Bearer x",
            "bearer abc.def",
            "AUTHORIZATION: BEARER abc",
            "bEaReR 0123abcd",
            "a eyJhbGciOiJub25lIn0.eyJzdWIiOiJ4In0.c2ln z",
            "-----BEGIN RSA PRIVATE KEY-----\nMII",
        ] {
            assert!(looks_like_credential(text), "{text}");
        }
        for text in
            ["the bearer of this", "eyJ is how they begin", "-----BEGIN CERTIFICATE-----", "v1.2.3", "eyJa.bc.d"]
        {
            assert!(!looks_like_credential(text), "{text}");
        }
    }
}
