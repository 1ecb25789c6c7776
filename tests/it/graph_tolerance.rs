//! Graph client against responses as customers have met them: gateways, broken pages, refused options, expired tokens.

use inventoryd::domain::failure::{ErrorCode, Failure};
use inventoryd::graph::Page;

use crate::graph_client::{self, PLAIN, TENANT, World, ids, ids_of};
use crate::sim::{Action, ErrorBody, Rule};

const SINGLETON: &str = "deviceManagement/remoteAssistanceSettings";
const PARENTS: &str = "deviceManagement/depOnboardingSettings";
const CHILDREN: &str = "deviceManagement/depOnboardingSettings/{parent_id}/enrollmentProfiles";
const HTML: &str = "<html><body><h1>404 Not Found</h1></body></html>";

fn body(status: u16, text: &str) -> Rule {
    Rule::new(Action::Status { status, retry_after: None, body: ErrorBody::Literal(text.to_owned()) })
}

async fn with_pages(path: &str) -> World {
    let world = World::start().await;
    world.sim.set_size(Some(TENANT), Some(path), 60).unwrap();
    world
}

/// Every page of a list, and the failure that ended it, if any.
async fn pages(world: &World, path: &str) -> (Vec<Page>, Option<Failure>) {
    let mut pages = graph_client::pages(&world.reader(), &world.collection(path));
    let mut read = Vec::new();
    loop {
        match pages.next().await {
            Ok(Some(page)) => read.push(page),
            Ok(None) => return (read, None),
            Err(failure) => return (read, Some(failure)),
        }
    }
}

fn requests(world: &World, path: &str) -> usize {
    world.sim.requests().iter().filter(|request| request.path.ends_with(path)).count()
}

#[tokio::test]
async fn a_404_of_a_gateway_proves_no_absence() {
    let parent_gone = |world: &World| {
        let id = world.sim.object_ids(TENANT, PARENTS).unwrap()[0].clone();
        CHILDREN.replace("{parent_id}", &id)
    };
    for text in [HTML, "", "{}", r#"{"message":"no Route matched"}"#] {
        let world = World::start().await;
        world.rule(body(404, text).path(SINGLETON));
        world.rule(body(404, text).path(PLAIN));
        world.rule(body(404, text).path(&parent_gone(&world)));
        for path in [SINGLETON, PLAIN] {
            let failure = world.refused(path).await;
            assert_eq!((failure.code, failure.http_status), (ErrorCode::GraphBadResponse, Some(404)), "{path} {text}");
        }
        let (read, failure) = pages(&world, CHILDREN).await;
        assert_eq!(failure.unwrap().code, ErrorCode::GraphBadResponse, "{text}");
        assert!(!read.is_empty(), "the children of other parents are read");
    }
}

#[tokio::test]
async fn a_404_of_graph_proves_absence() {
    let world = World::start().await;
    let parents = world.sim.object_ids(TENANT, PARENTS).unwrap();
    world.rule(Rule::status(404, None).path(SINGLETON));
    world.rule(Rule::status(404, None).path(&CHILDREN.replace("{parent_id}", &parents[0])));
    assert!(world.read(SINGLETON).await.unwrap().is_empty());
    assert!(!world.read(CHILDREN).await.unwrap().is_empty());
}

#[tokio::test]
async fn a_204_is_an_absent_singleton_and_a_bad_list() {
    let world = World::start().await;
    world.rule(body(204, "").path(SINGLETON));
    world.rule(body(204, "").path(PLAIN));
    assert!(world.read(SINGLETON).await.unwrap().is_empty());
    assert_eq!(world.refused(PLAIN).await.code, ErrorCode::GraphBadResponse);
}

#[tokio::test]
async fn an_error_in_a_200_keeps_its_code_and_is_never_data() {
    let error = r#"{"error":{"code":"InternalServerError","message":"x"}}"#;
    for text in [error.to_owned(), format!(r#"{{"value":[{{"id":"1"}}],{}"#, &error[1..])] {
        let world = World::start().await;
        world.rule(body(200, &text));
        for path in [SINGLETON, PLAIN] {
            let failure = world.refused(path).await;
            assert_eq!(failure.code, ErrorCode::GraphBadResponse);
            assert_eq!(failure.graph_code.as_deref(), Some("InternalServerError"), "{path} {text}");
        }
    }
}

#[tokio::test]
async fn a_200_that_breaks_off_in_its_middle_is_retried() {
    for text in [HTML, r#"{"error":{"code":"InternalServerError","message":"x"}}"#, "\0\0\0"] {
        let world = with_pages(PLAIN).await;
        world.rule(Rule::new(Action::BreakOff { text: text.to_owned() }).path(PLAIN).page(2).times(2));
        assert_eq!(ids(&world.read(PLAIN).await.unwrap()), ids_of(&world.sim, PLAIN), "{text}");
    }
    let world = with_pages(PLAIN).await;
    world.rule(Rule::new(Action::WrongContent).path(PLAIN).page(2));
    assert_eq!(world.refused(PLAIN).await.code, ErrorCode::GraphBadResponse);
    assert_eq!(world.sim.requests().iter().filter(|request| request.page == 2).count(), 3, "retries are bounded");
}

#[tokio::test]
async fn refused_query_options_are_dropped_one_after_the_other_and_remembered() {
    let path = "deviceManagement/configurationPolicies";
    for (option, status, code, refused) in [
        ("$select", 500, "InternalServerError", 3),
        ("$select", 501, "NotImplemented", 1),
        ("$select", 400, "BadRequest", 1),
        ("$top", 400, "BadRequest", 2),
        ("$top", 500, "UnknownError", 4),
    ] {
        let world = World::start().await;
        assert!(world.collection(path).top.is_some() || option == "$select", "the list has both options");
        let action = Action::RefuseOption { option: option.to_owned(), status, code: code.to_owned() };
        world.rule(Rule::new(action).path(path));
        let client = world.client();
        let mut counts = Vec::new();
        for _ in 0..2 {
            let reader = client.reader(TENANT, "default", crate::graph_client::budget(30, 20));
            let objects = crate::graph_client::read(&reader, &world.collection(path)).await.unwrap();
            assert_eq!(ids(&objects), ids_of(&world.sim, path), "{option} {status}");
            counts.push(reader.usage().graph_select_refused_count);
        }
        assert_eq!(counts, [1, 0], "{option} {status}: remembered and counted once");
        let failed = world.sim.requests().iter().filter(|request| request.status == status).count();
        assert_eq!(failed, refused, "{option} {status}");
    }
}

#[tokio::test]
async fn the_response_without_options_counts() {
    let world = World::start().await;
    let action = Action::RefuseOption { option: "$select".to_owned(), status: 400, code: "BadRequest".to_owned() };
    world.rule(Rule::new(action).path(SINGLETON).times(1));
    world.rule(Rule::status(404, None).path(SINGLETON));
    assert!(world.read(SINGLETON).await.unwrap().is_empty(), "the 404 of the second request proves absence");
}

#[tokio::test]
async fn an_expired_page_token_restarts_the_list() {
    let expired = r#"{"error":{"code":"Directory_ExpiredPageToken","message":"The page token has expired."}}"#;
    let world = with_pages(PLAIN).await;
    world.rule(body(400, expired).path(PLAIN).page(3).times(2));
    let objects = world.read(PLAIN).await.unwrap();
    assert_eq!(ids(&objects), ids_of(&world.sim, PLAIN));
    assert_eq!(objects.iter().filter(|object| object.first_sight).count(), 60, "repeated objects are not new");
    assert_eq!(world.sim.requests().iter().filter(|request| request.page == 1 && request.method == "GET").count(), 3);

    let world = with_pages(PLAIN).await;
    world.rule(body(400, expired).path(PLAIN).page(3));
    let failure = world.refused(PLAIN).await;
    assert_eq!(failure.graph_code.as_deref(), Some("Directory_ExpiredPageToken"));
    assert_eq!(world.sim.requests().iter().filter(|request| request.page == 3).count(), 3, "restarts are bounded");
}

#[tokio::test]
async fn a_503_without_retry_after_does_not_pause_the_tenant() {
    let world = World::start().await;
    world.rule(Rule::status(503, None).path(PLAIN));
    let client = world.client();
    let mut notices = client.pause_notices();
    let reader = client.reader(TENANT, "default", crate::graph_client::budget(30, 20));
    let failure = crate::graph_client::read(&reader, &world.collection(PLAIN)).await.unwrap_err();
    assert_eq!((failure.code, failure.http_status), (ErrorCode::GraphUnavailable, Some(503)));
    assert_eq!(reader.usage().graph_throttled_count, 0);
    assert!(notices.try_recv().is_err(), "other lists of the tenant go on");

    world.rule(Rule::status(503, Some("1")).path("deviceManagement/deviceCategories").times(1));
    crate::graph_client::read(&reader, &world.collection("deviceManagement/deviceCategories")).await.unwrap();
    assert_eq!(notices.try_recv().unwrap().family, "intune");
}

#[tokio::test]
async fn a_byte_order_mark_is_ignored_before_every_body() {
    let mark = || Action::Prefix { bytes: b"\xEF\xBB\xBF".to_vec() };
    let world = with_pages(PLAIN).await;
    world.rule(Rule::new(mark()).path(PLAIN));
    assert_eq!(ids(&world.read(PLAIN).await.unwrap()), ids_of(&world.sim, PLAIN));
    world.rule(body(400, "\u{feff}{\"error\":{\"code\":\"Quirk\",\"message\":\"\"}}").path(SINGLETON));
    assert_eq!(world.refused(SINGLETON).await.graph_code.as_deref(), Some("Quirk"));
}

#[tokio::test]
async fn an_empty_next_link_is_the_end() {
    let world = World::start().await;
    world.rule(body(200, r#"{"value":[{"id":"1"}],"@odata.nextLink":""}"#).path(PLAIN));
    assert_eq!(world.read(PLAIN).await.unwrap().len(), 1);
    assert_eq!(requests(&world, PLAIN), 1);
}

#[tokio::test]
async fn a_repeated_retry_after_is_read_once() {
    let world = World::start().await;
    world.rule(Rule::status(429, Some("1, 1")).path(PLAIN).times(1));
    let client = world.client();
    let mut notices = client.pause_notices();
    let reader = client.reader(TENANT, "default", crate::graph_client::budget(30, 20));
    crate::graph_client::read(&reader, &world.collection(PLAIN)).await.unwrap();
    assert_eq!(notices.try_recv().unwrap().duration.as_secs(), 1);
}

#[tokio::test]
async fn a_parent_whose_children_are_refused_does_not_stop_its_siblings() {
    let world = World::start().await;
    let parents = world.sim.object_ids(TENANT, PARENTS).unwrap();
    let forbidden = Rule::new(Action::Forbidden { permission: None });
    world.rule(forbidden.path(&CHILDREN.replace("{parent_id}", &parents[0])));
    let (read, failure) = pages(&world, CHILDREN).await;
    assert_eq!(failure.unwrap().code, ErrorCode::GraphForbidden, "the listing is not complete");
    let objects: usize = read.iter().map(|page| page.objects.len()).sum();
    let expected: usize = parents[1..]
        .iter()
        .map(|id| world.sim.object_ids(TENANT, &CHILDREN.replace("{parent_id}", id)).unwrap().len())
        .sum();
    assert_eq!(objects, expected);
}

#[tokio::test]
async fn parents_that_all_refuse_are_not_all_requested() {
    let world = World::start().await;
    world.sim.set_size(Some(TENANT), Some(PARENTS), 60).unwrap();
    for parent in world.sim.object_ids(TENANT, PARENTS).unwrap() {
        let forbidden = Rule::new(Action::Forbidden { permission: None });
        world.rule(forbidden.path(&CHILDREN.replace("{parent_id}", &parent)));
    }
    assert_eq!(world.refused(CHILDREN).await.code, ErrorCode::GraphForbidden);
    // Ten in a row are one too few; those after the eleventh were requested together with it.
    let requested = requests(&world, "/enrollmentProfiles");
    assert!((11..=18).contains(&requested), "{requested}");
}

#[tokio::test]
async fn parent_ids_that_would_change_the_path_are_not_requested() {
    for id in [".", "..", ""] {
        let world = World::start().await;
        let object = serde_json::json!({ "id": id, "displayName": "x" });
        world.rule(Rule::new(Action::ExtraObject { object }).path(PARENTS).times(1));
        let (read, failure) = pages(&world, CHILDREN).await;
        assert_eq!(failure.unwrap().code, ErrorCode::GraphBadResponse, "the listing is not complete: {id:?}");
        assert!(!read.is_empty(), "the children of other parents are read");
        let stray =
            ["deviceManagement/enrollmentProfiles", "deviceManagement/depOnboardingSettings/enrollmentProfiles"];
        for path in stray {
            assert_eq!(requests(&world, path), 0, "{id:?}");
        }
    }
}

#[tokio::test]
async fn one_bad_byte_or_control_character_costs_one_object() {
    for bytes in [vec![0xFF], vec![0], vec![b'\n'], vec![0xED, 0xA0, 0x80]] {
        let world = World::start().await;
        let after = r#""displayName":""#.to_owned();
        world.rule(Rule::new(Action::Insert { after, bytes: bytes.clone() }).path(PLAIN));
        let (read, failure) = pages(&world, PLAIN).await;
        assert_eq!(failure, None, "{bytes:?}");
        assert_eq!((read[0].objects.len(), read[0].bad_objects), (11, 1), "{bytes:?}");
    }
}

#[tokio::test]
async fn a_relative_next_link_is_followed_on_the_same_host() {
    let list = "deviceManagement/roleScopeTags";
    for link in ["roleScopeTags?$skiptoken=a%2Fb", "/beta/deviceManagement/roleScopeTags?$skiptoken=a%2Fb"] {
        let world = World::start().await;
        let first = format!(r#"{{"value":[{{"id":"1"}}],"@odata.nextLink":"{link}"}}"#);
        world.rule(body(200, &first).path(PLAIN).times(1));
        world.rule(body(200, r#"{"value":[{"id":"2"}],"@odata.nextLink":" "}"#).path(PLAIN));
        assert_eq!(world.read(PLAIN).await.unwrap().len(), 2, "{link}");
        let requests = world.sim.requests();
        let last = requests.last().unwrap();
        assert!(last.path.ends_with(list) && last.query.starts_with("$skiptoken="), "{last:?}");
    }
}

#[tokio::test]
async fn an_odata_3_error_is_an_error_of_graph() {
    let absent = r#"{"odata.error":{"code":"Request_ResourceNotFound","message":{"lang":"en","value":"x"}}}"#;
    let world = World::start().await;
    world.rule(body(404, absent).path(SINGLETON));
    assert!(world.read(SINGLETON).await.unwrap().is_empty());
}

#[tokio::test]
async fn pages_of_other_shapes_are_never_complete() {
    let deep = format!(r#"{{"value":[{{"id":"1","description":{}1{}}}]}}"#, "[".repeat(5_000), "]".repeat(5_000));
    let page = r#"{"value":[{"id":"1"}]}"#;
    for text in [
        r#"{"d":{"results":[{"id":"1"}]}}"#.to_owned(),
        r#"[{"id":"1"}]"#.to_owned(),
        format!("{page}{page}"),
        format!("{page}\0\0\0\0"),
        r#"{"value":[{"id":"1"}],"value":[]}"#.to_owned(),
        r#"{"value":"{\"id\":\"1\"}"}"#.to_owned(),
        r#"{"value":[{"id":"1"}],"@odata.nextLink":7}"#.to_owned(),
        format!(")]}}',\n{page}"),
    ] {
        let world = World::start().await;
        world.rule(body(200, &text).path(PLAIN));
        assert_eq!(world.refused(PLAIN).await.code, ErrorCode::GraphBadResponse, "{text}");
    }
    let world = World::start().await;
    world.rule(body(200, &deep).path(PLAIN));
    assert_eq!(world.read(PLAIN).await.unwrap().len(), 1, "nesting alone damages no object");
}
