//! Daemons under test: in this process, or as processes that can be killed.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use inventoryd::config::Config;
use inventoryd::daemon::Daemon;

use super::world::World;
use super::{DEADLINE, binary, within};

/// Replica that runs inside the test process.
pub struct Replica(Option<Daemon>);

impl Replica {
    /// Starts a replica with the environment's configuration.
    pub async fn start(world: &World) -> Self {
        Self::with(world.config()).await
    }

    /// Starts a replica with a configuration of the test's.
    pub async fn with(config: Config) -> Self {
        Self(Some(Daemon::start(config, None).await.expect("the daemon starts")))
    }

    /// Drains and stops the replica.
    pub async fn stop(mut self) {
        let daemon = self.0.take().expect("the replica was not stopped before");
        daemon.drain();
        daemon.stopped().await;
    }

    /// Returns the daemon.
    pub fn daemon(&self) -> &Daemon {
        self.0.as_ref().expect("the replica was not stopped before")
    }
}

/// Replica that runs as a process of its own; killed on drop.
pub struct Process {
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts the real binary with extra `INVENTORYD__*` variables.
    pub fn start(world: &World, name: &str, extra: &[(&str, &str)]) -> Self {
        Self::start_under(world, name, extra, &[])
    }

    /// Starts the real binary with extra variables, and with `foreign` ones that are not the daemon's.
    pub fn start_under(world: &World, name: &str, extra: &[(&str, &str)], foreign: &[(&str, &str)]) -> Self {
        let mut variables: BTreeMap<String, String> = world.variables();
        variables.insert("INVENTORYD__TELEMETRY__LOG".to_owned(), "info".to_owned());
        variables.extend(extra.iter().map(|(key, value)| (format!("INVENTORYD__{key}"), (*value).to_owned())));
        variables.extend(foreign.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())));
        Self::spawn(world, name, Command::new(binary()).arg("serve"), variables)
    }

    /// Starts the real binary with extra variables, and with at most `files` open file descriptors.
    pub fn start_with_files(world: &World, name: &str, extra: &[(&str, &str)], files: u32) -> Self {
        let mut variables: BTreeMap<String, String> = world.variables();
        variables.extend(extra.iter().map(|(key, value)| (format!("INVENTORYD__{key}"), (*value).to_owned())));
        let limited = format!("ulimit -n {files} && exec \"$0\" serve");
        Self::spawn(world, name, Command::new("/bin/sh").arg("-c").arg(limited).arg(binary()), variables)
    }

    fn spawn(world: &World, name: &str, command: &mut Command, variables: BTreeMap<String, String>) -> Self {
        let log = std::env::temp_dir().join(format!("{}{name}.log", world.prefix));
        let stderr = std::fs::File::create(&log).expect("a log can be written");
        let child = command
            .env_clear()
            .envs(variables)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(stderr)
            .spawn()
            .expect("the daemon starts");
        Self { child, log }
    }

    /// Sends a signal by name: KILL, TERM, STOP, CONT, USR1.
    pub fn signal(&self, name: &str) {
        let sent = Command::new("kill").args([&format!("-{name}"), &self.child.id().to_string()]).status();
        assert!(sent.expect("kill runs").success(), "the process is alive to receive SIG{name}");
    }

    /// Peak of the resident memory so far, in MiB.
    pub fn peak_mib(&self) -> u64 {
        peak_mib(self.child.id()).expect("the process is alive")
    }

    /// Process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Waits until the process exits.
    pub async fn ended(&mut self, deadline: Duration) -> ExitStatus {
        let Self { child, log } = self;
        let log = log.clone();
        let child = parking_lot::Mutex::new(child);
        within(deadline, &format!("the process exits (log: {})", log.display()), || async {
            child.lock().try_wait().expect("the process is a child of this one")
        })
        .await
    }

    /// Waits until the log contains `text`, or fails with the whole log.
    pub async fn wait_for_log(&self, text: &str) {
        let begun = std::time::Instant::now();
        while !self.log().contains(text) {
            assert!(begun.elapsed() < DEADLINE, "{text:?} is not in the log:\n{}", self.log());
            tokio::time::sleep(Duration::from_millis(25)).await;
        }
    }

    /// Returns the whole log.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }
}

/// Peak of the resident memory of a process, in MiB; `None` once it has ended.
pub fn peak_mib(process: u32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    let kib = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    kib.split_whitespace().next()?.parse::<u64>().ok().map(|kib| kib / 1024)
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_file(&self.log);
    }
}
