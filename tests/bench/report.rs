//! Report: lines with their medians, the table on the terminal, and the generated files.

use std::fs;
use std::path::{Path, PathBuf};

use comfy_table::{CellAlignment, ContentArrangement, Table};
use serde::Serialize;
use sqlx::{Connection, PgConnection, Row};

use super::rig::{Result, Rig};

/// Line of a Markdown file below which everything is generated.
const GENERATED: &str = "<!-- Everything below is written by `deploy/dev bench`. -->";
/// Start of the note of a line whose measurement failed.
const NOT_MEASURED: &str = "not measured";

/// Target of a line.
#[derive(Debug, Clone, Copy)]
pub enum Target {
    /// Least ratio to the baseline.
    RatioAtLeast(f64),
    /// Greatest ratio to the baseline.
    RatioAtMost(f64),
    /// Greatest ratio to the baseline, and greatest value.
    RatioAndValueAtMost(f64, f64),
    /// Least value.
    AtLeast(f64),
    /// Greatest value.
    AtMost(f64),
    /// None: the line is information.
    Information,
}

/// Round: the daemon's value and, where there is one, the baseline's.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Round {
    /// Value of the daemon.
    pub ours: f64,
    /// Value of the baseline.
    pub baseline: Option<f64>,
    /// Quotient of the two.
    pub ratio: Option<f64>,
}

impl Round {
    /// Creates a round with a baseline.
    pub fn against(ours: f64, baseline: f64) -> Self {
        Self { ours, baseline: Some(baseline), ratio: Some(ours / baseline) }
    }

    /// Creates a round without a baseline.
    pub fn absolute(ours: f64) -> Self {
        Self { ours, baseline: None, ratio: None }
    }
}

/// Line of the table; values are medians of the rounds.
#[derive(Debug, Serialize)]
pub struct Line {
    name: String,
    ratio: Option<f64>,
    ratio_min: Option<f64>,
    ratio_max: Option<f64>,
    target: String,
    met: Option<bool>,
    unit: &'static str,
    ours: Option<f64>,
    baseline: Option<f64>,
    rounds: Vec<Round>,
    note: String,
}

impl Line {
    /// Creates a line from its rounds.
    pub fn new(name: &str, unit: &'static str, target: Target, rounds: Vec<Round>) -> Self {
        let ratios: Vec<f64> = rounds.iter().filter_map(|round| round.ratio).collect();
        let (ours, ratio) = (median(rounds.iter().map(|round| round.ours)), median(ratios.iter().copied()));
        let (target, met) = match target {
            Target::RatioAtLeast(least) => (format!(">= {least} x"), ratio.map(|ratio| ratio >= least)),
            Target::RatioAtMost(most) => (format!("<= {most} x"), ratio.map(|ratio| ratio <= most)),
            Target::RatioAndValueAtMost(most, value) => (
                format!("<= {most} x, <= {value}"),
                ratio.zip(ours).map(|(ratio, ours)| ratio <= most && ours <= value),
            ),
            Target::AtLeast(least) => (format!(">= {least}"), ours.map(|ours| ours >= least)),
            Target::AtMost(most) => (format!("<= {most}"), ours.map(|ours| ours <= most)),
            Target::Information => ("-".to_owned(), None),
        };
        Self {
            name: name.to_owned(),
            ratio,
            ratio_min: ratios.iter().copied().reduce(f64::min),
            ratio_max: ratios.iter().copied().reduce(f64::max),
            target,
            met,
            unit,
            ours,
            baseline: median(rounds.iter().filter_map(|round| round.baseline)),
            rounds,
            note: String::new(),
        }
    }

    /// Creates a line that was not measured, with the reason.
    pub fn skipped(name: &str, why: String) -> Self {
        Self::new(name, "", Target::Information, Vec::new()).note(why)
    }

    /// Sets the description.
    pub fn note(mut self, note: impl Into<String>) -> Self {
        self.note = note.into();
        self
    }
}

/// Returns the median; of an even count, the mean of the two in the middle.
pub fn median(values: impl Iterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        length if length % 2 == 1 => Some(values[middle]),
        _ => Some(f64::midpoint(values[middle - 1], values[middle])),
    }
}

/// All lines of a benchmark run.
#[derive(Serialize)]
pub struct Report {
    machine: String,
    date: String,
    scale: &'static str,
    lines: Vec<Line>,
}

impl Report {
    /// Creates an empty report with machine and date.
    pub async fn new(rig: &Rig) -> Result<Self> {
        let mut db = PgConnection::connect(&rig.postgres).await?;
        let row = sqlx::query("select to_char(now(), 'YYYY-MM-DD HH24:MI TZ'), current_setting('server_version')")
            .fetch_one(&mut db)
            .await?;
        let cpus = fs::read_to_string("/proc/cpuinfo")?;
        let model = cpus.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
        let cores = std::thread::available_parallelism()?;
        let model = model.map_or("unknown processor", |(_, model)| model);
        let version: String = row.get(1);
        Ok(Self {
            machine: format!("{cores} cores of {model}, PostgreSQL {version}"),
            date: row.get(0),
            scale: rig.scale.as_str(),
            lines: Vec::new(),
        })
    }

    /// Adds the lines of a measurement, or one line with the error.
    pub fn add(&mut self, name: &str, measured: Result<Vec<Line>>) {
        match measured {
            Ok(lines) => self.lines.extend(lines),
            Err(error) => self.lines.push(Line::skipped(name, format!("{NOT_MEASURED}: {error}"))),
        }
        for line in self.lines.iter().filter(|line| line.name.starts_with(name) || name == "ingest") {
            eprintln!("  {}: {} (target {}) {}", line.name, shown(line.ratio.or(line.ours)), line.target, line.note);
        }
    }

    /// Prints the table and writes the files; a `complete` report replaces the committed one.
    pub fn finish(&self, rig: &Rig, complete: bool) -> Result<()> {
        let mut table = Table::new();
        table.set_content_arrangement(ContentArrangement::Dynamic);
        table.set_header(["line", "ratio", "min .. max", "target", "met", "ours", "baseline", "unit", "note"]);
        for line in &self.lines {
            let spread = line.ratio_min.map(|least| format!("{} .. {}", shown(Some(least)), shown(line.ratio_max)));
            let met = line.met.map_or("-", |met| if met { "yes" } else { "no" });
            table.add_row([
                line.name.clone(),
                shown(line.ratio),
                spread.unwrap_or_else(|| "-".to_owned()),
                line.target.clone(),
                met.to_owned(),
                shown(line.ours),
                shown(line.baseline),
                line.unit.to_owned(),
                line.note.clone(),
            ]);
        }
        for column in [1, 5, 6] {
            if let Some(column) = table.column_mut(column) {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        println!("{table}\n{}, {}, {} sizes, {} rounds", self.machine, self.date, self.scale, rig.rounds);
        let file = rig.folder.join("report.json");
        fs::write(&file, serde_json::to_string_pretty(self)?)?;
        println!("rounds: {}", file.display());
        let failed = self.lines.iter().filter(|line| line.note.starts_with(NOT_MEASURED)).count();
        let file = if complete && failed == 0 { readme() } else { rig.folder.join("report.md") };
        self.write_markdown(&file, rig.rounds)?;
        println!("table: {}", file.display());
        if failed > 0 {
            return Err(format!("{failed} lines were not measured").into());
        }
        Ok(())
    }

    /// Replaces the generated part of a Markdown file, or creates the file.
    fn write_markdown(&self, file: &Path, rounds: usize) -> Result<()> {
        let old = fs::read_to_string(file).unwrap_or_default();
        let written_by_hand = old.split(GENERATED).next().unwrap_or_default();
        Ok(fs::write(file, format!("{written_by_hand}{GENERATED}\n\n{}", self.markdown(rounds)))?)
    }

    /// Formats the values as a table and the descriptions as a list, so that no line needs sideways scrolling.
    fn markdown(&self, rounds: usize) -> String {
        let mut table =
            String::from("| line | ratio (min to max) | measured | target | met |\n|---|---|---|---|---|\n");
        let mut list = String::new();
        for line in &self.lines {
            let [ratio, least, most] = [line.ratio, line.ratio_min, line.ratio_max].map(shown);
            let ratio = line.ratio.map_or_else(|| "-".to_owned(), |_| format!("{ratio} x ({least} to {most})"));
            let baseline = line.baseline.map_or_else(String::new, |_| format!(" / {}", shown(line.baseline)));
            let measured =
                line.ours.map_or_else(|| "-".to_owned(), |_| format!("{}{baseline} {}", shown(line.ours), line.unit));
            let met = line.met.map_or("-", |met| if met { "yes" } else { "no" });
            table.push_str(&format!("| `{}` | {ratio} | {measured} | {} | {met} |\n", line.name, line.target));
            if !line.note.is_empty() {
                list.push_str(&format!("- `{}`: {}\n", line.name, line.note));
            }
        }
        format!("{table}\nMedians of {rounds} rounds, {} sizes, {}, {}.\n\n{list}", self.scale, self.machine, self.date)
    }
}

/// Path of the committed report, which only a run of every line replaces.
fn readme() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/bench/README.md")
}

/// Formats a value with about three significant digits.
pub fn shown(figure: Option<f64>) -> String {
    match figure {
        None => "-".to_owned(),
        Some(figure) if figure.abs() >= 100.0 => format!("{figure:.0}"),
        Some(figure) if figure.abs() >= 10.0 => format!("{figure:.1}"),
        Some(figure) => format!("{figure:.2}"),
    }
}
