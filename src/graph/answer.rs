//! What Graph says when it refuses, and what that means. Its words are judged here and go no further.

use std::collections::BTreeSet;

use serde::Deserialize;
use serde_json::Value;

use crate::domain::failure::{ErrorCode, Failure};

/// Intune puts JSON text into `message`, gateways put that into another one: no more levels have been seen.
const MOST_LEVELS: usize = 3;

/// An error body, read. It has no `Debug`, so that no log can hold what Graph wrote.
pub(super) struct Told {
    /// The innermost code: what really happened.
    code: Option<String>,
    /// Graph's id of the request, as it stands in the body.
    request_id: Option<String>,
    /// The innermost message.
    text: String,
}

/// A final refusal.
#[derive(Debug)]
pub(super) struct Refusal {
    /// What the run records.
    pub(super) failure: Failure,
    /// What the list that was asked for can make of it.
    pub(super) why: Why,
    /// The application permissions of which Graph names one as missing.
    pub(super) permissions: Vec<String>,
}

/// What a list can make of a refusal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Why {
    /// `$select` names a property that this Graph does not know.
    Select,
    /// There is nothing under the link.
    NotFound,
    /// Nothing.
    Final,
}

impl From<Failure> for Refusal {
    fn from(failure: Failure) -> Self {
        Self { failure, why: Why::Final, permissions: Vec::new() }
    }
}

impl From<ErrorCode> for Refusal {
    fn from(code: ErrorCode) -> Self {
        Failure::from(code).into()
    }
}

#[derive(Deserialize)]
struct Nested {
    #[serde(rename = "ErrorCode", alias = "errorCode", alias = "code")]
    code: Option<String>,
    #[serde(rename = "Message", alias = "message")]
    message: Option<String>,
}

impl Told {
    /// Reads an error body as far as it can be read; one that is no JSON says nothing.
    pub(super) fn read(body: &[u8]) -> Self {
        let body: Value = serde_json::from_slice(body).unwrap_or_default();
        let error = &body["error"];
        let inner = [&error["innerError"], &error["innererror"]].into_iter().find(|inner| inner.is_object());
        let mut told = Self {
            code: owned(&error["code"]),
            request_id: inner.and_then(|inner| owned(&inner["request-id"])),
            text: owned(&error["message"]).unwrap_or_default(),
        };
        told.unwrap_message();
        told
    }

    fn unwrap_message(&mut self) {
        for _ in 0..MOST_LEVELS {
            let Ok(nested) = serde_json::from_str::<Nested>(&self.text) else { return };
            self.code = nested.code.or(self.code.take());
            let Some(message) = nested.message else { return };
            self.text = message;
        }
    }

    fn code_is(&self, code: &str) -> bool {
        self.code.as_deref() == Some(code)
    }

    fn says(&self, words: &str) -> bool {
        self.text.contains(words) || self.code.as_deref().is_some_and(|code| code.contains(words))
    }

    /// Whether a 401 means "you may not", which no new token changes.
    pub(super) fn means_forbidden(&self) -> bool {
        self.code_is("Forbidden")
    }

    /// What a run records of this answer.
    pub(super) fn failure(&self, status: u16, request_id: Option<&str>) -> Failure {
        let request_id = request_id.or(self.request_id.as_deref());
        Failure::from_graph(self.error_code(status), status, self.code.as_deref(), request_id)
    }

    /// The same, with what a list can make of it.
    pub(super) fn refusal(&self, status: u16, request_id: Option<&str>) -> Refusal {
        let select = ["Could not find a property named", "Parsing OData Select and Expand failed"];
        let why = match status {
            400 if select.into_iter().any(|words| self.says(words)) => Why::Select,
            404 => Why::NotFound,
            _ => Why::Final,
        };
        let failure = self.failure(status, request_id);
        let permissions = if failure.code == ErrorCode::GraphForbidden { self.permissions() } else { Vec::new() };
        Refusal { failure, why, permissions }
    }

    /// The permissions that the message names. What is taken from it looks like `Word.Read.All` and like nothing else,
    /// so that nothing else of it gets out.
    fn permissions(&self) -> Vec<String> {
        let words = self.text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '.' || c == '-'));
        let permissions: BTreeSet<&str> = words.filter(|word| is_read_permission(word)).collect();
        permissions.into_iter().map(str::to_owned).collect()
    }

    fn error_code(&self, status: u16) -> ErrorCode {
        let unknown_path = ["Resource not found for the segment", "No method match route template"];
        match status {
            401 if self.means_forbidden() => ErrorCode::GraphForbidden,
            401 => ErrorCode::GraphUnauthorized,
            403 => ErrorCode::GraphForbidden,
            404 => ErrorCode::GraphUnsupported,
            400 if unknown_path.into_iter().any(|words| self.says(words)) => ErrorCode::GraphUnsupported,
            400 if self.says("Request not applicable to target tenant") => ErrorCode::GraphNotApplicable,
            429 | 503 | 509 => ErrorCode::GraphThrottled,
            408 | 500..=599 => ErrorCode::GraphUnavailable,
            400..=499 => ErrorCode::GraphBadRequest,
            _ => ErrorCode::GraphBadResponse,
        }
    }
}

/// This daemon never asks for more than reading, so permissions to write are no advice.
fn is_read_permission(word: &str) -> bool {
    let Some(resource) = word.strip_suffix(".Read.All") else { return false };
    (1..=64).contains(&resource.len())
        && !resource.contains("eyJ")
        && resource.bytes().all(|b| b.is_ascii_alphabetic() || b == b'-' || b == b'.')
}

fn owned(value: &Value) -> Option<String> {
    value.as_str().filter(|text| !text.is_empty()).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    const ID: &str = "5b1c1d5e-0000-4000-8000-00000000000a";

    fn told(code: &str, message: &str) -> Told {
        let body = json!({"error": {"code": code, "message": message, "innerError": {"request-id": ID, "date": "x"}}});
        Told::read(body.to_string().as_bytes())
    }

    /// Intune's own JSON text for `message`.
    fn intune(message: &str) -> String {
        let url = "Url: https://fef.example.invalid/FE/deviceManagement/x?api-version=1";
        json!({"_version": 3, "Message": format!("{message} - {url}"), "CustomApiErrorPhrase": "", "RetryAfter": null})
            .to_string()
    }

    fn judged(status: u16, code: &str, message: &str) -> (ErrorCode, Why) {
        let refusal = told(code, message).refusal(status, None);
        (refusal.failure.code, refusal.why)
    }

    #[test]
    fn a_forbidden_inside_a_401_is_found_at_any_depth() {
        let once = json!({"ErrorCode": "Forbidden", "Message": "no"}).to_string();
        let twice = json!({"ErrorCode": "Forbidden", "Message": intune("An error has occurred")}).to_string();
        let thrice = json!({"Message": twice}).to_string();
        for message in [once, twice, thrice] {
            let told = told("UnknownError", &message);
            assert!(told.means_forbidden());
            let failure = told.failure(401, None);
            assert_eq!(failure.code, ErrorCode::GraphForbidden);
            assert_eq!(failure.graph_code.as_deref(), Some("Forbidden"));
        }
        let expired = told("InvalidAuthenticationToken", "Access token has expired or is not yet valid.");
        assert!(!expired.means_forbidden());
        assert_eq!(expired.failure(401, None).code, ErrorCode::GraphUnauthorized);
    }

    #[test]
    fn each_kind_of_refusal_has_its_code() {
        let missing = intune("Application is not authorized to perform this operation.");
        let cases = [
            (403, "Forbidden", missing.as_str(), ErrorCode::GraphForbidden, Why::Final),
            (400, "BadRequest", "Resource not found for the segment 'x'.", ErrorCode::GraphUnsupported, Why::Final),
            (400, "No method match route template", "", ErrorCode::GraphUnsupported, Why::Final),
            (400, "BadRequest", "Request not applicable to target tenant.", ErrorCode::GraphNotApplicable, Why::Final),
            (404, "ResourceNotFound", "", ErrorCode::GraphUnsupported, Why::NotFound),
            (400, "InternalError", "An error has occurred", ErrorCode::GraphBadRequest, Why::Final),
            (409, "Conflict", "", ErrorCode::GraphBadRequest, Why::Final),
            (429, "TooManyRequests", "", ErrorCode::GraphThrottled, Why::Final),
            (503, "serviceNotAvailable", "", ErrorCode::GraphThrottled, Why::Final),
            (504, "UnknownError", "", ErrorCode::GraphUnavailable, Why::Final),
            (500, "InternalError", "", ErrorCode::GraphUnavailable, Why::Final),
            (302, "", "", ErrorCode::GraphBadResponse, Why::Final),
        ];
        for (status, code, message, expected, why) in cases {
            assert_eq!(judged(status, code, message), (expected, why), "{status} {code} {message}");
        }
    }

    #[test]
    fn a_refused_select_is_told_from_other_bad_requests() {
        let plain = "Parsing OData Select and Expand failed: Could not find a property named 'x' on type 'y'.";
        assert_eq!(judged(400, "BadRequest", plain), (ErrorCode::GraphBadRequest, Why::Select));
        assert_eq!(judged(400, "BadRequest", &intune(plain)).1, Why::Select);
        assert_eq!(judged(400, "BadRequest", "Invalid filter clause").1, Why::Final);
        assert_eq!(judged(403, "Forbidden", plain).1, Why::Final);
    }

    #[test]
    fn ids_come_from_the_header_or_the_body_and_free_text_goes_no_further() {
        let header = "5b1c1d5e-0000-4000-8000-00000000000b";
        assert_eq!(told("x", "").failure(500, Some(header)).request_id.as_deref(), Some(header));
        assert_eq!(told("x", "").failure(500, None).request_id.as_deref(), Some(ID));
        let failure = told("see https://host/?sig=1", &intune("Bearer abc")).failure(400, None);
        assert_eq!(failure.graph_code, None);
        assert!(!serde_json::to_string(&failure).unwrap().contains("://"));
    }

    #[test]
    fn the_permissions_that_graph_names_are_kept_and_nothing_else() {
        let message = "Application must have one of the following scopes: DeviceManagementApps.Read.All, \
                       DeviceManagementApps.ReadWrite.All, see https://x/eyJhbGciOi.Read.All?y=A1.Read.All .Read.All";
        let refusal = told("Forbidden", &intune(message)).refusal(403, None);
        assert_eq!(refusal.permissions, ["DeviceManagementApps.Read.All"]);
        assert!(told("BadRequest", message).refusal(400, None).permissions.is_empty());
    }

    #[test]
    fn a_body_that_is_no_graph_error_says_nothing() {
        for body in [&b""[..], b"<html>", b"null", br#"{"error":"invalid_client"}"#, br#"{"error":{"code":7}}"#] {
            let failure = Told::read(body).failure(403, None);
            assert_eq!((failure.code, failure.graph_code), (ErrorCode::GraphForbidden, None));
        }
    }

    const WORDS: [&str; 14] = [
        "Forbidden",
        "eyJhbGciOiJub25lIn0.e30.c2ln",
        "Bearer ",
        "https://host/?sig=hidden",
        "DeviceManagementApps.Read.All",
        "Could not find a property named",
        "hidden@example.com",
        ".Read.All",
        "{\"Message\":\"",
        "\"}",
        "\\u00",
        "\n",
        " ",
        "x",
    ];

    fn words() -> impl Strategy<Value = String> {
        prop::collection::vec(prop::sample::select(&WORDS), 0..6).prop_map(|words| words.concat())
    }

    proptest! {
        #[test]
        fn whatever_an_error_body_says_only_plain_words_of_it_are_recorded(
            status in 300_u16..600, code in words(), message in words(), levels in 0..5, id in words(),
            key in prop::sample::select(&["Message", "message", "other"]),
            damage in prop::option::of((any::<prop::sample::Index>(), prop::sample::select(b"\"{}\\ \0\xff".to_vec()))),
        ) {
            let message = (0..levels).fold(message, |inner, _| json!({ "ErrorCode": code, key: inner }).to_string());
            let body = json!({"error": {"code": code, "message": message, "innerError": {"request-id": id}}});
            let mut body = body.to_string().into_bytes();
            if let Some((at, byte)) = damage {
                let at = at.index(body.len());
                body[at] = byte;
            }
            let refusal = Told::read(&body).refusal(status, Some(&id));
            let recorded = format!("{}{:?}", json!(refusal.failure), refusal.permissions);
            for never in ["eyJ", "://", "@", "sig=", "Bearer", "\\n"] {
                prop_assert!(!recorded.contains(never), "{never} in {recorded}");
            }
            prop_assert!(recorded.len() < 700, "{}", recorded.len());
        }
    }
}
