//! `inventoryd explain`: cause and remedy of error codes and dead-letter reasons.

use std::str::FromStr;

use clap::ValueEnum;
use schemars::JsonSchema;
use serde::Serialize;

use super::{CliError, Context, Outcome};
use crate::domain::failure::{DeadReason, ErrorCode};
use crate::telemetry::METRICS;

/// Explain an error code of a run or the reason of a dead letter; without CODE, all of them
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The code, such as graph_forbidden
    code: Option<String>,
    /// Print a page of the documentation: config/ERRORS.md, or with =metrics deploy/METRICS.md
    #[arg(long, value_name = "PAGE", conflicts_with = "code", num_args = 0..=1, require_equals = true,
          default_missing_value = "codes")]
    markdown: Option<Page>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Page {
    Codes,
    Metrics,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
enum Kind {
    /// Error code of a run.
    ErrorCode,
    /// Reason of a dead letter.
    DeadReason,
}

/// Code, as printed with `--json`.
#[derive(Debug, Clone, Copy, Serialize, JsonSchema)]
pub(super) struct Meaning {
    /// Stable code.
    code: &'static str,
    /// List that the code belongs to.
    kind: Kind,
    /// Cause, for operators.
    cause: &'static str,
    /// Remedy, for operators.
    remedy: &'static str,
}

impl From<ErrorCode> for Meaning {
    fn from(code: ErrorCode) -> Self {
        Self { code: code.as_str(), kind: Kind::ErrorCode, cause: code.cause(), remedy: code.remedy() }
    }
}

impl From<DeadReason> for Meaning {
    fn from(reason: DeadReason) -> Self {
        Self { code: reason.as_str(), kind: Kind::DeadReason, cause: reason.cause(), remedy: reason.remedy() }
    }
}

pub(super) fn run(args: &Args, context: &mut Context<'_>) -> Result<Outcome, CliError> {
    match (&args.code, args.markdown) {
        (Some(code), _) => one(code, context),
        (None, Some(Page::Codes)) => context.out.bytes(markdown().as_bytes()),
        (None, Some(Page::Metrics)) => context.out.bytes(markdown_of_metrics().as_bytes()),
        (None, None) => every(context),
    }?;
    Ok(Outcome::Done)
}

fn one(code: &str, context: &mut Context<'_>) -> Result<(), CliError> {
    let meaning = ErrorCode::from_str(code)
        .map(Meaning::from)
        .or_else(|_| DeadReason::from_str(code).map(Meaning::from))
        .map_err(|_| CliError::Usage(format!("unknown code {code:?}; `inventoryd explain` lists all codes")))?;
    if context.out.is_json() {
        return context.out.json(&meaning);
    }
    let what = match meaning.kind {
        Kind::ErrorCode => "error code of a run",
        Kind::DeadReason => "reason of a dead letter",
    };
    context.out.line(format_args!("{} ({what})", meaning.code))?;
    context.out.line(format_args!("  Cause:  {}", meaning.cause))?;
    context.out.line(format_args!("  Remedy: {}", meaning.remedy))
}

fn every(context: &mut Context<'_>) -> Result<(), CliError> {
    context.out.rows(["code", "of a", "cause", "remedy"], &["of a"], &meanings(), |meaning| {
        let of = if meaning.kind == Kind::ErrorCode { "run" } else { "dead letter" };
        [meaning.code, of, meaning.cause, meaning.remedy].map(str::to_owned)
    })
}

fn meanings() -> Vec<Meaning> {
    let codes = ErrorCode::ALL.iter().map(|code| Meaning::from(*code));
    codes.chain(DeadReason::ALL.iter().map(|reason| Meaning::from(*reason))).collect()
}

/// Page with a section per code, so that each has an anchor.
fn markdown() -> String {
    let mut text =
        "# Error codes\n\nWritten by `inventoryd explain --markdown`; `inventoryd explain CODE` prints one.\n"
            .to_owned();
    for (heading, kind) in [("Error codes of a run", Kind::ErrorCode), ("Reasons of a dead letter", Kind::DeadReason)] {
        text += &format!("\n## {heading}\n");
        for meaning in meanings().iter().filter(|meaning| meaning.kind == kind) {
            text += &format!("\n### {}\n\n{}\n\nRemedy: {}\n", meaning.code, meaning.cause, meaning.remedy);
        }
    }
    text
}

/// Page with a list entry per metric.
fn markdown_of_metrics() -> String {
    let mut text = "# Metrics\n\nWritten by `inventoryd explain --markdown=metrics`. \
                    Histograms are in seconds.\n\n"
        .to_owned();
    for metric in METRICS {
        let kind = format!("{:?}", metric.kind).to_lowercase();
        let by = metric.label.map(|label| format!(" by `{}`", label.name)).unwrap_or_default();
        text += &format!("* `{}` ({kind}{by}): {}\n", metric.name, metric.help);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::super::tests::call;
    use super::*;

    #[test]
    fn every_code_is_explained() {
        for meaning in meanings() {
            let (code, text) = call(&["explain", meaning.code]);
            assert_eq!(code, 0);
            assert!(text.contains(meaning.cause) && text.contains(meaning.remedy), "{text}");
        }
        let (_, all) = call(&["explain", "--json"]);
        let all: Vec<serde_json::Value> = serde_json::from_str(&all).unwrap();
        assert_eq!(all.len(), ErrorCode::ALL.len() + DeadReason::ALL.len());
    }

    #[test]
    fn the_markdown_pages_are_complete() {
        let (_, text) = call(&["explain", "--markdown"]);
        assert!(meanings().iter().all(|meaning| text.contains(&format!("\n### {}\n", meaning.code))));
        let (_, metrics) = call(&["explain", "--markdown=metrics"]);
        assert!(METRICS.iter().all(|metric| metrics.contains(&format!("* `{}` (", metric.name))));
    }
}
