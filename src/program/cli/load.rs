//! Reads the settings from the command line, the environment and a file, and merges them: the first of these that has a
//! setting wins.

mod environment;

use std::{collections::BTreeSet, env, ffi::OsString, fs::File, io::Read, path::PathBuf};

use structopt::{StructOpt, clap};
use toml::{Table, Value, de::DeTable, de::DeValue};

use self::environment::{Variables, nearest};
use super::{flags, flags::Flags, flags::Origins, help};

/// The flags that take no value and are no settings.
const BARE_FLAGS: [&str; 4] = ["autonat-private", "help", "print-config", "version"];

/// The largest file that is read, in bytes: enough for some 300,000 subnets.
const MAX_FILE: u64 = 16 * 1024 * 1024;

/// Why the program exits instead of running a relay.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub enum Exit {
    /// To print this text: the help or the version.
    Print(String),
    /// Because of an error in the settings: one line that names the flag and the remedy.
    Usage(String),
}

impl From<String> for Exit {
    fn from(problem: String) -> Self {
        Self::Usage(in_one_line(&problem))
    }
}

/// Escapes control characters, so that a quoted value cannot add lines.
pub fn in_one_line(problem: &str) -> String {
    let show = |c: char| if c.is_control() { c.escape_default().to_string() } else { c.into() };
    problem.chars().map(show).collect()
}

/// A setting from the environment or the file: its name, its value (of a list: one element), and its origin.
type Entry = (String, Value, String);

impl Flags {
    /// Reads the settings of this process: [`Flags::read`].
    ///
    /// # Errors
    ///
    /// When a setting is invalid or cannot be read, or the program is to print its help or version.
    pub fn of_process() -> Result<Self, Exit> {
        Self::read(env::args_os(), env::vars_os())
    }

    /// Reads the flags; settings without a flag from the environment; and the remaining ones from the file that a flag
    /// or the environment names.
    ///
    /// # Errors
    ///
    /// As [`Flags::of_process`].
    pub fn read(
        arguments: impl IntoIterator<Item = OsString>,
        environment: impl IntoIterator<Item = (OsString, OsString)>,
    ) -> Result<Self, Exit> {
        // 1. The command line. The default of a setting shows the type of its value.
        let (known, mut origins) = (Self::default().settings()?, Origins::new());
        let words: Vec<_> = arguments.into_iter().skip(1).map(to_utf8).collect::<Result<_, _>>()?;
        check_names_of_flags(&words, &known)?;
        let version = help::version();
        let matches = Self::clap()
            .version(&*version)
            .get_matches_from_safe(words.clone())
            .map_err(|error| from_clap_error(error, None))?;
        let given = Self::from_clap(&matches);
        let mut table = given.to_table()?;
        table.retain(|name, _| matches.occurrences_of(name) > 0);
        check_values(&words, &known, &mut table)?;
        // 2. The environment and the file, for settings that no flag sets.
        let variables = environment::of_relaylet(environment);
        let warnings = environment::check_names(&variables, &known)?;
        merge_layer(read_environment(&known, &variables)?, &mut table, &mut origins)?;
        let config = variables.get(&environment::name_of("config")).map(PathBuf::from);
        let config = given.config.or(config);
        if let Some(file) = &config {
            let shown = file.display().to_string();
            let why = |error| format!("--config {shown}: {error}; name a file that can be read");
            let mut bytes = Vec::new();
            let opened = File::open(file).map_err(why)?;
            opened.take(MAX_FILE + 1).read_to_end(&mut bytes).map_err(why)?;
            if bytes.len() as u64 > MAX_FILE {
                let problem = "larger than 16 MiB; name a file of settings";
                return Err(format!("--config {shown}: {problem}").into());
            }
            merge_layer(read_file(&shown, &bytes, &known)?, &mut table, &mut origins)?;
        }

        // 3. The settings as a whole.
        let missing = table.keys().find_map(|name| flags::needs(name));
        let read: Self = table.try_into().map_err(|error| error.to_string())?;
        let (autonat_private, print_config) = (given.autonat_private, given.print_config);
        let flags = Self { config, print_config, autonat_private, origins, warnings, ..read };
        let checked = missing.map_or_else(|| flags.check(), Err);
        checked.map_err(|problem| flags.locate(problem))?;
        Ok(flags)
    }

    /// Returns the text of a TOML file with all settings.
    ///
    /// # Errors
    ///
    /// When a value has no form in TOML.
    pub fn to_file(&self) -> Result<String, String> {
        let given = self.to_table()?;
        let mut file = String::from("# A setting whose line begins with # follows from others.\n");
        let is_known = |name: &str| flags::needs(name).is_none();
        for (name, value) in self.settings()?.into_iter().filter(|(name, _)| is_known(name)) {
            let comment = if given.contains_key(&name) { "" } else { "# " };
            file += &format!("{comment}{name} = {value}\n");
        }
        Ok(file)
    }
}

/// Adds the settings of a layer that no layer above has. Checks all of its values, also those that a layer above hides:
/// they would take effect as soon as that one is removed.
fn merge_layer(layer: Vec<Entry>, table: &mut Table, origins: &mut Origins) -> Result<(), String> {
    let above: BTreeSet<_> = table.keys().cloned().collect();
    for (name, value, origin) in layer {
        // One at a time, so that the error can name the origin.
        let alone = Table::from_iter([(name.clone(), value.clone())]);
        if let Err(error) = alone.try_into::<Flags>() {
            return Err(format!("{origin}: --{name}: {}", error.message()));
        }
        if above.contains(&name) {
            continue;
        }
        origins.entry(name.clone()).or_insert(origin);
        match (table.get_mut(&name), value) {
            (Some(Value::Array(list)), Value::Array(more)) => list.extend(more),
            (_, value) => drop(table.insert(name, value)),
        }
    }
    Ok(())
}

/// Checks that each flag exists, and that [`BARE_FLAGS`] have no value.
fn check_names_of_flags(words: &[String], known: &Table) -> Result<(), String> {
    for (name, value) in words.iter().filter_map(|word| split_flag(word)) {
        let is_bare = BARE_FLAGS.contains(&name);
        if is_bare && value.is_some() {
            return Err(format!("--{name}: takes no value; leave out the = and what follows it"));
        }
        if !is_bare && !known.contains_key(name) && name != "config" && !name.is_empty() {
            return Err(format!("--{name}: unknown flag; {}", remedy(name, known, "--")));
        }
    }
    Ok(())
}

/// What to do about an unknown name: try the most similar one, if one is similar.
fn remedy(name: &str, known: &Table, dashes: &str) -> String {
    match nearest(name, known) {
        (nearest, distance) if distance <= name.len() / 3 => format!("try {dashes}{nearest}"),
        _ => "see relaylet --help".into(),
    }
}

/// Checks what clap 2 does not: the value of a boolean setting, which clap ignores, and that a flag with a default has
/// a value. Adds the boolean settings that have a value to `table`.
fn check_values(words: &[String], known: &Table, table: &mut Table) -> Result<(), String> {
    let next = words.iter().skip(1).map(String::as_str).chain(["--"]);
    for (word, next) in words.iter().zip(next) {
        let Some((name, given)) = split_flag(word) else { continue };
        match (known.get(name), given) {
            (Some(setting @ Value::Boolean(_)), Some(text)) => {
                let value = convert(setting, &toml_value(setting, text.into()));
                let value = value.map_err(|takes| format!("--{name} {text}: {takes}"))?;
                table.insert(name.into(), value);
            }
            (Some(setting), None) if next.starts_with("--") && !setting.is_bool() => {
                return Err(format!("--{name}: requires a value; see relaylet --help"));
            }
            _ => {}
        }
    }
    Ok(())
}

/// The name of a flag, and the value after its `=`; `None` for a word that is not a flag.
fn split_flag(word: &str) -> Option<(&str, Option<&str>)> {
    let word = word.strip_prefix("--")?;
    Some(word.split_once('=').map_or((word, None), |(name, value)| (name, Some(value))))
}

/// Reads the settings from the environment.
fn read_environment(known: &Table, variables: &Variables) -> Result<Vec<Entry>, String> {
    let mut given = Vec::new();
    for (name, setting) in known {
        let origin = environment::name_of(name);
        let Some(text) = variables.get(&origin) else { continue };
        let text = to_utf8(text.clone()).map_err(|problem| format!("{origin}: {problem}"))?;
        let value = convert(setting, &toml_value(setting, text));
        let value = value.map_err(|takes| format!("{origin}: {takes}"))?;
        given.push((name.clone(), value, origin));
    }
    Ok(given)
}

/// Reads a TOML file whose keys are names of flags.
fn read_file(file: &str, bytes: &[u8], known: &Table) -> Result<Vec<Entry>, String> {
    let breaks = bytes.iter().enumerate().filter(|(_, byte)| **byte == b'\n');
    let breaks: Vec<_> = breaks.map(|(at, _)| at).collect();
    let line = |at| 1 + breaks.partition_point(|line_break| *line_break < at);
    let origin = |at| format!("{file}:{}", line(at));
    let text = str::from_utf8(bytes).map_err(|error| {
        format!("{}: not UTF-8; save the file as UTF-8", origin(error.valid_up_to()))
    })?;
    let table = DeTable::parse(text).map_err(|error| {
        let origin = origin(error.span().map_or(0, |span| span.start));
        let problem = error.message().replace('\n', "; ");
        format!(
            "{origin}: {problem}; write a setting as its name, =, and a number or a string in quotes"
        )
    })?;
    let mut given = Vec::new();
    for (name, whole) in table.get_ref() {
        let (at, name) = (origin(name.span().start), name.get_ref().to_string());
        if let DeValue::Table(_) = whole.get_ref() {
            let problem = "tables are not supported; write each setting on a line of its own: grace = \"30s\"";
            return Err(format!("{at}: {name}: {problem}"));
        }
        let Some(setting) = known.get(&name) else {
            let problem = match name.as_str() {
                "config" | "print-config" => format!("not for the file; use the flag --{name}"),
                _ => format!("unknown setting; {}", remedy(&name, known, "")),
            };
            return Err(format!("{at}: {name}: {problem}"));
        };
        let parts = match (setting, whole.get_ref()) {
            (Value::Array(_), DeValue::Array(parts)) => parts.iter().collect(),
            _ => vec![whole],
        };
        if parts.is_empty() {
            given.push((name.clone(), Value::Array(vec![]), at.clone()));
        }
        for part in parts {
            let value = convert(setting, part.get_ref())
                .map_err(|takes| format!("{at}: {name}: {takes}"))?;
            given.push((name.clone(), value, origin(part.span().start)));
        }
    }
    Ok(given)
}

/// The TOML value of a text from the command line or the environment, for a setting with this default.
fn toml_value(setting: &Value, text: String) -> DeValue<'static> {
    match (setting, &*text) {
        (Value::Boolean(_), "true" | "1") => DeValue::Boolean(true),
        (Value::Boolean(_), "false" | "0") => DeValue::Boolean(false),
        _ => DeValue::String(text.into()),
    }
}

/// Converts a value to the type of `setting`, its default. The error says what the setting takes.
fn convert(setting: &Value, given: &DeValue<'_>) -> Result<Value, &'static str> {
    let text = match given {
        DeValue::String(text) => Some(text.as_ref()),
        DeValue::Integer(number) if number.radix() == 10 => Some(number.as_str()),
        _ => None,
    };
    match (setting, given, text) {
        (Value::Boolean(_), DeValue::Boolean(on), _) => Ok((*on).into()),
        (Value::Boolean(_), ..) => Err("takes true or false"),
        (Value::Array(_), _, Some("")) => Ok(vec![""].into()),
        // As in clap: a comma at the end adds no element.
        (Value::Array(_), _, Some(text)) => Ok(Vec::from_iter(text.split_terminator(',')).into()),
        (Value::Array(_), ..) => Err("takes a list of strings in quotes"),
        (_, _, Some(text)) => Ok(text.into()),
        _ => Err("takes a string in quotes, or a whole number in decimal digits"),
    }
}

pub(super) fn to_utf8(text: OsString) -> Result<String, String> {
    text.into_string().map_err(|bytes| format!("{bytes:?} is not UTF-8; write it as UTF-8"))
}

/// Reduces an error of clap to one line: it has several, of which the first says what is wrong. `subcommand` is the one
/// that was parsed, if any.
pub(super) fn from_clap_error(error: clap::Error, subcommand: Option<&str>) -> Exit {
    match (error.kind, subcommand) {
        (clap::ErrorKind::HelpDisplayed, None) => return Exit::Print(help::help()),
        // clap prints the version itself. If that fails, printing it again reports the error as for the help.
        (clap::ErrorKind::Io, _) => return Exit::Print(help::version()),
        // Of the version the text is empty: clap has printed it.
        (clap::ErrorKind::HelpDisplayed | clap::ErrorKind::VersionDisplayed, _) => {
            return Exit::Print(error.message);
        }
        _ => {}
    }
    // The problem may take two lines: the flag, then its name.
    let is_problem = |line: &&str| !["USAGE", "For more"].iter().any(|end| line.starts_with(end));
    let problem = error.message.trim_start_matches("error:").lines().map(str::trim);
    let problem: Vec<_> = problem.take_while(is_problem).filter(|line| !line.is_empty()).collect();
    format!("{}; see {} --help", problem.join(" "), subcommand.unwrap_or("relaylet")).into()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// A value of each kind.
    fn known() -> Table {
        let settings: [(&str, Value); 4] = [
            ("max-reservations", 1.into()),
            ("grace", "1s".into()),
            ("deny-subnet", Value::Array(Vec::new())),
            ("dht", false.into()),
        ];
        settings.map(|(name, value)| (name.to_owned(), value)).into_iter().collect()
    }

    fn read(text: impl AsRef<[u8]>) -> Result<Vec<Entry>, String> {
        read_file("file", text.as_ref(), &known())
    }

    fn problem(text: impl AsRef<[u8]>) -> (usize, String) {
        let problem = read(text).expect_err("a problem");
        assert_eq!(problem.lines().count(), 1, "{problem}");
        let (line, problem) =
            problem.strip_prefix("file:").unwrap().split_once(": ").expect("a line");
        (line.parse().unwrap(), problem.into())
    }

    #[test]
    fn each_setting_of_the_file_sets_the_flag_of_that_name() {
        let text = "# slots\nmax-reservations = 5_00\n\ngrace = \"1m 30s\"\n\
                    deny-subnet = [\"192.0.2.0/24\",\n \"2001:db8::/32\"]\ndht = true\n";
        let expected = [
            ("max-reservations", "500".into(), "file:2"),
            ("grace", "1m 30s".into(), "file:4"),
            ("deny-subnet", vec!["192.0.2.0/24"].into(), "file:5"),
            ("deny-subnet", vec!["2001:db8::/32"].into(), "file:6"),
            ("dht", true.into(), "file:7"),
        ];
        let expected: Vec<Entry> = expected
            .map(|(name, value, origin): (&str, Value, &str)| (name.into(), value, origin.into()))
            .into();
        assert_eq!(read(text), Ok(expected));
        assert_eq!(read(""), Ok(vec![]));
        let empty = read("deny-subnet = []\ndht = false").unwrap();
        let values: Vec<_> = empty.into_iter().map(|(_, value, _)| value).collect();
        assert_eq!(values, [Value::Array(vec![]), false.into()]);
    }

    #[test]
    fn an_error_names_its_line_and_the_remedy() {
        let (line, text) = problem("grace = \"1s\"\nmax-reservation = 5\n");
        assert_eq!(line, 2);
        assert_eq!(text, "max-reservation: unknown setting; try max-reservations");
        for (text, at) in [
            ("\n\ngrace = 1s\n", 3),
            ("grace = \"1s\"\ngrace = \"2s\"\n", 2),
            ("grace =", 1),
            ("grace = \"1s", 1),
        ] {
            let (line, text) = problem(text);
            assert!(text.ends_with("a number or a string in quotes"), "{text}");
            assert_eq!(line, at);
        }
        for value in ["true", "1.5", "1979-05-27", "[]", "0x1F"] {
            let (line, text) = problem(format!("grace = {value}"));
            assert_eq!(line, 1);
            assert!(text.starts_with("grace: takes a string"), "{text}");
        }
        for (text, name) in
            [("[grace]\nx = 1", "grace"), ("grace = { a = 1 }", "grace"), ("\n[limits]", "limits")]
        {
            let (_, text) = problem(text);
            assert!(text.starts_with(&format!("{name}: tables are not supported")), "{text}");
        }
        assert_eq!(problem("dht = 1").1, "dht: takes true or false");
        let list = "deny-subnet: takes a list of strings in quotes";
        for value in ["[true]", "[[]]", "[\"192.0.2.0/24\", []]", "[[\"192.0.2.0/24\"]]"] {
            assert_eq!(problem(format!("deny-subnet = {value}")).1, list, "{value}");
        }
        let (line, text) = problem(b"grace = \"1s\"\n# \xff");
        assert_eq!(line, 2);
        assert!(text.contains("UTF-8"), "{text}");
    }

    /// A block list: SIGHUP reads it while the relay runs. This took minutes when each value cost as much as the whole
    /// file.
    #[test]
    fn a_list_may_have_many_values() {
        let mut text = String::from("deny-subnet = [\n");
        for n in 0..50_000 {
            text += &format!("\"10.{}.{}.0/24\",\n", n / 256 % 256, n % 256);
        }
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(&file, text + "\"10.0.0.1\"]\n").unwrap();
        let arguments = ["relaylet".as_ref(), "--config".as_ref(), file.path().as_os_str()];
        let read = Flags::read(arguments.map(OsString::from), []);
        let Err(Exit::Usage(line)) = read else { panic!("the last value is no subnet") };
        assert!(line.contains(":50002: --deny-subnet: \"10.0.0.1\" is not a subnet"), "{line}");
    }

    #[test]
    fn a_file_that_is_too_large_is_not_read_whole() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(MAX_FILE + 1).unwrap();
        let arguments = ["relaylet".as_ref(), "--config".as_ref(), file.path().as_os_str()];
        let Err(Exit::Usage(line)) = Flags::read(arguments.map(OsString::from), []) else {
            panic!("the file is too large")
        };
        assert!(line.ends_with(": larger than 16 MiB; name a file of settings"), "{line}");
    }

    #[test]
    fn a_flag_is_suggested_only_for_a_similar_one() {
        for (flag, suggested) in [
            ("--grase", Some("--grace")),
            ("--max-slots", None),
            ("--port", None),
            ("--verbose", None),
            ("--max-connection-per-ip", Some("--max-connections-per-ip")),
        ] {
            let arguments = ["relaylet", flag, "1"].map(OsString::from);
            let Err(Exit::Usage(line)) = Flags::read(arguments, []) else { panic!("{flag}") };
            let remedy = suggested.map_or("see relaylet --help".into(), |it| format!("try {it}"));
            assert!(line.ends_with(&format!("{flag}: unknown flag; {remedy}")), "{line}");
        }
    }

    #[test]
    fn a_printed_file_is_read_back_unchanged() {
        let identity = "with \"quotes\" and \\ and\n";
        let flags = Flags { identity: identity.into(), ..Flags::default() };
        let file = flags.to_file().unwrap();
        let given = read_file("file", file.as_bytes(), &flags.settings().unwrap()).unwrap();
        let value = |name: &str| {
            let (_, value, _) = given.iter().find(|(own, ..)| own == name)?;
            value.as_str()
        };
        assert_eq!(value("identity"), Some(identity));
        assert_eq!(value("grace"), Some("30s"));
        assert_eq!(value("max-reservations-per-ip"), None, "it follows from others");
    }

    #[test]
    fn a_value_that_toml_cannot_hold_is_an_error() {
        use std::{ffi::OsStr, os::unix::ffi::OsStrExt};

        let flags = Flags { identity: OsStr::from_bytes(b"\xff").into(), ..Flags::default() };
        for error in [flags.to_table().err(), flags.settings().err(), flags.to_file().err()] {
            let error = error.expect("an error");
            assert!(error.contains("UTF-8") && error.lines().count() == 1, "{error}");
        }
    }

    proptest::proptest! {
        #[test]
        fn arbitrary_files_do_not_panic(text in ".*") {
            let _ = read(text);
        }
    }
}
