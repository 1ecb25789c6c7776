//! `inventoryd dead`: lists, shows, replays and drops dead letters.

use std::collections::HashSet;
use std::path::PathBuf;
use std::str::FromStr;

use clap::Subcommand;
use schemars::JsonSchema;
use serde::Serialize;
use serde_json::json;

use super::confirm::Confirm;
use super::output::{or_dash, printable};
use super::selection::read_file;
use super::{CliError, Context, Outcome, note};
use crate::broker::{Broker, BrokerError, DeadLetter, DeadLetters};
use crate::domain::failure::DeadReason;

/// Where the warnings about policies are explained.
const SEE: &str = "see \"Policies\" in deploy/README.md";

/// List, show, replay or drop dead letters
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// List dead letters, oldest first
    List(List),
    /// Show a dead letter with its body, cause and remedy
    Show(Show),
    /// Publish dead letters to the request queue again and remove them
    Replay(Replay),
    /// Remove dead letters permanently
    Drop(Drop),
}

#[derive(Debug, clap::Args)]
struct List {
    /// Maximum number of dead letters
    #[arg(long, default_value_t = 100, value_name = "COUNT")]
    limit: usize,
}

#[derive(Debug, clap::Args)]
struct Show {
    /// Id, or a unique prefix
    id: String,
}

#[derive(Debug, clap::Args)]
#[group(required = true, multiple = false)]
struct Which {
    /// Ids, or unique prefixes
    #[arg(value_name = "ID", value_parser = clap::builder::NonEmptyStringValueParser::new())]
    ids: Vec<String>,
    /// All dead letters with this reason
    #[arg(long)]
    reason: Option<DeadReason>,
    /// All dead letters
    #[arg(long)]
    all: bool,
}

#[derive(Debug, clap::Args)]
struct Drop {
    #[command(flatten)]
    which: Which,
    #[command(flatten)]
    confirm: Confirm,
}

#[derive(Debug, clap::Args)]
struct Replay {
    #[command(flatten)]
    which: Which,
    /// Replay one dead letter with the body in this file instead of its own; - for standard input
    #[arg(long, value_name = "FILE", conflicts_with_all = ["reason", "all"])]
    body: Option<PathBuf>,
}

/// Dead letter, as printed with `--json`.
#[derive(Debug, Serialize, JsonSchema)]
pub(super) struct Facts<'a> {
    /// Short id.
    id: &'a str,
    /// Reason; `inventoryd explain REASON` shows cause and remedy.
    reason: &'a str,
    /// Detail of the rejection, if the daemon rejected the message.
    detail: Option<&'a str>,
    /// Time of rejection, RFC 3339.
    at: Option<&'a str>,
    /// Rejecting replica, or `broker`.
    by: &'a str,
    /// Message id of the publisher.
    message_id: Option<&'a str>,
    /// Correlation id of the publisher.
    correlation_id: Option<&'a str>,
    /// Content type.
    content_type: Option<&'a str>,
    /// Number of retries before the rejection.
    retries: u64,
    /// Size of the body.
    bytes: u64,
    /// Number of copies of this letter in the queue.
    copies: usize,
    /// Broker's reason for moving it out of the dead-letter queue, if a policy did.
    moved: Option<&'a str>,
    /// Body as text, for a single letter.
    #[serde(skip_serializing_if = "Option::is_none")]
    body: Option<&'a str>,
}

pub(super) async fn run(args: Args, context: &mut Context<'_>) -> Result<Outcome, CliError> {
    let config = context.config()?;
    let broker = Broker::new(&config.broker, &config.topology, "inventoryd dead")?;
    // The queue does not exist before the first daemon has started.
    broker.ensure_topology().await?;
    let mut letters = broker.dead_letters().await?;
    let done = match args.action {
        Action::List(args) => list(&args, &mut letters, context).await,
        Action::Show(args) => show(&args, &mut letters, context).await,
        Action::Replay(args) => replay(&args, &mut letters, context).await,
        Action::Drop(args) => discard(&args, &mut letters, context).await,
    };
    // In all cases, to return unchanged messages to the queue.
    letters.close().await;
    done.map(|()| Outcome::Done)
}

async fn list(args: &List, letters: &mut DeadLetters, context: &mut Context<'_>) -> Result<(), CliError> {
    let all = letters.left();
    let found = letters.list(args.limit, |_| false).await?;
    warn_of_policies(&found);
    if context.out.is_json() {
        return context.out.json(&found.iter().map(Facts::from).collect::<Vec<_>>());
    }
    let times = context.out.times();
    let row = |letter: &DeadLetter| {
        [
            letter.id.clone(),
            letter.reason.clone(),
            or_dash(letter.detail.as_ref()),
            letter.at.as_deref().map_or_else(|| "-".to_owned(), |at| times.show(at)),
            letter.by.clone(),
            letter.bytes.to_string(),
        ]
    };
    let header = ["id", "reason", "detail", "since", "by", "bytes"];
    context.out.table(header, &["by", "bytes", "detail", "since"], found.iter().map(row))?;
    let shown: usize = found.iter().map(DeadLetter::copies).sum();
    if (shown as u64) < u64::from(all) {
        context.out.line(format_args!("{shown} of {all} shown; use --limit for more"))?;
    }
    Ok(())
}

async fn show(args: &Show, letters: &mut DeadLetters, context: &mut Context<'_>) -> Result<(), CliError> {
    let letter = letters.find(&args.id).await?.ok_or_else(|| unknown(&args.id))?;
    let body = String::from_utf8_lossy(&letter.body);
    if context.out.is_json() {
        return context.out.json(&Facts { body: Some(&body), ..Facts::from(&letter) });
    }
    let times = context.out.times();
    let reason = DeadReason::from_str(&letter.reason).ok();
    let rows = [
        ("reason", Some(letter.reason.clone())),
        ("detail", letter.detail.clone()),
        ("cause", reason.map(|reason| reason.cause().to_owned())),
        ("remedy", reason.map(|reason| reason.remedy().to_owned())),
        ("since", letter.at.as_deref().map(|at| times.show_exactly(at))),
        ("by", Some(letter.by.clone())),
        ("message id", letter.message_id.clone()),
        ("correlation id", letter.correlation_id.clone()),
        ("content type", letter.content_type.clone()),
        ("retries before", Some(format!("{} times", letter.retries))),
    ];
    let rows = rows.into_iter().filter_map(|(name, value)| Some([name.to_owned(), value?]));
    context.out.table(["dead letter", &letter.id], &[], rows)?;
    context.out.line(printable(&body))
}

async fn replay(args: &Replay, letters: &mut DeadLetters, context: &mut Context<'_>) -> Result<(), CliError> {
    if args.which.ids.is_empty() {
        let replay_complete = async |letters: &mut DeadLetters, letter: &DeadLetter| {
            if !letter.complete {
                note(format_args!("note: {} is not replayed: its body is too large to be a request", letter.id));
                return Ok(false);
            }
            letters.replay(letter).await.map(|()| true)
        };
        return each_matching("replayed", &args.which, letters, context, replay_complete).await;
    }
    let mut chosen = choose(&args.which, letters).await?;
    if let Some(path) = &args.body {
        let [letter] = chosen.as_mut_slice() else {
            return Err(CliError::Usage("--body replaces the body of one dead letter; give one id".to_owned()));
        };
        letter.body = read_file(path)?;
        letter.complete = true;
    }
    each("replayed", &chosen, context, async |letter| letters.replay(letter).await).await
}

async fn discard(args: &Drop, letters: &mut DeadLetters, context: &mut Context<'_>) -> Result<(), CliError> {
    let which = &args.which;
    let question = match which.reason {
        _ if which.all => format!("permanently remove all {} dead letters?", letters.left()),
        Some(reason) => format!("permanently remove every dead letter with reason {reason}?"),
        None => format!("permanently remove {} dead letters?", which.ids.len()),
    };
    args.confirm.ask(&question)?;
    if which.ids.is_empty() {
        let drop_one =
            async |letters: &mut DeadLetters, letter: &DeadLetter| letters.discard(letter).await.map(|()| true);
        return each_matching("dropped", which, letters, context, drop_one).await;
    }
    let chosen = choose(which, letters).await?;
    each("dropped", &chosen, context, async |letter| letters.discard(letter).await).await
}

/// Applies an action to each letter, and reports the completed ones even if a later one fails.
async fn each(
    what: &str,
    chosen: &[DeadLetter],
    context: &mut Context<'_>,
    mut act: impl AsyncFnMut(&DeadLetter) -> Result<(), BrokerError>,
) -> Result<(), CliError> {
    let mut done = Vec::new();
    for letter in chosen {
        if let Err(error) = act(letter).await {
            sum_up(what, &done, context)?;
            return Err(error.into());
        }
        tell(what, letter, context)?;
        done.push(letter.id.clone());
    }
    sum_up(what, &done, context)
}

/// Applies an action to each matching letter as it is read, so that one body at a time is in memory. The action returns
/// false for a letter that it left alone.
async fn each_matching(
    what: &str,
    which: &Which,
    letters: &mut DeadLetters,
    context: &mut Context<'_>,
    act: impl AsyncFn(&mut DeadLetters, &DeadLetter) -> Result<bool, BrokerError>,
) -> Result<(), CliError> {
    let (mut done, mut acted_on) = (Vec::new(), HashSet::new());
    while let Some(letter) = letters.next().await? {
        if !which.matches(&letter) {
            continue;
        }
        if letter.dead_id.clone().is_some_and(|id| !acted_on.insert(id)) {
            // A copy of a letter that is done.
            letters.discard(&letter).await?;
            continue;
        }
        match act(letters, &letter).await {
            Ok(true) => {}
            Ok(false) => continue,
            Err(error) => {
                sum_up(what, &done, context)?;
                return Err(error.into());
            }
        }
        tell(what, &letter, context)?;
        done.push(letter.id);
    }
    sum_up(what, &done, context)
}

impl Which {
    fn matches(&self, letter: &DeadLetter) -> bool {
        self.all
            || self.reason.is_some_and(|reason| reason.as_str() == letter.reason)
            || self.ids.iter().any(|name| letter.id.starts_with(name.as_str()))
    }
}

/// Selects letters by id. An unknown or ambiguous id is an error, so that nothing is done by halves.
async fn choose(which: &Which, letters: &mut DeadLetters) -> Result<Vec<DeadLetter>, CliError> {
    let mut found = letters.list(usize::MAX, |letter| which.matches(letter)).await?;
    let ids: Vec<&str> = found.iter().map(|letter| letter.id.as_str()).collect();
    let named = which.ids.iter().map(|name| Ok(full_id(name, &ids)?.to_owned()));
    let named = named.collect::<Result<Vec<String>, CliError>>()?;
    found.retain(|letter| named.contains(&letter.id));
    Ok(found)
}

/// The one id that equals `name`, or else starts with it.
fn full_id<'a>(name: &str, ids: &[&'a str]) -> Result<&'a str, CliError> {
    let starting: Vec<&str> = ids.iter().copied().filter(|id| id.starts_with(name)).collect();
    match starting.as_slice() {
        [] => Err(unknown(name)),
        [one] => Ok(one),
        several => (several.iter().copied().find(|id| *id == name))
            .ok_or_else(|| CliError::Failed(format!("id {name:?} is ambiguous: {}", several.join(", ")))),
    }
}

/// Warns of policies of the broker that show in the letters.
fn warn_of_policies(letters: &[DeadLetter]) {
    let by_policy = [DeadReason::Expired, DeadReason::Maxlen].map(DeadReason::as_str);
    let removed = letters.iter().filter(|letter| by_policy.contains(&letter.reason.as_str())).count();
    if removed > 0 {
        note(format_args!(
            "warning: {removed} of these were removed from the requests queue by a TTL or a length limit; {SEE}"
        ));
    }
    let moved = letters.iter().filter(|letter| letter.moved.is_some()).count();
    if moved > 0 {
        note(format_args!("warning: {moved} of these were moved out of the dead-letter queue by a policy; {SEE}"));
    }
}

fn tell(what: &str, letter: &DeadLetter, context: &mut Context<'_>) -> Result<(), CliError> {
    if context.out.is_json() {
        return Ok(());
    }
    context.out.line(format_args!("{what} {} ({})", letter.id, letter.reason))
}

fn sum_up(what: &str, done: &[String], context: &mut Context<'_>) -> Result<(), CliError> {
    if context.out.is_json() {
        return context.out.json(&json!({ what: done }));
    }
    if done.is_empty() { context.out.line("no matching dead letters") } else { Ok(()) }
}

impl<'a> From<&'a DeadLetter> for Facts<'a> {
    fn from(letter: &'a DeadLetter) -> Self {
        Self {
            id: &letter.id,
            reason: &letter.reason,
            detail: letter.detail.as_deref(),
            at: letter.at.as_deref(),
            by: &letter.by,
            message_id: letter.message_id.as_deref(),
            correlation_id: letter.correlation_id.as_deref(),
            content_type: letter.content_type.as_deref(),
            retries: letter.retries,
            bytes: letter.bytes,
            copies: letter.copies(),
            moved: letter.moved.as_deref(),
            body: None,
        }
    }
}

fn unknown(id: &str) -> CliError {
    CliError::Failed(format!("dead letter {id:?} not found; `inventoryd dead list` lists dead letters"))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::super::Cli;

    #[test]
    fn replay_and_drop_require_a_selection() {
        let parse = |line: &[&str]| Cli::try_parse_from([&["inventoryd", "dead"], line].concat()).is_ok();
        assert!(
            parse(&["drop", "a1", "b2"]) && parse(&["replay", "--all"]) && parse(&["drop", "--reason", "invalid_json"])
        );
        assert!(!parse(&["drop", ""]) && !parse(&["drop", "--reason", "invalid_jsn"]));
        assert!(parse(&["replay", "a1", "--body", "f"]) && !parse(&["replay", "--all", "--body", "f"]));
        assert!(!parse(&["drop"]) && !parse(&["drop", "--all", "a1"]) && !parse(&["replay", "--all", "--reason", "x"]));
    }
}
