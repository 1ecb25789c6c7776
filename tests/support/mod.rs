//! The harness: real servers of its own, a world for every test, waits with deadlines.

pub mod certificates;
pub mod clients;
pub mod daemon;
pub mod events;
pub mod holds;
pub mod pooler;
pub mod proxy;
pub mod scheduler;
pub mod servers;
pub mod truths;
pub mod world;

use std::future::Future;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// How long a test waits for what must come to pass.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// The binary under test. Cargo names it to integration tests; an example finds it in the folder above its own.
pub fn binary() -> PathBuf {
    option_env!("CARGO_BIN_EXE_inventoryd").map_or_else(
        || std::env::current_exe().expect("it has a path").ancestors().nth(2).expect("a folder").join("inventoryd"),
        PathBuf::from,
    )
}

/// The folder that Cargo builds into; what tests make to stay lies there too.
pub fn target() -> PathBuf {
    binary().ancestors().nth(2).expect("binaries lie in target/<profile>").to_owned()
}

/// Asks again and again until there is an answer, or fails with `what` after [`PATIENCE`].
pub async fn eventually<T, F: Future<Output = Option<T>>>(what: &str, ask: impl FnMut() -> F) -> T {
    within(PATIENCE, what, ask).await
}

/// Like [`eventually`], with a patience of its own.
pub async fn within<T, F: Future<Output = Option<T>>>(patience: Duration, what: &str, mut ask: impl FnMut() -> F) -> T {
    let begun = Instant::now();
    loop {
        if let Some(answer) = ask().await {
            return answer;
        }
        assert!(begun.elapsed() < patience, "not within {patience:?}: {what}");
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
}
