//! Reference of the keys: meaning, default, unit and variable of each, parsed from the comments of `config/default.toml`.

use std::collections::BTreeMap;

use serde::Serialize;

use super::schema::{SECRET_FILES, SECRETS};
use super::{DEFAULTS, ENVIRONMENT_PREFIX};

/// Documentation of one key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct KeyReference {
    /// Key, such as `consumer.prefetch`; the name of a credential is `*`.
    pub key: String,
    /// Meaning.
    pub text: String,
    /// Default value, as written in a file; none for a key that names the file of a secret.
    pub default: Option<String>,
    /// Unit of a number, as far as the key has one.
    pub unit: Option<&'static str>,
    /// Environment variable that sets the key.
    pub variable: String,
}

/// Every key, in the order of `config/default.toml`.
#[must_use]
pub fn reference() -> Vec<KeyReference> {
    let (mut section, mut comment, mut text) = (String::new(), Vec::new(), String::new());
    let mut keys = Vec::new();
    for line in DEFAULTS.lines() {
        if let Some(words) = line.strip_prefix('#') {
            comment.push(words.trim());
        } else if let Some(name) = line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            section = name.replace("graph.credentials.default", "graph.credentials.*");
            comment.clear();
        } else if let Some((name, default)) = line.split_once(" = ") {
            // A comment describes all keys up to the next comment.
            if !comment.is_empty() {
                text = std::mem::take(&mut comment).join(" ");
            }
            keys.push(key_of(format!("{section}.{name}"), text.clone(), Some(default.to_owned())));
        } else {
            comment.clear();
        }
    }
    let secret_file = |key: &str| {
        let secret = key.trim_end_matches("_file").rsplit('.').next().unwrap_or(key);
        key_of(key.to_owned(), format!("File that contains {secret}, in place of its value."), None)
    };
    keys.extend(SECRET_FILES.map(secret_file));
    keys
}

fn key_of(key: String, text: String, default: Option<String>) -> KeyReference {
    let variable = format!("{ENVIRONMENT_PREFIX}__{}", key.replace('*', "<NAME>").replace('.', "__").to_uppercase());
    KeyReference { unit: unit(&key), key, text, default, variable }
}

fn unit(key: &str) -> Option<&'static str> {
    let units = [
        ("_per_s", "requests per second"),
        ("_per_20s", "requests in 20 seconds"),
        ("_share", "share of 1"),
        ("_ms", "milliseconds"),
        ("_s", "seconds"),
        ("_days", "days"),
        ("_bytes", "bytes"),
    ];
    units.into_iter().find(|(suffix, _)| key.ends_with(suffix)).map(|(_, unit)| unit)
}

/// Keys that `name` means: a key, all keys of a section, or the key of a variable.
#[must_use]
pub fn find(name: &str) -> Vec<KeyReference> {
    let lower = name.to_lowercase();
    let variable = lower.strip_prefix(&format!("{}__", ENVIRONMENT_PREFIX.to_lowercase()));
    let mut parts: Vec<&str> = variable.map_or_else(|| lower.split('.').collect(), |rest| rest.split("__").collect());
    if let ["graph", "credentials", name, ..] = parts.as_mut_slice() {
        *name = "*";
    }
    let key = parts.join(".");
    let section = format!("{key}.");
    reference().into_iter().filter(|one| one.key == key || one.key.starts_with(&section)).collect()
}

/// JSON Schema of a configuration file.
#[must_use]
pub fn json_schema() -> serde_json::Value {
    let settings = schemars::generate::SchemaSettings::draft2020_12().for_deserialize();
    let generator = settings.with(|settings| settings.inline_subschemas = true).into_generator();
    let mut schema = generator.into_root_schema_for::<super::Config>().to_value();
    let keys: BTreeMap<String, KeyReference> = reference().into_iter().map(|one| (one.key.clone(), one)).collect();
    describe(&mut schema, "", &keys);
    schema
}

/// Completes the schema below `path`: every key is optional, and has its documentation and its default.
fn describe(schema: &mut serde_json::Value, path: &str, keys: &BTreeMap<String, KeyReference>) {
    let Some(schema) = schema.as_object_mut() else { return };
    schema.remove("required");
    schema.remove("default");
    let below = |name: &str| if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") };
    let properties = schema.get_mut("properties").and_then(serde_json::Value::as_object_mut);
    for (name, property) in properties.into_iter().flatten() {
        describe(property, &below(name), keys);
    }
    if let Some(named) = schema.get_mut("additionalProperties") {
        describe(named, &below("*"), keys);
    }
    let Some(reference) = keys.get(path) else { return };
    if schema.get("type").is_some_and(|kind| kind.as_array().is_some_and(|kinds| kinds.contains(&"null".into()))) {
        // TOML has no null: an absent file is an empty string.
        schema.insert("type".to_owned(), "string".into());
    }
    schema.insert("description".to_owned(), reference.text.clone().into());
    let is_secret = path.rsplit('.').next().is_some_and(|last| SECRETS.contains(&last));
    let default = reference.default.as_ref().filter(|_| !is_secret);
    if let Some(default) = default.and_then(|text| serde_json::from_str(text).ok()) {
        schema.insert("default".to_owned(), default);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::schema;

    #[test]
    fn every_key_has_a_meaning_and_is_found_by_key_and_by_variable() {
        for one in reference() {
            assert!(one.text.len() > 10, "{one:?}");
            assert_eq!(find(&one.key), std::slice::from_ref(&one));
            assert_eq!(find(&one.variable), std::slice::from_ref(&one));
            let path: Vec<String> = one.key.split('.').map(str::to_owned).collect();
            assert!(matches!(schema::find(&path), schema::Key::Leaf(_)), "{one:?}");
        }
        assert_eq!(reference().len(), schema::all_keys().count());
    }

    #[test]
    fn units_and_defaults_are_those_of_the_key() {
        let one = |key: &str| find(key).remove(0);
        assert_eq!(one("outbox.poll_ms").unit, Some("milliseconds"));
        assert_eq!(one("graph.conditional_access_per_s").unit, Some("requests per second"));
        assert_eq!(one("consumer.prefetch").unit, None);
        assert_eq!(one("run.lease_s").default.as_deref(), Some("60"));
        assert_eq!(one("graph.credentials.EMEA.client_id").key, "graph.credentials.*.client_id");
        assert!(one("broker.client_key_file").text.contains("client certificate"), "a comment describes several keys");
        assert!(find("broker").len() > 5 && find("brokerx").is_empty() && find("").is_empty());
    }
}
