//! Fault injection by rules, added and removed while the simulator runs.

use std::time::Duration;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::sync::watch;
use uuid::Uuid;

use super::seed;

/// One rule. Every condition that is set must hold; a rule without any hits every Graph request.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// Graph requests, or token requests.
    #[serde(default)]
    pub on: Endpoint,
    /// Only this tenant.
    #[serde(default)]
    pub tenant: Option<Uuid>,
    /// Only this path and those below it; the API version may be left out.
    #[serde(default)]
    pub path: Option<String>,
    /// Only this page of a listing, from 1.
    #[serde(default)]
    pub page: Option<u32>,
    /// Only the nth matching request, from 1.
    #[serde(default)]
    pub nth: Option<u64>,
    /// Only after this number of matching requests.
    #[serde(default)]
    pub after: u64,
    /// Only every nth matching request.
    #[serde(default)]
    pub every: Option<u64>,
    /// At most this number of times.
    #[serde(default)]
    pub times: Option<u64>,
    /// Only with this probability (0 to 1), drawn from the seed.
    #[serde(default)]
    pub probability: Option<f64>,
    /// Fault.
    pub action: Action,
}

/// Endpoint that a rule applies to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Endpoint {
    /// `/v1.0/...` and `/beta/...`.
    #[default]
    Graph,
    /// `/{tenant}/oauth2/v2.0/token`.
    Token,
}

/// Fault. In JSON `{"kind": "status", "status": 429, "retry_after": "2"}`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Action {
    /// An error answer.
    Status {
        /// The HTTP status.
        status: u16,
        /// The header: absent or `none`, `2`, `0.5`, `date:5` (an HTTP date so many seconds ahead), or any text.
        #[serde(default)]
        retry_after: Option<String>,
        /// Body of the response.
        #[serde(default)]
        body: ErrorBody,
    },
    /// 403, naming the permission that is missing.
    Forbidden {
        /// The permission; a likely one if it is left out.
        #[serde(default)]
        permission: Option<String>,
    },
    /// 400: the tenant has no Intune licence.
    NotLicensed,
    /// 401 that is no token problem: `UnknownError` with a nested `Forbidden`.
    UnauthorizedNested,
    /// 401 with a claims challenge.
    ClaimsChallenge,
    /// An error whose message holds a (made-up) bearer token, a URL and a JWT.
    SecretInError {
        /// The HTTP status, 400 if it is left out.
        #[serde(default)]
        status: Option<u16>,
    },
    /// The body stops half way and the stream breaks; with `clean` it ends as if it were whole.
    Truncate {
        /// `true` if HTTP itself stays correct.
        #[serde(default)]
        clean: bool,
    },
    /// 200 with a page of HTML.
    WrongContent,
    /// The connection is cut before any answer.
    Drop,
    /// The answer comes late, or once a rule is removed; other rules still apply.
    Slow {
        /// Delay.
        delay_ms: u64,
    },
    /// The body comes in drips.
    SlowBody {
        /// Bytes per drip.
        chunk_bytes: usize,
        /// The pause before each.
        pause_ms: u64,
    },
    /// The next link leads to another host.
    ForeignLink {
        /// The host.
        host: String,
    },
    /// The next link is the link of this very page.
    RepeatLink,
    /// The first objects again and again, under links that are always new.
    NoNewIds,
    /// A `$select` that names the property is refused; without one, every `$select` is.
    RefuseSelect {
        /// The property.
        #[serde(default)]
        property: Option<String>,
    },
    /// A request with this query option is refused; without an option, no request is.
    RefuseOption {
        /// The option: `$select` or `$top`.
        option: String,
        /// The HTTP status.
        status: u16,
        /// The code in the body.
        code: String,
    },
    /// The right body with these bytes before it: a byte order mark, for instance.
    Prefix {
        /// The bytes.
        bytes: Vec<u8>,
    },
    /// Bytes inserted after the first place of the body that holds `after`.
    Insert {
        /// The text.
        after: String,
        /// The bytes.
        bytes: Vec<u8>,
    },
    /// Half of the right body and then this text, in a response that is correct HTTP.
    BreakOff {
        /// The text.
        text: String,
    },
    /// Token whose claims name another tenant.
    ForeignToken,
    /// 200 without objects but with a next link; nothing is lost by it.
    EmptyPage,
    /// The page begins with the last objects of the page before.
    DuplicateIds {
        /// Number of objects.
        count: u32,
    },
    /// One property of every object on the page gets a value that is unknown.
    UnknownEnum {
        /// The property.
        property: String,
        /// The value.
        #[serde(default = "unknown_member")]
        value: String,
    },
    /// One more object on the page, of a type that is unknown.
    Unclassified,
    /// One more object on the page, without an id.
    MissingId,
    /// One more object on the page: this.
    ExtraObject {
        /// The object.
        object: Value,
    },
}

/// The body of an error answer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorBody {
    /// Graph's usual body for the status.
    #[default]
    Default,
    /// Intune's JSON text inside `message`.
    Nested,
    /// The same once more nested.
    NestedTwice,
    /// This text, whatever it is.
    Literal(String),
}

/// Rule in force, with its counts.
#[derive(Clone, Debug, Serialize)]
pub struct ActiveRule {
    /// Number, for removing the rule.
    pub id: u64,
    /// Number of requests that matched.
    pub seen: u64,
    /// Number of requests that the fault was applied to.
    pub fired: u64,
    /// The rule.
    pub rule: Rule,
}

/// Properties of a request that rules match.
#[derive(Clone, Copy, Debug)]
pub struct Probe<'a> {
    /// Which half.
    pub on: Endpoint,
    /// Tenant, if the token names one.
    pub tenant: Option<Uuid>,
    /// Version and path.
    pub path: &'a str,
    /// The page of the listing.
    pub page: u32,
}

/// The rules in force.
#[derive(Debug, Default)]
pub struct Rules {
    active: Mutex<(u64, Vec<ActiveRule>)>,
    seed: u64,
    /// Count of removals, each of which ends the delays.
    removals: watch::Sender<u64>,
}

impl Rule {
    /// A rule that hits every Graph request, to be narrowed.
    pub fn new(action: Action) -> Rule {
        Rule {
            on: Endpoint::Graph,
            tenant: None,
            path: None,
            page: None,
            nth: None,
            after: 0,
            every: None,
            times: None,
            probability: None,
            action,
        }
    }

    /// An error answer with Graph's own body for it.
    pub fn status(status: u16, retry_after: Option<&str>) -> Rule {
        let retry_after = retry_after.map(str::to_owned);
        Rule::new(Action::Status { status, retry_after, body: ErrorBody::Default })
    }

    /// Token requests instead of Graph requests.
    pub fn on_token(self) -> Rule {
        Rule { on: Endpoint::Token, ..self }
    }

    /// Only this tenant.
    pub fn tenant(self, tenant: Uuid) -> Rule {
        Rule { tenant: Some(tenant), ..self }
    }

    /// Only this path and those below it.
    pub fn path(self, path: &str) -> Rule {
        Rule { path: Some(path.to_owned()), ..self }
    }

    /// Only this page, from 1.
    pub fn page(self, page: u32) -> Rule {
        Rule { page: Some(page), ..self }
    }

    /// Only the nth matching request, from 1.
    pub fn nth(self, nth: u64) -> Rule {
        Rule { nth: Some(nth), ..self }
    }

    /// Only after this number of matching requests.
    pub fn after(self, after: u64) -> Rule {
        Rule { after, ..self }
    }

    /// Only every nth matching request.
    pub fn every(self, every: u64) -> Rule {
        Rule { every: Some(every), ..self }
    }

    /// At most this number of times.
    pub fn times(self, times: u64) -> Rule {
        Rule { times: Some(times), ..self }
    }

    /// Only with this probability.
    pub fn probability(self, probability: f64) -> Rule {
        Rule { probability: Some(probability), ..self }
    }

    fn is_about(&self, probe: &Probe<'_>) -> bool {
        let bare = probe.path.split_once('/').map_or("", |(_, rest)| rest);
        self.on == probe.on
            && self.tenant.is_none_or(|tenant| Some(tenant) == probe.tenant)
            && self.page.is_none_or(|page| page == probe.page)
            && self.path.as_deref().is_none_or(|path| lies_under(probe.path, path) || lies_under(bare, path))
    }
}

impl Rules {
    /// No rules; `seed` decides about probabilities.
    pub fn new(seed: u64) -> Rules {
        Rules { seed, ..Rules::default() }
    }

    /// Appends a rule and returns its number.
    pub fn add(&self, rule: Rule) -> u64 {
        let mut active = self.active.lock();
        active.0 += 1;
        let id = active.0;
        active.1.push(ActiveRule { id, seen: 0, fired: 0, rule });
        id
    }

    /// Removes one rule, or all; returns how many were removed.
    pub fn remove(&self, id: Option<u64>) -> usize {
        let mut active = self.active.lock();
        let before = active.1.len();
        active.1.retain(|entry| id.is_some_and(|id| id != entry.id));
        self.removals.send_modify(|count| *count += 1);
        before - active.1.len()
    }

    /// The rules with their counts.
    pub fn list(&self) -> Vec<ActiveRule> {
        self.active.lock().1.clone()
    }

    /// Applies the rules to a request: waits for the slow ones, at most until a rule is removed, and returns the first other
    /// one.
    pub async fn apply(&self, probe: &Probe<'_>) -> Option<Action> {
        let mut removals = self.removals.subscribe();
        let (delay_ms, action) = self.strike(probe);
        // Fails at the end of the wait, or never: the sender lives as long as the rules.
        let _ = tokio::time::timeout(Duration::from_millis(delay_ms), removals.changed()).await;
        action
    }

    /// Total delay of the slow rules, and the first other rule that applies to this request.
    pub fn strike(&self, probe: &Probe<'_>) -> (u64, Option<Action>) {
        let mut active = self.active.lock();
        let (mut delay_ms, mut chosen) = (0, None);
        for entry in active.1.iter_mut().filter(|entry| entry.rule.is_about(probe)) {
            entry.seen += 1;
            let is_slow = matches!(entry.rule.action, Action::Slow { .. });
            if (chosen.is_some() && !is_slow) || !entry.is_due(self.seed) {
                continue;
            }
            entry.fired += 1;
            match &entry.rule.action {
                Action::Slow { delay_ms: more } => delay_ms += more,
                other => chosen = Some(other.clone()),
            }
        }
        (delay_ms, chosen)
    }
}

impl ActiveRule {
    fn is_due(&self, seed: u64) -> bool {
        let rule = &self.rule;
        let draw = seed::mix(seed::mix(seed ^ self.id) ^ self.seen) as f64 / u64::MAX as f64;
        rule.times.is_none_or(|times| self.fired < times)
            && rule.nth.is_none_or(|nth| self.seen == nth)
            && self.seen > rule.after
            && rule.every.is_none_or(|every| self.seen.is_multiple_of(every))
            && rule.probability.is_none_or(|probability| draw < probability)
    }
}

fn lies_under(path: &str, prefix: &str) -> bool {
    let prefix = prefix.trim_matches('/');
    path.strip_prefix(prefix).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

fn unknown_member() -> String {
    "memberFromTheFuture".to_owned()
}
