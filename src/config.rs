//! Configuration: compiled-in defaults, overridden by a file, overridden by the environment; validated as a whole.
//!
//! `config/default.toml` is the reference of every key. Only this module reads the environment.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use secrecy::SecretString;
use serde::Deserialize;

mod check;
mod cloud;
mod credential;
mod layers;
mod load;
mod schema;
mod settings;

pub use cloud::Cloud;
pub use credential::{CredentialConfig, CredentialKind};
pub use settings::{Origin, Setting};

/// Default values, with their documentation.
pub const DEFAULTS: &str = include_str!("../config/default.toml");
/// Prefix of the environment variables.
pub const ENVIRONMENT_PREFIX: &str = "INVENTORYD";

/// Reasons that a configuration is invalid: one line per problem, with key and remedy.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct ConfigError(pub String);

/// Complete configuration. `config/default.toml` documents every field.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "config/default.toml documents every key")]
pub struct Config {
    pub broker: BrokerConfig,
    pub topology: TopologyConfig,
    pub consumer: ConsumerConfig,
    pub run: RunConfig,
    pub limits: LimitsConfig,
    pub graph: GraphConfig,
    pub database: DatabaseConfig,
    pub outbox: OutboxConfig,
    pub retention: RetentionConfig,
    pub http: HttpConfig,
    pub telemetry: TelemetryConfig,
}

/// `[broker]`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "config/default.toml documents every key")]
pub struct BrokerConfig {
    pub url: SecretString,
    #[serde(default, deserialize_with = "path_or_none")]
    pub url_file: Option<PathBuf>,
    pub heartbeat_s: u16,
    pub connect_timeout_s: u64,
    pub operation_timeout_s: u64,
    #[serde(deserialize_with = "path_or_none")]
    pub ca_file: Option<PathBuf>,
    #[serde(deserialize_with = "path_or_none")]
    pub client_certificate_file: Option<PathBuf>,
    #[serde(deserialize_with = "path_or_none")]
    pub client_key_file: Option<PathBuf>,
    pub server_name: String,
}

/// `[topology]`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "config/default.toml documents every key")]
pub struct TopologyConfig {
    pub prefix: String,
    pub mode: TopologyMode,
    pub delivery_limit: u32,
}

/// Handling of exchanges and queues.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TopologyMode {
    /// Declare missing objects.
    Declare,
    /// Only verify that they exist.
    Verify,
}

/// `[consumer]`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "config/default.toml documents every key")]
pub struct ConsumerConfig {
    pub prefetch: u16,
    pub watchdog_s: u64,
    pub drain_s: u64,
    pub broker_timeout_s: u64,
}

/// `[run]`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "config/default.toml documents every key")]
pub struct RunConfig {
    pub lease_s: u64,
    pub deadline_s: u64,
    pub max_attempts: i32,
    pub restart_after_s: u64,
    pub give_up_after_s: u64,
    pub concurrent_lists: usize,
    pub batch_rows: usize,
    pub suspicious_drop_share: f64,
    pub suspicious_drop_min_items: i64,
}

/// `[limits]`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "config/default.toml documents every key")]
pub struct LimitsConfig {
    pub tenant_max_runs: u32,
    pub fleet_max_runs: u32,
    pub when_full: WhenFull,
    pub defer_max_s: u64,
}

/// Handling of a request above a limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WhenFull {
    /// Record a skipped run.
    Skip,
    /// Retry later.
    Defer,
}

/// `[graph]`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "config/default.toml documents every key")]
pub struct GraphConfig {
    pub cloud: Cloud,
    pub base_url: String,
    pub authority: String,
    #[serde(deserialize_with = "path_or_none")]
    pub ca_file: Option<PathBuf>,
    pub proxy: String,
    pub no_proxy: String,
    #[serde(deserialize_with = "path_or_none")]
    pub proxy_credential_file: Option<PathBuf>,
    #[serde(deserialize_with = "path_or_none")]
    pub policy_types_file: Option<PathBuf>,
    pub request_timeout_s: u64,
    pub max_tries: u32,
    pub backoff_first_s: f64,
    pub backoff_max_s: f64,
    pub throttle_budget_s: u64,
    pub max_pages: u32,
    pub max_page_bytes: usize,
    pub rate_share: f64,
    pub intune_per_20s: u32,
    pub devices_per_20s: u32,
    pub conditional_access_per_s: u32,
    pub credentials: BTreeMap<String, CredentialConfig>,
}

impl GraphConfig {
    /// Root of Microsoft Graph, without a trailing slash.
    #[must_use]
    pub fn base_url(&self) -> &str {
        or_cloud(&self.base_url, self.cloud.base_url())
    }

    /// Root of the token service, without a trailing slash.
    #[must_use]
    pub fn authority(&self) -> &str {
        or_cloud(&self.authority, self.cloud.authority())
    }
}

fn or_cloud<'a>(given: &'a str, cloud: Option<&'a str>) -> &'a str {
    if given.is_empty() { cloud.unwrap_or_default() } else { given.trim_end_matches('/') }
}

/// `[database]`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "config/default.toml documents every key")]
pub struct DatabaseConfig {
    pub url: SecretString,
    #[serde(default, deserialize_with = "path_or_none")]
    pub url_file: Option<PathBuf>,
    pub max_connections: u32,
    pub control_connections: u32,
    pub acquire_timeout_s: u64,
    pub statement_timeout_s: u64,
}

/// `[outbox]`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "config/default.toml documents every key")]
pub struct OutboxConfig {
    pub poll_ms: u64,
    pub batch: u32,
    pub claim_s: u64,
    pub high_water: i64,
}

/// `[retention]`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "config/default.toml documents every key")]
pub struct RetentionConfig {
    pub runs_days: u32,
    pub interval_s: u64,
}

/// `[http]`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "config/default.toml documents every key")]
pub struct HttpConfig {
    #[serde(deserialize_with = "address_or_none")]
    pub listen: Option<SocketAddr>,
    pub token: SecretString,
    #[serde(default, deserialize_with = "path_or_none")]
    pub token_file: Option<PathBuf>,
}

/// `[telemetry]`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "config/default.toml documents every key")]
pub struct TelemetryConfig {
    pub log: String,
    pub format: LogFormat,
    pub deployment: String,
    pub otlp_endpoint: String,
}

/// Format of log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LogFormat {
    /// One JSON object per line.
    Json,
    /// Human-readable text.
    Pretty,
}

fn path_or_none<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<PathBuf>, D::Error> {
    let text = String::deserialize(deserializer)?;
    Ok((!text.is_empty()).then(|| PathBuf::from(text)))
}

fn address_or_none<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<SocketAddr>, D::Error> {
    let text = String::deserialize(deserializer)?;
    if text.is_empty() {
        return Ok(None);
    }
    text.parse()
        .map(Some)
        .map_err(|_| serde::de::Error::custom("expected IP:PORT, such as 127.0.0.1:9464, or an empty value"))
}

/// Converts seconds to a duration.
#[must_use]
pub fn seconds(count: u64) -> Duration {
    Duration::from_secs(count)
}

#[cfg(test)]
mod tests {
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
}
