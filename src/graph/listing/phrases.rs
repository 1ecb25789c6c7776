//! Words in codes and messages of Graph that tell kinds of errors apart, in lower case.

/// Messages for a path that this cloud or ring does not know.
pub(super) const UNKNOWN_PATH: [&str; 2] = ["resource not found for the segment", "no method match route template"];
/// Words for a feature that the tenant has no licence or subscription for, in codes and messages of many services.
pub(super) const NOT_LICENSED: [&str; 14] = [
    "licens",
    "licenc",
    "premium",
    "subscription",
    "entra id p",
    "azure ad p",
    "not enabled for t",
    "not applicable to target tenant",
    "not provisioned",
    "notprovisioned",
    "not onboarded",
    "notonboarded",
    "service plan",
    "serviceplan",
];
/// Words for a resource that does not exist.
pub(super) const NOT_FOUND: [&str; 5] =
    ["notfound", "not found", "could not be found", "could not be discovered", "does not exist"];
/// Codes and words for a page token that is no longer valid.
pub(super) const EXPIRED_TOKEN: [&str; 6] =
    ["expiredpagetoken", "invalidpagetoken", "page token", "skiptoken", "skip token", "resyncrequired"];

/// Returns `true` if one of the texts contains one of the phrases.
pub(super) fn contains_any(texts: &[&str], phrases: &[&str]) -> bool {
    texts.iter().map(|text| text.to_lowercase()).any(|text| phrases.iter().any(|phrase| text.contains(phrase)))
}
