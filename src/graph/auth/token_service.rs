//! Transport of `azure_identity` to the token service, with bounds and a record of what went wrong.
//!
//! The vendor's errors keep neither the reason of a failed connection nor the status of a response that is not JSON.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::Arc;

use azure_core::error::{Error, ErrorKind};
use azure_core::http::headers::{HeaderName, HeaderValue, Headers};
use azure_core::http::request::Body;
use azure_core::http::{AsyncRawResponse, HttpClient, Request};
use parking_lot::Mutex;
use reqwest::header::HeaderMap;
use reqwest::{Client, Response};
use serde_json::{Map, Value};

use crate::domain::clock::wall_clock_unix_s;
use crate::graph::transport;

/// Upper bound of a response of the token service, which has a few kilobytes.
const MAX_BODY_BYTES: usize = 256 << 10;
/// Upper bound of a token's lifetime; Microsoft issues no token for more than 24 hours.
const MAX_LIFETIME_S: i64 = 24 * 3_600;
const BYTE_ORDER_MARK: &[u8] = b"\xEF\xBB\xBF";

/// HTTP client of one credential, which makes one request for a token.
#[derive(Debug, Clone)]
pub(super) struct TokenServiceClient {
    http: Client,
    proxy: String,
    /// Problem of the last request, in our own words.
    problem: Arc<Mutex<Option<String>>>,
}

impl TokenServiceClient {
    pub(super) fn new(http: Client, proxy: &str) -> Self {
        Self { http, proxy: proxy.to_owned(), problem: Arc::default() }
    }

    /// Problem of the last request: no connection, or a response that is not the token service's.
    pub(super) fn problem(&self) -> Option<String> {
        self.problem.lock().clone()
    }

    fn fail(&self, problem: String) -> Error {
        *self.problem.lock() = Some(problem.clone());
        Error::with_message(ErrorKind::Io, problem)
    }

    async fn send(&self, request: &Request) -> azure_core::Result<AsyncRawResponse> {
        let method = reqwest::Method::from_bytes(request.method().as_str().as_bytes())
            .map_err(|_| self.fail("the request has an unknown method".to_owned()))?;
        let Body::Bytes(body) = request.body().clone() else {
            return Err(self.fail("the request has no plain body".to_owned()));
        };
        let mut builder = self.http.request(method, request.url().clone()).body(body);
        for (name, value) in request.headers().iter().filter(|(name, _)| name.as_str() != "user-agent") {
            builder = builder.header(name.as_str(), value.as_str());
        }
        let response = builder.send().await.map_err(|error| self.fail(transport::describe(&error, &self.proxy)))?;
        let (status, headers) = (response.status().as_u16(), headers_of(response.headers()));
        let body = self.read(response).await?;
        Ok(AsyncRawResponse::from_bytes(status.into(), headers, body))
    }

    async fn read(&self, mut response: Response) -> azure_core::Result<Vec<u8>> {
        let (status, mut body) = (response.status().as_u16(), Vec::new());
        while let Some(chunk) =
            response.chunk().await.map_err(|error| self.fail(transport::describe(&error, &self.proxy)))?
        {
            body.extend_from_slice(&chunk);
            if body.len() > MAX_BODY_BYTES {
                return Err(self.fail(format!("the response is larger than {MAX_BODY_BYTES} bytes")));
            }
        }
        let text = body.strip_prefix(BYTE_ORDER_MARK).unwrap_or(&body);
        match serde_json::from_slice::<Map<String, Value>>(text) {
            Ok(mut answer) => {
                normalise(&mut answer, wall_clock_unix_s());
                Ok(Value::Object(answer).to_string().into_bytes())
            }
            Err(_) => {
                let problem =
                    format!("HTTP {status} with a body that is not JSON: a proxy or another server responded");
                Err(self.fail(problem))
            }
        }
    }
}

/// Makes a response safe for the vendor's code, which adds any `expires_in` to the time (and panics over a large one),
/// rejects an `expires_on` after the year 9999 and believes any other, and finds the `AADSTS` number in `error_codes` only.
fn normalise(answer: &mut Map<String, Value>, now_unix_s: i64) {
    if let Some(lifetime) = answer.get("expires_in").and_then(Value::as_f64)
        && !(0.0..=MAX_LIFETIME_S as f64).contains(&lifetime)
    {
        answer.insert("expires_in".to_owned(), Value::from(MAX_LIFETIME_S));
    }
    // Managed identities send a time, as text.
    let latest = now_unix_s.saturating_add(MAX_LIFETIME_S);
    let expires_on = answer.get("expires_on").and_then(Value::as_str).and_then(|text| text.parse::<f64>().ok());
    if expires_on.is_some_and(|time| time > latest as f64) {
        answer.insert("expires_on".to_owned(), Value::from(latest.to_string()));
    }
    let has_number = answer.get("error_codes").and_then(Value::as_array).is_some_and(|codes| !codes.is_empty());
    let number = answer.get("error_description").and_then(Value::as_str).and_then(|text| {
        let digits: String = text.strip_prefix("AADSTS")?.chars().take_while(char::is_ascii_digit).collect();
        digits.parse::<u32>().ok()
    });
    if let Some(number) = number.filter(|_| !has_number) {
        answer.insert("error_codes".to_owned(), Value::from(vec![number]));
    }
}

/// Headers of a response; the lines of a repeated header are one value, joined by commas.
fn headers_of(headers: &HeaderMap) -> Headers {
    let named = headers.keys().filter_map(|name| {
        let lines: Vec<&str> = headers.get_all(name).iter().filter_map(|line| line.to_str().ok()).collect();
        let value = HeaderValue::from(lines.join(", "));
        (!lines.is_empty()).then(|| (HeaderName::from(name.as_str().to_owned()), value))
    });
    named.collect::<HashMap<_, _>>().into()
}

/// Spelled out because the vendor's trait uses a macro of a crate that nothing else here needs.
impl HttpClient for TokenServiceClient {
    fn execute_request<'this, 'request, 'answer>(
        &'this self,
        request: &'request Request,
    ) -> Pin<Box<dyn Future<Output = azure_core::Result<AsyncRawResponse>> + Send + 'answer>>
    where
        'this: 'answer,
        'request: 'answer,
        Self: 'answer,
    {
        Box::pin(self.send(request))
    }
}

#[cfg(test)]
mod tests {
    use azure_core::http::headers::RETRY_AFTER;
    use serde_json::json;

    use super::*;

    fn normalised(answer: Value) -> Value {
        let Value::Object(mut answer) = answer else { panic!("no object") };
        normalise(&mut answer, 1_000_000);
        answer.into()
    }

    #[test]
    fn lifetimes_are_bounded() {
        for (given, kept) in
            [(json!(3_599), 3_599), (json!(1e15), 86_400), (json!(-1), 86_400), (json!(u64::MAX), 86_400)]
        {
            assert_eq!(normalised(json!({ "expires_in": given }))["expires_in"], kept);
        }
    }

    #[test]
    fn expiry_times_are_bounded() {
        for (given, kept) in [
            ("1003600", "1003600"),
            ("1086400", "1086400"),
            ("1086401", "1086400"),
            ("253402300800", "1086400"),
            ("99999999999999999999", "1086400"),
            ("-1", "-1"),
        ] {
            assert_eq!(normalised(json!({ "expires_on": given }))["expires_on"], kept);
        }
    }

    #[test]
    fn the_lines_of_a_repeated_header_are_one_value() {
        let mut headers = HeaderMap::new();
        for line in ["2", "5"] {
            headers.append("retry-after", line.parse().unwrap());
        }
        headers.insert("date", "Mon, 23 Nov 2026 10:00:00 GMT".parse().unwrap());
        let headers = headers_of(&headers);
        assert_eq!(headers.get_optional_str(&RETRY_AFTER), Some("2, 5"));
        let date = headers.get_optional_str(&HeaderName::from_static("date"));
        assert_eq!(date, Some("Mon, 23 Nov 2026 10:00:00 GMT"));
    }

    #[test]
    fn the_number_of_an_error_is_found_in_its_description() {
        let error = json!({"error": "invalid_client", "error_description": "AADSTS7000215: Invalid client secret."});
        assert_eq!(normalised(error)["error_codes"], json!([7_000_215]));
        let both = json!({"error_codes": [90_002], "error_description": "AADSTS1: x"});
        assert_eq!(normalised(both)["error_codes"], json!([90_002]));
    }
}
