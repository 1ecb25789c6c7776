//! One big run over new, unchanged and slightly changed objects, against the serial baseline: one plain download followed
//! by one plain upsert of the same rows.

use serde_json::json;
use sqlx::{Connection, PgConnection};
use uuid::Uuid;

use super::baseline::{Graph, Lists, Rows};
use super::process::Process;
use super::report::{Line, Round, Target, median};
use super::rig::{Result, Rig};
use super::world::World;

const TYPES: usize = 30;

struct Ingest {
    world: World,
    daemon: Process,
    graph: Graph,
    lists: Lists,
    tenant: Uuid,
    token: String,
    baseline: PgConnection,
    per_list: usize,
    runs: usize,
}

/// Processor time and write-ahead log of the daemon's rounds.
#[derive(Default)]
struct Costs {
    cpu_us: Vec<f64>,
    wal_bytes: Vec<f64>,
}

/// Measures the `wanted` lines.
pub async fn measure(rig: &Rig, wanted: &[&str]) -> Result<Vec<Line>> {
    let per_list = rig.scale.pick(1_000, 3_334, 3_334);
    let mut ingest = Ingest::new(rig, per_list).await?;
    let mut lines = Vec::new();
    for name in wanted {
        lines.extend(ingest.line(rig, name).await?);
    }
    if wanted.contains(&"resync_unchanged") {
        lines.push(ingest.hot_share().await?);
    }
    Ok(lines)
}

impl Ingest {
    async fn new(rig: &Rig, per_list: usize) -> Result<Self> {
        let simulator = ["--objects".to_owned(), per_list.to_string(), "--page-size".to_owned(), "100".to_owned()];
        let world = World::new(rig, "ingest", 1, &simulator).await?;
        world
            .execute("create table baseline_items (like inventory_items including all) with (fillfactor = 50)")
            .await?;
        let (graph, lists, tenant) = (Graph::new(&world)?, Lists::first(TYPES), world.tenants[0]);
        let token = graph.token(tenant).await?;
        let baseline = PgConnection::connect(&world.database_url).await?;
        let daemon = world.daemon(&[], 1).await?;
        let mut ingest = Self { world, daemon, graph, lists, tenant, token, baseline, per_list, runs: 0 };
        // Warm-up: the simulator builds its pages, both tables get their rows.
        ingest.run().await?;
        Rows::read(&ingest.world).await?.upsert(&mut ingest.baseline, tenant).await?;
        ingest.world.analyze().await?;
        Ok(ingest)
    }

    async fn line(&mut self, rig: &Rig, name: &str) -> Result<Vec<Line>> {
        let target = if name == "resync_1pct_changed" { 1.15 } else { 1.2 };
        let mut rows = Rows::read(&self.world).await?;
        let items = rows.count() as f64;
        let (mut rounds, mut costs) = (Vec::new(), Costs::default());
        for round in 0..rig.rounds {
            match name {
                "ingest_fresh" => self.world.execute("truncate inventory_items, baseline_items").await?,
                "resync_1pct_changed" => {
                    self.change(round).await?;
                    rows.change(self.runs);
                }
                _ => {}
            }
            // The order alternates, so that neither side always runs on the caches that the other left.
            let baseline_first = round % 2 == 0;
            let mut baseline_s = if baseline_first { self.run_baseline(&rows).await? } else { 0.0 };
            let ours_s = self.measured_run(items, &mut costs).await?;
            if !baseline_first {
                baseline_s = self.run_baseline(&rows).await?;
            }
            rounds.push(Round::against(items / ours_s, items / baseline_s));
        }
        let cpu = median(costs.cpu_us.into_iter()).unwrap_or_default();
        let wal = median(costs.wal_bytes.iter().copied()).unwrap_or_default();
        let what = match name {
            "ingest_fresh" => "one run over new objects",
            "resync_unchanged" => "one run over unchanged objects",
            _ => "one run, 1 % changed, 0.1 % new, 0.1 % deleted",
        };
        let note = format!(
            "{what}, against a plain download followed by a plain upsert; {items} objects, {TYPES} lists; \
             {cpu:.1} us of CPU and {wal:.0} bytes of WAL an item"
        );
        let mut lines = vec![Line::new(name, "items/s", Target::RatioAtLeast(target), rounds).note(note)];
        if name == "resync_unchanged" {
            let rounds = costs.wal_bytes.into_iter().map(Round::absolute).collect();
            let line = Line::new("resync_unchanged_wal", "bytes/item", Target::AtMost(200.0), rounds);
            lines.push(line.note("write-ahead log of `resync_unchanged`"));
        }
        Ok(lines)
    }

    /// Measures the seconds of one plain download followed by one plain upsert.
    async fn run_baseline(&mut self, rows: &Rows) -> Result<f64> {
        let download = self.graph.download(&self.lists, &self.token).await?;
        Ok(download + rows.upsert(&mut self.baseline, self.tenant).await?)
    }

    async fn measured_run(&mut self, items: f64, costs: &mut Costs) -> Result<f64> {
        const WAL: &str = "select (pg_current_wal_lsn() - '0/0')::float8";
        let (cpu_s, wal) = (self.daemon.cpu_s(), self.world.float(WAL).await?);
        let seconds = self.run().await?;
        costs.cpu_us.push((self.daemon.cpu_s() - cpu_s) / items * 1e6);
        costs.wal_bytes.push((self.world.float(WAL).await? - wal) / items);
        Ok(seconds)
    }

    async fn run(&mut self) -> Result<f64> {
        self.runs += 1;
        let key = format!("run-{}.", self.runs);
        let since = self.world.now().await?;
        self.world.publish(self.tenant, &key, &self.lists.types()).await?;
        self.world.seconds_to_end(&key, 1, since).await
    }

    /// Renames 1 % of the objects, adds and deletes 0.1 % each, and has the simulator rebuild its pages.
    async fn change(&mut self, round: usize) -> Result<()> {
        let few = (self.per_list / 1_000).max(1);
        for path in self.lists.paths() {
            let (tenant, http) = (self.tenant, &self.graph.http);
            for index in (round..self.per_list - few * 10).step_by(100) {
                let body =
                    json!({ "tenant": tenant, "collection": path, "index": index, "name": format!("changed {round}") });
                // Renaming an object that an earlier round deleted fails, which is fine.
                let _ = self.world.control(http, "objects/rename", &body).await;
            }
            let count = json!({ "tenant": tenant, "collection": path, "count": few });
            self.world.control(http, "objects/delete", &count).await?;
            self.world.control(http, "objects/add", &count).await?;
        }
        self.graph.download(&self.lists, &self.token).await?;
        Ok(())
    }

    /// Measures the share of heap-only updates in one more run, which updates every row.
    async fn hot_share(&mut self) -> Result<Line> {
        const COUNTS: &str =
            "select coalesce(sum(n_tup_upd), 0)::float8 from pg_stat_user_tables where relname = 'inventory_items'";
        let hot = COUNTS.replace("n_tup_upd", "n_tup_hot_upd");
        let (updates_before, hot_before) = (self.world.float(COUNTS).await?, self.world.float(&hot).await?);
        self.run().await?;
        // The server's counters lag by up to ten seconds.
        tokio::time::sleep(std::time::Duration::from_secs(11)).await;
        let updates = self.world.float(COUNTS).await? - updates_before;
        let share = (self.world.float(&hot).await? - hot_before) / updates;
        let note = format!("heap-only share of {updates} updates by an unchanged resync");
        Ok(Line::new("resync_unchanged_hot", "%", Target::AtLeast(99.0), vec![Round::absolute(share * 100.0)])
            .note(note))
    }
}
