//! The catalog of policy types: the Graph lists that they share, and the resolution of a selection to lists.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use serde::Deserialize;

use super::failure::{DeadReason, ErrorCode, Rejection};
use super::policy_type::{PolicyType, Shape};
use super::run::{TypeCounters, TypeOutcome};
use super::selection::{EVERY_TYPE, Selection};

/// Compiled-in contracts.
pub const DEFAULT_CONTRACTS: &str = include_str!("../../config/policy_types.toml");

/// One Graph list: a path and version, with every policy type that shares it.
#[derive(Debug, PartialEq)]
pub struct Collection {
    /// `v1.0` or `beta`.
    pub api_version: String,
    /// The path below the version.
    pub path: String,
    /// Form of the response.
    pub shape: Shape,
    /// Collection of the parents, for a child collection.
    pub parent: Option<String>,
    /// Name of the Graph limits that apply.
    pub throttle: String,
    /// Properties to request: the union over all types of the list, so that the list does not depend on the selection.
    pub select: BTreeSet<String>,
    /// Page size to request.
    pub top: Option<u32>,
    /// Types that share the list, the fallback last.
    pub types: Vec<Arc<PolicyType>>,
}

impl Collection {
    /// True for the lists that a run waits for longest: Graph allows one request a second, or each parent has pages.
    #[must_use]
    pub fn takes_longest(&self) -> bool {
        self.throttle == "identityprotection-ca" || self.shape == Shape::ChildCollection
    }

    /// Property that holds the ids of the list, which is the same for all of its types.
    #[must_use]
    pub fn id_property(&self) -> &str {
        self.types.first().map_or("id", |policy_type| policy_type.id.as_str())
    }
}

/// All policy types known to this process.
#[derive(Debug, Clone)]
pub struct Catalog {
    types: BTreeMap<String, Arc<PolicyType>>,
    collections: Vec<Arc<Collection>>,
}

/// Lists to read for a selection, and the selected names that are unknown.
#[derive(Debug, Clone)]
pub struct Scope {
    /// The lists to read.
    pub listings: Vec<Listing>,
    /// Selected names that are not policy types, and categories (as `category:NAME`) without types.
    pub unsupported: Vec<String>,
    /// Types that the request names, as opposed to those of `"*"`, of a category and foundations.
    pub named: BTreeSet<String>,
}

/// One list to read in a run, with those of its types that are selected.
#[derive(Debug, Clone)]
pub struct Listing {
    /// The list.
    pub collection: Arc<Collection>,
    /// Selected types, a subset of `collection.types`.
    pub selected: Vec<Arc<PolicyType>>,
}

impl Listing {
    /// Listing of every type of a list.
    #[must_use]
    pub fn of_all_types(collection: &Arc<Collection>) -> Self {
        Self { collection: Arc::clone(collection), selected: collection.types.clone() }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ContractsFile {
    policy_type: Vec<PolicyType>,
}

impl Catalog {
    /// Parses and validates contracts.
    ///
    /// # Errors
    /// One line that names the block, the field and what is wrong with it.
    pub fn parse(text: &str) -> Result<Self, String> {
        let file: ContractsFile = toml::from_str(text).map_err(|error| error.to_string())?;
        let mut types = BTreeMap::new();
        for policy_type in file.policy_type {
            policy_type.check().map_err(|problem| format!("policy type `{}`: {problem}", policy_type.key))?;
            if let Some(twice) = types.insert(policy_type.key.clone(), Arc::new(policy_type)) {
                return Err(format!("policy type `{}` is defined twice", twice.key));
            }
        }
        let collections = collections(&types)?;
        Ok(Self { types, collections })
    }

    /// Parses the compiled-in contracts.
    ///
    /// # Panics
    /// Never: a test parses the same text.
    #[must_use]
    pub fn built_in() -> Self {
        Self::parse(DEFAULT_CONTRACTS).expect("the compiled-in contracts are checked by a test")
    }

    /// All types, by key.
    pub fn types(&self) -> impl Iterator<Item = &Arc<PolicyType>> {
        self.types.values()
    }

    /// One type by its key.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&Arc<PolicyType>> {
        self.types.get(key)
    }

    /// The list that contains `policy_type`.
    ///
    /// # Panics
    /// If `policy_type` belongs to another catalog.
    #[must_use]
    pub fn collection_of(&self, policy_type: &PolicyType) -> &Arc<Collection> {
        let same = |c: &&Arc<Collection>| (&c.api_version, &c.path) == (&policy_type.api_version, &policy_type.path);
        self.collections.iter().find(same).expect("every type of a catalog belongs to one of its collections")
    }

    /// Resolves a selection to the lists to read.
    #[must_use]
    pub fn resolve(&self, selection: &Selection) -> Scope {
        let every = selection.policy_types.contains(EVERY_TYPE);
        let wanted = |policy_type: &&Arc<PolicyType>| {
            let named = selection.policy_types.contains(&policy_type.key);
            let grouped = (every || selection.categories.contains(&policy_type.category)) && !policy_type.only_by_name;
            if policy_type.foundation { selection.include_foundations } else { named || grouped }
        };
        let listings = self
            .collections
            .iter()
            .map(|collection| Listing {
                collection: Arc::clone(collection),
                selected: collection.types.iter().filter(wanted).cloned().collect(),
            })
            .filter(|listing| !listing.selected.is_empty())
            .collect();
        Scope { listings, unsupported: self.unknown_names(selection), named: selection.policy_types.clone() }
    }

    /// Resolves the selection of a request.
    ///
    /// # Errors
    /// A rejection if nothing is left to read.
    pub fn resolve_request(&self, selection: &Selection) -> Result<Scope, Rejection> {
        let scope = self.resolve(selection);
        if scope.is_empty() {
            let detail = "`selection` selects nothing: it names only foundations, and include_foundations is false";
            return Err(Rejection::new(DeadReason::InvalidRequest, detail));
        }
        Ok(scope)
    }

    fn unknown_names(&self, selection: &Selection) -> Vec<String> {
        let is_category = |name: &&String| self.types().any(|policy_type| policy_type.category == **name);
        let types =
            selection.policy_types.iter().filter(|name| *name != EVERY_TYPE && self.get(name).is_none()).cloned();
        let unknown = selection.categories.iter().filter(|name| !is_category(name));
        // A set, because `policy_types` can name "category:X" as well.
        let names: BTreeSet<String> = types.chain(unknown.map(|name| format!("category:{name}"))).collect();
        names.into_iter().collect()
    }
}

impl Scope {
    /// True if there is nothing to read and no unknown name to report.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.listings.is_empty() && self.unsupported.is_empty()
    }

    /// Names of every policy type of the scope, unknown ones included.
    #[must_use]
    pub fn policy_types(&self) -> Vec<String> {
        let selected = self.listings.iter().flat_map(|listing| &listing.selected).map(|selected| selected.key.clone());
        selected.chain(self.unsupported.iter().cloned()).collect()
    }

    /// Outcomes of the unknown names.
    #[must_use]
    pub fn unsupported_outcomes(&self) -> Vec<TypeOutcome> {
        let outcome =
            |name: &String| TypeOutcome::failed(name, TypeCounters::default(), ErrorCode::UnsupportedPolicyType.into());
        self.unsupported.iter().map(outcome).collect()
    }
}

/// Groups types by the list that they share, and validates that they agree on its properties.
fn collections(types: &BTreeMap<String, Arc<PolicyType>>) -> Result<Vec<Arc<Collection>>, String> {
    let mut groups: BTreeMap<(&str, &str), Vec<Arc<PolicyType>>> = BTreeMap::new();
    for policy_type in types.values() {
        groups.entry((&policy_type.api_version, &policy_type.path)).or_default().push(Arc::clone(policy_type));
    }
    groups.into_values().map(|sharing| collection(sharing).map(Arc::new)).collect()
}

fn collection(mut sharing: Vec<Arc<PolicyType>>) -> Result<Collection, String> {
    sharing.sort_by_key(|policy_type| policy_type.is_fallback());
    let first = Arc::clone(&sharing[0]);
    for policy_type in &sharing {
        if sharing.len() > 1 && policy_type.discriminator.is_none() {
            return Err(format!("policy type `{}` shares {} but has no `discriminator`", policy_type.key, first.path));
        }
        let agrees = (policy_type.shape, &policy_type.parent, &policy_type.throttle)
            == (first.shape, &first.parent, &first.throttle);
        if !agrees {
            return Err(format!(
                "policy types `{}` and `{}` share {} but differ in shape, parent or throttle",
                first.key, policy_type.key, first.path
            ));
        }
    }
    if sharing.iter().filter(|policy_type| policy_type.is_fallback()).count() > 1 {
        return Err(format!("{} has more than one fallback", first.path));
    }
    let selectable = sharing.iter().all(|policy_type| !policy_type.select.is_empty());
    let select = sharing.iter().flat_map(|policy_type| policy_type.select.iter().cloned());
    Ok(Collection {
        api_version: first.api_version.clone(),
        path: first.path.clone(),
        shape: first.shape,
        parent: first.parent.clone(),
        throttle: first.throttle.clone(),
        select: if selectable { select.collect() } else { BTreeSet::new() },
        top: sharing.iter().filter_map(|policy_type| policy_type.top).min(),
        types: sharing,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn selection(types: &[&str], categories: &[&str], include_foundations: bool) -> Selection {
        let set = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        Selection { policy_types: set(types), categories: set(categories), include_foundations }
    }

    fn keys(scope: &Scope) -> BTreeSet<String> {
        scope.listings.iter().flat_map(|listing| &listing.selected).map(|t| t.key.clone()).collect()
    }

    #[test]
    fn built_in_contracts_are_valid() {
        let catalog = Catalog::parse(DEFAULT_CONTRACTS).unwrap();
        assert!(catalog.types().count() >= 108);
        assert!(catalog.types().filter(|t| t.foundation).count() >= 3);
        assert!(!DEFAULT_CONTRACTS.contains("Write"), "no contract may require a write permission");
    }

    #[test]
    fn include_foundations_alone_selects_foundations() {
        let catalog = Catalog::built_in();
        let named_but_off = catalog.resolve(&selection(&["roleScopeTag", "mobileApp"], &[], false));
        assert_eq!(keys(&named_but_off), ["mobileApp".to_owned()].into());
        let on = keys(&catalog.resolve(&selection(&["mobileApp"], &[], true)));
        assert!(on.contains("roleScopeTag") && on.contains("assignmentFilter") && on.contains("mobileApp"));
        let every = keys(&catalog.resolve(&selection(&["*"], &[], false)));
        assert_eq!(every.len(), catalog.types().filter(|t| !t.foundation && !t.only_by_name).count());
        assert!(catalog.resolve(&selection(&["roleScopeTag"], &[], false)).is_empty());
    }

    #[test]
    fn a_type_that_hardly_any_application_can_list_is_read_only_by_name() {
        let catalog = Catalog::built_in();
        let with = |types: &[&str], categories: &[&str]| keys(&catalog.resolve(&selection(types, categories, false)));
        assert!(!with(&["*"], &["Configuration"]).contains("inventoryPolicy"));
        assert!(with(&["inventoryPolicy"], &[]).contains("inventoryPolicy"));
        assert!(catalog.get("alertRule").is_none(), "no application can list it");
    }

    #[test]
    fn a_child_type_names_the_permission_for_its_parents() {
        let catalog = Catalog::built_in();
        let of = |key: &str| catalog.get(key).unwrap().permissions().map(str::to_owned).collect::<Vec<_>>();
        let both = ["OrganizationalBranding.Read.All", "Organization.Read.All"];
        assert_eq!(of("organizationalBrandingLocalization"), both);
        assert_eq!(of("mobileApp").len(), 1);
        for child in catalog.types().filter(|t| t.shape == Shape::ChildCollection) {
            let parents = catalog.types().filter(|t| Some(&t.path) == child.parent.as_ref());
            let parents: Vec<&str> = parents.map(|t| t.permission.as_str()).collect();
            let is_named = parents.iter().all(|wanted| child.permissions().any(|named| named == *wanted));
            let is_known = !parents.is_empty() || child.parent_permission.is_some();
            assert!(is_named && is_known, "{}: parents need {parents:?}", child.key);
        }
    }

    #[test]
    fn a_shared_collection_is_listed_once() {
        let catalog = Catalog::built_in();
        let scope = catalog.resolve(&selection(&["deviceConfiguration", "windowsUpdateRing"], &[], false));
        assert_eq!(scope.listings.len(), 1);
        assert_eq!(scope.listings[0].selected.len(), 2);
        assert!(scope.listings[0].collection.types.last().unwrap().is_fallback());
    }

    #[test]
    fn unknown_names_are_reported_as_unsupported() {
        let named = ["noSuchType", "*", "category:NoSuchCategory"];
        let scope = Catalog::built_in().resolve(&selection(&named, &["NoSuchCategory"], false));
        assert_eq!(scope.unsupported, ["category:NoSuchCategory", "noSuchType"], "each once");
        let outcome = &scope.unsupported_outcomes()[0];
        assert_eq!(outcome.failure.as_ref().unwrap().code, ErrorCode::UnsupportedPolicyType);
    }

    #[test]
    fn an_invalid_contract_is_rejected_by_name() {
        let good = r#"
            [[policy_type]]
            key = "a"
            label = "A"
            category = "C"
            foundation = false
            api_version = "beta"
            path = "p"
            shape = "collection"
            select = ["id", "displayName"]
            name = "displayName"
            meta = []
            throttle = "t"
            permission = "P.Read.All"
        "#;
        assert!(Catalog::parse(good).is_ok());
        let cases = [
            (good.replace("\"beta\"", "\"v2\""), "`api_version`"),
            (good.replace("meta = []", "meta = [\"secret\"]"), "`meta` reads `secret`"),
            (
                good.replace("\"displayName\"]\n", "\"displayName\", \"a-b\"]\n")
                    .replace("meta = []", "meta = [\"a-b\"]"),
                "`meta` names `a-b`",
            ),
            (good.replace("\"displayName\"]", "\"x\"]"), "`name` reads `displayName`"),
            (good.replace("shape = \"collection\"", "shape = \"child_collection\""), "`parent`"),
            (format!("{good}colour = 1"), "colour"),
            (good.to_owned() + good, "twice"),
            (good.to_owned() + &good.replace("\"a\"", "\"b\""), "no `discriminator`"),
            (format!("{good}discriminator = {{ fallback = true, odata_type = [\"#x\"] }}"), "`discriminator` needs"),
            (
                format!("{good}discriminator = {{ property = \"kind\", values = [\"x\"] }}"),
                "`discriminator.property` reads `kind`",
            ),
            (format!("{good}platform = {{ property = \"os\" }}"), "`platform.property` reads `os`"),
            (shared(good, "fallback = true", "fallback = true"), "more than one fallback"),
            (
                shared(good, "odata_type = [\"#x\"]", "fallback = true").replacen("\"t\"", "\"other\"", 1),
                "differ in shape, parent or throttle",
            ),
        ];
        for (text, expected) in cases {
            let error = Catalog::parse(&text).unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
    }

    /// Two types, `a` and `b`, that share the list of `contract`, with their discriminators.
    fn shared(contract: &str, a: &str, b: &str) -> String {
        let b_contract = contract.replace("\"a\"", "\"b\"");
        format!("{contract}discriminator = {{ {a} }}\n{b_contract}discriminator = {{ {b} }}\n")
    }
}
