//! The figures of several rounds: medians, spreads, ratios and goals.

use std::{fmt::Write, fs, process::ExitCode};

use super::{contestants::Contestant, floor};

/// A row of the table.
struct Row {
    what: String,
    unit: &'static str,
    /// The highest allowed ratios of relaylet to each other relay, where there is a goal.
    goals: [Option<f64>; 2],
    /// One figure per round.
    figures: [Vec<f64>; 3],
}

/// All measured figures.
#[derive(Default)]
pub struct Rounds {
    rows: Vec<Row>,
}

impl Rounds {
    /// Adds a row whose ratios to rust-libp2p and go-libp2p may be at most `goals`.
    pub fn row(&mut self, what: &str, unit: &'static str, goals: [f64; 2]) -> usize {
        self.rows.push(Row {
            what: what.to_owned(),
            unit,
            goals: goals.map(|goal| goal.is_finite().then_some(goal)),
            figures: [Vec::new(), Vec::new(), Vec::new()],
        });
        self.rows.len() - 1
    }

    /// Adds the figure of one more round to a row.
    pub fn add(&mut self, row: usize, contestant: Contestant, figure: f64) {
        let Row { what, unit, .. } = &self.rows[row];
        eprintln!("{what}: {}: {figure:.3} {unit}", contestant.name());
        self.rows[row].figures[contestant as usize].push(figure);
    }

    /// Prints the table, and writes it to `file`; returns the exit status.
    pub fn print(&self, file: &str) -> ExitCode {
        let mut table = String::from(
            "| | relaylet | rust-libp2p | go-libp2p | of rust-libp2p | of go-libp2p |\n\
             | --- | --- | --- | --- | --- | --- |\n",
        );
        let mut missed = 0;
        for row in &self.rows {
            let _ = write!(table, "| {}, {} |", row.what, row.unit);
            for figures in &row.figures {
                let _ = write!(table, " {} |", spread(figures));
            }
            for (other, goal) in [Contestant::Rust, Contestant::Go].into_iter().zip(row.goals) {
                let Some(ratio) = row.ratio(other) else {
                    table.push_str(" |");
                    continue;
                };
                let verdict = match goal {
                    Some(goal) if ratio > goal => {
                        missed += 1;
                        format!(", above {goal}")
                    }
                    Some(goal) => format!(", goal {goal}"),
                    None => String::new(),
                };
                let _ = write!(table, " **{ratio:.2}**{verdict} |");
            }
            table.push('\n');
        }
        table.push_str(&format!("\n{}\n", floor::processor()));
        println!("\n{table}");
        fs::write(file, table).expect("the folder target exists");
        println!("{missed} ratios are above their goals; the table is in {file}");
        match missed {
            0 => ExitCode::SUCCESS,
            _ => ExitCode::FAILURE,
        }
    }
}

impl Row {
    /// The median ratio of relaylet to `other` over the rounds. Rounds are interleaved, so that a disturbance likely
    /// affects both.
    fn ratio(&self, other: Contestant) -> Option<f64> {
        let ours = &self.figures[Contestant::Relaylet as usize];
        let theirs = &self.figures[other as usize];
        let ratios: Vec<f64> = ours.iter().zip(theirs).map(|(a, b)| a / b).collect();
        (!ratios.is_empty()).then(|| median(&ratios))
    }
}

/// The median, the lowest and the highest figure.
fn spread(figures: &[f64]) -> String {
    if figures.is_empty() {
        return String::new();
    }
    let least = figures.iter().copied().fold(f64::INFINITY, f64::min);
    let most = figures.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let median = median(figures);
    let decimals = if median < 10.0 { 2 } else { 0 };
    format!("{median:.decimals$} ({least:.decimals$}-{most:.decimals$})")
}

pub fn median(figures: &[f64]) -> f64 {
    let mut sorted = figures.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    if sorted.len() % 2 == 1 {
        return sorted[middle];
    }
    (sorted[middle - 1] + sorted[middle]) / 2.0
}
