//! Subscription and publisher while the broker is frozen, blocks publishing or delivers nothing.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use inventoryd::broker::PublishOutcome;
use lapin::BasicProperties;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::spawn_blocking;
use tokio::time::timeout;

use super::broker::{Rig, event, next};
use crate::sim::Rule;
use crate::support::daemon::{Process, Replica};
use crate::support::proxy::Proxy;
use crate::support::servers::Server;
use crate::support::world::World;
use crate::support::{DEADLINE, eventually};

/// Private broker, removed at the end of the test.
struct Fragile(Server);

impl Fragile {
    async fn start(name: &'static str) -> Self {
        Self(spawn_blocking(move || Server::start("rabbitmq", name)).await.unwrap())
    }

    async fn command(&self, verb: &'static str) {
        let server = self.0.clone();
        spawn_blocking(move || server.command(verb)).await.unwrap();
    }

    async fn memory_alarm(&self, on: bool) {
        let (server, mark) = (self.0.clone(), if on { "0" } else { "0.6" });
        spawn_blocking(move || server.ctl(&["set_vm_memory_high_watermark", mark])).await.unwrap();
    }
}

impl Drop for Fragile {
    fn drop(&mut self) {
        self.0.command("remove");
    }
}

fn slow(delay_ms: u64) -> Rule {
    serde_json::from_value(json!({ "action": { "kind": "slow", "delay_ms": delay_ms } })).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn frozen_broker_is_detected_by_heartbeats_and_replaced() {
    let fragile = Fragile::start("rabbitmq-frozen").await;
    let rig = Rig::on(&fragile.0.url).await;
    let mut subscription = rig.broker.subscribe(4).await.unwrap();
    let publisher = rig.broker.publisher();
    assert_eq!(publisher.publish(vec![event("run.completed.success.t")]).await, [PublishOutcome::Confirmed]);
    fragile.command("pause").await;
    assert_eq!(publisher.publish(vec![event("run.completed.success.t")]).await, [PublishOutcome::Unknown]);
    let lost = timeout(DEADLINE, subscription.next()).await.expect("the subscription is lost");
    assert!(matches!(lost, Some(Err(_)) | None));
    drop(subscription);
    assert!(timeout(DEADLINE, rig.broker.subscribe(4)).await.expect("an attempt is bounded").is_err());
    fragile.command("resume").await;
    eventually("events are published again", || async {
        (publisher.publish(vec![event("run.completed.success.t")]).await == [PublishOutcome::Confirmed]).then_some(())
    })
    .await;
    rig.broker.subscribe(4).await.unwrap().close(Duration::from_secs(1)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_alarm_blocks_publishing_and_not_consuming() {
    let fragile = Fragile::start("rabbitmq-alarm").await;
    let rig = Rig::on(&fragile.0.url).await;
    let mut subscription = rig.broker.subscribe(4).await.unwrap();
    let publisher = rig.broker.publisher();
    rig.publish(b"one", BasicProperties::default()).await;
    assert_eq!(publisher.publish(vec![event("run.completed.success.t")]).await, [PublishOutcome::Confirmed]);
    fragile.memory_alarm(true).await;
    let mut outcomes = Vec::new();
    for _ in 0..3 {
        outcomes.extend(publisher.publish(vec![event("run.completed.success.t")]).await);
    }
    assert_eq!(outcomes, [PublishOutcome::Unknown, PublishOutcome::Unsent, PublishOutcome::Unsent]);
    assert!(publisher.blocked());
    assert!(next(&mut subscription).await.ack().await.unwrap(), "consuming continues");
    assert_eq!(subscription.ready().await.unwrap(), 0);
    fragile.memory_alarm(false).await;
    eventually("publishing is unblocked", || async { (!publisher.blocked()).then_some(()) }).await;
    assert_eq!(publisher.publish(vec![event("run.completed.success.t")]).await, [PublishOutcome::Confirmed]);
    fragile.memory_alarm(true).await;
    publisher.publish(vec![event("run.completed.success.t")]).await;
    timeout(DEADLINE, publisher.close()).await.expect("a blocked connection is shut down");
}

#[tokio::test(flavor = "multi_thread")]
async fn subscription_without_deliveries_is_rebuilt() {
    let world = World::new().await;
    let (discard, address) = discarding_proxy(world.amqp_address()).await;
    let mut config = world.config();
    config.broker.url = format!("amqp://guest:guest@{address}/%2f").into();
    config.consumer.watchdog_s = 2;
    config.consumer.prefetch = 2;
    let replica = Replica::with(config).await;
    eventually("subscribed", || async { replica.daemon().health().subscribed().then_some(()) }).await;
    discard.on.store(true, Ordering::Relaxed);
    let mut keys = Vec::new();
    for number in 0..5 {
        let tenant = uuid::Uuid::new_v4();
        world.register(tenant, None).await;
        keys.push(format!("k{number}"));
        world.publish(&World::request_of(tenant, &keys[number], &["mobileApp"])).await;
    }
    eventually("the watchdog ends the subscription", || async {
        (!replica.daemon().health().subscribed()).then_some(())
    })
    .await;
    discard.on.store(false, Ordering::Relaxed);
    for key in &keys {
        assert_eq!(world.ended(key).await["status"], "success");
    }
    replica.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_was_delivered_to_nobody_is_delivered_again() {
    let world = World::new().await;
    let (discard, address) = discarding_proxy(world.amqp_address()).await;
    let mut config = world.config();
    config.broker.url = format!("amqp://guest:guest@{address}/%2f").into();
    config.consumer.watchdog_s = 2;
    let replica = Replica::with(config).await;
    eventually("subscribed", || async { replica.daemon().health().subscribed().then_some(()) }).await;
    discard.on.store(true, Ordering::Relaxed);
    world.publish(&world.request("lost", &["mobileApp"])).await;
    eventually("the delivery is discarded", || async {
        (discard.discarded.load(Ordering::Relaxed) == 1).then_some(())
    })
    .await;
    assert_eq!(world.depth("inventory.sync.requests").await, 0, "for the broker it is delivered");
    discard.on.store(false, Ordering::Relaxed);
    assert_eq!(world.ended("lost").await["status"], "success");
    replica.stop().await;
}

/// State of a proxy that discards deliveries.
#[derive(Default)]
struct Discard {
    on: AtomicBool,
    discarded: AtomicUsize,
}

/// Proxy that discards deliveries to the client while told to, and passes everything else.
async fn discarding_proxy(target: SocketAddr) -> (Arc<Discard>, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (address, discard) = (listener.local_addr().unwrap(), Arc::new(Discard::default()));
    let told = Arc::clone(&discard);
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            let Ok(server) = TcpStream::connect(target).await else { continue };
            let ((mut client_in, client_out), (server_in, mut server_out)) = (client.into_split(), server.into_split());
            let told = Arc::clone(&told);
            tokio::spawn(async move {
                let _ = tokio::io::copy(&mut client_in, &mut server_out).await;
            });
            tokio::spawn(async move {
                let _ = pass_frames(server_in, client_out, &told).await;
            });
        }
    });
    (discard, address)
}

async fn pass_frames(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, discard: &Discard) -> std::io::Result<()> {
    let mut discarding = false;
    loop {
        let mut frame = vec![0; 7];
        from.read_exact(&mut frame).await?;
        let length = u32::from_be_bytes([frame[3], frame[4], frame[5], frame[6]]) as usize;
        frame.resize(7 + length + 1, 0);
        from.read_exact(&mut frame[7..]).await?;
        match frame[0] {
            // basic.deliver; the header and body frames after it belong to it.
            1 => {
                discarding = frame[7..11] == [0, 60, 0, 60] && discard.on.load(Ordering::Relaxed);
                discard.discarded.fetch_add(usize::from(discarding), Ordering::Relaxed);
            }
            2 | 3 => {}
            _ => {
                to.write_all(&frame).await?;
                continue;
            }
        }
        if !discarding {
            to.write_all(&frame).await?;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn operator_pause_accepts_nothing_and_finishes_runs_in_flight() {
    let world = World::new().await;
    world.sim.add_rule(slow(1_500));
    let replica = Replica::start(&world).await;
    world.publish(&world.request("before", &["mobileApp"])).await;
    eventually("the request is in flight", || async { (replica.daemon().health().in_flight() == 1).then_some(()) })
        .await;
    replica.daemon().stop().paused.send_replace(true);
    eventually("intake is paused", || async {
        (replica.daemon().health().paused() == Some("by_operator")).then_some(())
    })
    .await;
    eventually("the consumer unsubscribes", || async { (!replica.daemon().health().subscribed()).then_some(()) }).await;
    world.publish(&world.request("during", &["deviceShellScript"])).await;
    assert_eq!(world.ended("before").await["status"], "success");
    eventually("the delivery is settled on the same channel", || async {
        (replica.daemon().health().in_flight() == 0).then_some(())
    })
    .await;
    assert_eq!(world.depth("inventory.sync.requests").await, 1);
    assert!(world.runs("during").await.is_empty());
    replica.daemon().stop().paused.send_replace(false);
    assert_eq!(world.ended("during").await["status"], "success");
    assert_eq!(world.runs("before").await.len(), 1);
    replica.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn overdue_delivery_is_requeued_for_another_replica() {
    let world = World::new().await;
    world.execute("update tenants set max_concurrent_runs = 100").await;
    let apps = json!({ "path": "deviceAppManagement/mobileApps", "action": { "kind": "slow", "delay_ms": 25_000 } });
    world.sim.add_rule(serde_json::from_value::<Rule>(apps).unwrap());
    let proxy = Proxy::to(world.amqp_address()).await;
    let mut config = world.config();
    config.broker.url = world.amqp_through(&proxy).into();
    config.consumer.prefetch = 1;
    config.consumer.broker_timeout_s = config.run.deadline_s + 6;
    let busy = Replica::with(config).await;
    world.publish(&world.request("long", &["mobileApp"])).await;
    eventually("the run starts", || async { world.runs("long").await.pop() }).await;
    proxy.cut();
    // `long` is redelivered, waits for the permit of its own run, and must be requeued before `short` is delivered.
    let next = world.request("short", &["deviceShellScript"]);
    world.publish(&next).await;
    eventually("the session is rebuilt", || async { busy.daemon().health().subscribed().then_some(()) }).await;
    let _idle = Replica::start(&world).await;
    assert_eq!(world.ended("short").await["status"], "success");
    // The redelivery of `long` was requeued too; another replica schedules a retry while the run is in progress.
    eventually("the copy waits on a retry tier", || async {
        (world.depth("inventory.retry.5s").await == 1).then_some(())
    })
    .await;
    assert_eq!(world.runs("long").await[0]["status"], "running", "the other replica did not wait for it");
    assert_eq!(world.ended("long").await["status"], "success");
}

#[tokio::test(flavor = "multi_thread")]
async fn rebuilt_session_counts_runs_of_the_previous_session() {
    let world = World::new().await;
    world.execute("update tenants set max_concurrent_runs = 100").await;
    world
        .execute(
            "create table most_running (n bigint);
             create function note_running() returns trigger language plpgsql as $$ begin
               insert into most_running select count(*) from inventory_sync_runs where status = 'running'; return null; end $$;
             create trigger note_running after insert on inventory_sync_runs for each row execute function note_running();",
        )
        .await;
    world.sim.add_rule(
        serde_json::from_value(json!({ "times": 1, "action": { "kind": "slow", "delay_ms": 6_000 } })).unwrap(),
    );
    let broker = Proxy::to(world.amqp_address()).await;
    let mut config = world.config();
    config.broker.url = world.amqp_through(&broker).into();
    config.consumer.prefetch = 1;
    let replica = Replica::with(config).await;
    world.publish(&world.request("long", &["mobileApp"])).await;
    eventually("the run starts", || async { world.runs("long").await.pop() }).await;
    broker.cut();
    world.publish(&world.request("next", &["deviceShellScript"])).await;
    for key in ["long", "next"] {
        assert_eq!(world.ended(key).await["status"], "success");
    }
    assert_eq!(
        world.count("select max(n) from most_running").await,
        1,
        "the prefetch bounds the runs of both sessions"
    );
    replica.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn busy_replica_is_not_a_stalled_subscription() {
    let world = World::new().await;
    world.execute("update tenants set max_concurrent_runs = 100").await;
    world.sim.add_rule(
        serde_json::from_value(json!({ "times": 1, "action": { "kind": "slow", "delay_ms": 16_000 } })).unwrap(),
    );
    let replica = Process::start(&world, "busy", &[("CONSUMER__PREFETCH", "1"), ("CONSUMER__WATCHDOG_S", "5")]);
    world.publish(&world.request("long", &["mobileApp"])).await;
    eventually("the run starts", || async { world.runs("long").await.pop() }).await;
    // The request stays ready during the long run, because the prefetch is used up.
    world.publish(&world.request("next", &["deviceShellScript"])).await;
    for key in ["long", "next"] {
        assert_eq!(world.ended(key).await["status"], "success");
    }
    let log = replica.log();
    assert_eq!(log.matches("\"subscribed\"").count(), 1, "the subscription was rebuilt:\n{log}");
}
