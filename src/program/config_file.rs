//! The configuration file: flags by their names and values, as TOML.
//!
//! Each setting is made into the flag of its name, and is read as on the command line: nothing means
//! anything else here. Pure; the file itself is read by whoever was given its name.

use toml::{
    Spanned, Value,
    de::{DeTable, DeValue},
};

use super::settings::{Kind, Known, left_out};

/// A setting of a file, or one value of a list, as the flag that says the same.
#[derive(Debug, PartialEq, Eq)]
pub struct Given {
    /// The flag's name, without dashes before it.
    pub name: &'static str,
    /// The line it stands in, from 1.
    pub line: usize,
    /// `--name=value`, `--name`; `None` for an empty list, and for a switch that is off.
    pub flag: Option<String>,
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

/// The settings in `file`, of which these are known, in the order of the file.
///
/// # Errors
///
/// The first problem in it.
pub fn read(file: &[u8], known: &[Known]) -> Result<Vec<Given>, Problem> {
    let line = |at: usize| 1 + file.iter().take(at).filter(|byte| **byte == b'\n').count();
    let text = str::from_utf8(file).map_err(|error| Problem {
        line: line(error.valid_up_to()),
        problem: "no text in UTF-8; save the file as such".into(),
    })?;
    let table = DeTable::parse(text).map_err(|error| Problem {
        line: line(error.span().map_or(0, |span| span.start)),
        problem: format!(
            "{}; a setting is its name, =, and a number or a text in quotes",
            error.message().lines().collect::<Vec<_>>().join("; ")
        ),
    })?;
    let mut given = Vec::new();
    for (name, value) in table.get_ref() {
        let at_name = name.span().start;
        let read = setting(name.get_ref(), value, known);
        let (name, flags) = read.map_err(|problem| Problem {
            line: line(at_name),
            problem,
        })?;
        given.extend(flags.into_iter().map(|(at, flag)| Given {
            name,
            line: line(at.unwrap_or(at_name)),
            flag,
        }));
    }
    given.sort_by_key(|setting| setting.line);
    Ok(given)
}

/// A flag, and where in the text it stands if not where its name does.
type Flag = (Option<usize>, Option<String>);

fn setting(
    name: &str,
    value: &Spanned<DeValue<'_>>,
    known: &[Known],
) -> Result<(&'static str, Vec<Flag>), String> {
    let Some(Known { name, kind }) = known.iter().find(|known| known.name == name).copied() else {
        return Err(unknown(name, known));
    };
    let flag = |value: &Spanned<DeValue<'_>>| {
        let flag = format!("--{name}={}", plain(value.get_ref())?);
        Some((Some(value.span().start), Some(flag)))
    };
    let one = || flag(value).map(|flag| vec![flag]);
    let (flags, takes) = match (kind, value.get_ref()) {
        (Kind::One, _) => (one(), "a text in quotes, or a number"),
        (Kind::Switch, DeValue::Boolean(on)) => {
            let switch = on.then(|| format!("--{name}"));
            (Some(vec![(None, switch)]), "")
        }
        (Kind::Switch, _) => (None, "true or false"),
        (Kind::List, DeValue::Array(values)) if values.is_empty() => (Some(vec![(None, None)]), ""),
        (Kind::List, DeValue::Array(values)) => (
            values.iter().map(flag).collect(),
            "a list of texts in quotes",
        ),
        (Kind::List, _) => (one(), "a list of texts in quotes"),
    };
    let flags = flags.ok_or_else(|| format!("{name}: takes {takes}"))?;
    Ok((name, flags))
}

fn plain(value: &DeValue<'_>) -> Option<String> {
    match value {
        DeValue::String(text) => Some(text.to_string()),
        DeValue::Integer(number) if number.radix() == 10 => Some(number.as_str().to_owned()),
        _ => None,
    }
}

fn unknown(name: &str, known: &[Known]) -> String {
    if let Some(why) = left_out(name) {
        return why;
    }
    let names = known.iter().map(|known| known.name);
    match names.min_by_key(|known| strsim::damerau_levenshtein(name, known)) {
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

    fn known() -> Vec<Known> {
        let known = |(name, kind)| Known { name, kind };
        let settings = [
            ("max-reservations", Kind::One),
            ("grace", Kind::One),
            ("deny-subnet", Kind::List),
            ("dht", Kind::Switch),
        ];
        settings.map(known).into()
    }

    fn problem(text: impl AsRef<[u8]>) -> (usize, String) {
        let Problem { line, problem } = read(text.as_ref(), &known()).expect_err("a problem");
        assert_eq!(problem.lines().count(), 1, "{problem}");
        (line, problem)
    }

    #[test]
    fn a_setting_is_the_flag_of_its_name() {
        let text = "# slots\nmax-reservations = 5_00\n\ngrace = \"1m 30s\"\n\
                    deny-subnet = [\"192.0.2.0/24\",\n \"2001:db8::/32\"]\ndht = true\n";
        let given = read(text.as_bytes(), &known()).unwrap();
        let given: Vec<_> = given
            .iter()
            .map(|setting| (setting.line, setting.flag.as_deref().unwrap()))
            .collect();
        assert_eq!(
            given,
            [
                (2, "--max-reservations=500"),
                (4, "--grace=1m 30s"),
                (5, "--deny-subnet=192.0.2.0/24"),
                (6, "--deny-subnet=2001:db8::/32"),
                (7, "--dht"),
            ]
        );
        assert_eq!(read(b"", &known()), Ok(vec![]));
        let empty = read(b"deny-subnet = []\ndht = false", &known()).unwrap();
        assert!(empty.len() == 2 && empty.iter().all(|setting| setting.flag.is_none()));
    }

    #[test]
    fn what_is_wrong_is_told_with_its_line_and_the_remedy() {
        let (line, text) = problem("grace = \"1s\"\nmax-reservation = 5\n");
        assert_eq!(line, 2);
        assert_eq!(
            text,
            "max-reservation: there is no such setting; try max-reservations"
        );
        for (text, at) in [
            ("\n\ngrace = 1s\n", 3),
            ("grace = \"1s\"\ngrace = \"2s\"\n", 2),
            ("grace =", 1),
            ("grace = \"1s", 1),
        ] {
            let (line, text) = problem(text);
            assert!(text.ends_with("a number or a text in quotes"), "{text}");
            assert_eq!(line, at);
        }
        for value in ["true", "1.5", "{ a = 1 }", "1979-05-27", "[]", "0x1F"] {
            let (line, text) = problem(format!("grace = {value}"));
            assert_eq!(line, 1);
            assert!(text.starts_with("grace: takes a text"), "{text}");
        }
        assert!(problem("[grace]\nx = 1").1.starts_with("grace: takes"));
        assert_eq!(problem("dht = 1").1, "dht: takes true or false");
        let list = "deny-subnet: takes a list of texts in quotes";
        assert_eq!(problem("deny-subnet = [true]").1, list);
        let (line, text) = problem(b"grace = \"1s\"\n# \xff");
        assert_eq!(line, 2);
        assert!(text.contains("UTF-8"), "{text}");
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
        let given = read(write(&settings).as_bytes(), &known()).unwrap();
        assert_eq!(given.len(), 1);
        let flag = given[0].flag.as_deref();
        assert_eq!(flag, Some("--grace=with \"quotes\" and \\ and\n"));
    }

    proptest::proptest! {
        #[test]
        fn whatever_a_file_says_nothing_panics(text in ".*") {
            let _ = read(text.as_bytes(), &known());
        }
    }
}
