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
    config_file::{self, Given},
    flags::Flags,
    help, settings,
};
use crate::config::ConfigError;

/// The flags that take no value.
const BARE: [&str; 3] = ["--help", "--print-config", "--version"];

/// Why the flags do not make a relay.
#[derive(Debug)]
pub enum Stop {
    /// Help or the version was asked for; this is it.
    Asked(String),
    /// One line that names the flag and the remedy.
    Usage(String),
}

impl Flags {
    /// Reads flags; what they leave open from the environment; what that leaves open from the file
    /// that either names.
    ///
    /// # Errors
    ///
    /// When something cannot be read or makes no sense, or help was asked for.
    pub fn read(arguments: impl IntoIterator<Item = OsString>) -> Result<Self, Stop> {
        let arguments: Vec<_> = arguments.into_iter().collect();
        let flags = parse(&arguments).map_err(stop)?;
        if let Some(flag) = without_value(&arguments) {
            return Err(Stop::Usage(format!(
                "{flag} needs a value; see relaylet --help"
            )));
        }
        let flags = match flags.config.clone() {
            Some(file) => with_file(arguments, &file),
            None => flags.check().map(|()| flags),
        };
        let flags = flags.map_err(Stop::Usage)?;
        match flags.print_config {
            true => Err(Stop::Asked(config_file::write(&flags.settings()))),
            false => Ok(flags),
        }
    }
}

fn parse(arguments: &[OsString]) -> Result<Flags, Error> {
    Flags::from_iter_safe(arguments)
}

/// The flags in `arguments`, and those of the file that neither they nor the environment has.
fn with_file(mut arguments: Vec<OsString>, file: &Path) -> Result<Flags, String> {
    let name = file.display();
    let text = fs::read_to_string(file)
        .map_err(|error| format!("--config {name}: {error}; name a file that can be read"))?;
    let mut given = config_file::read(&text, &settings::names())
        .map_err(|wrong| format!("{name}:{}: {}", wrong.line, wrong.problem))?;
    // Each by itself, to tell in which line it stands.
    for Given { line, flags, .. } in &given {
        let alone = flags.iter().map(OsString::from);
        let alone: Vec<_> = std::iter::once("relaylet".into()).chain(alone).collect();
        parse(&alone).map_err(|error| format!("{name}:{line}: {}", first_line(&error)))?;
    }
    given.retain(|setting| !is_set(&setting.name, &arguments));
    let flags = given.iter().flat_map(|setting| &setting.flags);
    arguments.extend(flags.map(OsString::from));
    let flags = parse(&arguments).map_err(|error| first_line(&error))?;
    flags.check().map_err(|problem| {
        // It begins with the name of a flag.
        let meant = |setting: &&Given| {
            let rest = problem.strip_prefix("--");
            let rest = rest.and_then(|rest| rest.strip_prefix(setting.name.as_str()));
            rest.is_some_and(|rest| rest.starts_with([':', ' ']))
        };
        match given.iter().find(meant) {
            Some(Given { line, .. }) => format!("{name}:{line}: {problem}"),
            None => problem,
        }
    })?;
    Ok(flags)
}

/// Whether a flag of this name is among the arguments, or in the environment.
fn is_set(name: &str, arguments: &[OsString]) -> bool {
    let variable = format!("RELAYLET_{}", name.replace('-', "_").to_uppercase());
    let flag = format!("--{name}");
    let is_it = |argument: &OsStr| {
        let rest = argument.to_str().and_then(|text| text.strip_prefix(&flag));
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('='))
    };
    env::var_os(variable).is_some() || arguments.iter().any(|argument| is_it(argument))
}

/// A flag without the value that each of them takes: clap would take its default.
fn without_value(arguments: &[OsString]) -> Option<&str> {
    let is_flag = |argument: &&str| {
        argument.starts_with("--") && !argument.contains('=') && !BARE.contains(argument)
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
    Stop::Usage(first_line(&error))
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
