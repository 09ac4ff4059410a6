//! The bounds of the figures, and whether they hold.

use std::process::ExitCode;

/// The measured figures that have a bound.
#[derive(Default)]
pub struct Bounds {
    rows: Vec<String>,
    missed: bool,
}

impl Bounds {
    /// Adds a figure that may be at most `bound`.
    pub fn at_most(&mut self, what: &str, measured: f64, bound: f64) {
        self.row(what, measured, "at most", bound, measured <= bound);
    }

    /// Adds a figure that must be at least `bound`.
    pub fn at_least(&mut self, what: &str, measured: f64, bound: f64) {
        self.row(what, measured, "at least", bound, measured >= bound);
    }

    fn row(&mut self, what: &str, measured: f64, which: &str, bound: f64, holds: bool) {
        let verdict = if holds { "holds" } else { "FAIL" };
        let decimals = if bound < 10.0 { 2 } else { 0 };
        self.missed |= !holds;
        self.rows.push(format!("| {what} | {measured:.decimals$} | {which} {bound} | {verdict} |"));
    }

    /// Prints the bounds; returns the exit status.
    pub fn print(&self) -> ExitCode {
        println!("\n| bound | measured | promised | |");
        println!("| --- | --- | --- | --- |");
        for row in &self.rows {
            println!("{row}");
        }
        match self.missed {
            true => ExitCode::FAILURE,
            false => ExitCode::SUCCESS,
        }
    }
}
