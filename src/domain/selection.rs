//! Selection of policy types: canonical form, and the hash that implementations in other languages must reproduce.

use std::collections::BTreeSet;
use std::fmt::Write;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// Name that selects every supported type except the foundations.
pub const EVERY_TYPE: &str = "*";

/// Policy types of a tenant to observe.
///
/// Fields are declared in alphabetical order and the sets are sorted, so that plain serialisation *is* RFC 8785
/// canonical JSON; there is no second form to keep in sync.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(description = "Policy types of a tenant to observe.")]
pub struct Selection {
    /// Categories; each selects all of its types.
    #[serde(default)]
    pub categories: BTreeSet<String>,
    /// Includes the foundations (scope tags, filters, templates, roles). `false` excludes every foundation, even one
    /// that is named.
    #[serde(default = "yes")]
    pub include_foundations: bool,
    /// Policy types, or `"*"` for every supported type except the foundations.
    #[serde(default)]
    pub policy_types: BTreeSet<String>,
}

fn yes() -> bool {
    true
}

impl Selection {
    /// Selects every supported type, foundations included.
    #[must_use]
    pub fn everything() -> Self {
        Self { categories: BTreeSet::new(), include_foundations: true, policy_types: [EVERY_TYPE.to_owned()].into() }
    }

    /// RFC 8785 canonical JSON.
    #[must_use]
    pub fn canonical_json(&self) -> String {
        serde_json::to_string(self).expect("strings and booleans always serialise")
    }

    /// SHA-256 of the canonical form, lower-case hex.
    #[must_use]
    pub fn hash(&self) -> String {
        Sha256::digest(self.canonical_json()).iter().fold(String::with_capacity(64), |mut hex, byte| {
            write!(hex, "{byte:02x}").expect("a String takes every write");
            hex
        })
    }

    /// True if the selection selects nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.categories.is_empty() && self.policy_types.is_empty() && !self.include_foundations
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::Value;

    use super::*;

    #[test]
    fn published_test_vectors_match() {
        let vectors: Vec<Value> =
            serde_json::from_str(include_str!("../../tests/fixtures/selection_hash.json")).unwrap();
        assert!(vectors.len() >= 6);
        for vector in vectors {
            let selection: Selection = serde_json::from_value(vector["selection"].clone()).unwrap();
            assert_eq!(selection.canonical_json(), vector["canonical"], "{vector}");
            assert_eq!(selection.hash(), vector["selection_hash"], "{vector}");
        }
    }

    #[test]
    fn a_selection_is_empty_only_without_any_of_its_three_parts() {
        let nothing =
            Selection { categories: BTreeSet::new(), include_foundations: false, policy_types: BTreeSet::new() };
        let name = || BTreeSet::from(["a".to_owned()]);
        assert!(nothing.is_empty());
        assert!(!Selection { include_foundations: true, ..nothing.clone() }.is_empty());
        assert!(!Selection { categories: name(), ..nothing.clone() }.is_empty());
        assert!(!Selection { policy_types: name(), ..nothing }.is_empty());
    }

    proptest! {
        #[test]
        fn order_repeats_and_unknown_keys_do_not_change_the_hash(
            names in prop::collection::vec("\\PC{1,12}", 1..8),
            categories in prop::collection::vec("[A-Za-z]{1,12}", 0..4),
            foundations in any::<bool>(),
        ) {
            let plain = serde_json::json!({
                "policy_types": names, "categories": categories, "include_foundations": foundations });
            let shuffled = serde_json::json!({
                "unknown": [1, 2], "include_foundations": foundations,
                "categories": categories.iter().rev().chain(&categories).collect::<Vec<_>>(),
                "policy_types": names.iter().rev().chain(&names).collect::<Vec<_>>() });
            let plain: Selection = serde_json::from_value(plain).unwrap();
            let shuffled: Selection = serde_json::from_value(shuffled).unwrap();
            prop_assert_eq!(plain.hash(), shuffled.hash());
        }

        #[test]
        fn a_different_scope_has_a_different_hash(name in "[a-z]{1,12}", foundations in any::<bool>()) {
            let one = Selection {
                categories: BTreeSet::new(), include_foundations: foundations, policy_types: [name].into() };
            let other = Selection { include_foundations: !foundations, ..one.clone() };
            prop_assert_ne!(one.hash(), other.hash());
        }
    }
}
