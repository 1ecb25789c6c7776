use secrecy::ExposeSecret;

use super::*;

fn load(variables: &[(&str, &str)]) -> Result<Config, ConfigError> {
    let variables = variables.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
    Config::load_with(None, variables)
}

fn problem(key: &str, value: &str) -> String {
    load(&[(key, value)]).unwrap_err().to_string()
}

#[test]
fn environment_overrides_defaults() {
    let defaults = load(&[]).unwrap();
    assert_eq!(defaults.consumer.prefetch, 8);
    assert!(defaults.http.listen.unwrap().ip().is_loopback(), "only loopback by default");
    let secret = "007";
    let config = load(&[
        ("INVENTORYD__CONSUMER__PREFETCH", "3"),
        ("INVENTORYD__GRAPH__CREDENTIALS__DEFAULT__CLIENT_SECRET", secret),
        ("INVENTORYD__GRAPH__CREDENTIALS__DEFAULT__CLIENT_ID", "app"),
        ("INVENTORYD__GRAPH__CREDENTIALS__EMEA__CLIENT_ID", "x"),
        ("INVENTORYD__HTTP__LISTEN", ""),
    ])
    .unwrap();
    assert_eq!(config.consumer.prefetch, 3);
    assert_eq!(config.graph.credentials["default"].client_secret.expose_secret(), secret);
    assert!(config.graph.credentials.contains_key("emea") && config.http.listen.is_none());
    assert_eq!(config.graph.base_url(), "https://graph.microsoft.com");
}

#[test]
fn invalid_values_are_refused_by_key() {
    for (variable, value, expected) in [
        ("INVENTORYD__CONSUMER__PREFETCH", "0", "consumer.prefetch"),
        ("INVENTORYD__CONSUMER__PREFETCH", "many", "prefetch"),
        ("INVENTORYD__CONSUMER__COLOUR", "blue", "colour"),
        ("INVENTORYD__RUN__DEADLINE_S", "1800", "run.deadline_s"),
        ("INVENTORYD__RUN__LEASE_S", "5", "run.lease_s"),
        ("INVENTORYD__GRAPH__BASE_URL", "http://graph.example", "graph.base_url"),
        ("INVENTORYD__GRAPH__CLOUD", "custom", "graph.cloud"),
        ("INVENTORYD__BROKER__URL", "http://x", "broker.url"),
        ("INVENTORYD__BROKER__CLIENT_KEY_FILE", "/key.pem", "broker.client_key_file"),
        ("INVENTORYD__OUTBOX__CLAIM_S", "5", "outbox.claim_s"),
        ("INVENTORYD__HTTP__LISTEN", "here", "IP:PORT"),
        ("INVENTORYD__TELEMETRY__OTLP_ENDPOINT", "127.0.0.1:4318", "telemetry.otlp_endpoint"),
        ("INVENTORYD__TELEMETRY__OTLP_ENDPOINT", "http://u:\\hunter2@host:1/x", "telemetry.otlp_endpoint"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://me:hunter2@collector:4318", "telemetry.otlp_endpoint"),
        ("INVENTORYD__DATABASE__URL_FILE", "/no/such/file", "database.url_file"),
        ("INVENTORYD__DATABASE__URL", "postgres://u@h/d?passwrod=hunter2", "database.url: unknown query parameter"),
        ("INVENTORYD__DATABASE__URL", "h/d", "database.url"),
        ("INVENTORYD__DATABASE__URL", "postgres://u:hunter2@one,two/d", "several hosts"),
        ("INVENTORYD__DATABASE__URL", "postgres://u:hunter2@one:5432,two:5432/d", "several hosts"),
        ("INVENTORYD__DATABASE__URL", "postgres://u:hunter2@one/d?host=two,three", "several hosts"),
        ("INVENTORYD__DATABASE__URL", "postgres://u:hunter2@/d?host=one&host=two", "several hosts"),
        ("INVENTORYD__TELEMETRY__DEPLOYMENT", "", "telemetry.deployment"),
        ("INVENTORYD__TELEMETRY__DEPLOYMENT", "north west", "telemetry.deployment"),
        ("INVENTORYD__TELEMETRY__DEPLOYMENT", "a\"b\n", "telemetry.deployment"),
        ("INVENTORYD__TELEMETRY__DEPLOYMENT", "caf\u{e9}", "telemetry.deployment"),
        ("INVENTORYD__RUN__RESTART_AFTER_S", "0", "run.restart_after_s"),
        ("INVENTORYD__RETENTION__RUNS_DAYS", "9999999", "retention.runs_days"),
        ("INVENTORYD__CONSUMER__WATCHDOG_S", "0", "consumer.watchdog_s"),
        ("INVENTORYD__RUN__MAX_ATTEMPTS", "0", "run.max_attempts"),
        ("INVENTORYD__RUN__DEADLINE_S", "18446744073709551615", "run.deadline_s"),
        ("INVENTORYD__CONSUMER__DRAIN_S", "18446744073709551615", "consumer.drain_s"),
        ("INVENTORYD__DATABASE__URL", "postgres://u@h/d?sslmode=bogus", "invalid value of sslmode"),
        ("INVENTORYD__DATABASE__URL", "postgres://u@h/d?sslrootcert=/no/such/file", "the file of sslrootcert"),
        ("INVENTORYD__GRAPH__BASE_URL", "https://graph.example/beta", "graph.base_url"),
        ("INVENTORYD__GRAPH__CREDENTIALS__DEFAULT__CLIENT_ID", "app\n", "client_id: must not contain"),
        ("INVENTORYD__GRAPH__CREDENTIALS__DEFAULT__CLIENT_SECRET", "hunter2", "client_id: must be"),
        ("INVENTORYD__HTTP__TOKEN", "hunter2 x", "http.token"),
        ("INVENTORYD__CONSUMER__BROKER_TIMEOUT_S", "1500", "consumer.broker_timeout_s"),
        ("INVENTORYD__GRAPH__BACKOFF_MAX_S", "inf", "graph.backoff_max_s"),
    ] {
        let problem = problem(variable, value);
        assert!(problem.contains(expected), "{variable}={value}: {problem}");
        assert!(!problem.contains("hunter2"), "{problem}");
    }
}

#[test]
fn one_database_host_of_any_kind_is_accepted() {
    for url in [
        "postgres://u:p@[::1]:5432/d",
        "postgres://u:a,b@h/d",
        "postgres://u@h/d?host=/run/postgresql",
        "postgres://%2Frun%2Fpostgresql/d",
        "postgres://u@h/d?sslmode=require&port=5433",
    ] {
        assert!(load(&[("INVENTORYD__DATABASE__URL", url)]).is_ok(), "{url}");
    }
}

#[test]
fn each_cloud_has_its_own_graph_and_token_service() {
    for (cloud, graph, login) in [
        ("global", "https://graph.microsoft.com", "https://login.microsoftonline.com"),
        ("usgov_l4", "https://graph.microsoft.us", "https://login.microsoftonline.us"),
        ("usgov_l5", "https://dod-graph.microsoft.us", "https://login.microsoftonline.us"),
        ("china", "https://microsoftgraph.chinacloudapi.cn", "https://login.chinacloudapi.cn"),
    ] {
        let config = load(&[("INVENTORYD__GRAPH__CLOUD", cloud)]).unwrap().graph;
        assert_eq!((config.base_url(), config.authority()), (graph, login));
    }
}

#[test]
fn otel_endpoint_variable_is_the_default_endpoint() {
    let standard = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://every:4318");
    let endpoint = |variables: &[_]| load(variables).unwrap().telemetry.otlp_endpoint;
    assert_eq!(endpoint(&[]), "");
    assert_eq!(endpoint(&[standard]), "http://every:4318");
    assert_eq!(endpoint(&[standard, ("INVENTORYD__TELEMETRY__OTLP_ENDPOINT", "http://ours")]), "http://ours");
    assert_eq!(endpoint(&[standard, ("INVENTORYD__TELEMETRY__OTLP_ENDPOINT", "")]), "");
}

#[test]
fn secrets_are_not_printed() {
    let config = load(&[("INVENTORYD__BROKER__URL", "amqp://u:hunter2@h/")]).unwrap();
    assert!(!format!("{config:?}").contains("hunter2"));
}
