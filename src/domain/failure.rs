//! Closed lists of error codes and dead-letter reasons, each with cause and remedy.

use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Declares a closed list of stable codes: the enum, the text form, and the cause and remedy for operators.
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

            /// Stable text form.
            #[must_use]
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $text),+ }
            }

            /// Cause, for operators.
            #[must_use]
            pub const fn cause(self) -> &'static str {
                match self { $(Self::$variant => $cause),+ }
            }

            /// Remedy, for operators.
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

/// Error for text that does not name a member of the list.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("unknown code; `inventoryd explain` lists all codes")]
pub struct UnknownCode;

closed_list! {
    /// Reason that a run, or one type of a run, did not complete as requested.
    ErrorCode {
        LockContended = "lock_contended",
            "Another run of the same tenant and selection is running.",
            "Wait for the event of that run. If this happens often, schedule less often or set limits.when_full = \"defer\".";
        ConcurrencyLimitTenant = "concurrency_limit_tenant",
            "The tenant has reached its limit of concurrent runs.",
            "Spread the requests over time, or raise limits.tenant_max_runs or the tenant's own limit.";
        ConcurrencyLimitGlobal = "concurrency_limit_global",
            "All replicas together have reached limits.fleet_max_runs.",
            "Raise limits.fleet_max_runs, or set limits.when_full = \"defer\".";
        TenantDisabled = "tenant_disabled",
            "The tenant is disabled in the inventory.",
            "Enable the tenant with `inventoryd tenant enable`, or stop requesting it.";
        GraphThrottled = "graph_throttled",
            "Graph throttled the tenant (429 or 503) for longer than graph.throttle_budget_s.",
            "Retry after the event's retry_after_s. Lower graph.rate_share if other tools use the tenant.";
        GraphUnavailable = "graph_unavailable",
            "Graph was unreachable or kept returning errors after all retries.",
            "Check the network and Microsoft 365 service health, then retry.";
        GraphUnauthorized = "graph_unauthorized",
            "Graph rejected the access token, and a fresh one too.",
            "Check the application's tenant, cloud and audience with `inventoryd doctor`.";
        GraphForbidden = "graph_forbidden",
            "The application lacks permission to list this type in this tenant.",
            "Grant the permission that `inventoryd doctor` names, with admin consent.";
        GraphNotApplicable = "graph_not_applicable",
            "The tenant has no licence or subscription for this feature.",
            "Remove the type from the tenant's selection, or license the feature for the tenant.";
        GraphUnsupported = "graph_unsupported",
            "This cloud or Graph ring does not provide the type's path.",
            "Remove the type from the tenant's selection.";
        GraphBadRequest = "graph_bad_request",
            "Graph rejected the request as malformed.",
            "Compare the type's contract with Graph's current metadata, and report the problem with the request id.";
        GraphBadResponse = "graph_bad_response",
            "Graph returned a response that is not a page of objects, or an object without a usable id.",
            "Retry; if the error persists, report it to Microsoft with the request id.";
        GraphPagingLoop = "graph_paging_loop",
            "Graph's next links stopped making progress.",
            "Retry; if the error persists, report it to Microsoft with the request id.";
        GraphForeignLink = "graph_foreign_link",
            "A next link pointed to another host and was not followed, to protect the access token.",
            "Check graph.base_url, and look for a proxy that rewrites Graph responses.";
        CredentialUnavailable = "credential_unavailable",
            "No access token could be obtained for the tenant.",
            "Check the credential with `inventoryd doctor`: expired secret, wrong tenant, or missing consent.";
        TokenServiceUnavailable = "token_service_unavailable",
            "Microsoft's token service was unreachable, failed or throttled, after all retries.",
            "Check the network and Microsoft Entra service health; retry after the event's retry_after_s.";
        UnsupportedPolicyType = "unsupported_policy_type",
            "The request names a policy type or category unknown to this version.",
            "Correct the name (`inventoryd types` lists them), or upgrade.";
        DeadlineExceeded = "deadline_exceeded",
            "The run reached run.deadline_s before this type was complete.",
            "Split the selection, or raise run.deadline_s together with the broker's consumer timeout.";
        WorkerLost = "worker_lost",
            "The worker stopped without releasing the run, and no other worker could take it over.",
            "Look for crashes, out-of-memory kills or network partitions at that time, then retry with a new idempotency key.";
        InternalError = "internal_error",
            "The daemon reached an unexpected state.",
            "Report the run id and the log lines of the run.";
    }
}

closed_list! {
    /// Reason that a message was moved to the dead-letter queue.
    DeadReason {
        InvalidJson = "invalid_json",
            "The body is not JSON.",
            "Fix the publisher, then drop the dead letter or replay it with `--body FILE`.";
        InvalidRequest = "invalid_request",
            "The body is JSON but not a valid sync request; the detail names the field.",
            "Correct the field that the detail names, then replay with `--body FILE`.";
        UnsupportedVersion = "unsupported_version",
            "This daemon does not support that schema_version.",
            "Publish schema_version 1, or upgrade the daemon and replay.";
        UnknownTenant = "unknown_tenant",
            "The tenant is not registered.",
            "Register the tenant with `inventoryd tenant add`, then replay.";
        IdempotencyConflict = "idempotency_conflict",
            "The tenant already used this idempotency key for another selection.",
            "Use a new idempotency key for each new request.";
        MessageTooLarge = "message_too_large",
            "The body is larger than 256 KiB.",
            "Send only policy types or categories; remove other content.";
        UnreadableProperties = "unreadable_properties",
            "A property or header of the message cannot be parsed; the detail names it.",
            "Publish UTF-8 text and at most 16 levels of nested headers, then replay; the body is complete.";
        Rejected = "rejected",
            "The daemon rejected the message, but the broker did not accept a copy with the reason.",
            "Read the reason in the daemon's log, fix its cause, then replay or drop the dead letter.";
        Expired = "expired",
            "The message exceeded a TTL set by a policy or by its publisher.",
            "Remove the TTL from the policy or the publisher, then replay.";
        Maxlen = "maxlen",
            "A policy limits the length of the requests queue and drops its oldest messages.",
            "Remove max-length or drop-head from the policy, then replay.";
        DeliveryLimit = "delivery_limit",
            "The message reached topology.delivery_limit unacknowledged deliveries.",
            "Look for workers that crash while handling the message, then replay.";
    }
}

/// One failure while reading a type: the code, and the identifiers needed to find the request in Microsoft's logs.
/// By construction it contains no token, URL, message body or free text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Failure {
    /// Stable code.
    pub code: ErrorCode,
    /// HTTP status of the Graph response, if there was one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub http_status: Option<u16>,
    /// Graph error code, if it is a plain identifier.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub graph_code: Option<String>,
    /// Graph request id, for support cases.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request_id: Option<String>,
}

impl From<ErrorCode> for Failure {
    fn from(code: ErrorCode) -> Self {
        Self { code, http_status: None, graph_code: None, request_id: None }
    }
}

impl Failure {
    /// A failure reported by Graph. `graph_code` and `request_id` are untrusted: anything that is not a plain
    /// identifier is dropped, so that a secret in it is never stored or logged.
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

/// Rejection of a message: the reason, and a detail that names the field and the expected value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rejection {
    /// Stable reason code.
    pub reason: DeadReason,
    /// Detail for the publisher; names fields and kinds of values, never values.
    pub detail: String,
}

impl Rejection {
    /// Creates a rejection.
    #[must_use]
    pub fn new(reason: DeadReason, detail: impl Into<String>) -> Self {
        Self { reason, detail: detail.into() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_round_trip_through_text() {
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
    fn free_text_from_graph_is_dropped() {
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
