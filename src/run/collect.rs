//! Reading a selection: list, classify, sanitize, write; each type to its own end.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicI64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use futures_util::{StreamExt, TryStreamExt, stream};
use tokio::sync::mpsc;
use tracing::{info, warn};

use super::RunSettings;
use crate::domain::catalog::{Listing, Scope};
use crate::domain::failure::{ErrorCode, Failure};
use crate::domain::item::{InventoryItem, RawObject};

use crate::domain::policy_type::PolicyType;
use crate::domain::run::{GraphUsage, Lease, RunReport, TypeCounters, TypeOutcome};
use crate::graph::{GraphReader, Page, PageObject};
use crate::store::{FinishRules, LastType, Store, StoreError};
use crate::telemetry;

/// Pages that may wait between the wire and the database, so that the next one travels while one is written.
const PAGES_AHEAD: usize = 2;

/// Reads the selection of one run.
pub(super) struct Collector<'a> {
    store: &'a Store,
    lease: Lease,
    reader: GraphReader,
    settings: RunSettings,
    unclassified: AtomicI64,
    charged: Mutex<GraphUsage>,
    /// Lists that are not read to their end yet.
    unread: AtomicUsize,
}

/// What has been seen of one type of a list so far.
struct Tally {
    policy_type: Arc<PolicyType>,
    counters: TypeCounters,
    pending: Vec<InventoryItem>,
    failure: Option<Failure>,
}

/// A list that was read to its end, or to its failure.
enum Read {
    /// How its types have ended is recorded.
    Recorded(Vec<TypeOutcome>),
    /// It was the last: that is left to the end of the run.
    Last(Vec<LastType>),
}

impl<'a> Collector<'a> {
    pub(super) fn new(store: &'a Store, lease: Lease, reader: GraphReader, settings: RunSettings) -> Self {
        let (unclassified, unread) = (AtomicI64::new(0), AtomicUsize::new(0));
        Self { store, lease, reader, settings, unclassified, charged: Mutex::default(), unread }
    }

    /// Reads every list of `scope`, several at a time, and ends the run; types that an earlier attempt has finished are
    /// kept as they are.
    ///
    /// What the list that ends last has left over is written with the end itself: a short run is two transactions,
    /// its admission and this.
    pub(super) async fn collect(
        &self,
        scope: &Scope,
        finished: &BTreeMap<String, TypeOutcome>,
    ) -> Result<RunReport, StoreError> {
        let mut outcomes: Vec<TypeOutcome> = finished.values().cloned().collect();
        let mut unsupported = scope.unsupported_outcomes();
        unsupported.retain(|outcome| !finished.contains_key(&outcome.policy_type));
        self.finish(&mut unsupported).await?;
        outcomes.append(&mut unsupported);

        let remaining: Vec<Listing> =
            scope.listings.iter().filter_map(|listing| unfinished(listing, finished)).collect();
        self.unread.store(remaining.len(), Ordering::Relaxed);
        let mut read =
            stream::iter(remaining).map(|listing| self.read(listing)).buffer_unordered(self.settings.concurrent_lists);
        let mut last = Vec::new();
        while let Some(list) = read.try_next().await? {
            match list {
                Read::Recorded(mut recorded) => outcomes.append(&mut recorded),
                Read::Last(types) => last = types,
            }
        }
        drop(read);
        self.end(outcomes, last).await
    }

    /// Ends the run, with what is left to be written.
    async fn end(&self, outcomes: Vec<TypeOutcome>, last: Vec<LastType>) -> Result<RunReport, StoreError> {
        let names: Vec<String> = last.iter().map(|ended| ended.outcome.policy_type.clone()).collect();
        let upserted_before: i64 = last.iter().map(|ended| ended.outcome.counters.items_upserted_count).sum();
        let (usage, retry_after_s) = (self.uncharged_usage(), self.reader.retry_after_s());
        let mut report = RunReport { outcomes, usage, retry_after_s };
        let rules =
            FinishRules { batch_rows: self.settings.batch_rows, suspicious_drop: self.settings.suspicious_drop };
        self.store.finish_run(&self.lease, &mut report, last, rules).await?;
        let ended = || report.outcomes.iter().filter(|outcome| names.contains(&outcome.policy_type));
        let upserted: i64 = ended().map(|outcome| outcome.counters.items_upserted_count).sum();
        telemetry::items_upserted((upserted - upserted_before).unsigned_abs());
        ended().for_each(note_end);
        Ok(report)
    }

    /// Reads one list to its end, or to its failure, and records how its types have ended; the last one leaves that to
    /// the end of the run.
    async fn read(&self, listing: Listing) -> Result<Read, StoreError> {
        let mut tallies: Vec<Tally> = listing.selected.iter().map(Tally::new).collect();
        let read = self.copy(&listing, &mut tallies).await?;
        if let Err(failure) = &read {
            let (path, code) = (&listing.collection.path, failure.code);
            warn!(path, %code, http_status = failure.http_status, request_id = failure.request_id, "list not read to its end");
        }
        let ended_by = read.as_ref().err();
        if self.unread.fetch_sub(1, Ordering::Relaxed) == 1 {
            return Ok(Read::Last(tallies.into_iter().map(|tally| tally.last(ended_by)).collect()));
        }
        self.write(&mut tallies, 1).await?;
        let mut outcomes: Vec<TypeOutcome> = tallies.into_iter().map(|tally| tally.outcome(ended_by)).collect();
        self.finish(&mut outcomes).await?;
        Ok(Read::Recorded(outcomes))
    }

    /// Moves a list from Graph to the database, page after page, but for what does not fill a batch; the outer error is
    /// the database's, the inner Graph's.
    async fn copy(&self, listing: &Listing, tallies: &mut [Tally]) -> Result<Result<(), Failure>, StoreError> {
        let (sender, mut receiver) = mpsc::channel::<Page>(PAGES_AHEAD);
        let mut pages = self.reader.pages(&listing.collection);
        let fetch = async move {
            while let Some(page) = pages.next().await? {
                if sender.send(page).await.is_err() {
                    break;
                }
            }
            Ok(())
        };
        let write = async move {
            while let Some(page) = receiver.recv().await {
                self.take(listing, &page, tallies);
                self.write(tallies, self.settings.batch_rows).await?;
            }
            Ok(())
        };
        let (fetched, written) = tokio::join!(fetch, write);
        written.map(|()| fetched)
    }

    /// Sorts the objects of a page to the types that they belong to.
    fn take(&self, listing: &Listing, page: &Page, tallies: &mut [Tally]) {
        for object in &page.objects {
            let Ok(raw) = RawObject::parse(&object.raw) else {
                // Whose it is can't be told: the type that takes the rest answers for it.
                tallies.last_mut().expect("a listing has a selected type").bad_object(None);
                continue;
            };
            let Some(claimed) = raw.classify(&listing.collection) else {
                self.unclassified.fetch_add(i64::from(object.first_sight), Ordering::Relaxed);
                continue;
            };
            if let Some(tally) = tallies.iter_mut().find(|tally| tally.policy_type.key == claimed.key) {
                tally.observe(&raw, object);
            }
        }
    }

    /// Writes the pending items of every type that has `at_least` so many.
    async fn write(&self, tallies: &mut [Tally], at_least: usize) -> Result<(), StoreError> {
        for tally in tallies.iter_mut().filter(|tally| tally.pending.len() >= at_least) {
            for batch in tally.pending.chunks(self.settings.batch_rows) {
                let written = self.store.upsert_items(&self.lease, &tally.policy_type, batch).await?;
                tally.counters.items_upserted_count += written.upserted;
                tally.counters.items_created_count += written.created;
                tally.counters.items_changed_count += written.changed;
                telemetry::items_upserted(written.upserted.unsigned_abs());
            }
            tally.pending.clear();
        }
        Ok(())
    }

    async fn finish(&self, outcomes: &mut [TypeOutcome]) -> Result<(), StoreError> {
        if outcomes.is_empty() {
            return Ok(());
        }
        let usage = self.uncharged_usage();
        self.store.finish_types(&self.lease, outcomes, &usage, self.settings.suspicious_drop).await?;
        outcomes.iter().for_each(note_end);
        Ok(())
    }

    /// What was spent since this was last asked: each part is charged to the run's row once.
    fn uncharged_usage(&self) -> GraphUsage {
        let items_unclassified_count = self.unclassified.load(Ordering::Relaxed);
        let spent = GraphUsage { items_unclassified_count, ..self.reader.usage() };
        let mut charged = self.charged.lock().unwrap_or_else(PoisonError::into_inner);
        let uncharged = spent.since(&charged);
        *charged = spent;
        telemetry::items_unclassified(uncharged.items_unclassified_count.unsigned_abs());
        uncharged
    }
}

fn note_end(outcome: &TypeOutcome) {
    let (name, observed) = (&outcome.policy_type, outcome.counters.items_observed_count);
    telemetry::items_observed(observed.unsigned_abs());
    info!(
        policy_type = name,
        complete = outcome.complete,
        observed,
        suspicious_drop = outcome.suspicious_drop,
        "type ended"
    );
}

/// `listing` for the types of it that no earlier attempt has finished.
fn unfinished(listing: &Listing, finished: &BTreeMap<String, TypeOutcome>) -> Option<Listing> {
    let selected: Vec<_> = listing.selected.iter().filter(|t| !finished.contains_key(&t.key)).cloned().collect();
    (!selected.is_empty()).then(|| Listing { collection: Arc::clone(&listing.collection), selected })
}

impl Tally {
    fn new(policy_type: &Arc<PolicyType>) -> Self {
        Self {
            policy_type: Arc::clone(policy_type),
            counters: TypeCounters::default(),
            pending: Vec::new(),
            failure: None,
        }
    }

    fn observe(&mut self, raw: &RawObject<'_>, object: &PageObject) {
        match raw.observe(&self.policy_type) {
            Ok(item) => {
                self.counters.items_observed_count += i64::from(object.first_sight);
                self.pending.push(item);
            }
            Err(bad) => self.bad_object(bad.external_id.as_deref()),
        }
    }

    /// One bad object is one error of its type, not its end.
    fn bad_object(&mut self, external_id: Option<&str>) {
        warn!(policy_type = self.policy_type.key, external_id, "an object without a usable id is left out");
        self.counters.errors_count += 1;
        self.failure.get_or_insert_with(|| ErrorCode::GraphBadResponse.into());
    }

    fn last(mut self, ended_by: Option<&Failure>) -> LastType {
        let (policy_type, items) = (Arc::clone(&self.policy_type), std::mem::take(&mut self.pending));
        LastType { policy_type, items, outcome: self.outcome(ended_by) }
    }

    fn outcome(self, ended_by: Option<&Failure>) -> TypeOutcome {
        match ended_by {
            Some(failure) => TypeOutcome::failed(&self.policy_type.key, self.counters, failure.clone()),
            None => TypeOutcome {
                policy_type: self.policy_type.key.clone(),
                complete: true,
                counters: self.counters,
                failure: self.failure,
                suspicious_drop: false,
            },
        }
    }
}
