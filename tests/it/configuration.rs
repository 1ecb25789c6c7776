//! Configuration as an operator meets it: the real binary, which names each problem and shows no secret.

use std::ffi::{OsStr, OsString};
use std::io::Read;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use proptest::prelude::*;

use crate::graph_client::temporary_file;
use crate::support::{DEADLINE, binary};

/// Part of every secret of these tests.
const MARKER: &str = "hunter2";
/// Address that refuses connections.
const CLOSED: &str = "127.0.0.1:9";
const PEM: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/credentials/application.pem");
const PFX: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/credentials/application.pfx");

type Variables = Vec<(OsString, OsString)>;
/// Key and value of a setting.
type Setting<'a> = (&'a str, &'a str);

fn variables(pairs: &[(&str, &str)]) -> Variables {
    pairs.iter().map(|(name, value)| (OsString::from(format!("INVENTORYD__{name}")), value.into())).collect()
}

fn start(arguments: &[&str], variables: &Variables) -> Child {
    let mut command = Command::new(binary());
    command.args(arguments).env_clear().envs(variables.iter().map(|(name, value)| (name, value)));
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

/// Exit code, and both outputs in one text.
fn output(child: Child) -> (Option<i32>, String) {
    let ended = child.wait_with_output().unwrap();
    let text = [ended.stdout, ended.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    (ended.status.code(), text)
}

fn check(pairs: &[(&str, &str)]) -> (Option<i32>, String) {
    output(start(&["check"], &variables(pairs)))
}

#[test]
fn check_finds_without_a_network_what_would_fail_later() {
    let empty = temporary_file("empty", "");
    let empty = empty.to_str().unwrap();
    let id = ("GRAPH__CREDENTIALS__DEFAULT__CLIENT_ID", "app");
    let kind = |kind| ("GRAPH__CREDENTIALS__DEFAULT__KIND", kind);
    let certificate = |file| ("GRAPH__CREDENTIALS__DEFAULT__CLIENT_CERTIFICATE_FILE", file);
    let password = |password| ("GRAPH__CREDENTIALS__DEFAULT__CLIENT_CERTIFICATE_PASSWORD", password);
    let cases: [(&[(&str, &str)], &str); 20] = [
        (&[("TELEMETRY__LOG", "info,inventoryd=loud")], "telemetry.log: not valid tracing directives"),
        (&[("TELEMETRY__LOG", "=")], "telemetry.log: not valid tracing directives"),
        (&[("GRAPH__CA_FILE", "/nowhere/ca.pem")], "graph.ca_file: cannot use /nowhere/ca.pem"),
        (&[("GRAPH__CA_FILE", empty)], "contains no certificate"),
        (&[("GRAPH__POLICY_TYPES_FILE", "/nowhere")], "graph.policy_types_file: /nowhere"),
        (&[("GRAPH__PROXY", "http://u:p@proxy:1")], "graph.proxy: must be http://HOST:PORT"),
        (&[("GRAPH__PROXY", "http://:p@proxy:1")], "graph.proxy: must be http://HOST:PORT"),
        (
            &[("GRAPH__PROXY", "http://proxy:1"), ("GRAPH__PROXY_CREDENTIAL_FILE", "/nowhere")],
            "graph.proxy_credential_file: /nowhere",
        ),
        (&[("GRAPH__BASE_URL", "https://graph.example/v1.0")], "graph.base_url: must have no path"),
        (&[("BROKER__CA_FILE", "/nowhere/ca.pem")], "broker.ca_file: /nowhere/ca.pem"),
        (&[("BROKER__URL_FILE", "/nowhere")], "broker.url_file: /nowhere: can't read the file"),
        (&[id], "graph.credentials.default: client_id or client_secret is empty"),
        (&[kind("client_certificate"), certificate(PEM)], "client_id: must be the application's id"),
        (&[kind("client_certificate"), id, certificate("/nowhere/app.pem")], "cannot read /nowhere/app.pem"),
        (&[kind("client_certificate"), id, certificate(PFX)], "set client_certificate_password"),
        (&[kind("client_certificate"), id, certificate(PFX), password(MARKER)], "the password is wrong"),
        (&[kind("workload_identity"), id], "token_file is not set"),
        (
            &[kind("workload_identity"), ("GRAPH__CREDENTIALS__DEFAULT__TOKEN_FILE", empty)],
            "neither client_id nor the variable AZURE_CLIENT_ID is set",
        ),
        (
            &[kind("workload_identity"), id, ("GRAPH__CREDENTIALS__DEFAULT__TOKEN_FILE", "/nowhere/token")],
            "cannot read the federated token in /nowhere/token",
        ),
        (&[kind("workload_identity"), id, ("GRAPH__CREDENTIALS__DEFAULT__TOKEN_FILE", empty)], "is empty"),
    ];
    for (pairs, problem) in cases {
        let (code, shown) = check(pairs);
        assert!(code == Some(1) && shown.contains(problem), "{pairs:?}: {problem}: {shown}");
        assert!(!shown.contains("panicked") && !shown.contains(MARKER), "{shown}");
    }
    let (code, shown) = check(&[kind("client_certificate"), id, certificate(PFX), password("fixture-password")]);
    assert!(code == Some(0) && !shown.contains("fixture-password"), "{shown}");
    let (code, shown) = check(&[]);
    assert!(code == Some(0) && shown.contains("warning: graph.credentials.default: client_id is not set"), "{shown}");
}

#[test]
fn a_section_and_its_key_set_at_once_are_refused_the_same_way_each_time() {
    let both = [("BROKER", "amqp://u:hunter2@h"), ("BROKER__URL", "amqp://u:hunter2@127.0.0.1:9")];
    let reversed = [both[1], both[0]];
    let shown: Vec<String> = [&both, &reversed].iter().cycle().take(6).map(|pairs| check(&pairs[..]).1).collect();
    assert!(shown[0].contains("INVENTORYD__BROKER: broker is a section; set the keys in it"), "{}", shown[0]);
    assert!(shown.iter().all(|one| *one == shown[0] && !one.contains(MARKER)), "{shown:?}");
    let file = temporary_file("both.toml", "broker = \"hunter2\"\n");
    let arguments = ["check", "--config", file.to_str().unwrap()];
    let (code, shown) = output(start(&arguments, &variables(&[("BROKER__URL", "amqp://127.0.0.1:9")])));
    assert!(code == Some(1) && shown.contains("broker: is a section") && !shown.contains(MARKER), "{shown}");
}

#[test]
fn credential_names_do_not_split_by_case() {
    let file = temporary_file("names.toml", "[graph.credentials.EMEA]\nclient_id = \"app\"\n");
    let secret = variables(&[("GRAPH__CREDENTIALS__EMEA__CLIENT_SECRET", MARKER)]);
    let (code, shown) = output(start(&["check", "--json", "--config", file.to_str().unwrap()], &secret));
    assert_eq!(code, Some(0), "{shown}");
    assert!(shown.contains("graph.credentials.EMEA.client_secret") && !shown.contains("emea"), "{shown}");
    let environment = variables(&[
        ("GRAPH__CREDENTIALS__EMEA__CLIENT_ID", "app"),
        ("GRAPH__CREDENTIALS__EMEA__CLIENT_SECRET", MARKER),
        ("GRAPH__CLOUD", "custom"),
        ("GRAPH__BASE_URL", "https://127.0.0.1:9"),
        ("GRAPH__AUTHORITY", "https://127.0.0.1:9"),
        ("GRAPH__MAX_TRIES", "1"),
    ]);
    let (_, shown) = output(start(&[&DOCTOR[..3], &["--credential", "EMEA"]].concat(), &environment));
    assert!(shown.contains("refused the connection"), "the credential is found: {shown}");
}

#[test]
fn doctor_names_the_local_reason_of_a_missing_token_as_text_and_json() {
    let pem = std::fs::read_to_string(PEM).unwrap();
    let (key_begins, own_begins) = (pem.find("-----BEGIN PRIVATE").unwrap(), pem.rfind("-----BEGIN CERT").unwrap());
    let file = |name: &str, text: &str| temporary_file(name, text).to_str().unwrap().to_owned();
    let (key, foreign) = (file("key", &pem[key_begins..]), file("other", &pem[..own_begins]));
    let encrypted = file("encrypted", &pem[key_begins..].replace(" PRIVATE", " ENCRYPTED PRIVATE"));
    let cases: [(&[Setting<'_>], &str, &str); 6] = [
        (&[("CLIENT_CERTIFICATE_FILE", "/nowhere/app.pem")], "credential_unavailable", "cannot read /nowhere/app.pem"),
        (&[("CLIENT_CERTIFICATE_FILE", PFX)], "credential_unavailable", "set client_certificate_password"),
        (
            &[("CLIENT_CERTIFICATE_FILE", PFX), ("CLIENT_CERTIFICATE_PASSWORD", MARKER)],
            "credential_unavailable",
            "the password is wrong",
        ),
        (
            &[("CLIENT_CERTIFICATE_FILE", PEM), ("CLIENT_KEY_FILE", &encrypted)],
            "credential_unavailable",
            "is encrypted; decrypt it with",
        ),
        (
            &[("CLIENT_CERTIFICATE_FILE", &foreign), ("CLIENT_KEY_FILE", &key)],
            "credential_unavailable",
            "matches the key",
        ),
        (&[("CLIENT_CERTIFICATE_FILE", PEM)], "token_service_unavailable", "127.0.0.1 refused the connection"),
    ];
    for (settings, code, reason) in cases {
        let mut environment = unreachable();
        environment.push(("INVENTORYD__GRAPH__CREDENTIALS__DEFAULT__KIND".into(), "client_certificate".into()));
        environment.extend(
            settings
                .iter()
                .map(|(key, value)| (format!("INVENTORYD__GRAPH__CREDENTIALS__DEFAULT__{key}").into(), value.into())),
        );
        let (exit, shown) = output(start(&DOCTOR, &environment));
        assert!(exit == Some(1) && shown.contains(code) && shown.contains(reason), "{reason}: {shown}");
        assert!(!shown.contains(MARKER), "{shown}");
        let ended = start(&[&DOCTOR[..], &["--json"]].concat(), &environment).wait_with_output().unwrap();
        let document: serde_json::Value = serde_json::from_slice(&ended.stdout).expect(reason);
        assert_eq!(document["token"]["failure"]["code"], code, "{document}");
        assert!(document["token"]["cause"].as_str().unwrap().contains(reason), "{document}");
        assert!(!document["token"]["cure"].as_str().unwrap().is_empty(), "{document}");
    }
}

const DOCTOR: [&str; 5] = ["doctor", "--tenant", "6a5b1a3e-3e24-4d1c-9d7b-0c3f1a2b3c4d", "--credential", "default"];
/// Every command, as far as it can go without a server.
const COMMANDS: [&[&str]; 18] = [
    &["check"],
    &["check", "--json"],
    &["check", "--changed"],
    &["check", "--explain", "broker"],
    &["serve"],
    &DOCTOR,
    &["doctor", "--tenant", "6a5b1a3e-3e24-4d1c-9d7b-0c3f1a2b3c4d", "--json"],
    &["migrate"],
    &["tenant", "list"],
    &["tenant", "add", "6a5b1a3e-3e24-4d1c-9d7b-0c3f1a2b3c4d"],
    &["request", "--tenant", "6a5b1a3e-3e24-4d1c-9d7b-0c3f1a2b3c4d", "--all"],
    &["runs", "list"],
    &["missing", "--tenant", "6a5b1a3e-3e24-4d1c-9d7b-0c3f1a2b3c4d"],
    &["dead", "list"],
    &["events", "tail", "--timeout-s", "1"],
    &["types"],
    &["hash", "--all"],
    &["config", "schema"],
];

/// Configuration that no server answers to, with short waits; a variable of the test overrides it.
fn unreachable() -> Variables {
    variables(&[
        ("BROKER__URL", "amqp://127.0.0.1:9"),
        ("DATABASE__URL", "postgres://u@127.0.0.1:9/d"),
        ("DATABASE__ACQUIRE_TIMEOUT_S", "1"),
        ("GRAPH__CLOUD", "custom"),
        ("GRAPH__BASE_URL", "https://127.0.0.1:9"),
        ("GRAPH__AUTHORITY", "https://127.0.0.1:9"),
        ("GRAPH__MAX_TRIES", "1"),
        ("GRAPH__CREDENTIALS__DEFAULT__CLIENT_ID", "app"),
        ("HTTP__LISTEN", ""),
        ("TELEMETRY__LOG", "trace"),
    ])
}

/// Starts the daemon and ends it once it waits for its database, or is refused.
fn log_of_serve(variables: &Variables) -> String {
    let mut child = start(&["serve"], variables);
    let mut stderr = child.stderr.take().unwrap();
    let (begun, mut log, mut part) = (Instant::now(), Vec::new(), [0; 64 << 10]);
    while begun.elapsed() < DEADLINE {
        match stderr.read(&mut part).unwrap() {
            0 => break,
            bytes => log.extend_from_slice(&part[..bytes]),
        }
        if String::from_utf8_lossy(&log).contains("retrying") {
            break;
        }
    }
    let _ = child.kill();
    let stdout = child.wait_with_output().unwrap().stdout;
    String::from_utf8_lossy(&[log, stdout].concat()).into_owned()
}

/// Runs every command with an additional variable or file, and asserts that none shows the marker.
fn nothing_shows_the_marker(extra: &[(OsString, OsString)], file: Option<&str>) {
    let mut variables = unreachable();
    variables.retain(|(name, _)| !extra.iter().any(|(other, _)| other == name));
    variables.extend_from_slice(extra);
    if let Some(file) = file {
        variables.retain(|(name, _)| name.as_bytes() == b"INVENTORYD__HTTP__LISTEN");
        variables.push(("INVENTORYD_CONFIG".into(), file.into()));
    }
    let others: Vec<Child> =
        COMMANDS.iter().filter(|one| **one != ["serve"]).map(|arguments| start(arguments, &variables)).collect();
    let mut shown = vec![log_of_serve(&variables)];
    shown.extend(others.into_iter().map(|child| output(child).1));
    for text in shown {
        let bytes = text.to_lowercase();
        assert!(!bytes.contains(MARKER), "{extra:?} {:?}: {text}", file.map(std::fs::read_to_string));
    }
}

fn place_and_value(name: &str, value: impl AsRef<OsStr>) -> [(OsString, OsString); 1] {
    [(name.into(), value.as_ref().to_owned())]
}

#[test]
fn no_command_shows_a_secret_that_is_where_it_belongs_or_in_a_likely_wrong_place() {
    let not_utf8 = OsString::from_vec(b"hunter2\xff".to_vec());
    for (name, value) in [
        ("INVENTORYD__DATABASE__URL", format!("postgres://u:{MARKER}@{CLOSED}/d")),
        ("INVENTORYD__DATABASE__URL", format!("postgres://u@{CLOSED}/d?password={MARKER}")),
        ("INVENTORYD__BROKER__URL", format!("amqp://u:{MARKER}@{CLOSED}/%2f")),
        ("INVENTORYD__GRAPH__CREDENTIALS__DEFAULT__CLIENT_SECRET", MARKER.to_owned()),
        ("INVENTORYD__HTTP__TOKEN", MARKER.to_owned()),
        ("INVENTORYD__GRAPH__PROXY", format!("http://u:{MARKER}@{CLOSED}")),
        ("INVENTORYD__GRAPH__BASE_URL", format!("https://{MARKER}@{CLOSED}")),
        ("INVENTORYD__BROKER__PASSWORD", MARKER.to_owned()),
        ("INVENTORYD__BROKER", MARKER.to_owned()),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", format!("http://u:{MARKER}@{CLOSED}")),
        ("OTEL_EXPORTER_OTLP_HEADERS", format!("authorization={MARKER}")),
        ("AZURE_CLIENT_SECRET", MARKER.to_owned()),
    ] {
        nothing_shows_the_marker(&place_and_value(name, value), None);
    }
    for name in ["INVENTORYD__HTTP__TOKEN", "INVENTORYD__BROKER__URLX", "OTEL_EXPORTER_OTLP_HEADERS", "INVENTORYD__X"] {
        nothing_shows_the_marker(&place_and_value(name, &not_utf8), None);
    }
    let collector = format!("http://{CLOSED}");
    let traced = [place_and_value("OTEL_EXPORTER_OTLP_ENDPOINT", &collector), {
        place_and_value("OTEL_EXPORTER_OTLP_HEADERS", format!("authorization=Bearer {MARKER}"))
    }];
    nothing_shows_the_marker(&traced.concat(), None);
}

/// Keys that hold a secret, an address, a number or one of a few values, and keys that do not exist, as sections and names.
const PLACES: [&str; 22] = [
    "broker.url",
    "broker.heartbeat_s",
    "broker.passwd",
    "broker",
    "database.url",
    "database.max_connections",
    "database.user.password",
    "http.token",
    "http.listen",
    "graph.cloud",
    "graph.credentials.default.kind",
    "telemetry.format",
    "graph.base_url",
    "graph.authority",
    "graph.proxy",
    "graph.credentials",
    "graph.credentials.default",
    "graph.credentials.default.client_secret",
    "graph.credentials.default.client_certificate_password",
    "graph.credentials.emea.secret",
    "telemetry.otlp_endpoint",
    "secrets.api_key",
];

/// Secret by itself, as the password of an address, and in the query of one.
fn secret() -> impl Strategy<Value = Vec<u8>> {
    let around = || prop::collection::vec(prop::sample::select(&b"aZ0:?#@%&= ,;'\"\\\xff\xe4\n\t[]{}"[..]), 0..5);
    let addresses = [("", ""), ("amqp://u:", "@127.0.0.1:9/x"), ("postgres://u:", "@127.0.0.1:9/d")]
        .into_iter()
        .chain([("https://u:", "@127.0.0.1:9"), ("http://", "@127.0.0.1:9"), ("https://127.0.0.1:9/?k=", "")]);
    let address = prop::sample::select(addresses.collect::<Vec<_>>());
    (address, around(), around()).prop_map(|((before, behind), left, right)| {
        [before.as_bytes(), &left, MARKER.as_bytes(), &right, behind.as_bytes()].concat()
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, max_shrink_iters: 20, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn no_output_of_any_command_holds_a_secret_whatever_key_carries_it(
        place in prop::sample::select(&PLACES[..]), secret in secret(), by_file in any::<bool>(),
    ) {
        if by_file {
            let quoted = serde_json::Value::from(String::from_utf8_lossy(&secret).into_owned());
            let text = format!("{place} = {quoted}\n");
            let file = temporary_file("secret.toml", &text);
            nothing_shows_the_marker(&[], file.to_str());
            std::fs::remove_file(file).unwrap();
        } else {
            let variable = format!("INVENTORYD__{}", place.replace('.', "__").to_uppercase());
            nothing_shows_the_marker(&place_and_value(&variable, OsString::from_vec(secret)), None);
        }
    }
}

#[test]
fn a_file_that_is_not_utf8_or_not_toml_is_refused_without_its_content() {
    for content in [&b"[http]\ntoken = \"hunter2\xff\"\n"[..], b"token = hunter2", b"[http\nhunter2", b"\x00hunter2"] {
        let file = temporary_file("broken.toml", "");
        std::fs::write(&file, content).unwrap();
        nothing_shows_the_marker(&[], file.to_str());
        let (code, shown) = output(start(&["check", "--config", file.to_str().unwrap()], &Vec::new()));
        assert!(code == Some(1) && shown.contains("configuration file "), "{shown}");
        std::fs::remove_file(file).unwrap();
    }
}

#[test]
fn commands_end_while_no_server_answers() {
    let begun = Instant::now();
    let children: Vec<Child> =
        COMMANDS.iter().filter(|one| **one != ["serve"]).map(|arguments| start(arguments, &unreachable())).collect();
    for child in children {
        let (code, shown) = output(child);
        assert!(code.is_some() && !shown.contains("panicked"), "{shown}");
    }
    assert!(begun.elapsed() < Duration::from_secs(60), "{:?}", begun.elapsed());
}
