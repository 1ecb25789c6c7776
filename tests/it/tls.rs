//! TLS to the broker and to the database: valid certificates work for a whole run, invalid ones are refused with the
//! cause.

use inventoryd::broker::Broker;
use inventoryd::config::Config;
use inventoryd::store::Store;

use crate::sim::SimConfig;
use crate::support::certificates::Authority;
use crate::support::daemon::Replica;
use crate::support::servers::{self, Private};
use crate::support::world::World;

const HOST: &str = "inventory.test";

/// Error of a connection to the broker with these variables.
async fn refusal(world: &World, variables: &[(&str, &str)]) -> String {
    let config = configured(world, variables);
    let broker = match Broker::new(&config.broker, &config.topology, "test") {
        Ok(broker) => broker,
        Err(error) => return error.to_string(),
    };
    broker.ensure_topology().await.expect_err("the connection is refused").to_string()
}

fn configured(world: &World, variables: &[(&str, &str)]) -> Config {
    let mut all = world.variables();
    all.extend(variables.iter().map(|(key, value)| (format!("INVENTORYD__{key}"), (*value).to_owned())));
    Config::load_with(None, all).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn amqps_verifies_authority_name_and_client_certificate() {
    let (ours, foreign) = (Authority::new("rabbitmq-tls"), Authority::new("rabbitmq-tls-foreign"));
    ours.issue("server", HOST);
    ours.issue("client", "inventoryd");
    foreign.issue("client", "inventoryd");
    let server = Private::start_with_tls("rabbitmq", "rabbitmq-tls", &ours).await;
    let (postgres, rabbitmq) = (servers::postgres().url.clone(), server.url.clone());
    let world = World::on(SimConfig::default(), &postgres, &rabbitmq).await;

    let url = server.tls_url();
    let (ca, client, key) = (ours.file("ca.pem"), ours.file("client.pem"), ours.file("client.key"));
    let valid = [
        ("BROKER__URL", url.as_str()),
        ("BROKER__CA_FILE", &ca),
        ("BROKER__CLIENT_CERTIFICATE_FILE", &client),
        ("BROKER__CLIENT_KEY_FILE", &key),
        ("BROKER__SERVER_NAME", HOST),
    ];
    let replica = Replica::with(configured(&world, &valid)).await;
    assert_eq!(world.sync("encrypted", &["mobileApp"]).await["status"], "success");
    replica.stop().await;

    let but = |key: &'static str, value: &str| -> Vec<(&'static str, String)> {
        valid.iter().map(|(name, was)| (*name, if *name == key { value } else { was }.to_owned())).collect()
    };
    let (foreign_ca, foreign_client, foreign_key) =
        (foreign.file("ca.pem"), foreign.file("client.pem"), foreign.file("client.key"));
    let mut of_foreign_authority = but("BROKER__CLIENT_CERTIFICATE_FILE", &foreign_client);
    of_foreign_authority[3].1 = foreign_key;
    let mut without_certificate = but("BROKER__CLIENT_CERTIFICATE_FILE", "");
    without_certificate[3].1 = String::new();
    for (variables, expected) in [
        (but("BROKER__CA_FILE", &foreign_ca), "UnknownIssuer; set broker.ca_file"),
        (but("BROKER__CA_FILE", ""), "UnknownIssuer; set broker.ca_file"),
        (but("BROKER__SERVER_NAME", "other.test"), "not valid for name \"other.test\""),
        (but("BROKER__SERVER_NAME", "other.test"), "set broker.server_name"),
        (but("BROKER__SERVER_NAME", ""), "not valid for name \"127.0.0.1\""),
        (but("BROKER__URL", &url.replace("amqps://", "amqp://")), "a port for TLS requires amqps://"),
        (without_certificate, "set broker.client_certificate_file"),
        (of_foreign_authority, "set broker.client_certificate_file"),
        (but("BROKER__CA_FILE", &key), "broker.ca_file: "),
        (but("BROKER__CLIENT_KEY_FILE", &client), "broker.client_key_file: "),
        (
            but("BROKER__CLIENT_CERTIFICATE_FILE", "/no/such.pem"),
            "broker.client_certificate_file: /no/such.pem: No such",
        ),
    ] {
        let variables: Vec<(&str, &str)> = variables.iter().map(|(key, value)| (*key, value.as_str())).collect();
        let refused = refusal(&world, &variables).await;
        assert!(refused.contains(expected), "{expected} is not in {refused}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn postgresql_certificate_name_is_verified() {
    let (ours, foreign) = (Authority::new("postgres-tls"), Authority::new("postgres-tls-foreign"));
    ours.issue("server", "localhost");
    let server = Private::start_with_tls("postgres", "postgres-tls", &ours).await;
    let rabbitmq = servers::rabbitmq().url.clone();
    let world = World::on(SimConfig::default(), &server.url, &rabbitmq).await;
    let verified = |host: &str, ca: &Authority| {
        let url = world.database_url.replace("127.0.0.1", host);
        format!("{url}?sslmode=verify-full&sslrootcert={}", ca.file("ca.pem"))
    };
    let replica = Replica::with(configured(&world, &[("DATABASE__URL", &verified("localhost", &ours))])).await;
    assert_eq!(world.sync("encrypted", &["mobileApp"]).await["status"], "success");
    let plain = "select count(*) from pg_stat_activity join pg_stat_ssl using (pid)
                  where datname = current_database() and application_name = 'inventoryd' and not ssl";
    assert_eq!(world.count(plain).await, 0, "every connection of the daemon is encrypted");
    replica.stop().await;

    for (url, expected) in [
        (verified("localhost", &foreign), "UnknownIssuer; set sslrootcert"),
        (verified("127.0.0.1", &ours), "not valid for name \"127.0.0.1\""),
        (verified("127.0.0.1", &ours), "as the host in database.url"),
    ] {
        let config = configured(&world, &[("DATABASE__URL", &url)]);
        let store = Store::connect(&config.database).unwrap();
        let refused = store.ping().await.unwrap_err().to_string();
        assert!(refused.contains(expected), "{expected} is not in {refused}");
    }
}
