//! `inventoryd check`: validates and prints the effective configuration.

use super::{CliError, Context, Outcome, note};
use crate::broker::Broker;
use crate::config::{Config, KeyReference, Origin, find_keys};
use crate::graph::GraphClient;
use crate::store::{Store, StoreError};
use crate::telemetry;

/// Validate the configuration and print every key with its value and origin; secrets are redacted
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Only keys whose value is not the default
    #[arg(long)]
    changed: bool,
    /// Also connect to RabbitMQ and PostgreSQL as a start does, and check versions, permissions, topology and schema
    #[arg(long, conflicts_with = "explain")]
    connect: bool,
    /// Explain a key, or every key of a section, instead: meaning, default, unit and variable
    #[arg(long, value_name = "KEY", conflicts_with = "changed")]
    explain: Option<String>,
}

pub(super) async fn run(args: &Args, context: &mut Context<'_>) -> Result<Outcome, CliError> {
    if let Some(name) = &args.explain {
        return explain(name, context);
    }
    let (mut settings, loaded) = Config::explain(context.config_file.as_deref())?;
    if args.changed {
        settings.retain(|setting| setting.origin != Origin::Default);
    }
    context.out.rows(["key", "value", "from"], &["from"], &settings, |setting| {
        let value = if setting.value.is_empty() { "\"\"".to_owned() } else { setting.value.clone() };
        [setting.key.clone(), value, setting.origin.to_string()]
    })?;
    // Printed before the validation result, because the origin of an invalid value is needed to correct it.
    let config = loaded?;
    for warning in config.warnings() {
        note(format_args!("warning: {warning}"));
    }
    let mut problems = problems(&config);
    if problems.is_empty() && args.connect {
        problems.extend(connect(&config).await);
    }
    if problems.is_empty() { Ok(Outcome::Done) } else { Err(CliError::Failed(problems.join("\n"))) }
}

/// Problems that would keep a start from working with the servers. Their versions are noted.
async fn connect(config: &Config) -> Vec<String> {
    let broker = match Broker::new(&config.broker, &config.topology, "inventoryd check") {
        Ok(broker) => broker,
        Err(error) => return vec![error.to_string()],
    };
    let checked = broker.check().await;
    if let Some((version, tested)) = broker.version() {
        note_version("RabbitMQ", &version, tested);
    }
    let mut problems = Vec::new();
    match checked {
        Ok(warnings) => warnings.iter().for_each(|warning| note(format_args!("warning: {warning}"))),
        Err(error) => problems.push(error.to_string()),
    }
    match connect_to_database(config).await {
        Ok(()) => {}
        Err(error) => problems.push(error.to_string()),
    }
    problems
}

async fn connect_to_database(config: &Config) -> Result<(), StoreError> {
    let store = Store::connect(&config.database)?;
    let checked = store.check_schema().await;
    if let Some((version, tested)) = store.server_version() {
        note_version("PostgreSQL", &version, tested);
    }
    for warning in checked? {
        note(format_args!("warning: {warning}"));
    }
    Ok(())
}

fn note_version(server: &str, version: &str, tested: bool) {
    note(format_args!("{server} {version}: {}", if tested { "tested" } else { "newer than the tested versions" }));
}

/// Prints the documentation of the keys that `name` means.
fn explain(name: &str, context: &mut Context<'_>) -> Result<Outcome, CliError> {
    let keys = find_keys(name);
    if keys.is_empty() {
        return Err(CliError::Usage("unknown key or section; `inventoryd check` lists every key".to_owned()));
    }
    if context.out.is_json() {
        context.out.json(&keys)?;
        return Ok(Outcome::Done);
    }
    for KeyReference { key, text, default, unit, variable } in keys {
        context.out.line(format_args!("{key}\n  {text}"))?;
        context.out.line(format_args!("  default   {}", default.as_deref().unwrap_or("none")))?;
        context.out.line(format_args!("  unit      {}", unit.unwrap_or("none")))?;
        context.out.line(format_args!("  variable  {variable}"))?;
    }
    Ok(Outcome::Done)
}

/// Problems that would stop `serve` before it connects.
fn problems(config: &Config) -> Vec<String> {
    let catalog = config.graph.catalog().err().map(|error| error.to_string());
    let graph = match GraphClient::new(&config.graph) {
        Ok(graph) => graph.credential_problems(),
        Err(error) => vec![error.to_string()],
    };
    let broker = Broker::new(&config.broker, &config.topology, "inventoryd check").err().map(|error| error.to_string());
    let log = telemetry::check_log_directives(&config.telemetry).err();
    catalog.into_iter().chain(graph).chain(broker).chain(log).collect()
}

#[cfg(test)]
mod tests {
    use super::super::tests::call;

    #[test]
    fn settings_are_shown_with_origin_and_without_secrets() {
        let path = std::env::temp_dir().join(format!("inventoryd-check-{}.toml", std::process::id()));
        std::fs::write(&path, "[http]\ntoken = \"hunter2\"\n[consumer]\nprefetch = 3\n").unwrap();
        let file = path.to_str().unwrap();
        let (code, shown) = call(&["--config", file, "check"]);
        assert_eq!(code, 0);
        assert!(!shown.contains("hunter2"), "{shown}");
        let line = |key: &str| shown.lines().find(|line| line.contains(key)).unwrap().to_owned();
        assert!(line("http.token").contains("[redacted]") && line("http.token").contains("file "), "{shown}");
        assert!(line("consumer.prefetch").contains(" 3 ") && line("run.lease_s").contains("default"), "{shown}");
        std::fs::write(&path, "[consumer]\nprefetch = 0\n[run]\nlease_s = 1\n").unwrap();
        let (code, shown) = call(&["check", "--changed", "--json", "--config", file]);
        std::fs::remove_file(&path).unwrap();
        assert_eq!(code, 1);
        let rows: Vec<serde_json::Value> = serde_json::from_str(&shown).unwrap();
        assert_eq!(rows.len(), 2, "a bad value is shown too: {shown}");
    }

    #[test]
    fn a_key_is_explained_with_default_unit_and_variable() {
        let (code, shown) = call(&["check", "--explain", "run.lease_s"]);
        assert_eq!(code, 0);
        for part in ["run.lease_s", "run of a crashed worker", "60", "seconds", "INVENTORYD__RUN__LEASE_S"] {
            assert!(shown.contains(part), "{part}: {shown}");
        }
        let (_, json) = call(&["check", "--explain", "INVENTORYD__GRAPH__CREDENTIALS__EMEA__CLIENT_ID", "--json"]);
        assert!(json.contains("graph.credentials.*.client_id"), "{json}");
        assert_eq!(call(&["check", "--explain", "run.leese_s"]).0, 2);
    }

    #[test]
    fn each_missing_file_is_one_problem() {
        let mut config = crate::config::Config::load_with(None, std::collections::BTreeMap::new()).unwrap();
        assert_eq!(super::problems(&config), [""; 0]);
        config.graph.ca_file = Some("/no/such/file".into());
        config.graph.policy_types_file = Some("/no/such/file".into());
        config.broker.ca_file = Some("/no/such/file".into());
        let problems = super::problems(&config);
        let named = ["graph.policy_types_file", "graph.ca_file", "broker.ca_file"];
        assert!(problems.iter().zip(named).all(|(problem, key)| problem.starts_with(key)), "{problems:?}");
        assert_eq!(problems.len(), 3);
    }
}
