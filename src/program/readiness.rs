//! Tells the service manager, if one started the relay, when it is ready and when it ends.
//!
//! That is [sd_notify][spec]: a datagram to the socket that the environment names. Written here
//! because it is a few lines, and the crate that is kept for it knows no abstract sockets.
//!
//! [spec]: https://www.freedesktop.org/software/systemd/man/latest/sd_notify.html

use std::{env, ffi::OsStr, io, time::Duration};

use libp2p::PeerId;

/// How much longer the end may take than it was to, on a busy machine.
const SLACK: Duration = Duration::from_secs(10);

/// Every listener is up.
pub fn ready(relay: PeerId) {
    tell(&format!("READY=1\nSTATUS=relaying as {relay}"));
}

/// The relay was told to end, and does so within this time. systemd's own patience is 90 s.
pub fn stopping(within: Duration) {
    let patience = within.saturating_add(SLACK).as_micros();
    tell(&format!("STOPPING=1\nEXTEND_TIMEOUT_USEC={patience}"));
}

/// A manager that cannot be told is no reason not to run; it may have one to stop waiting.
fn tell(state: &str) {
    let Some(socket) = env::var_os("NOTIFY_SOCKET") else {
        return;
    };
    if let Err(error) = send(state, &socket) {
        let socket = socket.display();
        log::warn!("the service manager cannot be told {state:?}: NOTIFY_SOCKET {socket}: {error}");
    }
}

#[cfg(target_os = "linux")]
fn send(state: &str, socket: &OsStr) -> io::Result<()> {
    use std::os::{
        linux::net::SocketAddrExt,
        unix::{
            ffi::OsStrExt,
            net::{SocketAddr, UnixDatagram},
        },
    };

    let address = match socket.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        _ => SocketAddr::from_pathname(socket)?,
    };
    UnixDatagram::unbound()?.send_to_addr(state.as_bytes(), &address)?;
    Ok(())
}

#[cfg(not(target_os = "linux"))]
fn send(_: &str, _: &OsStr) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}
