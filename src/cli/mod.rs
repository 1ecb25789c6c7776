//! The command line: one file per subcommand, each with its arguments and its `run`.
//!
//! Results go to standard output, as tables or with `--json` as JSON; everything else goes to standard error.
//! Exit codes: 0 success, 1 failure, 2 usage error.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::broker::BrokerError;
use crate::config::{Config, ConfigError};
use crate::store::{Store, StoreError};

mod check;
mod completions;
mod config;
mod confirm;
mod dead;
mod doctor;
mod events;
mod explain;
mod hash;
mod ids;
mod items;
mod man;
mod migrate;
mod missing;
mod moment;
mod output;
mod progress;
mod request;
mod run_diff;
mod runs;
mod schema;
mod selection;
mod serve;
mod tenant;
mod types;

use output::Out;

/// Keeps a last-observed inventory of Microsoft Intune tenants.
#[derive(Debug, Parser)]
#[command(name = "inventoryd", version, max_term_width = 100, propagate_version = true)]
pub struct Cli {
    /// Configuration file; environment variables (INVENTORYD__SECTION__KEY) override it
    #[arg(long, global = true, value_name = "FILE", env = "INVENTORYD_CONFIG", hide_env_values = true)]
    config: Option<PathBuf>,
    /// Print JSON instead of tables
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Serve(serve::Args),
    Migrate(migrate::Args),
    Check(check::Args),
    Config(config::Args),
    Doctor(doctor::Args),
    Tenant(tenant::Args),
    Request(request::Args),
    Runs(runs::Args),
    Items(items::Args),
    Missing(missing::Args),
    Dead(dead::Args),
    Events(events::Args),
    Types(types::Args),
    Hash(hash::Args),
    Explain(explain::Args),
    Schema(schema::Args),
    Completions(completions::Args),
    Man(man::Args),
}

/// Result of a command that completed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    /// The command succeeded.
    Done,
    /// The command completed, and the state that it reported is a failure.
    Unsuccessful,
}

/// Error that ended a command.
#[derive(Debug, thiserror::Error)]
enum CliError {
    /// One or more lines, each with cause and remedy.
    #[error("{0}")]
    Failed(String),
    /// Invalid combination of arguments.
    #[error("{0}")]
    Usage(String),
    /// The reader of standard output has closed it; not reported as an error.
    #[error("standard output was closed")]
    BrokenPipe,
}

impl From<std::io::Error> for CliError {
    fn from(error: std::io::Error) -> Self {
        match error.kind() {
            std::io::ErrorKind::BrokenPipe => Self::BrokenPipe,
            _ => Self::Failed(format!("can't write to standard output: {error}")),
        }
    }
}

impl From<ConfigError> for CliError {
    fn from(error: ConfigError) -> Self {
        Self::Failed(error.to_string())
    }
}

impl From<StoreError> for CliError {
    fn from(error: StoreError) -> Self {
        Self::Failed(error.to_string())
    }
}

impl From<BrokerError> for CliError {
    fn from(error: BrokerError) -> Self {
        Self::Failed(error.to_string())
    }
}

/// Configuration file and output shared by all commands.
struct Context<'a> {
    config_file: Option<PathBuf>,
    out: Out<'a>,
}

impl Context<'_> {
    fn config(&self) -> Result<Config, CliError> {
        Ok(Config::load(self.config_file.as_deref())?)
    }

    /// Connects to the database and verifies the schema version.
    async fn store(&self) -> Result<Store, CliError> {
        let config = self.config()?;
        let store = Store::connect(&config.database)?;
        store.check_schema().await?;
        Ok(store)
    }
}

/// Runs an asynchronous command on one thread.
fn block_on(command: impl Future<Output = Result<Outcome, CliError>>) -> Result<Outcome, CliError> {
    run_to_completion(tokio::runtime::Builder::new_current_thread(), command)
}

fn block_on_all_cores(command: impl Future<Output = Result<Outcome, CliError>>) -> Result<Outcome, CliError> {
    run_to_completion(tokio::runtime::Builder::new_multi_thread(), command)
}

fn run_to_completion(
    mut threads: tokio::runtime::Builder,
    command: impl Future<Output = Result<Outcome, CliError>>,
) -> Result<Outcome, CliError> {
    let runtime =
        threads.enable_all().build().map_err(|error| CliError::Failed(format!("can't start the runtime: {error}")))?;
    let ended = runtime.block_on(command);
    // A pending DNS lookup must not delay the exit.
    runtime.shutdown_background();
    ended
}

/// Prints a note to standard error.
fn note(text: impl std::fmt::Display) {
    // There is no place left to report a closed standard error.
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// Parses the arguments of this process, runs the command, and returns the exit code.
#[must_use]
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let mut stdout = std::io::stdout().lock();
    let ended = run(cli, &mut stdout, output::terminal_width());
    report(&ended);
    ExitCode::from(exit_code(&ended))
}

/// Runs a command. `width` is that of the terminal, if standard output is one.
fn run(cli: Cli, stdout: &mut dyn Write, width: Option<u16>) -> Result<Outcome, CliError> {
    let mut context = Context { config_file: cli.config, out: Out::new(stdout, cli.json).sized(width) };
    let outcome = dispatch(cli.command, &mut context)?;
    context.out.flush()?;
    Ok(outcome)
}

fn dispatch(command: Command, context: &mut Context<'_>) -> Result<Outcome, CliError> {
    match command {
        Command::Serve(args) => block_on_all_cores(serve::run(&args, context)),
        Command::Migrate(args) => block_on(migrate::run(&args, context)),
        Command::Check(args) => block_on(check::run(&args, context)),
        Command::Config(args) => config::run(&args, context),
        Command::Doctor(args) => block_on(doctor::run(&args, context)),
        Command::Tenant(args) => block_on(tenant::run(args, context)),
        Command::Request(args) => block_on(request::run(&args, context)),
        Command::Runs(args) => block_on(runs::run(args, context)),
        Command::Items(args) => block_on(items::run(args, context)),
        Command::Missing(args) => block_on(missing::run(&args, context)),
        Command::Dead(args) => block_on(dead::run(args, context)),
        Command::Events(args) => block_on(events::run(args, context)),
        Command::Types(args) => types::run(&args, context),
        Command::Hash(args) => hash::run(&args, context),
        Command::Explain(args) => explain::run(&args, context),
        Command::Schema(args) => schema::run(&args, context),
        Command::Completions(args) => completions::run(&args, context),
        Command::Man(args) => man::run(&args, context),
    }
}

fn report(ended: &Result<Outcome, CliError>) {
    let Err(error @ (CliError::Failed(text) | CliError::Usage(text))) = ended else { return };
    let mut lines: String = text.lines().map(|line| format!("error: {line}\n")).collect();
    if matches!(error, CliError::Usage(_)) {
        lines.push_str("For more information, try '--help'.\n");
    }
    // There is no place left to report a closed standard error.
    let _ = std::io::stderr().write_all(lines.as_bytes());
}

fn exit_code(ended: &Result<Outcome, CliError>) -> u8 {
    match ended {
        Ok(Outcome::Done) | Err(CliError::BrokenPipe) => 0,
        Ok(Outcome::Unsuccessful) | Err(CliError::Failed(_)) => 1,
        Err(CliError::Usage(_)) => 2,
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    /// Runs a command line; returns exit code and standard output.
    pub(super) fn call(arguments: &[&str]) -> (u8, String) {
        let cli = Cli::try_parse_from(std::iter::once(&"inventoryd").chain(arguments)).unwrap();
        let mut stdout = Vec::new();
        let code = exit_code(&run(cli, &mut stdout, None));
        (code, String::from_utf8(stdout).unwrap())
    }

    struct Closed;

    impl Write for Closed {
        fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
            Err(std::io::ErrorKind::BrokenPipe.into())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn command_definitions_are_valid() {
        Cli::command().debug_assert();
    }

    #[test]
    fn exit_codes_are_0_success_1_failure_2_usage() {
        assert_eq!(call(&["explain", "worker_lost"]).0, 0);
        assert_eq!(call(&["explain", "no_such_code"]).0, 2);
        assert_eq!(call(&["--config", "/no/such/file", "check"]).0, 1);
        assert_eq!(Cli::try_parse_from(["inventoryd", "launch"]).unwrap_err().exit_code(), 2);
        assert_eq!(Cli::try_parse_from(["inventoryd", "--help"]).unwrap_err().exit_code(), 0);
    }

    #[test]
    fn a_closed_pipe_exits_0() {
        let cli = Cli::try_parse_from(["inventoryd", "types"]).unwrap();
        let ended = run(cli, &mut Closed, None);
        assert!(matches!(ended, Err(CliError::BrokenPipe)));
        assert_eq!(exit_code(&ended), 0);
    }
}
