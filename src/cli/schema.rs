//! `inventoryd schema`: JSON Schemas of messages and documents, generated from the types.

use clap::ValueEnum;
use schemars::generate::SchemaSettings;
use schemars::transform::{RecursiveTransform, Transform};
use schemars::{JsonSchema, Schema};

use super::{CliError, Context, Outcome};
use crate::domain::dead_letter::DeadLetter;
use crate::domain::event::CloudEvent;
use crate::domain::request::SyncRequest;
use crate::http::Status;

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
    let mut schema = match message {
        Message::Request => of::<SyncRequest>(SchemaSettings::draft2020_12().for_deserialize()),
        Message::Event => of::<CloudEvent>(SchemaSettings::draft2020_12().for_serialize()),
        Message::DeadLetter => of::<DeadLetter>(SchemaSettings::draft2020_12().for_serialize()),
        Message::Status => of::<Status>(SchemaSettings::draft2020_12().for_serialize()),
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

    #[test]
    fn published_schemas_are_up_to_date() {
        for (message, published) in [
            ("request", include_str!("../../config/schemas/request.json")),
            ("event", include_str!("../../config/schemas/event.json")),
            ("dead-letter", include_str!("../../config/schemas/dead-letter.json")),
            ("status", include_str!("../../config/schemas/status.json")),
        ] {
            let (code, generated) = call(&["schema", message]);
            assert_eq!(code, 0);
            assert!(
                generated == published,
                "stale: run `cargo run -- schema {message} > config/schemas/{message}.json` and review the difference"
            );
        }
    }
}
