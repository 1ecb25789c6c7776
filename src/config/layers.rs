//! Layers of a configuration: compiled-in defaults, file, environment. Keys are validated before the layers are merged, so
//! that no later error message can quote a value.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::Path;

use config::{Map, Source, Value, ValueKind};

use super::schema::{self, Key};
use super::{ConfigError, DEFAULTS, ENVIRONMENT_PREFIX};

/// Origin recorded for values of environment variables.
pub(super) const ENVIRONMENT: &str = "the environment";
const COLLECTOR_VARIABLE: &str = "OTEL_EXPORTER_OTLP_ENDPOINT";

/// Environment variables, as the operating system provides them.
pub(super) type Variables = BTreeMap<OsString, OsString>;

/// The merged layers, and the problems found while reading them.
pub(super) struct Layers {
    pub(super) merged: config::Config,
    pub(super) problems: Vec<String>,
}

/// One layer as a tree of values that carry their origin.
#[derive(Debug, Clone, Default)]
struct Layer(Map<String, Value>);

impl Source for Layer {
    fn clone_into_box(&self) -> Box<dyn Source + Send + Sync> {
        Box::new(self.clone())
    }

    fn collect(&self) -> Result<Map<String, Value>, config::ConfigError> {
        Ok(self.0.clone())
    }
}

/// Reads and merges the layers.
pub(super) fn read(file: Option<&Path>, variables: &Variables) -> Result<Layers, ConfigError> {
    let mut problems = Vec::new();
    let defaults: toml::Table =
        DEFAULTS.parse().map_err(|_| ConfigError("config/default.toml: not valid TOML".to_owned()))?;
    let defaults = tree(&defaults, None);
    let mut file = file.map_or_else(|| Ok(Layer::default()), |path| file_layer(path, &mut problems))?;
    let collector = collector_layer(variables, &mut problems);
    let environment = environment_layer(variables, &file, &mut problems);
    drop_overridden_files(&mut file.0, &environment.0);
    let builder = config::Config::builder().add_source(Layer(defaults)).add_source(collector).add_source(file);
    let merged = builder
        .add_source(environment)
        .build()
        .map_err(|_| ConfigError("configuration: the layers can't be merged".to_owned()))?;
    Ok(Layers { merged, problems })
}

/// Layer for the variable that names the trace collector to every program of a host.
fn collector_layer(variables: &Variables, problems: &mut Vec<String>) -> Layer {
    let mut layer = Layer::default();
    if let Some(endpoint) = variables.get(&OsString::from(COLLECTOR_VARIABLE)) {
        match endpoint.to_str() {
            Some(endpoint) => insert(&mut layer.0, &["telemetry", "otlp_endpoint"], endpoint),
            None => problems.push(format!("{COLLECTOR_VARIABLE} (telemetry.otlp_endpoint): must be UTF-8")),
        }
    }
    layer
}

fn file_layer(path: &Path, problems: &mut Vec<String>) -> Result<Layer, ConfigError> {
    let refuse = |problem: String| ConfigError(format!("configuration file {}: {problem}", path.display()));
    let text = std::fs::read_to_string(path).map_err(|error| refuse(error.to_string()))?;
    // The error's own text would quote the line, and with it a secret.
    let mut table: toml::Table = toml::from_str(&text).map_err(|error| {
        let start = error.span().map_or(0, |span| span.start);
        let line = text.get(..start).unwrap_or(&text).matches('\n').count() + 1;
        refuse(format!("not valid TOML: line {line}"))
    })?;
    let place = format!("configuration file {}", path.display());
    keep_known(&mut table, &mut Vec::new(), &mut |problem| problems.push(format!("{place}: {problem}")));
    refuse_names_that_differ_by_case(&table, problems);
    Ok(Layer(tree(&table, Some(&path.display().to_string()))))
}

/// Removes the keys that don't exist or have a value of the wrong kind, and reports each without its value.
fn keep_known(table: &mut toml::Table, path: &mut Vec<String>, report: &mut dyn FnMut(String)) {
    table.retain(|name, value| {
        path.push((*name).to_owned());
        let key = path.join(".");
        let problem = match (schema::find(path), &mut *value) {
            (Key::Section, toml::Value::Table(inner)) => {
                keep_known(inner, path, report);
                None
            }
            (Key::Section, _) => Some(format!("{key}: is a section; set the keys in it")),
            (Key::Leaf(kind), value) => (!kind.accepts(value)).then(|| format!("{key}: expected {}", kind.name())),
            (Key::Unknown, _) => Some(unknown(&key)),
        };
        path.pop();
        let known = problem.is_none();
        problem.into_iter().for_each(&mut *report);
        known
    });
}

fn unknown(key: &str) -> String {
    format!("{key}: unknown key; config/default.toml lists every key")
}

/// Variables name credentials without regard to case, so that two names must differ by more than that.
fn refuse_names_that_differ_by_case(table: &toml::Table, problems: &mut Vec<String>) {
    let mut seen = BTreeMap::new();
    let credentials = table.get("graph").and_then(|graph| graph.get("credentials")).and_then(toml::Value::as_table);
    for name in credentials.into_iter().flat_map(toml::Table::keys) {
        if let Some(other) = seen.insert(name.to_lowercase(), name) {
            problems.push(format!("graph.credentials.{name}: differs from {other} only by case; rename one"));
        }
    }
}

fn environment_layer(variables: &Variables, file: &Layer, problems: &mut Vec<String>) -> Layer {
    let mut layer = Layer::default();
    let prefix = format!("{ENVIRONMENT_PREFIX}__").to_lowercase();
    for (variable, value) in variables {
        let Some(variable) = variable.to_str() else { continue };
        let lower = variable.to_lowercase();
        let Some(key) = lower.strip_prefix(&prefix) else { continue };
        let mut path: Vec<String> = key.split("__").map(str::to_owned).collect();
        use_name_of_file(&mut path, file);
        match (schema::find(&path), value.to_str()) {
            (Key::Leaf(_), Some(value)) => {
                let path: Vec<&str> = path.iter().map(String::as_str).collect();
                insert(&mut layer.0, &path, value);
            }
            (Key::Leaf(_), None) => problems.push(format!("{variable} ({}): must be UTF-8", path.join("."))),
            (Key::Section, _) => {
                problems.push(format!("{variable}: {} is a section; set the keys in it", path.join(".")));
            }
            (Key::Unknown, _) => problems.push(format!("{variable}: {}", unknown(&path.join(".")))),
        }
    }
    layer
}

/// Removes the `url_file` of the file where the environment sets `url`, and so on: the environment overrides the file also if
/// one names a secret and the other its file.
fn drop_overridden_files(file: &mut Map<String, Value>, environment: &Map<String, Value>) {
    for (name, value) in environment {
        match (&value.kind, file.get_mut(name).map(|below| &mut below.kind)) {
            (ValueKind::Table(inner), Some(ValueKind::Table(below))) => drop_overridden_files(below, inner),
            (ValueKind::String(text), _) if !text.is_empty() => drop(file.remove(&format!("{name}_file"))),
            _ => {}
        }
    }
}

/// Replaces the lower-case name of a credential by the spelling in the file.
fn use_name_of_file(path: &mut [String], file: &Layer) {
    let [graph, credentials, name, ..] = path else { return };
    let table = |value: Option<&Value>| value.and_then(|value| value.clone().into_table().ok());
    let known = table(file.0.get(graph.as_str())).and_then(|graph| table(graph.get(credentials.as_str())));
    if let Some(spelling) = known.into_iter().flat_map(Map::into_keys).find(|known| known.to_lowercase() == *name) {
        *name = spelling;
    }
}

fn insert(table: &mut Map<String, Value>, path: &[&str], text: &str) {
    let origin = ENVIRONMENT.to_owned();
    match path {
        [] => {}
        [key] => {
            table.insert((*key).to_owned(), Value::new(Some(&origin), text));
        }
        [section, rest @ ..] => {
            let empty = || Value::new(Some(&origin), ValueKind::Table(Map::new()));
            let inner = table.entry((*section).to_owned()).or_insert_with(empty);
            if let ValueKind::Table(inner) = &mut inner.kind {
                insert(inner, rest, text);
            }
        }
    }
}

fn tree(table: &toml::Table, origin: Option<&String>) -> Map<String, Value> {
    table.iter().map(|(key, value)| (key.clone(), Value::new(origin, kind(value, origin)))).collect()
}

fn kind(value: &toml::Value, origin: Option<&String>) -> ValueKind {
    match value {
        toml::Value::Table(table) => ValueKind::Table(tree(table, origin)),
        toml::Value::String(text) => text.as_str().into(),
        toml::Value::Integer(number) => (*number).into(),
        toml::Value::Float(number) => (*number).into(),
        toml::Value::Boolean(value) => (*value).into(),
        // Neither is a kind of any key.
        toml::Value::Array(_) | toml::Value::Datetime(_) => ValueKind::Nil,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStringExt;

    use proptest::prelude::*;
    use secrecy::ExposeSecret;

    use super::*;
    use crate::config::Config;

    const MARKER: &str = "hunter2";

    fn everything_shown(file: Option<&Path>, variables: &Variables) -> String {
        match read(file, variables) {
            Ok(layers) => {
                let settings = format!("{:?}", super::super::settings::of(&layers.merged.cache));
                let strings = variables
                    .iter()
                    .filter_map(|(name, value)| Some((name.to_str()?.to_owned(), value.to_str()?.to_owned())));
                let loaded = Config::load_with(file, strings.collect());
                format!("{settings}\n{}\n{loaded:?}", layers.problems.join("\n"))
            }
            Err(error) => error.to_string(),
        }
    }

    fn variables(given: &[(&str, &str)]) -> Variables {
        given.iter().map(|(name, value)| (OsString::from(name), OsString::from(value))).collect()
    }

    #[test]
    fn secrets_in_the_wrong_place_are_not_shown() {
        for (name, value) in [
            ("INVENTORYD__BROKER__PASSWORD", "hunter2"),
            ("INVENTORYD__DATABASE__PASSWORD", "hunter2"),
            ("INVENTORYD__GRAPH__CREDENTIALS__DEFAULT__SECRET", "hunter2"),
            ("INVENTORYD__BROKER", "amqp://u:hunter2@h"),
            ("INVENTORYD__GRAPH__CREDENTIALS__DEFAULT", "hunter2"),
            ("INVENTORYD__TELEMETRY__OTLP_ENDPOINT", "http://hunter2:hunter2@h"),
            ("INVENTORYD__TELEMETRY__OTLP_ENDPOINT", "http://h/?api-key=hunter2"),
            ("INVENTORYD__GRAPH__BASE_URL", "https://hunter2@h"),
            ("INVENTORYD__GRAPH__BASE_URL", "https://h/?sig=hunter2"),
            ("INVENTORYD__DATABASE__URL", "postgres://u:12?hunter2@h/d"),
            ("INVENTORYD__DATABASE__URL", "postgres://u:12#hunter2@h/d"),
            ("INVENTORYD__DATABASE__URL", "postgres://u:12/hunter2@h/d"),
            ("INVENTORYD__DATABASE__URL", "postgres://u@h/d?sslmode=hunter2"),
            ("INVENTORYD__CONSUMER__PREFETCH", "hunter2"),
            ("INVENTORYD__GRAPH__CLOUD__X", "hunter2"),
            ("INVENTORYD__HTTP__TOKEN", "hunter2 hunter2"),
        ] {
            let given = variables(&[(name, value)]);
            let shown = everything_shown(None, &given);
            assert!(!shown.contains(MARKER), "{name}={value}: {shown}");
            let loaded = Config::load_with(None, [(name.to_owned(), value.to_owned())].into());
            assert!(loaded.is_err(), "{name}={value} must be refused");
        }
    }

    #[test]
    fn a_value_that_is_not_utf8_is_refused_by_the_name_of_its_key() {
        for name in ["INVENTORYD__HTTP__TOKEN", "OTEL_EXPORTER_OTLP_ENDPOINT"] {
            let value = OsString::from_vec(b"hunter2\xff".to_vec());
            let layers = read(None, &[(OsString::from(name), value)].into()).unwrap();
            assert!(layers.problems[0].contains(name) && layers.problems[0].contains("UTF-8"), "{:?}", layers.problems);
            assert!(!layers.problems[0].contains(MARKER));
        }
        let headers = OsString::from_vec(b"authorization=hunter2\xff".to_vec());
        let layers = read(None, &[(OsString::from("OTEL_EXPORTER_OTLP_HEADERS"), headers)].into()).unwrap();
        assert!(layers.problems.is_empty(), "not a variable of the configuration");
    }

    #[test]
    fn a_variable_overrides_the_secret_file_of_the_file() {
        let path = std::env::temp_dir().join(format!("inventoryd-secrets-{}.toml", std::process::id()));
        let text =
            "[database]\nurl_file = \"/nowhere\"\n[graph.credentials.default]\nclient_secret_file = \"/nowhere\"\n";
        std::fs::write(&path, text).unwrap();
        let url = ("INVENTORYD__DATABASE__URL", "postgres://owner@h/d");
        let secret = ("INVENTORYD__GRAPH__CREDENTIALS__DEFAULT__CLIENT_SECRET", "hunter2");
        let id = ("INVENTORYD__GRAPH__CREDENTIALS__DEFAULT__CLIENT_ID", "app");
        let load = |given: &[(&str, &str)]| {
            Config::load_with(Some(&path), given.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect())
        };
        let config = load(&[url, secret, id]).unwrap();
        assert_eq!((config.database.url.expose_secret(), config.database.url_file), (url.1, None));
        assert!(
            load(&[url, id]).unwrap_err().to_string().contains("client_secret_file: /nowhere"),
            "nothing overrides it"
        );
        assert!(load(&[("INVENTORYD__DATABASE__URL", ""), secret, id]).is_err(), "an empty variable overrides nothing");
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn a_variable_reaches_the_credential_of_the_file_in_its_spelling() {
        let path = std::env::temp_dir().join(format!("inventoryd-names-{}.toml", std::process::id()));
        std::fs::write(&path, "[graph.credentials.EMEA]\nclient_id = \"app\"\n").unwrap();
        let secret = ("INVENTORYD__GRAPH__CREDENTIALS__EMEA__CLIENT_SECRET".to_owned(), "s".to_owned());
        let config = Config::load_with(Some(&path), [secret].into()).unwrap();
        assert_eq!(config.graph.credentials.keys().collect::<Vec<_>>(), ["EMEA", "default"]);
        assert_eq!(config.graph.credentials["EMEA"].client_id, "app");
        std::fs::write(&path, "[graph.credentials.EMEA]\n[graph.credentials.emea]\n").unwrap();
        let problem = Config::load_with(Some(&path), BTreeMap::new()).unwrap_err().to_string();
        std::fs::remove_file(&path).unwrap();
        assert!(problem.contains("only by case"), "{problem}");
    }

    #[test]
    fn empty_file_variables_mean_no_file_for_every_key() {
        let given = schema::file_keys().map(|key| {
            let key = key.replace('*', "default").replace('.', "__").to_uppercase();
            (format!("INVENTORYD__{key}"), String::new())
        });
        Config::load_with(None, given.collect()).unwrap();
    }

    #[test]
    fn an_empty_secret_file_is_refused() {
        let path = std::env::temp_dir().join(format!("inventoryd-empty-{}", std::process::id()));
        for content in ["", "\n", "\r\n", " ", "\u{feff}"] {
            std::fs::write(&path, content).unwrap();
            for key in ["HTTP__TOKEN_FILE", "BROKER__URL_FILE", "GRAPH__CREDENTIALS__DEFAULT__CLIENT_SECRET_FILE"] {
                let given = [
                    (format!("INVENTORYD__{key}"), path.display().to_string()),
                    ("INVENTORYD__HTTP__TOKEN".to_owned(), "t".to_owned()),
                ];
                let problem = Config::load_with(None, given.into()).unwrap_err().to_string();
                assert!(problem.contains("the file is empty"), "{key}: {problem}");
            }
        }
        std::fs::remove_file(&path).unwrap();
        let null = ("INVENTORYD__HTTP__TOKEN_FILE".to_owned(), "/dev/null".to_owned());
        assert!(Config::load_with(None, [null].into()).is_err());
    }

    /// Where a secret may end up: every secret key, a misspelt key, a section, a value that must be a number.
    fn place() -> impl Strategy<Value = String> {
        let known: Vec<String> = schema::keys_that_hide_text().map(|key| key.replace('*', "default")).collect();
        prop_oneof![
            prop::sample::select(known).prop_map(|key| key.replace('.', "__")),
            "(broker|database|http|graph)__[a-z]{1,8}x",
            "graph__credentials__[a-z]{1,5}__[a-z]{1,8}x",
            prop::sample::select(&["broker", "graph", "graph__credentials", "graph__credentials__default"][..])
                .prop_map(str::to_owned),
        ]
    }

    /// A secret alone, and inside an address.
    fn secret() -> impl Strategy<Value = String> {
        let around = "[ -~]{0,12}";
        prop_oneof![
            (around, around).prop_map(|(before, after)| format!("{before}{MARKER}{after}")),
            ("(amqp|postgres|https?)", "[ -~]{0,6}", "[ -~]{0,6}")
                .prop_map(|(scheme, before, after)| format!("{scheme}://u:{before}{MARKER}{after}@host:1/x")),
            "(amqp|postgres|https?)".prop_map(|scheme| format!("{scheme}://host/?key={MARKER}")),
        ]
    }

    proptest! {
        #[test]
        fn no_secret_is_ever_shown(place in place(), secret in secret()) {
            let variable = format!("INVENTORYD__{}", place.to_uppercase());
            let shown = everything_shown(None, &variables(&[(&variable, &secret)]));
            prop_assert!(!shown.contains(MARKER), "{variable}={secret}: {shown}");
            let path = std::env::temp_dir().join(format!("inventoryd-secret-{}.toml", std::process::id()));
            std::fs::write(&path, format!("{} = {}\n", place.replace("__", "."), serde_json::Value::from(secret))).unwrap();
            let shown = everything_shown(Some(&path), &Variables::new());
            prop_assert!(!shown.contains(MARKER), "{place}: {shown}");
        }
    }
}
