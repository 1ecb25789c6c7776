//! The private servers that everything is measured on, and where things lie.

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What a measurement comes to.
pub type Outcome<T> = Result<T, Box<dyn Error + Send + Sync>>;

/// How big the numbers are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scale {
    /// A few minutes.
    Quick,
    /// The sizes of the targets, but for tables of many millions.
    Usual,
    /// Those too.
    Full,
}

impl Scale {
    /// The number that belongs to this scale.
    pub fn pick<T>(self, quick: T, usual: T, full: T) -> T {
        match self {
            Self::Quick => quick,
            Self::Usual => usual,
            Self::Full => full,
        }
    }

    /// As it stands in the report.
    pub fn as_str(self) -> &'static str {
        self.pick("quick", "usual", "full")
    }
}

/// The servers, durable as in production, and the built programs.
pub struct Rig {
    /// `target/bench`
    pub folder: PathBuf,
    /// The daemon.
    pub daemon: PathBuf,
    /// The Graph simulator.
    pub simulator: PathBuf,
    /// Address of the database server.
    pub postgres: String,
    /// Address of the broker.
    pub rabbitmq: String,
    /// How big the numbers are.
    pub scale: Scale,
    /// Rounds of every line.
    pub rounds: usize,
}

impl Rig {
    /// Starts the servers with empty folders.
    pub fn start(scale: Scale, rounds: usize) -> Outcome<Self> {
        let examples = std::env::current_exe()?.parent().ok_or("a program lies in a folder")?.to_owned();
        let release = examples.parent().ok_or("examples lie below target/<profile>")?;
        let folder = release.parent().ok_or("profiles lie below target")?.join("bench");
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

    /// A file for what a process says.
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

/// A path as text.
pub fn text(path: &Path) -> Outcome<&str> {
    path.to_str().ok_or_else(|| "the checkout has a path in UTF-8".into())
}

/// Runs `deploy/instance` and gives what it prints.
fn instance(arguments: &[&str]) -> Outcome<String> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/instance");
    let output = Command::new(script).args(arguments).output()?;
    if !output.status.success() {
        return Err(format!("deploy/instance {arguments:?}: {}", String::from_utf8_lossy(&output.stderr)).into());
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}
