//! `inventoryd schema`: JSON Schemas of messages, documents and `--json` output, generated from the types.

use clap::ValueEnum;
use schemars::generate::SchemaSettings;
use schemars::transform::{RecursiveTransform, Transform};
use schemars::{JsonSchema, Schema};

use super::{CliError, Context, Outcome, dead, doctor, explain, missing, run_diff, types};
use crate::config::Setting;
use crate::domain::dead_letter::DeadLetter;
use crate::domain::event::CloudEvent;
use crate::domain::request::SyncRequest;
use crate::http::Status;
use crate::store::{Item, Run, RunDetails, Tenant};

/// Print the JSON Schema (2020-12) of a message or document
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    message: Message,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Message {
    /// Sync request, published by a scheduler
    Request,
    /// Run-completed event, received by a subscriber
    Event,
    /// Message in the dead-letter queue
    DeadLetter,
    /// Answer of /status
    Status,
    /// Output of runs list --json
    Runs,
    /// Output of runs show --json
    Run,
    /// Output of runs diff --json
    RunDiff,
    /// Output of items list --json
    Items,
    /// Output of missing --json
    Missing,
    /// Output of tenant list --json
    Tenants,
    /// Output of dead list --json
    DeadLetters,
    /// Output of types --json
    Types,
    /// Output of explain --json
    Codes,
    /// Output of check --json
    Settings,
    /// Output of doctor --json
    Doctor,
}

pub(super) fn run(args: &Args, context: &mut Context<'_>) -> Result<Outcome, CliError> {
    context.out.json(&schema(args.message))?;
    Ok(Outcome::Done)
}

/// Schema of a message. Requests use the deserialisation form, in which fields with a default are optional; events and
/// dead letters use the serialisation form, in which fields that are always present are required.
fn schema(message: Message) -> Schema {
    fn of<T: JsonSchema>(settings: SchemaSettings) -> Schema {
        settings.into_generator().into_root_schema_for::<T>()
    }
    let read = SchemaSettings::draft2020_12().for_deserialize();
    let written = SchemaSettings::draft2020_12().for_serialize();
    let list = |mut schema: Schema, command: &str| {
        schema.insert("title".to_owned(), format!("inventoryd {command}, version 1").into());
        schema
    };
    let mut schema = match message {
        Message::Request => of::<SyncRequest>(read),
        Message::Event => of::<CloudEvent>(written),
        Message::DeadLetter => of::<DeadLetter>(written),
        Message::Status => of::<Status>(written),
        Message::Runs => list(of::<Vec<Run>>(written), "runs list"),
        Message::Run => list(of::<RunDetails>(written), "runs show"),
        Message::RunDiff => of::<run_diff::Document>(written),
        Message::Items => list(of::<Vec<Item>>(written), "items list"),
        Message::Missing => of::<missing::Document<'_>>(written),
        Message::Tenants => list(of::<Vec<Tenant>>(written), "tenant list"),
        Message::DeadLetters => list(of::<Vec<dead::Facts<'_>>>(written), "dead list"),
        Message::Types => list(of::<Vec<types::Row<'_>>>(written), "types"),
        Message::Codes => list(of::<Vec<explain::Meaning>>(written), "explain"),
        Message::Settings => list(of::<Vec<Setting>>(written), "check"),
        Message::Doctor => of::<doctor::Document<'_>>(written),
    };
    RecursiveTransform(join_lines).transform(&mut schema);
    if matches!(message, Message::Request) {
        RecursiveTransform(allow_repeats).transform(&mut schema);
    }
    schema
}

/// Joins the lines of a description; line breaks of the source are not significant.
fn join_lines(schema: &mut Schema) {
    if let Some(text) = schema.get("description").and_then(|text| text.as_str()) {
        let paragraphs: Vec<String> = text.split("\n\n").map(|one| one.replace('\n', " ")).collect();
        schema.insert("description".to_owned(), paragraphs.join("\n\n").into());
    }
}

/// Permits repeated names, which the daemon removes.
fn allow_repeats(schema: &mut Schema) {
    schema.remove("uniqueItems");
}

#[cfg(test)]
mod tests {
    use super::super::tests::call;
    use super::*;

    #[test]
    fn published_schemas_are_up_to_date() {
        for message in Message::value_variants() {
            let name = message.to_possible_value().unwrap().get_name().to_owned();
            let path = format!("{}/config/schemas/{name}.json", env!("CARGO_MANIFEST_DIR"));
            let published = std::fs::read_to_string(&path).unwrap_or_default();
            let (code, generated) = call(&["schema", &name]);
            assert_eq!(code, 0);
            assert!(
                generated == published,
                "stale: run `cargo run -- schema {name} > config/schemas/{name}.json` and review the difference"
            );
        }
    }
}
