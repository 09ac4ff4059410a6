//! Child processes that benches measure: their standard input and output, CPU time and memory.

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    process::{Child, ChildStdout, Command, Stdio},
};

use libp2p::Multiaddr;

/// A process that writes lines to its standard output; killed when dropped.
pub struct Process {
    child: Child,
    output: BufReader<ChildStdout>,
}

impl Process {
    pub fn start(mut command: Command) -> Self {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the program starts");
        let output = BufReader::new(child.stdout.take().expect("a pipe"));
        Self { child, output }
    }

    /// Reads a line and returns what follows `word` in it.
    pub fn read_value(&mut self, word: &str) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).expect("text");
        let rest = line.strip_prefix(word);
        rest.expect("the line begins with the word").trim().to_owned()
    }

    /// Writes a line to its standard input.
    pub fn write_line(&mut self, line: &str) {
        let input = self.child.stdin.as_mut().expect("a pipe");
        writeln!(input, "{line}").expect("the process reads its input");
    }

    /// Reads the address that a relay listens on, from its first line.
    pub fn listen_address(&mut self) -> Multiaddr {
        self.read_value("listening on ").parse().expect("a multiaddr")
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// The CPU time of all its running threads, in nanoseconds. A relay does not end threads.
    pub fn cpu(&self) -> u64 {
        let threads = format!("/proc/{}/task", self.id());
        let threads = fs::read_dir(threads).expect("a running process, on Linux");
        let of = |thread: std::io::Result<fs::DirEntry>| {
            let schedstat = thread.expect("a thread").path().join("schedstat");
            let schedstat = fs::read_to_string(schedstat).expect("the kernel counts");
            let on_cpu = schedstat.split_whitespace().next().expect("three numbers");
            on_cpu.parse::<u64>().expect("nanoseconds")
        };
        threads.map(of).sum()
    }

    /// Its resident memory, in KiB.
    pub fn resident(&self) -> u64 {
        resident(self.id())
    }

    /// Its peak resident memory, in KiB.
    pub fn peak(&self) -> u64 {
        peak(self.id())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The peak resident memory of a process, in KiB.
pub fn peak(process: u32) -> u64 {
    number_after("VmHWM:", &format!("/proc/{process}/status"))
}

/// The resident memory of a process, in KiB.
pub fn resident(process: u32) -> u64 {
    number_after("Rss:", &format!("/proc/{process}/smaps_rollup"))
}

/// How many files a process has open.
pub fn open_files(process: u32) -> usize {
    let files = fs::read_dir(format!("/proc/{process}/fd"));
    files.expect("a running process, on Linux").count()
}

fn number_after(name: &str, file: &str) -> u64 {
    let text = fs::read_to_string(file).expect("a running process, on Linux");
    let mut words = text.split_whitespace().skip_while(|word| *word != name);
    let number = words.nth(1).expect("a number after the name");
    number.parse().expect("a number")
}
