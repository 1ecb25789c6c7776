//! Configuration: compiled-in defaults, overridden by a file, overridden by the environment; validated as a whole.
//!
//! `config/default.toml` is the reference of every key. Only this module reads the environment.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use schemars::JsonSchema;
use secrecy::SecretString;
use serde::Deserialize;

mod check;
mod cloud;
mod credential;
mod layers;
mod load;
mod reference;
mod rotation;
mod schema;
mod settings;

pub use cloud::Cloud;
pub use credential::{CredentialConfig, CredentialKind, credential_by_name};
pub use reference::{KeyReference, find as find_keys, json_schema};
pub use rotation::RotatedSecret;
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
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(title = "inventoryd configuration")]
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
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "config/default.toml documents every key")]
pub struct BrokerConfig {
    #[schemars(with = "String")]
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
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "config/default.toml documents every key")]
pub struct TopologyConfig {
    pub prefix: String,
    pub mode: TopologyMode,
    pub delivery_limit: u32,
}

/// Handling of exchanges and queues.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum TopologyMode {
    /// Declare missing objects.
    Declare,
    /// Only verify that they exist.
    Verify,
}

/// `[consumer]`
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "config/default.toml documents every key")]
pub struct ConsumerConfig {
    pub prefetch: u16,
    pub watchdog_s: u64,
    pub drain_s: u64,
    pub broker_timeout_s: u64,
}

/// `[run]`
#[derive(Debug, Clone, Deserialize, JsonSchema)]
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
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "config/default.toml documents every key")]
pub struct LimitsConfig {
    pub tenant_max_runs: u32,
    pub fleet_max_runs: u32,
    pub when_full: WhenFull,
    pub defer_max_s: u64,
}

/// Handling of a request above a limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum WhenFull {
    /// Record a skipped run.
    Skip,
    /// Retry later.
    Defer,
}

/// `[graph]`
#[derive(Debug, Clone, Deserialize, JsonSchema)]
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
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "config/default.toml documents every key")]
pub struct DatabaseConfig {
    #[schemars(with = "String")]
    pub url: SecretString,
    #[serde(default, deserialize_with = "path_or_none")]
    pub url_file: Option<PathBuf>,
    pub max_connections: u32,
    pub control_connections: u32,
    pub acquire_timeout_s: u64,
    pub statement_timeout_s: u64,
}

/// `[outbox]`
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "config/default.toml documents every key")]
pub struct OutboxConfig {
    pub poll_ms: u64,
    pub batch: u32,
    pub claim_s: u64,
    pub high_water: i64,
}

/// `[retention]`
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "config/default.toml documents every key")]
pub struct RetentionConfig {
    pub runs_days: u32,
    pub interval_s: u64,
}

/// `[http]`
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "config/default.toml documents every key")]
pub struct HttpConfig {
    #[serde(deserialize_with = "address_or_none")]
    #[schemars(with = "String")]
    pub listen: Option<SocketAddr>,
    #[schemars(with = "String")]
    pub token: SecretString,
    #[serde(default, deserialize_with = "path_or_none")]
    pub token_file: Option<PathBuf>,
}

/// `[telemetry]`
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "config/default.toml documents every key")]
pub struct TelemetryConfig {
    pub log: String,
    pub format: LogFormat,
    pub deployment: String,
    pub otlp_endpoint: String,
}

/// Format of log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
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
mod tests;
