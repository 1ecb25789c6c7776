//! The known keys of the configuration, their kinds, and the ones that hold a secret.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use super::DEFAULTS;

/// Keys without a default: files that replace a secret.
pub(super) const SECRET_FILES: [&str; 5] = [
    "broker.url_file",
    "database.url_file",
    "http.token_file",
    "graph.credentials.*.client_secret_file",
    "graph.credentials.*.client_certificate_password_file",
];
/// Last parts of the keys that hold a secret.
pub(super) const SECRETS: [&str; 4] = ["client_secret", "client_certificate_password", "token", "url"];
/// Keys that hold an address without user and password.
const ADDRESSES: [&str; 4] = ["graph.base_url", "graph.authority", "graph.proxy", "telemetry.otlp_endpoint"];

/// Values of the keys that name one of a few: any other value may be a secret in the wrong place.
const CHOICES: [(&str, &[&str]); 5] = [
    ("topology.mode", &["declare", "verify"]),
    ("limits.when_full", &["skip", "defer"]),
    ("graph.cloud", &["global", "usgov_l4", "usgov_l5", "china", "custom"]),
    ("graph.credentials.*.kind", &["client_secret", "client_certificate", "workload_identity", "managed_identity"]),
    ("telemetry.format", &["json", "pretty"]),
];

/// Kind of a key's value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Text,
    Integer,
    Number,
}

impl Kind {
    /// True if a value of a file is of this kind. Numbers may be written as text, as in the environment.
    pub(super) fn accepts(self, value: &toml::Value) -> bool {
        matches!(
            (self, value),
            (_, toml::Value::String(_))
                | (Self::Integer | Self::Number, toml::Value::Integer(_))
                | (Self::Number, toml::Value::Float(_))
        )
    }

    /// True if a text is a value of this kind, and thereby no secret in the wrong place.
    pub(super) fn matches(self, text: &str) -> bool {
        match self {
            Self::Text => true,
            Self::Integer => text.parse::<i128>().is_ok(),
            Self::Number => text.parse::<f64>().is_ok(),
        }
    }

    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Text => "a string",
            Self::Integer => "an integer",
            Self::Number => "a number",
        }
    }
}

/// Meaning of a path of names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Key {
    Section,
    Leaf(Kind),
    Unknown,
}

static KEYS: LazyLock<BTreeMap<String, Kind>> = LazyLock::new(|| {
    let mut keys = BTreeMap::new();
    collect(&DEFAULTS.parse().unwrap_or_default(), "", &mut keys);
    keys.extend(SECRET_FILES.map(|key| (key.to_owned(), Kind::Text)));
    keys
});

fn collect(table: &toml::Table, path: &str, keys: &mut BTreeMap<String, Kind>) {
    for (name, value) in table {
        let name = if path == "graph.credentials." { "*" } else { name };
        let key = format!("{path}{name}");
        match value {
            toml::Value::Table(inner) => collect(inner, &format!("{key}."), keys),
            toml::Value::Integer(_) => drop(keys.insert(key, Kind::Integer)),
            toml::Value::Float(_) => drop(keys.insert(key, Kind::Number)),
            _ => drop(keys.insert(key, Kind::Text)),
        }
    }
}

/// Every key.
#[cfg(test)]
pub(super) fn all_keys() -> impl Iterator<Item = String> {
    KEYS.keys().cloned()
}

/// Keys that name a file.
#[cfg(test)]
pub(super) fn file_keys() -> impl Iterator<Item = String> {
    KEYS.keys().filter(|key| key.ends_with("_file")).cloned()
}

/// Keys whose text is never shown in full: secrets, addresses and numbers.
#[cfg(test)]
pub(super) fn keys_that_hide_text() -> impl Iterator<Item = String> {
    let hides = |(key, kind): &(&String, &Kind)| {
        let last = key.rsplit('.').next().unwrap_or(key);
        **kind != Kind::Text
            || SECRETS.contains(&last)
            || ADDRESSES.contains(&key.as_str())
            || !is_plausible(key, "no such value")
    };
    KEYS.iter().filter(hides).map(|(key, _)| key.clone())
}

/// Looks a path up; the third name below `graph.credentials` may be any.
pub(super) fn find(path: &[String]) -> Key {
    let mut names: Vec<&str> = path.iter().map(String::as_str).collect();
    if let [graph, credentials, name, ..] = names.as_mut_slice()
        && (*graph, *credentials) == ("graph", "credentials")
    {
        if name.is_empty() || name.contains('.') {
            return Key::Unknown;
        }
        *name = "*";
    }
    if names.iter().any(|name| name.contains('.')) {
        return Key::Unknown;
    }
    let key = names.join(".");
    if let Some(kind) = KEYS.get(&key) {
        return Key::Leaf(*kind);
    }
    let inside = format!("{key}.");
    if KEYS.keys().any(|known| known.starts_with(&inside)) { Key::Section } else { Key::Unknown }
}

/// Text of a value that may be shown: nothing of a secret, and of an address neither user nor query.
pub(super) fn shown(key: &str, kind: Kind, text: &str) -> String {
    let last = key.rsplit('.').next().unwrap_or(key);
    let hidden = || "[redacted]".to_owned();
    if text.is_empty() {
        String::new()
    } else if last == "url" || ADDRESSES.contains(&key) {
        let addresses: Option<Vec<String>> = text.split(',').map(|one| address(one.trim())).collect();
        addresses.map_or_else(hidden, |addresses| addresses.join(","))
    } else if SECRETS.contains(&last) {
        hidden()
    } else if kind.matches(text) && is_plausible(key, text) {
        text.to_owned()
    } else {
        "[invalid]".to_owned()
    }
}

/// Returns `false` for a text that the key cannot have as its value.
fn is_plausible(key: &str, text: &str) -> bool {
    let is_kind = key.starts_with("graph.credentials.") && key.ends_with(".kind");
    let known = if is_kind { "graph.credentials.*.kind" } else { key };
    let choices = CHOICES.iter().find(|(choice, _)| *choice == known);
    choices.is_none_or(|(_, values)| values.contains(&text))
        && (key != "http.listen" || text.parse::<std::net::SocketAddr>().is_ok())
}

/// Address without password and query; none if a password with an unescaped `/`, `?`, `#`, `,` or `@` could be taken for
/// another part of it.
fn address(text: &str) -> Option<String> {
    let url = url::Url::parse(text).ok()?;
    let host = url.host_str().filter(|host| !host.is_empty())?;
    let stray = |part: &str| part.contains('@');
    if stray(url.path()) || url.query().is_some_and(stray) || url.fragment().is_some() || text.matches('@').count() > 1
    {
        return None;
    }
    let is_web = url.scheme().starts_with("http");
    let user = match (url.username(), url.password()) {
        ("", None) => String::new(),
        // An address of the web takes no user; one is a secret by mistake.
        _ if is_web => "[redacted]@".to_owned(),
        (user, None) => format!("{user}@"),
        (user, Some(_)) => format!("{user}:[redacted]@"),
    };
    let port = url.port().map(|port| format!(":{port}")).unwrap_or_default();
    let path = if url.path() == "/" && is_web { "" } else { url.path() };
    let query = url.query().map(|_| "?[redacted]").unwrap_or_default();
    Some(format!("{}://{user}{host}{port}{path}{query}", url.scheme()))
}
