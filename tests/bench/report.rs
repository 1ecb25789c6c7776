//! Lines, their medians, the table and the file.

use std::fs;

use comfy_table::{CellAlignment, ContentArrangement, Table};
use serde::Serialize;
use sqlx::{Connection, PgConnection, Row};

use super::rig::{Outcome, Rig};

/// What a line has to reach.
#[derive(Debug, Clone, Copy)]
pub enum Target {
    /// The ratio to the bare part is to be at least this.
    RatioAtLeast(f64),
    /// The ratio to the bare part is to be at most this.
    RatioAtMost(f64),
    /// The figure itself is to be at least this.
    AtLeast(f64),
    /// The figure itself is to be at most this.
    AtMost(f64),
}

/// One round: the daemon's figure and, where there is one, the bare part's.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Round {
    /// What the daemon did.
    pub ours: f64,
    /// What the bare part did.
    pub raw: Option<f64>,
    /// The one by the other.
    pub ratio: Option<f64>,
}

impl Round {
    /// A figure beside that of the bare part.
    pub fn beside(ours: f64, raw: f64) -> Self {
        Self { ours, raw: Some(raw), ratio: Some(ours / raw) }
    }

    /// A figure that has nothing beside it.
    pub fn alone(ours: f64) -> Self {
        Self { ours, raw: None, ratio: None }
    }
}

/// One line of the table; figures are medians of the rounds.
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
    raw: Option<f64>,
    rounds: Vec<Round>,
    note: String,
}

impl Line {
    /// A line of these rounds.
    pub fn new(name: &str, unit: &'static str, target: Target, rounds: Vec<Round>) -> Self {
        let ratios: Vec<f64> = rounds.iter().filter_map(|round| round.ratio).collect();
        let (ours, ratio) = (median(rounds.iter().map(|round| round.ours)), median(ratios.iter().copied()));
        let (target, met) = match target {
            Target::RatioAtLeast(least) => (format!(">= {least} x"), ratio.map(|ratio| ratio >= least)),
            Target::RatioAtMost(most) => (format!("<= {most} x"), ratio.map(|ratio| ratio <= most)),
            Target::AtLeast(least) => (format!(">= {least}"), ours.map(|ours| ours >= least)),
            Target::AtMost(most) => (format!("<= {most}"), ours.map(|ours| ours <= most)),
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
            raw: median(rounds.iter().filter_map(|round| round.raw)),
            rounds,
            note: String::new(),
        }
    }

    /// A line that could not be measured, and why.
    pub fn left_out(name: &str, why: String) -> Self {
        let mut line = Self::new(name, "", Target::AtLeast(0.0), Vec::new());
        line.target = "-".to_owned();
        line.note = why;
        line
    }

    /// Adds what else is to be known.
    pub fn note(mut self, note: impl Into<String>) -> Self {
        self.note = note.into();
        self
    }
}

/// The middle one, or the mean of the two in the middle.
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

/// All lines of a run.
#[derive(Serialize)]
pub struct Report {
    machine: String,
    date: String,
    scale: &'static str,
    lines: Vec<Line>,
}

impl Report {
    /// An empty one, with the machine and the date.
    pub async fn new(rig: &Rig) -> Outcome<Self> {
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

    /// Takes what a measurement came to; one that failed is a line too.
    pub fn add(&mut self, name: &str, measured: Outcome<Vec<Line>>) {
        match measured {
            Ok(lines) => self.lines.extend(lines),
            Err(error) => self.lines.push(Line::left_out(name, format!("not measured: {error}"))),
        }
        for line in self.lines.iter().filter(|line| line.name.starts_with(name) || name == "ingest") {
            eprintln!("  {}: {} (target {}) {}", line.name, shown(line.ratio.or(line.ours)), line.target, line.note);
        }
    }

    /// Prints the table and writes the file.
    pub fn finish(&self, rig: &Rig) -> Outcome<()> {
        let mut table = Table::new();
        table.set_content_arrangement(ContentArrangement::Dynamic);
        table.set_header(["line", "ratio", "min .. max", "target", "met", "ours", "bare", "unit", "note"]);
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
                shown(line.raw),
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
        let file = rig.folder.join("report.md");
        fs::write(&file, self.markdown(rig.rounds))?;
        println!("for README: {}", file.display());
        Ok(())
    }

    /// The table as README has it.
    fn markdown(&self, rounds: usize) -> String {
        let mut text = String::from("| line | what | measured | target | met |\n|---|---|---|---|---|\n");
        for line in &self.lines {
            let measured = match (line.ratio, line.ours) {
                (Some(_), _) => {
                    let [ratio, least, most] = [line.ratio, line.ratio_min, line.ratio_max].map(shown);
                    let [ours, raw] = [line.ours, line.raw].map(shown);
                    format!("{ratio} x ({least} to {most}); {ours} beside {raw} {}", line.unit)
                }
                (None, Some(_)) => format!("{} {}", shown(line.ours), line.unit),
                (None, None) => "-".to_owned(),
            };
            let met = line.met.map_or("-", |met| if met { "yes" } else { "no" });
            text.push_str(&format!("| `{}` | {} | {measured} | {} | {met} |\n", line.name, line.note, line.target));
        }
        text + &format!("\n{}, {}, {} sizes, {rounds} rounds.\n", self.machine, self.date, self.scale)
    }
}

/// Three digits that mean something.
pub fn shown(figure: Option<f64>) -> String {
    match figure {
        None => "-".to_owned(),
        Some(figure) if figure.abs() >= 100.0 => format!("{figure:.0}"),
        Some(figure) if figure.abs() >= 10.0 => format!("{figure:.1}"),
        Some(figure) => format!("{figure:.2}"),
    }
}
