//! One big run: new objects, the same again, and the same with a few changes; beside the serial limit, which is one
//! bare download and then one bare upsert of the same.

use serde_json::json;
use sqlx::{Connection, PgConnection};
use uuid::Uuid;

use super::process::Process;
use super::raw::{Graph, Lists, Rows};
use super::report::{Line, Round, Target, median};
use super::rig::{Outcome, Rig};
use super::world::World;

const TYPES: usize = 30;

struct Ingest {
    world: World,
    daemon: Process,
    graph: Graph,
    lists: Lists,
    tenant: Uuid,
    token: String,
    bare: PgConnection,
    per_list: usize,
    runs: usize,
}

/// What a round of the daemon cost beside its time.
#[derive(Default)]
struct Costs {
    cpu_us: Vec<f64>,
    wal_bytes: Vec<f64>,
}

/// Measures those of the three lines that are `wanted`.
pub async fn measure(rig: &Rig, wanted: &[&str]) -> Outcome<Vec<Line>> {
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
    async fn new(rig: &Rig, per_list: usize) -> Outcome<Self> {
        let simulator = ["--objects".to_owned(), per_list.to_string(), "--page-size".to_owned(), "100".to_owned()];
        let world = World::new(rig, "ingest", 1, &simulator).await?;
        world.execute("create table bare_items (like inventory_items including all) with (fillfactor = 50)").await?;
        let (graph, lists, tenant) = (Graph::new(&world)?, Lists::first(TYPES), world.tenants[0]);
        let token = graph.token(tenant).await?;
        let bare = PgConnection::connect(&world.database_url).await?;
        let daemon = world.daemon(&[], 1).await?;
        let mut ingest = Self { world, daemon, graph, lists, tenant, token, bare, per_list, runs: 0 };
        // Once before anything counts: the simulator has its pages, both tables have their rows.
        ingest.run().await?;
        Rows::read(&ingest.world).await?.upsert(&mut ingest.bare, tenant).await?;
        ingest.world.analyze().await?;
        Ok(ingest)
    }

    async fn line(&mut self, rig: &Rig, name: &str) -> Outcome<Vec<Line>> {
        let target = if name == "resync_1pct_changed" { 1.15 } else { 1.2 };
        let mut rows = Rows::read(&self.world).await?;
        let items = rows.count() as f64;
        let (mut rounds, mut costs) = (Vec::new(), Costs::default());
        for round in 0..rig.rounds {
            match name {
                "ingest_fresh" => self.world.execute("truncate inventory_items, bare_items").await?,
                "resync_1pct_changed" => {
                    self.change(round).await?;
                    rows.change(self.runs);
                }
                _ => {}
            }
            // The bare parts first in every other round, so that none always finds what the other left behind.
            let bare_first = round % 2 == 0;
            let mut bare_s = if bare_first { self.bare(&rows).await? } else { 0.0 };
            let ours_s = self.measured_run(items, &mut costs).await?;
            if !bare_first {
                bare_s = self.bare(&rows).await?;
            }
            rounds.push(Round::beside(items / ours_s, items / bare_s));
        }
        let cpu = median(costs.cpu_us.into_iter()).unwrap_or_default();
        let wal = median(costs.wal_bytes.iter().copied()).unwrap_or_default();
        let note = format!("{items} objects, {TYPES} lists; {cpu:.1} us of CPU and {wal:.0} bytes of WAL an item");
        let mut lines = vec![Line::new(name, "items/s", Target::RatioAtLeast(target), rounds).note(note)];
        if name == "resync_unchanged" {
            let rounds = costs.wal_bytes.into_iter().map(Round::alone).collect();
            lines.push(Line::new("resync_unchanged_wal", "bytes/item", Target::AtMost(200.0), rounds));
        }
        Ok(lines)
    }

    /// Seconds of one bare download and one bare upsert, one after the other.
    async fn bare(&mut self, rows: &Rows) -> Outcome<f64> {
        let download = self.graph.download(&self.lists, &self.token).await?;
        Ok(download + rows.upsert(&mut self.bare, self.tenant).await?)
    }

    async fn measured_run(&mut self, items: f64, costs: &mut Costs) -> Outcome<f64> {
        const WAL: &str = "select (pg_current_wal_lsn() - '0/0')::float8";
        let (cpu_s, wal) = (self.daemon.cpu_s(), self.world.float(WAL).await?);
        let seconds = self.run().await?;
        costs.cpu_us.push((self.daemon.cpu_s() - cpu_s) / items * 1e6);
        costs.wal_bytes.push((self.world.float(WAL).await? - wal) / items);
        Ok(seconds)
    }

    async fn run(&mut self) -> Outcome<f64> {
        self.runs += 1;
        let key = format!("run-{}.", self.runs);
        let since = self.world.now().await?;
        self.world.publish(self.tenant, &key, &self.lists.types()).await?;
        self.world.seconds_to_end(&key, 1, since).await
    }

    /// One in a hundred renamed, one in a thousand new, one in a thousand gone; then the simulator makes its pages.
    async fn change(&mut self, round: usize) -> Outcome<()> {
        let few = (self.per_list / 1_000).max(1);
        for path in self.lists.paths() {
            let (tenant, http) = (self.tenant, &self.graph.http);
            for index in (round..self.per_list - few * 10).step_by(100) {
                let body =
                    json!({ "tenant": tenant, "collection": path, "index": index, "name": format!("changed {round}") });
                // An object that an earlier round has deleted can't be renamed.
                let _ = self.world.control(http, "objects/rename", &body).await;
            }
            let count = json!({ "tenant": tenant, "collection": path, "count": few });
            self.world.control(http, "objects/delete", &count).await?;
            self.world.control(http, "objects/add", &count).await?;
        }
        self.graph.download(&self.lists, &self.token).await?;
        Ok(())
    }

    /// Of an update of every row, by one more run: how many were heap-only.
    async fn hot_share(&mut self) -> Outcome<Line> {
        const COUNTS: &str =
            "select coalesce(sum(n_tup_upd), 0)::float8 from pg_stat_user_tables where relname = 'inventory_items'";
        let hot = COUNTS.replace("n_tup_upd", "n_tup_hot_upd");
        let (updates_before, hot_before) = (self.world.float(COUNTS).await?, self.world.float(&hot).await?);
        self.run().await?;
        // The server's counters lag behind by up to ten seconds.
        tokio::time::sleep(std::time::Duration::from_secs(11)).await;
        let updates = self.world.float(COUNTS).await? - updates_before;
        let share = (self.world.float(&hot).await? - hot_before) / updates;
        let note = format!("{updates} updates");
        Ok(Line::new("resync_unchanged_hot", "%", Target::AtLeast(99.0), vec![Round::alone(share * 100.0)]).note(note))
    }
}
