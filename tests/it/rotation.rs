//! Addresses and passwords of broker and database that change while the daemon runs.

use std::path::PathBuf;
use std::time::Duration;

use serde_json::Value;
use tokio::net::{TcpListener, TcpStream};

use crate::sim::SimConfig;
use crate::support::daemon::{Process, Replica};
use crate::support::servers::Private;
use crate::support::world::World;
use crate::support::{DEADLINE, eventually, within};

const ROTATED: &str = "rotated";

/// Servers that check the password of the user [`ROTATED`], and files with its addresses.
struct Rotation {
    postgres: Private,
    rabbitmq: Private,
    world: World,
    database_file: PathBuf,
    broker_file: PathBuf,
}

impl Rotation {
    async fn start() -> Self {
        let postgres = Private::start("postgres", "postgres-rotation").await;
        let rabbitmq = Private::start("rabbitmq", "rabbitmq-rotation").await;
        let world = World::on(SimConfig::default(), &postgres.url, &rabbitmq.url).await;
        world.execute("create role rotated superuser login password 'one'").await;
        let file =
            world.rows("select current_setting('hba_file') as file").await[0]["file"].as_str().unwrap().to_owned();
        let rules = format!(
            "copy (values ('host all {ROTATED} all scram-sha-256'), ('host all barred all reject'),
                          ('host all all all trust'), ('local all all trust')) to '{file}'"
        );
        world.execute(&rules).await;
        world.execute("select pg_reload_conf()").await;
        rabbitmq
            .act(|server| {
                server.ctl(&["add_user", ROTATED, "one"]);
                server.ctl(&["set_permissions", ROTATED, ".*", ".*", ".*"]);
            })
            .await;
        let path = |name: &str| std::env::temp_dir().join(format!("{}{name}", world.prefix));
        let (database_file, broker_file) = (path("database-url"), path("broker-url"));
        let rotation = Self { postgres, rabbitmq, world, database_file, broker_file };
        rotation.write("one", "one");
        rotation
    }

    /// Writes the addresses with these passwords, as Kubernetes updates a mounted secret.
    fn write(&self, for_database: &str, for_broker: &str) {
        let (_, database) = self.postgres.url.rsplit_once('@').unwrap();
        let (_, name) = self.world.database_url.rsplit_once('/').unwrap();
        let (address, _) = database.split_once('/').unwrap();
        std::fs::write(&self.database_file, format!("postgres://{ROTATED}:{for_database}@{address}/{name}\n")).unwrap();
        let (_, broker) = self.rabbitmq.url.rsplit_once('@').unwrap();
        std::fs::write(&self.broker_file, format!("amqp://{ROTATED}:{for_broker}@{broker}\n")).unwrap();
    }

    /// Changes the password on both servers and closes the connections that used the old one.
    async fn rotate(&self, password: &'static str) {
        self.world.execute(&format!("alter role {ROTATED} password '{password}'")).await;
        self.rabbitmq.act(move |server| server.ctl(&["change_password", ROTATED, password])).await;
        self.disconnect().await;
    }

    /// Closes the connections of the user. One that is being opened is not seen yet.
    async fn disconnect(&self) {
        let ended = format!("select pg_terminate_backend(pid) from pg_stat_activity where usename = '{ROTATED}'");
        self.world.execute(&ended).await;
        let close = |server: crate::support::servers::Server| {
            server.eval(
                "[rabbit_networking:close_connection(Pid, \"rotated\") || Pid <- rabbit_networking:connections(), \
                 [{user, <<\"rotated\">>}] =:= rabbit_networking:connection_info(Pid, [user])].",
            )
        };
        self.rabbitmq.act(close).await;
    }
}

impl Drop for Rotation {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.database_file);
        let _ = std::fs::remove_file(&self.broker_file);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rotated_password_is_read_from_the_file_and_a_wrong_one_is_named() {
    let rotation = Rotation::start().await;
    let world = &rotation.world;
    let listen = format!("127.0.0.1:{}", crate::support::servers::free_port());
    let settings = [
        ("HTTP__LISTEN", listen.as_str()),
        ("DATABASE__URL_FILE", rotation.database_file.to_str().unwrap()),
        ("BROKER__URL_FILE", rotation.broker_file.to_str().unwrap()),
    ];
    let _replica = Process::start(world, "rotated", &settings);
    world.sync("before", &["mobileApp"]).await;

    rotation.write("two", "two");
    rotation.rotate("two").await;
    world.sync("after", &["mobileApp"]).await;

    rotation.rotate("three").await;
    let client = reqwest::Client::new();
    let status = async || {
        let answer = client.get(format!("http://{listen}/status")).send().await.ok()?;
        serde_json::from_str::<Value>(&answer.text().await.ok()?).ok()
    };
    let named = async |component: &str, cause: &str| {
        within(Duration::from_secs(60), &format!("/status names the cause of {component}"), || async {
            // A connection that passed its login just before the rotation would keep its component healthy.
            rotation.disconnect().await;
            let status = status().await?;
            let problem = status["problems"].as_array()?.iter().find(|problem| problem["component"] == component)?;
            problem["message"].as_str()?.contains(cause).then_some(())
        })
        .await;
    };
    named(
        "database",
        "password authentication failed for user \"rotated\"; correct the user and password of database.url",
    )
    .await;
    // Without a database no subscription is attempted, and no other reason is given for having none.
    named("subscription", "there is none while no new requests are accepted").await;
    rotation.write("three", "two");
    named("subscription", "correct the user and password in broker.url").await;
    rotation.write("three", "three");
    world.sync("cured", &["mobileApp"]).await;

    let mut config = world.config();
    config.database.url = world.database_url.replace("inventoryd@", "barred@").into();
    let barred = inventoryd::store::Store::connect(&config.database).unwrap().ping().await.unwrap_err().to_string();
    assert!(barred.contains("pg_hba.conf rejects") && barred.contains("sslmode=require"), "{barred}");
}

/// Forwards connections from the IPv6 loopback address to the database; returns the port.
async fn listen_on_ipv6(world: &World) -> u16 {
    let listener = TcpListener::bind("[::1]:0").await.unwrap();
    let (port, target) = (listener.local_addr().unwrap().port(), world.database_address());
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut server = TcpStream::connect(target).await?;
                tokio::io::copy_bidirectional(&mut client, &mut server).await
            });
        }
    });
    port
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_is_reached_by_an_ipv6_literal() {
    let world = World::new().await;
    let port = listen_on_ipv6(&world).await;
    let mut variables = world.variables();
    let url = world.database_url.replace(&world.database_address().to_string(), &format!("[::1]:{port}"));
    variables.insert("INVENTORYD__DATABASE__URL".to_owned(), url);
    let replica = Replica::with(inventoryd::config::Config::load_with(None, variables).unwrap()).await;
    assert_eq!(world.sync("ipv6", &["mobileApp"]).await["status"], "success");
    replica.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_limit_and_a_refused_connection_are_named_early() {
    let world = World::new().await;
    let role = format!("limited{}", world.prefix.trim_end_matches('.'));
    world.execute(&format!("create role \"{role}\" superuser login connection limit 0")).await;
    // The limit does not hold for superusers.
    world.execute(&format!("alter role \"{role}\" nosuperuser")).await;
    let mut config = world.config();
    config.database.acquire_timeout_s = 600;
    let (_, address) = world.database_url.rsplit_once('@').unwrap();
    config.database.url = format!("postgres://{role}@{address}").into();
    let ping = async |config: &inventoryd::config::DatabaseConfig| {
        let store = inventoryd::store::Store::connect(config).unwrap();
        tokio::time::timeout(DEADLINE, store.ping()).await.expect("long before").unwrap_err().to_string()
    };
    let limited = ping(&config.database).await;
    assert!(limited.contains("connection limit reached") && limited.contains("max_connections"), "{limited}");
    let port = crate::support::servers::free_port();
    config.database.url = format!("postgres://nobody@127.0.0.1:{port}/nothing").into();
    let refused = ping(&config.database).await;
    assert!(refused.contains("Connection refused"), "{refused}");
    world.execute(&format!("drop role \"{role}\"")).await;
    eventually("the role is gone", || async {
        (world.count(&format!("select count(*) from pg_roles where rolname = '{role}'")).await == 0).then_some(())
    })
    .await;
}
