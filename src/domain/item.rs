//! Conversion of a raw Graph object to an inventory item: classification, name, platform, sanitised properties.

use std::borrow::Cow;
use std::sync::Arc;

use serde_json::Value;
use serde_json::value::RawValue;

use super::catalog::Collection;
use super::credential_scan::looks_like_credential;
use super::platform;
use super::policy_type::{Discriminator, PlatformRule, PolicyType};
use super::raw_object::string_text;
pub use super::raw_object::{BadObject, RawObject, RawObjects};

/// Maximum length of a stored display name, in characters.
pub const MAX_DISPLAY_NAME_CHARS: usize = 1_024;
/// Maximum length of a stored property text, in bytes; a longer one is dropped.
pub const MAX_TEXT_BYTES: usize = 2 * 1024;
/// Maximum size of a stored nested value, in bytes of compact JSON; a larger one is dropped.
pub const MAX_NESTED_BYTES: usize = 4 * 1024;
const MAX_ID_BYTES: usize = 512;
const USUAL_META_BYTES: usize = 256;

/// One observed object, as stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InventoryItem {
    /// Graph id, unique within the tenant and policy type.
    pub external_id: String,
    /// Display name, if present.
    pub display_name: Option<String>,
    /// Target platform, if known.
    pub platform: Option<String>,
    /// Allow-listed properties, as compact JSON with sorted keys.
    pub meta: String,
}

impl RawObject<'_> {
    /// Policy type of `collection` that claims the object, selected or not.
    #[must_use]
    pub fn classify<'c>(&self, collection: &'c Collection) -> Option<&'c Arc<PolicyType>> {
        collection.types.iter().find(|policy_type| match &policy_type.discriminator {
            None => true,
            Some(rule) => rule.fallback || self.fulfils(rule),
        })
    }

    fn fulfils(&self, rule: &Discriminator) -> bool {
        let type_fits = rule.odata_type.is_empty()
            || self.odata_type().is_some_and(|odata_type| rule.odata_type.contains(odata_type.as_ref()));
        let value_fits = rule
            .property
            .as_deref()
            .is_none_or(|property| self.text_at(property).is_some_and(|value| rule.values.contains(value.as_ref())));
        type_fits && value_fits
    }

    /// Converts the object to an inventory item of `policy_type`.
    ///
    /// # Errors
    /// If the object has no id that can be stored.
    pub fn observe(&self, policy_type: &PolicyType) -> Result<InventoryItem, BadObject> {
        Ok(InventoryItem {
            external_id: self.external_id(policy_type)?,
            display_name: policy_type.name.as_deref().and_then(|name| self.display_name(name)),
            platform: policy_type.platform.as_ref().and_then(|rule| self.platform(rule)),
            meta: self.meta(policy_type),
        })
    }

    fn external_id(&self, policy_type: &PolicyType) -> Result<String, BadObject> {
        use super::policy_type::Shape;
        match self.text(&policy_type.id) {
            Some(id) if looks_like_credential(&id) => Err(BadObject { external_id: None }),
            Some(id) if !id.is_empty() && id.len() <= MAX_ID_BYTES && !holds_nul(&id) => Ok(id.into_owned()),
            // Without any property of its contract the object is something else, as an envelope or an OData null.
            None if policy_type.shape == Shape::Singleton && self.has_contract_property(policy_type) => {
                Ok(policy_type.key.clone())
            }
            id => {
                Err(BadObject { external_id: id.map(|id| id.chars().filter(|c| !c.is_control()).take(64).collect()) })
            }
        }
    }

    fn has_contract_property(&self, policy_type: &PolicyType) -> bool {
        policy_type.meta.iter().chain(&policy_type.name).any(|name| self.get(name).is_some())
    }

    fn display_name(&self, property: &str) -> Option<String> {
        let name = self.text(property).filter(|name| !looks_like_credential(name))?;
        // PostgreSQL can't store NUL in text.
        let name = if holds_nul(&name) { Cow::Owned(name.replace('\0', "")) } else { name };
        let mut rest = name.chars();
        rest.nth(MAX_DISPLAY_NAME_CHARS - 1);
        let kept = &name[..name.len() - rest.as_str().len()];
        (!kept.is_empty()).then(|| kept.to_owned())
    }

    fn platform(&self, rule: &PlatformRule) -> Option<String> {
        if let Some(fixed) = &rule.fixed {
            return Some(fixed.clone());
        }
        if rule.odata_type {
            return self.odata_type().and_then(|odata_type| platform::of_type(&odata_type)).map(str::to_owned);
        }
        let property = rule.property.as_deref().and_then(|property| self.text(property));
        let text = property.filter(|text| !text.is_empty() && !holds_nul(text) && text.len() <= MAX_TEXT_BYTES);
        let text = text.filter(|text| !looks_like_credential(text));
        text.map(Cow::into_owned).or_else(|| rule.fallback.clone())
    }

    /// Sanitises the properties: allow-listed keys only, bounded sizes, nothing that looks like a credential.
    fn meta(&self, policy_type: &PolicyType) -> String {
        let mut json = String::with_capacity(USUAL_META_BYTES);
        json.push('{');
        for name in &policy_type.meta {
            let Some(value) = self.get(name).and_then(keep) else { continue };
            // The catalog accepts only names that need no escaping.
            json.push_str(if json.len() > 1 { ",\"" } else { "\"" });
            json.push_str(name);
            json.push_str("\":");
            json.push_str(&value);
        }
        json.push('}');
        json
    }
}

/// JSON text to store for a value, or none if it must not be stored.
///
/// Values are measured and searched in the form in which PostgreSQL returns them, so that sanitising a stored value
/// again changes nothing.
fn keep(raw: &RawValue) -> Option<Cow<'_, str>> {
    let text = raw.get();
    match text.as_bytes().first()? {
        b'n' => None,
        b't' | b'f' => Some(Cow::Borrowed(text)),
        b'"' => {
            let value = string_text(text)?;
            let storable = value.len() <= MAX_TEXT_BYTES && !holds_nul(&value) && !looks_like_credential(&value);
            storable.then_some(Cow::Borrowed(text))
        }
        b'{' | b'[' => {
            let mut value: Value = serde_json::from_str(text).ok()?;
            sort_sets(&mut value);
            let compact = value.to_string();
            let storable = compact.len() <= MAX_NESTED_BYTES
                && !any_text(&value, &|t| t.contains('\0') || looks_like_credential(t));
            storable.then_some(Cow::Owned(compact))
        }
        _ => serde_json::from_str::<serde_json::Number>(text).ok().map(|number| Cow::Owned(number.to_string())),
    }
}

/// Returns `true` for a text with a NUL character, which JSON permits only as an escape: a borrowed text had none.
#[expect(clippy::ptr_arg, reason = "a borrowed text needs no search")]
fn holds_nul(text: &Cow<'_, str>) -> bool {
    matches!(text, Cow::Owned(text) if text.contains('\0'))
}

/// Sorts every list of strings. Graph's are sets (scope tags, members, languages) and come in any order; kept as they
/// come, an object would seem to change from run to run.
fn sort_sets(value: &mut Value) {
    match value {
        Value::Array(list) if list.iter().all(Value::is_string) => {
            list.sort_unstable_by(|a, b| a.as_str().cmp(&b.as_str()));
        }
        Value::Array(list) => list.iter_mut().for_each(sort_sets),
        Value::Object(map) => map.values_mut().for_each(sort_sets),
        _ => {}
    }
}

fn any_text(value: &Value, test: &dyn Fn(&str) -> bool) -> bool {
    match value {
        Value::String(text) => test(text),
        Value::Array(list) => list.iter().any(|value| any_text(value, test)),
        Value::Object(map) => map.iter().any(|(key, value)| test(key) || any_text(value, test)),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::sync::LazyLock;

    use proptest::prelude::*;
    use serde_json::json;

    use super::super::catalog::Catalog;
    use super::*;

    static CATALOG: LazyLock<Catalog> = LazyLock::new(Catalog::built_in);

    fn item(key: &str, object: &Value) -> Result<InventoryItem, BadObject> {
        RawObject::parse(&object.to_string())?.observe(CATALOG.get(key).unwrap())
    }

    fn meta(item: &InventoryItem) -> Value {
        serde_json::from_str(&item.meta).unwrap()
    }

    #[test]
    fn unknown_and_secret_properties_are_dropped() {
        let kept = item(
            "mobileApp",
            &json!({ "id": "1", "displayName": "Word", "largeIcon": {"value": "AAAA"}, "colour": "blue",
                     "description": "Authorization: Bearer abc", "publisher": "Contoso" }),
        )
        .unwrap();
        assert_eq!(kept.display_name.as_deref(), Some("Word"));
        assert_eq!(meta(&kept), json!({ "publisher": "Contoso" }));
    }

    #[test]
    fn size_limits_are_enforced() {
        let object = |description: String, name: String| {
            item("mobileApp", &json!({ "id": "1", "displayName": name, "description": description })).unwrap()
        };
        assert_eq!(
            meta(&object("x".repeat(MAX_TEXT_BYTES), String::new()))["description"].as_str().unwrap().len(),
            2048
        );
        assert_eq!(meta(&object("x".repeat(MAX_TEXT_BYTES + 1), String::new())), json!({}));
        assert_eq!(object(String::new(), "é".repeat(2_000)).display_name.unwrap().chars().count(), 1_024);
        assert_eq!(meta(&object("a\0b".to_owned(), String::new())), json!({}), "PostgreSQL can't store NUL");
        assert_eq!(object(String::new(), "a\0b".to_owned()).display_name.unwrap(), "ab");
        assert!(item("mobileApp", &json!({ "displayName": "no id" })).is_err());
        assert!(item("mobileApp", &json!({ "id": "i".repeat(MAX_ID_BYTES + 1) })).is_err());
    }

    #[test]
    fn a_credential_is_kept_neither_as_name_nor_as_platform_nor_as_id() {
        let secret = "bearer abc123";
        let kept = item("settingsCatalogPolicy", &json!({ "id": "1", "name": secret, "platforms": secret })).unwrap();
        assert_eq!((kept.display_name, kept.platform), (None, None));
        assert_eq!(item("mobileApp", &json!({ "id": secret })), Err(BadObject { external_id: None }));
    }

    #[test]
    fn lists_of_strings_are_sets_and_their_order_is_no_change() {
        let with = |tags: Value| item("mobileApp", &json!({ "id": "1", "roleScopeTagIds": tags })).unwrap().meta;
        assert_eq!(with(json!(["2", "10", "0"])), with(json!(["0", "2", "10"])));
        assert_ne!(with(json!(["0"])), with(json!(["0", "1"])));
        assert_eq!(with(json!([{ "of": ["b", "a"] }])), with(json!([{ "of": ["a", "b"] }])), "at any depth");
        assert_ne!(with(json!([{ "n": 1 }, { "n": 2 }])), with(json!([{ "n": 2 }, { "n": 1 }])), "objects are no set");
    }

    #[test]
    fn no_property_of_any_type_changes_with_the_order_of_its_texts() {
        for policy_type in CATALOG.types() {
            let with = |list: Value| {
                let id = (policy_type.id.clone(), json!("1"));
                let properties = policy_type.meta.iter().filter(|name| **name != policy_type.id);
                let object: Value = properties.map(|name| (name.clone(), list.clone())).chain([id]).collect();
                item(&policy_type.key, &object).unwrap().meta
            };
            let (one, other) = (with(json!(["b", "a"])), with(json!(["a", "b"])));
            assert!(one == other && (policy_type.meta.is_empty() || one.contains("\"a\"")), "{}", policy_type.key);
        }
    }

    #[test]
    fn a_singleton_without_any_property_of_its_contract_is_bad() {
        for object in [json!({"@odata.null": true}), json!({"value": {"blockChat": true}}), json!({"error": {}})] {
            assert!(item("remoteAssistanceSettings", &object).is_err(), "{object}");
        }
        let kept = item("remoteAssistanceSettings", &json!({"blockChat": true})).unwrap();
        assert_eq!(kept.external_id, "remoteAssistanceSettings");
    }

    #[test]
    fn every_fixture_yields_its_expected_items() {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/graph");
        for policy_type in CATALOG.types() {
            let file = folder.join(format!("{}.json", policy_type.key));
            let fixture: Value =
                serde_json::from_slice(&std::fs::read(&file).expect("every type has a fixture")).unwrap();
            let listing = format!("{}/{}", policy_type.api_version, policy_type.path);
            assert_eq!(fixture["collection"], listing, "{}", policy_type.key);
            let collection = CATALOG.collection_of(policy_type);
            let items: Vec<Value> = fixture["objects"].as_array().unwrap().iter().filter_map(|object| {
                let text = object.to_string();
                let object = RawObject::parse(&text).unwrap();
                let claimed = object.classify(collection)?;
                let item = object.observe(claimed).unwrap();
                Some(json!({ "external_id": item.external_id, "policy_type": claimed.key, "display_name": item.display_name,
                    "category": claimed.category, "platform": item.platform, "meta": meta(&item) }))
            }).collect();
            assert_eq!(json!(items), fixture["items"], "{}", policy_type.key);
        }
    }

    #[test]
    fn unknown_enum_values_are_stored_unchanged() {
        let said = json!({
            "id": "1", "name": "Baseline", "platforms": "windows10,aPlatformOfTomorrow", "technologies": "mdm,appleRemoteManagement",
            "createdDateTime": "2023-02-23T08:25:45.0780916Z", "lastModifiedDateTime": "2023-02-23T00:25:45-08:00",
        });
        let kept = item("settingsCatalogPolicy", &said).unwrap();
        assert_eq!(kept.platform.as_deref(), Some("windows10,aPlatformOfTomorrow"));
        let kept = meta(&kept);
        for property in ["technologies", "createdDateTime", "lastModifiedDateTime"] {
            assert_eq!(kept[property], said[property], "{property}");
        }
    }

    #[test]
    fn an_object_without_a_template_is_a_settings_catalog_policy() {
        let text = json!({ "id": "1", "name": "x", "templateReference": null }).to_string();
        let policy_type = CATALOG.get("settingsCatalogPolicy").unwrap();
        let object = RawObject::parse(&text).unwrap();
        let claimed = object.classify(CATALOG.collection_of(policy_type)).unwrap();
        assert_eq!(claimed.key, "settingsCatalogPolicy", "no template is template family none");
    }

    /// Arbitrary JSON, including texts that the sanitiser must drop.
    fn json_value() -> impl Strategy<Value = Value> {
        let text = prop_oneof![
            "\\PC{0,40}",
            Just("Bearer abc".to_owned()),
            Just("a\0b".to_owned()),
            Just("x".repeat(2_100)),
            Just("eyJhbGciOiJub25lIn0.eyJzdWIiOiJ4In0.c2ln".to_owned()),
        ];
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<f64>().prop_map(Value::from),
            text.prop_map(Value::from),
        ];
        leaf.prop_recursive(3, 64, 8, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..8).prop_map(Value::from),
                prop::collection::btree_map("[a-z]{1,8}", inner, 0..8).prop_map(|map| json!(map)),
            ]
        })
    }

    proptest! {
        #[test]
        fn sanitising_is_idempotent(
            values in prop::collection::vec(json_value(), 3), from in 0_usize..12, extra in prop::collection::btree_map("[a-z]{1,9}", json_value(), 0..4),
        ) {
            let policy_type = CATALOG.get("settingsCatalogPolicy").unwrap();
            let mut object = json!(extra);
            object["id"] = json!("1");
            for (key, value) in policy_type.meta.iter().cycle().skip(from).zip(values) {
                object[key] = value;
            }
            let first = item("settingsCatalogPolicy", &object).unwrap();
            let stored = meta(&first);
            let keys: BTreeSet<String> = stored.as_object().unwrap().keys().cloned().collect();
            prop_assert!(keys.is_subset(&policy_type.meta));
            prop_assert!(!first.meta.contains("Bearer "));
            let mut again = stored.clone();
            again["id"] = json!("1");
            prop_assert_eq!(meta(&item("settingsCatalogPolicy", &again).unwrap()), stored);
        }
    }
}
