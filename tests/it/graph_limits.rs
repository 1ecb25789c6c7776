//! Graph client under real limits: rate limiter, concurrency limit and pauses.

use std::time::{Duration, Instant};

use futures_util::future::join_all;

use crate::graph_client::{PLAIN, TENANT, World, budget, read};
use crate::sim::{Limits, RetryAfterForm, Rule, SimConfig};

const DEVICES: &str = "deviceManagement/deviceHealthScripts";
const POLICIES: &str = "identity/conditionalAccess/policies";

fn limited(limits: Limits) -> SimConfig {
    SimConfig { limits: Some(limits), ..SimConfig::default() }
}

#[tokio::test]
async fn the_rate_limiter_avoids_throttling_and_uses_the_allowance() {
    let world = World::with(limited(Limits { intune: 400, ..Limits::default() }), &[("intune_per_20s", "400")]).await;
    world.sim.set_size(Some(TENANT), Some(PLAIN), 25 * 20).unwrap();
    let client = world.client();
    let collection = world.collection(PLAIN);
    let begun = Instant::now();
    let readers: Vec<_> = (0..4).map(|_| client.reader(TENANT, "default", budget(60, 20))).collect();
    for objects in join_all(readers.iter().map(|reader| read(reader, &collection))).await {
        assert_eq!(objects.unwrap().len(), 500);
    }
    let state = &world.sim.state().tenants[&TENANT];
    assert_eq!((state.answered, state.throttled), (80, 0));
    // 16 at once, and 64 more at 80 a second. A new client may use the fifth that its predecessor has left.
    let shortest = Duration::from_millis(800);
    let took = begun.elapsed();
    assert!(took >= shortest.mul_f64(0.95) && took < Duration::from_secs(20), "{took:?}");
}

#[tokio::test]
async fn the_devices_family_has_a_limit_of_its_own() {
    let world = World::with(SimConfig::default(), &[("intune_per_20s", "1"), ("devices_per_20s", "200")]).await;
    world.sim.set_size(Some(TENANT), Some(DEVICES), 25 * 20).unwrap();
    let begun = Instant::now();
    assert_eq!(world.read(DEVICES).await.unwrap().len(), 500);
    // 8 at once, and 12 more at 40 a second: neither without a limit nor at that of the others.
    let took = begun.elapsed();
    assert!(took > Duration::from_millis(280) && took < Duration::from_secs(20), "{took:?}");
}

#[tokio::test]
async fn conditional_access_gets_one_request_a_second() {
    let world = World::with(limited(Limits::default()), &[]).await;
    world.sim.set_size(Some(TENANT), Some(POLICIES), 60).unwrap();
    let objects = world.read(POLICIES).await.unwrap();
    assert_eq!((objects.len(), world.sim.state().tenants[&TENANT].throttled), (60, 0));
}

#[tokio::test]
async fn without_a_rate_limit_no_request_is_sent_before_its_retry_after() {
    for form in [RetryAfterForm::Seconds, RetryAfterForm::Fraction, RetryAfterForm::Date] {
        let limits = Limits { intune: 20, window_ms: 2_000, retry_after: form, ..Limits::default() };
        let world = World::with(limited(limits), &[("intune_per_20s", "0")]).await;
        world.sim.set_size(Some(TENANT), Some(PLAIN), 25 * 12).unwrap();
        let client = world.client();
        let collection = world.collection(PLAIN);
        let readers: Vec<_> = (0..4).map(|_| client.reader(TENANT, "default", budget(60, 40))).collect();
        for objects in join_all(readers.iter().map(|reader| read(reader, &collection))).await {
            assert_eq!(objects.unwrap().len(), 300, "{form:?}");
        }
        let state = &world.sim.state().tenants[&TENANT];
        assert!(state.throttled > 0, "{form:?}: {state:?}");
        // Those on their way when the first was refused could not know.
        assert!(state.early <= state.throttled && state.throttled <= 4 * 4, "{form:?}: {state:?}");
    }
}

#[tokio::test]
async fn a_pause_holds_other_runs_and_other_replicas() {
    let world = World::start().await;
    let (client, other_replica) = (world.client(), world.client());
    let collection = world.collection(PLAIN);
    let mut changes = client.pause_notices();
    world.sim.add_rule(Rule::status(429, Some("2")).path(PLAIN).times(1));
    let readers: Vec<_> = (0..3).map(|_| client.reader(TENANT, "default", budget(30, 20))).collect();
    read(&readers[0], &collection).await.unwrap();
    let change = changes.try_recv().unwrap();
    assert_eq!((change.tenant_id, change.family, change.duration), (TENANT, "intune", Duration::from_secs(2)));

    other_replica.pause(change.tenant_id, change.family, Duration::from_millis(1_500));
    let begun = Instant::now();
    let reader = other_replica.reader(TENANT, "default", budget(30, 20));
    read(&reader, &collection).await.unwrap();
    assert!(begun.elapsed() >= Duration::from_millis(1_400), "{:?}", begun.elapsed());
    assert_eq!(reader.usage().graph_throttled_count, 0);
    let other_family = other_replica.reader(TENANT, "default", budget(30, 20));
    other_replica.pause(TENANT, "devices", Duration::from_secs(60));
    assert!(read(&other_family, &collection).await.is_ok());
}
