//! A Markdown table that is filled column by column.

use std::fmt::Write;

/// A table of figures, with their growth from the first column to the last if wanted.
pub struct Table {
    columns: Vec<String>,
    growth: bool,
    rows: Vec<(&'static str, Vec<f64>)>,
}

impl Table {
    pub fn of(columns: impl Iterator<Item = String>, growth: bool) -> Self {
        let columns: Vec<_> = columns.collect();
        Self { growth: growth && columns.len() > 1, columns, rows: Vec::new() }
    }

    /// Adds the figure of the next column to this row.
    pub fn add(&mut self, row: &'static str, figure: f64) {
        let at = self.rows.iter().position(|(name, _)| *name == row);
        let at = at.unwrap_or_else(|| {
            self.rows.push((row, Vec::new()));
            self.rows.len() - 1
        });
        let figures = &mut self.rows[at].1;
        eprintln!("{}: {row}: {}", self.columns[figures.len()], short(figure));
        figures.push(figure);
    }

    pub fn markdown(&self) -> String {
        let mut columns = vec![String::new()];
        columns.extend(self.columns.iter().cloned());
        if self.growth {
            columns.push("the last by the first".to_owned());
        }
        let mut text = line(&columns);
        text += &line(&vec!["---".to_owned(); columns.len()]);
        for (name, figures) in &self.rows {
            let mut cells = vec![(*name).to_owned()];
            cells.extend(figures.iter().map(|figure| short(*figure)));
            if let ([first, .., last], true) = (&figures[..], self.growth) {
                cells.push(format!("{:.2}", last / first));
            }
            text += &line(&cells);
        }
        text + "\n"
    }
}

fn line(cells: &[String]) -> String {
    let mut line = String::from("|");
    for cell in cells {
        let _ = write!(line, " {cell} |");
    }
    line + "\n"
}

/// A number with three significant digits.
fn short(figure: f64) -> String {
    let decimals = match figure {
        100.0.. => 0,
        10.0.. => 1,
        1.0.. => 2,
        _ => 3,
    };
    format!("{figure:.decimals$}")
}
