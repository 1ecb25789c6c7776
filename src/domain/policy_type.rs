//! The Graph contracts: which kinds of objects there are, where they are listed and what of them is kept.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

/// One kind of Intune object that can be listed: one `[[policy_type]]` block of `config/policy_types.toml`.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct PolicyType {
    /// The name in requests, rows and events.
    pub key: String,
    /// The name for people.
    pub label: String,
    /// The category that a request may select.
    pub category: String,
    /// Whether others refer to it (scope tags, filters, templates, roles).
    pub foundation: bool,
    /// `v1.0` or `beta`.
    pub api_version: String,
    /// The path below the version; a child collection has `{parent_id}` in it.
    pub path: String,
    /// How the path answers.
    pub shape: Shape,
    /// For a child collection: the collection whose ids are put in for `{parent_id}`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<String>,
    /// Which objects of a shared collection are of this type; absent if it owns the collection.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub discriminator: Option<Discriminator>,
    /// The property with the object's id.
    #[serde(default = "id_property")]
    pub id: String,
    /// The property with its name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The property that says when it was created.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created: Option<String>,
    /// The property that says when it was last changed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub modified: Option<String>,
    /// Where its platform comes from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<PlatformRule>,
    /// The properties to ask for; empty where `$select` is not possible.
    #[serde(default)]
    pub select: Vec<String>,
    /// The keys that are kept.
    pub meta: BTreeSet<String>,
    /// The page size to ask for; absent where Graph's own is best.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub top: Option<u32>,
    /// The limits of Graph that count for it.
    pub throttle: String,
    /// The application permission that lists it.
    pub permission: String,
}

fn id_property() -> String {
    "id".to_owned()
}

/// How a path answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Shape {
    /// Pages of objects.
    Collection,
    /// One object.
    Singleton,
    /// Pages of objects below each object of another collection.
    ChildCollection,
}

/// Which objects of a shared collection belong to a type. All given conditions must hold.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Discriminator {
    /// The object's `@odata.type` is one of these.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub odata_type: BTreeSet<String>,
    /// The property (a dotted path) has one of `values`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub property: Option<String>,
    /// The values of `property`, compared as text.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub values: BTreeSet<String>,
    /// Takes every object of the collection that no other type claims.
    #[serde(default)]
    pub fallback: bool,
}

/// Where an object's platform comes from.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct PlatformRule {
    /// It is always this one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fixed: Option<String>,
    /// It stands in this property.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub property: Option<String>,
    /// It is this one if the property says nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fallback: Option<String>,
    /// It follows from the `@odata.type`.
    #[serde(default)]
    pub odata_type: bool,
}

impl PolicyType {
    pub(super) fn check(&self) -> Result<(), String> {
        let plain: BTreeSet<&str> = self.select.iter().map(|name| without_cast(name)).collect();
        let must_be_selected = |field: &str, name: &str| {
            if self.select.is_empty() || plain.contains(first_segment(name)) {
                return Ok(());
            }
            Err(format!("`{field}` reads `{name}`, which `select` does not ask for"))
        };
        if self.key.is_empty() || !self.key.bytes().all(|b| b.is_ascii_alphanumeric()) {
            return Err("`key` must be letters and digits".to_owned());
        }
        if !["v1.0", "beta"].contains(&self.api_version.as_str()) {
            return Err("`api_version` must be \"v1.0\" or \"beta\"".to_owned());
        }
        must_be_selected("id", &self.id)?;
        for (field, name) in [("name", &self.name), ("created", &self.created), ("modified", &self.modified)] {
            name.as_deref().map_or(Ok(()), |name| must_be_selected(field, name))?;
        }
        for name in &self.meta {
            must_be_selected("meta", name)?;
        }
        if let Some(name) = self.platform.as_ref().and_then(|rule| rule.property.as_deref()) {
            must_be_selected("platform.property", name)?;
        }
        if let Some(name) = self.discriminator.as_ref().and_then(|rule| rule.property.as_deref()) {
            must_be_selected("discriminator.property", name)?;
        }
        let is_child = self.shape == Shape::ChildCollection;
        if is_child != self.parent.is_some() || is_child != self.path.contains("{parent_id}") {
            return Err("`shape` child_collection goes with `parent` and a `path` with {parent_id}".to_owned());
        }
        self.discriminator.as_ref().map_or(Ok(()), Discriminator::check)
    }

    /// Whether it takes what no other type of its collection claims.
    #[must_use]
    pub fn is_fallback(&self) -> bool {
        self.discriminator.as_ref().is_some_and(|rule| rule.fallback)
    }
}

impl Discriminator {
    fn check(&self) -> Result<(), String> {
        let conditions = !self.odata_type.is_empty() || self.property.is_some();
        if self.fallback == conditions || self.property.is_some() == self.values.is_empty() {
            return Err("`discriminator` needs odata_type, or property with values, or fallback alone".to_owned());
        }
        Ok(())
    }
}

/// `microsoft.graph.x/prop` asks for `prop` of a derived type; the answer has it under its plain name.
fn without_cast(name: &str) -> &str {
    name.rsplit('/').next().unwrap_or(name)
}

fn first_segment(name: &str) -> &str {
    name.split('.').next().unwrap_or(name)
}
