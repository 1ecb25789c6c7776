//! Runs the programs that config/README.md shows: its code blocks as files, with the client libraries they need.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use tokio::task::spawn_blocking;

use super::target;

const PAGE: &str = include_str!("../../config/README.md");
const PIKA: &str = "pika==1.4.4";
const AMQPLIB: &str = "amqplib@2.3.1";

/// Language of a program in config/README.md.
#[derive(Debug, Clone, Copy)]
pub enum Language {
    /// Python with pika.
    Python,
    /// Node.js with amqplib.
    Node,
}

impl Language {
    /// Builds a command that runs a program of config/README.md; returns `None` and prints why where the interpreter or the
    /// library can't be installed.
    pub async fn program(self, file: &'static str) -> Option<Command> {
        spawn_blocking(move || {
            let folder = self.folder()?;
            let script = folder.join(file);
            std::fs::write(&script, block(file)).expect("target can be written");
            let mut command = Command::new(self.interpreter());
            command.arg(script).env("PYTHONPATH", folder).current_dir(folder).stdin(Stdio::null());
            Some(command)
        })
        .await
        .expect("the task completes")
    }

    /// Folder with the language's client library, installed once and kept in `target`.
    fn folder(self) -> Option<&'static Path> {
        static PYTHON: OnceLock<Option<PathBuf>> = OnceLock::new();
        static NODE: OnceLock<Option<PathBuf>> = OnceLock::new();
        let (once, name, library) = match self {
            Self::Python => (&PYTHON, "python", PIKA),
            Self::Node => (&NODE, "node", AMQPLIB),
        };
        once.get_or_init(|| {
            let folder = target().join("clients").join(name);
            let stamp = folder.join("installed");
            if std::fs::read_to_string(&stamp).is_ok_and(|installed| installed == library) {
                return Some(folder);
            }
            std::fs::create_dir_all(&folder).expect("target can be written");
            let mut install = self.installer(&folder, library);
            match install.stdin(Stdio::null()).output() {
                Ok(output) if output.status.success() => {
                    std::fs::write(&stamp, library).expect("target can be written");
                    Some(folder)
                }
                failed => {
                    println!("skipped: {library} can't be installed (no {name}, or no network): {failed:?}");
                    None
                }
            }
        })
        .as_deref()
    }

    fn installer(self, folder: &Path, library: &str) -> Command {
        let mut command = Command::new(match self {
            Self::Python => "python3",
            Self::Node => "npm",
        });
        match self {
            Self::Python => command
                .args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--upgrade", "--target"])
                .args([folder.as_os_str(), library.as_ref()]),
            Self::Node => command
                .args(["install", "--silent", "--no-audit", "--no-fund", "--prefix"])
                .args([folder.as_os_str(), library.as_ref()]),
        };
        command
    }

    fn interpreter(self) -> &'static str {
        match self {
            Self::Python => "python3",
            Self::Node => "node",
        }
    }
}

/// Finds the code block of config/README.md whose first line names the file.
fn block(file: &str) -> &'static str {
    let blocks = PAGE.split("```").skip(1).step_by(2);
    let code = blocks.filter_map(|block| block.split_once('\n').map(|(_, code)| code));
    let named = |code: &&str| code.lines().next().is_some_and(|line| line.split_whitespace().nth(1) == Some(file));
    code.into_iter().find(named).unwrap_or_else(|| panic!("config/README.md has no code block of {file}"))
}

/// Finds the only line of config/README.md that starts with `beginning`.
pub fn shell_line(beginning: &str) -> &'static str {
    let mut lines = PAGE.lines().filter(|line| line.starts_with(beginning));
    let line = lines.next().unwrap_or_else(|| panic!("config/README.md has no line {beginning}"));
    assert_eq!(lines.next(), None, "config/README.md has two lines {beginning}");
    line
}
