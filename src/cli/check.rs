//! `inventoryd check`: the configuration that the daemon would run with.

use super::{CliError, Context, Outcome, note};
use crate::broker::Broker;
use crate::config::{Config, Origin};
use crate::graph::GraphClient;

/// Check the configuration and print every key, its value and where that comes from; secrets are not shown
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Only the keys whose value is not the default
    #[arg(long)]
    changed: bool,
}

pub(super) fn run(args: &Args, context: &mut Context<'_>) -> Result<Outcome, CliError> {
    let (mut settings, loaded) = Config::explain(context.config_file.as_deref())?;
    if args.changed {
        settings.retain(|setting| setting.origin != Origin::Default);
    }
    context.out.rows(["key", "value", "from"], &settings, |setting| {
        let value = if setting.value.is_empty() { "\"\"".to_owned() } else { setting.value.clone() };
        [setting.key.clone(), value, setting.origin.to_string()]
    })?;
    // Shown first, judged then: where a value comes from is what one wants to know about a bad one.
    let config = loaded?;
    if let Some(warning) = config.warning() {
        note(format_args!("warning: {warning}"));
    }
    let problems = problems(&config);
    if problems.is_empty() { Ok(Outcome::Done) } else { Err(CliError::Failed(problems.join("\n"))) }
}

/// What `serve` would refuse before it connects anywhere.
fn problems(config: &Config) -> Vec<String> {
    let catalog = config.graph.catalog().err().map(|error| error.to_string());
    let graph = match GraphClient::new(&config.graph) {
        Ok(graph) => graph.credential_problems(),
        Err(error) => vec![error.to_string()],
    };
    let broker = Broker::new(&config.broker, &config.topology, "inventoryd check").err().map(|error| error.to_string());
    catalog.into_iter().chain(graph).chain(broker).collect()
}

#[cfg(test)]
mod tests {
    use super::super::tests::call;

    #[test]
    fn the_configuration_is_shown_with_its_origins_and_without_secrets() {
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
    fn files_that_are_not_there_are_problems_one_line_each() {
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
