//! Fault injection: one random fault after the other, some of which last beyond the next.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use rand::random_range;
use serde_json::{Value, json};
use sqlx::{AssertSqlSafe, Connection as _};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

use crate::archive::Archive;
use crate::fleet::{Fleet, REPLICAS};
use crate::sim::Rule;
use crate::support::servers::Private;
use crate::support::world::World;

/// Requests of one backlog.
const BURST: usize = 300;
/// Trigger that delays every item by the time in a table, so that a fault needs no lock on the items.
const SLOW_ROWS: &str = "create table soak_row_time (seconds double precision);
    insert into soak_row_time values (0);
    create function slow_row() returns trigger language plpgsql as $$ begin
      perform pg_sleep(seconds) from soak_row_time where seconds > 0; return new; end $$;
    create trigger slow_row before insert on inventory_items for each row execute function slow_row();";

/// Injects faults until told to stop; owns the fleet and the servers.
pub struct Faults {
    world: Arc<World>,
    fleet: Fleet,
    postgres: Private,
    rabbitmq: Private,
    archive: Archive,
    burst: Arc<AtomicUsize>,
    counts: BTreeMap<&'static str, usize>,
}

impl Faults {
    /// Creates the injector for a fleet and its servers; `burst` is the number of requests to publish at once.
    pub async fn new(
        world: Arc<World>,
        fleet: Fleet,
        (postgres, rabbitmq): (Private, Private),
        archive: Archive,
        burst: Arc<AtomicUsize>,
    ) -> Self {
        world.execute(SLOW_ROWS).await;
        Self { world, fleet, postgres, rabbitmq, archive, burst, counts: BTreeMap::new() }
    }

    /// Returns the tenant whose expired runs retention deletes.
    pub const fn archive(&self) -> &Archive {
        &self.archive
    }

    /// Injects faults until `stop`, then heals everything.
    pub async fn inject(mut self, stop: watch::Receiver<bool>) -> Self {
        while !*stop.borrow() {
            let name = self.one().await;
            *self.counts.entry(name).or_default() += 1;
            sleep(Duration::from_millis(random_range(200..2_500))).await;
        }
        self.world.sim.remove_rules(None);
        self.row_time(0.0).await;
        for proxy in self.fleet.members().iter().flat_map(|member| &member.proxies) {
            proxy.freeze(false);
            proxy.refuse(false);
        }
        self
    }

    async fn one(&mut self) -> &'static str {
        let victim = random_range(0..REPLICAS);
        match random_range(0..100) {
            0..14 => self.kill(victim).await,
            14..24 => self.pause(victim).await,
            24..33 => self.terminate(victim).await,
            33..59 => self.network(victim).await,
            59..80 => self.graph(),
            80..86 => self.slow_rows().await,
            86..90 => self.lingering_transaction(),
            90..92 => {
                self.burst.fetch_add(BURST, Ordering::Relaxed);
                "backlog"
            }
            92..96 => {
                self.archive.grow(&self.world).await;
                "expired runs"
            }
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

    /// Makes every item take longer to write, for a while that may exceed a lease.
    async fn slow_rows(&self) -> &'static str {
        self.row_time(random_range(0.02..0.6)).await;
        sleep(Duration::from_millis(random_range(1_000..20_000))).await;
        self.row_time(0.0).await;
        "slow rows"
    }

    async fn row_time(&self, seconds: f64) {
        let update = format!("update soak_row_time set seconds = {seconds}");
        // The database may be frozen or down; the next fault or the end resets the time.
        let _ = timeout(Duration::from_secs(5), sqlx::raw_sql(AssertSqlSafe(update)).execute(&self.world.db)).await;
    }

    /// Locks a running run in a session of its own, which lingers for up to twice the length of a lease.
    fn lingering_transaction(&self) -> &'static str {
        let (url, lasts) = (self.world.database_url.clone(), Duration::from_millis(random_range(2_000..30_000)));
        tokio::spawn(async move {
            let mut session = sqlx::PgConnection::connect(&url).await?;
            let lock = "set lock_timeout = '5s'; begin;
                        select from inventory_sync_runs where status = 'running' order by random() limit 1 for update";
            sqlx::raw_sql(lock).execute(&mut session).await?;
            sleep(lasts).await;
            session.close().await
        });
        "lingering transaction"
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
