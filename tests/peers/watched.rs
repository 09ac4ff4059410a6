//! Those who watch a relay over HTTP, in a process of their own: whether anybody else feels them.

use std::{net::TcpListener, process::Command, time::Duration};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::sleep,
};

use crate::common::children::Process;

/// The argument of such a process.
pub const ROLE: &str = "callers";

/// How many say nothing.
const IDLE: usize = 1000;

/// How often they come anew: the relay shows out who says nothing for longer.
const AGAIN: Duration = Duration::from_secs(5);

/// How many ask for everything, as fast as they can.
const BUSY: usize = 32;

/// What callers do.
#[derive(Clone, Copy, Debug)]
pub enum Callers {
    Idle,
    Busy,
}

/// A port that is free now.
pub fn port() -> u16 {
    let free = TcpListener::bind("127.0.0.1:0").expect("a free port");
    free.local_addr().expect("its address").port()
}

/// Calls this port until dropped.
pub fn call(port: u16, how: Callers) -> Process {
    // They get what the others leave of the cores. Else their turns on them would be measured.
    let mut command = Command::new("nice");
    command.args(["-n", "19"]);
    command.arg(std::env::current_exe().expect("this program"));
    command.args([ROLE, &port.to_string(), &format!("{how:?}")]);
    let mut process = Process::start(command);
    process.says("calling");
    process
}

/// What that process does.
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
