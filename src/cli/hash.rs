//! `inventoryd hash`: prints the canonical form and hash of a selection.

use std::path::PathBuf;

use serde_json::json;

use super::selection::{SelectionArgs, from_json, read_file};
use super::{CliError, Context, Outcome};

/// Print the canonical JSON of a selection and its hash
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    selection: SelectionArgs,
    /// JSON file with a selection or a sync request instead of flags; - for standard input
    #[arg(value_name = "FILE")]
    file: Option<PathBuf>,
}

pub(super) fn run(args: &Args, context: &mut Context<'_>) -> Result<Outcome, CliError> {
    let selection = match &args.file {
        Some(_) if !args.selection.is_absent() => {
            return Err(CliError::Usage("use either a file or flags, not both".to_owned()));
        }
        Some(path) => from_json(&read_file(path)?)
            .map_err(|problem| CliError::Failed(format!("{}: {problem}", path.display())))?,
        None => args.selection.to_selection()?,
    };
    let catalog = context.config()?.graph.catalog()?;
    catalog.resolve_request(&selection).map_err(|rejection| CliError::Usage(rejection.detail))?;
    let (canonical, hash) = (selection.canonical_json(), selection.hash());
    if context.out.is_json() {
        context.out.json(&json!({ "selection": selection, "canonical": canonical, "selection_hash": hash }))?;
    } else {
        context.out.line(canonical)?;
        context.out.line(hash)?;
    }
    Ok(Outcome::Done)
}

#[cfg(test)]
mod tests {
    use super::super::tests::call;

    #[test]
    fn published_test_vector_matches() {
        let (code, text) = call(&["hash", "--types", "settingsCatalogPolicy,deviceConfiguration"]);
        let expected = "1bccf37db3f8e2b3ded5ac4c16d5a332050dfc7a7734d87ec089b7d1b9457b21";
        assert_eq!((code, text.lines().last()), (0, Some(expected)));
        let (_, json) = call(&["hash", "--types", "settingsCatalogPolicy,deviceConfiguration", "--json"]);
        assert!(json.contains(expected) && json.contains("canonical"));
        assert_eq!(call(&["hash", "--all", "x.json"]).0, 2);
        assert_eq!(call(&["hash", "--types", "roleScopeTag", "--no-foundations"]).0, 2, "nothing is left to read");
        assert_eq!(call(&["hash", "/no/such/file"]).0, 1);
    }
}
