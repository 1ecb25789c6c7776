//! Fault injection: one random fault after the other, some of which last beyond the next.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use rand::random_range;
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::time::sleep;

use crate::fleet::{Fleet, REPLICAS};
use crate::sim::Rule;
use crate::support::servers::Private;
use crate::support::world::World;

/// Injects faults until told to stop; owns the fleet and the servers.
pub struct Faults {
    world: Arc<World>,
    fleet: Fleet,
    postgres: Private,
    rabbitmq: Private,
    counts: BTreeMap<&'static str, usize>,
}

impl Faults {
    /// Creates the injector for a fleet and its servers.
    pub fn new(world: Arc<World>, fleet: Fleet, postgres: Private, rabbitmq: Private) -> Self {
        Self { world, fleet, postgres, rabbitmq, counts: BTreeMap::new() }
    }

    /// Injects faults until `stop`, then heals everything.
    pub async fn inject(mut self, stop: watch::Receiver<bool>) -> Self {
        while !*stop.borrow() {
            let name = self.one().await;
            *self.counts.entry(name).or_default() += 1;
            sleep(Duration::from_millis(random_range(200..2_500))).await;
        }
        self.world.sim.remove_rules(None);
        for proxy in self.fleet.members().iter().flat_map(|member| &member.proxies) {
            proxy.freeze(false);
            proxy.refuse(false);
        }
        self
    }

    async fn one(&mut self) -> &'static str {
        let victim = random_range(0..REPLICAS);
        match random_range(0..100) {
            0..16 => self.kill(victim).await,
            16..28 => self.pause(victim).await,
            28..38 => self.terminate(victim).await,
            38..70 => self.network(victim).await,
            70..96 => self.graph(),
            96..98 => {
                self.postgres
                    .act(|server| {
                        server.command("kill");
                        server.start_again();
                    })
                    .await;
                "database killed"
            }
            _ => {
                self.rabbitmq
                    .act(|server| {
                        server.command("kill");
                        server.start_again();
                    })
                    .await;
                "broker killed"
            }
        }
    }

    async fn kill(&mut self, victim: usize) -> &'static str {
        self.fleet.member(victim).signal("KILL");
        sleep(Duration::from_millis(random_range(0..3_000))).await;
        self.fleet.member(victim).restart(&self.world);
        "replica killed"
    }

    async fn terminate(&mut self, victim: usize) -> &'static str {
        let member = self.fleet.member(victim);
        member.signal("TERM");
        let twice: bool = rand::random();
        if twice {
            sleep(Duration::from_millis(300)).await;
            member.signal("TERM");
        }
        member.wait_for_exit().await;
        member.restart(&self.world);
        if twice { "replica stopped by two signals" } else { "replica stopped" }
    }

    /// Pauses a replica; every third time for longer than its lease, so that it resumes as a zombie.
    async fn pause(&mut self, victim: usize) -> &'static str {
        let long = random_range(0..3) == 0;
        self.fleet.member(victim).signal("STOP");
        sleep(if long { Duration::from_secs(18) } else { Duration::from_millis(random_range(500..4_000)) }).await;
        self.fleet.member(victim).signal("CONT");
        if long { "replica paused past its lease" } else { "replica paused" }
    }

    async fn network(&mut self, victim: usize) -> &'static str {
        let which = random_range(0..3);
        let all = random_range(0..4) == 0;
        let members = self.fleet.members();
        let proxies: Vec<_> = members
            .iter()
            .enumerate()
            .filter(|(number, _)| all || *number == victim)
            .map(|(_, m)| &m.proxies[which])
            .collect();
        if random_range(0..3) > 0 {
            proxies.iter().for_each(|proxy| proxy.cut());
            return ["broker cut", "database cut", "Graph cut"][which];
        }
        let lasts = Duration::from_millis(random_range(500..7_000));
        let direction = random_range(0..3);
        for yes in [true, false] {
            for proxy in &proxies {
                match direction {
                    0 => proxy.freeze(yes),
                    1 => proxy.freeze_requests(yes),
                    _ => proxy.freeze_replies(yes),
                }
            }
            if yes {
                sleep(lasts).await;
            }
        }
        ["broker frozen", "database frozen", "Graph frozen"][which]
    }

    fn graph(&self) -> &'static str {
        let times = random_range(1..12);
        let (name, action): (_, Value) = match random_range(0..6) {
            0 => ("Graph 429", json!({ "kind": "status", "status": 429, "retry_after": "1" })),
            1 => ("Graph 503", json!({ "kind": "status", "status": 503, "retry_after": "1" })),
            2 => ("Graph drops", json!({ "kind": "drop" })),
            3 => ("Graph truncates", json!({ "kind": "truncate" })),
            4 => ("Graph is slow", json!({ "kind": "slow", "delay_ms": 1_500 })),
            _ => ("Graph 401", json!({ "kind": "unauthorized_nested" })),
        };
        let rule = json!({ "times": times, "probability": 0.7, "action": action });
        self.world.sim.add_rule(serde_json::from_value::<Rule>(rule).expect("the rule is valid"));
        name
    }

    /// Prints the count of every fault.
    pub fn print(&self) {
        println!("faults: {}", self.counts.values().sum::<usize>());
        for (name, count) in &self.counts {
            println!("  {count:>5}  {name}");
        }
    }

    /// Prints the queues and keeps the replicas' logs, to find the cause of a broken invariant.
    pub async fn dump_diagnostics(&self) {
        let columns = ["list_queues", "name", "messages_ready", "messages_unacknowledged"];
        println!("{}", self.rabbitmq.act(move |server| server.ctl(&columns)).await);
        for member in self.fleet.members() {
            member.keep_log();
        }
    }

    /// Stops the fleet gracefully; the servers are removed on drop.
    pub async fn stop_fleet(mut self) {
        for number in 0..REPLICAS {
            self.fleet.member(number).signal("TERM");
        }
        for number in 0..REPLICAS {
            self.fleet.member(number).wait_for_exit().await;
        }
    }
}
