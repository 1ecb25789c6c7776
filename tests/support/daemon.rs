//! Daemons to test: in this process, or as processes that can be killed.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use inventoryd::config::Config;
use inventoryd::daemon::Daemon;

use super::world::World;
use super::{PATIENCE, binary, within};

/// A replica in this process.
pub struct Replica(Option<Daemon>);

impl Replica {
    /// A replica with the world's own configuration.
    pub async fn start(world: &World) -> Self {
        Self::with(world.config()).await
    }

    /// A replica with a configuration that the test has changed.
    pub async fn with(config: Config) -> Self {
        Self(Some(Daemon::start(config, None).await.expect("the daemon starts")))
    }

    /// Stops in order.
    pub async fn stop(mut self) {
        let daemon = self.0.take().expect("it was not stopped before");
        daemon.drain();
        daemon.stopped().await;
    }

    /// The daemon itself.
    pub fn daemon(&self) -> &Daemon {
        self.0.as_ref().expect("it was not stopped before")
    }
}

/// A replica as a process of its own; killed when dropped.
pub struct Process {
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts the real binary in a world, with some variables of its own.
    pub fn start(world: &World, name: &str, extra: &[(&str, &str)]) -> Self {
        Self::start_under(world, name, extra, &[])
    }

    /// The same, with variables that are not the daemon's own.
    pub fn start_under(world: &World, name: &str, extra: &[(&str, &str)], foreign: &[(&str, &str)]) -> Self {
        let mut variables: BTreeMap<String, String> = world.variables();
        variables.insert("INVENTORYD__TELEMETRY__LOG".to_owned(), "info".to_owned());
        variables.extend(extra.iter().map(|(key, value)| (format!("INVENTORYD__{key}"), (*value).to_owned())));
        variables.extend(foreign.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())));
        let log = std::env::temp_dir().join(format!("{}{name}.log", world.prefix));
        let stderr = std::fs::File::create(&log).expect("a log can be written");
        let child = Command::new(binary())
            .arg("serve")
            .env_clear()
            .envs(variables)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(stderr)
            .spawn()
            .expect("the daemon starts");
        Self { child, log }
    }

    /// Sends a signal by its name: KILL, TERM, STOP, CONT, USR1.
    pub fn signal(&self, name: &str) {
        let sent = Command::new("kill").args([&format!("-{name}"), &self.child.id().to_string()]).status();
        assert!(sent.expect("kill runs").success(), "the process is there to get SIG{name}");
    }

    /// Waits for its end.
    pub async fn ended(&mut self, patience: Duration) -> ExitStatus {
        let Self { child, log } = self;
        let log = log.clone();
        let child = std::sync::Mutex::new(child);
        within(patience, &format!("the process ends (log: {})", log.display()), || async {
            child.lock().expect("nobody fails with it").try_wait().expect("it is our child")
        })
        .await
    }

    /// Waits until it has logged `text`; fails with everything that it has logged instead.
    pub async fn logs(&self, text: &str) {
        let begun = std::time::Instant::now();
        while !self.log().contains(text) {
            assert!(begun.elapsed() < PATIENCE, "{text:?} is not in the log:\n{}", self.log());
            tokio::time::sleep(Duration::from_millis(25)).await;
        }
    }

    /// Everything that it has logged.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_file(&self.log);
    }
}
