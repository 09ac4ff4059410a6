//! The steps of the check, as values: [`Step`] is one that ended, [`Steps`] runs them.

use std::{fmt, io, time::Duration, time::Instant};

use async_std::io::timeout;

use super::diagnosis::{Stage, remedy};
use crate::program::net::admission::handshake_failure::innermost;

/// How long a step may take.
pub const TIME_LIMIT: Duration = Duration::from_secs(20);

/// How much of a text is shown, in characters: it may come from the relay.
const MAX_SHOWN: usize = 1000;

/// A step that ended.
#[derive(Debug)]
pub struct Step<'a> {
    /// Which one.
    pub stage: Stage,
    /// How long it took.
    pub took: Duration,
    /// What was found out.
    pub result: Result<&'a str, &'a io::Error>,
}

impl fmt::Display for Step<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = format!("{:?}", self.stage).to_lowercase();
        let millis = self.took.as_secs_f64() * 1000.0;
        let text = match self.result {
            Ok(detail) => detail.to_owned(),
            Err(error) => format!("FAILED: {}; {}", innermost(error), remedy(self.stage, error)),
        };
        let shown = |c: char| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c };
        let text: String = text.replace(".; ", "; ").chars().take(MAX_SHOWN).map(shown).collect();
        write!(f, "{name:<9} {millis:>8.1} ms  {text}")
    }
}

/// Joins these items with spaces.
pub fn list<T: ToString>(items: impl IntoIterator<Item = T>) -> String {
    items.into_iter().map(|item| item.to_string()).collect::<Vec<_>>().join(" ")
}

/// Runs steps, and reports each.
pub struct Steps(pub fn(&Step<'_>));

impl Steps {
    /// Runs one step within [`TIME_LIMIT`]: it returns its result, and what to report.
    pub async fn run<T>(
        &self,
        stage: Stage,
        work: impl Future<Output = io::Result<(T, String)>>,
    ) -> io::Result<T> {
        let start = Instant::now();
        let ended = timeout(TIME_LIMIT, work).await;
        let result = ended.as_ref().map(|(_, detail)| detail.as_str());
        (self.0)(&Step { stage, took: start.elapsed(), result });
        ended.map(|(value, _)| value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_is_one_line_whatever_the_relay_says() {
        let took = Duration::from_micros(1250);
        let line = |result| Step { stage: Stage::Reserve, took, result }.to_string();
        assert_eq!(line(Ok("a\x1b[2J\nb")), "reserve        1.2 ms  a\u{fffd}[2J\u{fffd}b");
        let long = "a".repeat(100_000);
        assert!(line(Ok(&long)).len() < 1100);
        let failed = line(Err(&io::Error::other("the relay answers with status 200")));
        assert!(
            failed.contains("  FAILED: the relay answers with status 200; no slot is free"),
            "{failed}"
        );
    }
}
