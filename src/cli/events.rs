//! `inventoryd events`: prints run-completed events as they are published or published again.

use std::time::Duration;

use clap::Subcommand;
use serde_json::{Value, json};
use time::OffsetDateTime;
use uuid::Uuid;

use super::moment::moment;
use super::output::{printable, second};
use super::{CliError, Context, Outcome, note};
use crate::broker::{Broker, EventTail, Outgoing, PublishOutcome, TailedEvent};
use crate::domain::clock::Deadline;
use crate::domain::event::CloudEvent;
use crate::domain::run::RunStatus;
use crate::store::ReplayFilter;

/// Watch run-completed events, or publish them again
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Print events as they are published from now on, one a line
    Tail(Tail),
    /// Publish the events of completed runs again, with the same ids and bytes, for a subscriber that was away
    Replay(Replay),
}

#[derive(Debug, clap::Args)]
struct Tail {
    /// Binding pattern run.completed.STATUS.TENANT with * for one word and # for any, such as 'run.completed.failed.*'
    #[arg(long, value_name = "PATTERN", default_value = "#")]
    binding: String,
    /// Stop after this number of events
    #[arg(long, value_name = "COUNT")]
    max: Option<u64>,
    /// Stop after this number of seconds; exit code 1 if --max was not reached
    #[arg(long, value_name = "SECONDS")]
    timeout_s: Option<u64>,
}

#[derive(Debug, clap::Args)]
struct Replay {
    /// Events of runs that ended at this time or later: RFC 3339 such as 2026-11-28T00:00:00Z, or an age such as 24h
    #[arg(long, value_name = "TIME", value_parser = moment)]
    since: OffsetDateTime,
    /// Only of runs that ended before this time
    #[arg(long, value_name = "TIME", value_parser = moment)]
    until: Option<OffsetDateTime>,
    /// Only of this tenant
    #[arg(long, value_name = "TENANT")]
    tenant: Option<Uuid>,
    /// Only of runs with this status: success, partial, failed or skipped
    #[arg(long, value_name = "STATUS")]
    status: Option<RunStatus>,
    /// Straight to this queue, so that no other subscriber sees them
    #[arg(long, value_name = "QUEUE")]
    to_queue: Option<String>,
}

pub(super) async fn run(args: Args, context: &mut Context<'_>) -> Result<Outcome, CliError> {
    match args.action {
        Action::Tail(args) => tail(args, context).await,
        Action::Replay(args) => replay(&args, context).await,
    }
}

/// Publishes in batches, in the order in which the runs started, and stops at the first event that is not confirmed.
async fn replay(args: &Replay, context: &mut Context<'_>) -> Result<Outcome, CliError> {
    let config = context.config()?;
    let store = context.store().await?;
    let publisher = Broker::new(&config.broker, &config.topology, "inventoryd events replay")?.publisher();
    let filter = ReplayFilter { since: args.since, until: args.until, tenant_id: args.tenant, status: args.status };
    let (mut after, mut published) = (Uuid::nil(), 0_usize);
    loop {
        let runs = store.runs_to_replay(&filter, after, config.outbox.batch).await?;
        let Some(last) = runs.last() else { break };
        after = last.run_id;
        let mut events = store.load_events(&runs).await?;
        events.sort_by_key(|(event, _)| event.run_id);
        let messages = events.into_iter().map(|(event, traceparent)| {
            let message = Outgoing::run_completed(event, &config.telemetry.deployment, traceparent);
            match &args.to_queue {
                Some(queue) => message.to_queue(queue),
                None => message,
            }
        });
        let outcomes = publisher.publish(messages.collect()).await;
        let confirmed = outcomes.iter().take_while(|outcome| **outcome == PublishOutcome::Confirmed).count();
        published += confirmed;
        if let Some(outcome) = outcomes.get(confirmed) {
            let problem = match (outcome, &args.to_queue) {
                (PublishOutcome::Unroutable, Some(queue)) => format!("there is no queue {queue:?}"),
                (outcome, _) => format!("the broker did not confirm an event ({})", outcome.as_str()),
            };
            return Err(CliError::Failed(format!("{problem}; {published} events were published")));
        }
    }
    publisher.close().await;
    if context.out.is_json() {
        context.out.json(&json!({ "published": published }))?;
    } else {
        context.out.line(format_args!("{published} events published again"))?;
    }
    Ok(Outcome::Done)
}

async fn tail(args: Tail, context: &mut Context<'_>) -> Result<Outcome, CliError> {
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
        let event = next
            .ok_or_else(|| CliError::Failed("the broker ended the subscription; run the command again".to_owned()))??;
        let line = if context.out.is_json() { json_line(&event) } else { text_line(&event) };
        context.out.line(line)?;
        context.out.flush()?;
        seen += 1;
    }
    Ok(Outcome::Done)
}

/// Envelope as one line of JSON.
fn json_line(event: &TailedEvent) -> String {
    serde_json::from_slice::<Value>(&event.body)
        .map_or_else(|_| String::from_utf8_lossy(&event.body).replace('\n', " "), |value| value.to_string())
}

fn text_line(event: &TailedEvent) -> String {
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
    fn an_unknown_event_is_shown_on_one_line() {
        let event = TailedEvent {
            routing_key: "run.completed.x".to_owned(),
            message_id: None,
            body: b"{\n \"a\": 1\n}".to_vec(),
        };
        assert_eq!(text_line(&event), "run.completed.x: {\"a\":1}");
        assert_eq!(json_line(&event), "{\"a\":1}");
    }
}
