//! How many requests of a tenant are on their way at once: half as many when Graph throttles, one more after a while.

use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

/// More lists than this are hardly read of one tenant at once; then nobody waits here while all goes well.
const MOST_AT_ONCE: usize = 32;
/// Answers that must go well before one more may go at once.
const ANSWERS_PER_STEP: usize = 16;

/// The requests of a tenant that are on their way.
#[derive(Debug, Default)]
pub(super) struct Crowd {
    state: Mutex<State>,
    room: Notify,
}

#[derive(Debug)]
struct State {
    inside: usize,
    most: usize,
    good_answers: usize,
    /// How often the crowd was halved: whoever set out before it was is no reason to halve it again.
    halvings: u64,
}

impl Default for State {
    fn default() -> Self {
        Self { inside: 0, most: MOST_AT_ONCE, good_answers: 0, halvings: 0 }
    }
}

/// The right to be on the way, until it is dropped.
pub(super) struct Permit {
    crowd: Arc<Crowd>,
    halvings: u64,
}

impl Crowd {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until there is room.
    pub(super) async fn enter(self: &Arc<Self>) -> Permit {
        loop {
            let mut room = pin!(self.room.notified());
            // From here on a departure is noticed, even one before the wait below begins.
            room.as_mut().enable();
            if let Some(permit) = self.try_enter() {
                return permit;
            }
            room.await;
        }
    }

    fn try_enter(self: &Arc<Self>) -> Option<Permit> {
        let mut state = self.state();
        if state.inside >= state.most {
            return None;
        }
        state.inside += 1;
        Some(Permit { crowd: Arc::clone(self), halvings: state.halvings })
    }
}

impl Permit {
    /// The request was answered well.
    pub(super) fn answered(&self) {
        let mut state = self.crowd.state();
        state.good_answers += 1;
        if state.good_answers >= ANSWERS_PER_STEP && state.most < MOST_AT_ONCE {
            state.good_answers = 0;
            state.most += 1;
            self.crowd.room.notify_one();
        }
    }

    /// The request was throttled.
    pub(super) fn throttled(&self) {
        let mut state = self.crowd.state();
        state.good_answers = 0;
        if state.halvings == self.halvings {
            // From what was really on its way: halving an unused allowance would change nothing.
            state.most = (state.inside.min(state.most) / 2).max(1);
            state.halvings += 1;
        }
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.crowd.state().inside -= 1;
        self.crowd.room.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    async fn fits(crowd: &Arc<Crowd>) -> Option<Permit> {
        tokio::time::timeout(Duration::from_millis(20), crowd.enter()).await.ok()
    }

    #[tokio::test]
    async fn throttling_halves_what_is_on_its_way_once_and_success_brings_it_back() {
        let crowd = Arc::new(Crowd::default());
        let mut inside = Vec::new();
        for _ in 0..8 {
            inside.push(fits(&crowd).await.unwrap());
        }
        inside.iter().for_each(Permit::throttled);
        assert_eq!(crowd.state().most, 4, "eight were refused together: one halving");
        inside.truncate(3);
        inside.push(fits(&crowd).await.unwrap());
        assert!(fits(&crowd).await.is_none());
        inside[3].throttled();
        assert_eq!(crowd.state().most, 2);
        for _ in 0..ANSWERS_PER_STEP * (MOST_AT_ONCE + 5) {
            inside[0].answered();
        }
        assert_eq!(crowd.state().most, MOST_AT_ONCE);
        drop(inside);
        assert_eq!(crowd.state().inside, 0);
    }

    #[tokio::test]
    async fn whoever_waits_goes_in_when_another_leaves() {
        let crowd = Arc::new(Crowd::default());
        crowd.state().most = 1;
        let first = crowd.enter().await;
        let waiting = tokio::spawn({
            let crowd = Arc::clone(&crowd);
            async move { drop(crowd.enter().await) }
        });
        tokio::task::yield_now().await;
        drop(first);
        tokio::time::timeout(Duration::from_secs(2), waiting).await.unwrap().unwrap();
    }
}
