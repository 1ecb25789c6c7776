//! The sync request: parses message bytes to a validated value, or to a rejection that names the field.

use std::collections::BTreeSet;

use schemars::JsonSchema;
use serde::Serialize;
use serde_json::{Map, Value};
use uuid::Uuid;

use super::failure::{DeadReason, Rejection};
use super::selection::Selection;

/// Maximum size of a message body, in bytes.
pub const MAX_BODY_BYTES: usize = 256 * 1024;
/// Content type of a structured CloudEvents envelope.
pub const CLOUDEVENTS_CONTENT_TYPE: &str = "application/cloudevents+json";
/// Supported version of the message.
pub const SCHEMA_VERSION: u64 = 1;
const MAX_NAMES: usize = 1_000;

/// Request to observe a selection of a tenant, as published.
///
/// Unknown keys are ignored and never hashed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, JsonSchema)]
#[schemars(title = "inventoryd sync request, version 1")]
pub struct SyncRequest {
    /// Message version: 1.
    #[schemars(extend("const" = 1))]
    pub schema_version: u64,
    /// Tenant: an Entra directory id in hyphenated form.
    pub tenant_id: Uuid,
    /// Idempotency key: a repeated key of a tenant never starts a second run. 1 to 200 visible ASCII characters.
    #[schemars(length(min = 1, max = 200), regex(pattern = "^[!-~]+$"))]
    pub idempotency_key: String,
    /// Policy types to observe.
    pub selection: Selection,
    /// Correlation id, copied to the run and its event.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 200))]
    pub correlation_id: Option<String>,
    /// Requester, recorded with the run.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 200))]
    pub requested_by: Option<String>,
}

impl SyncRequest {
    /// JSON of the request, as a publisher would write it.
    #[must_use]
    pub fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("strings, numbers and booleans always serialise")
    }

    /// Parses a message body: bare, or the `data` of a CloudEvents envelope, depending on the content type.
    ///
    /// # Errors
    /// A [`Rejection`] with the reason and a detail that names the field, the kind of value found and the one expected.
    pub fn parse(content_type: Option<&str>, body: &[u8]) -> Result<Self, Rejection> {
        if body.len() > MAX_BODY_BYTES {
            return Err(Self::too_large(body.len() as u64));
        }
        let value: Value = serde_json::from_slice(body).map_err(|error| {
            let detail = format!("not JSON: line {}, column {}", error.line(), error.column());
            Rejection::new(DeadReason::InvalidJson, detail)
        })?;
        let message = Fields::of("the message", &value)?;
        let is_envelope = content_type.is_some_and(|kind| kind.trim_start().starts_with(CLOUDEVENTS_CONTENT_TYPE));
        if !is_envelope {
            return Self::from_fields(&message);
        }
        let data = message.get("data").ok_or_else(|| {
            invalid(
                "`data` is missing: a CloudEvents envelope must contain the request there, as JSON (not data_base64)",
            )
        })?;
        Self::from_fields(&Fields::of("`data`", data)?)
    }

    /// Rejection of a body with so many bytes.
    #[must_use]
    pub fn too_large(bytes: u64) -> Rejection {
        let detail = format!("the body has {bytes} bytes; at most {MAX_BODY_BYTES} are allowed");
        Rejection::new(DeadReason::MessageTooLarge, detail)
    }

    fn from_fields(message: &Fields<'_>) -> Result<Self, Rejection> {
        check_version(message)?;
        let selection = message.get("selection").ok_or_else(|| message.missing("selection", "an object"))?;
        Ok(Self {
            schema_version: SCHEMA_VERSION,
            tenant_id: tenant_id(message)?,
            idempotency_key: idempotency_key(message)?,
            selection: parse_selection(&Fields::of("`selection`", selection)?)?,
            correlation_id: label(message, "correlation_id")?,
            requested_by: label(message, "requested_by")?,
        })
    }
}

fn check_version(message: &Fields<'_>) -> Result<(), Rejection> {
    let expected = "the integer 1";
    let Some(value) = message.get("schema_version") else {
        let hint = if message.get("specversion").is_some() {
            "; this looks like a CloudEvents envelope: publish it with content type application/cloudevents+json"
        } else {
            ""
        };
        return Err(invalid(format!("`schema_version` is missing: expected {expected}{hint}")));
    };
    match value.as_u64() {
        Some(SCHEMA_VERSION) => Ok(()),
        Some(other) => {
            let detail = format!("`schema_version` is {other}: this daemon supports version {SCHEMA_VERSION}");
            Err(Rejection::new(DeadReason::UnsupportedVersion, detail))
        }
        None => Err(wrong("schema_version", value, expected)),
    }
}

fn tenant_id(message: &Fields<'_>) -> Result<Uuid, Rejection> {
    let expected = "a GUID such as 6a5b1a3e-3e24-4d1c-9d7b-0c3f1a2b3c4d";
    let text = message.string("tenant_id", expected)?.ok_or_else(|| message.missing("tenant_id", expected))?;
    match Uuid::try_parse(text) {
        Ok(id) if text.len() == 36 && !id.is_nil() => Ok(id),
        _ => Err(invalid(format!("`tenant_id` is a string that is not a GUID: expected {expected}"))),
    }
}

fn idempotency_key(message: &Fields<'_>) -> Result<String, Rejection> {
    let expected = "1 to 200 visible ASCII characters";
    let key =
        message.string("idempotency_key", expected)?.ok_or_else(|| message.missing("idempotency_key", expected))?;
    if !(1..=200).contains(&key.len()) || !key.bytes().all(|byte| byte.is_ascii_graphic()) {
        let what = if key.is_ascii() { "characters" } else { "bytes, not all ASCII" };
        return Err(invalid(format!("`idempotency_key` has {} {what}: expected {expected}, no spaces", key.len())));
    }
    Ok(key.to_owned())
}

/// Optional short text that is stored and published unchanged.
fn label(message: &Fields<'_>, name: &str) -> Result<Option<String>, Rejection> {
    let expected = "1 to 200 characters without control characters";
    let Some(text) = message.string(name, expected)? else { return Ok(None) };
    let length = text.chars().count();
    if !(1..=200).contains(&length) || text.chars().any(char::is_control) {
        return Err(invalid(format!("`{name}` is a string of {length} characters: expected {expected}")));
    }
    Ok(Some(text.to_owned()))
}

fn parse_selection(fields: &Fields<'_>) -> Result<Selection, Rejection> {
    let include_foundations = match fields.get("include_foundations") {
        None | Some(Value::Null) => true,
        Some(Value::Bool(wanted)) => *wanted,
        Some(other) => return Err(wrong("selection.include_foundations", other, "true or false")),
    };
    let selection = Selection {
        categories: names(fields, "categories")?,
        include_foundations,
        policy_types: names(fields, "policy_types")?,
    };
    if selection.is_empty() {
        return Err(invalid(
            "`selection` selects nothing: name policy_types or categories, or leave include_foundations true",
        ));
    }
    Ok(selection)
}

fn names(fields: &Fields<'_>, key: &str) -> Result<BTreeSet<String>, Rejection> {
    let name = format!("selection.{key}");
    let list = match fields.get(key) {
        None | Some(Value::Null) => return Ok(BTreeSet::new()),
        Some(Value::Array(list)) => list,
        Some(other) => return Err(wrong(&name, other, "an array of names")),
    };
    if list.len() > MAX_NAMES {
        return Err(invalid(format!("`{name}` has {} entries: at most {MAX_NAMES} are allowed", list.len())));
    }
    let entry = |(index, value): (usize, &Value)| match value {
        Value::String(text) if usable_name(text) => Ok(text.clone()),
        Value::String(_) => Err(invalid(format!(
            "`{name}[{index}]` is not a valid name: expected 1 to 200 characters without control characters"
        ))),
        other => Err(wrong(&format!("{name}[{index}]"), other, "a name as a string")),
    };
    list.iter().enumerate().map(entry).collect()
}

fn usable_name(text: &str) -> bool {
    (1..=200).contains(&text.chars().count()) && !text.chars().any(char::is_control)
}

/// Accessor for the fields of a JSON object.
struct Fields<'a>(&'a Map<String, Value>);

impl<'a> Fields<'a> {
    fn of(what: &str, value: &'a Value) -> Result<Self, Rejection> {
        match value {
            Value::Object(map) => Ok(Self(map)),
            other => Err(invalid(format!("{what} is {}: expected an object", kind(other)))),
        }
    }

    fn get(&self, name: &str) -> Option<&'a Value> {
        self.0.get(name)
    }

    /// String field; `null` counts as absent.
    fn string(&self, name: &str, expected: &str) -> Result<Option<&'a str>, Rejection> {
        match self.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(wrong(name, other, expected)),
        }
    }

    fn missing(&self, name: &str, expected: &str) -> Rejection {
        invalid(format!("`{name}` is missing: expected {expected}"))
    }
}

fn invalid(detail: impl Into<String>) -> Rejection {
    Rejection::new(DeadReason::InvalidRequest, detail)
}

fn wrong(name: &str, value: &Value, expected: &str) -> Rejection {
    invalid(format!("`{name}` is {}: expected {expected}", kind(value)))
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn good() -> Value {
        json!({ "schema_version": 1, "tenant_id": "6a5b1a3e-3e24-4d1c-9d7b-0c3f1a2b3c4d",
                "idempotency_key": "nightly:1", "selection": { "policy_types": ["deviceConfiguration"] } })
    }

    fn parse(value: &Value) -> Result<SyncRequest, Rejection> {
        SyncRequest::parse(Some("application/json"), value.to_string().as_bytes())
    }

    /// Rejection of `good` with the value at `pointer` replaced.
    fn rejected(pointer: &str, value: Value) -> Rejection {
        let mut message = good();
        let (parent, key) = pointer.rsplit_once('/').unwrap();
        message.pointer_mut(parent).unwrap().as_object_mut().unwrap().insert(key.to_owned(), value);
        parse(&message).unwrap_err()
    }

    #[test]
    fn a_valid_request_gets_its_defaults() {
        let mut message = good();
        message["colour"] = json!("blue");
        let request = parse(&message).unwrap();
        assert!(request.selection.include_foundations);
        assert_eq!(request.correlation_id, None);
        assert_eq!(request.tenant_id.to_string(), "6a5b1a3e-3e24-4d1c-9d7b-0c3f1a2b3c4d");
    }

    #[test]
    fn an_envelope_is_recognised_by_content_type_only() {
        let envelope = json!({ "specversion": "1.0", "id": "1", "source": "/s", "type": "t", "data": good() });
        let body = envelope.to_string();
        let kind = Some("application/cloudevents+json; charset=utf-8");
        assert!(SyncRequest::parse(kind, body.as_bytes()).is_ok());
        let bare = SyncRequest::parse(None, body.as_bytes()).unwrap_err();
        assert!(bare.detail.contains("content type application/cloudevents+json"), "{}", bare.detail);
        let no_data = SyncRequest::parse(kind, b"{}").unwrap_err();
        assert!(no_data.detail.contains("`data` is missing"));
    }

    #[test]
    fn every_rejection_names_field_found_and_expected() {
        let cases = [
            ("/schema_version", json!("1"), "`schema_version` is a string: expected the integer 1"),
            ("/tenant_id", json!(7), "`tenant_id` is a number: expected a GUID"),
            (
                "/tenant_id",
                json!("{6a5b1a3e-3e24-4d1c-9d7b-0c3f1a2b3c4d}"),
                "`tenant_id` is a string that is not a GUID",
            ),
            ("/tenant_id", json!("00000000-0000-0000-0000-000000000000"), "not a GUID"),
            ("/idempotency_key", json!("a b"), "`idempotency_key` has 3 characters"),
            ("/idempotency_key", json!("k".repeat(201)), "`idempotency_key` has 201 characters"),
            ("/idempotency_key", json!(""), "`idempotency_key` has 0 characters"),
            ("/selection", json!([]), "`selection` is an array: expected an object"),
            ("/selection/policy_types", json!("x"), "`selection.policy_types` is a string: expected an array of names"),
            ("/selection/policy_types", json!(["a", 5]), "`selection.policy_types[1]` is a number"),
            ("/selection/categories", json!([""]), "`selection.categories[0]` is not a valid name"),
            ("/selection/include_foundations", json!("no"), "`selection.include_foundations` is a string"),
            ("/correlation_id", json!("x".repeat(201)), "`correlation_id` is a string of 201 characters"),
            ("/requested_by", json!({}), "`requested_by` is an object"),
        ];
        for (pointer, value, expected) in cases {
            let rejection = rejected(pointer, value);
            assert_eq!(rejection.reason, DeadReason::InvalidRequest, "{pointer}");
            assert!(rejection.detail.contains(expected), "{pointer}: {}", rejection.detail);
        }
        let nothing = rejected("/selection", json!({ "include_foundations": false }));
        assert!(nothing.detail.contains("selects nothing"));
    }

    #[test]
    fn other_rejections_have_their_own_reason() {
        assert_eq!(rejected("/schema_version", json!(2)).reason, DeadReason::UnsupportedVersion);
        assert_eq!(SyncRequest::parse(None, b"{nope").unwrap_err().reason, DeadReason::InvalidJson);
        assert_eq!(SyncRequest::parse(None, &[0xff, 0xfe]).unwrap_err().reason, DeadReason::InvalidJson);
        let large = vec![b' '; MAX_BODY_BYTES + 1];
        assert_eq!(SyncRequest::parse(None, &large).unwrap_err().reason, DeadReason::MessageTooLarge);
        assert_eq!(SyncRequest::parse(None, b"[1]").unwrap_err().reason, DeadReason::InvalidRequest);
    }

    /// Asserts that an accepted request round-trips and that a rejection has a detail of bounded length.
    fn parsed_or_rejected(parsed: Result<SyncRequest, Rejection>) -> Result<(), TestCaseError> {
        match parsed {
            Ok(request) => {
                let again = serde_json::to_vec(&request).unwrap();
                prop_assert_eq!(SyncRequest::parse(None, &again), Ok(request));
            }
            Err(rejection) => prop_assert!((1..2_000).contains(&rejection.detail.len()), "{}", rejection.detail),
        }
        Ok(())
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_do_not_panic(body in prop::collection::vec(any::<u8>(), 0..512)) {
            let _ = SyncRequest::parse(Some(CLOUDEVENTS_CONTENT_TYPE), &body);
            let _ = SyncRequest::parse(None, &body);
        }

        #[test]
        fn a_damaged_request_is_parsed_or_rejected(
            damage in prop::collection::vec((any::<prop::sample::Index>(), prop_oneof![any::<u8>(), Just(b'"'), Just(b'{'), Just(b']')]), 0..6),
            wrapped in any::<bool>(), end in any::<prop::sample::Index>(), cut in any::<bool>(),
        ) {
            let message = if wrapped { json!({ "specversion": "1.0", "id": "1", "data": good() }) } else { good() };
            let mut body = message.to_string().into_bytes();
            for (at, byte) in damage {
                let at = at.index(body.len());
                body[at] = byte;
            }
            if cut {
                body.truncate(end.index(body.len()));
            }
            parsed_or_rejected(SyncRequest::parse(wrapped.then_some(CLOUDEVENTS_CONTENT_TYPE), &body))?;
        }

        #[test]
        fn any_value_in_any_field_is_parsed_or_rejected(
            place in prop::sample::select(&["/schema_version", "/tenant_id", "/idempotency_key", "/selection", "/selection/policy_types",
                "/selection/categories", "/selection/include_foundations", "/correlation_id", "/requested_by"]),
            text in any::<String>(), number in any::<f64>(), kind in 0..7,
        ) {
            let value = match kind {
                0 => json!(text),
                1 => json!(number),
                2 => json!([text, number]),
                3 => json!({ text: number }),
                4 => json!([[text]]),
                5 => json!(true),
                _ => Value::Null,
            };
            let mut message = good();
            let (parent, key) = place.rsplit_once('/').unwrap();
            message.pointer_mut(parent).unwrap().as_object_mut().unwrap().insert(key.to_owned(), value);
            parsed_or_rejected(parse(&message))?;
        }

        #[test]
        fn published_requests_are_accepted(
            key in "[!-~]{1,200}", names in prop::collection::btree_set("[a-zA-Z]{1,30}", 1..5),
            foundations in any::<bool>(), correlation in prop::option::of("[^\\p{C}]{1,200}"),
        ) {
            let selection = Selection { categories: names.clone(), include_foundations: foundations, policy_types: names };
            let request = SyncRequest { schema_version: 1, tenant_id: Uuid::from_u128(9), idempotency_key: key,
                selection, correlation_id: correlation, requested_by: None };
            let body = serde_json::to_vec(&request).unwrap();
            prop_assert_eq!(SyncRequest::parse(None, &body), Ok(request));
        }
    }
}
