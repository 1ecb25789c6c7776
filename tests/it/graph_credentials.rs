//! Every kind of credential against the token endpoint of the simulator, and the probes of an administrator.

use std::path::Path;
use std::time::{Duration, Instant};

use inventoryd::domain::failure::ErrorCode;

use crate::graph_client::{PLAIN, TENANT, World, pages, read, temporary_file};
use crate::sim::{Action, ErrorBody, Rule, SimConfig};

const CERTIFICATE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/credentials/application.pem");
/// `{"alg":"RS256"}` and `{"aud":"a","iss":"b","sub":"b","exp":9999999999}`: a token as another issuer would give it.
const FEDERATED: &str = "eyJhbGciOiJSUzI1NiJ9.eyJhdWQiOiJhIiwiaXNzIjoiYiIsInN1YiI6ImIiLCJleHAiOjk5OTk5OTk5OTl9.c2ln";

/// Outage that only the number tells from a rejected credential.
const TRANSIENT: &str = r#"{"error":"temporarily_unavailable","error_description":"AADSTS90033: A transient error."}"#;

async fn with(settings: &[(&str, &str)]) -> World {
    World::with(SimConfig::default(), settings).await
}

#[tokio::test]
async fn a_certificate_gets_a_token() {
    let world = with(&[
        ("credentials__default__kind", "client_certificate"),
        ("credentials__default__client_certificate_file", CERTIFICATE),
    ])
    .await;
    assert!(!world.read(PLAIN).await.unwrap().is_empty());
    assert_eq!(world.tokens(), 1);
}

#[tokio::test]
async fn a_pkcs12_file_gets_a_token_and_its_problems_are_named_without_a_network() {
    let pfx = CERTIFICATE.replace(".pem", ".pfx");
    let password = temporary_file("password", "fixture-password\n");
    let kind = ("credentials__default__kind", "client_certificate");
    let file = ("credentials__default__client_certificate_file", pfx.as_str());
    let by_file = ("credentials__default__client_certificate_password_file", password.to_str().unwrap());
    let by_value = ("credentials__default__client_certificate_password", "fixture-password");
    for secret in [by_file, by_value] {
        let world = with(&[kind, file, secret]).await;
        assert!(!world.read(PLAIN).await.unwrap().is_empty());
        assert_eq!(world.client().credential_problems(), [""; 0]);
    }
    std::fs::remove_file(&password).unwrap();
    let wrong = with(&[kind, file, ("credentials__default__client_certificate_password", "hunter2")]).await;
    let without = with(&[kind, file]).await;
    for (world, problem) in [(wrong, "the password is wrong"), (without, "set client_certificate_password")] {
        let problems = world.client().credential_problems();
        assert!(problems.len() == 1 && problems[0].contains(problem), "{problems:?}");
        assert!(!problems[0].contains("hunter2"), "{problems:?}");
        assert_eq!(world.sim.state().token_requests, 0);
    }
}

#[tokio::test]
async fn a_federated_token_is_read_again_for_every_request() {
    let file = temporary_file("federated.jwt", FEDERATED);
    let settings = [
        ("credentials__default__kind", "workload_identity"),
        ("credentials__default__token_file", file.to_str().unwrap()),
    ];
    let world = with(&settings).await;
    let (reader, collection) = (world.reader(), world.collection(PLAIN));
    assert!(pages(&reader, &collection).next().await.unwrap().is_some());
    std::fs::write(&file, "no token any more").unwrap();
    world.sim.expire_tokens(None);
    let failure = pages(&reader, &collection).next().await.unwrap_err();
    assert_eq!(failure.code, ErrorCode::CredentialUnavailable);
    assert_eq!(failure.graph_code.as_deref(), Some("AADSTS50027"));
    std::fs::remove_file(&file).unwrap();
}

#[tokio::test]
async fn a_replaced_secret_file_is_used_without_a_restart() {
    let file = temporary_file("secret", "expired");
    let world = with(&[("credentials__default__client_secret_file", file.to_str().unwrap())]).await;
    let (reader, collection) = (world.reader(), world.collection(PLAIN));
    assert_eq!(pages(&reader, &collection).next().await.unwrap_err().code, ErrorCode::CredentialUnavailable);
    std::fs::write(&file, SimConfig::default().client_secret + "\n").unwrap();
    let begun = Instant::now();
    while pages(&reader, &collection).next().await.is_err() {
        assert!(begun.elapsed() < Duration::from_secs(20), "the new secret was not taken up");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    std::fs::remove_file(&file).unwrap();
}

#[tokio::test]
async fn unreadable_files_make_a_credential_unavailable() {
    let missing = Path::new("/nowhere/app.pem").to_str().unwrap();
    for settings in [
        [
            ("credentials__default__kind", "client_certificate"),
            ("credentials__default__client_certificate_file", missing),
        ],
        [("credentials__default__kind", "workload_identity"), ("credentials__default__token_file", missing)],
    ] {
        let world = with(&settings).await;
        assert_eq!(world.refused(PLAIN).await, ErrorCode::CredentialUnavailable.into());
        let failure = world.client().token_roles(TENANT, "default").await.unwrap_err();
        assert!(failure.detail.is_some_and(|detail| detail.contains("/nowhere") || detail.contains("federated token")));
        assert_eq!(world.client().credential_problems().len(), 1);
        assert_eq!(world.sim.state().token_requests, 0);
    }
}

#[tokio::test]
async fn a_token_of_another_tenant_is_rejected() {
    let world = with(&[]).await;
    world.sim.add_rule(Rule::new(Action::ForeignToken).on_token());
    assert_eq!(world.refused(PLAIN).await.code, ErrorCode::CredentialUnavailable);
    assert!(world.sim.requests().iter().all(|request| request.path.ends_with("/token")), "it is never sent");
}

#[tokio::test]
async fn a_probe_returns_the_failure_of_a_run_and_the_missing_permission() {
    let world = with(&[]).await;
    let (client, collection) = (world.client(), world.collection(PLAIN));
    assert_eq!(client.probe(TENANT, "default", &collection).await, Ok(12));
    let roles = client.token_roles(TENANT, "default").await.unwrap().unwrap();
    assert!(roles.contains(&"DeviceManagementApps.Read.All".to_owned()), "{roles:?}");
    world.sim.add_rule(Rule::new(Action::Forbidden { permission: None }));
    let refused = client.probe(TENANT, "default", &collection).await.unwrap_err();
    assert_eq!(refused.failure.code, ErrorCode::GraphForbidden);
    assert_eq!(refused.missing_permissions, ["DeviceManagementRBAC.Read.All"]);
    let stranger = client.probe(TENANT, "no-such", &collection).await.unwrap_err();
    assert_eq!(stranger.failure.code, ErrorCode::CredentialUnavailable);
    let failure = client.token_roles(TENANT, "no-such").await.unwrap_err().failure;
    assert_eq!(failure.code, ErrorCode::CredentialUnavailable);
}

#[tokio::test]
async fn an_outage_of_the_token_service_is_no_problem_of_the_credential() {
    for (action, detail) in [
        (Action::Status { status: 503, retry_after: Some("1".into()), body: ErrorBody::Default }, None),
        (
            Action::Status { status: 403, retry_after: None, body: ErrorBody::Literal("<html>".into()) },
            Some("not JSON"),
        ),
        (Action::Status { status: 400, retry_after: None, body: ErrorBody::Literal(TRANSIENT.into()) }, None),
        (Action::WrongContent, Some("not JSON")),
        (Action::Drop, Some("127.0.0.1")),
        (Action::Prefix { bytes: vec![b' '; 300 << 10] }, Some("larger than")),
    ] {
        let shown = format!("{action:.60?}");
        let world = with(&[("max_tries", "2")]).await;
        world.sim.add_rule(Rule::new(action).on_token());
        let reader = world.reader();
        let failure = read(&reader, &world.collection(PLAIN)).await.unwrap_err();
        assert_eq!(failure.code, ErrorCode::TokenServiceUnavailable, "{shown}");
        assert!(reader.retry_after_s().is_some_and(|wait| wait >= 1), "{shown}");
        assert_eq!(world.sim.state().token_requests, 2, "it is retried: {shown}");
        let told = world.client().token_roles(TENANT, "default").await.unwrap_err().detail;
        assert_eq!(told.is_some_and(|told| told.contains(detail.unwrap())), detail.is_some(), "{shown}");
    }
}

#[tokio::test]
async fn each_reason_of_a_failed_connection_is_named() {
    let refused = with(&[("authority", "https://127.0.0.1:9")]).await;
    let untrusted = with(&[("ca_file", "")]).await;
    let unknown = with(&[("authority", "https://no-such-host.invalid")]).await;
    // Connections are accepted by the kernel, and nobody responds.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let authority = format!("https://{}", silent.local_addr().unwrap());
    let silent = with(&[("authority", &authority), ("request_timeout_s", "1"), ("max_tries", "1")]).await;
    // Where the machine's resolver does not respond either, the name is another connection without a response.
    let lookup = tokio::time::timeout(Duration::from_secs(1), tokio::net::lookup_host("no-such-host.invalid:443"));
    let resolver_responds = lookup.await.is_ok();
    for (world, reason) in [
        (refused, "127.0.0.1 refused the connection"),
        (untrusted, "TLS with 127.0.0.1 failed: invalid peer certificate: UnknownIssuer"),
        (unknown, if resolver_responds { "no-such-host.invalid cannot be resolved" } else { "no-such-host.invalid" }),
        (silent, "127.0.0.1 did not respond within the time limit"),
    ] {
        let failure = world.client().token_roles(TENANT, "default").await.unwrap_err();
        assert_eq!(failure.failure.code, ErrorCode::TokenServiceUnavailable);
        assert!(failure.detail.as_deref().is_some_and(|detail| detail.contains(reason)), "{reason}: {failure:?}");
    }
}

#[tokio::test]
async fn a_probe_names_the_reason_of_a_failed_connection() {
    let world = with(&[("base_url", "https://127.0.0.1:9"), ("max_tries", "1")]).await;
    let failed = world.client().probe(TENANT, "default", &world.collection(PLAIN)).await.unwrap_err();
    assert_eq!(failed.failure.code, ErrorCode::GraphUnavailable);
    assert!(failed.detail.as_deref().is_some_and(|detail| detail.contains("refused the connection")), "{failed:?}");
}

#[tokio::test]
async fn byte_order_mark_and_excessive_lifetime_are_tolerated() {
    let world = with(&[]).await;
    world.sim.set_token_lifetime_s(1_000_000_000_000_000);
    world.sim.add_rule(Rule::new(Action::Prefix { bytes: b"\xEF\xBB\xBF".to_vec() }).on_token());
    assert!(!world.read(PLAIN).await.unwrap().is_empty());
}
