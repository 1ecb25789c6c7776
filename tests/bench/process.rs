//! Child process in a group of its own, with its processor time and peak memory.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::rig::Result;

/// Unit of processor time in `/proc` on Linux, independent of the kernel's own tick.
const TICKS_PER_S: f64 = 100.0;

/// Running program; its process group is killed on drop.
pub struct Process(Child);

impl Process {
    /// Starts a program with only these variables and `PATH`; its output goes to `log`.
    pub fn start<'a>(
        program: impl AsRef<OsStr>,
        arguments: &[&str],
        variables: impl IntoIterator<Item = (&'a str, &'a str)>,
        log: &Path,
    ) -> Result<Self> {
        let log = File::options().create(true).append(true).open(log)?;
        let child = Command::new(program)
            .args(arguments)
            .env_clear()
            .env("PATH", "/usr/local/bin:/usr/bin:/bin")
            .envs(variables)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .process_group(0)
            .spawn()?;
        Ok(Self(child))
    }

    /// Process id.
    pub fn id(&self) -> u32 {
        self.0.id()
    }

    /// Seconds of processor time used by the process group.
    pub fn cpu_s(&self) -> f64 {
        let group = self.id().to_string();
        let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
        let stats = processes.filter_map(|entry| Stat::read(&entry.path()));
        stats.filter(|stat| stat.group == group).map(|stat| stat.cpu_s).sum()
    }

    /// Peak resident memory in MiB.
    pub fn peak_mib(&self) -> Result<f64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.id()))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).ok_or("/proc has no VmHWM")?;
        Ok(line.trim().trim_end_matches(" kB").parse::<f64>()? / 1024.0)
    }

    /// Terminates the process gracefully and waits for it.
    pub async fn stop(mut self) -> Result<()> {
        signal("TERM", self.id());
        let begun = Instant::now();
        while self.0.try_wait()?.is_none() {
            if begun.elapsed() > Duration::from_secs(40) {
                return Err("the process did not exit within 40 s".into());
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        signal("KILL", self.id());
        let _ = self.0.wait();
    }
}

/// Seconds of processor time used by a process, 0 if there is none.
pub fn cpu_s_of(process: u32) -> f64 {
    Stat::read(&Path::new("/proc").join(process.to_string())).map_or(0.0, |stat| stat.cpu_s)
}

/// Seconds of processor time used by a server process and its children, those that have ended included.
pub fn cpu_s_of_server(process: u32) -> f64 {
    let id = process.to_string();
    let server = Stat::read(&Path::new("/proc").join(&id)).map_or(0.0, |stat| stat.cpu_s + stat.ended_children_cpu_s);
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let children = processes.filter_map(|entry| Stat::read(&entry.path())).filter(|stat| stat.parent == id);
    server + children.map(|stat| stat.cpu_s).sum::<f64>()
}

/// Part of `/proc/<id>/stat`.
struct Stat {
    parent: String,
    group: String,
    cpu_s: f64,
    ended_children_cpu_s: f64,
}

impl Stat {
    fn read(process: &Path) -> Option<Self> {
        let stat = fs::read_to_string(process.join("stat")).ok()?;
        // Fields after the bracketed name: state, parent, group, ...; user and system time are the 12th and 13th, those of
        // ended children follow.
        let (_, rest) = stat.rsplit_once(") ")?;
        let fields: Vec<&str> = rest.split(' ').collect();
        let seconds = |two: [usize; 2]| {
            let ticks = two.iter().filter_map(|&field| fields.get(field)?.parse::<f64>().ok());
            ticks.sum::<f64>() / TICKS_PER_S
        };
        Some(Self {
            parent: (*fields.get(1)?).to_owned(),
            group: (*fields.get(2)?).to_owned(),
            cpu_s: seconds([11, 12]),
            ended_children_cpu_s: seconds([13, 14]),
        })
    }
}

/// Sends a signal to a process group.
fn signal(name: &str, group: u32) {
    let _ = Command::new("kill").args([&format!("-{name}"), "--", &format!("-{group}")]).stderr(Stdio::null()).status();
}
