//! Reads and admissions that must not slow down as tables grow: a small and a big database, measured in turn.

use std::time::Instant;

use inventoryd::config::WhenFull;
use inventoryd::domain::request::SyncRequest;
use inventoryd::store::{Admission, AdmissionRequest, AdmissionRules, Store};
use serde_json::json;
use uuid::Uuid;

use super::report::{Line, Round, Target};
use super::rig::{Result, Rig};
use super::world::World;

const SMALL: u64 = 10_000;
/// Items of the measured tenant.
const OWN_ITEMS: u64 = 5_000;
const TENANTS: usize = 1_000;

/// Measures `inventory_missing` of one tenant.
pub async fn missing(rig: &Rig) -> Result<Vec<Line>> {
    let big = rig.scale.pick(500_000, 2_000_000, 10_000_000);
    let small_world = world(rig, "missing_small", SMALL, SMALL / 10).await?;
    let big_world = world(rig, "missing_big", big, SMALL / 10).await?;
    let (mut rounds, mut times) = (Vec::new(), Vec::new());
    for _ in 0..rig.rounds {
        let small_ms = ask(&small_world).await?;
        let big_ms = ask(&big_world).await?;
        rounds.push(Round::against(big_ms, small_ms));
        times.push(Round::absolute(big_ms));
    }
    let note = format!(
        "inventory_missing, median of 50 with {big} items against {SMALL}; {OWN_ITEMS} of the tenant, 100 missing"
    );
    Ok(vec![
        Line::new("missing", "ms", Target::RatioAtMost(1.3), rounds).note(note),
        Line::new("missing_ms", "ms", Target::AtMost(20.0), times).note("the same in the big database"),
    ])
}

/// Measures admissions.
pub async fn admission(rig: &Rig) -> Result<Vec<Line>> {
    let (runs, items) = rig.scale.pick((300_000, 300_000), (1_000_000, 1_000_000), (5_000_000, 10_000_000));
    let count = rig.scale.pick(400, 1_000, 1_000);
    let small_world = world(rig, "admission_small", SMALL, SMALL).await?;
    let big_world = world(rig, "admission_big", items, runs).await?;
    let (mut rounds, mut rates) = (Vec::new(), Vec::new());
    for world in [&small_world, &big_world] {
        admit(world, count).await?;
    }
    for _ in 0..rig.rounds {
        let small = admit(&small_world, count).await?;
        let big = admit(&big_world, count).await?;
        rounds.push(Round::against(big.p99_ms, small.p99_ms));
        rates.push(Round::against(big.per_s, small.per_s));
    }
    let note = format!("p99 of {count} admissions with {runs} runs and {items} items against {SMALL} and {SMALL}");
    Ok(vec![
        Line::new("admission", "ms", Target::RatioAtMost(1.3), rounds).note(note),
        Line::new("admission_rate", "admissions/s", Target::RatioAtLeast(0.75), rates)
            .note("sequential admissions a second"),
    ])
}

/// Creates a database with `items` items and `runs` finished runs.
async fn world(rig: &Rig, name: &str, items: u64, runs: u64) -> Result<World> {
    let world = World::new(rig, name, TENANTS, &[]).await?;
    let own = world.tenants[0];
    let hash = hash();
    world
        .execute(&format!(
            "set synchronous_commit = off;
             insert into inventory_items (tenant_id, policy_type, external_id, display_name, category, platform, meta_jsonb,
                    first_seen_at, last_changed_at, last_seen_at, last_seen_run_id)
             select case when n <= {OWN_ITEMS} then '{own}'::uuid else t.ids[2 + n % {others}] end, 'mobileApp',
                    gen_random_uuid()::text, 'Policy number ' || n, 'Apps', 'windows',
                    jsonb_build_object('description', 'What it is for, number ' || n, 'version', n, 'publisher', 'Contoso'),
                    now() - interval '2 days', now() - interval '2 days',
                    now() - case when n % 50 = 0 then interval '2 days' else interval '0' end, gen_random_uuid()
               from generate_series(1, {items}) n, (select array_agg(tenant_id order by tenant_id = '{own}' desc) ids from tenants) t;
             insert into inventory_sync_runs (tenant_id, id, idempotency_key, selection_hash, selection_payload, status,
                    daemon_version, started_at, finished_at)
             select t.ids[1 + n % {TENANTS}], inventory_new_run_id(now() - interval '1 day' - n * interval '1 second'), 'old-' || n, '{hash}', '{{}}', 'success', 'bench',
                    now() - interval '1 day' - n * interval '1 second', now() - interval '1 day' - n * interval '1 second'
               from generate_series(1, {runs}) n, (select array_agg(tenant_id order by tenant_id = '{own}' desc) ids from tenants) t;
             insert into inventory_sync_run_types (tenant_id, run_id, policy_type, status, items_observed_count,
                    items_upserted_count, items_created_count, items_changed_count, errors_count)
             select tenant_id, id, 'mobileApp', 'complete', {OWN_ITEMS}, {OWN_ITEMS}, 0, 0, 0
               from inventory_sync_runs where tenant_id = '{own}';
             insert into inventory_selections
             select distinct on (tenant_id) tenant_id, selection_hash, id, finished_at from inventory_sync_runs
              order by tenant_id, finished_at desc;
             set synchronous_commit = on;",
            others = TENANTS - 1,
        ))
        .await?;
    world.execute("vacuum analyze").await?;
    Ok(world)
}

fn body(tenant: Uuid, key: &str) -> String {
    json!({ "schema_version": 1, "tenant_id": tenant, "idempotency_key": key,
            "selection": { "policy_types": ["mobileApp"], "include_foundations": false } })
    .to_string()
}

/// Hash of the selection of all generated runs.
fn hash() -> String {
    let request = SyncRequest::parse(None, body(Uuid::nil(), "k").as_bytes());
    request.map(|request| request.selection.hash()).unwrap_or_default()
}

async fn ask(world: &World) -> Result<f64> {
    let query = format!("select count(*)::float8 from inventory_missing('{}', '{}')", world.tenants[0], hash());
    let mut times = Vec::new();
    for _ in 0..50 {
        let begun = Instant::now();
        let found = world.float(&query).await?;
        times.push(begun.elapsed().as_secs_f64() * 1_000.0);
        if found != 100.0 {
            return Err(format!("{found} items are missing, not 100").into());
        }
    }
    super::report::median(times.into_iter()).ok_or_else(|| "nothing was measured".into())
}

struct Admitted {
    p99_ms: f64,
    per_s: f64,
}

/// Admits `count` requests sequentially; ends each run before the next, outside the measured time.
async fn admit(world: &World, count: usize) -> Result<Admitted> {
    let store = Store::connect(&world.config()?.database)?;
    let rules = AdmissionRules {
        owner: "bench".to_owned(),
        lease_s: 60,
        max_attempts: 5,
        tenant_max_runs: 2,
        fleet_max_runs: 0,
        when_full: WhenFull::Skip,
        defer_max_s: 0,
        event_due_s: 0,
    };
    let mut times = Vec::new();
    for number in 0..count {
        let tenant = world.tenants[number * 7 % TENANTS];
        let request = SyncRequest::parse(None, body(tenant, &Uuid::new_v4().to_string()).as_bytes());
        let request = request.map_err(|rejection| rejection.detail)?;
        let hash = request.selection.hash();
        let applicant = AdmissionRequest { request: &request, selection_hash: &hash, traceparent: None, deferred_s: 0 };
        let begun = Instant::now();
        let admission = store.admit(&rules, &applicant).await?;
        times.push(begun.elapsed().as_secs_f64() * 1_000.0);
        let Admission::Admitted(admitted) = admission else {
            return Err(format!("not admitted: {admission:?}").into());
        };
        sqlx::query(
            "update inventory_sync_runs set status = 'success', finished_at = now() where tenant_id = $1 and id = $2",
        )
        .bind(tenant)
        .bind(admitted.lease.run_id)
        .execute(&world.db)
        .await?;
    }
    store.close().await;
    let per_s = count as f64 / times.iter().sum::<f64>() * 1_000.0;
    times.sort_by(f64::total_cmp);
    Ok(Admitted { p99_ms: times[count * 99 / 100], per_s })
}
