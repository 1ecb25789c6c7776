//! Reads and retention on a long history, against the same on a short one.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use inventoryd::store::{RunFilter, Store};
use sqlx::{AssertSqlSafe, Row};
use uuid::Uuid;

use super::report::{Line, Round, Target, median};
use super::rig::{Result, Rig};
use super::world::World;

/// Days that runs are kept.
const RETENTION_DAYS: u32 = 90;
/// Runs of one retention statement.
const BATCH: u64 = 1_000;
/// Policy types of the measured tenant.
const TYPES: usize = 100;
/// Items of the measured tenant, evenly over its types; one type has [`ITEMS_OF_TYPE`].
const ITEMS: usize = 5_000;
const ITEMS_OF_TYPE: usize = 48;
/// Longest time that one read is repeated in a round.
const REPEAT_FOR: Duration = Duration::from_secs(1);
const MAX_REPEATS: usize = 20;

/// Size of a database.
#[derive(Clone, Copy)]
struct Size {
    tenants: usize,
    /// Runs of every tenant, two days apart.
    history: usize,
    /// Runs of the measured tenant, each with [`TYPES`] types.
    own_history: usize,
    items: usize,
}

/// Read that is measured: name, target in milliseconds, rows that it must return, statement.
struct Read {
    name: &'static str,
    at_most_ms: f64,
    rows: usize,
    sql: String,
}

/// Database with a store, and the statements to measure.
struct History {
    world: World,
    store: Store,
    own: Uuid,
    own_run: Uuid,
}

/// Measures reads, then retention, then the reads of items after partitioning.
pub async fn measure(rig: &Rig) -> Result<Vec<Line>> {
    let tenants = rig.scale.pick(2_000, 20_000, 20_000);
    let history = rig.scale.pick(40, 90, 90);
    let big = Size { tenants, history, own_history: 2_000, items: rig.scale.pick(50_000, 800_000, 800_000) };
    let small = Size { history: 1, own_history: 20, items: 2 * ITEMS, ..big };
    let small = History::generate(rig, "reads_small", small).await?;
    let note = format!("{} runs, {} items, against {} runs", big.runs(), big.items, tenants);
    let big = History::generate(rig, "reads_big", big).await?;

    let mut lines = Vec::new();
    let reads: Vec<(Read, Read)> = small.reads()?.into_iter().zip(big.reads()?).collect();
    for (of_small, of_big) in &reads {
        let rounds = compare(rig, (&small, of_small), (&big, of_big)).await?;
        lines.push(line(of_big.name, of_big.at_most_ms, rounds).note(note.clone()));
    }
    lines.extend(store_lines(rig, &small, &big).await?);
    for history in [&small, &big] {
        history.partition(rig)?;
    }
    for (of_small, of_big) in reads.iter().take(2) {
        let rounds = compare(rig, (&small, of_small), (&big, of_big)).await?;
        let name = format!("{}_partitioned", of_big.name);
        lines.push(line(&name, of_big.at_most_ms, rounds).note("the same after partition_items.sql"));
    }
    Ok(lines)
}

fn line(name: &str, at_most_ms: f64, rounds: Vec<Round>) -> Line {
    Line::new(&format!("reads_{name}"), "ms", Target::RatioAndValueAtMost(1.5, at_most_ms), rounds)
}

async fn compare(rig: &Rig, small: (&History, &Read), big: (&History, &Read)) -> Result<Vec<Round>> {
    let mut rounds = Vec::new();
    for (history, read) in [small, big] {
        history.time(read).await?;
    }
    for _ in 0..rig.rounds {
        let baseline = small.0.time(small.1).await?;
        rounds.push(Round::against(big.0.time(big.1).await?, baseline));
    }
    Ok(rounds)
}

/// Measures the reads of the command line, and retention with and without something to delete.
async fn store_lines(rig: &Rig, small: &History, big: &History) -> Result<Vec<Line>> {
    let (mut list, mut show, mut batch, mut idle) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for _ in 0..=rig.rounds {
        list.push(Round::against(big.list_runs().await?, small.list_runs().await?));
        show.push(Round::against(big.show_run().await?, small.show_run().await?));
        batch.push(Round::against(big.delete_batch().await?, small.delete_batch().await?));
        idle.push(Round::against(big.delete_nothing().await?, small.delete_nothing().await?));
    }
    // The first round fills the caches.
    for rounds in [&mut list, &mut show, &mut batch, &mut idle] {
        rounds.remove(0);
    }
    Ok(vec![
        line("runs_list", 10.0, list).note("the latest 20 runs of all tenants"),
        line("run_show", 2.0, show).note("one run with its types"),
        line("retention_batch", 500.0, batch).note(format!("deletion of {BATCH} runs with their types")),
        line("retention_idle", 50.0, idle)
            .note("nothing to delete, a tenth of the tenants idle for longer than the retention"),
    ])
}

impl Size {
    const fn runs(self) -> usize {
        self.tenants * self.history + self.own_history
    }
}

impl History {
    /// Generates a database in bulk: tenants, runs, types, selections, listings and items.
    async fn generate(rig: &Rig, name: &str, size: Size) -> Result<Self> {
        let world = World::new(rig, name, size.tenants, &[]).await?;
        let own = world.tenants[0];
        let begun = Instant::now();
        let expired = (rig.rounds as u64 + 2) * BATCH;
        for statement in [runs(own, size, expired), types(own), items(own, size)] {
            world.execute(&statement).await?;
        }
        world.execute("vacuum analyze").await?;
        eprintln!("  {name}: {} runs, {} items in {} s", size.runs(), size.items, begun.elapsed().as_secs());
        let own_run = sqlx::query("select latest_run_id from inventory_selections where tenant_id = $1 limit 1");
        let own_run = own_run.bind(own).fetch_one(&world.db).await?.get(0);
        let store = Store::connect(&world.config()?.database)?;
        Ok(Self { world, store, own, own_run })
    }

    fn reads(&self) -> Result<Vec<Read>> {
        let own = self.own;
        let tenants = self.world.tenants.len();
        let read = |name, at_most_ms, rows, sql: String| Read { name, at_most_ms, rows, sql };
        Ok(vec![
            read(
                "current_type",
                10.0,
                ITEMS_OF_TYPE,
                format!("select * from inventory_items_current where tenant_id = '{own}' and policy_type = 'type1'"),
            ),
            read(
                "current_tenant",
                60.0,
                ITEMS,
                format!("select * from inventory_items_current where tenant_id = '{own}'"),
            ),
            read("latest_tenant", 5.0, 1, format!("select * from inventory_latest_runs where tenant_id = '{own}'")),
            read("latest_all", 500.0, tenants, "select * from inventory_latest_runs".to_owned()),
            read("stuck_tenants", 500.0, tenants / 10, stuck_tenants()?),
        ])
    }

    /// Median of the milliseconds that a read takes, repeated for a second at most.
    async fn time(&self, read: &Read) -> Result<f64> {
        let (begun, mut times) = (Instant::now(), Vec::new());
        while times.len() < MAX_REPEATS && (times.is_empty() || begun.elapsed() < REPEAT_FOR) {
            let started = Instant::now();
            let rows = sqlx::query(AssertSqlSafe(read.sql.clone())).fetch_all(&self.world.db).await?.len();
            times.push(milliseconds(started));
            if rows != read.rows {
                return Err(format!("{}: {rows} rows, not {}", read.name, read.rows).into());
            }
        }
        median(times.into_iter()).ok_or_else(|| "nothing was measured".into())
    }

    async fn list_runs(&self) -> Result<f64> {
        let filter = RunFilter { tenant_id: None, status: None, limit: 20 };
        let started = Instant::now();
        let runs = self.store.list_runs(&filter).await?.len();
        if runs == 20 { Ok(milliseconds(started)) } else { Err(format!("{runs} runs are listed, not 20").into()) }
    }

    async fn show_run(&self) -> Result<f64> {
        let started = Instant::now();
        let run = self.store.show_run(self.own_run).await?.ok_or("the run was deleted")?;
        if run.types.len() == TYPES { Ok(milliseconds(started)) } else { Err("types are missing".into()) }
    }

    async fn delete_batch(&self) -> Result<f64> {
        let started = Instant::now();
        let deleted = self.store.delete_old_runs(RETENTION_DAYS).await?;
        if deleted == BATCH { Ok(milliseconds(started)) } else { Err(format!("{deleted} runs were deleted").into()) }
    }

    async fn delete_nothing(&self) -> Result<f64> {
        let started = Instant::now();
        // Older than everything but the spared runs of idle tenants.
        let deleted = self.store.delete_old_runs(400).await?;
        if deleted == 0 { Ok(milliseconds(started)) } else { Err(format!("{deleted} runs were deleted").into()) }
    }

    fn partition(&self, rig: &Rig) -> Result<()> {
        let (_, database) = self.world.database_url.rsplit_once('/').ok_or("the URL names no database")?;
        rig.psql(database, &["-q", "-v", "partitions=16", "-f", "deploy/sql/partition_items.sql"])
    }
}

fn milliseconds(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1_000.0
}

/// Statement of the documentation that lists tenants without a recent success.
fn stuck_tenants() -> Result<String> {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("migrations/README.md");
    let text = fs::read_to_string(page)?;
    let (_, rest) =
        text.split_once("-- Stuck tenants").ok_or("migrations/README.md has no statement about stuck tenants")?;
    let statement = rest.split_once('\n').and_then(|(_, rest)| rest.split_once(';'));
    Ok(statement.ok_or("the statement has no end")?.0.to_owned())
}

fn runs(own: Uuid, size: Size, expired: u64) -> String {
    let Size { history, own_history, .. } = size;
    format!(
        "set session_replication_role = replica; set synchronous_commit = off;
         create temporary table past as
           -- A tenth of the tenants has been idle for longer than any retention.
           select t.tenant_id, repeat('a', 64) as selection_hash,
                  now() - interval '1 hour' - (n - 1) * interval '2 days' - case when t.place % 10 = 9 then interval '450 days' else interval '0' end as at
             from (select tenant_id, row_number() over (order by tenant_id = '{own}' desc, tenant_id) - 1 as place from tenants) t,
                  generate_series(1, case when t.place % 10 = 9 then 1 else {history} end) n
            where t.tenant_id <> '{own}'
           union all
           select '{own}', repeat('b', 64), now() - n * interval '1 hour' from generate_series(1, {own_history}) n
           union all
           select '{own}', repeat('c', 64), now() - interval '200 days' - n * interval '1 minute' from generate_series(1, {expired}) n;
         insert into inventory_sync_runs (tenant_id, id, idempotency_key, selection_hash, selection_payload, status,
                daemon_version, items_observed_count, started_at, finished_at)
         select tenant_id, inventory_new_run_id(at), row_number() over (), selection_hash,
                '{{\"categories\": [], \"include_foundations\": false, \"policy_types\": [\"type1\"]}}', 'success', 'bench', {ITEMS}, at, at
           from past order by at;
         insert into inventory_selections
         select distinct on (tenant_id, selection_hash) tenant_id, selection_hash, id, finished_at
           from inventory_sync_runs where selection_hash <> repeat('c', 64)
          order by tenant_id, selection_hash, finished_at desc;
         drop table past; reset session_replication_role; reset synchronous_commit;"
    )
}

fn types(own: Uuid) -> String {
    format!(
        "set session_replication_role = replica; set synchronous_commit = off;
         insert into policy_types select 'type' || n, 'Type ' || n, 'Apps', true from generate_series(1, {TYPES}) n;
         insert into inventory_sync_run_types (tenant_id, run_id, policy_type, status, items_observed_count,
                items_upserted_count, items_created_count, items_changed_count, errors_count)
         select r.tenant_id, r.id, 'type' || n, 'complete', 50, 50, 0, 0, 0
           from inventory_sync_runs r, generate_series(1, case when r.selection_hash = repeat('b', 64) then {TYPES} else 2 end) n;
         insert into inventory_complete_listings
         select s.tenant_id, 'type' || n, s.latest_success_at, 50, s.latest_success_at
           from inventory_selections s, generate_series(1, case when s.tenant_id = '{own}' then {TYPES} else 2 end) n;
         reset session_replication_role; reset synchronous_commit;"
    )
}

fn items(own: Uuid, size: Size) -> String {
    let others = size.items - ITEMS;
    format!(
        "set synchronous_commit = off;
         insert into inventory_items
         select i.tenant_id, i.policy_type, gen_random_uuid()::text, 'Policy number ' || n, 'Apps', 'windows',
                jsonb_build_object('description', 'Description of policy ' || n, 'version', n, 'publisher', 'Contoso'),
                now() - interval '300 days', now() - interval '300 days', s.latest_success_at, s.latest_run_id
           from (select '{own}'::uuid as tenant_id, n,
                        'type' || case when n <= {ITEMS_OF_TYPE} then 1 else 2 + n % ({TYPES} - 1) end as policy_type
                   from generate_series(1, {ITEMS}) n
                 union all
                 select t.ids[2 + n % (cardinality(t.ids) - 1)], n, 'type' || (1 + n % 2)
                   from (select array_agg(tenant_id order by tenant_id = '{own}' desc) as ids from tenants) t,
                        generate_series(1, {others}) n) i
           join inventory_selections s on s.tenant_id = i.tenant_id;
         reset synchronous_commit;"
    )
}
