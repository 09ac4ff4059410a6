//! `--help` for people: what clap knows of the flags, under headings and with their defaults beside.
//!
//! clap 2 has no headings. The flags come in the order in which [`Flags`] has
//! them, so a heading is named by the flag that it stands before.

use structopt::StructOpt;

use super::flags::Flags;

/// The first flag of each group, and what the group is about.
const GROUPS: [(&str, &str); 11] = [
    ("--config", "Configuration"),
    ("--listen", "Who it is and where it can be reached"),
    ("--max-reservations", "Slots"),
    ("--heartbeat", "Who is still there"),
    ("--max-circuits", "Circuits"),
    ("--reserve-rate", "Requests"),
    ("--allow-peer", "Who may use it"),
    ("--max-connections", "Connections"),
    ("--drain", "The end"),
    ("--threads", "The machine"),
    ("--help", "About"),
];

/// How values are written.
const VALUES: &str = "\
Values:
    DURATION   30s, 5m, 1h 30m
    MULTIADDR  /ip4/192.0.2.1/tcp/4001, /dns4/relay.example.org/tcp/4001
    PEER       12D3KooWPGM3wYKMsTHGEqbhcBft6cPjA2F3rQmyWTEDD3wCGS1g
    SIZE       bytes, or 500kB, 128KiB, 1GiB
    SUBNET     192.0.2.0/24, 2001:db8::/32
";

/// How far text goes to the right.
const WIDTH: usize = 100;
const INDENT: &str = "        ";

/// One flag, as clap tells of it.
struct Flag<'a> {
    /// `--grace <DURATION>`
    usage: &'a str,
    text: String,
}

/// What `--help` and `-h` say.
pub fn help() -> String {
    let mut clap = Vec::new();
    // Into memory, where nothing can fail.
    let _ = Flags::clap().write_long_help(&mut clap);
    grouped(&String::from_utf8_lossy(&clap))
}

fn grouped(clap: &str) -> String {
    let Some((about, flags)) = clap.split_once("OPTIONS:\n") else {
        return clap.into();
    };
    let mut help = format!("{}\n", about.trim_end());
    for flag in read(flags) {
        if let Some(heading) = heading(flag.usage) {
            help += &format!("\n{heading}:\n");
        }
        let (text, default) = without_brackets(&flag.text);
        help += &format!("    {}{default}\n", flag.usage);
        help += &wrapped(text);
    }
    help + "\n" + VALUES
}

fn read(flags: &str) -> Vec<Flag<'_>> {
    let mut read: Vec<Flag> = Vec::new();
    for line in flags.lines() {
        let words = line.trim();
        let begins_a_flag = words.starts_with('-') && line.len() - words.len() <= INDENT.len();
        match read.last_mut() {
            _ if begins_a_flag => read.push(Flag {
                usage: words,
                text: String::new(),
            }),
            Some(flag) if words.is_empty() => flag.text.push('\n'),
            Some(flag) => flag.text += &format!(" {words}"),
            None => {}
        }
    }
    read
}

fn heading(usage: &str) -> Option<&'static str> {
    let mut groups = GROUPS.iter();
    let first = |flag| usage.split([' ', ',']).any(|word| word == flag);
    groups.find_map(|(flag, heading)| first(*flag).then_some(*heading))
}

/// The text without the default that stands behind it in brackets, and that.
fn without_brackets(text: &str) -> (&str, String) {
    let Some((text, default)) = text.split_once("[default: ") else {
        return (text.trim(), String::new());
    };
    let default = default.split(']').next().unwrap_or(default);
    (text.trim(), format!("  [default: {default}]"))
}

fn wrapped(text: &str) -> String {
    let mut lines: Vec<String> = Vec::new();
    for paragraph in text.lines() {
        let mut words = paragraph.split_whitespace();
        lines.extend(words.next().map(|word| format!("{INDENT}{word}")));
        for word in words {
            match lines.last_mut() {
                Some(line) if line.len() + 1 + word.len() <= WIDTH => *line += &format!(" {word}"),
                _ => lines.push(format!("{INDENT}{word}")),
            }
        }
    }
    lines.join("\n") + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_flag_stands_once_under_a_heading() {
        let mut clap = Vec::new();
        Flags::clap().write_long_help(&mut clap).unwrap();
        let clap = String::from_utf8(clap).unwrap();
        let (_, flags) = clap.split_once("OPTIONS:\n").unwrap();
        let flags = read(flags);
        assert!(heading(flags[0].usage).is_some());
        let help = help();
        for flag in &flags {
            let lines = help.lines().filter(|line| {
                let usage = line.strip_prefix("    ").unwrap_or_default();
                usage == flag.usage || usage.starts_with(&format!("{}  [", flag.usage))
            });
            assert_eq!(lines.count(), 1, "{}: {help}", flag.usage);
        }
        let headings = flags.iter().filter_map(|flag| heading(flag.usage));
        let expected = GROUPS.iter().map(|(_, heading)| *heading);
        assert!(headings.eq(expected), "in the order of the flags: {help}");
    }

    #[test]
    fn a_flag_has_its_default_beside_it_and_nothing_of_clap_behind() {
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
    fn a_default_is_taken_out_of_its_text() {
        let here = "  [default: here]".into();
        assert_eq!(without_brackets("a [b]  [default: here]"), ("a [b]", here));
    }
}
