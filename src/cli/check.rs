//! `inventoryd check`: the configuration that the daemon would run with.

use super::{CliError, Context, Outcome};
use crate::config::Config;

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
        settings.retain(|setting| setting.origin != crate::config::Origin::Default);
    }
    context.out.rows(["key", "value", "from"], &settings, |setting| {
        let value = if setting.value.is_empty() { "\"\"".to_owned() } else { setting.value.clone() };
        [setting.key.clone(), value, setting.origin.to_string()]
    })?;
    // Shown first, judged then: where a value comes from is what one wants to know about a bad one.
    loaded?.graph.catalog()?;
    Ok(Outcome::Done)
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
}
