//! What a configuration must fulfil as a whole: each rule names its key and the cure.

use secrecy::ExposeSecret;

use super::{Cloud, Config, ConfigError};

/// Refuses values and combinations that would break a promise to the users.
pub(super) fn check(config: &Config) -> Result<(), ConfigError> {
    let mut problems = Vec::new();
    let mut require = |holds: bool, problem: &str| {
        if !holds {
            problems.push(problem.to_owned());
        }
    };
    check_broker(config, &mut require);
    check_run(config, &mut require);
    check_graph(config, &mut require);
    check_store(config, &mut require);
    check_telemetry(config, &mut require);
    check_durations(config, &mut require);
    if problems.is_empty() { Ok(()) } else { Err(ConfigError(problems.join("\n"))) }
}

impl Config {
    /// Warns of a combination that works, but more slowly than an operator may expect.
    #[must_use]
    pub fn warning(&self) -> Option<String> {
        let lists = u64::from(self.consumer.prefetch) * self.run.concurrent_lists as u64;
        let connections = u64::from(self.database.max_connections);
        (lists > 4 * connections).then(|| {
            format!(
                "consumer.prefetch x run.concurrent_lists is {lists}, so that many lists can write at the same time over the \
                 {connections} connections of database.max_connections: runs will wait for each other. Raise \
                 database.max_connections to {} or more, or lower one of the others",
                lists.div_ceil(4)
            )
        })
    }
}

fn check_broker(config: &Config, require: &mut dyn FnMut(bool, &str)) {
    let url = config.broker.url.expose_secret();
    let schemes_fit = url.split(',').all(|one| one.trim().starts_with("amqp://") || one.trim().starts_with("amqps://"));
    require(schemes_fit, "broker.url: every address must begin with amqp:// or amqps://");
    require(
        (5..=60).contains(&config.broker.heartbeat_s),
        "broker.heartbeat_s: must be 5 to 60; under 5 a busy host looks dead",
    );
    require(
        config.broker.client_key_file.is_none() || config.broker.client_certificate_file.is_some(),
        "broker.client_key_file: needs broker.client_certificate_file, the certificate that it is the key of",
    );
    require(config.broker.connect_timeout_s > 0, "broker.connect_timeout_s: must be at least 1");
    require(config.broker.operation_timeout_s > 0, "broker.operation_timeout_s: must be at least 1");
    require(config.consumer.prefetch > 0, "consumer.prefetch: must be 1 to 2000; AMQP reads 0 as no cap at all");
    require(
        config.consumer.prefetch <= 2000,
        "consumer.prefetch: must be 1 to 2000, the most that a quorum queue hands out",
    );
    require(config.consumer.watchdog_s >= 5, "consumer.watchdog_s: must be at least 5; the broker is asked each time");
    require(
        config.topology.delivery_limit >= 3,
        "topology.delivery_limit: must be at least 3; a lost connection counts as a delivery of everything in hand",
    );
    let name_fits = config.topology.prefix.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
    require(
        name_fits && config.topology.prefix.len() <= 64,
        "topology.prefix: up to 64 letters, digits, dots, dashes and underscores",
    );
}

fn check_run(config: &Config, require: &mut dyn FnMut(bool, &str)) {
    let run = &config.run;
    require(
        run.lease_s >= 3 * u64::from(config.broker.heartbeat_s),
        "run.lease_s: must be at least three times broker.heartbeat_s, or a run is given away before the loss of its worker is noticed",
    );
    require(
        run.deadline_s.saturating_mul(5) <= config.consumer.broker_timeout_s.saturating_mul(4),
        "run.deadline_s: must stay under 80 % of consumer.broker_timeout_s, or the broker takes the message back mid-run",
    );
    require(run.deadline_s > 0, "run.deadline_s: must be at least 1");
    require(run.max_attempts > 0, "run.max_attempts: must be at least 1");
    require(run.restart_after_s > 0, "run.restart_after_s: must be at least 1");
    require(
        run.give_up_after_s > run.restart_after_s,
        "run.give_up_after_s: must be over run.restart_after_s, or a run ends before its request was published again",
    );
    require((1..=64).contains(&run.concurrent_lists), "run.concurrent_lists: must be 1 to 64");
    require((1..=5000).contains(&run.batch_rows), "run.batch_rows: must be 1 to 5000");
    require((0.0..=1.0).contains(&run.suspicious_drop_share), "run.suspicious_drop_share: must be 0 to 1");
    require(
        config.limits.tenant_max_runs > 0,
        "limits.tenant_max_runs: must be at least 1; disable a tenant with `inventoryd tenant disable`",
    );
}

fn check_graph(config: &Config, require: &mut dyn FnMut(bool, &str)) {
    let graph = &config.graph;
    let custom = graph.cloud == Cloud::Custom;
    require(
        !custom || (!graph.base_url.is_empty() && !graph.authority.is_empty()),
        "graph.cloud: \"custom\" needs graph.base_url and graph.authority",
    );
    for (key, url) in [("graph.base_url", graph.base_url()), ("graph.authority", graph.authority())] {
        let fits = url::Url::parse(url).is_ok_and(|url| url.scheme() == "https" && url.host().is_some());
        require(
            fits || url.is_empty() && custom,
            &format!("{key}: must be an https:// address; a token never travels in the clear"),
        );
    }
    let proxy = url::Url::parse(&graph.proxy);
    require(
        graph.proxy.is_empty()
            || proxy.is_ok_and(|url| {
                ["http", "https"].contains(&url.scheme()) && url.host().is_some() && url.username().is_empty()
            }),
        "graph.proxy: must be http://HOST:PORT; graph.proxy_credential_file names the file with its user and password",
    );
    require(
        graph.proxy_credential_file.is_none() || !graph.proxy.is_empty(),
        "graph.proxy_credential_file: needs graph.proxy",
    );
    let has_path = url::Url::parse(graph.base_url()).is_ok_and(|url| url.path() != "/" || url.query().is_some());
    require(!has_path, "graph.base_url: must have no path; the API version is part of each policy type");
    require((1..=20).contains(&graph.max_tries), "graph.max_tries: must be 1 to 20");
    require(graph.request_timeout_s > 0, "graph.request_timeout_s: must be at least 1");
    require(
        graph.backoff_first_s > 0.0 && graph.backoff_first_s <= graph.backoff_max_s,
        "graph.backoff_first_s: must be over 0 and at most graph.backoff_max_s",
    );
    require(graph.backoff_max_s <= 3600.0, "graph.backoff_max_s: must be at most 3600");
    require(graph.rate_share > 0.0 && graph.rate_share <= 1.0, "graph.rate_share: must be over 0 and at most 1");
    require(graph.max_pages > 0, "graph.max_pages: must be at least 1");
    require(graph.max_page_bytes >= 65536, "graph.max_page_bytes: must be at least 65536");
    require(
        graph.credentials.contains_key("default"),
        "graph.credentials.default: must be there; tenants use it unless told otherwise",
    );
    for (name, credential) in &graph.credentials {
        for problem in credential.problems() {
            require(false, &format!("graph.credentials.{name}.{problem}"));
        }
    }
}

/// What the PostgreSQL client takes behind the question mark of an address.
const DATABASE_PARAMETERS: [&str; 18] = [
    "sslmode",
    "ssl-mode",
    "sslrootcert",
    "ssl-root-cert",
    "ssl-ca",
    "sslcert",
    "ssl-cert",
    "sslkey",
    "ssl-key",
    "statement-cache-capacity",
    "host",
    "hostaddr",
    "port",
    "dbname",
    "user",
    "password",
    "application_name",
    "options",
];

fn check_store(config: &Config, require: &mut dyn FnMut(bool, &str)) {
    let url = config.database.url.expose_secret();
    let address = url::Url::parse(url).ok().filter(|url| ["postgres", "postgresql"].contains(&url.scheme()));
    require(address.is_some(), "database.url: must be postgres://USER:PASSWORD@HOST:PORT/DATABASE");
    for (parameter, _) in address.iter().flat_map(url::Url::query_pairs) {
        let known = DATABASE_PARAMETERS.contains(&&*parameter) || parameter.starts_with("options[");
        // The client would log it, with its value: a password perhaps, misspelt.
        require(known, &format!("database.url: there is no parameter {parameter:?}"));
    }
    require(config.database.max_connections > 0, "database.max_connections: must be at least 1");
    require(
        config.database.control_connections >= 2,
        "database.control_connections: must be at least 2: health must not wait for the outbox",
    );
    require(config.database.acquire_timeout_s > 0, "database.acquire_timeout_s: must be at least 1");
    require(config.database.statement_timeout_s > 0, "database.statement_timeout_s: must be at least 1");
    require(config.outbox.batch > 0 && config.outbox.batch <= 1000, "outbox.batch: must be 1 to 1000");
    require(config.outbox.poll_ms >= 10, "outbox.poll_ms: must be at least 10");
    require(
        config.outbox.claim_s > config.broker.operation_timeout_s,
        "outbox.claim_s: must be longer than broker.operation_timeout_s, or two replicas publish the same events",
    );
    require(config.outbox.high_water > 0, "outbox.high_water: must be at least 1");
    require((1..=36_500).contains(&config.retention.runs_days), "retention.runs_days: must be 1 to 36500");
    require(config.retention.interval_s > 0, "retention.interval_s: must be at least 1");
}

fn check_telemetry(config: &Config, require: &mut dyn FnMut(bool, &str)) {
    let endpoint = &config.telemetry.otlp_endpoint;
    let fits = url::Url::parse(endpoint).is_ok_and(|url| {
        ["http", "https"].contains(&url.scheme()) && url.host().is_some() && url.username().is_empty()
    });
    require(
        fits || endpoint.is_empty(),
        "telemetry.otlp_endpoint: must be an http:// or https:// address without user and password; a collector's token goes into OTEL_EXPORTER_OTLP_HEADERS",
    );
}

/// Longest duration of any key: a year. Longer ones overflow once they are added to a time.
const MAX_DURATION_S: u64 = 366 * 86_400;

fn check_durations(config: &Config, require: &mut dyn FnMut(bool, &str)) {
    for (key, duration_s) in [
        ("broker.heartbeat_s", u64::from(config.broker.heartbeat_s)),
        ("broker.connect_timeout_s", config.broker.connect_timeout_s),
        ("broker.operation_timeout_s", config.broker.operation_timeout_s),
        ("consumer.watchdog_s", config.consumer.watchdog_s),
        ("consumer.drain_s", config.consumer.drain_s),
        ("consumer.broker_timeout_s", config.consumer.broker_timeout_s),
        ("run.lease_s", config.run.lease_s),
        ("run.deadline_s", config.run.deadline_s),
        ("run.restart_after_s", config.run.restart_after_s),
        ("run.give_up_after_s", config.run.give_up_after_s),
        ("limits.defer_max_s", config.limits.defer_max_s),
        ("graph.request_timeout_s", config.graph.request_timeout_s),
        ("graph.throttle_budget_s", config.graph.throttle_budget_s),
        ("database.acquire_timeout_s", config.database.acquire_timeout_s),
        ("database.statement_timeout_s", config.database.statement_timeout_s),
        ("outbox.poll_ms", config.outbox.poll_ms / 1_000),
        ("outbox.claim_s", config.outbox.claim_s),
        ("retention.interval_s", config.retention.interval_s),
    ] {
        require(duration_s <= MAX_DURATION_S, &format!("{key}: must be at most {MAX_DURATION_S} seconds, a year"));
    }
}
