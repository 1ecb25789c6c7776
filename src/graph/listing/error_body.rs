//! Error bodies of Graph and their classification. Graph's texts are judged here and go no further.

use std::collections::BTreeSet;

use serde::Deserialize;
use serde_json::Value;
use serde_json::value::RawValue;

use super::error::{ListError, Recovery};
use super::phrases::{EXPIRED_TOKEN, NOT_FOUND, NOT_LICENSED, UNKNOWN_PATH, contains_any};
use crate::domain::failure::{ErrorCode, Failure};

/// UTF-8 byte order mark, which some gateways put before a body.
pub(in crate::graph) const BYTE_ORDER_MARK: &[u8] = b"\xEF\xBB\xBF";

/// Intune puts JSON text into `message`, gateways put that into another one: deeper nesting has not been seen.
const MAX_NESTING: usize = 3;

/// Parsed error body. It has no `Debug`, so that no log can contain what Graph wrote.
pub(in crate::graph) struct ErrorBody {
    /// Origin of the body.
    source: Source,
    /// Innermost code: what really happened.
    code: Option<String>,
    /// Graph's id of the request, if the body has one.
    request_id: Option<String>,
    /// Innermost message.
    text: String,
}

/// Origin of an error response, as far as its body shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    /// An OData error: Graph itself responded.
    Graph,
    /// No body.
    Empty,
    /// Anything else, as an HTML page: a proxy or gateway responded, and its status says nothing about Graph.
    Gateway,
}

/// Longest error inside another text that is parsed.
const MAX_EMBEDDED_BYTES: usize = 64 << 10;

#[derive(Deserialize)]
struct Nested {
    #[serde(rename = "ErrorCode", alias = "errorCode", alias = "code")]
    code: Option<String>,
    #[serde(rename = "Message", alias = "message")]
    message: Option<String>,
}

/// Code of the last OData error within a text that is not an error body as a whole.
pub(in crate::graph) fn embedded_code(text: &str) -> Option<String> {
    const KEY: &str = "\"error\"";
    let found = text.rmatch_indices(KEY).filter(|(at, _)| !text[..*at].ends_with('\\')).find_map(|(at, _)| {
        let value = text[at + KEY.len()..].trim_start().strip_prefix(':')?.trim_start();
        let error = serde_json::Deserializer::from_str(value).into_iter::<&RawValue>().next()?.ok()?.get();
        parse_error(error)
    })?;
    found.code
}

/// Code of an OData error that stands in place of an object.
pub(in crate::graph) fn code_of(error: &str) -> Option<String> {
    parse_error(error)?.code
}

fn parse_error(error: &str) -> Option<ErrorBody> {
    // A parsed value takes many times the memory of its text.
    let error: Value = (error.len() <= MAX_EMBEDDED_BYTES).then(|| serde_json::from_str(error).ok())??;
    error.get("code")?.is_string().then(|| ErrorBody::of(&error))
}

impl ErrorBody {
    /// Parses an error body as far as possible.
    pub(in crate::graph) fn parse(body: &[u8]) -> Self {
        let body = body.strip_prefix(BYTE_ORDER_MARK).unwrap_or(body);
        let is_empty = body.trim_ascii().is_empty();
        let body: Value = serde_json::from_slice(body).unwrap_or_default();
        // Older services of Microsoft name the same object `odata.error`.
        let error = [&body["error"], &body["odata.error"]].into_iter().find(|error| error.is_object());
        let parsed = Self::of(error.unwrap_or(&Value::Null));
        let source = if is_empty { Source::Empty } else { parsed.source };
        Self { source, ..parsed }
    }

    fn of(error: &Value) -> Self {
        let inner = [&error["innerError"], &error["innererror"]].into_iter().find(|inner| inner.is_object());
        // In OData 3 the message is an object with its language.
        let message = [&error["message"], &error["message"]["value"]].into_iter().find_map(non_empty);
        let is_error = error["code"].is_string() || error["message"].is_string() || message.is_some();
        let mut parsed = Self {
            source: if is_error { Source::Graph } else { Source::Gateway },
            code: non_empty(&error["code"]),
            request_id: inner.and_then(|inner| non_empty(&inner["request-id"])),
            text: message.unwrap_or_default(),
        };
        parsed.unwrap_message();
        parsed
    }

    fn unwrap_message(&mut self) {
        for _ in 0..MAX_NESTING {
            let Ok(nested) = serde_json::from_str::<Nested>(&self.text) else { return };
            self.code = nested.code.or(self.code.take());
            let Some(message) = nested.message else { return };
            self.text = message;
        }
    }

    /// Returns `true` if code or message contains one of `phrases`, which are in lower case.
    fn contains(&self, phrases: &[&str]) -> bool {
        contains_any(&[self.code.as_deref().unwrap_or_default(), &self.text], phrases)
    }

    /// Returns `true` if a 401 means "forbidden", which no new token changes.
    pub(in crate::graph) fn means_forbidden(&self) -> bool {
        self.code.as_deref() == Some("Forbidden") || self.means_not_licensed()
    }

    /// Returns `true` if Graph says that the tenant lacks a licence. Names of permissions are not words of a sentence:
    /// `LicenseAssignment.Read.All` is not about a missing licence.
    fn means_not_licensed(&self) -> bool {
        let words: Vec<&str> = self.text.split_whitespace().filter(|word| !word.contains(".Read")).collect();
        let (code, text) = (self.code.as_deref().unwrap_or_default(), words.join(" "));
        self.source == Source::Graph && contains_any(&[code, &text], &NOT_LICENSED)
    }

    /// Returns `true` if Graph says that nothing exists under the link: a bare 404 may come from a gateway.
    pub(in crate::graph) fn proves_absence(&self, status: u16) -> bool {
        status == 404 && self.source == Source::Graph && self.contains(&NOT_FOUND)
    }

    /// Failure that a run records for this response.
    pub(in crate::graph) fn failure(&self, status: u16, request_id: Option<&str>, throttled: bool) -> Failure {
        let request_id = request_id.or(self.request_id.as_deref());
        let code = if throttled { ErrorCode::GraphThrottled } else { self.error_code(status) };
        Failure::from_graph(code, status, self.code.as_deref(), request_id)
    }

    /// Error of a list for a response that is not throttling.
    pub(in crate::graph) fn list_error(&self, status: u16, request_id: Option<&str>) -> ListError {
        let failure = self.failure(status, request_id, false);
        let recovery = match (failure.code, status) {
            _ if self.source == Source::Graph && self.token_expired(status) => Recovery::Restart,
            (ErrorCode::GraphUnsupported, 404) => Recovery::NotFound,
            (ErrorCode::GraphBadRequest, _) | (ErrorCode::GraphUnavailable, 500 | 501) => Recovery::WithoutOptions,
            _ => Recovery::None,
        };
        let permissions = if failure.code == ErrorCode::GraphForbidden { self.permissions() } else { Vec::new() };
        ListError { failure, recovery, detail: None, permissions }
    }

    fn token_expired(&self, status: u16) -> bool {
        status == 410 || (matches!(status, 400 | 404 | 500) && self.contains(&EXPIRED_TOKEN))
    }

    /// Permissions named in the message. Only words that look like `Word.Read.All` are taken, so that nothing else of
    /// the message gets out.
    fn permissions(&self) -> Vec<String> {
        let words = self.text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '.' || c == '-'));
        let permissions: BTreeSet<&str> = words.filter(|word| is_read_permission(word)).collect();
        permissions.into_iter().map(str::to_owned).collect()
    }

    fn error_code(&self, status: u16) -> ErrorCode {
        match status {
            429 | 509 => ErrorCode::GraphThrottled,
            408 | 500..=599 => ErrorCode::GraphUnavailable,
            // The status of a gateway says nothing about what Graph knows or allows.
            400..=499 if self.source == Source::Gateway => ErrorCode::GraphBadResponse,
            400 if self.contains(&UNKNOWN_PATH) => ErrorCode::GraphUnsupported,
            400..=403 if self.means_not_licensed() => ErrorCode::GraphNotApplicable,
            401 if !self.means_forbidden() => ErrorCode::GraphUnauthorized,
            401 | 403 => ErrorCode::GraphForbidden,
            404 if self.proves_absence(status) => ErrorCode::GraphUnsupported,
            404 => ErrorCode::GraphBadResponse,
            400..=499 => ErrorCode::GraphBadRequest,
            _ => ErrorCode::GraphBadResponse,
        }
    }
}

/// Permissions to write are not suggested: this daemon only reads.
fn is_read_permission(word: &str) -> bool {
    let Some(resource) = word.strip_suffix(".Read.All") else { return false };
    (1..=64).contains(&resource.len())
        && !resource.contains("eyJ")
        && resource.bytes().all(|b| b.is_ascii_alphabetic() || b == b'-' || b == b'.')
}

fn non_empty(value: &Value) -> Option<String> {
    value.as_str().filter(|text| !text.is_empty()).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    const ID: &str = "5b1c1d5e-0000-4000-8000-00000000000a";

    fn error_body(code: &str, message: &str) -> ErrorBody {
        let body = json!({"error": {"code": code, "message": message, "innerError": {"request-id": ID, "date": "x"}}});
        ErrorBody::parse(body.to_string().as_bytes())
    }

    /// Intune's own JSON text for `message`.
    fn intune(message: &str) -> String {
        let url = "Url: https://fef.example.invalid/FE/deviceManagement/x?api-version=1";
        json!({"_version": 3, "Message": format!("{message} - {url}"), "CustomApiErrorPhrase": "", "RetryAfter": null})
            .to_string()
    }

    fn judged(status: u16, code: &str, message: &str) -> (ErrorCode, Recovery) {
        let error = error_body(code, message).list_error(status, None);
        (error.failure.code, error.recovery)
    }

    #[test]
    fn a_forbidden_inside_a_401_is_found_at_any_depth() {
        let once = json!({"ErrorCode": "Forbidden", "Message": "no"}).to_string();
        let twice = json!({"ErrorCode": "Forbidden", "Message": intune("An error has occurred")}).to_string();
        let thrice = json!({"Message": twice}).to_string();
        for message in [once, twice, thrice] {
            let body = error_body("UnknownError", &message);
            assert!(body.means_forbidden());
            let failure = body.failure(401, None, false);
            assert_eq!(failure.code, ErrorCode::GraphForbidden);
            assert_eq!(failure.graph_code.as_deref(), Some("Forbidden"));
        }
        let expired = error_body("InvalidAuthenticationToken", "Access token has expired or is not yet valid.");
        assert!(!expired.means_forbidden());
        assert_eq!(expired.failure(401, None, false).code, ErrorCode::GraphUnauthorized);
    }

    #[test]
    fn each_kind_of_error_has_its_code() {
        use ErrorCode::{
            GraphBadRequest, GraphBadResponse, GraphForbidden, GraphThrottled, GraphUnavailable, GraphUnsupported,
        };
        let missing = intune("Application is not authorized to perform this operation.");
        let cases = [
            (403, "Forbidden", missing.as_str(), GraphForbidden, Recovery::None),
            (400, "BadRequest", "Resource not found for the segment 'x'.", GraphUnsupported, Recovery::None),
            (400, "No method match route template", "", GraphUnsupported, Recovery::None),
            (404, "ResourceNotFound", "", GraphUnsupported, Recovery::NotFound),
            (404, "UnknownError", "", GraphBadResponse, Recovery::None),
            (400, "InternalError", "An error has occurred", GraphBadRequest, Recovery::WithoutOptions),
            (409, "Conflict", "", GraphBadRequest, Recovery::WithoutOptions),
            (429, "TooManyRequests", "", GraphThrottled, Recovery::None),
            (503, "serviceNotAvailable", "", GraphUnavailable, Recovery::None),
            (504, "UnknownError", "", GraphUnavailable, Recovery::None),
            (500, "InternalError", "", GraphUnavailable, Recovery::WithoutOptions),
            (501, "NotImplemented", "", GraphUnavailable, Recovery::WithoutOptions),
            (302, "", "", GraphBadResponse, Recovery::None),
        ];
        for (status, code, message, expected, recovery) in cases {
            assert_eq!(judged(status, code, message), (expected, recovery), "{status} {code} {message}");
        }
        let failure = error_body("serviceNotAvailable", "").failure(503, None, true);
        assert_eq!(failure.code, GraphThrottled, "a 503 with Retry-After");
    }

    #[test]
    fn a_missing_licence_is_not_applicable_whatever_the_words() {
        let cases = [
            (400, "BadRequest", "Request not applicable to target tenant."),
            (
                403,
                "Authentication_RequestFromNonPremiumTenantOrB2CTenant",
                "Neither tenant is B2C or tenant doesn't have premium license",
            ),
            (403, "AccessDenied", "Your tenant is not licensed for this feature."),
            (403, "Forbidden", "Tenant does not have the required licence."),
            (403, "Forbidden", "The tenant has no valid service plan for this operation."),
            (403, "TenantNotLicensed", ""),
            (401, "UnknownError", "The tenant is unlicensed."),
            (400, "BadRequest", "Tenant does not have a SPO license."),
            (403, "Forbidden", "The tenant was not provisioned for Windows 365."),
            (403, "Forbidden", "The tenant does not have an Intune subscription."),
            (403, "AadPremiumRequired", "This feature requires Microsoft Entra ID P1."),
            (400, "FeatureNotAvailable", "The feature is not enabled for this tenant."),
            (403, "SubscriptionNotFound", ""),
        ];
        for (status, code, message) in cases {
            let expected = (ErrorCode::GraphNotApplicable, Recovery::None);
            assert_eq!(judged(status, code, message), expected, "{code} {message}");
            assert_eq!(judged(status, code, &intune(message)), expected, "{code} {message}, nested");
        }
        let scopes =
            "Application must have one of the following scopes: LicenseAssignment.Read.All, Organization.Read.All";
        assert_eq!(judged(403, "Forbidden", scopes).0, ErrorCode::GraphForbidden);
        let proxy = ErrorBody::parse(b"<html>Your license does not allow this site</html>").list_error(403, None);
        assert_eq!(proxy.failure.code, ErrorCode::GraphBadResponse);
    }

    #[test]
    fn absence_and_refusal_need_an_error_of_graph_itself() {
        let html = b"<html><body>404 Not Found</body></html>";
        for body in [&html[..], b"", b"not found", b"{}", br#"{"message":"not found"}"#, br#"{"error":"not found"}"#] {
            let error = ErrorBody::parse(body).list_error(404, None);
            assert_eq!((error.failure.code, error.recovery), (ErrorCode::GraphBadResponse, Recovery::None));
            for status in [400, 401, 403] {
                let code = ErrorBody::parse(body).list_error(status, None).failure.code;
                assert!(body.is_empty() || code == ErrorCode::GraphBadResponse, "{status} {code}");
            }
        }
        for body in [
            &br#"{"odata.error":{"code":"Request_ResourceNotFound","message":{"lang":"en","value":"x"}}}"#[..],
            br#"{"error":{"code":"x","message":{"lang":"en","value":"Resource not found."}}}"#,
        ] {
            assert_eq!(ErrorBody::parse(body).list_error(404, None).recovery, Recovery::NotFound);
        }
        let with_mark = b"\xEF\xBB\xBF{\"error\":{\"code\":\"Request_ResourceNotFound\",\"message\":\"\"}}";
        assert_eq!(ErrorBody::parse(with_mark).list_error(404, None).recovery, Recovery::NotFound);
    }

    #[test]
    fn an_expired_page_token_is_recognised() {
        let cases = [
            (400, "Directory_ExpiredPageToken", "The specified page token value has expired."),
            (400, "BadRequest", "Skiptoken is not valid."),
            (410, "resyncRequired", ""),
        ];
        for (status, code, message) in cases {
            assert_eq!(judged(status, code, message).1, Recovery::Restart, "{code}");
        }
    }

    #[test]
    fn request_ids_are_kept_and_free_text_is_not() {
        let header = "5b1c1d5e-0000-4000-8000-00000000000b";
        assert_eq!(error_body("x", "").failure(500, Some(header), false).request_id.as_deref(), Some(header));
        assert_eq!(error_body("x", "").failure(500, None, false).request_id.as_deref(), Some(ID));
        let failure = error_body("see https://host/?sig=1", &intune("Bearer abc")).failure(400, None, false);
        assert_eq!(failure.graph_code, None);
        assert!(!serde_json::to_string(&failure).unwrap().contains("://"));
    }

    #[test]
    fn named_permissions_are_kept_and_nothing_else() {
        let message = "Application must have one of the following scopes: DeviceManagementApps.Read.All, \
                       DeviceManagementApps.ReadWrite.All, see https://x/eyJhbGciOi.Read.All?y=A1.Read.All .Read.All";
        let error = error_body("Forbidden", &intune(message)).list_error(403, None);
        assert_eq!(error.permissions, ["DeviceManagementApps.Read.All"]);
        assert!(error_body("BadRequest", message).list_error(400, None).permissions.is_empty());
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
        fn only_plain_words_of_an_error_body_are_recorded(
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
            let error = ErrorBody::parse(&body).list_error(status, Some(&id));
            let recorded = format!("{}{:?}", json!(error.failure), error.permissions);
            for never in ["eyJ", "://", "@", "sig=", "Bearer", "\\n"] {
                prop_assert!(!recorded.contains(never), "{never} in {recorded}");
            }
            prop_assert!(recorded.len() < 700, "{}", recorded.len());
        }
    }
}
