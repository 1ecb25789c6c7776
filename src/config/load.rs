//! How a configuration is put together: defaults, file, environment, secret files, and then the checks.

use std::collections::BTreeMap;
use std::path::Path;

use config::{Environment, File, FileFormat, Source};
use secrecy::SecretString;

use super::settings::{self, Setting};
use super::{Config, ConfigError, DEFAULTS, ENVIRONMENT_PREFIX, GraphConfig, check};
use crate::domain::catalog::Catalog;

const OTLP_PREFIX: &str = "OTEL_EXPORTER_OTLP";

impl Config {
    /// Reads the configuration that this process is to run with.
    ///
    /// # Errors
    /// One line for each problem: an unknown key, a value of the wrong kind, a risky combination, an unreadable file.
    pub fn load(file: Option<&Path>) -> Result<Self, ConfigError> {
        finish(layers(file, None)?)
    }

    /// Like [`Config::load`], with variables given by the caller in place of the process's own environment.
    ///
    /// # Errors
    /// As [`Config::load`].
    pub fn load_with(file: Option<&Path>, variables: BTreeMap<String, String>) -> Result<Self, ConfigError> {
        finish(layers(file, Some(variables))?)
    }

    /// Every key with its value and where that comes from, and beside it what [`Config::load`] says.
    ///
    /// # Errors
    /// If the layers can't be read at all.
    pub fn explain(file: Option<&Path>) -> Result<(Vec<Setting>, Result<Self, ConfigError>), ConfigError> {
        let layers = layers(file, None)?;
        Ok((settings::of(&layers.cache), finish(layers)))
    }

    /// Like [`Config::explain`], with variables given by the caller.
    ///
    /// # Errors
    /// As [`Config::explain`].
    #[cfg(test)]
    pub(super) fn explain_with(
        file: Option<&Path>,
        variables: BTreeMap<String, String>,
    ) -> Result<Vec<Setting>, ConfigError> {
        Ok(settings::of(&layers(file, Some(variables))?.cache))
    }

    fn read_secret_files(&mut self) -> Result<(), ConfigError> {
        read_secret("broker.url_file", self.broker.url_file.as_deref(), &mut self.broker.url)?;
        read_secret("database.url_file", self.database.url_file.as_deref(), &mut self.database.url)?;
        read_secret("http.token_file", self.http.token_file.as_deref(), &mut self.http.token)?;
        for (name, credential) in &mut self.graph.credentials {
            let key = format!("graph.credentials.{name}.client_secret_file");
            read_secret(&key, credential.client_secret_file.as_deref(), &mut credential.client_secret)?;
        }
        Ok(())
    }
}

impl GraphConfig {
    /// The policy types to run with: those of `policy_types_file`, or the compiled-in ones.
    ///
    /// # Errors
    /// If the file can't be read, or a contract in it does not hold.
    pub fn catalog(&self) -> Result<Catalog, ConfigError> {
        let Some(path) = &self.policy_types_file else { return Ok(Catalog::built_in()) };
        let refuse = |problem: String| ConfigError(format!("graph.policy_types_file: {}: {problem}", path.display()));
        let text = std::fs::read_to_string(path).map_err(|error| refuse(error.to_string()))?;
        Catalog::parse(&text).map_err(refuse)
    }
}

/// The defaults, the file and the variables: those given, or those of this process.
fn layers(file: Option<&Path>, variables: Option<BTreeMap<String, String>>) -> Result<config::Config, ConfigError> {
    let variables = variables.map(|given| given.into_iter().collect::<config::Map<_, _>>());
    let environment = Environment::with_prefix(ENVIRONMENT_PREFIX).prefix_separator("__").separator("__");
    let collector = collector(variables.clone()).map_err(|error| refuse(&error))?;
    let mut builder =
        config::Config::builder().add_source(File::from_str(DEFAULTS, FileFormat::Toml)).add_source(collector);
    if let Some(path) = file {
        check_syntax(path).map_err(|problem| ConfigError(format!("--config {}: {problem}", path.display())))?;
        builder = builder.add_source(File::from(path).format(FileFormat::Toml));
    }
    builder.add_source(environment.source(variables)).build().map_err(|error| refuse(&error))
}

/// The variable that names a collector to every program of a host, as a layer with our name for it.
fn collector(variables: Option<config::Map<String, String>>) -> Result<config::Config, config::ConfigError> {
    let standard = Environment::with_prefix(OTLP_PREFIX).prefix_separator("_").source(variables).collect()?;
    let builder = config::Config::builder();
    match standard.get("endpoint") {
        Some(endpoint) => builder.set_override("telemetry.otlp_endpoint", endpoint.clone())?.build(),
        None => builder.build(),
    }
}

/// Looks at the file before the layers do: their error would quote the line, and with it a secret.
fn check_syntax(path: &Path) -> Result<(), String> {
    let text = std::fs::read_to_string(path).map_err(|error| error.to_string())?;
    let at = |error: &toml::de::Error| {
        let before = text.get(..error.span().map_or(0, |span| span.start)).unwrap_or(&text);
        before.matches('\n').count() + 1
    };
    toml::from_str::<toml::Table>(&text)
        .map(drop)
        .map_err(|error| format!("not TOML: line {}: {}", at(&error), error.message()))
}

fn finish(layers: config::Config) -> Result<Config, ConfigError> {
    let mut config: Config = layers.try_deserialize().map_err(|error| refuse(&error))?;
    config.read_secret_files()?;
    check::check(&config)?;
    Ok(config)
}

fn refuse(error: &config::ConfigError) -> ConfigError {
    ConfigError(format!("configuration: {error}; config/default.toml lists every key"))
}

pub(super) fn read_secret(key: &str, file: Option<&Path>, secret: &mut SecretString) -> Result<(), ConfigError> {
    let Some(path) = file else { return Ok(()) };
    let text = std::fs::read_to_string(path)
        .map_err(|error| ConfigError(format!("{key}: can't read {}: {error}", path.display())))?;
    *secret = text.trim_end_matches(['\r', '\n']).into();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_broken_file_is_refused_without_quoting_it() {
        let path = std::env::temp_dir().join(format!("inventoryd-broken-{}.toml", std::process::id()));
        std::fs::write(&path, "[http]\ntoken = \"hunter2\n").unwrap();
        let problem = Config::load(Some(&path)).unwrap_err().to_string();
        std::fs::remove_file(&path).unwrap();
        assert!(problem.contains("line 2") && problem.contains("inventoryd-broken"), "{problem}");
        assert!(!problem.contains("hunter2"), "{problem}");
        let missing = Config::load(Some(&path)).unwrap_err().to_string();
        assert!(missing.starts_with("--config ") && missing.contains("No such file"), "{missing}");
    }
}
