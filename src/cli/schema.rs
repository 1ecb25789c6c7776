//! `inventoryd schema`: the JSON Schemas of the messages, generated from their types.

use clap::ValueEnum;
use schemars::generate::SchemaSettings;
use schemars::transform::{RecursiveTransform, Transform};
use schemars::{JsonSchema, Schema};

use super::{CliError, Context, Outcome};
use crate::domain::dead_letter::DeadLetter;
use crate::domain::event::CloudEvent;
use crate::domain::request::SyncRequest;

/// Print the JSON Schema (2020-12) of a message
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    message: Message,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Message {
    /// What a scheduler publishes
    Request,
    /// What a subscriber receives
    Event,
    /// What stands in the dead-letter queue
    DeadLetter,
}

pub(super) fn run(args: &Args, context: &mut Context<'_>) -> Result<Outcome, CliError> {
    context.out.json(&schema(args.message))?;
    Ok(Outcome::Done)
}

/// A request is described as the daemon reads it, so that what has a default may be left out; an event and a dead letter as
/// they are written, so that a subscriber may rely on what is always there.
fn schema(message: Message) -> Schema {
    fn of<T: JsonSchema>(settings: SchemaSettings) -> Schema {
        settings.into_generator().into_root_schema_for::<T>()
    }
    let mut schema = match message {
        Message::Request => of::<SyncRequest>(SchemaSettings::draft2020_12().for_deserialize()),
        Message::Event => of::<CloudEvent>(SchemaSettings::draft2020_12().for_serialize()),
        Message::DeadLetter => of::<DeadLetter>(SchemaSettings::draft2020_12().for_serialize()),
    };
    RecursiveTransform(join_lines).transform(&mut schema);
    if matches!(message, Message::Request) {
        RecursiveTransform(allow_repeats).transform(&mut schema);
    }
    schema
}

/// The source's line breaks mean nothing to a reader of the schema.
fn join_lines(schema: &mut Schema) {
    if let Some(text) = schema.get("description").and_then(|text| text.as_str()) {
        let paragraphs: Vec<String> = text.split("\n\n").map(|one| one.replace('\n', " ")).collect();
        schema.insert("description".to_owned(), paragraphs.join("\n\n").into());
    }
}

/// The daemon drops repeated names; a scheduler need not.
fn allow_repeats(schema: &mut Schema) {
    schema.remove("uniqueItems");
}

#[cfg(test)]
mod tests {
    use super::super::tests::call;

    #[test]
    fn the_published_schemas_are_not_stale() {
        for (message, published) in [
            ("request", include_str!("../../config/schemas/request.json")),
            ("event", include_str!("../../config/schemas/event.json")),
            ("dead-letter", include_str!("../../config/schemas/dead-letter.json")),
        ] {
            let (code, generated) = call(&["schema", message]);
            assert_eq!(code, 0);
            assert!(
                generated == published,
                "stale: run `cargo run -- schema {message} > config/schemas/{message}.json` and look at the difference"
            );
        }
    }
}
