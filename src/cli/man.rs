//! `inventoryd man`: manual pages.

use std::path::PathBuf;

use clap::CommandFactory;

use super::{Cli, CliError, Context, Outcome};

/// Print the manual page of inventoryd, or write the pages of all commands to a folder
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Folder for inventoryd.1, inventoryd-check.1 and so on
    #[arg(long, value_name = "FOLDER")]
    dir: Option<PathBuf>,
}

pub(super) fn run(args: &Args, context: &mut Context<'_>) -> Result<Outcome, CliError> {
    if let Some(folder) = &args.dir {
        let failed = |error: std::io::Error| CliError::Failed(format!("can't write to {}: {error}", folder.display()));
        std::fs::create_dir_all(folder).map_err(failed)?;
        clap_mangen::generate_to(Cli::command(), folder).map_err(failed)?;
        return Ok(Outcome::Done);
    }
    let mut page = Vec::new();
    clap_mangen::Man::new(Cli::command()).render(&mut page)?;
    context.out.bytes(&page)?;
    Ok(Outcome::Done)
}

#[cfg(test)]
mod tests {
    use super::super::tests::call;

    #[test]
    fn every_command_has_a_page() {
        assert!(call(&["man"]).1.contains(".TH inventoryd 1"));
        let folder = std::env::temp_dir().join(format!("inventoryd-man-{}", std::process::id()));
        assert_eq!(call(&["man", "--dir", folder.to_str().unwrap()]).0, 0);
        assert!(folder.join("inventoryd-explain.1").exists());
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
