//! Bound on the objects of all lists of a run that are in memory between Graph and the writers.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Objects of pages that are requested or not yet passed on. At 1,000 a page that is three pages, whatever the number of
/// lists. Each run has as many: one that waits for Graph holds back no other.
const MAX_OBJECTS: u32 = 3_000;
/// Objects reserved for a page of unknown length: Graph's usual page.
const USUAL_PAGE: u32 = 25;

/// Bound of one run. Its lists wait for room in the order of their requests.
#[derive(Debug, Clone)]
pub(super) struct PageMemory(Arc<Semaphore>);

impl Default for PageMemory {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(MAX_OBJECTS as usize)))
    }
}

impl PageMemory {
    /// Waits until there is room for another page, as long as the page before it; `None` for the first one.
    ///
    /// A list holds no other reservation while it waits, and writers need none: every holder gets on.
    pub(super) async fn reserve(&self, last_page: Option<usize>) -> OwnedSemaphorePermit {
        let objects = last_page.map_or(USUAL_PAGE, |objects| u32::try_from(objects).unwrap_or(MAX_OBJECTS));
        let objects = objects.clamp(USUAL_PAGE, MAX_OBJECTS);
        Arc::clone(&self.0).acquire_many_owned(objects).await.expect("the semaphore is never closed")
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    #[tokio::test]
    async fn long_pages_wait_for_one_another_in_order_and_short_ones_hardly() {
        let memory = PageMemory::default();
        let first: Vec<_> = (0..80).map(|_| memory.reserve(None).now_or_never().unwrap()).collect();
        drop(first);
        let long: Vec<_> = (0..3).map(|_| memory.reserve(Some(1_000)).now_or_never().unwrap()).collect();
        let mut waiting = Box::pin(memory.reserve(Some(1_500)));
        assert!((&mut waiting).now_or_never().is_none());
        let mut later = Box::pin(memory.reserve(None));
        assert!((&mut later).now_or_never().is_none(), "the longer page was first");
        drop(long);
        assert!(waiting.now_or_never().is_some() && later.now_or_never().is_some());
    }

    #[tokio::test]
    async fn a_page_longer_than_the_bound_is_read_alone() {
        let memory = PageMemory::default();
        let huge = memory.reserve(Some(1_000_000)).now_or_never().unwrap();
        assert!(memory.reserve(None).now_or_never().is_none());
        drop(huge);
        assert!(memory.reserve(None).now_or_never().is_some());
    }
}
