//! Isolated environment of one line: a simulator, a database and a broker prefix of its own.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use inventoryd::broker::Broker;
use inventoryd::config::Config;
use inventoryd::store::Store;
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions, QueueBindOptions, QueueDeclareOptions};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel, Connection, ConnectionProperties};
use serde_json::{Value, json};
use sqlx::postgres::{PgPool, PgPoolOptions};
use sqlx::{AssertSqlSafe, Connection as _, Row};
use uuid::Uuid;

use super::baseline::Lists;
use super::process::Process;
use super::rig::{Result, Rig, text};

/// Client id that the simulator accepts.
pub const CLIENT_ID: &str = "11111111-2222-4333-8444-555555555555";
/// Secret of [`CLIENT_ID`].
pub const CLIENT_SECRET: &str = "simulated-secret";
/// Longest wait for the end of measured runs.
pub const DEADLINE: Duration = Duration::from_secs(900);
/// Database connections of the environment itself.
pub const CONNECTIONS: u32 = 16;

/// Everything that the daemon talks to.
pub struct World {
    /// Root of the simulated Graph and its token service.
    pub graph: String,
    /// Path of the simulator's certificate authority.
    pub ca_file: PathBuf,
    /// Connections to the database.
    pub db: PgPool,
    /// URL of the database.
    pub database_url: String,
    /// URL of the broker.
    pub amqp_url: String,
    /// Prefix of every exchange and queue.
    pub prefix: String,
    /// Channel in confirm mode.
    pub channel: Channel,
    /// Connection of the channel.
    pub connection: Connection,
    /// Registered tenants.
    pub tenants: Vec<Uuid>,
    /// The simulator.
    pub simulator: Process,
    daemon: PathBuf,
    log: PathBuf,
}

impl World {
    /// Creates an environment with `tenants` tenants, and starts its simulator with these arguments.
    pub async fn new(rig: &Rig, name: &str, tenants: usize, simulator: &[String]) -> Result<Self> {
        let (process, graph, ca_file) = start_simulator(rig, name, simulator).await?;
        let database_url = make_database(&rig.postgres, name).await?;
        let db = PgPoolOptions::new().max_connections(CONNECTIONS).connect(&database_url).await?;
        let connection = Connection::connect(&rig.rabbitmq, ConnectionProperties::default()).await?;
        let channel = connection.create_channel().await?;
        channel.confirm_select(ConfirmSelectOptions::default()).await?;
        let world = Self {
            graph,
            ca_file,
            db,
            database_url,
            amqp_url: rig.rabbitmq.clone(),
            prefix: format!("{name}."),
            channel,
            connection,
            tenants: (0..tenants).map(|_| Uuid::new_v4()).collect(),
            simulator: process,
            daemon: rig.daemon.clone(),
            log: rig.log(&format!("{name}-inventoryd")),
        };
        let config = world.config()?;
        Store::connect(&config.database)?.migrate().await?;
        Broker::new(&config.broker, &config.topology, "bench")?.ensure_topology().await?;
        sqlx::query("insert into tenants (tenant_id, display_name) select id, 'Contoso' from unnest($1::uuid[]) t(id)")
            .bind(&world.tenants)
            .execute(&world.db)
            .await?;
        Ok(world)
    }

    /// Environment variables of a daemon. The rate limiter is off, because it would dominate every measurement.
    pub fn variables(&self) -> BTreeMap<String, String> {
        let pairs = [
            ("BROKER__URL", self.amqp_url.as_str()),
            ("TOPOLOGY__PREFIX", &self.prefix),
            ("DATABASE__URL", &self.database_url),
            ("GRAPH__CLOUD", "custom"),
            ("GRAPH__BASE_URL", &self.graph),
            ("GRAPH__AUTHORITY", &self.graph),
            ("GRAPH__CA_FILE", self.ca_file.to_str().unwrap_or_default()),
            ("GRAPH__CREDENTIALS__DEFAULT__CLIENT_ID", CLIENT_ID),
            ("GRAPH__CREDENTIALS__DEFAULT__CLIENT_SECRET", CLIENT_SECRET),
            ("GRAPH__INTUNE_PER_20S", "0"),
            ("GRAPH__DEVICES_PER_20S", "0"),
            ("GRAPH__CONDITIONAL_ACCESS_PER_S", "0"),
            ("HTTP__LISTEN", ""),
        ];
        pairs.into_iter().map(|(key, value)| (format!("INVENTORYD__{key}"), value.to_owned())).collect()
    }

    /// Configuration of a daemon.
    pub fn config(&self) -> Result<Config> {
        Ok(Config::load_with(None, self.variables())?)
    }

    /// Starts a daemon without waiting for it.
    pub fn launch(&self, extra: &[(&str, &str)]) -> Result<Process> {
        self.launch_under(&[], extra)
    }

    /// Starts a daemon as the last arguments of another program.
    fn launch_under(&self, wrapper: &[&str], extra: &[(&str, &str)]) -> Result<Process> {
        let mut variables = self.variables();
        variables.extend(extra.iter().map(|(key, value)| (format!("INVENTORYD__{key}"), (*value).to_owned())));
        let variables = variables.iter().map(|(key, value)| (key.as_str(), value.as_str()));
        let command = [wrapper, &[text(&self.daemon)?, "serve"]].concat();
        Process::start(command[0], &command[1..], variables, &self.log)
    }

    /// Starts a daemon and waits until `replicas` replicas consume.
    pub async fn daemon(&self, extra: &[(&str, &str)], replicas: u32) -> Result<Process> {
        self.consuming(self.launch(extra)?, replicas).await
    }

    /// Starts a daemon as the last arguments of another program, and waits until it consumes.
    pub async fn daemon_under(&self, wrapper: &[&str], extra: &[(&str, &str)]) -> Result<Process> {
        self.consuming(self.launch_under(wrapper, extra)?, 1).await
    }

    async fn consuming(&self, process: Process, replicas: u32) -> Result<Process> {
        let options = QueueDeclareOptions { passive: true, ..Default::default() };
        let begun = Instant::now();
        loop {
            let queue = format!("{}inventory.sync.requests", self.prefix);
            let declared = self.channel.queue_declare(queue.into(), options, FieldTable::default()).await?;
            if declared.consumer_count() >= replicas {
                return Ok(process);
            }
            if begun.elapsed() > Duration::from_secs(30) {
                return Err(format!("the daemon did not start within 30 s: see {}", self.log.display()).into());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Publishes a request for some types of a tenant without awaiting the confirm.
    pub async fn publish(&self, tenant: Uuid, key: &str, types: &[&str]) -> Result<()> {
        self.publish_selection(tenant, key, json!({ "policy_types": types, "include_foundations": false })).await
    }

    /// Publishes a request for everything of a tenant, without awaiting the confirm.
    pub async fn publish_everything(&self, tenant: Uuid, key: &str) -> Result<()> {
        self.publish_selection(tenant, key, json!({ "policy_types": ["*"], "include_foundations": true })).await
    }

    async fn publish_selection(&self, tenant: Uuid, key: &str, selection: Value) -> Result<()> {
        let request =
            json!({ "schema_version": 1, "tenant_id": tenant, "idempotency_key": key, "selection": selection });
        let properties = BasicProperties::default().with_content_type("application/json".into()).with_delivery_mode(2);
        let exchange = format!("{}inventory.sync", self.prefix);
        let body = request.to_string();
        self.channel
            .basic_publish(
                exchange.into(),
                "sync.requested".into(),
                BasicPublishOptions::default(),
                body.as_bytes(),
                properties,
            )
            .await?;
        Ok(())
    }

    /// Publishes `count` requests of all tenants in turn, and waits until their runs have succeeded; returns the seconds.
    pub async fn runs(&self, lists: &Lists, name: &str, count: usize) -> Result<f64> {
        let since = self.now().await?;
        for (number, tenant) in self.tenants.iter().cycle().take(count).enumerate() {
            self.publish(*tenant, &format!("{name}.{number}"), &lists.types()).await?;
        }
        self.seconds_to_end(&format!("{name}."), count, since).await
    }

    /// Waits until `count` runs whose keys start with `prefix` have succeeded; returns the seconds from `since`, a time
    /// of [`World::now`], to the end of the last.
    pub async fn seconds_to_end(&self, prefix: &str, count: usize, since: f64) -> Result<f64> {
        let begun = Instant::now();
        loop {
            // Uses the index on the id, which starts with the time, and rarely: polling must not disturb the measurement.
            let row = sqlx::query(
                "select count(*) filter (where status = 'success'), count(*) filter (where status not in ('running', 'success')),
                        coalesce(extract(epoch from max(finished_at)), 0)::float8
                   from inventory_sync_runs where id >= inventory_run_id_at(to_timestamp($2)) and starts_with(idempotency_key, $1)",
            )
            .bind(prefix)
            .bind(since)
            .fetch_one(&self.db)
            .await?;
            let (succeeded, other): (i64, i64) = (row.get(0), row.get(1));
            if other > 0 {
                return Err(format!("{other} runs of {prefix} did not succeed").into());
            }
            if succeeded == i64::try_from(count)? {
                return Ok(row.get::<f64, _>(2) - since);
            }
            if begun.elapsed() > DEADLINE {
                return Err(format!("{succeeded} of {count} runs of {prefix} have ended").into());
            }
            tokio::time::sleep(Duration::from_millis((count as u64 / 5).clamp(10, 1_000))).await;
        }
    }

    /// Declares a durable quorum queue.
    pub async fn declare_queue(&self, queue: &str) -> Result<()> {
        let mut arguments = FieldTable::default();
        arguments.insert("x-queue-type".into(), AMQPValue::LongString("quorum".into()));
        let options = QueueDeclareOptions { durable: true, ..Default::default() };
        self.channel.queue_declare(queue.into(), options, arguments).await?;
        Ok(())
    }

    /// Binds a queue to all events.
    pub async fn bind_events(&self, queue: &str) -> Result<()> {
        let (exchange, options) = (format!("{}inventory.events", self.prefix), QueueBindOptions::default());
        let all = "run.completed.#".into();
        self.channel.queue_bind(queue.into(), exchange.into(), all, options, FieldTable::default()).await?;
        Ok(())
    }

    /// Updates the planner's statistics, as autovacuum does within a minute in production.
    pub async fn analyze(&self) -> Result<()> {
        self.execute("analyze").await
    }

    /// Current time of the database in seconds.
    pub async fn now(&self) -> Result<f64> {
        self.float("select extract(epoch from clock_timestamp())::float8").await
    }

    /// Returns the single value of a query.
    pub async fn float(&self, query: &str) -> Result<f64> {
        Ok(sqlx::query(AssertSqlSafe(query.to_owned())).fetch_one(&self.db).await?.get(0))
    }

    /// Executes statements in the database.
    pub async fn execute(&self, statements: &str) -> Result<()> {
        sqlx::raw_sql(AssertSqlSafe(statements.to_owned())).execute(&self.db).await?;
        Ok(())
    }

    /// Calls the simulator's admin interface.
    pub async fn control(&self, http: &reqwest::Client, path: &str, body: &Value) -> Result<()> {
        let answer = http
            .post(format!("{}/admin/{path}", self.graph))
            .header("content-type", "application/json")
            .body(body.to_string())
            .send()
            .await?;
        if answer.status() != 200 {
            return Err(format!("the simulator rejected {path}: {}", answer.text().await?).into());
        }
        Ok(())
    }
}

async fn start_simulator(rig: &Rig, name: &str, extra: &[String]) -> Result<(Process, String, PathBuf)> {
    let (ca_file, log) = (rig.folder.join(format!("{name}-ca.pem")), rig.log(&format!("{name}-graph-sim")));
    for old in [&ca_file, &log] {
        let _ = std::fs::remove_file(old);
    }
    let mut arguments = vec!["--listen", "127.0.0.1:0", "--ca-out", text(&ca_file)?];
    arguments.extend(extra.iter().map(String::as_str));
    let process = Process::start(&rig.simulator, &arguments, [], &log)?;
    let begun = Instant::now();
    loop {
        let said = std::fs::read_to_string(&log).unwrap_or_default();
        if let Some(url) = said.lines().find_map(|line| line.strip_prefix("graph-sim listens on ")) {
            return Ok((process, url.to_owned(), ca_file));
        }
        if begun.elapsed() > Duration::from_secs(20) {
            return Err(format!("the simulator did not start within 20 s: {said}").into());
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn make_database(server: &str, name: &str) -> Result<String> {
    let mut admin = sqlx::PgConnection::connect(server).await?;
    sqlx::raw_sql(AssertSqlSafe(format!("drop database if exists {name} with (force)"))).execute(&mut admin).await?;
    sqlx::raw_sql(AssertSqlSafe(format!("create database {name}"))).execute(&mut admin).await?;
    let (base, _) = server.rsplit_once('/').ok_or("the URL names no database")?;
    Ok(format!("{base}/{name}"))
}
