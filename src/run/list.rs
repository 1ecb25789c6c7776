//! Reader of one list on its own task: while a page is written, the next one is fetched and decoded.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Instant;

use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;
use tracing::{Instrument, Span, warn};

use super::page_memory::PageMemory;
use crate::domain::catalog::Listing;
use crate::domain::failure::{ErrorCode, Failure};
use crate::domain::observation::Observation;
use crate::domain::run::TypeCounters;
use crate::graph::{GraphReader, PageObject, Pages};
use crate::store::ObservedItem;

/// Objects passed to the writer together; pages may have ten thousand.
const PART_OBJECTS: usize = 100;
/// Parts of a list that may wait between the network and the database. A list whose writer waits for a connection reads no
/// further page.
const PARTS_AHEAD: usize = 2;

/// A list that is being read; reading stops on drop.
pub(super) struct List {
    parts: mpsc::Receiver<Vec<Found>>,
    end: AbortOnDropHandle<ListEnd>,
}

/// An object of the selected type with this index in the listing.
pub(super) type Found = (usize, ObservedItem);

/// Result of reading a list.
pub(super) struct ListEnd {
    /// Objects seen, by selected type.
    pub(super) seen: Vec<Seen>,
    /// Failure that ended it early.
    pub(super) failure: Option<Failure>,
}

/// Counters of the objects of one type.
#[derive(Default)]
pub(super) struct Seen {
    pub(super) counters: TypeCounters,
    /// Failure of the first unreadable object.
    pub(super) failure: Option<Failure>,
}

impl List {
    /// Starts to read, within `span`. Objects that no policy type claims are counted in `unclassified`.
    pub(super) fn read(
        reader: &GraphReader,
        listing: Listing,
        memory: PageMemory,
        unclassified: Arc<AtomicI64>,
        span: Span,
    ) -> Self {
        let (sender, parts) = mpsc::channel(PARTS_AHEAD);
        let seen = listing.selected.iter().map(|_| Seen::default()).collect();
        let listing = Arc::new(listing);
        let reading = Reading { seen, unclassified, memory, pages: reader.pages(&listing), listing };
        // Log lines take the run's fields from the spans that are entered; the span of the list alone would not show them.
        let work = reading.work(sender).instrument(span).in_current_span();
        Self { parts, end: AbortOnDropHandle::new(tokio::spawn(work)) }
    }

    /// Objects of the next page or of a part of it; none after the last.
    pub(super) async fn next_part(&mut self) -> Option<Vec<Found>> {
        self.parts.recv().await
    }

    /// Result, once there are no more parts.
    pub(super) async fn end(self) -> ListEnd {
        match self.end.await {
            Ok(end) => end,
            // Only dropping `self` aborts it, so this is a panic.
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        }
    }
}

struct Reading {
    listing: Arc<Listing>,
    pages: Pages,
    seen: Vec<Seen>,
    unclassified: Arc<AtomicI64>,
    memory: PageMemory,
}

impl Reading {
    async fn work(mut self, sender: mpsc::Sender<Vec<Found>>) -> ListEnd {
        let mut last_page = None;
        loop {
            // Held until the page is passed on.
            let _reserved = self.memory.reserve(last_page).await;
            match self.pages.next().await {
                Ok(Some(page)) => {
                    last_page = Some(page.objects.len());
                    self.bad_elements(page.bad_objects);
                    let mut objects = page.objects.into_iter();
                    while objects.len() > 0 {
                        let found = self.take(objects.by_ref().take(PART_OBJECTS), page.requested_at);
                        if sender.send(found).await.is_err() {
                            return ListEnd { seen: self.seen, failure: None };
                        }
                    }
                }
                Ok(None) => return ListEnd { seen: self.seen, failure: None },
                Err(failure) => return ListEnd { seen: self.seen, failure: Some(failure) },
            }
        }
    }

    /// Counts objects, and takes those to be written.
    fn take(&mut self, objects: impl ExactSizeIterator<Item = PageObject>, requested_at: Instant) -> Vec<Found> {
        let mut found = Vec::with_capacity(objects.len());
        for PageObject { observation, first_sight } in objects {
            match observation {
                Observation::Item(index, item) => {
                    self.seen[index].counters.items_observed_count += i64::from(first_sight);
                    found.push((index, ObservedItem { item, requested_at }));
                }
                Observation::Bad(index, bad) => self.bad_object(index, bad.external_id.as_deref()),
                Observation::NotSelected => {}
                Observation::Unclassified => {
                    self.unclassified.fetch_add(i64::from(first_sight), Ordering::Relaxed);
                }
            }
        }
        found
    }

    /// Counts one unreadable object as an error of its type; the list goes on. The first one is logged, further ones are
    /// only counted: a page may hold a million of them.
    fn bad_object(&mut self, index: usize, external_id: Option<&str>) {
        let (policy_type, seen) = (&self.listing.selected[index].key, &mut self.seen[index]);
        if seen.failure.is_none() {
            warn!(policy_type, external_id, "object without a usable id skipped; further ones are only counted");
        }
        seen.counters.errors_count += 1;
        seen.failure.get_or_insert_with(|| ErrorCode::GraphBadResponse.into());
    }

    /// Counts elements of a page that are not objects at all.
    fn bad_elements(&mut self, count: usize) {
        if count > 0 {
            let last = self.seen.len() - 1;
            self.bad_object(last, None);
            self.seen[last].counters.errors_count += i64::try_from(count - 1).unwrap_or(i64::MAX);
        }
    }
}
