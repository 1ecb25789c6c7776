//! `inventoryd request`: publishes a sync request, and with `--wait` follows its run.

use std::path::PathBuf;
use std::time::Duration;

use serde_json::json;
use uuid::Uuid;

use super::ids::unknown_tenant;
use super::progress::{Follow, follow, spinner};
use super::selection::{SelectionArgs, read_file};
use super::{CliError, Context, Outcome, note, runs};
use crate::broker::{Broker, BrokerError, DeadLetter, RequestWatch};
use crate::domain::catalog::Catalog;
use crate::domain::clock::Deadline;
use crate::domain::failure::Rejection;
use crate::domain::request::{CLOUDEVENTS_CONTENT_TYPE, SCHEMA_VERSION, SyncRequest};
use crate::store::Store;

const POLL_INTERVAL: Duration = Duration::from_millis(300);
/// Interval at which the broker is asked why no daemon has accepted the request.
const LOOK_INTERVAL: Duration = Duration::from_secs(2);

/// Publish a sync request for a tenant
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Tenant id
    #[arg(long, value_name = "GUID", required_unless_present = "from_file")]
    tenant: Option<Uuid>,
    #[command(flatten)]
    selection: SelectionArgs,
    /// Idempotency key: a repeated key of a tenant never starts a second run [default: a new key]
    #[arg(long)]
    key: Option<String>,
    /// Correlation id, copied to the run and its event
    #[arg(long, value_name = "ID")]
    correlation_id: Option<String>,
    /// Requester, recorded with the run
    #[arg(long, value_name = "NAME", default_value = "inventoryd request")]
    requested_by: String,
    /// Publish the bytes of this file without validation; - for standard input
    #[arg(long, alias = "raw", value_name = "FILE",
          conflicts_with_all = ["tenant", "types", "category", "all", "no_foundations", "foundations_only", "key", "correlation_id"])]
    from_file: Option<PathBuf>,
    /// Print the message and its selection hash without publishing
    #[arg(long, conflicts_with = "wait")]
    dry_run: bool,
    /// Follow the run to its end; exit code 0 if it succeeds
    #[arg(long)]
    wait: bool,
    /// Maximum seconds to wait
    #[arg(long, value_name = "SECONDS", default_value_t = 3600, requires = "wait")]
    timeout_s: u64,
}

/// Message to publish, and the daemon's reading of it.
struct Message {
    body: Vec<u8>,
    content_type: &'static str,
    read: Result<SyncRequest, Rejection>,
}

impl Message {
    fn of(args: &Args, catalog: &Catalog) -> Result<Self, CliError> {
        match &args.from_file {
            Some(path) => Ok(Self::from_bytes(read_file(path)?, catalog)),
            None => Self::from_flags(args, catalog),
        }
    }

    /// Sets the content type: the daemon unwraps an envelope, recognised here by `specversion`, only with its content type.
    fn from_bytes(body: Vec<u8>, catalog: &Catalog) -> Self {
        let is_envelope = SyncRequest::looks_like_envelope(&body);
        let content_type = if is_envelope { CLOUDEVENTS_CONTENT_TYPE } else { "application/json" };
        let read = SyncRequest::parse(Some(content_type), &body)
            .and_then(|request| catalog.resolve_request(&request.selection).map(|_| request));
        Self { read, body, content_type }
    }

    fn from_flags(args: &Args, catalog: &Catalog) -> Result<Self, CliError> {
        let request = SyncRequest {
            schema_version: SCHEMA_VERSION,
            tenant_id: args.tenant.ok_or_else(|| CliError::Usage("--tenant is required".to_owned()))?,
            idempotency_key: args.key.clone().unwrap_or_else(|| Uuid::new_v4().to_string()),
            selection: args.selection.to_selection()?,
            correlation_id: args.correlation_id.clone(),
            requested_by: Some(args.requested_by.clone()),
        };
        let body = serde_json::to_vec(&request).map_err(|error| CliError::Failed(error.to_string()))?;
        let message = Self::from_bytes(body, catalog);
        match message.read {
            Err(rejection) => Err(CliError::Usage(rejection.detail)),
            Ok(_) => Ok(message),
        }
    }

    fn request(&self) -> Result<&SyncRequest, CliError> {
        let refuse = |rejection: &Rejection| {
            CliError::Failed(format!("the daemon would reject it: {}: {}", rejection.reason, rejection.detail))
        };
        self.read.as_ref().map_err(refuse)
    }
}

pub(super) async fn run(args: &Args, context: &mut Context<'_>) -> Result<Outcome, CliError> {
    let message = Message::of(args, &context.config()?.graph.catalog()?)?;
    if args.dry_run {
        return dry_run(&message, context);
    }
    if args.wait {
        return publish_and_wait(&message, Duration::from_secs(args.timeout_s), context).await;
    }
    publish(&message, context).await?;
    print_published(&message, context)?;
    Ok(Outcome::Done)
}

fn dry_run(message: &Message, context: &mut Context<'_>) -> Result<Outcome, CliError> {
    let request = message.request()?;
    let hash = request.selection.hash();
    if context.out.is_json() {
        context.out.json(&json!({ "message": request, "selection_hash": hash }))?;
    } else {
        context.out.json(request)?;
        context.out.line(hash)?;
    }
    Ok(Outcome::Done)
}

async fn publish(message: &Message, context: &Context<'_>) -> Result<(), CliError> {
    let send = async |broker: &Broker| broker.publish_request(message.body.clone(), message.content_type, None).await;
    publish_by(message, context, send).await
}

async fn publish_by<T>(
    message: &Message,
    context: &Context<'_>,
    send: impl AsyncFn(&Broker) -> Result<T, BrokerError>,
) -> Result<T, CliError> {
    let config = context.config()?;
    if let Ok(request) = &message.read {
        let unknown = config.graph.catalog()?.resolve(&request.selection).unsupported;
        if !unknown.is_empty() {
            note(format_args!(
                "note: unknown to this version, and an error in the run if unknown to the daemon: {}",
                unknown.join(", ")
            ));
        }
    }
    let broker = Broker::new(&config.broker, &config.topology, "inventoryd request")?;
    match send(&broker).await {
        // Before the first daemon has started the queue may not exist. The idempotency key makes a second publish safe.
        Err(BrokerError::NotTaken(_) | BrokerError::Lost { .. }) => {
            broker.ensure_topology().await?;
            Ok(send(&broker).await?)
        }
        sent => Ok(sent?),
    }
}

fn print_published(message: &Message, context: &mut Context<'_>) -> Result<(), CliError> {
    let told = match &message.read {
        Ok(request) => json!({
            "tenant_id": request.tenant_id, "idempotency_key": request.idempotency_key,
            "selection_hash": request.selection.hash(), "correlation_id": request.correlation_id }),
        Err(rejection) => {
            json!({ "bytes": message.body.len(), "would_be_rejected": rejection.reason, "detail": rejection.detail })
        }
    };
    if context.out.is_json() {
        return context.out.json(&told);
    }
    match &message.read {
        Ok(request) => context.out.line(format_args!(
            "published: tenant {}, key {}, selection {}",
            request.tenant_id,
            request.idempotency_key,
            request.selection.hash()
        )),
        Err(rejection) => context.out.line(format_args!(
            "published {} bytes that the daemon will reject: {}: {}",
            message.body.len(),
            rejection.reason,
            rejection.detail
        )),
    }
}

async fn publish_and_wait(
    message: &Message,
    timeout: Duration,
    context: &mut Context<'_>,
) -> Result<Outcome, CliError> {
    let deadline = Deadline::after(timeout);
    let request = message.request()?;
    let (store, catalog) = (context.store().await?, context.config()?.graph.catalog()?);
    refuse_dead_letter(request, &store).await?;
    let watched = async |broker: &Broker| broker.publish_and_watch(message.body.clone(), message.content_type).await;
    let mut watch = publish_by(message, context, watched).await?;
    let run_id = wait_for_run(request, &store, &mut watch, deadline).await?;
    drop(watch);
    let at = Follow { store: &store, catalog: &catalog };
    let followed = tokio::time::timeout(deadline.remaining(), follow(&at, run_id)).await;
    let details = followed
        .map_err(|_| {
            CliError::Failed(format!(
                "run {run_id} did not end within --timeout-s; follow it with `inventoryd runs watch {run_id}`"
            ))
        })??
        .ok_or_else(|| CliError::Failed(format!("run {run_id} no longer exists")))?;
    runs::print(&details, context)?;
    Ok(runs::by_status(details.run.status))
}

/// Refuses a request that the daemon would dead-letter, because no run would ever start for it.
async fn refuse_dead_letter(request: &SyncRequest, store: &Store) -> Result<(), CliError> {
    if store.tenant_credential(request.tenant_id).await?.is_none() {
        return Err(unknown_tenant(request.tenant_id));
    }
    let Some(run_id) = store.find_run(request.tenant_id, &request.idempotency_key).await? else { return Ok(()) };
    let Some(earlier) = store.show_run(run_id).await? else { return Ok(()) };
    if earlier.run.selection_hash != request.selection.hash() {
        return Err(CliError::Failed(format!(
            "key {:?} was already used for another selection (run {run_id}); use a new key",
            request.idempotency_key
        )));
    }
    note(format_args!("note: the key was already used; showing the existing run"));
    Ok(())
}

async fn wait_for_run(
    request: &SyncRequest,
    store: &Store,
    watch: &mut RequestWatch,
    deadline: Deadline,
) -> Result<Uuid, CliError> {
    if !watch.watches_dead_letters() {
        note("note: this user of the broker may not declare a private queue, so a dead letter is not noticed");
    }
    let waiting = spinner("published; waiting for a daemon to accept it".to_owned());
    let mut obstacle = None;
    let mut next_look = tokio::time::Instant::now() + LOOK_INTERVAL;
    let run_id = loop {
        if let Some(run_id) = store.find_run(request.tenant_id, &request.idempotency_key).await? {
            break run_id;
        }
        if deadline.passed() {
            let cause = find_obstacle(watch).await.unwrap_or("check the daemon's log and /status");
            return Err(CliError::Failed(format!("no daemon accepted the request within --timeout-s: {cause}")));
        }
        if next_look <= tokio::time::Instant::now() {
            next_look += LOOK_INTERVAL;
            let found = find_obstacle(watch).await;
            if let Some(found) = found.filter(|_| found != obstacle) {
                waiting.suspend(|| note(format_args!("note: {found}; still waiting")));
            }
            obstacle = found;
        }
        tokio::select! {
            letter = watch.dead_letter() => return Err(dead_lettered(&letter)),
            () = tokio::time::sleep(POLL_INTERVAL) => {}
        }
    };
    waiting.finish_and_clear();
    Ok(run_id)
}

/// Reason that is seen on the broker for a request that no daemon has accepted.
async fn find_obstacle(watch: &RequestWatch) -> Option<&'static str> {
    if watch.blocked() {
        return Some("the broker has a memory or disk alarm, which holds up publishers");
    }
    match watch.consumers().await {
        Ok(0) => Some("no daemon consumes the request queue: start a daemon, or see /status of a paused one"),
        Ok(_) => None,
        Err(_) => Some("the broker does not answer"),
    }
}

fn dead_lettered(letter: &DeadLetter) -> CliError {
    let detail = letter.detail.as_ref().map(|detail| format!(": {detail}")).unwrap_or_default();
    CliError::Failed(format!(
        "the request was dead-lettered: {}{detail}; see `inventoryd explain {}` and `inventoryd dead list`",
        letter.reason, letter.reason
    ))
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use serde_json::Value;

    use super::super::tests::call;
    use super::*;

    const TENANT: &str = "6a5b1a3e-3e24-4d1c-9d7b-0c3f1a2b3c4d";

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    fn message(flags: &[&str]) -> Result<Message, CliError> {
        let line = ["request", "--tenant", TENANT].iter().chain(flags);
        Message::of(&Line::try_parse_from(line).unwrap().args, &Catalog::built_in())
    }

    #[test]
    fn flags_form_a_valid_request() {
        let flags =
            ["--types", "b,a", "--category", "Compliance", "--no-foundations", "--key", "k:1", "--correlation-id", "c"];
        let message = message(&flags).unwrap();
        let request = message.request().unwrap();
        assert_eq!((request.idempotency_key.as_str(), request.correlation_id.as_deref()), ("k:1", Some("c")));
        assert_eq!(request.requested_by.as_deref(), Some("inventoryd request"));
        assert_eq!(request.tenant_id.to_string(), TENANT);
        assert_eq!(
            request.selection.canonical_json(),
            r#"{"categories":["Compliance"],"include_foundations":false,"policy_types":["a","b"]}"#
        );
        assert_eq!(message.content_type, "application/json");
    }

    #[test]
    fn default_keys_are_unique() {
        let keys = [(); 2].map(|()| message(&["--all"]).unwrap().request().unwrap().idempotency_key.clone());
        assert!(Uuid::try_parse(&keys[0]).is_ok() && keys[0] != keys[1]);
    }

    #[test]
    fn an_invalid_request_is_a_usage_error() {
        let foundation_alone = &["--types", "roleScopeTag", "--no-foundations"];
        for flags in [&["--all", "--key", "two words"][..], &["--all", "--correlation-id", ""], &[], foundation_alone] {
            assert!(matches!(message(flags), Err(CliError::Usage(_))), "{flags:?}");
        }
        assert!(Line::try_parse_from(["request", "--all"]).is_err(), "no tenant");
        assert!(Line::try_parse_from(["request", "--tenant", TENANT, "--from-file", "x"]).is_err());
    }

    #[test]
    fn a_file_is_published_unchanged_with_its_content_type() {
        let from_bytes = |bytes: Vec<u8>| Message::from_bytes(bytes, &Catalog::built_in());
        let bad = from_bytes(b"{ nope".to_vec());
        assert_eq!((bad.body.as_slice(), bad.content_type), (&b"{ nope"[..], "application/json"));
        assert!(matches!(bad.request(), Err(CliError::Failed(text)) if text.contains("invalid_json")));
        let data = json!({ "schema_version": 1, "tenant_id": TENANT, "idempotency_key": "k", "selection": { "policy_types": ["*"] } });
        let envelope = json!({ "specversion": "1.0", "id": "1", "source": "/s", "type": "t", "data": data });
        let good = from_bytes(envelope.to_string().into_bytes());
        assert!(good.content_type == CLOUDEVENTS_CONTENT_TYPE && good.read.is_ok());
    }

    #[test]
    fn a_dry_run_needs_no_broker() {
        let (code, text) = call(&["request", "--tenant", TENANT, "--all", "--key", "k", "--dry-run", "--json"]);
        let shown: Value = serde_json::from_str(&text).unwrap();
        assert_eq!((code, &shown["message"]["tenant_id"]), (0, &json!(TENANT)));
        assert_eq!(shown["selection_hash"].as_str().unwrap().len(), 64);
        let alone = ["request", "--tenant", TENANT, "--types", "roleScopeTag", "--no-foundations", "--dry-run"];
        assert_eq!(call(&alone).0, 2, "nothing is left to read");
    }
}
