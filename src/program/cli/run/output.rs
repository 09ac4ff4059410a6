//! What the program prints: the log and errors on standard error, texts on standard output. The exit code of an error,
//! and whether both streams go to the same place.
//!
//! Under systemd the journal adds the time. It takes the priority of a line from a prefix, `<3>` to `<7>`:
//! [sd-daemon(3)](https://www.freedesktop.org/software/systemd/man/latest/sd-daemon.html).

use std::{
    env, fmt,
    io::{self, Write},
    process::ExitCode,
    time::SystemTime,
};

use anyhow::{Context, Result};
use log::{Level, LevelFilter};

use crate::program::cli::load::{Exit, in_one_line};

/// The libraries of the DHT and of WebSocket. Any peer can cause warnings that they log, so these are not logged unless
/// `RUST_LOG` names the library.
const MUTED: [&str; 2] = ["libp2p_kad", "soketto"];

/// Starts logging, as `RUST_LOG` configures.
pub fn start_log() {
    let mut log = env_logger::Builder::new();
    log.filter_level(LevelFilter::Info);
    for library in MUTED {
        log.filter_module(library, LevelFilter::Off);
    }
    let is_journal = is_journal();
    log.format(move |out, record| match is_journal {
        true => write_to_journal(out, record.level(), record.args()),
        false => {
            let (level, target) = (record.level(), record.target());
            let time = humantime::format_rfc3339_seconds(SystemTime::now());
            write_lines(out, &format!("[{time} {level:5} {target}] "), record.args())
        }
    });
    log.parse_default_env().init();
}

/// Prints an error in one line, or the text that the program exits with. Returns the exit code: 0 for a text, 2 for an
/// error in the settings, otherwise 1.
pub fn exit_with(error: &anyhow::Error) -> ExitCode {
    if let Some(Exit::Print(text)) = error.downcast_ref() {
        return match print(text) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => exit_with(&error),
        };
    }
    print_problem(Level::Error, &format!("{error:#}"));
    ExitCode::from(if error.is::<Exit>() { 2 } else { 1 })
}

/// Prints a line on standard output.
///
/// # Errors
///
/// If standard output cannot be written. A pipe that its reader has closed is no error: the reader may have read
/// enough, like `head`.
pub fn print(text: &str) -> Result<()> {
    let mut out = io::stdout();
    let written = writeln!(out, "{}", text.trim_end()).and_then(|()| out.flush());
    match written {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        written => written.context("standard output cannot be written"),
    }
}

/// Prints a problem on standard error, in one line. Ignores errors: standard error may be closed.
pub fn print_problem(level: Level, problem: &str) {
    let line = format!("relaylet: {}", in_one_line(problem));
    let _ = match is_journal() {
        true => write_to_journal(&mut io::stderr(), level, &format_args!("{line}")),
        false => writeln!(io::stderr(), "{line}"),
    };
}

fn write_to_journal(
    out: &mut impl Write,
    level: Level,
    text: &fmt::Arguments<'_>,
) -> io::Result<()> {
    let priority = match level {
        Level::Error => 3,
        Level::Warn => 4,
        Level::Info => 6,
        Level::Debug | Level::Trace => 7,
    };
    write_lines(out, &format!("<{priority}>"), text)
}

fn write_lines(out: &mut impl Write, prefix: &str, text: &fmt::Arguments<'_>) -> io::Result<()> {
    text.to_string().lines().try_for_each(|line| writeln!(out, "{prefix}{line}"))
}

/// Where a standard stream goes: "terminal", "pipe", "socket", or the device and inode of a file. All pipes count as
/// one sink: a container runtime reads both streams from pipes, and shows them together.
fn sink(stream: &(impl std::os::fd::AsFd + io::IsTerminal)) -> Option<String> {
    use rustix::fs::{FileType, fstat};

    if stream.is_terminal() {
        return Some("terminal".into());
    }
    match FileType::from_raw_mode(fstat(stream).ok()?.st_mode) {
        FileType::Fifo => Some("pipe".into()),
        FileType::Socket => Some("socket".into()),
        _ => device_and_inode(stream),
    }
}

/// The device and inode of a stream, in the format of `JOURNAL_STREAM`.
fn device_and_inode(stream: impl std::os::fd::AsFd) -> Option<String> {
    let stat = rustix::fs::fstat(stream).ok()?;
    Some(format!("{}:{}", stat.st_dev, stat.st_ino))
}

/// Whether standard error is connected to systemd's journal: `JOURNAL_STREAM` in
/// [systemd.exec(5)](https://www.freedesktop.org/software/systemd/man/latest/systemd.exec.html).
fn is_journal() -> bool {
    let journal = env::var("JOURNAL_STREAM").ok();
    journal.is_some() && journal == device_and_inode(io::stderr())
}

/// Whether standard output goes to the same place as the log: see [`sink`].
pub fn is_merged_with_stdout() -> bool {
    sink(&io::stdout()).is_some_and(|out| Some(out) == sink(&io::stderr()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_line_for_the_journal_has_a_priority() {
        for (level, text, lines) in [
            (Level::Error, "one", "<3>one\n"),
            (Level::Warn, "one\ntwo", "<4>one\n<4>two\n"),
            (Level::Info, "one", "<6>one\n"),
            (Level::Debug, "one", "<7>one\n"),
            (Level::Trace, "one", "<7>one\n"),
        ] {
            let mut written = Vec::new();
            write_to_journal(&mut written, level, &format_args!("{text}")).unwrap();
            assert_eq!(String::from_utf8(written).unwrap(), lines);
        }
    }

    #[test]
    fn all_pipes_are_the_same_sink_and_each_file_is_its_own() {
        let [first, second] = [(); 2].map(|()| tempfile::tempfile().unwrap());
        let file = sink(&first);
        assert!(file.is_some() && file == sink(&first) && file != sink(&second));
        let pipes = [(); 2].map(|()| io::pipe().unwrap());
        assert_eq!(device_and_inode(&pipes[0].0), device_and_inode(&pipes[0].1));
        assert_ne!(device_and_inode(&pipes[0].0), device_and_inode(&pipes[1].0));
        let stdout =
            std::fs::File::from(std::os::fd::OwnedFd::from(pipes[0].1.try_clone().unwrap()));
        assert_eq!(sink(&stdout).as_deref(), Some("pipe"));
    }
}
