//! Reader of a selection: reads lists concurrently, writes objects in batches, and records the outcome of each type.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicUsize, Ordering};

use futures_util::{StreamExt, TryStreamExt, stream};
use parking_lot::Mutex;
use tracing::{Instrument, info, warn};

use super::RunSettings;
use super::list::{List, ListEnd, Seen};
use super::page_memory::PageMemory;
use crate::domain::catalog::{Listing, Scope};
use crate::domain::clock::ObservationClock;
use crate::domain::failure::{ErrorCode, Failure};
use crate::domain::policy_type::PolicyType;
use crate::domain::run::{GraphUsage, Lease, RunReport, TypeCounters, TypeOutcome};
use crate::graph::GraphReader;
use crate::store::{Admitted, ItemBatch, ObservedItem, Store, StoreError};
use crate::telemetry::{self, spans};

/// Reads the selection of one run.
pub(super) struct Collector<'a> {
    store: &'a Store,
    lease: Lease,
    clock: ObservationClock,
    reader: GraphReader,
    settings: RunSettings,
    memory: PageMemory,
    unclassified: Arc<AtomicI64>,
    /// Use of Graph that is recorded in the run.
    recorded_usage: Mutex<GraphUsage>,
    /// Lists that are not read to their end.
    unread: AtomicUsize,
}

/// Objects of one type of a list that are not written yet, and the counts of those that are.
struct TypeBuffer {
    policy_type: Arc<PolicyType>,
    pending: Vec<ObservedItem>,
    written: TypeCounters,
}

/// Outcomes of the types of a list.
enum ListOutcome {
    /// Recorded.
    Recorded(Vec<TypeOutcome>),
    /// Of the last list, to be recorded with the end of the run: two statements less for a short run.
    Last(Unrecorded),
}

/// Part of the last list that is recorded with the end of the run.
#[derive(Default)]
struct Unrecorded {
    outcomes: Vec<TypeOutcome>,
    /// Objects of one type.
    objects: Option<TypeBuffer>,
}

impl<'a> Collector<'a> {
    pub(super) fn new(store: &'a Store, admitted: &Admitted, reader: GraphReader, settings: RunSettings) -> Self {
        Self {
            store,
            lease: admitted.lease,
            clock: admitted.clock,
            reader,
            settings,
            memory: PageMemory::default(),
            unclassified: Arc::default(),
            recorded_usage: Mutex::default(),
            unread: AtomicUsize::new(0),
        }
    }

    /// Reads every list of `scope`, several concurrently, and ends the run. Types that an earlier attempt finished are kept.
    pub(super) async fn collect(
        &self,
        scope: &Scope,
        finished: &BTreeMap<String, TypeOutcome>,
    ) -> Result<RunReport, StoreError> {
        let mut outcomes: Vec<TypeOutcome> = finished.values().cloned().collect();
        let mut unsupported = scope.unsupported_outcomes();
        unsupported.retain(|outcome| !finished.contains_key(&outcome.policy_type));
        self.record(&mut unsupported).await?;
        outcomes.append(&mut unsupported);

        let mut remaining: Vec<Listing> =
            scope.listings.iter().filter_map(|listing| unfinished(listing, finished)).collect();
        // The run takes at least as long as these: they begin first.
        remaining.sort_by_key(|listing| !listing.collection.takes_longest());
        self.unread.store(remaining.len(), Ordering::Relaxed);
        let mut lists = stream::iter(remaining)
            .map(|listing| self.read(listing, &scope.named))
            .buffer_unordered(self.settings.concurrent_lists);
        let mut last = Unrecorded::default();
        while let Some(list) = lists.try_next().await? {
            match list {
                ListOutcome::Recorded(mut recorded) => outcomes.append(&mut recorded),
                ListOutcome::Last(unrecorded) => last = unrecorded,
            }
        }
        drop(lists);
        self.end(outcomes, last).await
    }

    /// Ends the run, with what is not recorded yet.
    async fn end(&self, mut outcomes: Vec<TypeOutcome>, last: Unrecorded) -> Result<RunReport, StoreError> {
        let recorded = outcomes.len();
        outcomes.extend(last.outcomes);
        let (usage, retry_after_s) = (self.unrecorded_usage(), self.reader.retry_after_s());
        let mut report = RunReport { outcomes, usage, retry_after_s };
        let objects = last.objects.as_ref().map(|buffer| self.batch(&buffer.policy_type, &buffer.pending));
        let ended = self.store.end_run(&self.lease, &mut report, (recorded, objects), self.settings.end);
        let written = ended.instrument(spans::finish()).await?;
        telemetry::items_upserted(written.upserted.unsigned_abs());
        report.outcomes[recorded..].iter().for_each(note_end);
        report.outcomes.sort_by(|one, other| one.policy_type.cmp(&other.policy_type));
        Ok(report)
    }

    /// Reads one list to its end, or to its failure, writes its objects and records the outcomes of its types.
    async fn read(&self, listing: Listing, named: &BTreeSet<String>) -> Result<ListOutcome, StoreError> {
        let mut buffers: Vec<TypeBuffer> = listing.selected.iter().map(TypeBuffer::new).collect();
        let path = listing.collection.path.clone();
        let span = spans::list(&path);
        let mut list =
            List::read(&self.reader, listing, self.memory.clone(), Arc::clone(&self.unclassified), span.clone());
        while let Some(found) = list.next_part().await {
            for (index, item) in found {
                buffers[index].pending.push(item);
            }
            self.write(&mut buffers, self.settings.batch_rows).instrument(span.clone()).await?;
        }
        let ListEnd { seen, failure } = list.end().await;
        if let Some(failure) = &failure {
            let code = failure.code;
            spans::failed(&span, code);
            warn!(path, %code, http_status = failure.http_status, request_id = failure.request_id, "list not read to the end");
        }
        let is_last = self.unread.fetch_sub(1, Ordering::Relaxed) == 1;
        let with_pending = |buffer: &TypeBuffer| !buffer.pending.is_empty();
        let objects = is_last.then(|| buffers.iter_mut().rfind(|buffer| with_pending(buffer)).map(TypeBuffer::split));
        self.write(&mut buffers, 1).instrument(span).await?;
        let ended = buffers.iter().zip(seen).map(|(buffer, seen)| {
            let is_named = named.contains(&buffer.policy_type.key);
            buffer.outcome(seen, failure.as_ref(), is_named)
        });
        let mut outcomes: Vec<TypeOutcome> = ended.collect();
        if let Some(objects) = objects {
            return Ok(ListOutcome::Last(Unrecorded { outcomes, objects }));
        }
        self.record(&mut outcomes).await?;
        Ok(ListOutcome::Recorded(outcomes))
    }

    /// Writes the pending objects of every type that has at least `at_least` of them.
    async fn write(&self, buffers: &mut [TypeBuffer], at_least: usize) -> Result<(), StoreError> {
        for buffer in buffers.iter_mut().filter(|buffer| buffer.pending.len() >= at_least) {
            for batch in buffer.pending.chunks(self.settings.batch_rows) {
                let span = spans::upsert(&buffer.policy_type.key, batch.len());
                let written = self.store.upsert_items(&self.lease, self.batch(&buffer.policy_type, batch));
                let written = written.instrument(span).await?;
                written.add_to(&mut buffer.written);
                telemetry::items_upserted(written.upserted.unsigned_abs());
            }
            buffer.pending.clear();
        }
        Ok(())
    }

    fn batch<'b>(&'b self, policy_type: &'b PolicyType, items: &'b [ObservedItem]) -> ItemBatch<'b> {
        ItemBatch { policy_type, clock: &self.clock, items }
    }

    async fn record(&self, outcomes: &mut [TypeOutcome]) -> Result<(), StoreError> {
        if outcomes.is_empty() {
            return Ok(());
        }
        let usage = self.unrecorded_usage();
        self.store.record_types(&self.lease, outcomes, &usage, self.settings.end.suspicious_drop).await?;
        outcomes.iter().for_each(note_end);
        Ok(())
    }

    /// Use of Graph since the last call: each part is added to the run once.
    fn unrecorded_usage(&self) -> GraphUsage {
        let items_unclassified_count = self.unclassified.load(Ordering::Relaxed);
        let total = GraphUsage { items_unclassified_count, ..self.reader.usage() };
        let mut recorded = self.recorded_usage.lock();
        let unrecorded = total.since(&recorded);
        *recorded = total;
        telemetry::items_unclassified(unrecorded.items_unclassified_count.unsigned_abs());
        unrecorded
    }
}

fn note_end(outcome: &TypeOutcome) {
    let observed = outcome.counters.items_observed_count;
    telemetry::items_observed(observed.unsigned_abs());
    info!(
        policy_type = outcome.policy_type,
        status = outcome.status.as_str(),
        observed,
        suspicious_drop = outcome.suspicious_drop,
        "type ended"
    );
}

/// The part of `listing` that no earlier attempt finished.
fn unfinished(listing: &Listing, finished: &BTreeMap<String, TypeOutcome>) -> Option<Listing> {
    let selected: Vec<_> = listing.selected.iter().filter(|t| !finished.contains_key(&t.key)).cloned().collect();
    (!selected.is_empty()).then(|| Listing { collection: Arc::clone(&listing.collection), selected })
}

impl TypeBuffer {
    fn new(policy_type: &Arc<PolicyType>) -> Self {
        Self { policy_type: Arc::clone(policy_type), pending: Vec::new(), written: TypeCounters::default() }
    }

    /// Takes the pending objects, fewer than a batch.
    fn split(&mut self) -> Self {
        Self { pending: std::mem::take(&mut self.pending), ..Self::new(&self.policy_type) }
    }

    fn outcome(&self, seen: Seen, ended_by: Option<&Failure>, is_named: bool) -> TypeOutcome {
        let (key, mut counters) = (&self.policy_type.key, seen.counters);
        counters.add(&self.written);
        match ended_by {
            None => TypeOutcome::complete(key, counters, seen.failure),
            Some(failure) if !is_named && counters.items_observed_count == 0 && is_absence(failure.code) => {
                TypeOutcome::not_applicable(key, counters, failure.clone())
            }
            Some(failure) => TypeOutcome::failed(key, counters, failure.clone()),
        }
    }
}

/// True for a tenant without the licence and for a cloud without the type: no problem for an operator, unless
/// the request named the type.
fn is_absence(code: ErrorCode) -> bool {
    matches!(code, ErrorCode::GraphNotApplicable | ErrorCode::GraphUnsupported)
}
