//! Verdict of a soak: every invariant with the number of cases checked and broken.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use lapin::options::BasicGetOptions;
use lapin::{Connection, ConnectionProperties};
use serde_json::Value;
use sqlx::AssertSqlSafe;
use tokio::time::timeout;

use crate::archive::Archive;
use crate::changes::Changes;
use crate::load::{self, Published, TYPES};
use crate::support::events::Subscriber;
use crate::support::invariants::OVERLAPPING_RUNS;
use crate::support::world::World;

/// Returns the number that a query selects, or `None` if the database does not respond in time.
pub async fn number(world: &World, query: &str) -> Option<i64> {
    let answer = sqlx::query_scalar(AssertSqlSafe(query.to_owned()));
    timeout(Duration::from_secs(3), answer.fetch_one(&world.db)).await.ok()?.ok()
}

/// Facts for the reader and the result of every invariant.
pub struct Verdict {
    facts: Vec<(String, String)>,
    checks: Vec<(&'static str, usize, usize)>,
}

impl Verdict {
    /// Checks the tables, the events and the dead letters.
    pub async fn of(
        world: &World,
        published: &Published,
        events: &Subscriber,
        (changes, archive): (&Changes, &Archive),
    ) -> Self {
        let mut verdict = Self { facts: Vec::new(), checks: Vec::new() };
        verdict.requests(world, published).await;
        verdict.runs(world).await;
        verdict.events(world, events).await;
        verdict.dead_letters(world, published).await;
        verdict.observations(world, changes).await;
        verdict.retention(world, archive).await;
        let mut left = 0;
        for queue in ["sync.requests", "retry.5s", "retry.30s", "retry.2m", "retry.10m"] {
            left += load::depth(world, queue).await as usize;
        }
        verdict.check("every queue is empty", 5, left);
        verdict
    }

    /// Tells whether every invariant holds.
    pub fn holds(&self) -> bool {
        self.checks.iter().all(|(_, _, broken)| *broken == 0)
    }

    /// Prints facts and invariants.
    pub fn print(&self) {
        for (name, value) in &self.facts {
            println!("  {value:>7}  {name}");
        }
        println!("invariants:");
        for (name, checked, broken) in &self.checks {
            let verdict = if *broken == 0 { "holds " } else { "BROKEN" };
            println!("  {verdict}  {name} ({checked} checked, {broken} broken)");
        }
        println!("{}", if self.holds() { "every invariant holds" } else { "AN INVARIANT IS BROKEN" });
    }

    fn fact(&mut self, name: impl Into<String>, value: impl ToString) {
        self.facts.push((name.into(), value.to_string()));
    }

    fn check(&mut self, name: &'static str, checked: usize, broken: usize) {
        self.checks.push((name, checked, broken));
    }

    async fn requests(&mut self, world: &World, published: &Published) {
        self.fact("messages published", published.messages);
        self.fact("of them repeats", published.repeats);
        self.fact("of them invalid", published.invalid.len());
        self.fact("of those with unreadable properties", published.unreadable);
        self.fact("keys used for two selections", published.conflicts.len());
        let runs = world.rows("select idempotency_key as k, count(*) as n from soak_runs group by 1").await;
        let runs: BTreeMap<&str, i64> =
            runs.iter().filter_map(|row| Some((row["k"].as_str()?, row["n"].as_i64()?))).collect();
        let lost: Vec<_> = published.accepted.iter().filter(|key| !runs.contains_key(key.as_str())).collect();
        if !lost.is_empty() {
            println!("without a run: {lost:?}");
        }
        let lost = lost.len();
        self.check("every accepted request created a run", published.accepted.len(), lost);
        self.check("no request created two runs", runs.len(), runs.values().filter(|count| **count != 1).count());
        let unrequested = runs.keys().filter(|key| !published.accepted.contains(**key)).count();
        self.check("no run without a request", runs.len(), unrequested);
    }

    async fn runs(&mut self, world: &World) {
        let by_status = world.rows("select status, count(*) as n from soak_runs group by 1 order by 1").await;
        for row in &by_status {
            self.fact(format!("runs {}", row["status"].as_str().unwrap_or("?")), &row["n"]);
        }
        for (name, query) in [
            ("attempts beyond the first", "select coalesce(sum(attempt - 1), 0)::bigint from soak_runs"),
            ("of them after a graceful hand-back", "select coalesce(sum(interruptions), 0)::bigint from soak_runs"),
            ("runs failed as worker_lost", "select count(*) from soak_runs where 'worker_lost' = any(error_codes)"),
        ] {
            self.fact(name, number(world, query).await.unwrap_or(-1));
        }
        let all = number(world, "select count(*) from soak_runs").await.unwrap_or(0);
        let all = usize::try_from(all).unwrap_or(0);
        let names = TYPES.map(|name| format!("'{name}'")).join(",");
        let torn = format!(
            "select count(*) from inventory_sync_run_types where status = 'complete' and items_observed_count <> 12
                and policy_type in ({names})"
        );
        for (name, query) in [
            (
                "no run was failed as worker_lost before its attempts were used up",
                "select count(*) from soak_runs where 'worker_lost' = any(error_codes) and attempt - interruptions < 5",
            ),
            ("every run has ended", "select count(*) from soak_runs where status = 'running'"),
            ("no two runs of a selection overlapped", OVERLAPPING_RUNS),
            (
                "no terminal run changed",
                "select count(*) from (select id from run_history where status <> 'running' group by tenant_id, id
                  having count(distinct (status, attempt)) > 1) q",
            ),
            ("every complete list was counted once and in full", torn.as_str()),
            (
                "no item was last seen by another tenant's run",
                "select count(*) from inventory_items i join soak_runs r on r.id = i.last_seen_run_id
                  where r.tenant_id <> i.tenant_id",
            ),
            (
                "every run of a disabled tenant was skipped",
                "select count(*) from soak_runs r join tenants t using (tenant_id) where not t.enabled and r.status <> 'skipped'",
            ),
        ] {
            let broken = number(world, query).await.unwrap_or(1);
            self.check(name, all, usize::try_from(broken).unwrap_or(1));
        }
    }

    async fn events(&mut self, world: &World, events: &Subscriber) {
        let runs = world.rows("select id, status, attempt from soak_runs").await;
        let (received, distinct) = (events.received(), events.distinct());
        self.fact("events received", received.len());
        self.fact("of them repeats", received.len() - distinct.len());
        let missing = runs.iter().filter(|run| run["id"].as_str().is_none_or(|id| !distinct.contains_key(id))).count();
        self.check("every run has its event", runs.len(), missing);
        let by_id: BTreeMap<&str, &Value> = runs.iter().filter_map(|run| Some((run["id"].as_str()?, run))).collect();
        let wrong = received.iter().filter(|event| {
            let run = event["id"].as_str().and_then(|id| by_id.get(id));
            run.is_none_or(|run| run["status"] != event["data"]["status"] || run["attempt"] != event["data"]["attempt"])
        });
        self.check("every event and every repeat matches its run", received.len(), wrong.count());
        let unsent = number(world, "select count(*) from outbox").await.unwrap_or(1);
        self.check("every event is published", runs.len(), usize::try_from(unsent).unwrap_or(1));
    }

    async fn observations(&mut self, world: &World, changes: &Changes) {
        let found = changes.verify(world).await;
        self.fact("objects renamed", found.renames);
        self.fact("stored objects deleted", found.deletions);
        self.check("no older observation replaced a newer one", found.items, found.reverted);
        self.check("no deleted object came back", found.deletions, found.restored);
    }

    async fn retention(&mut self, world: &World, archive: &Archive) {
        let expired = archive.expired(world).await.and_then(|expired| usize::try_from(expired).ok());
        self.check("every expired run was deleted", archive.runs(), expired.unwrap_or(1));
        self.check("retention kept the latest run and what it proves", 2, archive.broken(world).await);
    }

    async fn dead_letters(&mut self, world: &World, published: &Published) {
        let mut bodies = BTreeSet::new();
        let (mut letters, mut reasons) = (0, BTreeMap::<String, usize>::new());
        let connection =
            Connection::connect(&world.amqp_url, ConnectionProperties::default()).await.expect("the broker responds");
        let channel = connection.create_channel().await.expect("a channel opens");
        let queue = format!("{}inventory.dead", world.prefix);
        while let Some(letter) =
            channel.basic_get(queue.as_str().into(), BasicGetOptions { no_ack: true }).await.expect("the queue exists")
        {
            letters += 1;
            let reason = letter.properties.headers().as_ref().and_then(|headers| headers.inner().get("x-dead-reason"));
            let reason = reason
                .and_then(|value| value.as_long_string())
                .map_or_else(|| "set by the broker".to_owned(), ToString::to_string);
            *reasons.entry(reason).or_default() += 1;
            bodies.insert(String::from_utf8_lossy(&letter.data).into_owned());
        }
        for (reason, count) in &reasons {
            self.fact(format!("dead letters {reason}"), count);
        }
        let lost = published.invalid.iter().filter(|body| !bodies.contains(*body)).count();
        self.check("every invalid or unreadable request is a dead letter", published.invalid.len(), lost);
        let dead_keys: BTreeSet<String> = bodies.iter().filter_map(|body| key_of(body)).collect();
        let lost = published.conflicts.iter().filter(|key| !dead_keys.contains(*key)).count();
        self.check("one of two selections under one key is a dead letter", published.conflicts.len(), lost);
        let valid = bodies.iter().filter(|body| {
            !published.invalid.contains(*body) && key_of(body).is_none_or(|key| !published.conflicts.contains(&key))
        });
        self.check("no valid request is a dead letter", letters, valid.count());
    }
}

fn key_of(body: &str) -> Option<String> {
    let request: Value = serde_json::from_str(body).ok()?;
    request["idempotency_key"].as_str().map(str::to_owned)
}
