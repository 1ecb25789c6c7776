//! Effective value and origin of every key; secret values never leave this module.

use std::collections::BTreeMap;
use std::fmt;

use config::{Value, ValueKind};
use schemars::JsonSchema;
use serde::Serialize;

use super::layers::ENVIRONMENT;
use super::schema::{self, Key, SECRETS};

const REDACTED: &str = "[redacted]";

/// One key of the configuration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, JsonSchema)]
pub struct Setting {
    /// Key, such as `consumer.prefetch`.
    pub key: String,
    /// Value as text; redacted for a secret.
    pub value: String,
    /// Layer that set the value.
    pub origin: Origin,
}

/// Origin of a value.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Origin {
    /// `config/default.toml`, compiled in.
    Default,
    /// File given with `--config` or `INVENTORYD_CONFIG`.
    File(String),
    /// Environment variable.
    Environment,
    /// File named by another key.
    SecretFile(String),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File(path) => write!(f, "file {path}"),
            Self::Environment => f.write_str("environment"),
            Self::SecretFile(key) => write!(f, "file named by {key}"),
        }
    }
}

/// All known keys below `root`, sorted. Only known keys without a secret show their value.
pub(super) fn of(root: &Value) -> Vec<Setting> {
    let mut found = BTreeMap::new();
    collect(&mut Vec::new(), root, &mut found);
    let secrets: Vec<String> = found.keys().filter(|key| is_secret(key)).cloned().collect();
    for key in secrets {
        let file_key = format!("{key}_file");
        if found.get(&file_key).is_some_and(|file: &Setting| !file.value.is_empty()) {
            let setting =
                Setting { key: key.clone(), value: REDACTED.to_owned(), origin: Origin::SecretFile(file_key) };
            found.insert(key, setting);
        }
    }
    found.into_values().collect()
}

fn collect(path: &mut Vec<String>, value: &Value, found: &mut BTreeMap<String, Setting>) {
    if let ValueKind::Table(table) = &value.kind {
        for (name, inner) in table {
            path.push(name.clone());
            collect(path, inner, found);
            path.pop();
        }
        return;
    }
    let Key::Leaf(kind) = schema::find(path) else { return };
    let key = path.join(".");
    let origin = match value.origin() {
        None => Origin::Default,
        Some(ENVIRONMENT) => Origin::Environment,
        Some(path) => Origin::File(path.to_owned()),
    };
    let value = schema::shown(&key, kind, &value.kind.to_string());
    found.insert(key.clone(), Setting { key, value, origin });
}

fn is_secret(key: &str) -> bool {
    key.rsplit('.').next().is_some_and(|last| SECRETS.contains(&last))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, DEFAULTS};

    fn settings(variables: &[(&str, &str)]) -> Vec<Setting> {
        let variables = variables.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        Config::explain_with(None, variables).unwrap()
    }

    fn one<'a>(settings: &'a [Setting], key: &str) -> &'a Setting {
        settings.iter().find(|setting| setting.key == key).unwrap()
    }

    #[test]
    fn every_key_has_value_and_origin() {
        let folder = std::env::temp_dir().join(format!("inventoryd-settings-{}", std::process::id()));
        std::fs::write(&folder, "[run]\nlease_s = 90\nbatch_rows = 100\n").unwrap();
        let variables = [("INVENTORYD__RUN__BATCH_ROWS".to_owned(), "200".to_owned())].into();
        let found = Config::explain_with(Some(&folder), variables).unwrap();
        std::fs::remove_file(&folder).unwrap();
        assert_eq!(one(&found, "consumer.prefetch").origin, Origin::Default);
        let lease = one(&found, "run.lease_s");
        assert_eq!(lease.value, "90");
        assert!(lease.origin.to_string().contains("inventoryd-settings-"), "{lease:?}");
        let batch = one(&found, "run.batch_rows");
        assert_eq!((batch.value.as_str(), &batch.origin), ("200", &Origin::Environment));
        let defaults: toml::Table = DEFAULTS.parse().unwrap();
        assert!(defaults.keys().all(|section| found.iter().any(|s| s.key.starts_with(&format!("{section}.")))));
    }

    #[test]
    fn secret_values_are_redacted() {
        let found = settings(&[
            ("INVENTORYD__BROKER__URL", "amqps://me:hunter2@one/%2f?x=hunter2,amqp://me:hunter2@two:99/v"),
            ("INVENTORYD__DATABASE__URL", "postgres://me:hun/ter2@h/db"),
            ("INVENTORYD__GRAPH__CREDENTIALS__EMEA__CLIENT_SECRET", "hunter2"),
            ("INVENTORYD__HTTP__TOKEN_FILE", "/run/secrets/token"),
        ]);
        let shown = format!("{found:?}");
        assert!(!shown.contains("hunter2") && !shown.contains("ter2"), "{shown}");
        assert_eq!(
            one(&found, "broker.url").value,
            "amqps://me:[redacted]@one/%2f?[redacted],amqp://me:[redacted]@two:99/v"
        );
        assert_eq!(one(&found, "database.url").value, REDACTED);
        assert_eq!(one(&found, "graph.credentials.emea.client_secret").value, REDACTED);
        assert_eq!(
            one(&found, "graph.credentials.default.client_secret").value,
            "",
            "an unset secret is shown as empty"
        );
        assert_eq!(one(&found, "http.token").origin, Origin::SecretFile("http.token_file".to_owned()));
        assert_eq!(one(&found, "graph.base_url").value, "", "no secret");
    }

    #[test]
    fn url_with_a_second_at_sign_is_redacted_whole() {
        // Without a colon the parser takes everything before the last @ for the user's name.
        let found = settings(&[("INVENTORYD__BROKER__URL", "amqp://me@hunter2@one/")]);
        assert_eq!(one(&found, "broker.url").value, REDACTED);
    }

    #[test]
    fn every_secret_field_is_redacted() {
        let fields = concat!(include_str!("../config.rs"), include_str!("credential.rs")).lines();
        let secrets: Vec<&str> = fields
            .filter_map(|line| line.trim().trim_start_matches("pub ").split_once(": "))
            .filter(|(_, kind)| kind.starts_with("SecretString") || kind.starts_with("Option<SecretString"))
            .map(|(name, _)| name)
            .collect();
        assert!(secrets.len() >= 4, "{secrets:?}");
        assert!(secrets.iter().all(|name| SECRETS.contains(name)), "{secrets:?}");
    }
}
