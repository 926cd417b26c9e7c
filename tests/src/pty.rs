//! Pseudo-terminals: the host's end of a serial port whose emulator wants a terminal.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use anyhow::{Context, Result};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};

/// A pair. The emulator opens the other end by its path.
pub struct Pty {
    /// Our end.
    pub host: File,
    /// The emulator's end, held open: without it ours reads as closed until the emulator comes.
    _held: File,
    /// The emulator's end.
    pub path: PathBuf,
}

impl Pty {
    /// A new pair that changes no byte on its way.
    pub fn open() -> Result<Self> {
        let host = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).context("a pseudo-terminal")?;
        grantpt(&host)?;
        unlockpt(&host)?;
        let name = ptsname(&host, Vec::new())?;
        let path = PathBuf::from(name.into_string().context("a pseudo-terminal's name")?);
        let held = File::options().read(true).write(true).open(&path)?;
        let mut modes = tcgetattr(&held)?;
        modes.make_raw();
        tcsetattr(&held, OptionalActions::Now, &modes)?;
        Ok(Self { host: host.into(), _held: held, path })
    }
}

impl Write for Pty {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.host.write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.host.flush()
    }
}

/// This program's own terminal without line editing and signals; as it was before once dropped.
pub struct RawTerminal {
    terminal: OwnedFd,
    before: Termios,
}

impl RawTerminal {
    /// Nothing when standard input is no terminal.
    pub fn enter() -> Option<Self> {
        let terminal = rustix::io::dup(rustix::stdio::stdin()).ok()?;
        let before = tcgetattr(&terminal).ok()?;
        let mut modes = before.clone();
        modes.make_raw();
        tcsetattr(&terminal, OptionalActions::Now, &modes).ok()?;
        Some(Self { terminal, before })
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // It may have gone away.
        let _ = tcsetattr(&self.terminal, OptionalActions::Now, &self.before);
    }
}

/// The key that starts a command to the bench: Ctrl-a, as with QEMU's own console.
const ESCAPE: u8 = 1;

/// Copies typed bytes to `port` until Ctrl-a x; Ctrl-a twice sends one.
pub fn forward_keys(mut keys: impl Read, mut port: impl Write) {
    let mut escaped = false;
    let mut byte = [0];
    while matches!(keys.read(&mut byte), Ok(1)) {
        match (escaped, byte[0]) {
            (true, b'x') => return,
            (false, ESCAPE) => escaped = true,
            _ => {
                escaped = false;
                if port.write_all(&byte).is_err() {
                    return;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_pass_unchanged_both_ways() {
        let mut pty = Pty::open().unwrap();
        let mut port = File::options().read(true).write(true).open(&pty.path).unwrap();
        let all = [b'\n', b'\r', 3, 4, 0x11, 0xff, 0];
        let mut got = [0; 7];
        pty.host.write_all(&all).unwrap();
        port.read_exact(&mut got).unwrap();
        assert_eq!(got, all);
        port.write_all(&all).unwrap();
        pty.host.read_exact(&mut got).unwrap();
        assert_eq!(got, all);
    }

    #[test]
    fn ctrl_a_x_ends() {
        let mut port = Vec::new();
        forward_keys(&b"ab\x01\x01c\x01xd"[..], &mut port);
        assert_eq!(port, b"ab\x01c");
    }
}
