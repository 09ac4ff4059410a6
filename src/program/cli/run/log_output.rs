//! The log on standard error: its format, and whether standard output goes to the same place.
//!
//! Under systemd the journal adds the time. It takes the priority of a line from a prefix, `<3>` to `<7>`:
//! [sd-daemon(3)](https://www.freedesktop.org/software/systemd/man/latest/sd-daemon.html).

use std::{
    env, fmt,
    io::{self, Write},
};

use log::{Level, LevelFilter};

/// Libraries that log errors or warnings which any peer can cause; not logged unless `RUST_LOG` names the library. soketto
/// implements WebSocket.
const MUTED: [&str; 1] = ["soketto"];

/// Starts logging, as `RUST_LOG` configures.
pub fn start() {
    let mut log = env_logger::Builder::new();
    log.filter_level(LevelFilter::Info);
    for library in MUTED {
        log.filter_module(library, LevelFilter::Off);
    }
    if is_journal() {
        log.format(|out, record| write_to_journal(out, record.level(), record.args()));
    }
    log.parse_default_env().init();
}

/// Writes an error that ends the program.
pub fn write_error(error: &anyhow::Error) {
    let line = format_args!("relaylet: {error:#}");
    let _ = match is_journal() {
        true => write_to_journal(&mut io::stderr(), Level::Error, &line),
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
    text.to_string().lines().try_for_each(|line| writeln!(out, "<{priority}>{line}"))
}

/// Where a standard stream goes. All pipes count as one sink: a container runtime reads both streams from pipes, and shows
/// them together.
#[cfg(unix)]
#[derive(Debug, PartialEq)]
enum Sink {
    Terminal,
    Pipe,
    Socket,
    File(String),
}

#[cfg(unix)]
impl Sink {
    fn of(stream: &(impl std::os::fd::AsFd + io::IsTerminal)) -> Option<Self> {
        use rustix::fs::{FileType, fstat};

        if stream.is_terminal() {
            return Some(Self::Terminal);
        }
        Some(match FileType::from_raw_mode(fstat(stream).ok()?.st_mode) {
            FileType::Fifo => Self::Pipe,
            FileType::Socket => Self::Socket,
            _ => Self::File(device_and_inode(stream)?),
        })
    }
}

/// The device and inode of a stream, in the format of `JOURNAL_STREAM`.
#[cfg(unix)]
fn device_and_inode(stream: impl std::os::fd::AsFd) -> Option<String> {
    let stat = rustix::fs::fstat(stream).ok()?;
    Some(format!("{}:{}", stat.st_dev, stat.st_ino))
}

/// Whether standard error is connected to systemd's journal: `JOURNAL_STREAM` in
/// [systemd.exec(5)](https://www.freedesktop.org/software/systemd/man/latest/systemd.exec.html).
fn is_journal() -> bool {
    #[cfg(unix)]
    return env::var("JOURNAL_STREAM").ok().is_some_and(|journal| {
        device_and_inode(io::stderr()).is_some_and(|stderr| journal == stderr)
    });
    #[cfg(not(unix))]
    return false;
}

/// Whether standard output goes to the same place as the log.
pub fn is_merged_with_stdout() -> bool {
    #[cfg(unix)]
    return Sink::of(&io::stdout()).is_some_and(|out| Some(out) == Sink::of(&io::stderr()));
    #[cfg(not(unix))]
    return io::IsTerminal::is_terminal(&io::stdout())
        && io::IsTerminal::is_terminal(&io::stderr());
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

    #[cfg(unix)]
    #[test]
    fn all_pipes_are_the_same_sink_and_each_file_is_its_own() {
        let [first, second] = [(); 2].map(|()| tempfile::tempfile().unwrap());
        let file = Sink::of(&first);
        assert!(file.is_some() && file == Sink::of(&first) && file != Sink::of(&second));
        let pipes = [(); 2].map(|()| io::pipe().unwrap());
        assert_eq!(device_and_inode(&pipes[0].0), device_and_inode(&pipes[0].1));
        assert_ne!(device_and_inode(&pipes[0].0), device_and_inode(&pipes[1].0));
        let stdout =
            std::fs::File::from(std::os::fd::OwnedFd::from(pipes[0].1.try_clone().unwrap()));
        assert_eq!(Sink::of(&stdout), Some(Sink::Pipe));
    }
}
