//! PgBouncer between the daemon and the database.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use tokio::net::TcpStream;
use tokio::task::spawn_blocking;

use super::world::World;
use super::{eventually, servers};

const PROGRAM: &str = "/usr/sbin/pgbouncer";
/// From here on it knows prepared statements in transaction mode.
const KNOWS_STATEMENTS: (u32, u32) = (1, 21);

/// A PgBouncer of one test; gone when it is dropped.
pub struct Pooler {
    child: Child,
    folder: PathBuf,
    /// The address of the world's database by way of it.
    pub url: String,
}

/// How long a client keeps a connection of the server's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// As long as its own.
    Session,
    /// For one transaction.
    Transaction,
}

impl Mode {
    /// Connections of the server's: for transactions fewer than the daemons' own, so that they pass from hand to hand.
    pub fn pool_size(self) -> i64 {
        match self {
            Self::Session => 20,
            Self::Transaction => 3,
        }
    }
}

impl Pooler {
    /// The modes that the PgBouncer of this machine can serve the daemon in; it is installed if it is missing. None, with a
    /// line that says so, where it can't be had.
    pub async fn modes() -> &'static [Mode] {
        let version = spawn_blocking(|| {
            servers::install("pgbouncer");
            let output = Command::new(PROGRAM).arg("--version").output().ok()?;
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            let mut numbers = text.split_whitespace().nth(1)?.split('.').map(|part| part.parse().unwrap_or(0));
            Some((numbers.next()?, numbers.next()?))
        });
        match version.await.expect("it is done") {
            None => {
                println!("skipped: PgBouncer can't be installed here");
                &[]
            }
            Some(version) if version < KNOWS_STATEMENTS => {
                println!("skipped: transaction mode needs PgBouncer 1.21, this is {version:?}; session mode is tried");
                &[Mode::Session]
            }
            Some(_) => &[Mode::Session, Mode::Transaction],
        }
    }

    /// Starts one before the world's database.
    pub async fn before(world: &World, mode: Mode) -> Self {
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
        std::fs::create_dir_all(&folder).expect("a folder can be made");
        std::fs::write(folder.join("pgbouncer.ini"), ini).expect("a file can be written");
        let child = spawn(&folder);
        eventually("PgBouncer listens", || async { TcpStream::connect(("127.0.0.1", port)).await.ok() }).await;
        Self { child, folder, url }
    }
}

/// It does not run as root, as the database does not.
fn spawn(folder: &Path) -> Child {
    let root = Command::new("id").arg("-u").output().is_ok_and(|id| id.stdout.starts_with(b"0\n"));
    let mut command = Command::new(if root { "setpriv" } else { PROGRAM });
    if root {
        command.args(["--reuid=postgres", "--regid=postgres", "--clear-groups", PROGRAM]);
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
