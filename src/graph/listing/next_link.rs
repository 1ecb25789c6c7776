//! Validation of next links: the token is sent to the configured Graph host only.

use reqwest::Url;

use super::error::ListError;
use crate::domain::failure::ErrorCode;

/// Parses a next link and rejects one that would send the token to another host. `Url` keeps percent sequences, so that
/// the request is sent to the link as received.
pub(super) fn validate(base: &Url, current: Option<&Url>, link: &str) -> Result<Url, ListError> {
    // OData allows links relative to the request of the current page.
    let url = Url::options().base_url(current).parse(link).map_err(|_| ListError::from(ErrorCode::GraphBadResponse))?;
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

    fn current() -> Url {
        base().join("/beta/deviceAppManagement/mobileApps?$top=5").unwrap()
    }

    #[test]
    fn a_double_encoded_link_survives_byte_for_byte() {
        let link = "https://graph.example/beta/deviceManagement/configurationPolicies?$top=25&$skiptoken=%255Bcosmosdb\
                    %255D%255B%257B%2522compositeToken%2522%253A%2522%2bRID%253a~x%2523RT%253a1%2522%257D%255D&a=%27b|c%27,d";
        let url = validate(&base(), Some(&current()), link).unwrap();
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
            assert_eq!(
                validate(&base(), Some(&current()), link).unwrap_err().failure.code,
                ErrorCode::GraphForeignLink,
                "{link}"
            );
        }
        assert!(validate(&base(), Some(&current()), "https://GRAPH.example:443/beta/x").is_ok());
    }

    #[test]
    fn relative_links_are_resolved_against_the_page_and_stay_on_its_host() {
        let resolved = |link: &str| validate(&base(), Some(&current()), link).unwrap().to_string();
        let page = "https://graph.example/beta/deviceAppManagement/mobileApps?$skiptoken=a%2Fb";
        for link in [
            "mobileApps?$skiptoken=a%2Fb",
            "?$skiptoken=a%2Fb",
            "/beta/deviceAppManagement/mobileApps?$skiptoken=a%2Fb",
        ] {
            assert_eq!(resolved(link), page, "{link}");
        }
        for link in ["//evil.example/beta/x", "\\\\evil.example/x", "https:evil.example", "javascript:x"] {
            let followed = validate(&base(), Some(&current()), link);
            assert!(followed.is_err() || followed.unwrap().host() == base().host(), "{link}");
        }
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
            if let Ok(url) = validate(&base(), Some(&current()), &pieces.concat()) {
                prop_assert!(url.as_str().starts_with("https://graph.example/"), "{}", url);
                prop_assert_eq!((url.port(), url.username(), url.password()), (None, "", None));
            }
        }
    }
}
