//! Databases on a Citus cluster instead of the shared PostgreSQL, where `INVENTORYD_CITUS_URL` names a coordinator.

use std::process::Command;

use sqlx::{AssertSqlSafe, Connection as _, PgConnection};
use tokio::task::spawn_blocking;

/// URL of a database of the coordinator whose cluster has workers; none to run on plain PostgreSQL.
pub fn coordinator() -> Option<String> {
    std::env::var("INVENTORYD_CITUS_URL").ok().filter(|url| !url.is_empty())
}

/// Database on every node of a cluster, dropped with this value.
pub struct Cluster {
    /// URL of the coordinator's.
    pub url: String,
    name: String,
    /// URLs of the maintenance databases of all nodes.
    nodes: Vec<String>,
}

impl Cluster {
    /// Creates the database and joins its nodes, as an operator would.
    pub async fn create(coordinator: &str, name: &str) -> Self {
        let (server, maintenance) = coordinator.rsplit_once('/').expect("the URL names a database");
        let (user, host) = server.rsplit_once('@').expect("the URL has a user");
        let (host, port) = host.rsplit_once(':').expect("the URL has a port");
        let mut admin = PgConnection::connect(coordinator).await.expect("the coordinator answers");
        let workers = "select nodename, nodeport from pg_dist_node where groupid <> 0 and noderole = 'primary'";
        let workers: Vec<(String, i32)> =
            sqlx::query_as(workers).fetch_all(&mut admin).await.expect("Citus is installed");
        assert!(!workers.is_empty(), "the coordinator has workers");
        // One test at a time: a new node takes over the roles, which all databases share, and two nodes cannot at once.
        sqlx::raw_sql("select pg_advisory_lock(1)").execute(&mut admin).await.expect("the lock is free at last");
        let mut nodes = vec![coordinator.to_owned()];
        let mut join = format!("select citus_set_coordinator_host('{host}', {port})");
        for (host, port) in &workers {
            nodes.push(format!("{user}@{host}:{port}/{maintenance}"));
            join += &format!(";select citus_add_node('{host}', {port})");
        }
        let url = format!("{server}/{name}");
        let cluster = Self { url, name: name.to_owned(), nodes };
        for node in &cluster.nodes {
            execute(node, &format!("set client_min_messages = error; create database {name}")).await;
            let (node, _) = node.rsplit_once('/').expect("the URL names a database");
            execute(&format!("{node}/{name}"), "create extension citus").await;
        }
        // Few shards, because each is a set of tables. Citus calls triggers unsafe that tests put on tables.
        join += &format!(";alter database {name} set citus.shard_count = 4");
        join += &format!(";alter database {name} set citus.enable_unsafe_triggers = on");
        execute(&cluster.url, &join).await;
        cluster
    }
}

impl Drop for Cluster {
    /// Each database has a background worker on each node, of which a server has few.
    fn drop(&mut self) {
        let drop = format!("drop database {} with (force)", self.name);
        for node in &self.nodes {
            let _ = Command::new("psql").args(["-qX", node, "-c", &drop]).output();
        }
    }
}

/// Runs statements one by one: `create database` must be in no transaction.
async fn execute(url: &str, statements: &str) {
    let mut connection = PgConnection::connect(url).await.expect("the node answers");
    for statement in statements.split(';') {
        sqlx::raw_sql(AssertSqlSafe(statement.to_owned())).execute(&mut connection).await.expect("the node is set up");
    }
}

/// Distributes a migrated schema by tenant, with its items partitioned where `INVENTORYD_CITUS_PARTITIONS` says in how many.
pub async fn distribute(url: &str) {
    let partitions = std::env::var("INVENTORYD_CITUS_PARTITIONS").unwrap_or_default();
    if !partitions.is_empty() {
        recipe(url, "deploy/sql/partition_items.sql", &["-v", &format!("partitions={partitions}")]).await;
    }
    recipe(url, "deploy/sql/citus.sql", &[]).await;
}

async fn recipe(url: &str, file: &'static str, options: &[&str]) {
    let mut psql = Command::new("psql");
    psql.args(["-qXAt", url, "-f", file]).args(options);
    let output = spawn_blocking(move || psql.output()).await.expect("the task completes").expect("psql is installed");
    assert!(output.status.success(), "{file}: {}", String::from_utf8_lossy(&output.stderr));
}
