//! Failed connections to broker and database: each names its cause and the key to correct, and no password.

use inventoryd::broker::Broker;
use inventoryd::store::Store;
use tokio::task::spawn_blocking;
use uuid::Uuid;

use crate::support::servers;
use crate::support::world::World;

const PASSWORD: &str = "hunter2";

/// Host with a label that is too long, which every resolver refuses without asking a server.
fn unknown_host() -> String {
    format!("{}.invalid", "x".repeat(64))
}

/// Virtual hosts and a user of one test; deleted on drop.
struct Guarded {
    name: String,
}

impl Guarded {
    /// Creates a user without permissions, a virtual host that is closed to it, and one that allows no connection.
    async fn create() -> Self {
        let name = format!("guarded-{}", Uuid::new_v4().simple());
        let guarded = Self { name };
        let (user, closed, full) = (guarded.name.clone(), guarded.closed(), guarded.full());
        spawn_blocking(move || {
            let ctl = |arguments: &[&str]| servers::rabbitmq().ctl(&[&["-q"], arguments].concat());
            ctl(&["add_user", &user, PASSWORD]);
            ctl(&["add_vhost", &closed]);
            ctl(&["add_vhost", &full]);
            ctl(&["set_permissions", "-p", &full, &user, ".*", ".*", ".*"]);
            ctl(&["set_vhost_limits", "-p", &full, "{\"max-connections\": 0}"]);
        })
        .await
        .unwrap();
        guarded
    }

    fn closed(&self) -> String {
        format!("{}-closed", self.name)
    }

    fn full(&self) -> String {
        format!("{}-full", self.name)
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        for arguments in [["delete_user", &self.name], ["delete_vhost", &self.closed()], ["delete_vhost", &self.full()]]
        {
            servers::rabbitmq().ctl(&[&["-q"], &arguments[..]].concat());
        }
    }
}

/// Asserts that an error holds these parts, and neither the password nor the address with it.
fn assert_names(problem: &str, parts: &[&str]) {
    for part in parts {
        assert!(problem.contains(part), "{part:?} is not in: {problem}");
    }
    assert!(!problem.contains(PASSWORD), "{problem}");
}

#[tokio::test(flavor = "multi_thread")]
async fn each_failed_connection_to_the_broker_names_cause_and_cure() {
    let (world, guarded) = (World::new().await, Guarded::create().await);
    let (_, address) = world.amqp_url.rsplit_once('@').unwrap();
    let (host, port) = address.split('/').next().unwrap().rsplit_once(':').unwrap();
    let (user, closed, full, free) = (&guarded.name, guarded.closed(), guarded.full(), servers::free_port());
    let (login, unknown) = (format!("{user}:{PASSWORD}@"), unknown_host());
    for (url, cause, cure) in [
        (format!("amqp://guest:{PASSWORD}@{host}:{port}"), "ACCESS_REFUSED", "the user and password in broker.url"),
        (format!("amqp://{login}{host}:{port}/nowhere"), "vhost nowhere not found", "rabbitmqctl add_vhost"),
        (format!("amqp://{login}{host}:{port}/{closed}"), "refused for user", "rabbitmqctl set_permissions -p"),
        (format!("amqp://{login}{host}:{port}/{full}"), "limit", "number of replicas"),
        (format!("amqp://{login}{unknown}"), "lookup", "the host in broker.url"),
        (format!("amqp://{login}{host}:{free}"), "refused", "start RabbitMQ"),
        (format!("amqps://{login}{host}:{port}"), "TLS failed", "begin the address with amqp://"),
    ] {
        let mut config = world.config();
        config.broker.url = url.into();
        let broker = Broker::new(&config.broker, &config.topology, "test").unwrap();
        let problem = broker.ensure_topology().await.unwrap_err();
        assert_names(&format!("{problem} {problem:?}"), &[cause, cure]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_failed_connection_to_the_database_names_cause_and_cure() {
    let world = World::new().await;
    let (login, address) = world.database_url.rsplit_once('@').unwrap();
    let (server, database) = address.split_once('/').unwrap();
    let (free, unknown) = (servers::free_port(), unknown_host());
    let stranger = format!("postgres://stranger:{PASSWORD}@{server}/{database}");
    for (url, cause, cure) in [
        (stranger, "role \"stranger\" does not exist", "correct the user of database.url"),
        (format!("{login}@{server}/nowhere"), "\"nowhere\" does not exist", "the database of database.url"),
        (format!("{login}@{address}?sslmode=require"), "does not support TLS", "sslmode=disable"),
        (format!("{login}@{unknown}/{database}"), "lookup", "the host in database.url"),
        (format!("{login}@127.0.0.1:{free}/{database}"), "refused", "start PostgreSQL"),
    ] {
        let mut config = world.config();
        config.database.url = url.into();
        let problem = Store::connect(&config.database).unwrap().ping().await.unwrap_err();
        assert_names(&format!("{problem} {problem:?}"), &[cause, cure]);
    }
}
