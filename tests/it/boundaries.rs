//! Limits of requests and objects: accepted at the limit, rejected one beyond it.

use std::sync::{Arc, LazyLock};

use serde_json::{Value, json};
use uuid::Uuid;

use inventoryd::domain::catalog::Catalog;
use inventoryd::domain::failure::{DeadReason, Rejection};
use inventoryd::domain::item::{BadObject, InventoryItem, MAX_NESTED_BYTES, MAX_TEXT_BYTES, RawObject};
use inventoryd::domain::policy_type::{PlatformRule, PolicyType};
use inventoryd::domain::request::{MAX_BODY_BYTES, SyncRequest};

use crate::support::world::World;

static CATALOG: LazyLock<Catalog> = LazyLock::new(Catalog::built_in);

fn request() -> Value {
    World::request_of(Uuid::from_u128(7), "key", &["mobileApp"])
}

/// Parses the request with the value at `pointer` replaced.
fn parse_with(pointer: &str, value: Value) -> Result<SyncRequest, Rejection> {
    let mut message = request();
    let (parent, key) = pointer.rsplit_once('/').unwrap();
    message.pointer_mut(parent).unwrap()[key] = value;
    SyncRequest::parse(None, message.to_string().as_bytes())
}

fn names(count: usize) -> Value {
    (0..count).map(|n| json!(format!("n{n}"))).collect()
}

#[test]
fn a_body_of_256_kib_is_the_largest_that_is_read() {
    let mut body = request().to_string().into_bytes();
    body.resize(MAX_BODY_BYTES, b' ');
    assert!(SyncRequest::parse(None, &body).is_ok());
    body.push(b' ');
    assert_eq!(SyncRequest::parse(None, &body).unwrap_err().reason, DeadReason::MessageTooLarge);
}

#[test]
fn request_fields_are_accepted_at_their_limits_and_rejected_beyond() {
    for (pointer, accepted, rejected) in [
        ("/selection/policy_types", names(1_000), names(1_001)),
        ("/selection/categories", names(1_000), names(1_001)),
        // Names and labels are measured in characters; keys are ASCII.
        ("/selection/policy_types", json!(["é".repeat(200)]), json!(["é".repeat(201)])),
        ("/selection/categories", json!(["x"]), json!([""])),
        ("/correlation_id", json!("é".repeat(200)), json!("é".repeat(201))),
        ("/requested_by", json!("é"), json!("")),
        ("/idempotency_key", json!("k".repeat(200)), json!("k".repeat(201))),
        ("/tenant_id", json!(Uuid::from_u128(1)), json!(Uuid::nil())),
    ] {
        assert!(parse_with(pointer, accepted).is_ok(), "{pointer}");
        assert_eq!(parse_with(pointer, rejected).unwrap_err().reason, DeadReason::InvalidRequest, "{pointer}");
    }
}

#[test]
fn control_characters_and_keys_beyond_ascii_are_rejected() {
    for (pointer, value) in [
        ("/idempotency_key", json!("schlüssel")),
        ("/idempotency_key", json!("a\u{7f}")),
        ("/correlation_id", json!("a\nb")),
        ("/requested_by", json!("a\u{0}b")),
        ("/selection/policy_types", json!(["a\tb"])),
        ("/selection/categories", json!(["a\u{85}b"])),
    ] {
        assert_eq!(parse_with(pointer, value).unwrap_err().reason, DeadReason::InvalidRequest, "{pointer}");
    }
}

fn policy_type(key: &str) -> PolicyType {
    PolicyType::clone(CATALOG.get(key).unwrap())
}

fn observe(policy_type: &PolicyType, object: &Value) -> Result<InventoryItem, BadObject> {
    RawObject::parse(&object.to_string())?.observe(policy_type)
}

#[test]
fn an_id_is_stored_up_to_512_bytes_and_reported_in_brief_when_unusable() {
    let id = |id: &str| observe(&policy_type("mobileApp"), &json!({ "id": id }));
    assert_eq!(id(&"i".repeat(512)).unwrap().external_id.len(), 512);
    assert_eq!(id(&"i".repeat(513)).unwrap_err().external_id.unwrap(), "i".repeat(64));
    let with_nul = id("a\0b\n").unwrap_err();
    assert_eq!(with_nul.external_id.as_deref(), Some("ab"), "PostgreSQL stores no NUL, logs get no control characters");
}

#[test]
fn a_platform_that_cannot_be_stored_falls_back() {
    let rule = PlatformRule {
        fixed: None,
        property: Some("platforms".to_owned()),
        fallback: Some("any".to_owned()),
        odata_type: false,
    };
    let policy_type = PolicyType { platform: Some(rule), ..policy_type("settingsCatalogPolicy") };
    let platform =
        |text: String| observe(&policy_type, &json!({ "id": "1", "platforms": text })).unwrap().platform.unwrap();
    assert_eq!(platform("p".repeat(MAX_TEXT_BYTES)).len(), MAX_TEXT_BYTES);
    for unusable in ["p".repeat(MAX_TEXT_BYTES + 1), "a\0b".to_owned(), String::new()] {
        assert_eq!(platform(unusable), "any");
    }
}

#[test]
fn a_nested_value_is_dropped_for_its_size_or_a_credential_in_any_key() {
    let policy_type = PolicyType { meta: ["nested".to_owned()].into(), ..policy_type("mobileApp") };
    let meta = |nested: Value| observe(&policy_type, &json!({ "id": "1", "nested": nested })).unwrap().meta;
    assert_eq!(meta(json!({ "a": [1] })), r#"{"nested":{"a":[1]}}"#);
    // Two brackets and two quotes around the text.
    assert_ne!(meta(json!(["n".repeat(MAX_NESTED_BYTES - 4)])), "{}");
    for dropped in
        [json!(["n".repeat(MAX_NESTED_BYTES - 3)]), json!({ "Bearer abc": 1 }), json!([{ "a": { "Bearer abc": 1 } }])]
    {
        assert_eq!(meta(dropped), "{}");
    }
}

#[test]
fn a_shared_collection_asks_for_the_properties_of_every_type_and_the_smallest_page() {
    let contract = |key: &str, select: &str, top: u32, discriminator: &str| {
        format!(
            r#"
            [[policy_type]]
            key = "{key}"
            label = "A"
            category = "C"
            foundation = false
            api_version = "beta"
            path = "p"
            shape = "collection"
            select = [{select}]
            top = {top}
            meta = []
            throttle = "t"
            permission = "P.Read.All"
            discriminator = {{ {discriminator} }}
            "#
        )
    };
    let collection = |select: &str| {
        let a = contract("a", r#""id", "x""#, 50, r##"odata_type = ["#x"]"##);
        let catalog = Catalog::parse(&(a + &contract("b", select, 20, "fallback = true"))).unwrap();
        Arc::clone(catalog.collection_of(catalog.get("a").unwrap()))
    };
    let both = collection(r#""id", "y""#);
    assert_eq!(both.select, ["id", "x", "y"].map(str::to_owned).into());
    assert_eq!(both.top, Some(20));
    assert!(collection("").select.is_empty(), "one type without $select turns it off for the list");
}
