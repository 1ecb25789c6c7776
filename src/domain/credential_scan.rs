//! Recognition of credentials in texts that are about to be stored.

use std::sync::LazyLock;

use memchr::memmem::Finder;

/// Marks of two kinds of credentials. Many kept texts are searched for them, so the searches are prepared.
static PEM: LazyLock<Finder<'_>> = LazyLock::new(|| Finder::new("-----BEGIN"));
static JWT: LazyLock<Finder<'_>> = LazyLock::new(|| Finder::new("eyJ"));

/// Returns `true` for a text with a bearer token, a JSON Web Token or a private key.
pub(super) fn looks_like_credential(text: &str) -> bool {
    let holds = |byte| memchr::memchr(byte, text.as_bytes()).is_some();
    // A header and a private key contain a space and a JWT contains dots, which most ids, times and values do not.
    (holds(b' ') && (holds_bearer(text) || holds_private_key(text))) || (holds(b'.') && holds_jwt(text))
}

/// `Bearer` and a space, as in a header. In another case it is also an English word: then a header's name before it, or
/// a word after it that is no English one, tells a credential.
fn holds_bearer(text: &str) -> bool {
    const BEARER: &str = "bearer";
    memchr::memchr_iter(b' ', text.as_bytes()).any(|end| {
        let start = end.saturating_sub(BEARER.len());
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
