//! Graph client against the simulator, over HTTPS.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use inventoryd::config::{Config, GraphConfig};
use inventoryd::domain::catalog::{Catalog, Collection, DEFAULT_CONTRACTS, Listing};
use inventoryd::domain::clock::Deadline;
use inventoryd::domain::failure::{ErrorCode, Failure};
use inventoryd::domain::observation::Observation;
use parking_lot::Mutex;

use inventoryd::domain::policy_type::Shape;
use inventoryd::graph::{GraphClient, GraphReader, PageObject, Pages, RunBudget};
use uuid::Uuid;

use crate::sim::{Action, ErrorBody, PageSizes, Rule, Sim, SimConfig};

pub const TENANT: Uuid = Uuid::from_u128(0x6a5b_1a3e_3e24_4d1c_9d7b_0c3f_1a2b_3c4d);
/// List shared by several types.
const SHARED: &str = "deviceManagement/configurationPolicies";
pub const PLAIN: &str = "deviceManagement/roleScopeTags";

/// Simulator with a client that trusts it.
pub struct World {
    pub sim: Sim,
    pub config: GraphConfig,
    pub catalog: Catalog,
}

impl World {
    pub async fn start() -> Self {
        Self::with(SimConfig::default(), &[]).await
    }

    pub async fn with(sim: SimConfig, settings: &[(&str, &str)]) -> Self {
        let (client_id, secret) = (sim.client_id.clone(), sim.client_secret.clone());
        let sim = Sim::start(sim).await.unwrap();
        let ca_file = temporary_file("ca.pem", sim.ca_pem());
        let ca_file = ca_file.to_str().unwrap();
        let base_url = sim.base_url();
        let mut all = BTreeMap::from([
            ("cloud", "custom"),
            ("base_url", &base_url),
            ("authority", &base_url),
            ("ca_file", ca_file),
            ("backoff_first_s", "0.01"),
            ("backoff_max_s", "0.05"),
            ("request_timeout_s", "5"),
            ("credentials__default__client_id", &client_id),
            ("credentials__default__client_secret", &secret),
        ]);
        all.extend(settings.iter().copied());
        let named =
            |(key, value): (&str, &str)| (format!("INVENTORYD__GRAPH__{}", key.to_uppercase()), value.to_owned());
        let config = Config::load_with(None, all.into_iter().map(named).collect()).unwrap().graph;
        Self { sim, config, catalog: Catalog::built_in() }
    }

    pub fn client(&self) -> GraphClient {
        GraphClient::new(&self.config).unwrap()
    }

    pub fn reader(&self) -> GraphReader {
        self.client().reader(TENANT, "default", budget(30, 20))
    }

    pub fn collection(&self, path: &str) -> Arc<Collection> {
        let policy_type = self.catalog.types().find(|policy_type| policy_type.path == path).unwrap();
        Arc::clone(self.catalog.collection_of(policy_type))
    }

    pub fn rule(&self, rule: Rule) {
        self.sim.add_rule(rule);
    }

    pub fn tokens(&self) -> u64 {
        self.sim.state().tokens_issued
    }

    pub async fn read(&self, path: &str) -> Result<Vec<PageObject>, Failure> {
        read(&self.reader(), &self.collection(path)).await
    }

    pub async fn refused(&self, path: &str) -> Failure {
        self.read(path).await.unwrap_err()
    }
}

pub fn temporary_file(name: &str, text: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{}-{name}", Uuid::new_v4()));
    std::fs::write(&path, text).unwrap();
    path
}

pub fn budget(deadline_s: u64, throttle_s: u64) -> RunBudget {
    let seconds = Duration::from_secs;
    RunBudget { deadline: Deadline::after(seconds(deadline_s)), throttle_budget: seconds(throttle_s) }
}

/// Pages of a list, with the objects of all of its types.
pub fn pages(reader: &GraphReader, collection: &Arc<Collection>) -> Pages {
    reader.pages(&Arc::new(Listing::of_all_types(collection)))
}

pub async fn read(reader: &GraphReader, collection: &Arc<Collection>) -> Result<Vec<PageObject>, Failure> {
    let mut list = pages(reader, collection);
    let mut objects = Vec::new();
    while let Some(page) = list.next().await? {
        objects.extend(page.objects);
    }
    Ok(objects)
}

/// Id of an object that a type of its list claims.
fn id(object: &PageObject) -> Option<String> {
    match &object.observation {
        Observation::Item(_, item) => Some(item.external_id.clone()),
        _ => None,
    }
}

pub fn ids(objects: &[PageObject]) -> BTreeSet<String> {
    objects.iter().filter_map(id).collect()
}

pub fn ids_of(sim: &Sim, path: &str) -> BTreeSet<String> {
    sim.object_ids(TENANT, path).unwrap().into_iter().collect()
}

#[tokio::test]
async fn every_contract_list_is_read_to_its_end() {
    let world = World::start().await;
    let (client, mut seen) = (world.client(), BTreeSet::new());
    for policy_type in world.catalog.types() {
        let collection = world.catalog.collection_of(policy_type);
        if !seen.insert((&collection.api_version, &collection.path)) {
            continue;
        }
        let objects = read(&client.reader(TENANT, "default", budget(30, 20)), collection).await;
        let objects = objects.unwrap_or_else(|failure| panic!("{}: {failure:?}", collection.path));
        assert!(objects.iter().all(|object| object.first_sight), "{}", collection.path);
        let path = format!("{}/{}", collection.api_version, collection.path);
        match collection.shape {
            Shape::Collection => {
                let all = ids_of(&world.sim, &path);
                assert_eq!(objects.len(), all.len(), "{path}");
                assert!(ids(&objects).is_subset(&all) && !ids(&objects).is_empty(), "{path}");
            }
            Shape::Singleton => assert_eq!(objects.len(), 1, "{path}"),
            Shape::ChildCollection => assert!(!objects.is_empty(), "{path}"),
        }
    }
    let state = world.sim.state();
    assert_eq!((state.tokens_issued, state.non_get, state.unauthorized), (1, 0, 0));
}

#[tokio::test]
async fn next_links_are_followed_verbatim_over_http2_and_each_attempt_has_its_own_id() {
    let world = World::start().await;
    world.sim.set_size(Some(TENANT), Some(PLAIN), 130).unwrap();
    let objects = world.read(PLAIN).await.unwrap();
    assert_eq!(objects.len(), 130);
    assert_eq!(ids(&objects), ids_of(&world.sim, PLAIN));
    let requests: Vec<_> = world.sim.requests().into_iter().filter(|request| request.method == "GET").collect();
    let client_ids: BTreeSet<&str> = requests.iter().map(|request| request.client_request_id.as_str()).collect();
    assert_eq!(client_ids.len(), requests.len());
    assert!(client_ids.iter().all(|id| Uuid::try_parse(id).is_ok()));
    assert!(requests.iter().all(|request| request.http_version == "HTTP/2.0" && request.status == 200));
}

#[tokio::test]
async fn repeated_ids_count_once_and_empty_pages_lose_nothing() {
    let world = World::start().await;
    world.sim.set_size(Some(TENANT), Some(PLAIN), 130).unwrap();
    world.rule(Rule::new(Action::DuplicateIds { count: 3 }).path(PLAIN).page(3));
    world.rule(Rule::new(Action::EmptyPage).path(PLAIN).page(2));
    let objects = world.read(PLAIN).await.unwrap();
    assert_eq!(objects.iter().filter(|object| object.first_sight).count(), 130);
    assert_eq!(ids(&objects), ids_of(&world.sim, PLAIN));
}

#[tokio::test]
async fn children_are_read_for_each_parent() {
    let world = World::start().await;
    let collection = world.collection("deviceManagement/depOnboardingSettings/{parent_id}/enrollmentProfiles");
    world.sim.set_size(Some(TENANT), collection.parent.as_deref(), 30).unwrap();
    let reader = world.reader();
    let objects = read(&reader, &collection).await.unwrap();
    let parents = world.sim.object_ids(TENANT, "deviceManagement/depOnboardingSettings").unwrap();
    let children: usize = parents
        .iter()
        .map(|id| world.sim.object_ids(TENANT, &collection.path.replace("{parent_id}", id)).unwrap().len())
        .sum();
    assert_eq!((parents.len(), objects.len()), (30, children));
    assert!(objects.iter().all(|object| object.first_sight));
}

#[tokio::test]
async fn children_of_several_parents_are_read_at_once_and_passed_on_in_order() {
    let page_sizes = PageSizes { default: 5, ..PageSizes::default() };
    let world = World::with(SimConfig { latency_ms: 100, page_sizes, ..SimConfig::default() }, &[]).await;
    let collection = world.collection("deviceManagement/depOnboardingSettings/{parent_id}/enrollmentProfiles");
    world.sim.set_size(Some(TENANT), collection.parent.as_deref(), 20).unwrap();
    let parents = world.sim.object_ids(TENANT, collection.parent.as_deref().unwrap()).unwrap();
    let path = |parent: &String| collection.path.replace("{parent_id}", parent);
    // The first parent is the last to be read.
    let slow = serde_json::json!({ "path": path(&parents[0]), "action": { "kind": "slow", "delay_ms": 400 } });
    world.rule(serde_json::from_value(slow).unwrap());
    let read = read(&world.reader(), &collection).await.unwrap();
    let expected: Vec<String> =
        parents.iter().flat_map(|parent| world.sim.object_ids(TENANT, &path(parent)).unwrap()).collect();
    assert_eq!(read.iter().filter_map(id).collect::<Vec<_>>(), expected);
    let state = &world.sim.state().tenants[&TENANT];
    assert!((2..=8).contains(&state.concurrent_max), "{} requests in flight", state.concurrent_max);
    assert_eq!(state.requests, 4 + 20 * 3, "each page is requested once");
}

#[tokio::test]
async fn a_child_list_ends_as_if_its_parents_were_read_one_after_the_other() {
    for status in [403, 401] {
        let world = World::start().await;
        let collection = world.collection("deviceManagement/depOnboardingSettings/{parent_id}/enrollmentProfiles");
        let parents = world.sim.object_ids(TENANT, collection.parent.as_deref().unwrap()).unwrap();
        let path = |parent: &String| collection.path.replace("{parent_id}", parent);
        // The first failure is known last, because it is repeated; only the other one may end the list.
        world.rule(Rule::status(500, None).path(&path(&parents[1])));
        world.rule(Rule::status(status, None).path(&path(&parents[5])));
        let (mut list, mut read) = (pages(&world.reader(), &collection), 0);
        let failure = loop {
            match list.next().await {
                Ok(Some(page)) => read += page.objects.len(),
                Ok(None) => panic!("{status}: the list is not complete"),
                Err(failure) => break failure,
            }
        };
        let expected: usize = (parents.iter().enumerate())
            .filter(|(index, _)| *index != 1 && *index != 5 && (status == 403 || *index < 5))
            .map(|(_, parent)| world.sim.object_ids(TENANT, &path(parent)).unwrap().len())
            .sum();
        assert_eq!((failure.http_status, read), (Some(500), expected), "{status}");
    }
}

#[tokio::test]
async fn a_pause_is_waited_out_and_never_shortened() {
    for (form, at_least_ms) in [("1", 1_000), ("0.3", 1_000), ("1 seconds", 1_000), ("date:1", 1_000), ("none", 10)] {
        let world = World::start().await;
        world.rule(Rule::status(429, Some(form)).path(PLAIN).times(1));
        let reader = world.reader();
        let started = Instant::now();
        read(&reader, &world.collection(PLAIN)).await.unwrap();
        let (took, usage) = (started.elapsed(), reader.usage());
        assert!(took >= Duration::from_millis(at_least_ms) && took < Duration::from_secs(4), "{form}: {took:?}");
        assert_eq!((usage.graph_requests_count, usage.graph_throttled_count), (2, 1), "{form}");
        assert!(usage.graph_throttle_wait_ms >= i64::try_from(at_least_ms).unwrap(), "{form}");
        assert_eq!(reader.retry_after_s(), None);
    }
}

#[tokio::test]
async fn throttle_waits_end_within_the_budget() {
    let world = World::start().await;
    world.rule(Rule::status(429, Some("7")).path(PLAIN));
    let reader = world.client().reader(TENANT, "default", budget(600, 5));
    let failure = read(&reader, &world.collection(PLAIN)).await.unwrap_err();
    assert_eq!((failure.code, failure.http_status), (ErrorCode::GraphThrottled, Some(429)));
    assert_eq!((reader.retry_after_s(), reader.usage().graph_throttle_wait_ms), (Some(7), 0));

    world.sim.remove_rules(None);
    world.rule(Rule::status(503, Some("7")).path(PLAIN));
    let reader = world.client().reader(TENANT, "default", budget(600, 1));
    let failure = read(&reader, &world.collection(PLAIN)).await.unwrap_err();
    assert_eq!((failure.code, failure.http_status), (ErrorCode::GraphThrottled, Some(503)));
}

#[tokio::test]
async fn broken_responses_are_requested_again_by_the_same_link() {
    let breaks = [
        Action::Truncate { clean: false },
        Action::Truncate { clean: true },
        Action::Drop,
        Action::Status { status: 504, retry_after: None, body: ErrorBody::NestedTwice },
        Action::Status { status: 502, retry_after: None, body: ErrorBody::Default },
        Action::Status { status: 503, retry_after: None, body: ErrorBody::Default },
        Action::Status { status: 500, retry_after: None, body: ErrorBody::Nested },
    ];
    for action in breaks {
        let world = World::start().await;
        world.sim.set_size(Some(TENANT), Some(PLAIN), 60).unwrap();
        let shown = format!("{action:?}");
        world.rule(Rule::new(action).path(PLAIN).page(2).times(2));
        let objects = world.read(PLAIN).await.unwrap_or_else(|failure| panic!("{shown}: {failure:?}"));
        assert_eq!(ids(&objects), ids_of(&world.sim, PLAIN), "{shown}");
        let second_pages = world.sim.requests().iter().filter(|request| request.page == 2).count();
        assert_eq!(second_pages, 3, "{shown}");
    }
}

#[tokio::test]
async fn attempts_are_bounded() {
    for (status, attempts) in [(504, 6), (503, 6), (500, 4), (408, 3), (400, 2), (409, 2), (501, 2), (405, 2)] {
        let world = World::start().await;
        world.rule(Rule::status(status, None).path(PLAIN));
        let failure = world.refused(PLAIN).await;
        assert_eq!(failure.http_status, Some(status));
        assert!(failure.request_id.is_some());
        let requests = world.sim.requests().iter().filter(|request| request.status == status).count();
        assert_eq!(requests, attempts, "{status}");
    }
}

#[tokio::test]
async fn loops_and_foreign_links_end_a_list() {
    for (action, code) in [
        (Action::ForeignLink { host: "evil.example.invalid".to_owned() }, ErrorCode::GraphForeignLink),
        (Action::RepeatLink, ErrorCode::GraphPagingLoop),
        (Action::NoNewIds, ErrorCode::GraphPagingLoop),
        (Action::WrongContent, ErrorCode::GraphBadResponse),
    ] {
        let world = World::start().await;
        world.sim.set_size(Some(TENANT), Some(PLAIN), 60).unwrap();
        let shown = format!("{action:?}");
        world.rule(Rule::new(action).path(PLAIN));
        assert_eq!(world.refused(PLAIN).await.code, code, "{shown}");
    }
    let world = World::with(SimConfig::default(), &[("max_pages", "2")]).await;
    world.sim.set_size(Some(TENANT), Some(PLAIN), 60).unwrap();
    assert_eq!(world.refused(PLAIN).await.code, ErrorCode::GraphPagingLoop);
}

#[tokio::test]
async fn each_refusal_has_its_own_code() {
    for (action, code, tokens) in [
        (Action::Forbidden { permission: None }, ErrorCode::GraphForbidden, 1),
        (Action::NotLicensed, ErrorCode::GraphNotApplicable, 1),
        (Action::UnauthorizedNested, ErrorCode::GraphForbidden, 1),
        (Action::ClaimsChallenge, ErrorCode::GraphUnauthorized, 2),
        (Action::SecretInError { status: None }, ErrorCode::GraphBadRequest, 1),
    ] {
        let world = World::start().await;
        let shown = format!("{action:?}");
        world.rule(Rule::new(action).path(PLAIN));
        let failure = world.refused(PLAIN).await;
        assert_eq!((failure.code, world.tokens()), (code, tokens), "{shown}");
        let kept = serde_json::to_string(&failure).unwrap();
        assert!(!["://", "Bearer", "eyJ", "secret"].into_iter().any(|word| kept.contains(word)), "{kept}");
    }
}

#[tokio::test]
async fn a_404_of_graph_is_an_empty_singleton_and_an_unsupported_list() {
    let world = World::start().await;
    let singleton = "deviceManagement/remoteAssistanceSettings";
    world.rule(Rule::status(404, None));
    assert!(world.read(singleton).await.unwrap().is_empty());
    assert_eq!(world.refused(PLAIN).await.code, ErrorCode::GraphUnsupported);
}

#[tokio::test]
async fn an_unknown_path_is_unsupported() {
    let world = World::start().await;
    let contracts = DEFAULT_CONTRACTS.replace(&format!("\"{PLAIN}\""), "\"deviceManagement/thingsFromTheFuture\"");
    let catalog = Catalog::parse(&contracts).unwrap();
    let unknown = catalog.types().find(|policy_type| policy_type.path.ends_with("FromTheFuture")).unwrap();
    let failure = read(&world.reader(), catalog.collection_of(unknown)).await.unwrap_err();
    assert_eq!((failure.code, failure.http_status), (ErrorCode::GraphUnsupported, Some(400)));
}

#[tokio::test]
async fn a_refused_select_is_dropped_and_remembered() {
    let world = World::start().await;
    world.rule(Rule::new(Action::RefuseSelect { property: None }).path(SHARED));
    let client = world.client();
    let collection = world.collection(SHARED);
    let readers: Vec<GraphReader> = (0..2).map(|_| client.reader(TENANT, "default", budget(30, 20))).collect();
    for reader in &readers {
        assert_eq!(ids(&read(reader, &collection).await.unwrap()), ids_of(&world.sim, SHARED));
    }
    let refused: Vec<i64> = readers.iter().map(|reader| reader.usage().graph_select_refused_count).collect();
    assert_eq!(refused, [1, 0]);
    assert_eq!(world.sim.requests().iter().filter(|request| request.status == 400).count(), 1);
}

#[tokio::test]
async fn a_token_that_expires_within_a_list_is_renewed_once() {
    let world = World::start().await;
    world.sim.set_size(Some(TENANT), Some(PLAIN), 60).unwrap();
    let mut list = pages(&world.reader(), &world.collection(PLAIN));
    assert!(list.next().await.unwrap().is_some());
    world.sim.expire_tokens(None);
    while list.next().await.unwrap().is_some() {}
    assert_eq!(world.tokens(), 2);
}

#[tokio::test]
async fn concurrent_readers_share_one_token_request() {
    let world = World::start().await;
    world.rule(Rule::new(Action::Slow { delay_ms: 100 }).on_token());
    let client = world.client();
    let collection = world.collection(PLAIN);
    let readers: Vec<GraphReader> = (0..20).map(|_| client.reader(TENANT, "default", budget(30, 20))).collect();
    let reads = readers.iter().map(|reader| read(reader, &collection));
    for objects in futures_util::future::join_all(reads).await {
        objects.unwrap();
    }
    assert_eq!(world.tokens(), 1);
}

#[tokio::test]
async fn a_failed_token_request_is_shared_and_keeps_its_aadsts_number() {
    let world = World::with(SimConfig::default(), &[("credentials__default__client_secret", "wrong")]).await;
    let reader = world.reader();
    for _ in 0..5 {
        let failure = read(&reader, &world.collection(PLAIN)).await.unwrap_err();
        assert_eq!(failure.code, ErrorCode::CredentialUnavailable);
        assert_eq!((failure.http_status, failure.graph_code.as_deref()), (Some(401), Some("AADSTS7000215")));
    }
    assert_eq!(world.sim.state().token_requests, 1);
    let stranger = world.client().reader(TENANT, "no-such", budget(30, 20));
    let failure = read(&stranger, &world.collection(PLAIN)).await.unwrap_err();
    assert_eq!(failure, ErrorCode::CredentialUnavailable.into());
}

#[tokio::test]
async fn token_requests_are_retried() {
    let world = World::start().await;
    world.rule(Rule::status(503, None).on_token().times(2));
    world.read(PLAIN).await.unwrap();
    assert_eq!(world.sim.state().token_requests, 3);
}

#[tokio::test]
async fn the_deadline_ends_a_request() {
    let world = World::start().await;
    world.rule(Rule::new(Action::Slow { delay_ms: 60_000 }).path(PLAIN));
    let reader = world.client().reader(TENANT, "default", budget(1, 1));
    let started = Instant::now();
    let failure = read(&reader, &world.collection(PLAIN)).await.unwrap_err();
    assert_eq!(failure.code, ErrorCode::DeadlineExceeded);
    assert!(started.elapsed() < Duration::from_secs(30));
}

#[tokio::test]
async fn the_rate_limiter_does_not_wait_past_the_deadline() {
    let world = World::with(SimConfig::default(), &[("intune_per_20s", "20")]).await;
    world.sim.set_size(Some(TENANT), Some(PLAIN), 25 * 30).unwrap();
    let reader = world.client().reader(TENANT, "default", budget(2, 2));
    let started = Instant::now();
    let failure = read(&reader, &world.collection(PLAIN)).await.unwrap_err();
    assert_eq!(failure.code, ErrorCode::DeadlineExceeded);
    // Thirty pages would take 30 s.
    assert!(started.elapsed() < Duration::from_secs(20), "{:?}", started.elapsed());
    let asked = world.sim.requests().len();
    assert!((1..8).contains(&asked), "requests leave at the rate until then: {asked}");
}

#[tokio::test]
async fn a_503_is_retried_over_another_connection() {
    for (status, other) in [(503, true), (429, false)] {
        let world = World::start().await;
        world.sim.set_size(Some(TENANT), Some(PLAIN), 60).unwrap();
        world.rule(Rule::status(status, Some("1")).path(PLAIN).page(2).times(1));
        world.read(PLAIN).await.unwrap();
        let requests = world.sim.requests();
        let over: Vec<u64> = requests.iter().filter(|request| request.page == 2).map(|r| r.connection).collect();
        assert_eq!((over.len(), over[0] != over[1]), (2, other), "{status}: {requests:?}");
    }
}

#[tokio::test]
async fn a_page_over_the_size_limit_is_rejected() {
    let world = World::with(SimConfig::default(), &[("max_page_bytes", "65536")]).await;
    world.sim.set_size(Some(TENANT), Some(SHARED), 1_000).unwrap();
    assert_eq!(world.refused(SHARED).await.code, ErrorCode::GraphBadResponse);
}

/// Writer that keeps every log line of this thread, and so of a test on one thread.
#[derive(Clone, Default)]
struct Logs(Arc<Mutex<Vec<u8>>>);

impl std::io::Write for Logs {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn logs_contain_ids_but_no_secrets_links_or_texts_of_graph() {
    // Without a global subscriber, other tests could disable the log's call sites for the whole process.
    let _ = tracing::subscriber::set_global_default(tracing_subscriber::registry());
    let logs = Logs::default();
    let writer = logs.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter("debug,inventoryd=trace,azure_core=trace,azure_identity=trace,typespec_client_core=trace")
        .with_ansi(false)
        .with_writer(move || writer.clone())
        .finish();
    let _guard = tracing::subscriber::set_default(subscriber);

    let world = World::start().await;
    world.sim.set_size(Some(TENANT), Some(PLAIN), 60).unwrap();
    world.rule(Rule::new(Action::SecretInError { status: Some(401) }).on_token().times(1));
    world.rule(Rule::new(Action::SecretInError { status: Some(400) }).path(SHARED));
    world.rule(Rule::new(Action::SecretInError { status: Some(429) }).path(PLAIN).page(2).times(1));
    world.rule(Rule::new(Action::ForeignLink { host: "evil.example.invalid".to_owned() }).path(PLAIN).page(3));
    assert_eq!(world.refused(PLAIN).await.code, ErrorCode::CredentialUnavailable);
    assert_eq!(world.refused(SHARED).await.code, ErrorCode::GraphBadRequest);
    assert_eq!(world.refused(PLAIN).await.code, ErrorCode::GraphForeignLink);

    let kind = ("credentials__default__kind", "client_certificate");
    let missing = ("credentials__default__client_certificate_file", "/nowhere/app.pem");
    assert_eq!(World::with(SimConfig::default(), &[kind, missing]).await.refused(PLAIN).await.http_status, None);
    let unreachable = World::with(SimConfig::default(), &[("authority", "https://127.0.0.1:9")]).await;
    assert_eq!(unreachable.refused(PLAIN).await.code, ErrorCode::TokenServiceUnavailable);

    let logs = String::from_utf8(logs.0.lock().clone()).unwrap();
    for reason in ["cannot read /nowhere/app.pem", "127.0.0.1 refused the connection"] {
        assert!(logs.contains(reason), "the local reason of a missing token is in the log: {reason}");
    }
    assert!(logs.contains("client_request_id=") && logs.contains("AADSTS7000215") && logs.contains("status=429"));
    assert!(
        logs.contains("The client secret is wrong.") && logs.contains("not to its id"),
        "cause and cure are in the log"
    );
    for word in ["eyJ", "Bearer", "simulated-secret", "SimSecret", "SimMadeUp", "secret-backend", "skiptoken", "evil"] {
        assert!(!logs.contains(word), "{word} is in the log");
    }
}
