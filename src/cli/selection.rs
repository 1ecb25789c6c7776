//! Selection flags, shared by the commands that need a selection.

use std::collections::BTreeSet;
use std::io::Read;
use std::path::Path;

use clap::Args;

use super::CliError;
use crate::domain::request::{MAX_BODY_BYTES, SyncRequest};
use crate::domain::selection::{EVERY_TYPE, Selection};

const NOTHING: &str = "select policy types with --types, --category, --all or --foundations-only";

/// Selection flags.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Selection")]
pub(super) struct SelectionArgs {
    /// Policy types, separated by commas (`inventoryd types` lists them)
    #[arg(long, value_name = "TYPE", value_delimiter = ',')]
    types: Vec<String>,
    /// Categories, separated by commas; each selects all of its types
    #[arg(long, value_name = "CATEGORY", value_delimiter = ',')]
    category: Vec<String>,
    /// Every supported type
    #[arg(long, conflicts_with_all = ["types", "category"])]
    all: bool,
    /// Exclude the foundations (scope tags, filters, templates, roles)
    #[arg(long)]
    no_foundations: bool,
    /// Only the foundations
    #[arg(long, conflicts_with_all = ["types", "category", "all", "no_foundations"])]
    foundations_only: bool,
}

impl SelectionArgs {
    /// True if no flag was given.
    pub(super) fn is_absent(&self) -> bool {
        !(self.all || self.no_foundations || self.foundations_only) && self.types.is_empty() && self.category.is_empty()
    }

    /// Selection described by the flags.
    pub(super) fn to_selection(&self) -> Result<Selection, CliError> {
        if self.types.is_empty() && self.category.is_empty() && !self.all && !self.foundations_only {
            return Err(CliError::Usage(NOTHING.to_owned()));
        }
        let trimmed = |names: &[String]| names.iter().map(|name| name.trim().to_owned()).collect();
        let mut policy_types: BTreeSet<String> = trimmed(&self.types);
        if self.all {
            policy_types.insert(EVERY_TYPE.to_owned());
        }
        let selection =
            Selection { categories: trimmed(&self.category), include_foundations: !self.no_foundations, policy_types };
        from_json(selection.canonical_json().as_bytes()).map_err(CliError::Usage)
    }
}

/// Selection in a JSON document: a bare selection, or that of a sync request. Validated by the rules of the message, so
/// that this command and the daemon agree.
pub(super) fn from_json(text: &[u8]) -> Result<Selection, String> {
    SyncRequest::parse_selection(text).map_err(|rejection| rejection.detail)
}

/// Bytes of a file, or of standard input for `-`; reads one byte more than a message may have, to detect excess.
pub(super) fn read_file(path: &Path) -> Result<Vec<u8>, CliError> {
    let limit = MAX_BODY_BYTES as u64 + 1;
    let mut bytes = Vec::new();
    let read = if path == Path::new("-") {
        std::io::stdin().lock().take(limit).read_to_end(&mut bytes)
    } else {
        std::fs::File::open(path).and_then(|file| file.take(limit).read_to_end(&mut bytes))
    };
    read.map_err(|error| CliError::Failed(format!("can't read {}: {error}", path.display())))?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Flags {
        #[command(flatten)]
        selection: SelectionArgs,
    }

    fn selected(flags: &[&str]) -> Result<String, CliError> {
        let flags = Flags::try_parse_from(std::iter::once(&"x").chain(flags)).unwrap();
        flags.selection.to_selection().map(|selection| selection.canonical_json())
    }

    #[test]
    fn flags_form_the_selection_of_the_message() {
        let cases: [(&[&str], &str); 4] = [
            (
                &["--types", "b,a, c", "--types", "a"],
                r#"{"categories":[],"include_foundations":true,"policy_types":["a","b","c"]}"#,
            ),
            (
                &["--category", "Compliance", "--no-foundations"],
                r#"{"categories":["Compliance"],"include_foundations":false,"policy_types":[]}"#,
            ),
            (&["--all"], r#"{"categories":[],"include_foundations":true,"policy_types":["*"]}"#),
            (&["--foundations-only"], r#"{"categories":[],"include_foundations":true,"policy_types":[]}"#),
        ];
        for (flags, expected) in cases {
            assert_eq!(selected(flags).unwrap(), expected, "{flags:?}");
        }
        assert!(Flags::try_parse_from(["x", "--all", "--types", "a"]).is_err());
    }

    #[test]
    fn flags_that_select_nothing_are_a_usage_error() {
        for flags in [&[][..], &["--no-foundations"], &["--types", ""]] {
            assert!(matches!(selected(flags), Err(CliError::Usage(_))), "{flags:?}");
        }
    }

    #[test]
    fn a_document_is_a_selection_or_a_request() {
        let bare = br#"{"policy_types":["a"],"colour":1}"#;
        let request = br#"{"selection":{"policy_types":["a","a"]}}"#;
        assert_eq!(from_json(bare).unwrap().hash(), from_json(request).unwrap().hash());
        assert!(from_json(br#"{"policy_types":"a"}"#).unwrap_err().contains("selection.policy_types"));
        assert!(from_json(b"nope").unwrap_err().contains("not JSON"));
    }
}
