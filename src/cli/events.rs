//! `inventoryd events`: run-completed events as they pass by.

use std::time::Duration;

use clap::Subcommand;
use serde_json::Value;

use super::output::{printable, second};
use super::{CliError, Context, Outcome, note};
use crate::broker::{Broker, EventTail, TailedEvent};
use crate::domain::clock::Deadline;
use crate::domain::event::CloudEvent;

/// Watch run-completed events
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Print events as they are published from now on, one a line
    Tail(Tail),
}

#[derive(Debug, clap::Args)]
struct Tail {
    /// Which: run.completed.STATUS.TENANT with * for one word and # for any, such as 'run.completed.failed.*'
    #[arg(long, value_name = "PATTERN", default_value = "#")]
    binding: String,
    /// Stop after so many
    #[arg(long, value_name = "COUNT")]
    max: Option<u64>,
    /// Stop after so many seconds; exit code 1 if --max had not been reached by then
    #[arg(long, value_name = "SECONDS")]
    timeout_s: Option<u64>,
}

pub(super) async fn run(args: Args, context: &mut Context<'_>) -> Result<Outcome, CliError> {
    let Action::Tail(args) = args.action;
    let config = context.config()?;
    let broker = Broker::new(&config.broker, &config.topology, "inventoryd events tail")?;
    let mut tail = broker.tail_events(&args.binding).await?;
    note(format_args!("listening for {}", args.binding));
    tail_to_end(&args, &mut tail, context).await
}

async fn tail_to_end(args: &Tail, tail: &mut EventTail, context: &mut Context<'_>) -> Result<Outcome, CliError> {
    let deadline = args.timeout_s.map(|seconds| Deadline::after(Duration::from_secs(seconds)));
    let mut seen = 0;
    while args.max.is_none_or(|max| seen < max) {
        let next = match deadline {
            None => tail.next().await,
            Some(deadline) => match tokio::time::timeout(deadline.remaining(), tail.next()).await {
                Ok(next) => next,
                Err(_) => return Ok(if args.max.is_some() { Outcome::Unsuccessful } else { Outcome::Done }),
            },
        };
        let event =
            next.ok_or_else(|| CliError::Failed("the broker has ended the subscription; try again".to_owned()))??;
        let line = if context.out.is_json() { json_line(&event) } else { people_line(&event) };
        context.out.line(line)?;
        context.out.flush()?;
        seen += 1;
    }
    Ok(Outcome::Done)
}

/// The envelope on one line, whatever layout it came in.
fn json_line(event: &TailedEvent) -> String {
    serde_json::from_slice::<Value>(&event.body)
        .map_or_else(|_| String::from_utf8_lossy(&event.body).replace('\n', " "), |value| value.to_string())
}

fn people_line(event: &TailedEvent) -> String {
    let Ok(CloudEvent { data, .. }) = serde_json::from_slice::<CloudEvent>(&event.body) else {
        return printable(&format!("{}: {}", event.routing_key, json_line(event)));
    };
    let codes: Vec<&str> = data.error_codes.iter().map(|code| code.as_str()).collect();
    let line = format!(
        "{}  {:8} {}  items {} (+{} ~{})  missing {}+{}  run {}  key {}  {}",
        second(&data.finished_at),
        data.status.as_str(),
        data.tenant_id,
        data.counters.items_observed_count,
        data.counters.items_created_count,
        data.counters.items_changed_count,
        data.missing_high_count,
        data.missing_low_count,
        data.run_id,
        data.idempotency_key,
        codes.join(" ")
    );
    printable(line.trim_end())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_event_of_ours_is_still_shown_on_one_line() {
        let event = TailedEvent {
            routing_key: "run.completed.x".to_owned(),
            message_id: None,
            body: b"{\n \"a\": 1\n}".to_vec(),
        };
        assert_eq!(people_line(&event), "run.completed.x: {\"a\":1}");
        assert_eq!(json_line(&event), "{\"a\":1}");
    }
}
