//! Private servers managed by `deploy/instance`: shared ones for every test, and ones that a single test may break.

use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use tokio::task::spawn_blocking;
use uuid::Uuid;

use super::certificates::Authority;
use super::target;

/// Server with a data folder of its own.
#[derive(Debug, Clone)]
pub struct Server {
    kind: &'static str,
    folder: PathBuf,
    /// Trades durability for speed (no fsync); never set for a server that a test kills.
    fast: bool,
    /// URL with user and password.
    pub url: String,
}

impl Server {
    /// Starts `kind` (`postgres` or `rabbitmq`) in `target/test/<name>`, unless it is running.
    pub fn start(kind: &'static str, name: &str) -> Self {
        Self::begin(kind, name, true, &[])
    }

    fn begin(kind: &'static str, name: &str, fast: bool, more: &[&str]) -> Self {
        let folder = target().join("test").join(name);
        let url = instance(&[&[kind, "start", path(&folder)], more].concat(), fast);
        Self { kind, folder, fast, url }
    }

    /// Runs one of `stop`, `kill`, `pause`, `resume`, `remove`.
    pub fn command(&self, verb: &str) {
        self.instance(verb, &[]);
    }

    /// Starts the server again on its previous port.
    pub fn start_again(&self) {
        self.instance("start", &[]);
    }

    /// `amqps://` URL of a RabbitMQ that was started with TLS.
    pub fn tls_url(&self) -> String {
        let port =
            |file: &str| std::fs::read_to_string(self.folder.join(file)).expect("the server was started with TLS");
        let (plain, tls) = (port("port"), port("tls_port"));
        self.url.replace("amqp://", "amqps://").replace(plain.trim(), tls.trim())
    }

    /// Evaluates Erlang on a RabbitMQ node.
    pub fn eval(&self, erlang: &str) -> String {
        self.instance("eval", &[erlang])
    }

    /// Runs `psql` in a database.
    pub fn psql(&self, database: &str, arguments: &[&str]) -> String {
        self.instance("psql", &[&["-d", database], arguments].concat())
    }

    /// Runs a shell script with the clients of a PostgreSQL in its path and libpq's variables set for a database.
    pub fn shell(&self, database: &str, script: &str) -> String {
        self.instance("run", &[database, "bash", "-euc", script])
    }

    /// Runs `rabbitmqctl`.
    pub fn ctl(&self, arguments: &[&str]) -> String {
        self.instance("ctl", arguments)
    }

    fn instance(&self, verb: &str, more: &[&str]) -> String {
        instance(&[&[self.kind, verb, path(&self.folder)], more].concat(), self.fast)
    }
}

/// Durable server of a single test, which may break it; removed on drop.
pub struct Private(Server);

impl Private {
    /// Starts `kind` under a name that no other test uses.
    pub async fn start(kind: &'static str, name: &'static str) -> Self {
        Self(spawn_blocking(move || Server::begin(kind, name, false, &[])).await.expect("the server starts"))
    }

    /// Starts `kind` with TLS, using the authority's certificates in `ca.pem`, `server.pem` and `server.key`.
    pub async fn start_with_tls(kind: &'static str, name: &'static str, authority: &Authority) -> Self {
        let folder = path(authority.folder()).to_owned();
        let begin = move || Server::begin(kind, name, false, &["--tls", &folder]);
        Self(spawn_blocking(begin).await.expect("the server starts"))
    }

    /// Starts a RabbitMQ node that joins the cluster of `other`.
    pub async fn join(name: &'static str, other: &Server) -> Self {
        let folder = path(&other.folder).to_owned();
        let begin = move || Server::begin("rabbitmq", name, false, &["--join", &folder]);
        Self(spawn_blocking(begin).await.expect("the node joins"))
    }

    /// Runs a blocking operation outside the test's async runtime.
    pub async fn act<T: Send + 'static>(&self, act: impl FnOnce(Server) -> T + Send + 'static) -> T {
        let server = self.0.clone();
        spawn_blocking(move || act(server)).await.expect("the task completes")
    }
}

impl Deref for Private {
    type Target = Server;

    fn deref(&self) -> &Server {
        &self.0
    }
}

impl Drop for Private {
    fn drop(&mut self) {
        self.0.command("remove");
    }
}

/// Path of libfaketime, which shifts a process's clock; installed if missing, `None` where that fails.
pub fn faketime() -> Option<PathBuf> {
    install("faketime");
    let folders = std::fs::read_dir("/usr/lib").ok()?.flatten();
    folders.map(|folder| folder.path().join("faketime/libfaketimeMT.so.1")).find(|library| library.exists())
}

/// Installs a package set known to `deploy/instance`, unless it is present.
pub fn install(name: &str) {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/instance");
    let _ = Command::new(script).args(["packages", name]).status();
}

/// Reserves a port that nothing listens on.
pub fn free_port() -> u16 {
    instance(&["free-port"], true).parse().expect("the port is a number")
}

/// PostgreSQL shared by all tests, each with a database of its own.
pub fn postgres() -> &'static Server {
    static SHARED: OnceLock<Server> = OnceLock::new();
    SHARED.get_or_init(|| Server::start("postgres", "postgres"))
}

/// RabbitMQ shared by all tests, each with a prefix of its own.
pub fn rabbitmq() -> &'static Server {
    static SHARED: OnceLock<Server> = OnceLock::new();
    SHARED.get_or_init(|| Server::start("rabbitmq", "rabbitmq"))
}

/// URL of the shared RabbitMQ with a new, empty virtual host.
pub async fn virtual_host() -> String {
    let make = || {
        let (server, name) = (rabbitmq(), format!("v{}", Uuid::new_v4().simple()));
        server.ctl(&["-q", "add_vhost", &name]);
        server.ctl(&["-q", "set_permissions", "-p", &name, "guest", ".*", ".*", ".*"]);
        server.url.replace("%2f", &name)
    };
    spawn_blocking(make).await.expect("the virtual host is created")
}

/// Runs `deploy/instance` and returns its output.
fn instance(arguments: &[&str], fast: bool) -> String {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/instance");
    let fast = if fast { "1" } else { "0" };
    let output =
        Command::new(script).args(arguments).env("INVENTORYD_TEST_FAST", fast).output().expect("deploy/instance runs");
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "deploy/instance {arguments:?}: {stdout}{stderr}");
    stdout.trim().to_owned()
}

fn path(folder: &Path) -> &str {
    folder.to_str().expect("the checkout has a path in UTF-8")
}
