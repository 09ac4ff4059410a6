//! The configuration file: flags by their names and values, as TOML.
//!
//! Each setting is made into the flag of its name, and is read as on the command line: nothing means
//! anything else here. Pure; the file itself is read by whoever was given its name.

use std::borrow::Cow;

use toml::{
    Spanned, Value,
    de::{DeTable, DeValue},
};

/// A setting of a file, as the flags that say the same.
#[derive(Debug, PartialEq, Eq)]
pub struct Given {
    /// The flag's name, without dashes before it.
    pub name: String,
    /// The line it stands in, from 1.
    pub line: usize,
    /// `--name=value`, once for each value.
    pub flags: Vec<String>,
}

/// What is wrong with a file, and in which line.
#[derive(Debug, PartialEq, Eq)]
pub struct Problem {
    /// From 1.
    pub line: usize,
    /// What it is, and the remedy.
    pub problem: String,
}

/// A setting as it holds.
#[derive(Debug, PartialEq)]
pub struct Setting {
    /// The flag's name, without dashes before it.
    pub name: &'static str,
    /// What it is set to.
    pub value: Value,
    /// Whether it follows from others, or from the machine, because nobody set it.
    pub follows: bool,
}

/// The settings in `text`, which may have these names, in the order of the file.
///
/// # Errors
///
/// The first problem in it.
pub fn read(text: &str, names: &[&str]) -> Result<Vec<Given>, Problem> {
    let line = |at: usize| 1 + text.bytes().take(at).filter(|byte| *byte == b'\n').count();
    let table = DeTable::parse(text).map_err(|error| Problem {
        line: line(error.span().map_or(0, |span| span.start)),
        problem: error.message().lines().collect::<Vec<_>>().join("; "),
    })?;
    let mut given = Vec::new();
    for (name, value) in table.get_ref() {
        let line = line(name.span().start);
        let read = setting(name, value, names).map_err(|problem| Problem { line, problem })?;
        given.push(Given { line, ..read });
    }
    given.sort_by_key(|setting| setting.line);
    Ok(given)
}

fn setting(
    name: &Spanned<Cow<'_, str>>,
    value: &Spanned<DeValue<'_>>,
    names: &[&str],
) -> Result<Given, String> {
    let name = name.get_ref();
    if !names.contains(&name.as_ref()) {
        return Err(unknown(name, names));
    }
    let values = match value.get_ref() {
        DeValue::Array(values) => values.iter().map(|value| plain(value.get_ref())).collect(),
        one => plain(one).map(|value| vec![value]),
    };
    let values: Vec<_> = values
        .ok_or_else(|| format!("{name}: takes a text in quotes, a number or a list of texts"))?;
    Ok(Given {
        name: name.to_string(),
        line: 0,
        flags: values
            .iter()
            .map(|value| format!("--{name}={value}"))
            .collect(),
    })
}

fn plain(value: &DeValue<'_>) -> Option<String> {
    match value {
        DeValue::String(text) => Some(text.to_string()),
        DeValue::Integer(number) if number.radix() == 10 => Some(number.as_str().to_owned()),
        _ => None,
    }
}

fn unknown(name: &str, names: &[&str]) -> String {
    let nearest = names
        .iter()
        .min_by_key(|known| strsim::damerau_levenshtein(name, known));
    match nearest {
        Some(nearest) => format!("{name}: there is no such setting; try {nearest}"),
        None => format!("{name}: there is no such setting"),
    }
}

/// A file that sets all of these.
pub fn write(settings: &[Setting]) -> String {
    let mut file = String::from("# Where a line begins with #, the setting follows from others.\n");
    for Setting {
        name,
        value,
        follows,
    } in settings
    {
        let comment = if *follows { "# " } else { "" };
        file += &format!("{comment}{name} = {value}\n");
    }
    file
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAMES: [&str; 3] = ["max-reservations", "grace", "deny-subnet"];

    fn problem(text: &str) -> (usize, String) {
        let Problem { line, problem } = read(text, &NAMES).expect_err(text);
        assert_eq!(problem.lines().count(), 1, "{problem}");
        (line, problem)
    }

    #[test]
    fn a_setting_is_the_flag_of_its_name() {
        let text = "# slots\nmax-reservations = 5_00\n\ngrace = \"1m 30s\"\n\
                    deny-subnet = [\"192.0.2.0/24\",\n \"2001:db8::/32\"]\n";
        let given = read(text, &NAMES).unwrap();
        let flags: Vec<_> = given.iter().flat_map(|setting| &setting.flags).collect();
        assert_eq!(
            flags,
            [
                "--max-reservations=500",
                "--grace=1m 30s",
                "--deny-subnet=192.0.2.0/24",
                "--deny-subnet=2001:db8::/32"
            ]
        );
        let lines: Vec<_> = given.iter().map(|setting| setting.line).collect();
        assert_eq!(lines, [2, 4, 5]);
        assert_eq!(read("", &NAMES), Ok(vec![]));
    }

    #[test]
    fn what_is_wrong_is_told_with_its_line_and_the_remedy() {
        let (line, text) = problem("grace = \"1s\"\nmax-reservation = 5\n");
        assert_eq!(line, 2);
        assert_eq!(
            text,
            "max-reservation: there is no such setting; try max-reservations"
        );
        assert_eq!(problem("\n\ngrace = 1s\n").0, 3);
        assert_eq!(problem("grace = \"1s\"\ngrace = \"2s\"\n").0, 2);
        for value in ["true", "1.5", "{ a = 1 }", "1979-05-27", "[[1]]", "0x1F"] {
            let (line, text) = problem(&format!("grace = {value}"));
            assert_eq!(line, 1);
            assert!(text.starts_with("grace: takes a text"), "{text}");
        }
        assert!(problem("[grace]\nx = 1").1.starts_with("grace: takes"));
    }

    #[test]
    fn what_is_written_reads_the_same() {
        let settings = [
            Setting {
                name: "grace",
                value: Value::String("with \"quotes\" and \\ and\n".into()),
                follows: false,
            },
            Setting {
                name: "max-reservations",
                value: Value::Integer(7),
                follows: true,
            },
        ];
        let given = read(&write(&settings), &NAMES).unwrap();
        assert_eq!(given.len(), 1);
        assert_eq!(given[0].flags, ["--grace=with \"quotes\" and \\ and\n"]);
    }

    proptest::proptest! {
        #[test]
        fn whatever_a_file_says_nothing_panics(text in ".*") {
            let _ = read(&text, &NAMES);
        }
    }
}
