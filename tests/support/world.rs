//! Isolated environment of one test: a simulator, a database and a broker prefix of its own.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use inventoryd::broker::Broker;
use inventoryd::config::Config;
use inventoryd::store::Store;
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
use lapin::types::FieldTable;
use lapin::{BasicProperties, Channel, Connection, ConnectionProperties};
use serde_json::{Value, json};
use sqlx::postgres::{PgPool, PgPoolOptions};
use sqlx::{AssertSqlSafe, Connection as _, Row};
use uuid::Uuid;

use super::citus::{self, Cluster};
use super::events::Subscriber;
use super::proxy::Proxy;
use super::servers;
use super::{binary, eventually};
use crate::sim::{Sim, SimConfig};

/// Client credentials that the simulator accepts.
const CLIENT_ID: &str = "11111111-2222-4333-8444-555555555555";
const CLIENT_SECRET: &str = "simulated-secret";

/// Everything that the daemon talks to: a real broker and database, and simulated Microsoft services.
pub struct World {
    /// Simulated Microsoft Graph and token service.
    pub sim: Sim,
    /// Connections of the test itself to the database.
    pub db: PgPool,
    /// Registered tenant that most tests use.
    pub tenant: Uuid,
    /// Prefix of every exchange and queue name.
    pub prefix: String,
    /// URL of the database.
    pub database_url: String,
    /// URL of the broker.
    pub amqp_url: String,
    cluster: Option<Cluster>,
    ca_file: PathBuf,
    channel: Channel,
    connection: Connection,
}

impl World {
    /// Creates an environment on the shared servers.
    pub async fn new() -> Self {
        Self::with_sim(SimConfig::default()).await
    }

    /// Creates an environment whose simulator starts with `config`.
    pub async fn with_sim(config: SimConfig) -> Self {
        let urls = || {
            (citus::coordinator().unwrap_or_else(|| servers::postgres().url.clone()), servers::rabbitmq().url.clone())
        };
        let (postgres, rabbitmq) = tokio::task::spawn_blocking(urls).await.expect("the servers start");
        Self::on(config, &postgres, &rabbitmq).await
    }

    /// Creates an environment with sixty objects in the list `path`, served 25 a page whatever `$top` asks for.
    pub async fn with_three_pages(path: &str) -> Self {
        let mut config = SimConfig::default();
        config.page_sizes.top_caps.insert(path.to_owned(), 25);
        let world = Self::with_sim(config).await;
        world.sim.set_size(None, Some(path), 60).expect("the simulator has the list");
        world
    }

    /// Creates an environment on servers that the test started itself.
    pub async fn on(config: SimConfig, postgres: &str, rabbitmq: &str) -> Self {
        let sim = Sim::start(config).await.expect("the simulator starts");
        let name = format!("t{}", Uuid::new_v4().simple());
        let is_distributed = citus::coordinator().is_some_and(|coordinator| coordinator == postgres);
        let cluster = if is_distributed { Some(Cluster::create(postgres, &name).await) } else { None };
        let database_url = match &cluster {
            Some(cluster) => cluster.url.clone(),
            None => create_database(postgres, &name).await,
        };
        let db = PgPoolOptions::new().max_connections(4).connect_lazy(&database_url).expect("the URL is valid");
        let connection =
            Connection::connect(rabbitmq, ConnectionProperties::default()).await.expect("the broker answers");
        let channel = connection.create_channel().await.expect("a channel opens");
        channel.confirm_select(ConfirmSelectOptions::default()).await.expect("confirms are enabled");
        let ca_file = std::env::temp_dir().join(format!("{name}.pem"));
        std::fs::write(&ca_file, sim.ca_pem()).expect("the certificate can be written");
        let world = Self {
            sim,
            db,
            ca_file,
            channel,
            database_url,
            tenant: Uuid::new_v4(),
            prefix: format!("{name}."),
            cluster,
            amqp_url: rabbitmq.to_owned(),
            connection,
        };
        let config = world.config();
        Store::connect(&config.database).expect("the URL is valid").migrate().await.expect("the schema is migrated");
        if world.is_distributed() {
            citus::distribute(&world.database_url).await;
        }
        declare_topology(&config).await;
        world.register(world.tenant, None).await;
        world
    }

    /// Environment variables that configure a daemon for this environment.
    pub fn variables(&self) -> BTreeMap<String, String> {
        let sim = self.sim.base_url();
        let pairs = [
            ("BROKER__URL", self.amqp_url.as_str()),
            ("BROKER__HEARTBEAT_S", "5"),
            ("TOPOLOGY__PREFIX", &self.prefix),
            ("RUN__LEASE_S", "15"),
            ("DATABASE__URL", &self.database_url),
            ("OUTBOX__POLL_MS", "200"),
            ("BROKER__OPERATION_TIMEOUT_S", "5"),
            ("OUTBOX__CLAIM_S", "6"),
            ("DATABASE__MAX_CONNECTIONS", "6"),
            ("DATABASE__CONTROL_CONNECTIONS", "2"),
            ("GRAPH__CLOUD", "custom"),
            ("GRAPH__BASE_URL", &sim),
            ("GRAPH__AUTHORITY", &sim),
            ("GRAPH__CA_FILE", self.ca_file.to_str().expect("a path in UTF-8")),
            ("GRAPH__BACKOFF_FIRST_S", "0.05"),
            ("GRAPH__BACKOFF_MAX_S", "0.5"),
            ("GRAPH__MAX_TRIES", "4"),
            ("GRAPH__CREDENTIALS__DEFAULT__CLIENT_ID", CLIENT_ID),
            ("GRAPH__CREDENTIALS__DEFAULT__CLIENT_SECRET", CLIENT_SECRET),
            ("HTTP__LISTEN", ""),
        ];
        pairs.into_iter().map(|(key, value)| (format!("INVENTORYD__{key}"), value.to_owned())).collect()
    }

    /// Prepares a command of the real binary.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(binary());
        command.args(arguments).env_clear().envs(self.patient_variables()).stdin(Stdio::null());
        command
    }

    /// Environment variables of a command. A daemon tries again, a command does not: so the timeout is that of a slow disk.
    pub fn patient_variables(&self) -> BTreeMap<String, String> {
        let mut variables = self.variables();
        variables.insert("INVENTORYD__BROKER__OPERATION_TIMEOUT_S".to_owned(), "60".to_owned());
        variables.insert("INVENTORYD__OUTBOX__CLAIM_S".to_owned(), "61".to_owned());
        variables
    }

    /// Socket address of the broker.
    pub fn amqp_address(&self) -> SocketAddr {
        address_in(&self.amqp_url)
    }

    /// URL of the broker through a proxy.
    pub fn amqp_through(&self, proxy: &Proxy) -> String {
        self.amqp_url.replace(&self.amqp_address().to_string(), &proxy.address.to_string())
    }

    /// Where the database listens.
    pub fn database_address(&self) -> SocketAddr {
        address_in(&self.database_url)
    }

    /// The database's address by way of a proxy.
    pub fn database_through(&self, proxy: &Proxy) -> String {
        self.database_url.replace(&self.database_address().to_string(), &proxy.address.to_string())
    }

    /// Configuration of a daemon for this environment.
    pub fn config(&self) -> Config {
        Config::load_with(None, self.variables()).expect("the harness's configuration is valid")
    }

    /// Registers a tenant.
    pub async fn register(&self, tenant: Uuid, max_concurrent_runs: Option<i32>) {
        sqlx::query("insert into tenants (tenant_id, display_name, max_concurrent_runs) values ($1, 'Contoso', $2)")
            .bind(tenant)
            .bind(max_concurrent_runs)
            .execute(&self.db)
            .await
            .expect("the tenant is registered");
    }

    /// Builds a request for some types of the environment's tenant, without foundations.
    pub fn request(&self, key: &str, types: &[&str]) -> Value {
        Self::request_of(self.tenant, key, types)
    }

    /// Builds a request for some types of a tenant, without foundations.
    pub fn request_of(tenant: Uuid, key: &str, types: &[&str]) -> Value {
        json!({ "schema_version": 1, "tenant_id": tenant, "idempotency_key": key,
                "selection": { "policy_types": types, "include_foundations": false } })
    }

    /// Publishes a request as a scheduler would.
    pub async fn publish(&self, request: &Value) {
        let properties = BasicProperties::default().with_content_type("application/json".into());
        self.publish_bytes(request.to_string().as_bytes(), properties).await;
    }

    /// Publishes a request wrapped in a CloudEvents envelope.
    pub async fn publish_envelope(&self, envelope: &Value) {
        let properties = BasicProperties::default().with_content_type("application/cloudevents+json".into());
        self.publish_bytes(envelope.to_string().as_bytes(), properties).await;
    }

    /// Publishes any bytes and waits for the broker's confirmation.
    pub async fn publish_bytes(&self, body: &[u8], properties: BasicProperties) {
        let confirmed = self
            .channel
            .basic_publish(
                format!("{}inventory.sync", self.prefix).into(),
                "sync.requested".into(),
                BasicPublishOptions { mandatory: true, ..Default::default() },
                body,
                properties.with_delivery_mode(2),
            )
            .await
            .expect("the message is sent")
            .await
            .expect("the broker answers");
        assert!(confirmed.is_ack() && confirmed.take_message().is_none(), "the message was routed");
    }

    /// Number of messages that are ready in a queue.
    pub async fn depth(&self, queue: &str) -> u32 {
        self.inspect(queue).await.message_count()
    }

    /// Number of consumers that are subscribed to a queue.
    pub async fn consumers(&self, queue: &str) -> u32 {
        self.inspect(queue).await.consumer_count()
    }

    async fn inspect(&self, queue: &str) -> lapin::Queue {
        let channel = self.connection.create_channel().await.expect("a channel opens");
        let options = lapin::options::QueueDeclareOptions { passive: true, ..Default::default() };
        let name = format!("{}{queue}", self.prefix);
        let declared = channel.queue_declare(name.into(), options, FieldTable::default()).await;
        declared.expect("the queue exists")
    }

    /// Takes one message from a queue.
    pub async fn take(&self, queue: &str) -> Option<lapin::message::BasicGetMessage> {
        let name = format!("{}{queue}", self.prefix);
        let options = lapin::options::BasicGetOptions { no_ack: true };
        self.channel.basic_get(name.into(), options).await.expect("the queue exists")
    }

    /// Rejects the messages of a queue until the broker gives them up at its delivery limit. Since RabbitMQ 4.3 a nack
    /// that requeues is no failed delivery any more, while a reject is one on every version.
    pub async fn exhaust_redeliveries(&self, queue: &str) {
        let name = format!("{}{queue}", self.prefix);
        let get = async || {
            let options = lapin::options::BasicGetOptions { no_ack: false };
            self.channel.basic_get(name.as_str().into(), options).await.expect("the queue exists")
        };
        while let Some(message) = get().await {
            let back = lapin::options::BasicRejectOptions { requeue: true };
            message.delivery.acker.reject(back).await.expect("the message is requeued");
        }
    }

    /// Subscribes to every event of this environment.
    pub async fn subscribe(&self) -> Subscriber {
        Subscriber::new(&self.amqp_url, &self.prefix).await
    }

    /// Waits until the run of a key ends, and returns it as JSON.
    pub async fn ended(&self, key: &str) -> Value {
        eventually(&format!("the run of {key} ends"), || async {
            self.runs(key).await.into_iter().find(|run| run["status"] != "running")
        })
        .await
    }

    /// Publishes a request for some types and waits for the end of its run.
    pub async fn sync(&self, key: &str, types: &[&str]) -> Value {
        self.publish(&self.request(key, types)).await;
        self.ended(key).await
    }

    /// Returns every run of a key, in any tenant.
    pub async fn runs(&self, key: &str) -> Vec<Value> {
        self.rows(&format!("select * from inventory_sync_runs where idempotency_key = '{key}'")).await
    }

    /// True on a Citus cluster, where the tables are distributed.
    pub fn is_distributed(&self) -> bool {
        self.cluster.is_some()
    }

    /// Returns the rows of a query as JSON.
    pub async fn rows(&self, query: &str) -> Vec<Value> {
        // Materialized, because Citus loses the names of the columns of a subquery that it inlines.
        let query = format!("with q as materialized ({query}) select to_jsonb(q) from q");
        let rows = sqlx::query(AssertSqlSafe(query)).fetch_all(&self.db).await.expect("the query is valid");
        rows.into_iter().map(|row| row.get(0)).collect()
    }

    /// Returns the single value of a counting query.
    pub async fn count(&self, query: &str) -> i64 {
        sqlx::query(AssertSqlSafe(query.to_owned())).fetch_one(&self.db).await.expect("the query is valid").get(0)
    }

    /// Returns the single value of a counting query about the server itself, summed over the nodes of a cluster.
    pub async fn count_on_nodes(&self, query: &str) -> i64 {
        if !self.is_distributed() {
            return self.count(query).await;
        }
        self.count(&format!("select sum(result::bigint)::bigint from run_command_on_all_nodes($node${query}$node$)"))
            .await
    }

    /// Executes statements in the database.
    pub async fn execute(&self, statement: &str) {
        sqlx::raw_sql(AssertSqlSafe(statement.to_owned())).execute(&self.db).await.expect("the statement is valid");
    }

    /// Splits the items of the world's database, which is on the shared server, into `count` partitions by tenant.
    pub async fn partition_items(&self, count: u32) {
        let (_, database) = self.database_url.rsplit_once('/').expect("an address names a database");
        let (database, partitions) = (database.to_owned(), format!("partitions={count}"));
        let split = move || {
            let arguments = ["-qAt", "-v", &partitions, "-f", "deploy/sql/partition_items.sql"];
            servers::postgres().psql(&database, &arguments)
        };
        tokio::task::spawn_blocking(split).await.expect("psql succeeds");
        let parts = "select count(*) from pg_inherits where inhparent = 'inventory_items'::regclass";
        assert_eq!(self.count(parts).await, i64::from(count), "the items are in {count} partitions");
    }

    /// Returns the rows of `inventory_missing` for a run's selection.
    pub async fn missing(&self, run: &Value) -> Vec<Value> {
        let (tenant, hash) = (&run["tenant_id"], &run["selection_hash"]);
        let query = format!("select * from inventory_missing({tenant}, {hash}) order by external_id");
        self.rows(&query.replace('"', "'")).await
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.ca_file);
    }
}

/// Declares exchanges and queues; the broker may take long, as its disk may be slow.
pub async fn declare_topology(config: &Config) {
    let mut config = config.clone();
    config.broker.operation_timeout_s = 60;
    let broker = Broker::new(&config.broker, &config.topology, "test").expect("the URL is valid");
    broker.ensure_topology().await.expect("the queues are declared");
}

/// Extracts `host:port` from a URL with user and path.
fn address_in(url: &str) -> SocketAddr {
    let (_, rest) = url.split_once('@').expect("the URL has a user");
    rest.split('/').next().expect("split returns a first part").parse().expect("the servers listen on 127.0.0.1")
}

async fn create_database(server: &str, name: &str) -> String {
    let mut admin = sqlx::PgConnection::connect(server).await.expect("the database server answers");
    sqlx::raw_sql(AssertSqlSafe(format!("create database {name}")))
        .execute(&mut admin)
        .await
        .expect("a database is created");
    let (base, _) = server.rsplit_once('/').expect("the URL names a database");
    format!("{base}/{name}")
}
