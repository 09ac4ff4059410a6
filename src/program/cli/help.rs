//! `--help`: clap's help of the flags, under headings and with each default next to its flag.
//!
//! clap 2 has no headings. The flags are in the order of [`Flags`], and the first one of a group names its heading:
//! `[group: Slots]`.

use structopt::StructOpt;
use textwrap::{NoHyphenation, Wrapper};

use super::flags::{Flags, features};

/// Examples of values.
const VALUES: &str = "\
Values:
    DURATION   30s, 5m, 1h 30m
    MULTIADDR  /ip4/192.0.2.1/tcp/4001, /dns4/relay.example.org/tcp/4001
    PEER       12D3KooWPGM3wYKMsTHGEqbhcBft6cPjA2F3rQmyWTEDD3wCGS1g
    SIZE       bytes, or 500kB, 128KiB, 1GiB
    SUBNET     192.0.2.0/24, 2001:db8::/32
";

/// The longest line, in characters.
const WIDTH: usize = 100;
const INDENT: &str = "        ";

/// The text of `--help` and `-h`.
pub fn help() -> String {
    let mut clap = Vec::new();
    // Writing to memory cannot fail.
    let _ = Flags::clap().write_long_help(&mut clap);
    let clap = String::from_utf8_lossy(&clap);
    let (about, flags) = clap.split_once("OPTIONS:\n").unwrap_or((&clap, ""));
    let lines = Wrapper::with_splitter(WIDTH, NoHyphenation);
    let lines = lines.initial_indent(INDENT).subsequent_indent(INDENT);
    let mut help = format!("{}\n", about.trim_end());
    for (usage, text) in split(flags) {
        let (group, text) = take_bracket(&text, "group");
        let (default, text) = take_bracket(&text, "default");
        help += &group.map_or(String::new(), |group| format!("\n{group}:\n"));
        let default = default.map_or(String::new(), |default| format!("  [default: {default}]"));
        help += &format!("    {usage}{default}\n");
        for paragraph in text.lines().map(str::trim).filter(|paragraph| !paragraph.is_empty()) {
            help += &format!("{}\n", lines.fill(paragraph));
        }
    }
    help + "\n" + VALUES
}

/// What follows the name in the text of `--version`: the version, the features, and the commit if the variable
/// `RELAYLET_COMMIT` named it when the program was built.
pub fn version() -> String {
    let features: Vec<_> = features().collect();
    let commit = option_env!("RELAYLET_COMMIT").filter(|commit| !commit.is_empty());
    let commit = commit.map_or(String::new(), |commit| format!(", commit {commit}"));
    format!("{} (features: {}{commit})", env!("CARGO_PKG_VERSION"), features.join(" "))
}

/// Splits clap's help into flags (`--grace <DURATION>`) and their texts.
fn split(flags: &str) -> Vec<(&str, String)> {
    let mut split: Vec<(&str, String)> = Vec::new();
    for line in flags.lines() {
        let words = line.trim();
        let begins_a_flag = words.starts_with('-') && line.len() - words.len() <= INDENT.len();
        match split.last_mut() {
            Some((_, text)) if !begins_a_flag => {
                text.extend([if words.is_empty() { "\n" } else { " " }, words]);
            }
            _ => split.push((words, String::new())),
        }
    }
    split
}

/// Takes `[what: …]` out of the text. Returns what is in the brackets, and the rest of the text.
fn take_bracket<'a>(text: &'a str, what: &str) -> (Option<&'a str>, String) {
    let (before, rest) = text.split_once(&format!("[{what}: ")).unwrap_or((text, ""));
    match rest.split_once(']') {
        Some((inside, after)) => (Some(inside), before.to_owned() + after),
        None => (None, text.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_flag_is_listed_once_under_a_heading() {
        let mut clap = Vec::new();
        Flags::clap().write_long_help(&mut clap).unwrap();
        let clap = String::from_utf8(clap).unwrap();
        let (_, flags) = clap.split_once("OPTIONS:\n").unwrap();
        let flags = split(flags);
        let heading = |text: &str| take_bracket(text, "group").0.map(str::to_owned);
        assert!(heading(&flags[0].1).is_some());
        let help = help();
        for (own, _) in &flags {
            let lines = help.lines().filter(|line| {
                let usage = line.strip_prefix("    ").unwrap_or_default();
                usage == *own || usage.starts_with(&format!("{own}  ["))
            });
            assert_eq!(lines.count(), 1, "{own}: {help}");
        }
        let headings = flags.iter().filter_map(|(_, text)| heading(text));
        let expected = [
            "Configuration",
            "Identity and addresses",
            "Slots",
            "Liveness",
            "Circuits",
            "Requests",
            "Access",
            "Connections",
            "Shutdown",
            "Resources",
            "About",
        ];
        assert!(headings.eq(expected), "in the order of the flags: {help}");
        for heading in expected {
            assert_eq!(help.matches(&format!("\n\n{heading}:\n")).count(), 1, "{heading}: {help}");
        }
    }

    #[test]
    fn each_flag_shows_its_default_without_claps_own_suffix() {
        let help = help();
        for line in [
            "    --circuit-bytes <SIZE>  [default: 128KiB]",
            "    --threads <N>  [default: half of the machine's cores, at least 1]",
            "    --allow-peer <PEER>...",
        ] {
            assert!(help.lines().any(|own| own == line), "{line}: {help}");
        }
        let longest = help.lines().map(|line| line.chars().count()).max();
        assert!(longest <= Some(WIDTH), "{help}");
    }

    #[test]
    fn the_default_is_extracted_from_the_help_text() {
        let (default, text) = take_bracket("a [b]  [default: here]", "default");
        assert_eq!((default, text.trim()), (Some("here"), "a [b]"));
    }
}
