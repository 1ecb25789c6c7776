//! The closed lists of error codes and dead-letter reasons, each with its cause and remedy.

use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Declares a closed list of stable codes: the enum, its text form, and what each means to an operator.
macro_rules! closed_list {
    ($(#[$doc:meta])* $name:ident { $($variant:ident = $text:literal, $cause:literal, $remedy:literal;)+ }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
        pub enum $name {
            $(#[doc = $cause] #[serde(rename = $text)] $variant,)+
        }

        impl $name {
            /// Every member of the list.
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            /// The stable text form.
            #[must_use]
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $text),+ }
            }

            /// What has happened, for an operator.
            #[must_use]
            pub const fn cause(self) -> &'static str {
                match self { $(Self::$variant => $cause),+ }
            }

            /// What to do about it.
            #[must_use]
            pub const fn remedy(self) -> &'static str {
                match self { $(Self::$variant => $remedy),+ }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.as_str())
            }
        }

        impl std::str::FromStr for $name {
            type Err = UnknownCode;
            fn from_str(text: &str) -> Result<Self, UnknownCode> {
                Self::ALL.iter().copied().find(|code| code.as_str() == text).ok_or(UnknownCode)
            }
        }
    };
}

/// A text that names no member of the list that was asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("no such code")]
pub struct UnknownCode;

closed_list! {
    /// Why a run, or one type of it, did not go as asked.
    ErrorCode {
        LockContended = "lock_contended",
            "Another run of the same tenant and selection is running.",
            "Wait for its event; if it happens often, space the schedule out or set limits.when_full = \"defer\".";
        ConcurrencyLimitTenant = "concurrency_limit_tenant",
            "The tenant already has as many running runs as it may have.",
            "Spread its requests, or raise limits.tenant_max_runs or the tenant's own limit.";
        ConcurrencyLimitGlobal = "concurrency_limit_global",
            "All replicas together already have as many running runs as they may have.",
            "Raise limits.fleet_max_runs, or set limits.when_full = \"defer\".";
        TenantDisabled = "tenant_disabled",
            "The tenant is disabled in the inventory.",
            "Enable it with `inventoryd tenant enable`, or stop asking for it.";
        GraphThrottled = "graph_throttled",
            "Graph answered 429 or 503 for longer than the run may wait.",
            "Ask again after the event's retry_after_s; lower graph.rate_share if other tools use the tenant.";
        GraphUnavailable = "graph_unavailable",
            "Graph could not be reached, or kept failing, after every retry.",
            "See the service health of Microsoft 365 and the network; then ask again.";
        GraphUnauthorized = "graph_unauthorized",
            "Graph refused the token, a fresh one too.",
            "Check the application's tenant, cloud and audience with `inventoryd doctor`.";
        GraphForbidden = "graph_forbidden",
            "The application may not list this type in this tenant.",
            "Grant the permission that `inventoryd doctor` names, with admin consent.";
        GraphNotApplicable = "graph_not_applicable",
            "The tenant has no Intune licence for this type.",
            "Leave the type out of this tenant's selection, or license the tenant.";
        GraphUnsupported = "graph_unsupported",
            "This cloud or ring of Graph does not know the type's path.",
            "Leave the type out of this tenant's selection.";
        GraphBadRequest = "graph_bad_request",
            "Graph refused the request as malformed.",
            "Compare the type's contract with Graph's current metadata; report it with the request id.";
        GraphBadResponse = "graph_bad_response",
            "Graph answered with something that is not a page of objects, or an object had no usable id.",
            "Ask again; if it stays, report it to Microsoft with the request id.";
        GraphPagingLoop = "graph_paging_loop",
            "Graph's next links stopped making progress.",
            "Ask again; if it stays, report it to Microsoft with the request id.";
        GraphForeignLink = "graph_foreign_link",
            "A next link led to another host and was not followed, because the token would have leaked.",
            "Look for a proxy that rewrites Graph's answers; check graph.base_url.";
        CredentialUnavailable = "credential_unavailable",
            "No token could be had for the tenant.",
            "Check the tenant's credential with `inventoryd doctor`: secret expired, wrong tenant, no consent.";
        UnsupportedPolicyType = "unsupported_policy_type",
            "The request names a policy type or category that this version does not know.",
            "Correct the name (`inventoryd types` lists them), or upgrade.";
        DeadlineExceeded = "deadline_exceeded",
            "The run reached run.deadline_s before this type was read to its end.",
            "Split the selection, or raise run.deadline_s together with the broker's consumer timeout.";
        WorkerLost = "worker_lost",
            "The worker vanished and the run could not be taken over.",
            "Look for crashes, memory kills or partitions at the time; ask again with a new key.";
        InternalError = "internal_error",
            "The daemon met a state that it does not understand.",
            "Report it with the run id and the log lines of the run.";
    }
}

closed_list! {
    /// Why a message was moved to the dead-letter queue.
    DeadReason {
        InvalidJson = "invalid_json",
            "The body is not JSON.",
            "Mend the publisher; then drop the dead letter, or replay a corrected one.";
        InvalidRequest = "invalid_request",
            "The body is JSON but not a sync request; the detail names the field.",
            "Mend the field that the detail names.";
        UnsupportedVersion = "unsupported_version",
            "The schema_version is one that this version does not speak.",
            "Publish schema_version 1, or upgrade the daemon and replay.";
        UnknownTenant = "unknown_tenant",
            "The tenant is not registered.",
            "Register it with `inventoryd tenant add`, then replay.";
        IdempotencyConflict = "idempotency_conflict",
            "The key was used before by this tenant for another selection.",
            "Give every new piece of work a new idempotency key.";
        MessageTooLarge = "message_too_large",
            "The body is larger than 256 KiB.",
            "Name policy types or categories rather than sending bulk.";
        DeliveryLimit = "delivery_limit",
            "The broker gave the message up after too many deliveries without an answer.",
            "Look for workers that die while they handle it; then replay.";
    }
}

/// One thing that went wrong while a type was read: the code, and what an operator needs to find it in
/// Microsoft's logs. By construction it holds no token, URL, message body or free text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Failure {
    /// The stable code.
    pub code: ErrorCode,
    /// Graph's HTTP status, if it answered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub http_status: Option<u16>,
    /// Graph's own error code, if it is one plain word.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub graph_code: Option<String>,
    /// Graph's request id, for a support case.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request_id: Option<String>,
}

impl From<ErrorCode> for Failure {
    fn from(code: ErrorCode) -> Self {
        Self { code, http_status: None, graph_code: None, request_id: None }
    }
}

impl Failure {
    /// A failure that Graph itself reported. `graph_code` and `request_id` come from outside: what does not
    /// look like a plain identifier is left out, so that a secret in it goes no further.
    #[must_use]
    pub fn from_graph(code: ErrorCode, http_status: u16, graph_code: Option<&str>, request_id: Option<&str>) -> Self {
        let plain = |text: &&str| {
            (1..=64).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"_-.".contains(&b))
        };
        Self {
            code,
            http_status: Some(http_status),
            graph_code: graph_code.filter(plain).filter(|text| !text.contains("eyJ")).map(str::to_owned),
            request_id: request_id.filter(|text| uuid::Uuid::try_parse(text).is_ok()).map(str::to_owned),
        }
    }
}

/// A message that can't be accepted, with the reason and a detail that names the field and the cure.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rejection {
    /// The stable reason.
    pub reason: DeadReason,
    /// For the person who mends the publisher; names fields and kinds of values, never values.
    pub detail: String,
}

impl Rejection {
    /// A rejection for `reason` with its detail.
    #[must_use]
    pub fn new(reason: DeadReason, detail: impl Into<String>) -> Self {
        Self { reason, detail: detail.into() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_survive_the_way_to_text_and_back() {
        for code in ErrorCode::ALL {
            assert_eq!(code.as_str().parse(), Ok(*code));
            assert_eq!(serde_json::to_value(code).unwrap(), code.as_str());
            assert!(!code.cause().is_empty() && !code.remedy().is_empty());
        }
        for reason in DeadReason::ALL {
            assert_eq!(reason.as_str().parse(), Ok(*reason));
        }
    }

    #[test]
    fn a_graph_code_longer_than_64_bytes_is_dropped() {
        let code =
            |length| Failure::from_graph(ErrorCode::GraphForbidden, 403, Some(&"c".repeat(length)), None).graph_code;
        assert_eq!(code(64).map(|code| code.len()), Some(64));
        assert_eq!(code(65), None);
        assert_eq!(code(0), None);
    }

    #[test]
    fn free_text_of_graph_goes_no_further() {
        let failure =
            Failure::from_graph(ErrorCode::GraphForbidden, 403, Some("see https://x/?t=Bearer abc"), Some("not an id"));
        assert_eq!(failure.graph_code, None);
        assert_eq!(failure.request_id, None);
        let failure = Failure::from_graph(ErrorCode::GraphForbidden, 403, Some("eyJhbGciOi.eyJzdWIiOi.sig"), None);
        assert_eq!(failure.graph_code, None);
        let id = "8b6f3b4c-0000-4000-8000-000000000001";
        let failure = Failure::from_graph(ErrorCode::GraphForbidden, 403, Some("Forbidden"), Some(id));
        assert_eq!(failure.graph_code.as_deref(), Some("Forbidden"));
        assert_eq!(failure.request_id.as_deref(), Some(id));
    }
}
