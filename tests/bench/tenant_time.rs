//! Whole run of a tenant under Graph's limits, against the shortest time that pages and limits permit.

use std::collections::BTreeMap;

use inventoryd::domain::catalog::Catalog;
use serde_json::Value;
use uuid::Uuid;

use super::baseline::Graph;
use super::process::Process;
use super::report::{Line, Round, Target};
use super::rig::{Result, Rig};
use super::world::World;

/// Objects of each list.
const OBJECTS: u32 = 50;
/// Tenants that are read at the same time, eight of them by the default `consumer.prefetch`.
const TENANTS: usize = 16;
const PREFETCH: usize = 8;
/// Graph's limits, which other measurements turn off.
const LIMITS: [(&str, &str); 3] =
    [("GRAPH__INTUNE_PER_20S", "1000"), ("GRAPH__DEVICES_PER_20S", "2000"), ("GRAPH__CONDITIONAL_ACCESS_PER_S", "1")];

/// Environment whose responses take a fixed time.
struct Tenants {
    world: World,
    graph: Graph,
    daemon: Process,
    latency_s: f64,
}

/// Measures one tenant with responses after 50 and 200 ms, and sixteen tenants at the same time.
pub async fn measure(rig: &Rig) -> Result<Vec<Line>> {
    let (mut lines, mut throttled, mut peaks) = (Vec::new(), Vec::new(), Vec::new());
    for latency_ms in [50, 200] {
        let tenants = Tenants::start(rig, latency_ms).await?;
        let mut rounds = Vec::new();
        for round in 0..rig.rounds {
            let tenant = tenants.world.tenants[round];
            let (seconds, refused) = tenants.run(&[tenant], &format!("r{round}.")).await?;
            throttled.push(Round::absolute(refused));
            rounds.push(Round::against(seconds, tenants.shortest_s(tenant).await?));
        }
        let note = format!(
            "everything of a tenant with {OBJECTS} objects a list, responses after {latency_ms} ms, default configuration; \
             against the longest chain of pages or the time of the limits, whichever is longer"
        );
        lines.push(Line::new(&format!("tenant_time_{latency_ms}"), "s", Target::RatioAtMost(1.3), rounds).note(note));
        if latency_ms == 200 {
            let (all, one) = (&tenants.world.tenants[rig.rounds..], tenants.world.tenants[0]);
            let (seconds, refused) = tenants.run(all, "all.").await?;
            throttled.push(Round::absolute(refused));
            let shortest = tenants.shortest_s(one).await? * TENANTS.div_ceil(PREFETCH) as f64;
            let note = format!("{TENANTS} such tenants at the same time, {PREFETCH} of them in flight");
            let rounds = vec![Round::against(seconds, shortest)];
            lines.push(Line::new("tenant_time_16", "s", Target::RatioAtMost(1.3), rounds).note(note));
        }
        peaks.push(Round::absolute(tenants.daemon.peak_mib()?));
        tenants.daemon.stop().await?;
    }
    lines.push(Line::new("tenant_time_429", "responses", Target::AtMost(0.0), throttled).note("throttled in a round"));
    lines.push(Line::new("tenant_time_memory", "MiB", Target::AtMost(64.0), peaks).note("peak of these runs"));
    Ok(lines)
}

impl Tenants {
    async fn start(rig: &Rig, latency_ms: u32) -> Result<Self> {
        let simulator = ["--limits", "--objects", &OBJECTS.to_string(), "--latency-ms", &latency_ms.to_string()];
        let name = format!("tenant_time_{latency_ms}");
        let world = World::new(rig, &name, rig.rounds + TENANTS, &simulator.map(str::to_owned)).await?;
        let (graph, latency_s) = (Graph::new(&world)?, f64::from(latency_ms) / 1_000.0);
        let daemon = world.daemon(&LIMITS, 1).await?;
        Ok(Self { world, graph, daemon, latency_s })
    }

    /// Runs everything of `tenants`; returns the seconds and the number of throttled responses.
    async fn run(&self, tenants: &[Uuid], key: &str) -> Result<(f64, f64)> {
        let since = self.world.now().await?;
        for (number, tenant) in tenants.iter().enumerate() {
            self.world.publish_everything(*tenant, &format!("{key}{number}")).await?;
        }
        let seconds = self.world.seconds_to_end(key, tenants.len(), since).await?;
        let mut throttled = 0.0;
        for tenant in tenants {
            throttled += self.state(*tenant).await?["throttled"].as_f64().ok_or("the simulator counts no 429")?;
        }
        Ok((seconds, throttled))
    }

    async fn state(&self, tenant: Uuid) -> Result<Value> {
        let state = self.graph.http.get(self.graph.link("admin/state")).send().await?.bytes().await?;
        let mut state: Value = serde_json::from_slice(&state)?;
        Ok(state["tenants"][tenant.to_string()].take())
    }

    /// Shortest possible time of the run that a tenant has had: a token, then the longest chain of requests that follow
    /// one another, or as many seconds as Conditional Access takes.
    async fn shortest_s(&self, tenant: Uuid) -> Result<f64> {
        let paths: BTreeMap<String, BTreeMap<String, f64>> =
            serde_json::from_value(self.state(tenant).await?["paths"].take())?;
        let requests: BTreeMap<&str, f64> = paths
            .iter()
            .map(|(path, statuses)| (path.as_str(), statuses.get("200").copied().unwrap_or_default()))
            .collect();
        let is_slow = |path: &str| path.contains("/conditionalAccess/");
        let slow: f64 = requests.iter().filter(|(path, _)| is_slow(path)).map(|(_, count)| count).sum();
        let longest = longest_chain(&requests);
        Ok(self.latency_s + (longest * self.latency_s).max(slow - 1.0 + self.latency_s))
    }
}

/// Most requests that follow one another: the pages of a list, or those of parents and then of one parent's children.
fn longest_chain(requests: &BTreeMap<&str, f64>) -> f64 {
    let catalog = Catalog::built_in();
    let of_children = catalog.types().filter_map(|policy_type| {
        let (version, parent) = (&policy_type.api_version, policy_type.parent.as_ref()?);
        let (before, after) = policy_type.path.split_once("{parent_id}")?;
        let (before, parent) = (format!("{version}/{before}"), format!("{version}/{parent}"));
        let children = requests.iter().filter(|(path, _)| path.starts_with(&before) && path.ends_with(after));
        let longest = children.map(|(_, count)| *count).reduce(f64::max)?;
        // A list of its own is read once more as that of the parents.
        let is_listed = catalog.types().any(|listed| Some(&listed.path) == policy_type.parent.as_ref());
        Some(requests.get(parent.as_str())? / if is_listed { 2.0 } else { 1.0 } + longest)
    });
    let of_parents = catalog.types().filter_map(|policy_type| policy_type.parent.as_ref());
    let parents: Vec<&String> = of_parents.collect();
    let of_lists = requests.iter().filter(|(path, _)| !parents.iter().any(|parent| path.ends_with(parent.as_str())));
    of_children.chain(of_lists.map(|(_, count)| *count)).fold(0.0, f64::max)
}
