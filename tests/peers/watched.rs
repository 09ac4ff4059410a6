//! HTTP clients of a relay, in a process of their own, whose effect on circuits is measured.

use std::{process::Command, time::Duration};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::sleep,
};

use crate::common::child_process::Process;

/// The argument that makes this program such a process.
pub const ROLE: &str = "callers";

/// How many idle connections there are.
const IDLE: usize = 1000;

/// How often they are reopened: the relay closes idle ones after a longer time.
const AGAIN: Duration = Duration::from_secs(5);

/// How many clients request all paths as fast as they can.
const BUSY: usize = 32;

/// What the clients do.
#[derive(Clone, Copy, Debug)]
pub enum Callers {
    Idle,
    Busy,
}

/// Starts the clients of this port; they run until dropped.
pub fn start(port: u16, how: Callers) -> Process {
    // Lowest priority, so that they do not compete with the measured processes for the CPU.
    let mut command = Command::new("nice");
    command.args(["-n", "19"]);
    command.arg(std::env::current_exe().expect("this program"));
    command.args([ROLE, &port.to_string(), &format!("{how:?}")]);
    let mut process = Process::start(command);
    process.read_value("calling");
    process
}

/// The body of that process.
pub async fn run(port: &str, how: &str) {
    let port = port.parse().expect("a port");
    match how {
        "Idle" => idle(port).await,
        _ => busy(port).await,
    }
}

async fn idle(port: u16) {
    let mut told = false;
    loop {
        let mut callers = Vec::new();
        while callers.len() < IDLE {
            callers.push(connect(port).await);
        }
        if !std::mem::replace(&mut told, true) {
            println!("calling");
        }
        sleep(AGAIN).await;
    }
}

async fn busy(port: u16) {
    for _ in 0..BUSY {
        tokio::spawn(async move {
            loop {
                let mut caller = connect(port).await;
                let mut buffer = vec![0; 64 * 1024];
                for path in ["", "metrics", "status.json", "healthz"].iter().cycle() {
                    let request = format!("GET /{path} HTTP/1.1\r\nHost: localhost\r\n\r\n");
                    let asked = caller.write_all(request.as_bytes()).await;
                    if asked.is_err() || !matches!(caller.read(&mut buffer).await, Ok(1..)) {
                        break;
                    }
                }
            }
        });
    }
    println!("calling");
    std::future::pending().await
}

async fn connect(port: u16) -> TcpStream {
    let caller = TcpStream::connect(("127.0.0.1", port)).await;
    caller.expect("the port is open")
}
