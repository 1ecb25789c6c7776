//! Test harness: private servers, an isolated environment per test, waits with deadlines.

pub mod certificates;
pub mod citus;
pub mod clients;
pub mod collector;
pub mod daemon;
pub mod events;
pub mod invariants;
pub mod pause;
pub mod pooler;
pub mod proxy;
pub mod raw_amqp;
pub mod scheduler;
pub mod servers;
pub mod systemd;
pub mod world;

use std::future::Future;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Longest wait for a condition that must become true.
pub const DEADLINE: Duration = Duration::from_secs(120);

/// Path of the binary under test: given by Cargo to integration tests, found one folder up by an example.
pub fn binary() -> PathBuf {
    option_env!("CARGO_BIN_EXE_inventoryd").map_or_else(
        || {
            std::env::current_exe()
                .expect("the executable has a path")
                .ancestors()
                .nth(2)
                .expect("a folder")
                .join("inventoryd")
        },
        PathBuf::from,
    )
}

/// Cargo's build folder; also holds the files that outlive a test, such as installed client libraries.
pub fn target() -> PathBuf {
    binary().ancestors().nth(2).expect("binaries lie in target/<profile>").to_owned()
}

/// Polls until `ask` returns a value, or fails with `what` after [`DEADLINE`].
pub async fn eventually<T, F: Future<Output = Option<T>>>(what: &str, ask: impl FnMut() -> F) -> T {
    within(DEADLINE, what, ask).await
}

/// Polls like [`eventually`], with a deadline of the caller's.
pub async fn within<T, F: Future<Output = Option<T>>>(deadline: Duration, what: &str, mut ask: impl FnMut() -> F) -> T {
    let begun = Instant::now();
    loop {
        if let Some(answer) = ask().await {
            return answer;
        }
        assert!(begun.elapsed() < deadline, "not within {deadline:?}: {what}");
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
}
