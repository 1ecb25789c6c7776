//! Standard output: tables, or JSON with `--json`.

use std::fmt::Display;
use std::io::Write;

use comfy_table::{
    CellAlignment, ColumnConstraint, ContentArrangement, ContentLineStyle, LineStyle, Table, TableStyle, Width,
};
use serde::Serialize;

use super::CliError;

/// Longest word that is never broken over lines, the length of a GUID, so that ids can be copied.
const WHOLE_WORD: u16 = 36;
const PADDING: u16 = 2;
const STYLE: TableStyle = TableStyle::new()
    .top_border(LineStyle::new('╭', '─', '┬', '╮'))
    .header_lines(ContentLineStyle::new('│', '│', '│'))
    .header_separator(LineStyle::new('├', '─', '┼', '┤'))
    .content_lines(ContentLineStyle::new('│', '│', '│'))
    .bottom_border(LineStyle::new('╰', '─', '┴', '╯'));

/// Destination of a command's result.
pub(super) struct Out<'a> {
    sink: &'a mut dyn Write,
    json: bool,
}

impl<'a> Out<'a> {
    pub(super) fn new(sink: &'a mut dyn Write, json: bool) -> Self {
        Self { sink, json }
    }

    /// True with `--json`.
    pub(super) fn is_json(&self) -> bool {
        self.json
    }

    /// Writes one line.
    pub(super) fn line(&mut self, text: impl Display) -> Result<(), CliError> {
        Ok(writeln!(self.sink, "{text}")?)
    }

    /// Writes bytes unchanged.
    pub(super) fn bytes(&mut self, bytes: &[u8]) -> Result<(), CliError> {
        Ok(self.sink.write_all(bytes)?)
    }

    /// Writes a JSON document, indented.
    pub(super) fn json(&mut self, value: &impl Serialize) -> Result<(), CliError> {
        let text = serde_json::to_string_pretty(value).map_err(|error| CliError::Failed(error.to_string()))?;
        self.line(text)
    }

    /// Writes rows as a table, or as a JSON array.
    pub(super) fn rows<T: Serialize, const N: usize>(
        &mut self,
        header: [&str; N],
        rows: &[T],
        cells: impl Fn(&T) -> [String; N],
    ) -> Result<(), CliError> {
        if self.json {
            return self.json(&rows);
        }
        self.line(table(header, rows.iter().map(cells)))
    }

    pub(super) fn flush(&mut self) -> Result<(), CliError> {
        Ok(self.sink.flush()?)
    }
}

/// A table that fits the terminal if that can be without breaking words; where there is no terminal, each row is a line.
pub(super) fn table<const N: usize>(header: [&str; N], rows: impl IntoIterator<Item = [String; N]>) -> Table {
    let rows: Vec<[String; N]> = rows.into_iter().map(|row| row.map(|text| printable(&text))).collect();
    let longest: [u16; N] = std::array::from_fn(|n| {
        rows.iter().map(|row| longest_word(&row[n])).fold(longest_word(header[n]), u16::max).min(WHOLE_WORD)
    });
    let numeric: [bool; N] = std::array::from_fn(|n| rows.iter().all(|row| is_number(&row[n])));
    let mut table = Table::new();
    table.load_style(STYLE).set_content_arrangement(ContentArrangement::Dynamic).set_header(header).add_rows(rows);
    for (n, column) in table.column_iter_mut().enumerate() {
        column.set_constraint(ColumnConstraint::LowerBoundary(Width::Fixed(longest[n] + PADDING)));
        if numeric[n] {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table
}

fn longest_word(text: &str) -> u16 {
    let longest = text.split_whitespace().map(|word| word.chars().count()).max().unwrap_or_default();
    u16::try_from(longest).unwrap_or(u16::MAX)
}

fn is_number(text: &str) -> bool {
    text == "-" || !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}

/// Replaces control characters: names come from tenants and must not control the terminal.
pub(super) fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() && c != '\n' { '\u{fffd}' } else { c }).collect()
}

/// Text of an optional value; a dash if absent.
pub(super) fn or_dash(value: Option<&impl Display>) -> String {
    value.map_or_else(|| "-".to_owned(), ToString::to_string)
}

/// `yes`, or nothing for false, which is easier to scan in a column.
pub(super) fn yes(value: bool) -> String {
    if value { "yes".to_owned() } else { String::new() }
}

/// Formats an RFC 3339 UTC timestamp to the second.
pub(super) fn second(rfc3339: &str) -> String {
    rfc3339.get(..19).unwrap_or(rfc3339).replace('T', " ")
}

/// Formats a duration.
pub(super) fn seconds(count: f64) -> String {
    match count {
        ..10.0 => format!("{count:.1}s"),
        ..120.0 => format!("{count:.0}s"),
        _ => format!("{:.0}min", count / 60.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_in_names_are_replaced() {
        let table = table(["name"], [["a\u{1b}[2Jb".to_owned()]]).to_string();
        assert!(!table.contains('\u{1b}') && table.contains("a\u{fffd}[2Jb"), "{table}");
    }

    #[test]
    fn timestamps_and_durations_are_short() {
        assert_eq!(second("2026-11-24T06:30:12.123456Z"), "2026-11-24 06:30:12");
        assert_eq!(["1.3s", "15s", "5min"], [1.26, 15.2, 300.0].map(seconds));
    }
}
