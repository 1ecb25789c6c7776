//! Graph contracts: the kinds of objects, where they are listed, and the properties stored.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

/// One kind of Intune object that can be listed: one `[[policy_type]]` block of `config/policy_types.toml`.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct PolicyType {
    /// Name in requests, rows and events.
    pub key: String,
    /// Display label.
    pub label: String,
    /// Category, selectable in a request.
    pub category: String,
    /// True for types that other types refer to (scope tags, filters, templates, roles).
    pub foundation: bool,
    /// Excluded from `"*"` and from its category: read only when a request names it.
    #[serde(default)]
    pub only_by_name: bool,
    /// `v1.0` or `beta`.
    pub api_version: String,
    /// Path below the version; a child collection contains `{parent_id}`.
    pub path: String,
    /// Form of the response.
    pub shape: Shape,
    /// Collection whose ids replace `{parent_id}`, for a child collection.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<String>,
    /// Condition for the objects of a shared collection; absent if the collection has one type.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub discriminator: Option<Discriminator>,
    /// Property that holds the object's id.
    #[serde(default = "id_property")]
    pub id: String,
    /// Property that holds the display name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Property that holds the creation time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created: Option<String>,
    /// Property that holds the time of the last change.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub modified: Option<String>,
    /// Source of the platform.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<PlatformRule>,
    /// Properties to request; empty where `$select` is unsupported.
    #[serde(default)]
    pub select: Vec<String>,
    /// Allow list of properties to store.
    pub meta: BTreeSet<String>,
    /// Page size to request; absent to use Graph's default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub top: Option<u32>,
    /// Name of the Graph limits that apply.
    pub throttle: String,
    /// Application permission required to list the type.
    pub permission: String,
    /// Application permission that lists the parents of a child collection, if it is another one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent_permission: Option<String>,
}

fn id_property() -> String {
    "id".to_owned()
}

/// Form of a list's response.
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

/// Condition that assigns objects of a shared collection to a type. All given conditions must hold.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Discriminator {
    /// Accepted values of the object's `@odata.type`.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub odata_type: BTreeSet<String>,
    /// Property (a dotted path) that must have one of `values`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub property: Option<String>,
    /// Accepted values of `property`, compared as text.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub values: BTreeSet<String>,
    /// Takes every object of the collection that no other type claims.
    #[serde(default)]
    pub fallback: bool,
}

/// Source of an object's platform.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct PlatformRule {
    /// Fixed platform.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fixed: Option<String>,
    /// Property that holds the platform.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub property: Option<String>,
    /// Platform if the property is empty.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fallback: Option<String>,
    /// Derives the platform from the `@odata.type`.
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
            if !name.bytes().all(|b| b.is_ascii_alphanumeric()) {
                return Err(format!("`meta` names `{name}`, which must be letters and digits"));
            }
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
        if self.parent_permission.is_some() && !is_child {
            return Err("`parent_permission` is for child_collection only".to_owned());
        }
        self.discriminator.as_ref().map_or(Ok(()), Discriminator::check)
    }

    /// Application permissions that a run needs for this type.
    pub fn permissions(&self) -> impl Iterator<Item = &str> {
        [Some(&self.permission), self.parent_permission.as_ref()].into_iter().flatten().map(String::as_str)
    }

    /// True for the type that takes the objects that no other type of the collection claims.
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

/// Strips the cast of `microsoft.graph.x/prop`, which requests `prop` of a derived type; the response uses the plain name.
fn without_cast(name: &str) -> &str {
    name.rsplit('/').next().unwrap_or(name)
}

fn first_segment(name: &str) -> &str {
    name.split('.').next().unwrap_or(name)
}
