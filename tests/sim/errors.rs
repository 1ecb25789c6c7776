//! Error bodies in the forms that Graph, Intune and the token service send.

use axum::body::Bytes;
use serde_json::{Value, json};

use super::text::now_iso;

const NO_OPERATION: &str = "00000000-0000-0000-0000-000000000000";

/// The ids that an answer carries.
#[derive(Clone, Debug)]
pub struct CallIds {
    /// Made by the server.
    pub request: String,
    /// Sent by the client, or the server's own.
    pub client: String,
}

/// `{"error": {"code", "message", "innerError"}}`.
pub fn graph_error(code: &str, message: &str, ids: &CallIds) -> Bytes {
    let body = json!({"error": {
        "code": code,
        "message": message,
        "innerError": {"date": now_iso(), "request-id": ids.request, "client-request-id": ids.client},
    }});
    Bytes::from(body.to_string())
}

/// The code and the message that Graph uses with a status.
pub fn usual(status: u16) -> (&'static str, &'static str) {
    match status {
        400 => ("BadRequest", "The request is not valid."),
        401 => ("InvalidAuthenticationToken", "Access token has expired or is not yet valid."),
        403 => ("Forbidden", "Insufficient privileges to complete the operation."),
        404 => ("ResourceNotFound", "Resource could not be discovered."),
        405 => ("Request_BadRequest", "Specified HTTP method is not allowed for the request target."),
        429 => ("TooManyRequests", "Please retry again later."),
        500 => ("InternalError", "An internal server error has occurred."),
        503 => ("serviceNotAvailable", "The service is temporarily unavailable. Please try again later."),
        509 => ("activityLimitReached", "The bandwidth limit has been exceeded."),
        // A gateway timeout of Intune has no message.
        _ => ("UnknownError", ""),
    }
}

/// Intune's JSON text for the inside of `message`.
pub fn intune_message(message: &str, path: &str, ids: &CallIds) -> String {
    let bare = path.split_once('/').map_or(path, |(_, rest)| rest);
    let text = format!(
        "{message} - Operation ID (for customer support): {NO_OPERATION} - Activity ID: {} - Url: \
         https://fef.sim01.manage.example.invalid/StatelessSimulatedFEService/{bare}?api-version=2026-01-01",
        ids.request
    );
    intune_text(&text)
}

/// The same once more nested, as Intune's gateway does on timeouts.
pub fn intune_message_twice(message: &str, path: &str, ids: &CallIds) -> String {
    json!({"Message": intune_message(message, path, ids)}).to_string()
}

/// Intune's message in a 401 that no new token changes.
pub fn nested_forbidden(path: &str, ids: &CallIds) -> String {
    json!({"ErrorCode": "Forbidden", "Message": intune_message("An error has occurred", path, ids)}).to_string()
}

/// Intune's message for a missing permission.
pub fn missing_permission(permission: &str, path: &str, ids: &CallIds) -> String {
    let write = permission.replace(".Read.", ".ReadWrite.");
    let message = format!(
        "Application is not authorized to perform this operation. Application must have one of the following \
         scopes: {permission}, {write}"
    );
    intune_message(&message, path, ids)
}

/// A message full of things that must never reach a log or a row. All of them are made up.
pub fn secret_message() -> String {
    let jwt = "eyJ0eXAiOiJKV1QiLCJhbGciOiJSUzI1NiJ9.eyJhcHBpZCI6InNpbS1tYWRlLXVwIn0.c2ltLW1hZGUtdXAtc2lnbmF0dXJl";
    format!(
        "Upstream refused the call: GET https://secret-backend.example.invalid/path?sig=SimSecretSignature \
         Authorization: Bearer {jwt} client_secret=SimMadeUpSecret"
    )
}

/// The token endpoint's error, with its `AADSTS` number in the text.
pub fn token_error(error: &str, number: u32, text: &str, ids: &CallIds) -> Bytes {
    let when = now_iso().replace('T', " ") + "Z";
    let description =
        format!("AADSTS{number}: {text} Trace ID: {} Correlation ID: {} Timestamp: {when}", ids.request, ids.client);
    let body: Value = json!({
        "error": error,
        "error_description": description,
        "error_codes": [number],
        "timestamp": when,
        "trace_id": ids.request,
        "correlation_id": ids.client,
        "error_uri": format!("https://login.example.invalid/error?code={number}"),
    });
    Bytes::from(body.to_string())
}

/// A permission that a path is likely to need.
pub fn likely_permission(path: &str) -> &'static str {
    let has = |part: &str| path.contains(part);
    if has("deviceAppManagement") {
        "DeviceManagementApps.Read.All"
    } else if has("conditionalAccess") {
        "Policy.Read.All"
    } else if has("roleDefinitions") || has("roleScopeTags") || has("roleAssignments") {
        "DeviceManagementRBAC.Read.All"
    } else if has("Enrollment") || has("Onboarding") || has("Autopilot") {
        "DeviceManagementServiceConfig.Read.All"
    } else {
        "DeviceManagementConfiguration.Read.All"
    }
}

fn intune_text(message: &str) -> String {
    // Intune's own field order and line ends; a client that looks for them must find them.
    let quoted = Value::from(message).to_string();
    format!(
        "{{\r\n  \"_version\": 3,\r\n  \"Message\": {quoted},\r\n  \"CustomApiErrorPhrase\": \"\",\r\n  \
         \"RetryAfter\": null,\r\n  \"ErrorSourceService\": \"\",\r\n  \"HttpHeaders\": \"{{}}\"\r\n}}"
    )
}
