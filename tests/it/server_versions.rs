//! Versions of broker and database in `/status` after an upgrade or a failover.

use serde_json::Value;

use crate::support::daemon::Process;
use crate::support::eventually;
use crate::support::proxy::Proxy;
use crate::support::servers::free_port;
use crate::support::world::World;

/// Changes the last digit of the version that follows `marker` and `skipped` bytes.
fn change_version(bytes: &mut [u8], marker: &[u8], skipped: usize) {
    let Some(at) = bytes.windows(marker.len()).position(|window| window == marker) else { return };
    let version = &mut bytes[at + marker.len() + skipped..];
    let length = version.iter().take_while(|byte| byte.is_ascii_digit() || **byte == b'.').count();
    let last = &mut version[length - 1];
    *last = if *last == b'9' { b'8' } else { *last + 1 };
}

/// Versions in `/status` of database and broker, once both are known.
async fn versions(listen: &str) -> Option<[String; 2]> {
    let status = reqwest::get(format!("http://{listen}/status")).await.ok()?.text().await.ok()?;
    let status: Value = serde_json::from_str(&status).ok()?;
    let version = |server: &str| Some(status["servers"][server]["version"].as_str()?.to_owned());
    Some([version("postgresql")?, version("rabbitmq")?])
}

#[tokio::test(flavor = "multi_thread")]
async fn a_version_that_changed_is_shown_without_a_restart() {
    let world = World::new().await;
    let (database, broker) = (Proxy::to(world.database_address()).await, Proxy::to(world.amqp_address()).await);
    let listen = format!("127.0.0.1:{}", free_port());
    let settings = [
        ("HTTP__LISTEN", listen.as_str()),
        ("DATABASE__URL", &world.database_through(&database)),
        ("BROKER__URL", &world.amqp_through(&broker)),
    ];
    let _replica = Process::start(&world, "upgraded", &settings);
    let before = eventually("both versions are known", || versions(&listen)).await;
    database.edit_replies(|bytes| change_version(bytes, b"server_version\0", 0));
    broker.edit_replies(|bytes| change_version(bytes, b"\x07versionS", 4));
    database.cut();
    broker.cut();
    eventually("both versions have changed", || async {
        let after = versions(&listen).await?;
        before.iter().zip(&after).all(|(before, after)| before != after).then_some(())
    })
    .await;
}
