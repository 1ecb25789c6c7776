use proptest::prelude::*;
use serde_json::{Value, json};

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
fn media_types_are_compared_without_case_and_parameters() {
    let body = json!({ "specversion": "1.0", "data": good() }).to_string();
    for kind in ["Application/CloudEvents+JSON", " application/cloudevents+json ;charset=UTF-8"] {
        assert!(SyncRequest::parse(Some(kind), body.as_bytes()).is_ok(), "{kind}");
    }
    assert!(SyncRequest::parse(Some("application/cloudevents+jsonl"), body.as_bytes()).is_err());
}

#[test]
fn other_encodings_are_accepted_or_named() {
    let text = good().to_string();
    assert!(SyncRequest::parse(None, format!("\u{feff}{text}").as_bytes()).is_ok(), "a byte order mark");
    let detail = |encoding: Option<&str>, body: &[u8]| {
        let rejection = SyncRequest::parse_encoded(None, encoding, body).unwrap_err();
        assert_eq!(rejection.reason, DeadReason::InvalidJson);
        rejection.detail
    };
    let little: Vec<u8> = text.encode_utf16().flat_map(u16::to_le_bytes).collect();
    let big: Vec<u8> = text.encode_utf16().flat_map(u16::to_be_bytes).collect();
    for body in [&little, &big, &[&b"\xff\xfe"[..], &little].concat(), &[&b"\xfe\xff"[..], &big].concat()] {
        assert!(detail(None, body).contains("UTF-16"));
    }
    assert!(detail(None, b"\x1f\x8b\x08\x00").contains("gzip"));
    assert!(detail(Some("BR"), b"\x0b\x02").contains("content_encoding is br"));
    assert!(!detail(Some("secret"), b"nope").contains("secret"), "only known names are repeated");
    assert!(SyncRequest::parse_encoded(None, Some("utf-8"), text.as_bytes()).is_ok(), "as Celery sets it");
    assert!(detail(None, b"").contains("empty"));
}

#[test]
fn values_of_unknown_keys_are_not_interpreted() {
    let deep = format!("{}{}", "[".repeat(200), "]".repeat(200));
    for value in [deep.as_str(), "1e999999", "-1E+400", r#""\ud800""#] {
        let body = good().to_string().replacen('{', &format!("{{\"extra\":{value},"), 1);
        assert!(SyncRequest::parse(None, body.as_bytes()).is_ok(), "{value}");
        let inner = body.replacen("\"selection\":{", &format!("\"selection\":{{\"extra\":{value},"), 1);
        assert!(SyncRequest::parse(None, inner.as_bytes()).is_ok(), "{value}");
        let field = good().to_string().replacen("\"nightly:1\"", value, 1);
        let rejection = SyncRequest::parse(None, field.as_bytes()).unwrap_err();
        assert_eq!(rejection.reason, DeadReason::InvalidRequest, "{value}");
        assert!(rejection.detail.starts_with("`idempotency_key` is a"), "{}", rejection.detail);
    }
}

#[test]
fn integers_are_those_of_the_json_schema() {
    let parse = |version: &str| {
        let body = good().to_string().replacen("\"schema_version\":1", &format!("\"schema_version\":{version}"), 1);
        SyncRequest::parse(None, body.as_bytes()).map_err(|rejection| rejection.reason)
    };
    for version in ["1.0", "1e0", "10e-1", "1.000"] {
        assert!(parse(version).is_ok(), "{version}");
    }
    assert_eq!(parse("2.0").unwrap_err(), DeadReason::UnsupportedVersion);
    assert_eq!(parse("1e999999").unwrap_err(), DeadReason::InvalidRequest);
    assert_eq!(parse("1.5").unwrap_err(), DeadReason::InvalidRequest);
    assert_eq!(parse("-1").unwrap_err(), DeadReason::InvalidRequest);
}

#[test]
fn every_rejection_names_field_found_and_expected() {
    let cases = [
        ("/schema_version", json!("1"), "`schema_version` is a string: expected the integer 1"),
        ("/tenant_id", json!(7), "`tenant_id` is a number: expected a GUID"),
        ("/tenant_id", json!("{6a5b1a3e-3e24-4d1c-9d7b-0c3f1a2b3c4d}"), "`tenant_id` is a string that is not a GUID"),
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
