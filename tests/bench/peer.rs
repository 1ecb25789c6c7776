//! Comparison with a small Celery worker (`tests/bench/peer/`) on the same servers with the same durability.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use inventoryd::domain::catalog::Catalog;
use lapin::BasicProperties;
use lapin::options::{BasicPublishOptions, QueueDeclareOptions};
use lapin::types::{AMQPValue, FieldTable};
use serde_json::{Value, json};
use uuid::Uuid;

use super::baseline::Lists;
use super::process::Process;
use super::report::{Line, Round, Target};
use super::rig::{Result, Rig, text};
use super::world::{CLIENT_ID, CLIENT_SECRET, World};

const TYPES: usize = 30;
const OBJECTS: usize = 20_000;
const TENANTS: usize = 200;

/// Workload that both execute.
struct Work<'a> {
    name: &'a str,
    world: World,
    lists: Lists,
    runs: usize,
    items: usize,
}

/// Cost of a round.
struct Cost {
    seconds: f64,
    cpu_s: f64,
}

/// Measures throughput and processor time of two workloads.
pub async fn measure(rig: &Rig) -> Result<Vec<Line>> {
    let Some(celery) = install(rig)? else {
        let why = "skipped: Celery can't be installed (no network, or no python3 with venv)";
        return Ok(vec![Line::skipped("peer_celery", why.to_owned())]);
    };
    let per_list = OBJECTS / TYPES;
    let big = ["--objects".to_owned(), per_list.to_string(), "--page-size".to_owned(), "100".to_owned()];
    let small = ["--objects".to_owned(), "10".to_owned()];
    let runs = rig.scale.pick(400, 2_000, 2_000);
    let items = Work {
        name: "peer_items",
        world: World::new(rig, "peer_items", 1, &big).await?,
        lists: Lists::first(TYPES),
        runs: 1,
        items: per_list * TYPES,
    };
    let (item_rounds, item_cpu) = items.compare(rig, &celery, |work| work.items).await?;
    drop(items);
    let small_runs = Work {
        name: "peer_runs",
        world: World::new(rig, "peer_runs", TENANTS, &small).await?,
        lists: Lists::first(1),
        runs,
        items: runs * 10,
    };
    let (run_rounds, run_cpu) = small_runs.compare(rig, &celery, |work| work.runs).await?;
    let fifth = Target::RatioAtMost(0.2);
    let third = Target::RatioAtMost(0.333);
    Ok(vec![
        Line::new("peer_celery_items", "items/s", Target::RatioAtLeast(5.0), item_rounds)
            .note(format!("one run over {} objects, against a Celery worker", per_list * TYPES)),
        Line::new("peer_celery_cpu", "us of CPU an item", fifth, item_cpu).note("processor time of that run"),
        Line::new("peer_celery_runs", "runs/s", Target::RatioAtLeast(4.0), run_rounds)
            .note(format!("{runs} runs of one page; 4 Celery processes, daemon with prefetch 32")),
        Line::new("peer_celery_runs_cpu", "us of CPU a run", third, run_cpu).note("processor time of those runs"),
    ])
}

/// Installs the worker's dependencies into `target/bench-peer`; returns `None` where that fails.
fn install(rig: &Rig) -> Result<Option<PathBuf>> {
    let folder = rig.folder.with_file_name("bench-peer");
    let (celery, done) = (folder.join("bin/celery"), folder.join("installed"));
    let wanted = fs::read_to_string(source().join("requirements.txt"))?;
    if fs::read_to_string(&done).is_ok_and(|installed| installed == wanted) {
        return Ok(Some(celery));
    }
    eprintln!("installing Celery into {}", folder.display());
    let run = |program: &Path, arguments: &[&str]| -> bool {
        Command::new(program).args(arguments).output().is_ok_and(|output| output.status.success())
    };
    let requirements = source().join("requirements.txt");
    let installed = run(Path::new("python3"), &["-m", "venv", "--clear", text(&folder)?])
        && run(&folder.join("bin/pip"), &["install", "-q", "--disable-pip-version-check", "-r", text(&requirements)?]);
    if installed {
        fs::write(done, wanted)?;
    }
    Ok(installed.then_some(celery))
}

fn source() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/bench/peer")
}

impl Work<'_> {
    /// Runs both in turn; returns the rate of `unit` and the processor time per unit.
    async fn compare(
        &self,
        rig: &Rig,
        celery: &Path,
        unit: impl Fn(&Self) -> usize,
    ) -> Result<(Vec<Round>, Vec<Round>)> {
        let count = unit(self) as f64;
        let daemon = self.world.daemon(&[("CONSUMER__PREFETCH", "32"), ("DATABASE__MAX_CONNECTIONS", "16")], 1).await?;
        let peer = self.peer(rig, celery).await?;
        // Warm-up: both fetch tokens, the simulator builds its pages.
        self.peer_round(&peer, "warm-p").await?;
        self.daemon_round(&daemon, "warm-d").await?;
        let (mut rates, mut cpu) = (Vec::new(), Vec::new());
        for round in 0..rig.rounds {
            let theirs = self.peer_round(&peer, &format!("p{round}")).await?;
            let ours = self.daemon_round(&daemon, &format!("d{round}")).await?;
            rates.push(Round::against(count / ours.seconds, count / theirs.seconds));
            cpu.push(Round::against(ours.cpu_s / count * 1e6, theirs.cpu_s / count * 1e6));
        }
        daemon.stop().await?;
        Ok((rates, cpu))
    }

    async fn peer(&self, rig: &Rig, celery: &Path) -> Result<Process> {
        let (world, queue) = (&self.world, self.queue());
        let lists = rig.folder.join(format!("{}-lists.json", self.name));
        fs::write(&lists, self.contracts().to_string())?;
        world.declare_queue(&queue).await?;
        let events = format!("{}inventory.events", world.prefix);
        let broker = world.amqp_url.replacen("amqp://", "pyamqp://", 1);
        let variables = [
            ("PYTHONPATH", text(&source())?.to_owned()),
            ("PYTHONDONTWRITEBYTECODE", "1".to_owned()),
            ("PEER_LISTS", text(&lists)?.to_owned()),
            ("PEER_GRAPH", world.graph.clone()),
            ("PEER_CA", text(&world.ca_file)?.to_owned()),
            ("PEER_DATABASE", world.database_url.clone()),
            ("PEER_CLIENT_ID", CLIENT_ID.to_owned()),
            ("PEER_CLIENT_SECRET", CLIENT_SECRET.to_owned()),
            ("PEER_BROKER", broker),
            ("PEER_QUEUE", queue.clone()),
            ("PEER_EVENTS", events),
        ];
        let variables = variables.iter().map(|(key, value)| (*key, value.as_str()));
        let log = rig.log(&format!("{}-celery", self.name));
        let arguments = [
            "-A",
            "worker",
            "worker",
            "-Q",
            &queue,
            "--concurrency",
            "4",
            "-O",
            "fair",
            "-l",
            "WARNING",
            "--without-gossip",
            "--without-mingle",
        ];
        let process = Process::start(celery, &arguments, variables, &log)?;
        let begun = Instant::now();
        let passive = QueueDeclareOptions { passive: true, ..Default::default() };
        loop {
            let declared = world.channel.queue_declare(queue.clone().into(), passive, FieldTable::default()).await?;
            if declared.consumer_count() > 0 {
                return Ok(process);
            }
            if begun.elapsed() > Duration::from_secs(60) {
                return Err(format!("the Celery worker does not start: see {}", log.display()).into());
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    fn queue(&self) -> String {
        format!("{}peer", self.world.prefix)
    }

    /// Contracts of the lists, for the worker.
    fn contracts(&self) -> Value {
        let catalog = Catalog::built_in();
        let entries = self.lists.keys.iter().zip(&self.lists.links).filter_map(|(key, link)| {
            let known = catalog.get(key)?;
            Some(json!({ "policy_type": key, "category": known.category, "link": link, "meta": known.meta, "name": known.name }))
        });
        entries.collect()
    }

    async fn daemon_round(&self, daemon: &Process, name: &str) -> Result<Cost> {
        let before = daemon.cpu_s();
        let seconds = self.world.runs(&self.lists, name, self.runs).await?;
        Ok(Cost { seconds, cpu_s: daemon.cpu_s() - before })
    }

    async fn peer_round(&self, peer: &Process, name: &str) -> Result<Cost> {
        let (before, since) = (peer.cpu_s(), self.world.now().await?);
        for number in 0..self.runs {
            let (id, run) = (Uuid::new_v4().to_string(), Uuid::now_v7().to_string());
            let tenant = self.world.tenants[number % self.world.tenants.len()];
            let key = format!("{name}.{number}");
            let hash = format!("peer-{run}");
            let body = json!([[tenant, run, key, hash, self.lists.keys], {}, {}]).to_string();
            let mut headers = FieldTable::default();
            for (name, value) in [("lang", "py"), ("task", "peer.sync"), ("id", &id), ("root_id", &id)] {
                headers.insert(name.into(), AMQPValue::LongString(value.into()));
            }
            let properties = BasicProperties::default()
                .with_delivery_mode(2)
                .with_correlation_id(id.into())
                .with_content_type("application/json".into())
                .with_content_encoding("utf-8".into())
                .with_headers(headers);
            let (queue, options) = (self.queue(), BasicPublishOptions::default());
            self.world.channel.basic_publish("".into(), queue.into(), options, body.as_bytes(), properties).await?;
        }
        let seconds = self.world.seconds_to_end(&format!("{name}."), self.runs, since).await?;
        Ok(Cost { seconds, cpu_s: peer.cpu_s() - before })
    }
}
