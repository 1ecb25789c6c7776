//! Four replicas as processes, each behind proxies of its own to the broker, the database and Graph.

use std::time::Duration;

use crate::support::daemon::Process;
use crate::support::proxy::Proxy;
use crate::support::world::World;

/// Number of replicas.
pub const REPLICAS: usize = 4;

/// Replicas and their proxies.
pub struct Fleet {
    members: Vec<Member>,
}

/// Replica with its proxies.
pub struct Member {
    /// Proxies to the broker, the database and Graph, in this order.
    pub proxies: [Proxy; 3],
    process: Process,
    name: String,
    starts: usize,
}

impl Fleet {
    /// Starts every replica.
    pub async fn start(world: &World) -> Self {
        let mut members = Vec::new();
        for number in 0..REPLICAS {
            let proxies = [
                Proxy::to(world.amqp_address()).await,
                Proxy::to(world.database_address()).await,
                Proxy::to(world.sim.address()).await,
            ];
            let name = format!("replica-{number}");
            let process = launch(world, &format!("{name}-0"), &proxies);
            members.push(Member { proxies, process, name, starts: 0 });
        }
        Self { members }
    }

    /// Returns one replica.
    pub fn member(&mut self, number: usize) -> &mut Member {
        &mut self.members[number]
    }

    /// Returns all replicas.
    pub fn members(&self) -> &[Member] {
        &self.members
    }
}

impl Member {
    /// Sends a signal to the process.
    pub fn signal(&self, name: &str) {
        self.process.signal(name);
    }

    /// Waits until the process exits, and asserts success.
    pub async fn wait_for_exit(&mut self) {
        let status = self.process.ended(Duration::from_secs(20)).await;
        let log = self.process.log();
        // A signal that arrives before the handlers are installed kills the process; its log is then empty.
        assert!(status.success() || log.is_empty(), "{} ended with {status}:\n{log}", self.name);
    }

    /// Copies the log to a place that outlives the process, and prints the path.
    pub fn keep_log(&self) {
        let kept = std::env::temp_dir().join(format!("soak-{}.log", self.name));
        std::fs::write(&kept, self.process.log()).expect("a log can be written");
        println!("log of {}: {}", self.name, kept.display());
    }

    /// Starts the process again, as an orchestrator would.
    pub fn restart(&mut self, world: &World) {
        self.starts += 1;
        self.process = launch(world, &format!("{}-{}", self.name, self.starts), &self.proxies);
    }
}

fn launch(world: &World, name: &str, proxies: &[Proxy; 3]) -> Process {
    let crowded = name.starts_with("replica-0");
    let graph = format!("https://{}", proxies[2].address);
    let extra = [
        ("BROKER__URL", world.amqp_through(&proxies[0])),
        ("DATABASE__URL", world.database_through(&proxies[1])),
        ("GRAPH__BASE_URL", graph.clone()),
        ("GRAPH__AUTHORITY", graph),
        ("CONSUMER__DRAIN_S", "3".to_owned()),
        ("CONSUMER__WATCHDOG_S", "10".to_owned()),
        ("LIMITS__TENANT_MAX_RUNS", "3".to_owned()),
        ("RUN__RESTART_AFTER_S", "20".to_owned()),
        ("RETENTION__RUNS_DAYS", "1".to_owned()),
        ("RETENTION__INTERVAL_S", "3".to_owned()),
        // One replica has more runs than connections to write with.
        ("CONSUMER__PREFETCH", if crowded { "16" } else { "8" }.to_owned()),
        ("DATABASE__MAX_CONNECTIONS", if crowded { "1" } else { "6" }.to_owned()),
    ];
    let extra: Vec<(&str, &str)> = extra.iter().map(|(key, value)| (*key, value.as_str())).collect();
    Process::start(world, name, &extra)
}
