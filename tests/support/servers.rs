//! Private servers, run by `deploy/instance`: shared ones that every test uses, and ones of a single test that breaks them.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// A server in a folder of its own.
#[derive(Debug, Clone)]
pub struct Server {
    kind: &'static str,
    folder: PathBuf,
    /// Its address, with user and password.
    pub url: String,
}

impl Server {
    /// Starts `kind` (`postgres` or `rabbitmq`) in `target/test/<name>`, unless it runs already.
    pub fn start(kind: &'static str, name: &str) -> Self {
        let folder = target().join("test").join(name);
        let url = instance(&[kind, "start", path(&folder)]);
        Self { kind, folder, url }
    }

    /// One of `stop`, `kill`, `pause`, `resume`, `remove`.
    pub fn command(&self, verb: &str) {
        instance(&[self.kind, verb, path(&self.folder)]);
    }

    /// Starts it again on the port that it had.
    pub fn start_again(&self) {
        instance(&[self.kind, "start", path(&self.folder)]);
    }

    /// Has a RabbitMQ node evaluate Erlang.
    pub fn eval(&self, erlang: &str) -> String {
        instance(&[self.kind, "eval", path(&self.folder), erlang])
    }

    /// Has `rabbitmqctl` do something.
    pub fn ctl(&self, arguments: &[&str]) -> String {
        let mut all = vec![self.kind, "ctl", path(&self.folder)];
        all.extend(arguments);
        instance(&all)
    }
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

/// Runs `deploy/instance` and gives what it prints.
fn instance(arguments: &[&str]) -> String {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/instance");
    let output =
        Command::new(script).args(arguments).env("INVENTORYD_TEST_FAST", "1").output().expect("deploy/instance runs");
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "deploy/instance {arguments:?}: {stdout}{stderr}");
    stdout.trim().to_owned()
}

fn target() -> PathBuf {
    Path::new(env!("CARGO_BIN_EXE_inventoryd")).ancestors().nth(2).expect("binaries lie in target/<profile>").to_owned()
}

fn path(folder: &Path) -> &str {
    folder.to_str().expect("the checkout has a path in UTF-8")
}
