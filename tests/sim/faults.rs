//! Effect of a rule's action on a response.

use std::time::Duration;

use axum::body::Bytes;
use serde_json::{Value, json};

use super::errors::{self, CallIds};
use super::limits::http_date_in;
use super::reply::{Delivery, Reply};
use super::rules::{Action, ErrorBody};
use super::text::percent_decode;

/// The answer that Graph gives instead of the right one, if the action is of that sort.
pub fn instead_of_graph(action: &Action, path: &str, ids: &CallIds) -> Option<Reply> {
    let reply = match action {
        Action::Status { status, retry_after, body } => {
            let reply = error_reply(*status, body, path, ids);
            match retry_after.as_deref().and_then(retry_after_value) {
                Some(value) => reply.with_header("retry-after", value),
                None => reply,
            }
        }
        Action::Forbidden { permission } => {
            let permission = permission.as_deref().unwrap_or_else(|| errors::likely_permission(path));
            Reply::error(403, "Forbidden", &errors::missing_permission(permission, path, ids), ids)
        }
        Action::NotLicensed => Reply::error(400, "BadRequest", "Request not applicable to target tenant.", ids),
        Action::UnauthorizedNested => Reply::error(401, "UnknownError", &errors::nested_forbidden(path, ids), ids),
        Action::ClaimsChallenge => claims_challenge(ids),
        Action::SecretInError { status } => {
            let status = status.unwrap_or(400);
            Reply::error(status, errors::usual(status).0, &errors::secret_message(), ids)
        }
        Action::WrongContent => {
            let html = Bytes::from_static(
                b"<!DOCTYPE html><html><body><h1>Our services aren't available right now</h1></body></html>",
            );
            Reply { content_type: "text/html", ..Reply::json(html) }
        }
        Action::Drop => Reply { delivery: Delivery::Never, ..Reply::usual_error(503, ids) },
        _ => return None,
    };
    Some(reply)
}

/// The same for the token endpoint, which has errors of its own.
pub fn instead_of_token(action: &Action, path: &str, ids: &CallIds) -> Option<Reply> {
    let body = match action {
        Action::Status { status, body: ErrorBody::Default, .. } => match status {
            401 => errors::token_error("invalid_client", 7_000_215, "Invalid client secret provided.", ids),
            400 => errors::token_error("unauthorized_client", 700_016, "The application was not found.", ids),
            429 => errors::token_error("temporarily_unavailable", 90_055, "Too many requests.", ids),
            _ => errors::token_error("temporarily_unavailable", 90_033, "A transient error has occurred.", ids),
        },
        Action::SecretInError { .. } => {
            errors::token_error("invalid_client", 7_000_215, &errors::secret_message(), ids)
        }
        _ => return instead_of_graph(action, path, ids),
    };
    let content_type = "application/json; charset=utf-8";
    instead_of_graph(action, path, ids).map(|reply| Reply { body, content_type, ..reply })
}

/// Delivery of the body, if the action changes it.
pub fn delivery(action: &Action) -> Option<Delivery> {
    match action {
        Action::Truncate { clean } => Some(Delivery::Half { clean: *clean }),
        Action::SlowBody { chunk_bytes, pause_ms } => {
            Some(Delivery::Drips { chunk_bytes: *chunk_bytes, pause_ms: *pause_ms })
        }
        Action::Drop => Some(Delivery::Never),
        _ => None,
    }
}

/// Changes the bytes of a body, if the action is about that.
pub fn change_body(action: &Action, reply: &mut Reply) {
    let body = &reply.body;
    let changed = match action {
        Action::Prefix { bytes } => [&bytes[..], body].concat(),
        Action::BreakOff { text } => [&body[..body.len() / 2], text.as_bytes()].concat(),
        Action::Insert { after, bytes } => {
            let found = body.windows(after.len()).position(|part| part == after.as_bytes());
            let at = found.map_or(body.len(), |at| at + after.len());
            [&body[..at], bytes, &body[at..]].concat()
        }
        _ => return,
    };
    reply.body = Bytes::from(changed);
    reply.gzip = None;
}

/// Refuses a request because of one of its query options, if the action is about that.
pub fn refused_option(action: &Action, query: &str, ids: &CallIds) -> Option<Reply> {
    let Action::RefuseOption { option, status, code } = action else { return None };
    let is_sent = query.split('&').any(|pair| percent_decode(pair).starts_with(&format!("{option}=")));
    is_sent.then(|| Reply::error(*status, code, "An error has occurred", ids))
}

/// Changes the objects of a page; says whether the action is of that sort.
pub fn changes_objects(action: &Action) -> bool {
    let kinds = [Action::Unclassified, Action::MissingId];
    kinds.contains(action) || matches!(action, Action::UnknownEnum { .. } | Action::ExtraObject { .. })
}

/// Does what [`changes_objects`] announced.
pub fn change_objects(action: &Action, ids: &CallIds, objects: &mut Vec<Value>) {
    match action {
        Action::UnknownEnum { property, value } => {
            for object in objects.iter_mut().filter_map(Value::as_object_mut) {
                if let Some(held) = object.get_mut(property) {
                    *held = Value::from(value.as_str());
                }
            }
        }
        Action::Unclassified => objects.push(json!({
            "@odata.type": "#microsoft.graph.somethingFromTheFuture",
            "id": ids.request,
            "displayName": "An object of a type that is unknown",
        })),
        Action::MissingId => {
            let mut object = objects.first().cloned().unwrap_or_else(|| json!({}));
            if let Some(object) = object.as_object_mut() {
                object.remove("id");
            }
            objects.push(object);
        }
        Action::ExtraObject { object } => objects.push(object.clone()),
        _ => {}
    }
}

fn error_reply(status: u16, body: &ErrorBody, path: &str, ids: &CallIds) -> Reply {
    let (code, message) = errors::usual(status);
    let inner = if message.is_empty() { "An error has occurred" } else { message };
    match body {
        ErrorBody::Default => Reply::error(status, code, message, ids),
        ErrorBody::Nested => Reply::error(status, code, &errors::intune_message(inner, path, ids), ids),
        ErrorBody::NestedTwice => Reply::error(status, code, &errors::intune_message_twice(inner, path, ids), ids),
        ErrorBody::Literal(text) => Reply { status, ..Reply::json(Bytes::from(text.clone())) },
    }
}

fn claims_challenge(ids: &CallIds) -> Reply {
    // The claims say: {"access_token":{"acrs":{"essential":true,"value":"cp1"}}}
    let challenge = "Bearer realm=\"\", authorization_uri=\"https://login.example.invalid/common/oauth2/authorize\", \
                     error=\"insufficient_claims\", \
                     claims=\"eyJhY2Nlc3NfdG9rZW4iOnsiYWNycyI6eyJlc3NlbnRpYWwiOnRydWUsInZhbHVlIjoiY3AxIn19fQ==\"";
    let message = "Continuous access evaluation resulted in challenge with result: InteractionRequired.";
    Reply::error(401, "InvalidAuthenticationToken", message, ids).with_header("www-authenticate", challenge.into())
}

fn retry_after_value(form: &str) -> Option<String> {
    match form.split_once(':') {
        Some(("date", seconds)) => {
            let ahead = seconds.trim().parse().unwrap_or(1.0_f64).max(0.0);
            Some(http_date_in(Duration::from_secs_f64(ahead)))
        }
        _ if form == "none" || form.is_empty() => None,
        _ => Some(form.to_owned()),
    }
}
