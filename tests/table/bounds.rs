//! The bounds that were promised, and whether they hold.

use std::process::ExitCode;

/// What was measured that has a bound.
#[derive(Default)]
pub struct Bounds {
    rows: Vec<String>,
    missed: bool,
}

impl Bounds {
    /// `measured` may be as much as `bound`.
    pub fn at_most(&mut self, what: &str, measured: f64, bound: f64) {
        self.row(what, measured, "at most", bound, measured <= bound);
    }

    /// `measured` may not be less than `bound`.
    pub fn at_least(&mut self, what: &str, measured: f64, bound: f64) {
        self.row(what, measured, "at least", bound, measured >= bound);
    }

    fn row(&mut self, what: &str, measured: f64, which: &str, bound: f64, holds: bool) {
        let verdict = if holds { "holds" } else { "FAIL" };
        let decimals = if bound < 10.0 { 2 } else { 0 };
        self.missed |= !holds;
        self.rows.push(format!("| {what} | {measured:.decimals$} | {which} {bound} | {verdict} |"));
    }

    /// Prints them; the status to end with.
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
