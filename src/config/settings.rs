//! What a configuration says key by key, and which layer said it; secrets never leave this file.

use std::collections::BTreeMap;
use std::fmt;

use config::{Value, ValueKind};
use serde::Serialize;

/// The last parts of the keys that hold a secret.
const SECRET_KEYS: [&str; 3] = ["client_secret", "token", "url"];
const REDACTED: &str = "[redacted]";

/// One key of the configuration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Setting {
    /// The key, such as `consumer.prefetch`.
    pub key: String,
    /// Its value as text; of a secret, only what may be shown.
    pub value: String,
    /// The layer that it comes from.
    pub origin: Origin,
}

/// Where the value of a key comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Origin {
    /// `config/default.toml`, compiled in.
    Default,
    /// The file given with `--config`.
    File(String),
    /// A variable of the environment.
    Environment,
    /// The file that another key names.
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

/// Every key below `root`, sorted.
pub(super) fn of(root: &Value) -> Vec<Setting> {
    let mut found = BTreeMap::new();
    collect("", root, &mut found);
    let from_files: Vec<String> = found.keys().filter(|key| is_secret(key)).cloned().collect();
    for key in from_files {
        let file_key = format!("{key}_file");
        if found.contains_key(&file_key) {
            let setting =
                Setting { key: key.clone(), value: REDACTED.to_owned(), origin: Origin::SecretFile(file_key) };
            found.insert(key, setting);
        }
    }
    found.into_values().collect()
}

fn collect(key: &str, value: &Value, found: &mut BTreeMap<String, Setting>) {
    if let ValueKind::Table(table) = &value.kind {
        for (name, inner) in table {
            let key = if key.is_empty() { name.clone() } else { format!("{key}.{name}") };
            collect(&key, inner, found);
        }
        return;
    }
    let text = value.kind.to_string();
    let value_shown = if is_secret(key) { redact(key, &text) } else { text };
    let origin = match value.origin() {
        None => Origin::Default,
        Some("the environment") => Origin::Environment,
        Some(path) => Origin::File(path.to_owned()),
    };
    found.insert(key.to_owned(), Setting { key: key.to_owned(), value: value_shown, origin });
}

fn is_secret(key: &str) -> bool {
    key.rsplit('.').next().is_some_and(|last| SECRET_KEYS.contains(&last))
}

/// What may be shown of a secret: of addresses all but the password, of others only that they are set.
fn redact(key: &str, text: &str) -> String {
    if text.is_empty() {
        return String::new();
    }
    if !key.ends_with(".url") {
        return REDACTED.to_owned();
    }
    let parts: Option<Vec<String>> = text.split(',').map(|one| redact_url(one.trim())).collect();
    parts.map_or_else(|| REDACTED.to_owned(), |parts| parts.join(","))
}

/// None for what is not clearly an address: a password with an unescaped `/`, `,` or `@` must not slip through as a
/// port or a path.
fn redact_url(text: &str) -> Option<String> {
    let url = url::Url::parse(text).ok()?;
    let host = url.host_str().filter(|host| !host.is_empty())?;
    if url.path().contains('@') || url.fragment().is_some() || text.matches('@').count() > 1 {
        return None;
    }
    let user = match (url.username(), url.password()) {
        ("", None) => String::new(),
        (user, None) => format!("{user}@"),
        (user, Some(_)) => format!("{user}:{REDACTED}@"),
    };
    let port = url.port().map(|port| format!(":{port}")).unwrap_or_default();
    let query = url.query().map(|_| format!("?{REDACTED}")).unwrap_or_default();
    Some(format!("{}://{user}{host}{port}{}{query}", url.scheme(), url.path()))
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
    fn every_key_has_its_value_and_its_origin() {
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
    fn secrets_are_named_but_not_shown() {
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
        assert_eq!(one(&found, "graph.credentials.default.client_secret").value, "", "not set is worth seeing");
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
    fn every_secret_of_the_configuration_is_known_here() {
        let fields = concat!(include_str!("../config.rs"), include_str!("credential.rs")).lines();
        let secrets: Vec<&str> = fields
            .filter_map(|line| line.trim().trim_start_matches("pub ").split_once(": "))
            .filter(|(_, kind)| kind.starts_with("SecretString") || kind.starts_with("Option<SecretString"))
            .map(|(name, _)| name)
            .collect();
        assert!(secrets.len() >= 4, "{secrets:?}");
        assert!(secrets.iter().all(|name| SECRET_KEYS.contains(name)), "{secrets:?}");
    }
}
