//! `inventoryd completions`: shell completion scripts.

use clap::CommandFactory;
use clap_complete::Shell;

use super::{Cli, CliError, Context, Outcome};

/// Print a completion script for a shell
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    shell: Shell,
}

pub(super) fn run(args: &Args, context: &mut Context<'_>) -> Result<Outcome, CliError> {
    // Buffered, because the generator panics on a closed pipe.
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "inventoryd", &mut script);
    context.out.bytes(&script)?;
    Ok(Outcome::Done)
}

#[cfg(test)]
mod tests {
    use super::super::tests::call;

    #[test]
    fn every_shell_is_supported() {
        for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
            let (code, script) = call(&["completions", shell]);
            assert!(code == 0 && script.contains("explain"), "{shell}");
        }
    }
}
