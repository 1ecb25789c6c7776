//! Reading a selection: lists side by side, written in batches; each type to its own end.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicI64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use futures_util::{StreamExt, TryStreamExt, stream};
use tracing::{Instrument, info, warn};

use super::RunSettings;
use super::list::{List, ListEnd, Seen};
use crate::domain::catalog::{Listing, Scope};
use crate::domain::failure::Failure;
use crate::domain::item::InventoryItem;
use crate::domain::policy_type::PolicyType;
use crate::domain::run::{GraphUsage, Lease, RunReport, TypeCounters, TypeOutcome};
use crate::graph::GraphReader;
use crate::store::{FinishRules, LastType, Store, StoreError};
use crate::telemetry::{self, spans};

/// Reads the selection of one run.
pub(super) struct Collector<'a> {
    store: &'a Store,
    lease: Lease,
    reader: GraphReader,
    settings: RunSettings,
    unclassified: Arc<AtomicI64>,
    charged: Mutex<GraphUsage>,
    /// Lists that are not read to their end yet.
    unread: AtomicUsize,
}

/// What has come of one type of a list so far.
struct Share {
    policy_type: Arc<PolicyType>,
    pending: Vec<InventoryItem>,
    written: TypeCounters,
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
        let (unclassified, unread) = (Arc::default(), AtomicUsize::new(0));
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
        self.store.finish_run(&self.lease, &mut report, last, rules).instrument(spans::finish()).await?;
        let ended = || report.outcomes.iter().filter(|outcome| names.contains(&outcome.policy_type));
        let upserted: i64 = ended().map(|outcome| outcome.counters.items_upserted_count).sum();
        telemetry::items_upserted((upserted - upserted_before).unsigned_abs());
        ended().for_each(note_end);
        Ok(report)
    }

    /// Reads one list to its end, or to its failure, and records how its types have ended; the last one leaves that to
    /// the end of the run.
    async fn read(&self, listing: Listing) -> Result<Read, StoreError> {
        let mut shares: Vec<Share> = listing.selected.iter().map(Share::new).collect();
        let path = listing.collection.path.clone();
        let span = spans::list(&path);
        let mut list = List::read(&self.reader, listing, Arc::clone(&self.unclassified), span.clone());
        while let Some(found) = list.next_part().await {
            for (index, item) in found {
                shares[index].pending.push(item);
            }
            self.write(&mut shares, self.settings.batch_rows).instrument(span.clone()).await?;
        }
        let ListEnd { seen, failure } = list.end().await;
        if let Some(failure) = &failure {
            let code = failure.code;
            spans::failed(&span, code);
            warn!(path, %code, http_status = failure.http_status, request_id = failure.request_id, "list not read to its end");
        }
        if self.unread.fetch_sub(1, Ordering::Relaxed) == 1 {
            let last = shares.into_iter().zip(seen).map(|(share, seen)| share.last(seen, failure.as_ref()));
            return Ok(Read::Last(last.collect()));
        }
        self.write(&mut shares, 1).instrument(span).await?;
        let ended = shares.iter().zip(seen).map(|(share, seen)| share.outcome(seen, failure.as_ref()));
        let mut outcomes: Vec<TypeOutcome> = ended.collect();
        self.finish(&mut outcomes).await?;
        Ok(Read::Recorded(outcomes))
    }

    /// Writes the pending items of every type that has `at_least` so many.
    async fn write(&self, shares: &mut [Share], at_least: usize) -> Result<(), StoreError> {
        for share in shares.iter_mut().filter(|share| share.pending.len() >= at_least) {
            for batch in share.pending.chunks(self.settings.batch_rows) {
                let span = spans::upsert(&share.policy_type.key, batch.len());
                let written = self.store.upsert_items(&self.lease, &share.policy_type, batch).instrument(span).await?;
                share.written.items_upserted_count += written.upserted;
                share.written.items_created_count += written.created;
                share.written.items_changed_count += written.changed;
                telemetry::items_upserted(written.upserted.unsigned_abs());
            }
            share.pending.clear();
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

impl Share {
    fn new(policy_type: &Arc<PolicyType>) -> Self {
        Self { policy_type: Arc::clone(policy_type), pending: Vec::new(), written: TypeCounters::default() }
    }

    fn last(mut self, seen: Seen, ended_by: Option<&Failure>) -> LastType {
        let (policy_type, items) = (Arc::clone(&self.policy_type), std::mem::take(&mut self.pending));
        LastType { policy_type, items, outcome: self.outcome(seen, ended_by) }
    }

    fn outcome(&self, seen: Seen, ended_by: Option<&Failure>) -> TypeOutcome {
        let mut counters = seen.counters;
        counters.add(&self.written);
        match ended_by {
            Some(failure) => TypeOutcome::failed(&self.policy_type.key, counters, failure.clone()),
            None => TypeOutcome {
                policy_type: self.policy_type.key.clone(),
                complete: true,
                counters,
                failure: seen.failure,
                suspicious_drop: false,
            },
        }
    }
}
