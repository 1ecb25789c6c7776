//! A run longer than Graph's limits allow at once, against the shortest time that they permit.

use std::time::Duration;

use serde_json::Value;

use super::baseline::{Graph, Lists};
use super::report::{Line, Round, Target};
use super::rig::{Result, Rig, Scale};
use super::world::World;

const LISTS: usize = 10;
const PAGES: usize = 5_000;
/// Shortest possible time: at a thousand requests per twenty seconds the last page falls into the fifth window.
const SHORTEST_S: f64 = 80.0;
/// Time after which a new daemon no longer reserves quota for requests of its predecessor.
const SETTLED: Duration = Duration::from_secs(20);

/// Measures the duration, and the share of requests that Graph throttled.
pub async fn measure(rig: &Rig) -> Result<Vec<Line>> {
    let simulator = ["--limits", "--page-size", "1", "--objects", &(PAGES / LISTS).to_string()].map(str::to_owned);
    let world = World::new(rig, "throttled", rig.rounds, &simulator).await?;
    let (graph, lists) = (Graph::new(&world)?, Lists::without_page_size(LISTS));
    let rounds = if rig.scale == Scale::Full { rig.rounds } else { 1 };
    let (mut times, mut refused) = (Vec::new(), Vec::new());
    for tenant in world.tenants.iter().take(rounds) {
        let limits = [("GRAPH__INTUNE_PER_20S", "1000"), ("GRAPH__RATE_SHARE", "1.0")];
        let daemon = world.daemon(&limits, 1).await?;
        tokio::time::sleep(SETTLED).await;
        let (key, since) = (format!("{tenant}."), world.now().await?);
        world.publish(*tenant, &key, &lists.types()).await?;
        times.push(Round::against(world.seconds_to_end(&key, 1, since).await?, SHORTEST_S));
        let state = graph.http.get(graph.link("admin/state")).send().await?.bytes().await?;
        let state: Value = serde_json::from_slice(&state)?;
        let state = &state["tenants"][tenant.to_string()];
        let of = |name: &str| state[name].as_f64().unwrap_or(f64::NAN);
        refused.push(Round::absolute(of("throttled") / of("requests") * 100.0));
        daemon.stop().await?;
    }
    let note =
        format!("{PAGES} pages with the whole quota (graph.rate_share = 1), against the shortest time it permits");
    Ok(vec![
        Line::new("throttled", "s", Target::RatioAtMost(1.1), times).note(note),
        Line::new("throttled_429", "% of requests", Target::AtMost(1.0), refused)
            .note("share of its requests with status 429"),
    ])
}
