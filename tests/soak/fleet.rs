//! Four replicas as processes, each with its own three wires that can be broken.

use std::time::Duration;

use crate::support::daemon::Process;
use crate::support::proxy::Proxy;
use crate::support::world::World;

/// How many there are.
pub const REPLICAS: usize = 4;

/// The processes and their wires.
pub struct Fleet {
    members: Vec<Member>,
}

/// One replica.
pub struct Member {
    /// To the broker, the database and Graph.
    pub wires: [Proxy; 3],
    process: Process,
    name: String,
    lives: usize,
}

impl Fleet {
    /// Starts all of them.
    pub async fn start(world: &World) -> Self {
        let mut members = Vec::new();
        for number in 0..REPLICAS {
            let wires = [
                Proxy::to(world.amqp_address()).await,
                Proxy::to(world.database_address()).await,
                Proxy::to(world.sim.address()).await,
            ];
            let name = format!("replica-{number}");
            let process = launch(world, &format!("{name}-0"), &wires);
            members.push(Member { wires, process, name, lives: 0 });
        }
        Self { members }
    }

    /// One of them.
    pub fn member(&mut self, number: usize) -> &mut Member {
        &mut self.members[number]
    }

    /// All of them.
    pub fn members(&self) -> &[Member] {
        &self.members
    }
}

impl Member {
    /// Sends a signal; says whether the process was there to get it.
    pub fn signal(&self, name: &str) {
        self.process.signal(name);
    }

    /// Waits for the end of a process that was told to stop.
    pub async fn ended(&mut self) {
        let status = self.process.ended(Duration::from_secs(20)).await;
        let log = self.process.log();
        // A signal may come before the process listens for any.
        assert!(status.success() || log.is_empty(), "{} ended with {status}:\n{log}", self.name);
    }

    /// Keeps its log and prints where it is.
    pub fn explain(&self) {
        let kept = std::env::temp_dir().join(format!("soak-{}.log", self.name));
        std::fs::write(&kept, self.process.log()).expect("a log can be written");
        println!("log of {}: {}", self.name, kept.display());
    }

    /// Starts it again, as an orchestrator would.
    pub fn start_again(&mut self, world: &World) {
        self.lives += 1;
        self.process = launch(world, &format!("{}-{}", self.name, self.lives), &self.wires);
    }
}

fn launch(world: &World, name: &str, wires: &[Proxy; 3]) -> Process {
    let graph = format!("https://{}", wires[2].address);
    let extra = [
        ("BROKER__URL", world.amqp_through(&wires[0])),
        ("DATABASE__URL", world.database_through(&wires[1])),
        ("GRAPH__BASE_URL", graph.clone()),
        ("GRAPH__AUTHORITY", graph),
        ("CONSUMER__DRAIN_S", "3".to_owned()),
        ("CONSUMER__WATCHDOG_S", "10".to_owned()),
        ("LIMITS__TENANT_MAX_RUNS", "3".to_owned()),
    ];
    let extra: Vec<(&str, &str)> = extra.iter().map(|(key, value)| (*key, value.as_str())).collect();
    Process::start(world, name, &extra)
}
