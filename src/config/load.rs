//! Loading of a configuration: defaults, file, environment, secret files, and validation.

use std::collections::BTreeMap;
use std::path::Path;

use secrecy::{ExposeSecret, SecretString};

use super::layers::{self, Layers, Variables};
use super::settings::{self, Setting};
use super::{Config, ConfigError, GraphConfig, check};
use crate::domain::catalog::Catalog;

impl Config {
    /// Loads the configuration of this process.
    ///
    /// # Errors
    /// One line per problem: an unknown key, an invalid value, an invalid combination, an unreadable file.
    pub fn load(file: Option<&Path>) -> Result<Self, ConfigError> {
        finish(layers::read(file, &process_variables())?)
    }

    /// Loads a configuration with the given variables instead of the process environment.
    pub fn load_with(file: Option<&Path>, variables: BTreeMap<String, String>) -> Result<Self, ConfigError> {
        finish(layers::read(file, &os_strings(variables))?)
    }

    /// Every key with value and origin, and the result of [`Config::load`].
    pub fn explain(file: Option<&Path>) -> Result<(Vec<Setting>, Result<Self, ConfigError>), ConfigError> {
        let layers = layers::read(file, &process_variables())?;
        Ok((settings::of(&layers.merged.cache), finish(layers)))
    }

    /// Every key with value and origin, for the given variables.
    #[cfg(test)]
    pub(super) fn explain_with(
        file: Option<&Path>,
        variables: BTreeMap<String, String>,
    ) -> Result<Vec<Setting>, ConfigError> {
        Ok(settings::of(&layers::read(file, &os_strings(variables))?.merged.cache))
    }

    /// Reads the files of all secrets; the error names every file that is missing or empty.
    fn read_secret_files(&mut self) -> Result<(), ConfigError> {
        let mut read = vec![
            read_secret("broker.url_file", self.broker.url_file.as_deref(), &mut self.broker.url),
            read_secret("database.url_file", self.database.url_file.as_deref(), &mut self.database.url),
            read_secret("http.token_file", self.http.token_file.as_deref(), &mut self.http.token),
        ];
        for (name, credential) in &mut self.graph.credentials {
            let key = format!("graph.credentials.{name}.client_secret_file");
            read.push(read_secret(&key, credential.client_secret_file.as_deref(), &mut credential.client_secret));
            let key = format!("graph.credentials.{name}.client_certificate_password_file");
            let file = credential.client_certificate_password_file.as_deref();
            read.push(read_secret(&key, file, &mut credential.client_certificate_password));
        }
        let problems: Vec<String> = read.into_iter().filter_map(Result::err).map(|error| error.to_string()).collect();
        if problems.is_empty() { Ok(()) } else { Err(ConfigError(problems.join("\n"))) }
    }
}

impl GraphConfig {
    /// Loads the policy types from `policy_types_file`, or the compiled-in ones.
    ///
    /// # Errors
    /// If the file can't be read or contains an invalid contract.
    pub fn catalog(&self) -> Result<Catalog, ConfigError> {
        let Some(path) = &self.policy_types_file else { return Ok(Catalog::built_in()) };
        let refuse = |problem: String| ConfigError(format!("graph.policy_types_file: {}: {problem}", path.display()));
        let text = std::fs::read_to_string(path).map_err(|error| refuse(error.to_string()))?;
        Catalog::parse(&text).map_err(refuse)
    }
}

fn process_variables() -> Variables {
    std::env::vars_os().collect()
}

fn os_strings(variables: BTreeMap<String, String>) -> Variables {
    variables.into_iter().map(|(name, value)| (name.into(), value.into())).collect()
}

fn finish(layers: Layers) -> Result<Config, ConfigError> {
    let Layers { merged, mut problems } = layers;
    let mut config: Config = match merged.try_deserialize() {
        Ok(config) => config,
        Err(error) => {
            problems.push(describe(&error));
            return Err(ConfigError(problems.join("\n")));
        }
    };
    if !problems.is_empty() {
        return Err(ConfigError(problems.join("\n")));
    }
    config.read_secret_files()?;
    check::check(&config)?;
    Ok(config)
}

/// Key and expected value of a deserialisation error. The text of the error is not used, because it quotes the value.
fn describe(error: &config::ConfigError) -> String {
    match error {
        config::ConfigError::At { error, key: Some(key), .. } => format!("{key}: {}", expected(error)),
        config::ConfigError::Type { key: Some(key), .. } => format!("{key}: {}", expected(error)),
        other => format!("configuration: {}; config/default.toml lists every key", expected(other)),
    }
}

fn expected(error: &config::ConfigError) -> String {
    match error {
        config::ConfigError::Type { expected, .. } => format!("expected {expected}"),
        config::ConfigError::At { error, .. } => expected(error),
        // Serde ends its messages with the values that it knows; the value found is in front of them.
        config::ConfigError::Message(text) => {
            let known = text.rsplit_once("expected ").map(|(_, known)| known);
            known.map_or_else(|| "invalid value".to_owned(), |known| format!("expected {known}"))
        }
        _ => "invalid value".to_owned(),
    }
}

/// Replaces a secret by the content of the file, without a byte order mark and surrounding blanks.
pub(super) fn read_secret(key: &str, file: Option<&Path>, secret: &mut SecretString) -> Result<(), ConfigError> {
    let Some(path) = file else { return Ok(()) };
    let refuse = |problem: &str| ConfigError(format!("{key}: {}: {problem}", path.display()));
    let text = std::fs::read_to_string(path).map_err(|error| refuse(&format!("can't read the file: {error}")))?;
    *secret = text.trim_start_matches('\u{feff}').trim().into();
    // An empty secret would mean none, and open what it protects.
    if secret.expose_secret().is_empty() {
        return Err(refuse("the file is empty; write the secret to it, or remove the key"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_missing_or_empty_secret_is_named() {
        let files = [("BROKER__URL_FILE", "/nowhere/broker"), ("DATABASE__URL_FILE", "/dev/null")];
        let variables = files.map(|(key, file)| (format!("INVENTORYD__{key}"), file.to_owned()));
        let problems = Config::load_with(None, variables.into()).unwrap_err().to_string();
        for problem in
            ["broker.url_file: /nowhere/broker: can't read", "database.url_file: /dev/null: the file is empty"]
        {
            assert!(problems.contains(problem), "{problem}: {problems}");
        }
    }

    #[test]
    fn a_syntax_error_is_reported_without_quoting_the_file() {
        let path = std::env::temp_dir().join(format!("inventoryd-broken-{}.toml", std::process::id()));
        std::fs::write(&path, "[http]\ntoken = \"hunter2\n").unwrap();
        let problem = Config::load(Some(&path)).unwrap_err().to_string();
        std::fs::remove_file(&path).unwrap();
        assert!(problem.contains("line 2") && problem.contains("inventoryd-broken"), "{problem}");
        assert!(!problem.contains("hunter2"), "{problem}");
        let missing = Config::load(Some(&path)).unwrap_err().to_string();
        assert!(missing.starts_with("configuration file ") && missing.contains("No such file"), "{missing}");
    }
}
