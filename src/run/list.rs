//! One list, read on a task of its own: while a page of it is written, the next one is fetched and taken apart.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;
use tracing::{Instrument, Span, warn};

use crate::domain::catalog::Listing;
use crate::domain::failure::{ErrorCode, Failure};
use crate::domain::item::{InventoryItem, RawObject};
use crate::domain::run::TypeCounters;
use crate::graph::{GraphReader, PageObject, Pages};

/// Objects that go to the database together; pages may have ten thousand.
const PART_OBJECTS: usize = 100;
/// Parts that may wait between the wire and the database: with the one in hand the 500 rows of a usual batch, so that
/// one batch is ready when another is written.
const PARTS_AHEAD: usize = 4;

/// A list while it is read; dropped, it is read no further.
pub(super) struct List {
    parts: mpsc::Receiver<Vec<Found>>,
    end: AbortOnDropHandle<ListEnd>,
}

/// An object of the selected type with this index in the listing.
pub(super) type Found = (usize, InventoryItem);

/// How far a list was read.
pub(super) struct ListEnd {
    /// For each selected type what was seen of it.
    pub(super) seen: Vec<Seen>,
    /// Why it was not read to its end.
    pub(super) failure: Option<Failure>,
}

/// What was seen of a type.
#[derive(Default)]
pub(super) struct Seen {
    pub(super) counters: TypeCounters,
    /// The first bad object.
    pub(super) failure: Option<Failure>,
}

impl List {
    /// Begins to read, within `span`. Objects that no policy type claims are counted in `unclassified`.
    pub(super) fn read(reader: &GraphReader, listing: Listing, unclassified: Arc<AtomicI64>, span: Span) -> Self {
        let (sender, parts) = mpsc::channel(PARTS_AHEAD);
        let seen = listing.selected.iter().map(|_| Seen::default()).collect();
        let reading = Reading { seen, unclassified, pages: reader.pages(&listing.collection), listing };
        // Log lines pass over the list's span, and look for the run's among those that are entered, not among its parents.
        let work = reading.work(sender).instrument(span).in_current_span();
        Self { parts, end: AbortOnDropHandle::new(tokio::spawn(work)) }
    }

    /// The objects of the next page or of a part of it, or nothing after the last.
    pub(super) async fn next_part(&mut self) -> Option<Vec<Found>> {
        self.parts.recv().await
    }

    /// How it has ended, once there are no more parts.
    pub(super) async fn end(self) -> ListEnd {
        match self.end.await {
            Ok(end) => end,
            // Nobody else can abort it.
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        }
    }
}

struct Reading {
    listing: Listing,
    pages: Pages,
    seen: Vec<Seen>,
    unclassified: Arc<AtomicI64>,
}

impl Reading {
    async fn work(mut self, sender: mpsc::Sender<Vec<Found>>) -> ListEnd {
        loop {
            match self.pages.next().await {
                Ok(Some(page)) => {
                    let mut objects = page.objects.into_iter();
                    while objects.len() > 0 {
                        let found = self.take(objects.by_ref().take(PART_OBJECTS));
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

    /// Sorts objects to the types that they belong to.
    fn take(&mut self, objects: impl ExactSizeIterator<Item = PageObject>) -> Vec<Found> {
        let mut found = Vec::with_capacity(objects.len());
        for object in objects {
            let Ok(raw) = RawObject::parse(object.text.as_str()) else {
                // Whose it is can't be told: the type that takes the rest answers for it.
                self.bad_object(self.seen.len() - 1, None);
                continue;
            };
            let Some(claimed) = raw.classify(&self.listing.collection) else {
                self.unclassified.fetch_add(i64::from(object.first_sight), Ordering::Relaxed);
                continue;
            };
            if let Some(index) = self.listing.selected.iter().position(|selected| selected.key == claimed.key) {
                found.extend(self.observe(index, &raw, object.first_sight).map(|item| (index, item)));
            }
        }
        found
    }

    fn observe(&mut self, index: usize, raw: &RawObject<'_>, first_sight: bool) -> Option<InventoryItem> {
        match raw.observe(&self.listing.selected[index]) {
            Ok(item) => {
                self.seen[index].counters.items_observed_count += i64::from(first_sight);
                Some(item)
            }
            Err(bad) => {
                self.bad_object(index, bad.external_id.as_deref());
                None
            }
        }
    }

    /// One bad object is one error of its type, not its end.
    fn bad_object(&mut self, index: usize, external_id: Option<&str>) {
        let policy_type = &self.listing.selected[index].key;
        warn!(policy_type, external_id, "an object without a usable id is left out");
        self.seen[index].counters.errors_count += 1;
        self.seen[index].failure.get_or_insert_with(|| ErrorCode::GraphBadResponse.into());
    }
}
