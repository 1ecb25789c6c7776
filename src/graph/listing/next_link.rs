//! Validation of next links: the token is sent to the configured Graph host only.

use reqwest::Url;

use super::error::ListError;
use crate::domain::failure::ErrorCode;

/// Parses a next link and rejects one that would send the token to another host. `Url` keeps percent sequences, so that
/// the request is sent to the link as received.
pub(super) fn validate(base: &Url, link: &str) -> Result<Url, ListError> {
    let url = Url::parse(link).map_err(|_| ListError::from(ErrorCode::GraphBadResponse))?;
    let is_ours = url.scheme() == base.scheme()
        && url.host() == base.host()
        && url.port_or_known_default() == base.port_or_known_default()
        && url.username().is_empty()
        && url.password().is_none();
    if is_ours { Ok(url) } else { Err(ErrorCode::GraphForeignLink.into()) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn base() -> Url {
        Url::parse("https://graph.example").unwrap()
    }

    #[test]
    fn a_double_encoded_link_survives_byte_for_byte() {
        let link = "https://graph.example/beta/deviceManagement/configurationPolicies?$top=25&$skiptoken=%255Bcosmosdb\
                    %255D%255B%257B%2522compositeToken%2522%253A%2522%2bRID%253a~x%2523RT%253a1%2522%257D%255D&a=%27b|c%27,d";
        let url = validate(&base(), link).unwrap();
        assert_eq!(url.as_str(), link);
        // The HTTP client sends the text of the URL.
        let request = reqwest::Request::new(reqwest::Method::GET, url);
        assert_eq!(request.url().as_str(), link);
    }

    #[test]
    fn next_links_to_other_hosts_are_rejected() {
        for link in [
            "https://evil.example/beta/x",
            "http://graph.example/beta/x",
            "https://graph.example:8443/beta/x",
            "https://graph.example.evil.example/beta/x",
            "https://graph.example@evil.example/beta/x",
            "https://user:password@graph.example/beta/x",
        ] {
            assert_eq!(validate(&base(), link).unwrap_err().failure.code, ErrorCode::GraphForeignLink, "{link}");
        }
        assert!(validate(&base(), "https://GRAPH.example:443/beta/x").is_ok());
        assert_eq!(validate(&base(), "/beta/x?$skip=1").unwrap_err().failure.code, ErrorCode::GraphBadResponse);
    }

    const PIECES: [&str; 24] = [
        "https://",
        "http://",
        "graph.example",
        "evil.example",
        "GRAPH.EXAMPLE",
        "graph.example.",
        "@",
        ":",
        "443",
        "8443",
        "/",
        "\\",
        "?",
        "#",
        "%2f",
        "%40",
        "\t",
        "\u{3002}",
        ".",
        "user",
        "//",
        "beta",
        "[::1]",
        " ",
    ];

    proptest! {
        #[test]
        fn no_next_link_sends_the_token_to_another_host(pieces in prop::collection::vec(prop::sample::select(&PIECES), 0..10)) {
            if let Ok(url) = validate(&base(), &pieces.concat()) {
                prop_assert!(url.as_str().starts_with("https://graph.example/"), "{}", url);
                prop_assert_eq!((url.port(), url.username(), url.password()), (None, "", None));
            }
        }
    }
}
