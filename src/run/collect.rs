//! Reading a selection: list, classify, sanitize, write; each type to its own end.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use futures_util::{StreamExt, TryStreamExt, stream};
use tokio::sync::mpsc;
use tracing::{Instrument, info, warn};

use super::RunSettings;
use crate::domain::catalog::{Listing, Scope};
use crate::domain::failure::{ErrorCode, Failure};
use crate::domain::item::{InventoryItem, RawObject};

use crate::domain::policy_type::PolicyType;
use crate::domain::run::{GraphUsage, Lease, RunReport, TypeCounters, TypeOutcome};
use crate::graph::{GraphReader, Page, PageObject};
use crate::store::{Store, StoreError};
use crate::telemetry::{self, spans};

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
}

/// What has been seen of one type of a list so far.
struct Tally {
    policy_type: Arc<PolicyType>,
    counters: TypeCounters,
    pending: Vec<InventoryItem>,
    failure: Option<Failure>,
}

impl<'a> Collector<'a> {
    pub(super) fn new(store: &'a Store, lease: Lease, reader: GraphReader, settings: RunSettings) -> Self {
        Self { store, lease, reader, settings, unclassified: AtomicI64::new(0), charged: Mutex::default() }
    }

    /// Reads every list of `scope`, several at a time; types that an earlier attempt has finished are kept as they are.
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
        let read: Vec<Vec<TypeOutcome>> = stream::iter(remaining)
            .map(|listing| self.read(listing))
            .buffer_unordered(self.settings.concurrent_lists)
            .try_collect()
            .await?;
        outcomes.extend(read.into_iter().flatten());
        outcomes.sort_by(|one, other| one.policy_type.cmp(&other.policy_type));
        Ok(RunReport { outcomes, usage: self.uncharged_usage(), retry_after_s: self.reader.retry_after_s() })
    }

    /// Reads one list to its end, or to its failure, and records how its types have ended.
    async fn read(&self, listing: Listing) -> Result<Vec<TypeOutcome>, StoreError> {
        let mut tallies: Vec<Tally> = listing.selected.iter().map(Tally::new).collect();
        let span = spans::list(&listing.collection.path);
        let read = self.copy(&listing, &mut tallies).instrument(span.clone()).await?;
        if let Err(failure) = &read {
            spans::failed(&span, failure.code);
            let (path, code) = (&listing.collection.path, failure.code);
            warn!(path, %code, http_status = failure.http_status, request_id = failure.request_id, "list not read to its end");
        }
        let mut outcomes: Vec<TypeOutcome> =
            tallies.into_iter().map(|tally| tally.outcome(read.as_ref().err())).collect();
        self.finish(&mut outcomes).await?;
        Ok(outcomes)
    }

    /// Moves a list from Graph to the database, page after page; the outer error is the database's, the inner Graph's.
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
            self.write(tallies, 1).await
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
                let span = spans::upsert(&tally.policy_type.key, batch.len());
                let written = self.store.upsert_items(&self.lease, &tally.policy_type, batch).instrument(span).await?;
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
        for outcome in outcomes {
            telemetry::items_observed(outcome.counters.items_observed_count.unsigned_abs());
            let (name, observed) = (&outcome.policy_type, outcome.counters.items_observed_count);
            info!(
                policy_type = name,
                complete = outcome.complete,
                observed,
                suspicious_drop = outcome.suspicious_drop,
                "type ended"
            );
        }
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
