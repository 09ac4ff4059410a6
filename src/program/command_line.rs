//! From the command line, the environment and a file to flags: which of them wins, and what an
//! operator is told when they cannot be read.

use std::{
    env,
    ffi::{OsStr, OsString},
    fs,
    path::Path,
};

use structopt::{
    StructOpt,
    clap::{Error, ErrorKind},
};

use super::{
    config_file,
    flags::Flags,
    help,
    settings::{self, Kind, Known},
};
use crate::config::ConfigError;

/// The flags that take no value, beside the settings that are none or all.
const BARE: [&str; 4] = ["--autonat-private", "--help", "--print-config", "--version"];

/// Why the flags do not make a relay.
#[derive(Debug)]
pub enum Stop {
    /// Help or the version was asked for; this is it.
    Asked(String),
    /// One line that names the flag and the remedy.
    Usage(String),
}

/// Where a setting was given, if not on the command line.
#[derive(Clone, Debug)]
pub struct Origin {
    name: &'static str,
    /// `relaylet.toml:3`, `RELAYLET_GRACE`
    place: String,
}

/// A setting that was given elsewhere, as a flag; an empty list is none.
struct Given {
    origin: Origin,
    flag: Option<OsString>,
}

impl Flags {
    /// Those of this process: [`Flags::read`].
    ///
    /// # Errors
    ///
    /// When something cannot be read or makes no sense, or help was asked for.
    pub fn of_process() -> Result<Self, Stop> {
        Self::read(env::args_os(), |name| env::var_os(name))
    }

    /// Reads flags; what they leave open from the environment; what that leaves open from the file
    /// that either names.
    ///
    /// # Errors
    ///
    /// As [`Flags::of_process`].
    pub fn read(
        arguments: impl IntoIterator<Item = OsString>,
        variable: impl Fn(&str) -> Option<OsString>,
    ) -> Result<Self, Stop> {
        let (known, mut origins) = (settings::known(), Vec::new());
        let arguments = arguments.into_iter().collect();
        let mut arguments = switched(arguments, &known, &mut origins).map_err(usage)?;
        parse(&arguments).map_err(stop)?;
        if let Some(flag) = without_value(&arguments, &known) {
            return Err(usage(format!("{flag} needs a value; see relaylet --help")));
        }
        for (name, _) in settings::LEFT_OUT {
            let place = variable_of(name);
            if variable(&place).is_some() {
                let why = settings::left_out(name).unwrap_or_default();
                return Err(usage(format!("{place}: {why}")));
            }
        }
        let environment = of_environment(&known, variable).map_err(usage)?;
        add(environment, &mut arguments, &mut origins).map_err(usage)?;
        if let Some(file) = parse(&arguments).map_err(stop)?.config {
            let given = of_file(&file, &known).map_err(usage)?;
            add(given, &mut arguments, &mut origins).map_err(usage)?;
        }
        let mut flags = parse(&arguments).map_err(stop)?;
        flags.origins = origins;
        let checked = flags.check();
        checked.map_err(|problem| usage(flags.locate(problem)))?;
        match flags.print_config {
            true => Err(Stop::Asked(config_file::write(&flags.settings()))),
            false => Ok(flags),
        }
    }

    /// A problem that begins with the name of a flag, behind the place where it was given.
    pub fn locate(&self, problem: String) -> String {
        let name = problem.trim_start_matches("--").split([':', ' ']).next();
        let meant = |origin: &&Origin| Some(origin.name) == name;
        match self.origins.iter().find(meant) {
            Some(Origin { place, .. }) => format!("{place}: {problem}"),
            None => problem,
        }
    }
}

fn parse(arguments: &[OsString]) -> Result<Flags, Error> {
    Flags::from_iter_safe(arguments)
}

/// What the environment says. A value that is empty is none, but that of a list.
fn of_environment(
    known: &[Known],
    variable: impl Fn(&str) -> Option<OsString>,
) -> Result<Vec<Given>, String> {
    let config = Known {
        name: "config",
        kind: Kind::One,
    };
    let given = |known: &Known| {
        let place = variable_of(known.name);
        let value = variable(&place)?;
        let flag = match known.kind {
            Kind::One if value.is_empty() => return None,
            Kind::Switch if value.is_empty() => return None,
            Kind::List if value.is_empty() => None,
            Kind::Switch => match is_on(value.to_str()) {
                Some(on) => on.then(|| format!("--{}", known.name).into()),
                None => return Some(Err(format!("{place}: is true or false"))),
            },
            _ => {
                let mut flag = OsString::from(format!("--{}=", known.name));
                flag.push(value);
                Some(flag)
            }
        };
        let name = known.name;
        Some(Ok(Given {
            origin: Origin { name, place },
            flag,
        }))
    };
    known.iter().chain([&config]).filter_map(given).collect()
}

/// The setting's name in the environment.
fn variable_of(name: &str) -> String {
    format!("RELAYLET_{}", name.replace('-', "_").to_uppercase())
}

fn of_file(file: &Path, known: &[Known]) -> Result<Vec<Given>, String> {
    let shown = file.display();
    let bytes = fs::read(file)
        .map_err(|error| format!("--config {shown}: {error}; name a file that can be read"))?;
    let given = config_file::read(&bytes, known)
        .map_err(|wrong| format!("{shown}:{}: {}", wrong.line, wrong.problem))?;
    let located = |given: config_file::Given| Given {
        origin: Origin {
            name: given.name,
            place: format!("{shown}:{}", given.line),
        },
        flag: given.flag.map(OsString::from),
    };
    Ok(given.into_iter().map(located).collect())
}

/// Adds those that are neither among the arguments nor were given before.
fn add(
    mut given: Vec<Given>,
    arguments: &mut Vec<OsString>,
    origins: &mut Vec<Origin>,
) -> Result<(), String> {
    given.retain(|given| !is_set(given.origin.name, arguments, origins));
    for Given { origin, flag } in given {
        if let Some(flag) = flag {
            // By itself, to tell where it stands.
            let alone = ["relaylet".into(), flag.clone()];
            let place = &origin.place;
            parse(&alone).map_err(|error| format!("{place}: {}", first_line(&error)))?;
            arguments.push(flag);
        }
        origins.push(origin);
    }
    Ok(())
}

fn is_set(name: &str, arguments: &[OsString], origins: &[Origin]) -> bool {
    let flag = format!("--{name}");
    let is_it = |argument: &OsStr| {
        let rest = argument.to_str().and_then(|text| text.strip_prefix(&flag));
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('='))
    };
    origins.iter().any(|origin| origin.name == name) || arguments.iter().any(|a| is_it(a))
}

/// A flag without the value that each of them takes: clap would take its default.
fn without_value<'a>(arguments: &'a [OsString], known: &[Known]) -> Option<&'a str> {
    let is_switch = |argument: &str| {
        let mut switches = known.iter().filter(|known| known.kind == Kind::Switch);
        BARE.contains(&argument)
            || switches.any(|switch| argument.trim_start_matches('-') == switch.name)
    };
    let is_flag = |argument: &&str| {
        argument.starts_with("--") && !argument.contains('=') && !is_switch(argument)
    };
    let mut rest = arguments
        .iter()
        .map(|argument| argument.to_str())
        .peekable();
    while let Some(argument) = rest.next() {
        let bare = rest
            .peek()
            .is_none_or(|next| next.is_some_and(|next| next.starts_with("--")));
        if let Some(flag) = argument.filter(is_flag)
            && bare
        {
            return Some(flag);
        }
    }
    None
}

/// The arguments with each switch alone, or not at all where it is off: clap would not look at the
/// value.
fn switched(
    arguments: Vec<OsString>,
    known: &[Known],
    origins: &mut Vec<Origin>,
) -> Result<Vec<OsString>, String> {
    let mut switched = Vec::with_capacity(arguments.len());
    for argument in arguments {
        let text = argument.to_str().and_then(|text| text.split_once('='));
        let is_switch = |(flag, _): &(&str, &str)| {
            let mut switches = known.iter().filter(|known| known.kind == Kind::Switch);
            switches.find(|switch| flag.strip_prefix("--") == Some(switch.name))
        };
        let Some((name, (flag, value))) = text.and_then(|t| Some((is_switch(&t)?.name, t))) else {
            switched.push(argument);
            continue;
        };
        match is_on(Some(value)) {
            Some(true) => switched.push(flag.into()),
            Some(false) => origins.push(Origin {
                name,
                place: flag.into(),
            }),
            None => return Err(format!("{flag} {value}: is true or false")),
        }
    }
    Ok(switched)
}

fn is_on(value: Option<&str>) -> Option<bool> {
    match value? {
        "true" | "1" => Some(true),
        "false" | "0" => Some(false),
        _ => None,
    }
}

/// A setting's error under the name of its flag.
pub fn in_flags(error: &ConfigError) -> String {
    let flag = error.setting().replace('_', "-");
    format!("--{flag}: {}", error.problem())
}

/// clap explains in several lines; the first says what is wrong, and one is what an operator gets.
fn stop(error: Error) -> Stop {
    match error.kind {
        ErrorKind::HelpDisplayed => return Stop::Asked(help::help()),
        ErrorKind::VersionDisplayed => return Stop::Asked(error.message),
        _ => {}
    }
    let unknown = error.info.iter().flatten();
    let mut left_out = unknown.filter_map(|flag| settings::left_out(flag));
    usage(left_out.next().unwrap_or_else(|| first_line(&error)))
}

fn usage(problem: String) -> Stop {
    Stop::Usage(printable(&problem))
}

/// In one line, whatever stands in quotes in a file, or in an argument.
fn printable(line: &str) -> String {
    let mut printable = String::with_capacity(line.len());
    for char in line.chars() {
        match char.is_control() {
            true => printable.extend(char.escape_default()),
            false => printable.push(char),
        }
    }
    printable
}

fn first_line(error: &Error) -> String {
    let message = error.message.trim_start_matches("error:").trim();
    // What clap says first may stand in two lines: the flag, then its name.
    let said: Vec<_> = message
        .lines()
        .map(str::trim)
        .take_while(|line| !line.starts_with("USAGE") && !line.starts_with("For more information"))
        .filter(|line| !line.is_empty())
        .collect();
    format!("{}; see relaylet --help", said.join(" "))
}
