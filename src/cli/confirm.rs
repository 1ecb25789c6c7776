//! Confirmation of actions that cannot be undone.

use std::io::{IsTerminal, Write};

use super::CliError;

/// Flag of a command that removes something permanently.
#[derive(Debug, Clone, Copy, clap::Args)]
pub(super) struct Confirm {
    /// Do not ask for confirmation; without a terminal nothing is asked
    #[arg(long, short)]
    yes: bool,
}

impl Confirm {
    /// Asks on a terminal.
    ///
    /// # Errors
    /// If the answer is not yes; nothing may be changed then.
    pub(super) fn ask(self, question: &str) -> Result<(), CliError> {
        if self.yes || !std::io::stdin().is_terminal() {
            return Ok(());
        }
        let mut stderr = std::io::stderr();
        // Without a place to ask there is no answer either.
        let _ = write!(stderr, "{question} [y/N] ").and_then(|()| stderr.flush());
        let mut answer = String::new();
        let read = std::io::stdin().read_line(&mut answer);
        match read {
            Ok(_) if ["y", "yes"].contains(&answer.trim().to_ascii_lowercase().as_str()) => Ok(()),
            _ => Err(CliError::Failed("not confirmed; nothing was changed".to_owned())),
        }
    }
}
