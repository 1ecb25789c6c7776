//! PgBouncer between the daemon and the database.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use tokio::net::TcpStream;
use tokio::task::spawn_blocking;

use super::world::World;
use super::{eventually, servers};

/// Variable that names a PgBouncer other than Debian's.
const VARIABLE: &str = "INVENTORYD_PGBOUNCER";
/// First version with prepared statements in transaction mode.
const PREPARED_STATEMENTS_SINCE: (u32, u32) = (1, 21);

#[expect(clippy::disallowed_methods, reason = "a developer chooses the PgBouncer to test with")]
fn program() -> String {
    std::env::var(VARIABLE).unwrap_or_else(|_| "/usr/sbin/pgbouncer".to_owned())
}

/// PgBouncer of one test; stopped on drop.
pub struct Pooler {
    child: Child,
    folder: PathBuf,
    /// URL of the environment's database through the pooler.
    pub url: String,
}

/// Pool mode: the time for which a client keeps a server connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Until the client disconnects.
    Session,
    /// Until the transaction ends.
    Transaction,
}

impl Mode {
    /// Number of server connections; in transaction mode fewer than the daemons open, so that they are shared.
    pub fn pool_size(self) -> i64 {
        match self {
            Self::Session => 20,
            Self::Transaction => 3,
        }
    }
}

impl Pooler {
    /// Returns the pool modes in which the installed PgBouncer can serve the daemon; installs it if missing. Prints why
    /// where there is none.
    pub async fn modes() -> &'static [Mode] {
        let version = spawn_blocking(|| {
            servers::install("pgbouncer");
            let output = Command::new(program()).arg("--version").output().ok()?;
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            let mut numbers = text.split_whitespace().nth(1)?.split('.').map(|part| part.parse().unwrap_or(0));
            Some((numbers.next()?, numbers.next()?))
        });
        match version.await.expect("the task completes") {
            None => {
                println!("skipped: PgBouncer can't be installed here");
                &[]
            }
            Some(version) if version < PREPARED_STATEMENTS_SINCE => {
                println!(
                    "skipped: transaction mode needs PgBouncer 1.21, this is {version:?}; {VARIABLE} may name another"
                );
                &[Mode::Session]
            }
            Some(_) => &[Mode::Session, Mode::Transaction],
        }
    }

    /// Starts a pooler for the environment's database.
    pub async fn start(world: &World, mode: Mode) -> Self {
        let folder = std::env::temp_dir().join(format!("{}pgbouncer", world.prefix));
        let (server, port) = (world.database_address(), servers::free_port());
        let url = world.database_url.replace(&server.to_string(), &format!("127.0.0.1:{port}"));
        let mut ini = format!(
            "[databases]\n* = host={} port={} user=inventoryd\n[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\n\
             auth_type = any\nunix_socket_dir =\nignore_startup_parameters = options,extra_float_digits\n",
            server.ip(),
            server.port()
        );
        ini.push_str(&format!("default_pool_size = {}\n", mode.pool_size()));
        ini.push_str(match mode {
            Mode::Session => "pool_mode = session\n",
            Mode::Transaction => "pool_mode = transaction\nmax_prepared_statements = 200\n",
        });
        std::fs::create_dir_all(&folder).expect("a folder can be created");
        std::fs::write(folder.join("pgbouncer.ini"), ini).expect("a file can be written");
        let child = spawn(&folder);
        eventually("PgBouncer listens", || async { TcpStream::connect(("127.0.0.1", port)).await.ok() }).await;
        Self { child, folder, url }
    }
}

/// Starts PgBouncer, which refuses to run as root.
fn spawn(folder: &Path) -> Child {
    let root = Command::new("id").arg("-u").output().is_ok_and(|id| id.stdout.starts_with(b"0\n"));
    let mut command = Command::new(if root { "setpriv".to_owned() } else { program() });
    if root {
        command.args(["--reuid=postgres", "--regid=postgres", "--clear-groups", &program()]);
    }
    let log = std::fs::File::create(folder.join("log")).expect("a log can be written");
    command.arg(folder.join("pgbouncer.ini")).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
    command.spawn().expect("PgBouncer starts")
}

impl Drop for Pooler {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}
