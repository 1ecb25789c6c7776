//! Standard output: tables, or JSON with `--json`.

use std::fmt::Display;
use std::io::Write;

use comfy_table::{
    CellAlignment, ColumnConstraint, ContentArrangement, ContentLineStyle, LineStyle, Table, TableStyle, Width,
};
use serde::Serialize;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::CliError;
use crate::domain::clock;

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
    terminal: Option<Terminal>,
}

/// Terminal that shows the result to a person.
#[derive(Debug, Clone, Copy)]
struct Terminal {
    width: u16,
    now_unix_s: i64,
}

impl<'a> Out<'a> {
    /// Writes to a file or pipe: full tables and exact times.
    pub(super) fn new(sink: &'a mut dyn Write, json: bool) -> Self {
        Self { sink, json, terminal: None }
    }

    /// Writes to a terminal of this width, or as [`Self::new`] without one: tables fit the width, times are relative.
    pub(super) fn sized(self, width: Option<u16>) -> Self {
        let terminal = width.map(|width| Terminal { width, now_unix_s: clock::wall_clock_unix_s() });
        Self { terminal, ..self }
    }

    /// Format of times for this destination.
    pub(super) fn times(&self) -> Times {
        Times(self.terminal.map(|terminal| terminal.now_unix_s))
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

    /// Writes a line of comma-separated values (RFC 4180).
    pub(super) fn csv_row(&mut self, values: &[&str]) -> Result<(), CliError> {
        let on_terminal = self.terminal.is_some();
        let quoted = |value: &&str| {
            let value = if on_terminal { printable(value) } else { (*value).to_owned() };
            if value.contains(['"', ',', '\r', '\n']) { format!("\"{}\"", value.replace('"', "\"\"")) } else { value }
        };
        let line: Vec<String> = values.iter().map(quoted).collect();
        Ok(write!(self.sink, "{}\r\n", line.join(","))?)
    }

    /// Writes a JSON document, indented.
    pub(super) fn json(&mut self, value: &impl Serialize) -> Result<(), CliError> {
        let text = serde_json::to_string_pretty(value).map_err(|error| CliError::Failed(error.to_string()))?;
        self.line(text)
    }

    /// Writes rows as a table, or as a JSON array. On a narrow terminal the `optional` columns are hidden, the first ones
    /// first, until the others fit.
    pub(super) fn rows<T: Serialize, const N: usize>(
        &mut self,
        header: [&str; N],
        optional: &[&str],
        rows: &[T],
        cells: impl Fn(&T) -> [String; N],
    ) -> Result<(), CliError> {
        if self.json {
            return self.json(&rows);
        }
        self.table(header, optional, rows.iter().map(cells))
    }

    /// Writes a table, as [`Self::rows`] does.
    pub(super) fn table<const N: usize>(
        &mut self,
        header: [&str; N],
        optional: &[&str],
        rows: impl IntoIterator<Item = [String; N]>,
    ) -> Result<(), CliError> {
        let rows: Vec<[String; N]> = rows.into_iter().map(|row| row.map(|text| printable(&text))).collect();
        let (table, hidden) = table(&header, optional, &rows, self.terminal.map(|terminal| terminal.width));
        self.line(table)?;
        if hidden.is_empty() {
            return Ok(());
        }
        self.line(format_args!("hidden on this narrow terminal: {}; --json shows everything", hidden.join(", ")))
    }

    pub(super) fn flush(&mut self) -> Result<(), CliError> {
        Ok(self.sink.flush()?)
    }
}

/// Format of times: relative on a terminal, exact otherwise.
#[derive(Debug, Clone, Copy)]
pub(super) struct Times(Option<i64>);

impl Times {
    /// Formats an RFC 3339 UTC timestamp.
    pub(super) fn show(self, rfc3339: &str) -> String {
        match (self.0, OffsetDateTime::parse(rfc3339, &Rfc3339)) {
            (Some(now), Ok(moment)) => ago(now - moment.unix_timestamp()),
            _ => second(rfc3339),
        }
    }

    /// Formats a timestamp exactly, with its age on a terminal.
    pub(super) fn show_exactly(self, rfc3339: &str) -> String {
        match self.0 {
            Some(_) => format!("{} ({})", second(rfc3339), self.show(rfc3339)),
            None => second(rfc3339),
        }
    }
}

fn ago(seconds: i64) -> String {
    match seconds {
        i64::MIN..0 => format!("in {} s", -seconds),
        0..60 => format!("{seconds} s ago"),
        60..3_600 => format!("{} min ago", seconds / 60),
        3_600..172_800 => format!("{} h ago", seconds / 3_600),
        _ => format!("{} days ago", seconds / 86_400),
    }
}

/// Width of the terminal that standard output is connected to; none without one.
pub(super) fn terminal_width() -> Option<u16> {
    Table::new().width()
}

/// Width of a column's border and padding.
const FRAME: u16 = PADDING + 1;

/// Table within `width`, and the names of the columns that were left out for it. Without a width each row is a line.
fn table(
    header: &[&str],
    optional: &[&str],
    rows: &[impl AsRef<[String]>],
    width: Option<u16>,
) -> (Table, Vec<String>) {
    let column = |n: usize| rows.iter().map(move |row| row.as_ref()[n].as_str());
    let longest = |n: usize| column(n).map(longest_word).fold(longest_word(header[n]), u16::max).min(WHOLE_WORD);
    let mut shown: Vec<usize> = (0..header.len()).collect();
    let mut hidden = Vec::new();
    let fits = |shown: &[usize]| {
        let needed: u16 = shown.iter().map(|n| longest(*n) + FRAME).sum();
        width.is_none_or(|width| needed < width)
    };
    for name in optional {
        if fits(&shown) {
            break;
        }
        shown.retain(|n| header[*n] != *name);
        hidden.push((*name).to_owned());
    }
    let keeps_words = fits(&shown);
    let mut table = Table::new();
    table.load_style(STYLE).set_content_arrangement(ContentArrangement::Dynamic);
    table.set_header(shown.iter().map(|n| header[*n]));
    table.add_rows(rows.iter().map(|row| shown.iter().map(|n| row.as_ref()[*n].as_str()).collect::<Vec<_>>()));
    if let Some(width) = width {
        table.set_width(width);
    }
    for (column_of_table, n) in table.column_iter_mut().zip(shown) {
        if keeps_words {
            column_of_table.set_constraint(ColumnConstraint::LowerBoundary(Width::Fixed(longest(n) + PADDING)));
        }
        if column(n).all(is_number) {
            column_of_table.set_cell_alignment(CellAlignment::Right);
        }
    }
    (table, hidden)
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

    fn shown<const N: usize>(header: [&str; N], optional: &[&str], row: [&str; N], width: Option<u16>) -> String {
        let mut sink = Vec::new();
        let mut out = Out::new(&mut sink, false).sized(width);
        out.table(header, optional, [row.map(str::to_owned)]).unwrap();
        String::from_utf8(sink).unwrap()
    }

    fn widest(text: &str) -> usize {
        text.lines().map(|line| line.chars().count()).max().unwrap()
    }

    #[test]
    fn control_characters_in_names_are_replaced() {
        let table = shown(["name"], &[], ["a\u{1b}[2Jb"], None);
        assert!(!table.contains('\u{1b}') && table.contains("a\u{fffd}[2Jb"), "{table}");
    }

    #[test]
    fn tables_fit_the_terminal() {
        let (id, key) = ("0193a1b2-0000-7000-8000-000000000001", "nightly-2026-11-24-contoso");
        let table = |width| shown(["run", "key", "note"], &["key"], [id, key, "a longer remark of many words"], width);
        assert!(table(None).contains(key) && table(None).contains("a longer remark of many words"));
        let narrow = table(Some(60));
        assert!(widest(&narrow) <= 60 && narrow.contains(id) && !narrow.contains(key), "{narrow}");
        assert!(narrow.contains("hidden on this narrow terminal: key"), "{narrow}");
        for width in [20, 30, 40, 80, 120] {
            let table = table(Some(width));
            let lines = table.lines().filter(|line| !line.starts_with("hidden")).map(|line| line.chars().count());
            assert!(lines.max().unwrap() <= usize::from(width), "{width}: {table}");
        }
    }

    #[test]
    fn values_are_quoted_where_csv_requires_it() {
        let mut sink = Vec::new();
        Out::new(&mut sink, false).csv_row(&["plain", "a,b", "say \"hi\"", "two\nlines", ""]).unwrap();
        assert_eq!(sink, b"plain,\"a,b\",\"say \"\"hi\"\"\",\"two\nlines\",\r\n");
    }

    #[test]
    fn times_are_relative_on_a_terminal_only() {
        let time = "2026-11-24T06:30:12.123456Z";
        let moment = OffsetDateTime::parse(time, &Rfc3339).unwrap().unix_timestamp();
        let after = |seconds: i64| Times(Some(moment + seconds)).show(time);
        let shown = [3, 200, 7_300, 400_000, -2].map(after);
        assert_eq!(shown, ["3 s ago", "3 min ago", "2 h ago", "4 days ago", "in 2 s"]);
        assert_eq!(Times(None).show(time), "2026-11-24 06:30:12");
    }

    #[test]
    fn timestamps_and_durations_are_short() {
        assert_eq!(second("2026-11-24T06:30:12.123456Z"), "2026-11-24 06:30:12");
        assert_eq!(["1.3s", "15s", "5min"], [1.26, 15.2, 300.0].map(seconds));
    }
}
