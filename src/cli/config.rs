//! `inventoryd config`: documentation of the configuration for programs.

use clap::Subcommand;

use super::{CliError, Context, Outcome};
use crate::config;

/// Describe the configuration for editors and other programs
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Print the JSON Schema (2020-12) of the configuration file
    Schema,
}

pub(super) fn run(args: &Args, context: &mut Context<'_>) -> Result<Outcome, CliError> {
    match args.action {
        Action::Schema => context.out.json(&config::json_schema())?,
    }
    Ok(Outcome::Done)
}

#[cfg(test)]
mod tests {
    use boon::{Compiler, Schemas};
    use serde_json::{Value, json};

    use super::super::tests::call;

    fn printed() -> String {
        let (code, schema) = call(&["config", "schema"]);
        assert_eq!(code, 0);
        schema
    }

    fn fits(schema: &str, document: &Value) -> Result<(), String> {
        let (mut schemas, mut compiler) = (Schemas::new(), Compiler::new());
        compiler.add_resource("config.json", serde_json::from_str(schema).unwrap()).unwrap();
        let compiled = compiler.compile("config.json", &mut schemas).unwrap();
        schemas.validate(document, compiled).map_err(|error| format!("{error:#}"))
    }

    /// Every document that differs from `table` by one misspelt key.
    fn misspelt(table: &Value) -> Vec<Value> {
        let Some(keys) = table.as_object() else { return Vec::new() };
        let mut found = Vec::new();
        for (key, value) in keys {
            let mut other = keys.clone();
            other.remove(key);
            let mut renamed = other.clone();
            renamed.insert(format!("{key}x"), value.clone());
            found.push(renamed.into());
            for inner in misspelt(value) {
                let mut changed = other.clone();
                changed.insert(key.clone(), inner);
                found.push(changed.into());
            }
        }
        found
    }

    #[test]
    fn schema_accepts_the_defaults_and_refuses_every_misspelt_key() {
        let schema = printed();
        let defaults: toml::Table = config_defaults();
        let defaults = serde_json::to_value(&defaults).unwrap();
        assert_eq!(fits(&schema, &defaults), Ok(()));
        let documents = misspelt(&defaults);
        assert!(documents.len() > 60, "{}", documents.len());
        for document in documents {
            // The name of a credential is free.
            if document.pointer("/graph/credentials/defaultx").is_none() {
                assert!(fits(&schema, &document).is_err(), "{document:#}");
            }
        }
    }

    #[test]
    fn schema_accepts_a_part_and_refuses_values_of_the_wrong_kind() {
        let schema = printed();
        for (document, good) in [
            (json!({}), true),
            (json!({ "run": { "lease_s": 90 } }), true),
            (json!({ "graph": { "credentials": { "EMEA": { "kind": "workload_identity" } } } }), true),
            (json!({ "graph": { "credentials": { "EMEA": { "client_secret_file": "/x" } } } }), true),
            (json!({ "run": { "lease_s": "ninety" } }), false),
            (json!({ "run": 7 }), false),
            (json!({ "graph": { "cloud": "mars" } }), false),
            (json!({ "graph": { "credentials": { "EMEA": { "kind": "password" } } } }), false),
        ] {
            assert_eq!(fits(&schema, &document).is_ok(), good, "{document}");
        }
    }

    #[test]
    fn schema_documents_every_key_with_its_default_and_no_secret() {
        let schema: Value = serde_json::from_str(&printed()).unwrap();
        let lease = &schema["properties"]["run"]["properties"]["lease_s"];
        assert_eq!(lease["default"], 60);
        assert!(lease["description"].as_str().unwrap().starts_with("Duration of a lease"), "{lease}");
        let kind =
            &schema["properties"]["graph"]["properties"]["credentials"]["additionalProperties"]["properties"]["kind"];
        assert_eq!(kind["default"], "client_secret");
        assert!(schema["properties"]["broker"]["properties"]["url"]["default"].is_null());
    }

    #[test]
    fn invalid_choices_are_not_shown_and_valid_ones_are() {
        let schema: Value = serde_json::from_str(&printed()).unwrap();
        let file = std::env::temp_dir().join(format!("inventoryd-choices-{}.toml", std::process::id()));
        let mut shown_choices = 0;
        for pointer in ["topology/mode", "limits/when_full", "graph/cloud", "telemetry/format"] {
            let (section, name) = pointer.split_once('/').unwrap();
            let property = &schema["properties"][section]["properties"][name];
            let choices = property["oneOf"].as_array().unwrap().iter().map(|one| one["const"].as_str().unwrap());
            for choice in choices.chain(["hunter2"]) {
                std::fs::write(&file, format!("[{section}]\n{name} = \"{choice}\"\n")).unwrap();
                let (_, shown) = call(&["check", "--changed", "--config", file.to_str().unwrap()]);
                assert_eq!(shown.contains(choice), choice != "hunter2", "{pointer} {choice}: {shown}");
                shown_choices += 1;
            }
        }
        std::fs::remove_file(&file).unwrap();
        assert!(shown_choices > 12, "{shown_choices}");
    }

    #[test]
    fn the_published_schema_is_up_to_date() {
        let published = include_str!("../../config/schemas/config.json");
        assert!(
            printed() == published,
            "stale: run `cargo run -- config schema > config/schemas/config.json` and review the difference"
        );
    }

    fn config_defaults() -> toml::Table {
        crate::config::DEFAULTS.parse().unwrap()
    }
}
