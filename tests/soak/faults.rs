//! The faults: one after the other at random, some of them lasting while the next one strikes.

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

/// Strikes until it is told to stop.
pub struct Faults {
    world: Arc<World>,
    fleet: Fleet,
    postgres: Private,
    rabbitmq: Private,
    counts: BTreeMap<&'static str, usize>,
}

impl Faults {
    /// Faults for this fleet and its servers.
    pub fn new(world: Arc<World>, fleet: Fleet, postgres: Private, rabbitmq: Private) -> Self {
        Self { world, fleet, postgres, rabbitmq, counts: BTreeMap::new() }
    }

    /// Strikes until `stop`, then puts everything right.
    pub async fn strike(mut self, stop: watch::Receiver<bool>) -> Self {
        while !*stop.borrow() {
            let name = self.one().await;
            *self.counts.entry(name).or_default() += 1;
            sleep(Duration::from_millis(random_range(200..2_500))).await;
        }
        self.world.sim.remove_rules(None);
        for wire in self.fleet.members().iter().flat_map(|member| &member.wires) {
            wire.freeze(false);
            wire.refuse(false);
        }
        self
    }

    async fn one(&mut self) -> &'static str {
        let victim = random_range(0..REPLICAS);
        match random_range(0..100) {
            0..16 => self.kill(victim).await,
            16..28 => self.pause(victim).await,
            28..38 => self.terminate(victim).await,
            38..70 => self.wire(victim).await,
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
        self.fleet.member(victim).start_again(&self.world);
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
        member.ended().await;
        member.start_again(&self.world);
        if twice { "replica stopped, told twice" } else { "replica stopped" }
    }

    /// Every third time past the lease, so that a zombie wakes.
    async fn pause(&mut self, victim: usize) -> &'static str {
        let long = random_range(0..3) == 0;
        self.fleet.member(victim).signal("STOP");
        sleep(if long { Duration::from_secs(18) } else { Duration::from_millis(random_range(500..4_000)) }).await;
        self.fleet.member(victim).signal("CONT");
        if long { "replica paused past its lease" } else { "replica paused" }
    }

    async fn wire(&mut self, victim: usize) -> &'static str {
        let which = random_range(0..3);
        let all = random_range(0..4) == 0;
        let members = self.fleet.members();
        let wires: Vec<_> = members
            .iter()
            .enumerate()
            .filter(|(number, _)| all || *number == victim)
            .map(|(_, m)| &m.wires[which])
            .collect();
        if random_range(0..3) > 0 {
            wires.iter().for_each(|wire| wire.cut());
            return ["broker cut", "database cut", "Graph cut"][which];
        }
        let lasts = Duration::from_millis(random_range(500..7_000));
        let direction = random_range(0..3);
        for yes in [true, false] {
            for wire in &wires {
                match direction {
                    0 => wire.freeze(yes),
                    1 => wire.freeze_requests(yes),
                    _ => wire.freeze_replies(yes),
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
            1 => ("Graph 503", json!({ "kind": "status", "status": 503 })),
            2 => ("Graph drops", json!({ "kind": "drop" })),
            3 => ("Graph truncates", json!({ "kind": "truncate" })),
            4 => ("Graph is slow", json!({ "kind": "slow", "delay_ms": 1_500 })),
            _ => ("Graph 401", json!({ "kind": "unauthorized_nested" })),
        };
        let rule = json!({ "times": times, "probability": 0.7, "action": action });
        self.world.sim.add_rule(serde_json::from_value::<Rule>(rule).expect("the rule is one"));
        name
    }

    /// Prints how often each has struck.
    pub fn print(&self) {
        println!("faults: {}", self.counts.values().sum::<usize>());
        for (name, count) in &self.counts {
            println!("  {count:>5}  {name}");
        }
    }

    /// What the broker holds and the replicas have logged last, for whoever looks for the cause of a broken invariant.
    pub async fn explain(&self) {
        let columns = ["list_queues", "name", "messages_ready", "messages_unacknowledged"];
        println!("{}", self.rabbitmq.act(move |server| server.ctl(&columns)).await);
        for member in self.fleet.members() {
            member.explain();
        }
    }

    /// Stops the fleet in order; the servers go with it.
    pub async fn end(mut self) {
        for number in 0..REPLICAS {
            self.fleet.member(number).signal("TERM");
        }
        for number in 0..REPLICAS {
            self.fleet.member(number).ended().await;
        }
    }
}
