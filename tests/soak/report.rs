//! The report at the end.

use std::{fmt::Write, time::Duration};

use crate::{
    observer::{LAWS, Observer},
    plan::Plan,
    runner::{self, Counts},
    samples::{self, Sample},
};

/// The text, and whether every law was checked and the relay's resources were flat.
pub struct Outcome {
    pub text: String,
    pub verdict: Result<(), String>,
}

pub struct Measured<'a> {
    pub plan: &'a Plan,
    pub counts: &'a Counts,
    pub observer: &'a Observer,
    pub freed: Vec<(String, f64)>,
    pub before: Sample,
    pub samples: &'a [Sample],
    pub end: Duration,
    pub after: Sample,
}

/// Makes the report of a soak.
pub fn of(measured: Measured<'_>) -> Outcome {
    let quarters: Vec<_> = (1..=4).map(|n| quarter(&measured, n)).collect();
    let mut text = String::new();
    let _ = writeln!(
        text,
        "{:.1} hours of a day in {:.0} s; {:.0} clients at a time on average, {} slots.\n",
        runner::of_the_day(measured.end).as_secs_f64() / 3600.0,
        measured.end.as_secs_f64(),
        measured.plan.mean_live,
        measured.plan.config.max_reservations,
    );
    text += &over_time(&measured, &quarters);
    text += "\n| clients | |\n| --- | ---: |\n";
    for (what, count) in measured.counts {
        let _ = writeln!(text, "| {what} | {count} |");
    }
    for (reason, count) in &measured.freed {
        let _ = writeln!(text, "| freed slots: {reason} | {count} |");
    }
    text += "\n| law | checked |\n| --- | ---: |\n";
    for law in LAWS {
        let _ = writeln!(text, "| {law} | {} |", measured.observer.checked[&law]);
    }
    let _ = writeln!(
        text,
        "\nExcused, because this machine was suspended or overloaded: {}. Refused while a peer had been gone for longer \
         than `--probe-after`: {}.",
        measured.observer.excused, measured.observer.refused_too_early,
    );
    let never = LAWS.into_iter().find(|law| measured.observer.checked[law] == 0);
    let verdict = match never {
        Some(law) => Err(format!("a law was never checked: {law}")),
        None => is_flat(&measured, &quarters),
    };
    Outcome { text, verdict }
}

/// The mean of the last tenth of the run up to the end of this quarter.
fn quarter(measured: &Measured<'_>, n: u32) -> Sample {
    let until = measured.end * n / 4;
    let mean = Sample::mean(measured.samples, until - measured.end / 10, until);
    mean.unwrap_or_default()
}

fn over_time(measured: &Measured<'_>, quarters: &[Sample]) -> String {
    let mut text =
        String::from("| | before | first quarter | half | third quarter | end | after |\n");
    text += "| --- | ---: | ---: | ---: | ---: | ---: | ---: |\n";
    type Of = fn(&Sample) -> f64;
    let rows: [(&str, Of); 6] = [
        ("clients", |s| s.clients),
        ("connections", |s| s.connections),
        ("circuits", |s| s.circuits),
        ("resident memory, KiB", |s| s.resident),
        ("descriptors", |s| s.files),
        ("threads", |s| s.threads),
    ];
    for (name, of) in rows {
        let _ = write!(text, "| {name} |");
        let all = [&measured.before].into_iter().chain(quarters);
        for sample in all.chain([&measured.after]) {
            let _ = write!(text, " {:.0} |", of(sample));
        }
        text += "\n";
    }
    text
}

fn is_flat(measured: &Measured<'_>, quarters: &[Sample]) -> Result<(), String> {
    let (before, after) = (measured.before.files, measured.after.files);
    if before != after {
        return Err(format!(
            "{before:.0} descriptors were open before the first client, and {after:.0} after the last"
        ));
    }
    let [.., end] = quarters else {
        return Ok(());
    };
    samples::is_flat(&quarters[measured.plan.settled - 1], end)
}
