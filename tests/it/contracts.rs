//! Consistency of `config/policy_types.toml`, and its agreement with Graph's metadata where a file of it is given.

use std::collections::{BTreeMap, BTreeSet};

use inventoryd::domain::catalog::Catalog;
use inventoryd::domain::policy_type::PolicyType;
use serde_json::Value;

/// Variable that names a JSON file of Graph metadata: a list of types with their properties.
const FACTS: &str = "INVENTORYD_GRAPH_FACTS";

/// Strips the cast to a derived type from a selected property.
fn without_cast(name: &str) -> &str {
    name.rsplit('/').next().unwrap_or(name)
}

#[test]
fn no_two_types_claim_the_same_object() {
    let catalog = Catalog::built_in();
    for one in catalog.types() {
        let collection = catalog.collection_of(one);
        for other in collection.types.iter().filter(|other| other.key > one.key) {
            let (Some(mine), Some(theirs)) = (&one.discriminator, &other.discriminator) else {
                panic!("{} and {} share {}", one.key, other.key, collection.path)
            };
            let types_meet = !mine.odata_type.is_disjoint(&theirs.odata_type);
            let values_meet = mine.property == theirs.property && !mine.values.is_disjoint(&theirs.values);
            let apart = mine.fallback || theirs.fallback || (!types_meet && !values_meet);
            assert!(apart, "{} and {} claim the same objects of {}", one.key, other.key, collection.path);
        }
    }
}

#[test]
fn no_secret_or_personal_property_is_selected() {
    let never = [
        "password",
        "secret",
        "token value",
        "tokenvalue",
        "qrcode",
        "scriptcontent",
        "payload",
        "certificate\"",
        "userprincipalname",
        "appleid",
        "emailaddress",
        "serialnumber",
        "activationcodes",
        "largeicon",
    ];
    for policy_type in Catalog::built_in().types() {
        for name in
            policy_type.select.iter().map(|name| without_cast(name)).chain(policy_type.meta.iter().map(String::as_str))
        {
            let lower = name.to_lowercase();
            // Names of files and serial numbers reveal no secret.
            let harmless = ["payloadFileName", "certificateSerialNumber"].contains(&name);
            let found = never.iter().find(|word| lower.contains(**word));
            assert!(harmless || found.is_none(), "{} selects {name}", policy_type.key);
        }
    }
}

#[test]
fn every_permission_is_read_only() {
    for policy_type in Catalog::built_in().types() {
        let reads = policy_type.permission.contains(".Read.") || policy_type.permission.starts_with("Policy.Read");
        assert!(reads, "{}: {}", policy_type.key, policy_type.permission);
    }
}

#[test]
fn autopilot_devices_are_requested_without_select() {
    let catalog = Catalog::built_in();
    let select = &catalog.get("windowsAutopilotDeviceIdentity").unwrap().select;
    assert!(select.is_empty(), "Graph answers 500 to any $select: {select:?}");
}

#[test]
fn no_property_that_moves_by_itself_is_kept() {
    let moving = [
        "heartbeat",
        "lastsync",
        "lastcontact",
        "lastconnection",
        "lastcheckin",
        "lastsuccessfulsync",
        "directorysync",
        "appsync",
        "syncstatus",
        "synceddevicecount",
        "enrolleddevicecount",
        "usagecount",
        "healthcheckstatus",
        "lastseen",
        "lastreported",
        "enrollmentstate",
    ];
    for policy_type in Catalog::built_in().types() {
        for name in &policy_type.meta {
            let lower = name.to_lowercase();
            let found = moving.iter().find(|word| lower.contains(**word));
            assert!(found.is_none(), "{} keeps {name}: it would seem to change on every run", policy_type.key);
        }
    }
}

/// Skipped unless `INVENTORYD_GRAPH_FACTS` names a metadata file.
#[test]
#[expect(clippy::disallowed_methods, reason = "a developer names the metadata file")]
fn contracts_agree_with_graph_metadata() {
    let Ok(file) = std::env::var(FACTS) else {
        println!("skipped: {FACTS} names no metadata file");
        return;
    };
    let facts: Vec<Value> =
        serde_json::from_slice(&std::fs::read(file).expect("the metadata file can be read")).unwrap();
    let facts: BTreeMap<&str, &Value> = facts.iter().map(|fact| (fact["key"].as_str().unwrap(), fact)).collect();
    let catalog = Catalog::built_in();
    assert!(catalog.types().count() >= 108);
    for policy_type in catalog.types() {
        let fact =
            facts.get(policy_type.key.as_str()).unwrap_or_else(|| panic!("{} is not in the metadata", policy_type.key));
        compare(policy_type, fact);
    }
}

fn compare(policy_type: &PolicyType, fact: &Value) {
    let key = &policy_type.key;
    assert_eq!(fact["recommended_api_version"], policy_type.api_version.as_str(), "{key}");
    assert_eq!(fact["category"], policy_type.category.as_str(), "{key}");
    assert_eq!(fact["is_foundation"], policy_type.foundation, "{key}");
    assert_ne!(fact["app_only_supported"], false, "{key}");
    let template = fact["collection_path"].as_str().unwrap();
    let same_path = template
        .split('/')
        .zip(policy_type.path.split('/'))
        .all(|(a, b)| a == b || (a.starts_with('{') && b == "{parent_id}"));
    assert!(same_path && template.split('/').count() == policy_type.path.split('/').count(), "{key}: {template}");
    let forbidden: BTreeSet<&str> = (fact["excluded_properties"].as_object().unwrap().keys().map(String::as_str))
        .chain(fact["pii_properties_left_out_of_select"].as_array().unwrap().iter().filter_map(Value::as_str))
        .collect();
    let versioned = if policy_type.api_version == "beta" { "beta" } else { "v1_0" };
    let mut known: BTreeSet<&str> = BTreeSet::new();
    known.extend(
        fact[format!("scalar_properties_{versioned}")].as_object().into_iter().flatten().map(|(name, _)| name.as_str()),
    );
    known.extend(fact[format!("select_{versioned}")].as_array().into_iter().flatten().filter_map(Value::as_str));
    for name in &policy_type.select {
        assert!(!forbidden.contains(without_cast(name)), "{key} selects {name}");
        assert!(
            name.contains('/') || known.contains(name.as_str()),
            "{key} selects {name}, which is not one of its properties"
        );
    }
}
