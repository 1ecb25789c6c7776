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

/// Runs the command that a report of missing permissions ends with.
async fn run_cure(report: &str) {
    let (_, command) = report.split_once("`rabbitmqctl ").unwrap_or_else(|| panic!("no command in {report}"));
    let (command, _) = command.split_once('`').unwrap();
    let words: Vec<String> = command.split(' ').map(|word| word.trim_matches('\'').to_owned()).collect();
    spawn_blocking(move || {
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        servers::rabbitmq().ctl(&[&["-q"], &words[..]].concat())
    })
    .await
    .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_permission_missing_while_declaring_is_one_of_a_report_that_names_all() {
    let world = World::new().await;
    // Each access is refused for one name, on which a declaration, a binding or a publish fails first or last.
    let permissions = [
        "(new\\.)?inventory\\.(?!retry\\.2m$)",
        "(new\\.)?inventory\\.(?!retry$)",
        "(new\\.)?inventory\\.(?!dead\\.kept$|sync$)",
    ];
    let user = User::create(&world, permissions).await;
    let mut config = user.config(&world, TopologyMode::Declare);
    for prefix in [world.prefix.clone(), format!("{}new.", world.prefix)] {
        config.topology.prefix.clone_from(&prefix);
        let broker = Broker::new(&config.broker, &config.topology, "test").unwrap();
        let report = broker.check().await.unwrap_err().to_string();
        let expected = [
            format!("exchange {prefix}inventory.sync: no read permission"),
            format!("exchange {prefix}inventory.retry: no write permission"),
            format!("exchange and queue {prefix}inventory.dead.kept: no read permission"),
            format!("queue {prefix}inventory.retry.2m: no configure permission"),
        ];
        assert_eq!(report.lines().skip(1).take(4).collect::<Vec<_>>(), expected, "{report}");
        let queues = spawn_blocking(|| servers::rabbitmq().ctl(&["-q", "list_queues", "name"])).await.unwrap();
        let probed = format!("{prefix}inventory.sync");
        assert!(queues.lines().all(|queue| queue != probed), "the check declares no queue");
        if prefix != world.prefix {
            run_cure(&report).await;
            assert_eq!(broker.check().await.unwrap(), [""; 0]);
        }
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
    assert_eq!(missing.lines().take(3).collect::<Vec<_>>(), expected);

    let replica = Replica::with(config).await;
    let health = replica.daemon().health();
    let problem = eventually("the start names it", || async { health.problem() }).await;
    assert!(expected.iter().all(|line| problem.contains(line)), "{problem}");
    assert!(!health.subscribed());
    run_cure(&missing).await;
    world.publish(&world.request("late", &["mobileApp"])).await;
    assert_eq!(world.ended("late").await["status"], json!("success"), "granted permissions need no restart");
    replica.stop().await;
}
