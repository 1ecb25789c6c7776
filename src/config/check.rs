//! Validation of a whole configuration: each rule names its key and the remedy, and never quotes a value.

use secrecy::ExposeSecret;

use super::{Cloud, Config, ConfigError, CredentialConfig};

/// Rejects invalid values and combinations.
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
    check_database(config, &mut require);
    check_outbox(config, &mut require);
    check_http(config, &mut require);
    check_telemetry(config, &mut require);
    check_durations(config, &mut require);
    if problems.is_empty() { Ok(()) } else { Err(ConfigError(problems.join("\n"))) }
}

impl Config {
    /// Warnings of what works less well than an operator may expect, or not for every tenant.
    #[must_use]
    pub fn warnings(&self) -> Vec<String> {
        let lists = u64::from(self.consumer.prefetch) * self.run.concurrent_lists as u64;
        let connections = u64::from(self.database.max_connections);
        let many_lists = (lists > 16 * connections).then(|| {
            format!(
                "consumer.prefetch x run.concurrent_lists is {lists}, so that many lists can write at the same time over the \
                 {connections} connections of database.max_connections: runs will wait for each other. Raise \
                 database.max_connections to {} or more, or lower one of the others",
                lists.div_ceil(16)
            )
        });
        let is_unset = self.graph.credentials.get("default").is_some_and(CredentialConfig::is_unset);
        let unset = "graph.credentials.default: client_id is not set, so that no token can be requested for tenants without \
                     a credential of their own. Set it and the client secret, or choose another kind";
        many_lists.into_iter().chain(is_unset.then(|| unset.to_owned())).collect()
    }
}

fn check_broker(config: &Config, require: &mut dyn FnMut(bool, &str)) {
    let url = config.broker.url.expose_secret();
    let schemes_fit = url.split(',').all(|one| one.trim().starts_with("amqp://") || one.trim().starts_with("amqps://"));
    require(schemes_fit, "broker.url: every address must begin with amqp:// or amqps://");
    require(
        (5..=60).contains(&config.broker.heartbeat_s),
        "broker.heartbeat_s: must be 5 to 60; below 5 a busy host appears dead",
    );
    require(
        config.broker.client_key_file.is_none() || config.broker.client_certificate_file.is_some(),
        "broker.client_key_file: requires broker.client_certificate_file, the certificate of that key",
    );
    require(config.broker.connect_timeout_s > 0, "broker.connect_timeout_s: must be at least 1");
    require(config.broker.operation_timeout_s > 0, "broker.operation_timeout_s: must be at least 1");
    require(config.consumer.prefetch > 0, "consumer.prefetch: must be 1 to 2000; AMQP treats 0 as unlimited");
    require(config.consumer.prefetch <= 2000, "consumer.prefetch: must be 1 to 2000, the maximum of a quorum queue");
    require(config.consumer.watchdog_s >= 5, "consumer.watchdog_s: must be at least 5; each check queries the broker");
    require(
        config.topology.delivery_limit >= 3,
        "topology.delivery_limit: must be at least 3; a lost connection counts as a delivery of every message in flight",
    );
    let name_fits = config.topology.prefix.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
    require(
        name_fits && config.topology.prefix.len() <= 64,
        "topology.prefix: must be at most 64 letters, digits, dots, dashes and underscores",
    );
}

fn check_run(config: &Config, require: &mut dyn FnMut(bool, &str)) {
    let run = &config.run;
    require(
        run.lease_s >= 3 * u64::from(config.broker.heartbeat_s),
        "run.lease_s: must be at least three times broker.heartbeat_s, so that a lost connection is detected before the lease expires",
    );
    require(
        run.deadline_s.saturating_mul(5) <= config.consumer.broker_timeout_s.saturating_mul(4),
        "run.deadline_s: must be at most 80 % of consumer.broker_timeout_s, or the broker redelivers the message during the run",
    );
    require(run.deadline_s > 0, "run.deadline_s: must be at least 1");
    require(run.max_attempts > 0, "run.max_attempts: must be at least 1");
    require(run.restart_after_s > 0, "run.restart_after_s: must be at least 1");
    require(
        run.give_up_after_s > run.restart_after_s,
        "run.give_up_after_s: must exceed run.restart_after_s, or a run ends before its request is published again",
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
        "graph.cloud: \"custom\" requires graph.base_url and graph.authority",
    );
    for (key, url) in [("graph.base_url", graph.base_url()), ("graph.authority", graph.authority())] {
        let fits = is_bare_address(url, &["https"]);
        require(
            fits || url.is_empty() && custom,
            &format!("{key}: must be https://HOST without user, path and query; tokens are sent over TLS only"),
        );
    }
    require(
        graph.proxy.is_empty() || is_bare_address(&graph.proxy, &["http", "https"]),
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
    require((65_536..=1 << 30).contains(&graph.max_page_bytes), "graph.max_page_bytes: must be 65536 to 1073741824");
    require(
        graph.credentials.contains_key("default"),
        "graph.credentials.default: is missing; tenants use it by default",
    );
    for (name, credential) in &graph.credentials {
        for problem in credential.problems() {
            require(false, &format!("graph.credentials.{name}.{problem}"));
        }
    }
}

/// Address of a server alone: no user, path, query or fragment. A secret in one of these would be sent and logged.
fn is_bare_address(text: &str, schemes: &[&str]) -> bool {
    url::Url::parse(text).is_ok_and(|url| {
        schemes.contains(&url.scheme())
            && url.host().is_some()
            && url.username().is_empty()
            && url.password().is_none()
            && url.query().is_none()
            && url.fragment().is_none()
            && url.path().trim_end_matches('/').is_empty()
    })
}

/// Query parameters that the PostgreSQL client supports.
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

fn check_database(config: &Config, require: &mut dyn FnMut(bool, &str)) {
    let url = config.database.url.expose_secret();
    let address = url::Url::parse(url).ok().filter(|url| ["postgres", "postgresql"].contains(&url.scheme()));
    let stray = |part: &str| part.contains('@');
    let is_split = address
        .as_ref()
        .is_some_and(|url| stray(url.path()) || url.query().is_some_and(stray) || url.fragment().is_some());
    let is_list = has_several_hosts(url);
    require(
        !is_list,
        "database.url: several hosts are not supported; name one that leads to the primary, such as a proxy or a virtual IP",
    );
    require(address.is_some() || is_list, "database.url: must be postgres://USER:PASSWORD@HOST:PORT/DATABASE");
    require(!is_split, "database.url: percent-encode the characters / ? # @ in user and password (%2F %3F %23 %40)");
    for (name, value) in address.iter().filter(|_| !is_split).flat_map(url::Url::query_pairs) {
        if let Err(problem) = check_parameter(&name, &value) {
            require(false, &format!("database.url: {problem}"));
        }
    }
    let database = &config.database;
    require(database.max_connections > 0, "database.max_connections: must be at least 1");
    require(
        database.control_connections >= 2,
        "database.control_connections: must be at least 2, so that health checks do not wait for the outbox",
    );
    require(database.acquire_timeout_s > 0, "database.acquire_timeout_s: must be at least 1");
    require(database.statement_timeout_s > 0, "database.statement_timeout_s: must be at least 1");
}

/// True for the lists of hosts that libpq accepts, in the authority or in a parameter. A comma in a password is no list.
fn has_several_hosts(url: &str) -> bool {
    let address = url.split_once("://").map_or(url, |(_, address)| address);
    let (authority, rest) = address.split_at(address.find(['/', '?']).unwrap_or(address.len()));
    let hosts = authority.rsplit_once('@').map_or(authority, |(_, hosts)| hosts);
    let query = rest.split_once('?').map_or("", |(_, query)| query);
    let is_host = |name: &str| matches!(name, "host" | "hostaddr" | "port");
    let mut named: Vec<_> = url::form_urlencoded::parse(query.as_bytes()).filter(|(name, _)| is_host(name)).collect();
    let lists_in_value = named.iter().any(|(_, value)| value.contains(','));
    let count = named.len();
    named.sort_unstable();
    named.dedup_by(|one, other| one.0 == other.0);
    hosts.contains(',') || lists_in_value || named.len() < count
}

/// Validates a query parameter of the database address. Names are not quoted: one may be part of a password.
fn check_parameter(name: &str, value: &str) -> Result<(), String> {
    const MODES: [&str; 6] = ["disable", "allow", "prefer", "require", "verify-ca", "verify-full"];
    let is_known = DATABASE_PARAMETERS.contains(&name) || name.starts_with("options[");
    if !is_known {
        return Err("unknown query parameter; check its spelling, and percent-encode ? in a password as %3F".to_owned());
    }
    let is_file = name.ends_with("cert") || name.ends_with("key") || name == "ssl-ca";
    let is_valid = match name {
        "sslmode" | "ssl-mode" => MODES.contains(&value.to_ascii_lowercase().as_str()),
        "port" => value.parse::<u16>().is_ok(),
        "hostaddr" => value.parse::<std::net::IpAddr>().is_ok(),
        "statement-cache-capacity" => value.parse::<usize>().is_ok(),
        _ if is_file => std::fs::File::open(value).is_ok(),
        _ => true,
    };
    if is_valid {
        Ok(())
    } else if is_file {
        Err(format!("can't read the file of {name}"))
    } else {
        Err(format!("invalid value of {name}"))
    }
}

fn check_outbox(config: &Config, require: &mut dyn FnMut(bool, &str)) {
    require(config.outbox.batch > 0 && config.outbox.batch <= 1000, "outbox.batch: must be 1 to 1000");
    require(config.outbox.poll_ms >= 10, "outbox.poll_ms: must be at least 10");
    require(
        config.outbox.claim_s > config.broker.operation_timeout_s,
        "outbox.claim_s: must exceed broker.operation_timeout_s, or two replicas publish the same events",
    );
    require(config.outbox.high_water > 0, "outbox.high_water: must be at least 1");
    require((1..=36_500).contains(&config.retention.runs_days), "retention.runs_days: must be 1 to 36500");
    require(config.retention.interval_s > 0, "retention.interval_s: must be at least 1");
}

/// A token that no `Authorization` header can carry would lock everybody out.
fn check_http(config: &Config, require: &mut dyn FnMut(bool, &str)) {
    let fits = config.http.token.expose_secret().bytes().all(|byte| byte.is_ascii_graphic());
    require(fits, "http.token: must be visible ASCII without blanks, as an Authorization header carries it");
}

fn check_telemetry(config: &Config, require: &mut dyn FnMut(bool, &str)) {
    let deployment = &config.telemetry.deployment;
    let is_segment = deployment.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte));
    require(
        is_segment && (1..=100).contains(&deployment.len()),
        "telemetry.deployment: must be 1 to 100 letters, digits and -._~; it is part of the source of events, a URI reference",
    );
    let endpoint = &config.telemetry.otlp_endpoint;
    let address = url::Url::parse(endpoint).ok();
    let has_query = address.as_ref().is_some_and(|url| url.query().is_some() || url.fragment().is_some());
    let fits = address.is_some_and(|url| {
        ["http", "https"].contains(&url.scheme())
            && url.host().is_some()
            && url.username().is_empty()
            && url.password().is_none()
    });
    // A backslash is read as a slash: the text before an `@` would be parsed as a path.
    let has_stray_user = endpoint.contains(['@', '\\']);
    require(
        endpoint.is_empty() || fits && !has_query && !has_stray_user,
        "telemetry.otlp_endpoint: must be an http:// or https:// address without user and query; set a collector's token in OTEL_EXPORTER_OTLP_HEADERS",
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
