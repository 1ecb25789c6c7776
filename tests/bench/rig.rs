//! Test rig: private servers, and the paths of programs and files.

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Result of a measurement.
pub type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// Size of the workloads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scale {
    /// Small sizes for a few minutes.
    Quick,
    /// Sizes of the targets, except tables of many millions.
    Usual,
    /// Sizes of the targets, tables of many millions included.
    Full,
}

impl Scale {
    /// Returns the value for this scale.
    pub fn pick<T>(self, quick: T, usual: T, full: T) -> T {
        match self {
            Self::Quick => quick,
            Self::Usual => usual,
            Self::Full => full,
        }
    }

    /// Name in the report.
    pub fn as_str(self) -> &'static str {
        self.pick("quick", "usual", "full")
    }
}

/// Servers, durable as in production, and the built programs.
pub struct Rig {
    /// Folder `target/bench`.
    pub folder: PathBuf,
    /// Path of the daemon.
    pub daemon: PathBuf,
    /// Path of the Graph simulator.
    pub simulator: PathBuf,
    /// URL of the database server.
    pub postgres: String,
    /// URL of the broker.
    pub rabbitmq: String,
    /// Size of the workloads.
    pub scale: Scale,
    /// Rounds per line.
    pub rounds: usize,
}

impl Rig {
    /// Starts the servers with empty data folders.
    pub fn start(scale: Scale, rounds: usize) -> Result<Self> {
        let examples = std::env::current_exe()?.parent().ok_or("the executable has no folder")?.to_owned();
        let release = examples.parent().ok_or("the executable is not in target/<profile>/examples")?;
        let folder = release.parent().ok_or("the executable is not in target/<profile>/examples")?.join("bench");
        fs::create_dir_all(folder.join("log"))?;
        instance(&["remove-all", text(&folder)?])?;
        let start = |kind| instance(&[kind, "start", text(&folder.join(kind))?]);
        eprintln!("private servers in {}", folder.display());
        Ok(Self {
            postgres: start("postgres")?,
            rabbitmq: start("rabbitmq")?,
            daemon: release.join("inventoryd"),
            simulator: examples.join("graph-sim"),
            folder,
            scale,
            rounds,
        })
    }

    /// Runs `psql` in a database.
    pub fn psql(&self, database: &str, arguments: &[&str]) -> Result<()> {
        let folder = self.folder.join("postgres");
        instance(&[&["postgres", "psql", text(&folder)?, "-d", database], arguments].concat())?;
        Ok(())
    }

    /// Process id of the database server or the broker.
    pub fn server_process(&self, kind: &str) -> Result<u32> {
        let status = instance(&[kind, "status", text(&self.folder.join(kind))?])?;
        let id = status.split_whitespace().skip_while(|word| *word != "pid").nth(1).ok_or(status.as_str())?;
        Ok(id.parse()?)
    }

    /// Path of a process's log.
    pub fn log(&self, name: &str) -> PathBuf {
        self.folder.join("log").join(format!("{name}.log"))
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        if let Some(folder) = self.folder.to_str() {
            let _ = instance(&["remove-all", folder]);
        }
    }
}

/// Converts a path to text.
pub fn text(path: &Path) -> Result<&str> {
    path.to_str().ok_or_else(|| "the checkout's path is not UTF-8".into())
}

/// Runs `deploy/instance` and returns its output.
fn instance(arguments: &[&str]) -> Result<String> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/instance");
    let output = Command::new(script).args(arguments).output()?;
    if !output.status.success() {
        return Err(format!("deploy/instance {arguments:?}: {}", String::from_utf8_lossy(&output.stderr)).into());
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}
