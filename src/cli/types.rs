//! `inventoryd types`: lists the supported policy types.

use std::collections::BTreeSet;

use schemars::JsonSchema;
use serde::Serialize;

use super::output::yes;
use super::{CliError, Context, Outcome};
use crate::domain::policy_type::PolicyType;

/// List the policy types with their Graph path and required permission
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Only the types of these categories, separated by commas
    #[arg(long, value_name = "CATEGORY", value_delimiter = ',')]
    category: Vec<String>,
}

/// Policy type, as printed with `--json`.
#[derive(Serialize, JsonSchema)]
pub(super) struct Row<'a> {
    /// Name in requests.
    key: &'a str,
    /// Name for people.
    label: &'a str,
    /// Category that selects it.
    category: &'a str,
    /// True if others refer to it, such as scope tags.
    foundation: bool,
    /// Graph ring, `v1.0` or `beta`.
    api_version: &'a str,
    /// Path below the ring.
    path: &'a str,
    /// Application permission that listing requires.
    permission: &'a str,
}

impl<'a> From<&'a PolicyType> for Row<'a> {
    fn from(of: &'a PolicyType) -> Self {
        Self {
            key: &of.key,
            label: &of.label,
            category: &of.category,
            foundation: of.foundation,
            api_version: &of.api_version,
            path: &of.path,
            permission: &of.permission,
        }
    }
}

pub(super) fn run(args: &Args, context: &mut Context<'_>) -> Result<Outcome, CliError> {
    let catalog = context.config()?.graph.catalog()?;
    let known: BTreeSet<&str> = catalog.types().map(|one| one.category.as_str()).collect();
    if let Some(unknown) = args.category.iter().find(|name| !known.contains(name.as_str())) {
        let known: Vec<&str> = known.into_iter().collect();
        return Err(CliError::Usage(format!("unknown category {unknown:?}; use one of {}", known.join(", "))));
    }
    let wanted = |one: &&PolicyType| args.category.is_empty() || args.category.contains(&one.category);
    let rows: Vec<Row<'_>> = catalog.types().map(AsRef::as_ref).filter(wanted).map(Row::from).collect();
    let header = ["key", "label", "category", "foundation", "version", "path", "permission"];
    context.out.rows(header, &["path", "version", "foundation", "label", "category"], &rows, |row| {
        let text = str::to_owned;
        [
            text(row.key),
            text(row.label),
            text(row.category),
            yes(row.foundation),
            text(row.api_version),
            text(row.path),
            text(row.permission),
        ]
    })?;
    Ok(Outcome::Done)
}

#[cfg(test)]
mod tests {
    use super::super::tests::call;

    #[test]
    fn types_are_listed_by_category() {
        let (code, text) = call(&["types", "--category", "Compliance", "--json"]);
        let rows: Vec<serde_json::Value> = serde_json::from_str(&text).unwrap();
        assert_eq!(code, 0);
        assert!(!rows.is_empty() && rows.iter().all(|row| row["category"] == "Compliance"), "{text}");
        assert!(rows.iter().all(|row| row["permission"].as_str().is_some_and(|text| text.contains(".Read"))), "{text}");
        assert_eq!(call(&["types", "--category", "Colours"]).0, 2);
    }
}
