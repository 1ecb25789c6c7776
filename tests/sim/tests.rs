//! Tests of the simulator over HTTPS.

use std::time::Duration;

use reqwest::{Client, RequestBuilder, Response};
use serde_json::{Value, json};
use uuid::Uuid;

use super::fixtures::{Catalog, Fixtures};
use super::select::Select;
use super::*;

const TENANT: Uuid = Uuid::from_u128(0x6a5b_1a3e_3e24_4d1c_9d7b_0c3f_1a2b_3c4d);
const OTHER: Uuid = Uuid::from_u128(0x6a5b_1a3e_3e24_4d1c_9d7b_0c3f_1a2b_3c4e);
const RINGS: &str = "beta/deviceManagement/deviceConfigurations";

fn fixtures() -> Fixtures {
    let profile = |kind: &str, number: u32, own: &str| {
        json!({
            "@odata.type": format!("#microsoft.graph.{kind}"),
            "id": format!("2c8a0f1e-5b5d-4c46-9d0d-0d1f5a7c{number:04x}"),
            "displayName": format!("A \"{kind}\""),
            "description": "text",
            "lastModifiedDateTime": "2024-02-01T00:00:00Z",
            own: "secret",
        })
    };
    Fixtures::Inline(vec![
        json!({"collection": RINGS, "shape": "collection",
            "objects": [profile("iosGeneral", 1, "iosOnly"), profile("windowsGeneral", 2, "windowsOnly")]}),
        json!({"collection": RINGS, "shape": "collection", "objects": [profile("ring", 3, "ringOnly")]}),
        json!({"collection": "beta/deviceManagement/roleScopeTags", "shape": "collection",
            "objects": [{"id": "0", "displayName": "Default"}]}),
        json!({"collection": "v1.0/deviceManagement/settings", "shape": "singleton",
            "objects": [{"secureByDefault": true}]}),
        json!({"collection": "v1.0/organization/{parent_id}/branding/localizations", "shape": "child_collection",
            "objects": [{"id": "de-DE", "signInPageText": "Hallo"}]}),
    ])
}

async fn start(objects: u32) -> (Sim, Client) {
    let sizes = Sizes { default: objects, ..Sizes::default() };
    let sim = Sim::start(SimConfig { sizes, fixtures: fixtures(), ..SimConfig::default() }).await.expect("starts");
    // Another test of this process may have installed it.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let ca = reqwest::Certificate::from_pem(sim.ca_pem().as_bytes()).expect("its own CA is PEM");
    let client = Client::builder().tls_certs_only([ca]).timeout(Duration::from_secs(20)).build().expect("builds");
    (sim, client)
}

async fn token(sim: &Sim, client: &Client, tenant: Uuid) -> String {
    let config = SimConfig::default();
    let scope = format!("{}/.default", sim.base_url());
    let form = url::form_urlencoded::Serializer::new(String::new())
        .append_pair("grant_type", "client_credentials")
        .append_pair("client_id", &config.client_id)
        .append_pair("client_secret", &config.client_secret)
        .append_pair("scope", &scope)
        .finish();
    let url = format!("{}/{tenant}/oauth2/v2.0/token", sim.base_url());
    let answer = client.post(url).header("content-type", "application/x-www-form-urlencoded").body(form).send().await;
    let body = json_of(answer.expect("answers")).await;
    body["access_token"].as_str().expect("a token").to_owned()
}

async fn json_of(response: Response) -> Value {
    serde_json::from_slice(&response.bytes().await.expect("whole")).expect("JSON")
}

fn get(client: &Client, token: &str, url: &str) -> RequestBuilder {
    client.get(url).bearer_auth(token)
}

async fn read(client: &Client, token: &str, url: &str) -> (u16, Value) {
    let response = get(client, token, url).send().await.expect("answers");
    (response.status().as_u16(), json_of(response).await)
}

/// Follows a listing to its end and returns the ids of each page.
async fn follow(client: &Client, token: &str, url: &str) -> Vec<Vec<String>> {
    let (mut pages, mut next) = (Vec::new(), Some(url.to_owned()));
    while let Some(url) = next {
        let (status, body) = read(client, token, &url).await;
        assert_eq!(status, 200, "{body}");
        let items = body["value"].as_array().expect("a list");
        assert_eq!(body["@odata.count"], items.len());
        pages.push(items.iter().map(|item| item["id"].as_str().unwrap_or_default().to_owned()).collect());
        next = body["@odata.nextLink"].as_str().map(str::to_owned);
        assert!(pages.len() < 100, "the listing has no end");
    }
    pages
}

#[tokio::test]
async fn a_listing_gives_every_object_once_whatever_the_page_size() {
    let (sim, client) = start(60).await;
    let token = token(&sim, &client, TENANT).await;
    let expected = sim.object_ids(TENANT, RINGS).expect("known");
    for (query, pages) in [("", 3), ("?$top=7", 9), ("?$top=60&$select=id", 1), ("?%24top=59", 2)] {
        let found = follow(&client, &token, &format!("{}/{RINGS}{query}", sim.base_url())).await;
        assert_eq!(found.len(), pages, "{query}");
        assert_eq!(found.concat(), expected, "{query}");
    }
    assert_eq!(sim.state().tenants[&TENANT].objects, 4 * 60);
}

#[tokio::test]
async fn deletions_between_pages_neither_skip_nor_repeat() {
    let (sim, client) = start(30).await;
    let token = token(&sim, &client, TENANT).await;
    let (_, first) = read(&client, &token, &format!("{}/{RINGS}?$top=10", sim.base_url())).await;
    let gone = sim.delete_objects(TENANT, RINGS, Which::Count(5)).expect("deletes");
    let renamed = sim.rename_object(TENANT, RINGS, Which::Index(12), "New \"name\"").expect("renames");
    let added = sim.add_objects(TENANT, RINGS, 2).expect("adds");
    let rest = follow(&client, &token, first["@odata.nextLink"].as_str().expect("more")).await.concat();
    assert_eq!(rest.len(), 22);
    assert!(rest.contains(&renamed) && added.iter().all(|id| rest.contains(id)));
    let now = sim.objects(TENANT, RINGS).expect("known");
    assert_eq!(now.len(), 27);
    assert!(now.iter().all(|object| !gone.contains(&object["id"].as_str().unwrap_or_default().to_owned())));
    assert!(now.iter().any(|object| object["displayName"] == "New \"name\"" && object["id"] == renamed.as_str()));
    assert_eq!(sim.object_ids(OTHER, RINGS).expect("known").len(), 30);
}

#[tokio::test]
async fn links_and_tokens_of_another_tenant_are_refused() {
    let (sim, client) = start(30).await;
    let (mine, theirs) = (token(&sim, &client, TENANT).await, token(&sim, &client, OTHER).await);
    let url = format!("{}/{RINGS}", sim.base_url());
    let (_, page) = read(&client, &mine, &url).await;
    let link = page["@odata.nextLink"].as_str().expect("more");
    assert!(link.contains("$skiptoken=%255Bcosmosdb%255D"), "{link}");
    assert_eq!(read(&client, &theirs, link).await.0, 400);
    assert_eq!(read(&client, &mine, &link.replace("%255B", "%5B")).await.0, 400);
    assert_eq!(read(&client, "foreign", &url).await.1["error"]["code"], "InvalidAuthenticationToken");
    sim.expire_tokens(Some(TENANT));
    assert_eq!(read(&client, &mine, link).await.0, 401);
    assert_eq!(read(&client, &theirs, &url).await.0, 200);
    let logged = sim.requests();
    assert!(logged.iter().all(|record| !record.query.contains("cosmosdb")));
}

#[tokio::test]
async fn other_methods_are_refused_and_counted() {
    let (sim, client) = start(1).await;
    let token = token(&sim, &client, TENANT).await;
    let url = format!("{}/{RINGS}", sim.base_url());
    for request in [client.post(&url), client.delete(&url), client.head(&url)] {
        let status = request.bearer_auth(&token).send().await.expect("answers").status();
        assert_eq!(status.as_u16(), 405);
    }
    assert_eq!(sim.state().non_get, 3);
}

#[test]
fn select_keeps_id_and_type_and_refuses_what_no_object_has() {
    let catalog = Catalog::load(&fixtures()).expect("loads");
    let (found, _) = catalog.find_loosely("deviceManagement/deviceConfigurations").expect("known");
    let collection = &catalog.collections()[found];
    assert_eq!(collection.templates.len(), 3);
    let ios = collection.templates[0].object();
    let select = Select::parse("displayName,microsoft.graph.ring/ringOnly", collection).expect("reads");
    let keys = |object: &serde_json::Map<String, Value>| object.keys().cloned().collect::<Vec<_>>().join(" ");
    assert_eq!(keys(&select.apply(ios)), "@odata.type displayName id");
    assert_eq!(keys(&select.apply(collection.templates[2].object())), "@odata.type displayName id ringOnly");
    let refusal = Select::parse("id,nope", collection).expect_err("unknown").0;
    let said = "Could not find a property named 'nope' on type 'microsoft.graph.deviceConfiguration'.";
    assert!(refusal.ends_with(said), "{refusal}");
    assert!(Select::parse("microsoft.graph.ring/iosOnly", collection).is_err());
}

#[tokio::test]
async fn paths_answer_by_their_shape() {
    let (sim, client) = start(3).await;
    let token = token(&sim, &client, TENANT).await;
    let base = sim.base_url();
    let (_, tags) = read(&client, &token, &format!("{base}/beta/deviceManagement/roleScopeTags")).await;
    assert_eq!(tags["value"][2]["id"], "2");
    assert!(tags["value"][0].get("@odata.type").is_none());
    let (_, settings) = read(&client, &token, &format!("{base}/v1.0/deviceManagement/settings")).await;
    assert_eq!(settings["secureByDefault"], true);
    let (_, parents) = read(&client, &token, &format!("{base}/v1.0/organization")).await;
    assert_eq!(parents["value"].as_array().map(Vec::len), Some(1));
    let child = |parent: &str| format!("{base}/v1.0/organization/{parent}/branding/localizations");
    let (one, two) = (follow(&client, &token, &child("a")).await, follow(&client, &token, &child("b")).await);
    assert!(one.concat().iter().all(|id| !two.concat().contains(id)));
    let (status, body) = read(&client, &token, &format!("{base}/beta/deviceManagement/nope")).await;
    assert_eq!((status, &body["error"]["message"]), (400, &json!("Resource not found for the segment 'nope'.")));
    let id = &sim.object_ids(TENANT, RINGS).expect("known")[1];
    assert_eq!(read(&client, &token, &format!("{base}/{RINGS}/{id}")).await.1["id"], id.as_str());
    sim.set_size(None, Some("deviceManagement/settings"), 0).expect("known");
    assert_eq!(read(&client, &token, &format!("{base}/v1.0/deviceManagement/settings")).await.0, 404);
}

#[tokio::test]
async fn rules_strike_when_and_where_they_say() {
    let (sim, client) = start(60).await;
    let token = token(&sim, &client, TENANT).await;
    let url = format!("{}/{RINGS}", sim.base_url());
    sim.add_rule(Rule::status(429, Some("0.5")).path("deviceManagement/deviceConfigurations").times(1));
    sim.add_rule(Rule::status(503, None).nth(2).tenant(TENANT));
    sim.add_rule(Rule::status(504, None).tenant(OTHER));
    sim.add_rule(Rule::new(Action::EmptyPage).page(2).times(1));
    let first = get(&client, &token, &url).send().await.expect("answers");
    assert_eq!((first.status().as_u16(), first.headers()["retry-after"].to_str().ok()), (429, Some("0.5")));
    assert_eq!(read(&client, &token, &url).await.0, 503);
    let pages = follow(&client, &token, &url).await;
    assert_eq!(pages.iter().map(Vec::len).collect::<Vec<_>>(), [25, 0, 25, 10]);
    assert_eq!(sim.rules().iter().map(|rule| rule.fired).collect::<Vec<_>>(), [1, 1, 0, 1]);
    assert_eq!(sim.remove_rules(None), 4);
    sim.add_rule(Rule::new(Action::NotLicensed).every(3));
    let mut statuses = Vec::new();
    for _ in 0..6 {
        statuses.push(read(&client, &token, &url).await.0);
    }
    assert_eq!(statuses, [200, 200, 400, 200, 200, 400]);
    assert_eq!(sim.state().tenants[&TENANT].throttled, 1);
}

#[tokio::test]
async fn broken_answers_are_broken_as_announced() {
    let (sim, client) = start(60).await;
    let token = token(&sim, &client, TENANT).await;
    let url = format!("{}/{RINGS}", sim.base_url());
    sim.add_rule(Rule::new(Action::Drop).times(1));
    sim.add_rule(Rule::new(Action::Truncate { clean: false }).times(1));
    sim.add_rule(Rule::new(Action::Truncate { clean: true }).times(1));
    assert!(get(&client, &token, &url).send().await.is_err());
    assert!(get(&client, &token, &url).send().await.expect("begins").bytes().await.is_err());
    let half = get(&client, &token, &url).send().await.expect("begins").bytes().await.expect("ends");
    assert!(serde_json::from_slice::<Value>(&half).is_err());
    assert_eq!(read(&client, &token, &url).await.0, 200);
    assert_eq!(sim.requests().iter().map(|record| record.status).collect::<Vec<_>>(), [200, 0, 200, 200, 200]);
}

#[tokio::test]
async fn links_can_lead_nowhere_round_and_away() {
    let (sim, client) = start(60).await;
    let token = token(&sim, &client, TENANT).await;
    let url = format!("{}/{RINGS}?$top=20", sim.base_url());
    let link_under = async |action: Action| {
        let rule = sim.add_rule(Rule::new(action));
        let (_, body) = read(&client, &token, &url).await;
        sim.remove_rules(Some(rule));
        (body["@odata.nextLink"].as_str().unwrap_or_default().to_owned(), body)
    };
    assert_eq!(link_under(Action::RepeatLink).await.0, url);
    let (foreign, _) = link_under(Action::ForeignLink { host: "evil.example".into() }).await;
    assert!(foreign.starts_with("https://evil.example/beta/"), "{foreign}");
    let (link, body) = link_under(Action::NoNewIds).await;
    sim.add_rule(Rule::new(Action::NoNewIds));
    let (_, again) = read(&client, &token, &link).await;
    assert_eq!(again["value"], body["value"]);
    assert_ne!(again["@odata.nextLink"], body["@odata.nextLink"]);
    sim.remove_rules(None);
    sim.add_rule(Rule::new(Action::DuplicateIds { count: 2 }).page(2));
    let pages = follow(&client, &token, &url).await;
    assert_eq!(pages[1][..2], pages[0][18..]);
    assert_eq!(pages.iter().map(Vec::len).collect::<Vec<_>>(), [20, 22, 20]);
}

#[tokio::test]
async fn the_same_seed_is_the_same_world() {
    let ((one, client), (two, _)) = (start(12).await, start(12).await);
    assert_eq!(one.objects(TENANT, RINGS), two.objects(TENANT, RINGS));
    assert_ne!(one.object_ids(TENANT, RINGS), one.object_ids(OTHER, RINGS));
    let token = token(&one, &client, TENANT).await;
    let (_, body) = read(&client, &token, &format!("{}/{RINGS}", one.base_url())).await;
    assert_eq!(body["value"].as_array(), one.objects(TENANT, RINGS).ok().as_ref());
    let draw = |sim: &Sim| {
        let probe = rules::Probe { on: Endpoint::Graph, tenant: Some(TENANT), path: RINGS, page: 1 };
        sim.add_rule(Rule::status(500, None).probability(0.3));
        (0..1_000).filter(|_| sim.rules.strike(&probe).1.is_some()).collect::<Vec<_>>()
    };
    let struck = draw(&one);
    assert_eq!(struck, draw(&two));
    assert!((250..350).contains(&struck.len()), "{}", struck.len());
}

#[tokio::test]
async fn the_remote_control_does_what_the_handle_does() {
    let (sim, client) = start(12).await;
    let post = async |path: &str, body: Value| {
        let request =
            client.post(format!("{}/admin/{path}", sim.base_url())).header("content-type", "application/json");
        let response = request.body(body.to_string()).send().await.expect("answers");
        (response.status().as_u16(), json_of(response).await)
    };
    let (_, deleted) = post("objects/delete", json!({"tenant": TENANT, "collection": RINGS, "count": 2})).await;
    assert_eq!(deleted["deleted"].as_array().map(Vec::len), Some(2));
    assert_eq!(sim.object_ids(TENANT, RINGS).map(|ids| ids.len()), Ok(10));
    let rule = json!({"page": 2, "action": {"kind": "status", "status": 429, "retry_after": "2"}});
    assert_eq!(post("rules", rule).await.0, 200);
    assert_eq!(sim.rules()[0].rule, Rule::status(429, Some("2")).page(2));
    let (status, refused) = post("rules", json!({"action": {"kind": "explode"}})).await;
    assert!(status == 400 && refused["error"].as_str().is_some_and(|text| text.contains("explode")), "{refused}");
    assert_eq!(post("size", json!({"tenant": null, "collection": null, "count": 40})).await.0, 200);
    assert_eq!(sim.object_ids(TENANT, RINGS).map(|ids| ids.len()), Ok(40));
    assert_eq!(post("limits", json!({"intune": 5})).await.0, 200);
    assert_eq!(sim.limits().map(|limits| (limits.intune, limits.window_ms)), Some((5, 20_000)));
    assert_eq!(post("objects/add", json!({"tenant": TENANT, "collection": "nope", "count": 1})).await.0, 400);
}
