//! A run: states, counters, and the derivation of its final status from the outcomes of its types.

use std::collections::{BTreeMap, BTreeSet};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::failure::Failure;

/// Maximum size of a stored `error_context`, in bytes of JSON.
pub const MAX_ERROR_CONTEXT_BYTES: usize = 4 * 1024;

/// State of a run. Terminal states never change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum RunStatus {
    /// A worker holds the lease, or held it until the worker was lost.
    Running,
    /// Every selected type is complete without errors.
    Success,
    /// Some types failed or had errors.
    Partial,
    /// No type is complete.
    Failed,
    /// Never started; the error code gives the reason.
    Skipped,
}

impl RunStatus {
    /// Stable text form.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Success => "success",
            Self::Partial => "partial",
            Self::Failed => "failed",
            Self::Skipped => "skipped",
        }
    }
}

impl std::str::FromStr for RunStatus {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        [Self::Running, Self::Success, Self::Partial, Self::Failed, Self::Skipped]
            .into_iter()
            .find(|status| status.as_str() == text)
            .ok_or_else(|| format!("{text:?} is not a run status; use running, success, partial, failed or skipped"))
    }
}

/// Key of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RunKey {
    /// Tenant of the run.
    pub tenant_id: Uuid,
    /// Id of the run.
    pub run_id: Uuid,
}

/// Permission of a worker to write for a run. `attempt` is the fencing token: every take-over increments it, and every
/// write of the run checks it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Lease {
    /// Tenant of the run.
    pub tenant_id: Uuid,
    /// Run id.
    pub run_id: Uuid,
    /// Fencing token.
    pub attempt: i32,
}

impl Lease {
    /// Key of the run.
    #[must_use]
    pub fn run(&self) -> RunKey {
        RunKey { tenant_id: self.tenant_id, run_id: self.run_id }
    }
}

/// Counters of one policy type.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct TypeCounters {
    /// Distinct objects that Graph returned.
    pub items_observed_count: i64,
    /// Rows written.
    pub items_upserted_count: i64,
    /// Rows first seen in this run.
    pub items_created_count: i64,
    /// Rows whose name, category, platform or meta differ from before.
    pub items_changed_count: i64,
    /// Objects that could not be read, plus the failure that ended the type, if any.
    pub errors_count: i64,
}

impl TypeCounters {
    /// Adds the counters of another type or batch.
    pub fn add(&mut self, other: &Self) {
        self.items_observed_count += other.items_observed_count;
        self.items_upserted_count += other.items_upserted_count;
        self.items_created_count += other.items_created_count;
        self.items_changed_count += other.items_changed_count;
        self.errors_count += other.errors_count;
    }
}

/// Status of a policy type in a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum TypeStatus {
    /// Read to the end.
    Complete,
    /// Not read to the end.
    Failed,
    /// The tenant or the cloud does not have it, and the request did not name it: no error.
    NotApplicable,
}

impl TypeStatus {
    /// Name in events, tables and output.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Complete => "complete",
            Self::Failed => "failed",
            Self::NotApplicable => "not_applicable",
        }
    }
}

impl std::str::FromStr for TypeStatus {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        [Self::Complete, Self::Failed, Self::NotApplicable]
            .into_iter()
            .find(|status| status.as_str() == text)
            .ok_or_else(|| format!("{text:?} is not a status of a policy type"))
    }
}

/// Outcome of one policy type of a run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct TypeOutcome {
    /// Policy type; an unknown category appears as `category:NAME`.
    pub policy_type: String,
    /// Status.
    pub status: TypeStatus,
    /// Counters.
    #[serde(flatten)]
    pub counters: TypeCounters,
    /// Failure that ended the type, or the first bad object of a complete type.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<Failure>,
    /// Complete, but with far fewer objects than in the previous completed run of the selection.
    pub suspicious_drop: bool,
}

impl TypeOutcome {
    /// A type that was read to the end; `failure` is the first of its unreadable objects.
    #[must_use]
    pub fn complete(policy_type: &str, counters: TypeCounters, failure: Option<Failure>) -> Self {
        Self::new(policy_type, TypeStatus::Complete, counters, failure)
    }

    /// Outcome of a type that failed, with the counters up to the failure.
    #[must_use]
    pub fn failed(policy_type: &str, mut counters: TypeCounters, failure: Failure) -> Self {
        counters.errors_count += 1;
        Self::new(policy_type, TypeStatus::Failed, counters, Some(failure))
    }

    /// A type that the tenant or the cloud does not have; the failure says how Graph put it.
    #[must_use]
    pub fn not_applicable(policy_type: &str, counters: TypeCounters, failure: Failure) -> Self {
        Self::new(policy_type, TypeStatus::NotApplicable, counters, Some(failure))
    }

    fn new(policy_type: &str, status: TypeStatus, counters: TypeCounters, failure: Option<Failure>) -> Self {
        Self { policy_type: policy_type.to_owned(), status, counters, failure, suspicious_drop: false }
    }

    /// True if the type was read to the end.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.status == TypeStatus::Complete
    }
}

/// Graph requests and throttling of a run.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct GraphUsage {
    /// Requests sent, retries included.
    pub graph_requests_count: i64,
    /// Responses with status 429 or 503.
    pub graph_throttled_count: i64,
    /// Time spent waiting because of throttling, in milliseconds.
    pub graph_throttle_wait_ms: i64,
    /// Objects of a shared collection that no policy type claims.
    pub items_unclassified_count: i64,
    /// Requests repeated without `$select` because Graph rejected it.
    pub graph_select_refused_count: i64,
}

impl GraphUsage {
    /// Difference to an earlier reading.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        Self {
            graph_requests_count: self.graph_requests_count - earlier.graph_requests_count,
            graph_throttled_count: self.graph_throttled_count - earlier.graph_throttled_count,
            graph_throttle_wait_ms: self.graph_throttle_wait_ms - earlier.graph_throttle_wait_ms,
            items_unclassified_count: self.items_unclassified_count - earlier.items_unclassified_count,
            graph_select_refused_count: self.graph_select_refused_count - earlier.graph_select_refused_count,
        }
    }
}

/// Result of a run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunReport {
    /// One outcome per selected type, unknown names included.
    pub outcomes: Vec<TypeOutcome>,
    /// Graph requests and throttling.
    pub usage: GraphUsage,
    /// Seconds after which to retry, if throttling exceeded the run's budget.
    pub retry_after_s: Option<i32>,
}

impl RunReport {
    /// Terminal status derived from the outcomes.
    #[must_use]
    pub fn status(&self) -> RunStatus {
        let any_complete = self.outcomes.iter().any(TypeOutcome::is_complete);
        let any_failed = self.outcomes.iter().any(|outcome| outcome.status == TypeStatus::Failed);
        if !any_complete {
            RunStatus::Failed
        } else if any_failed || !self.error_codes().is_empty() || self.totals().errors_count > 0 {
            RunStatus::Partial
        } else {
            RunStatus::Success
        }
    }

    /// Distinct error codes, sorted by text.
    #[must_use]
    pub fn error_codes(&self) -> BTreeSet<&'static str> {
        // A run that read nothing has failed, even if each of its types alone would be no error.
        let any_complete = self.outcomes.iter().any(TypeOutcome::is_complete);
        let counts = |outcome: &&TypeOutcome| !any_complete || outcome.status != TypeStatus::NotApplicable;
        let failures = self.outcomes.iter().filter(counts).filter_map(|outcome| outcome.failure.as_ref());
        failures.map(|failure| failure.code.as_str()).collect()
    }

    /// Sums over all types.
    #[must_use]
    pub fn totals(&self) -> TypeCounters {
        self.outcomes.iter().fold(TypeCounters::default(), |mut sum, outcome| {
            sum.add(&outcome.counters);
            sum
        })
    }

    /// Failures by type, limited to [`MAX_ERROR_CONTEXT_BYTES`]; `_omitted` counts the failures left out.
    #[must_use]
    pub fn error_context(&self) -> serde_json::Value {
        let omitted_bytes = stored_bytes("_omitted", &self.outcomes.len().into());
        let mut kept = BTreeMap::new();
        let (mut bytes, mut omitted) = (2 + omitted_bytes, 0);
        for outcome in self.outcomes.iter().filter(|outcome| outcome.status != TypeStatus::NotApplicable) {
            let Some(failure) = &outcome.failure else { continue };
            let value = serde_json::to_value(failure).expect("codes, numbers and strings always serialise");
            let size = stored_bytes(&outcome.policy_type, &value);
            if bytes + size > MAX_ERROR_CONTEXT_BYTES {
                omitted += 1;
                continue;
            }
            bytes += size;
            kept.insert(outcome.policy_type.clone(), value);
        }
        if omitted > 0 {
            kept.insert("_omitted".to_owned(), omitted.into());
        }
        serde_json::to_value(kept).expect("a map of JSON values is JSON")
    }
}

/// Bytes of an entry as PostgreSQL prints it: escaped, with a blank after each colon and comma.
fn stored_bytes(key: &str, value: &serde_json::Value) -> usize {
    let fields = value.as_object().map_or(0, serde_json::Map::len);
    serde_json::Value::from(key).to_string().len() + value.to_string().len() + 2 * fields + 4
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::failure::ErrorCode;

    fn complete(name: &str) -> TypeOutcome {
        TypeOutcome::complete(name, TypeCounters::default(), None)
    }

    fn failed(name: &str, code: ErrorCode) -> TypeOutcome {
        TypeOutcome::failed(name, TypeCounters::default(), code.into())
    }

    fn report(outcomes: Vec<TypeOutcome>) -> RunReport {
        RunReport { outcomes, usage: GraphUsage::default(), retry_after_s: None }
    }

    #[test]
    fn status_is_derived_from_the_outcomes() {
        assert_eq!(report(vec![complete("a"), complete("b")]).status(), RunStatus::Success);
        let partial = report(vec![complete("a"), failed("b", ErrorCode::GraphForbidden)]);
        assert_eq!(partial.status(), RunStatus::Partial);
        assert_eq!(partial.totals().errors_count, 1);
        let refused = report(vec![failed("a", ErrorCode::GraphForbidden), failed("b", ErrorCode::GraphThrottled)]);
        assert_eq!(refused.status(), RunStatus::Failed);
        assert_eq!(refused.error_codes().into_iter().collect::<Vec<_>>(), ["graph_forbidden", "graph_throttled"]);
        let mut bad_object = complete("a");
        bad_object.counters.errors_count = 1;
        assert_eq!(report(vec![bad_object]).status(), RunStatus::Partial, "one bad object makes the run partial");
    }

    /// Counters in which field number `n` has the value `factor * 10^n`.
    fn counted<T: Serialize + for<'de> Deserialize<'de> + Default>(factor: i64) -> T {
        let fields = serde_json::to_value(T::default()).unwrap();
        let names = fields.as_object().unwrap().keys().enumerate();
        let filled = names.map(|(n, name)| (name.clone(), (factor * 10_i64.pow(n as u32)).into()));
        serde_json::from_value(filled.collect::<serde_json::Map<_, _>>().into()).unwrap()
    }

    #[test]
    fn counters_are_added_and_usage_subtracted_field_by_field() {
        let mut sum: TypeCounters = counted(1);
        sum.add(&counted(2));
        assert_eq!(sum, counted(3));
        let later: GraphUsage = counted(3);
        assert_eq!(later.since(&counted(2)), counted(1));
    }

    #[test]
    fn types_that_the_tenant_does_not_have_are_no_error_of_a_run() {
        let absent = |name: &str| {
            TypeOutcome::not_applicable(name, TypeCounters::default(), ErrorCode::GraphNotApplicable.into())
        };
        let licensed_for_one = report(vec![complete("a"), absent("b")]);
        assert_eq!(licensed_for_one.status(), RunStatus::Success);
        assert!(licensed_for_one.error_codes().is_empty());
        assert_eq!(licensed_for_one.error_context(), serde_json::json!({}));
        let licensed_for_none = report(vec![absent("a"), absent("b")]);
        assert_eq!(licensed_for_none.status(), RunStatus::Failed, "nothing was read");
        assert_eq!(licensed_for_none.error_codes().into_iter().collect::<Vec<_>>(), ["graph_not_applicable"]);
        let one_forbidden = report(vec![complete("a"), absent("b"), failed("c", ErrorCode::GraphForbidden)]);
        assert_eq!(one_forbidden.status(), RunStatus::Partial);
    }

    #[test]
    fn error_context_is_bounded_as_stored() {
        for name in ["policyTypeNumber", "category:\u{1}\"quoted\"\u{fffd}é", "x"] {
            let many = (0..500).map(|n| failed(&format!("{name}{n}"), ErrorCode::GraphForbidden)).collect();
            let context = report(many).error_context();
            let printed = printed_by_postgresql(&context);
            assert!(printed.len() <= MAX_ERROR_CONTEXT_BYTES, "{}", printed.len());
            assert!(printed.len() > MAX_ERROR_CONTEXT_BYTES * 9 / 10, "the bound is used: {}", printed.len());
            let kept = context.as_object().unwrap().len() - 1;
            assert_eq!(context["_omitted"], 500 - kept);
        }
    }

    fn printed_by_postgresql(value: &serde_json::Value) -> String {
        match value {
            serde_json::Value::Object(fields) => {
                let fields = fields.iter();
                let fields = fields.map(|(key, value)| {
                    format!("{}: {}", serde_json::Value::from(&**key), printed_by_postgresql(value))
                });
                format!("{{{}}}", fields.collect::<Vec<_>>().join(", "))
            }
            other => other.to_string(),
        }
    }
}
