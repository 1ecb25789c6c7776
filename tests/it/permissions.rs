//! Permissions of the broker's user: each mode works with the documented ones, and a missing one is named.

use inventoryd::broker::{Broker, BrokerError};
use inventoryd::config::{Config, TopologyMode};
use serde_json::json;
use tokio::task::spawn_blocking;

use crate::support::daemon::Replica;
use crate::support::eventually;
use crate::support::servers;
use crate::support::world::World;

/// User of one test; deleted on drop.
struct User(String);

impl User {
    /// Creates a user named after the environment. Each of configure, write and read is a pattern of what follows the prefix.
    async fn create(world: &World, permissions: [&str; 3]) -> Self {
        let name = world.prefix.trim_end_matches('.').to_owned();
        let prefix = world.prefix.replace('.', "\\.");
        let [configure, write, read] =
            permissions.map(|rest| if rest.is_empty() { "^$".to_owned() } else { format!("^{prefix}{rest}") });
        let user = name.clone();
        spawn_blocking(move || {
            servers::rabbitmq().ctl(&["-q", "add_user", &user, "secret"]);
            servers::rabbitmq().ctl(&["-q", "set_permissions", &user, &configure, &write, &read]);
        })
        .await
        .unwrap();
        Self(name)
    }

    fn config(&self, world: &World, mode: TopologyMode) -> Config {
        let mut config = world.config();
        config.topology.mode = mode;
        config.broker.url = world.amqp_url.replace("guest:guest", &format!("{}:secret", self.0)).into();
        config
    }
}

impl Drop for User {
    fn drop(&mut self) {
        servers::rabbitmq().ctl(&["-q", "delete_user", &self.0]);
    }
}

/// Permissions that deploy/README.md documents for `topology.mode = "verify"`.
const VERIFY: [&str; 3] =
    ["", "inventory\\.(sync|retry|dead|events)$", "inventory\\.(sync\\.requests|dead|dead\\.kept)$"];

/// A bad request, a retry and a run, with all effects of each.
async fn assert_works(world: &World, config: Config) {
    let replica = Replica::with(config).await;
    world.publish(&world.request("a", &["mobileApp"])).await;
    assert_eq!(world.ended("a").await["status"], "success");
    world.publish_bytes(b"{ nope", lapin::BasicProperties::default()).await;
    for (queue, count) in [("inventory.unrouted", 1), ("inventory.dead", 1), ("inventory.sync.requests", 0)] {
        eventually(&format!("{count} in {queue}"), || async { (world.depth(queue).await == count).then_some(()) })
            .await;
    }
    replica.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn documented_permissions_are_sufficient_in_each_mode() {
    for (mode, permissions) in [
        (TopologyMode::Declare, ["inventory\\."; 3]),
        (TopologyMode::Verify, ["", "inventory\\..*", "inventory\\..*"]),
        (TopologyMode::Verify, VERIFY),
    ] {
        let world = World::new().await;
        let user = User::create(&world, permissions).await;
        let config = user.config(&world, mode);
        let broker = Broker::new(&config.broker, &config.topology, "test").unwrap();
        broker.check().await.unwrap();
        for queue in ["inventory.dead", "inventory.unrouted", "inventory.sync.requests"] {
            assert_eq!(world.depth(queue).await, 0, "the check stores nothing in {queue}");
        }
        assert_works(&world, config).await;
        let mut letters = broker.dead_letters().await.unwrap();
        assert_eq!(letters.list(10, |_| true).await.unwrap().len(), 1);
        letters.close().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_missing_permission_is_named_by_the_check_and_the_start() {
    let world = World::new().await;
    let user = User::create(&world, ["", "inventory\\.(sync|events)$", "inventory\\.dead$"]).await;
    let config = user.config(&world, TopologyMode::Verify);
    let broker = Broker::new(&config.broker, &config.topology, "test").unwrap();
    let Err(BrokerError::Permissions(missing)) = broker.check().await else { panic!("the permissions are too few") };
    let expected = [
        format!("exchange {}inventory.retry: no write permission", world.prefix),
        format!("exchange {}inventory.dead: no write permission", world.prefix),
        format!("queue {}inventory.sync.requests: no read permission", world.prefix),
    ];
    assert_eq!(missing.lines().collect::<Vec<_>>(), expected);

    let replica = Replica::with(config).await;
    let health = replica.daemon().health();
    let problem = eventually("the start names it", || async { health.problem() }).await;
    assert!(expected.iter().all(|line| problem.contains(line)), "{problem}");
    assert!(!health.subscribed());
    let name = user.0.clone();
    let all = format!("^{}", world.prefix.replace('.', "\\."));
    spawn_blocking(move || servers::rabbitmq().ctl(&["-q", "set_permissions", &name, "^$", &all, &all])).await.unwrap();
    world.publish(&world.request("late", &["mobileApp"])).await;
    assert_eq!(world.ended("late").await["status"], json!("success"), "granted permissions need no restart");
    replica.stop().await;
}
