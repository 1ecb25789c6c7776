//! Private servers, run by `deploy/instance`: shared ones that every test uses, and ones of a single test that breaks them.

use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use tokio::task::spawn_blocking;
use uuid::Uuid;

use super::certificates::Authority;
use super::target;

/// A server in a folder of its own.
#[derive(Debug, Clone)]
pub struct Server {
    kind: &'static str,
    folder: PathBuf,
    /// Whether it may lose what it has promised when it is killed.
    fast: bool,
    /// Its address, with user and password.
    pub url: String,
}

impl Server {
    /// Starts `kind` (`postgres` or `rabbitmq`) in `target/test/<name>`, unless it runs already.
    pub fn start(kind: &'static str, name: &str) -> Self {
        Self::begin(kind, name, true, &[])
    }

    fn begin(kind: &'static str, name: &str, fast: bool, more: &[&str]) -> Self {
        let folder = target().join("test").join(name);
        let url = instance(&[&[kind, "start", path(&folder)], more].concat(), fast);
        Self { kind, folder, fast, url }
    }

    /// One of `stop`, `kill`, `pause`, `resume`, `remove`.
    pub fn command(&self, verb: &str) {
        self.instance(verb, &[]);
    }

    /// Starts it again on the port that it had.
    pub fn start_again(&self) {
        self.instance("start", &[]);
    }

    /// The address at which a RabbitMQ that was started with TLS speaks it.
    pub fn tls_url(&self) -> String {
        let port = |file: &str| std::fs::read_to_string(self.folder.join(file)).expect("it was started with TLS");
        let (plain, tls) = (port("port"), port("tls_port"));
        self.url.replace("amqp://", "amqps://").replace(plain.trim(), tls.trim())
    }

    /// Has a RabbitMQ node evaluate Erlang.
    pub fn eval(&self, erlang: &str) -> String {
        self.instance("eval", &[erlang])
    }

    /// Has `psql` do something in a database.
    pub fn psql(&self, database: &str, arguments: &[&str]) -> String {
        self.instance("psql", &[&["-d", database], arguments].concat())
    }

    /// Has `rabbitmqctl` do something.
    pub fn ctl(&self, arguments: &[&str]) -> String {
        self.instance("ctl", arguments)
    }

    fn instance(&self, verb: &str, more: &[&str]) -> String {
        instance(&[&[self.kind, verb, path(&self.folder)], more].concat(), self.fast)
    }
}

/// A server of one test, to break. It keeps what it has promised, and is gone when the test is over.
pub struct Private(Server);

impl Private {
    /// Starts `kind` under a name that no other test has.
    pub async fn start(kind: &'static str, name: &'static str) -> Self {
        Self(spawn_blocking(move || Server::begin(kind, name, false, &[])).await.expect("it starts"))
    }

    /// Starts `kind` with TLS, and the authority's certificates in `ca.pem`, `server.pem` and `server.key`.
    pub async fn start_with_tls(kind: &'static str, name: &'static str, authority: &Authority) -> Self {
        let folder = path(authority.folder()).to_owned();
        let begin = move || Server::begin(kind, name, false, &["--tls", &folder]);
        Self(spawn_blocking(begin).await.expect("it starts"))
    }

    /// Starts a RabbitMQ node as a member of the cluster that `other` is in.
    pub async fn join(name: &'static str, other: &Server) -> Self {
        let folder = path(&other.folder).to_owned();
        let begin = move || Server::begin("rabbitmq", name, false, &["--join", &folder]);
        Self(spawn_blocking(begin).await.expect("it joins"))
    }

    /// Does something that takes its time, without holding up the test's runtime.
    pub async fn act<T: Send + 'static>(&self, act: impl FnOnce(Server) -> T + Send + 'static) -> T {
        let server = self.0.clone();
        spawn_blocking(move || act(server)).await.expect("it is done")
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

/// The library that gives a process another clock; installed if it is missing, and none where that can't be done.
pub fn faketime() -> Option<PathBuf> {
    install("faketime");
    let folders = std::fs::read_dir("/usr/lib").ok()?.flatten();
    folders.map(|folder| folder.path().join("faketime/libfaketimeMT.so.1")).find(|library| library.exists())
}

/// Installs what `deploy/instance` knows by this name, if it is missing and can be had.
pub fn install(name: &str) {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/instance");
    let _ = Command::new(script).args(["packages", name]).status();
}

/// A port that nothing listens on and nobody else is given.
pub fn free_port() -> u16 {
    instance(&["free-port"], true).parse().expect("it is a number")
}

/// The PostgreSQL that all tests share, each with a database of its own.
pub fn postgres() -> &'static Server {
    static SHARED: OnceLock<Server> = OnceLock::new();
    SHARED.get_or_init(|| Server::start("postgres", "postgres"))
}

/// The RabbitMQ that all tests share, each with a prefix of its own.
pub fn rabbitmq() -> &'static Server {
    static SHARED: OnceLock<Server> = OnceLock::new();
    SHARED.get_or_init(|| Server::start("rabbitmq", "rabbitmq"))
}

/// The shared RabbitMQ's address with a virtual host that nothing else is in.
pub async fn virtual_host() -> String {
    let make = || {
        let (server, name) = (rabbitmq(), format!("v{}", Uuid::new_v4().simple()));
        server.ctl(&["-q", "add_vhost", &name]);
        server.ctl(&["-q", "set_permissions", "-p", &name, "guest", ".*", ".*", ".*"]);
        server.url.replace("%2f", &name)
    };
    spawn_blocking(make).await.expect("it is made")
}

/// Runs `deploy/instance` and gives what it prints.
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
