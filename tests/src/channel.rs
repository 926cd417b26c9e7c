//! The command channel: the host's end of the guest's second serial port. `guest/init` is the other end.

use std::io::{Read, Write};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};

const READY: &[u8] = b"CORDON-BENCH READY";

/// What a command in the guest did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    /// Its exit status.
    pub status: i32,
    /// All it wrote, standard output and error as they came.
    pub bytes: Vec<u8>,
}

impl Output {
    /// The output as text, without white space at its end.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.bytes).trim_end().to_owned()
    }
}

/// The host's end.
pub struct Channel {
    port: Box<dyn Write + Send>,
    incoming: Receiver<Vec<u8>>,
    buffer: Vec<u8>,
    /// Bytes at the buffer's start that hold no start of what is looked for. Bytes come one by one, and
    /// looking at all of them each time takes a minute for a hundred kilobytes.
    searched: usize,
}

/// What waiting found.
#[derive(Debug, PartialEq, Eq)]
pub enum Wait<T> {
    /// It came.
    Done(T),
    /// Not yet.
    Pending,
    /// The machine closed the port; it will never come.
    Closed,
}

impl Channel {
    /// Starts reading from a connected port.
    pub fn new(mut reader: impl Read + Send + 'static, port: impl Write + Send + 'static) -> Self {
        let (sender, incoming) = channel();
        thread::spawn(move || {
            let mut chunk = [0; 16384];
            while let Ok(n @ 1..) = reader.read(&mut chunk) {
                if sender.send(chunk[..n].to_vec()).is_err() {
                    break;
                }
            }
        });
        Self { port: Box::new(port), incoming, buffer: Vec::new(), searched: 0 }
    }

    /// Waits up to `time` for the guest's init. What firmware wrote to the port before is dropped.
    pub fn ready(&mut self, time: Duration) -> Wait<()> {
        match self.wait_line(READY, time) {
            Wait::Done(_) => Wait::Done(()),
            Wait::Pending => Wait::Pending,
            Wait::Closed => Wait::Closed,
        }
    }

    /// Sends a shell script; ask for its output with [`Self::output`]. Returns the mark that ends it.
    pub fn send_script(&mut self, script: &str) -> Result<String> {
        // Unlikely in any output, whatever the script prints.
        let nonce = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos());
        let mark = format!("CORDON-BENCH-END-{nonce:x}");
        let header = format!("run {} {mark}\n", script.len());
        self.port.write_all(header.as_bytes()).context("command channel")?;
        self.port.write_all(script.as_bytes()).context("command channel")?;
        Ok(mark)
    }

    /// Waits up to `time` for the end of the script with `mark`.
    pub fn output(&mut self, mark: &str, time: Duration) -> Result<Wait<Output>> {
        let (bytes, trailer) = match self.wait_line(format!("{mark} ").as_bytes(), time) {
            Wait::Done(done) => done,
            Wait::Pending => return Ok(Wait::Pending),
            Wait::Closed => return Ok(Wait::Closed),
        };
        let mut words = trailer.split_whitespace();
        let (Some(Ok(status)), Some(Ok(count))) =
            (words.next().map(str::parse::<i32>), words.next().map(str::parse::<usize>))
        else {
            bail!("command channel: end line {trailer:?}");
        };
        ensure!(count == bytes.len(), "command channel: {} bytes came, the guest sent {count}", bytes.len());
        Ok(Wait::Done(Output { status, bytes }))
    }

    /// Output that has come so far and has not been asked for.
    pub fn pending(&self) -> &[u8] {
        &self.buffer
    }

    /// Asks init for an interactive shell on the console.
    pub fn shell(&mut self) -> Result<()> {
        self.port.write_all(b"shell\n").context("command channel")
    }

    /// Asks init to turn the machine off.
    pub fn off(&mut self) -> Result<()> {
        self.port.write_all(b"off\n").context("command channel")
    }

    /// Waits for `start` and the rest of its line; gives what came before it, and that rest.
    fn wait_line(&mut self, start: &[u8], time: Duration) -> Wait<(Vec<u8>, String)> {
        let end = Instant::now() + time;
        loop {
            let fresh = self.buffer.get(self.searched..).unwrap_or_default();
            match fresh.windows(start.len()).position(|w| w == start) {
                None => self.searched = (self.buffer.len() + 1).saturating_sub(start.len()),
                Some(at) => {
                    self.searched += at;
                    let rest = self.searched + start.len();
                    if let Some(length) = self.buffer[rest..].iter().position(|&b| b == b'\n') {
                        let line = String::from_utf8_lossy(&self.buffer[rest..rest + length]).into_owned();
                        let after = self.buffer.split_off(rest + length + 1);
                        let mut before = std::mem::replace(&mut self.buffer, after);
                        before.truncate(self.searched);
                        self.searched = 0;
                        return Wait::Done((before, line));
                    }
                }
            }
            match self.incoming.recv_timeout(end.saturating_duration_since(Instant::now())) {
                Ok(data) => self.buffer.extend(data),
                Err(RecvTimeoutError::Timeout) => return Wait::Pending,
                Err(RecvTimeoutError::Disconnected) => return Wait::Closed,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    const SOON: Duration = Duration::from_secs(5);

    fn pair() -> (Channel, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (Channel::new(ours.try_clone().unwrap(), ours), theirs)
    }

    #[test]
    fn noise_before_ready_is_dropped() {
        let (mut channel, mut guest) = pair();
        guest.write_all(b"\x1b[2JBdsDxe: junk\r\nCORDON-BENCH READY\n").unwrap();
        assert_eq!(channel.ready(SOON), Wait::Done(()));
        assert_eq!(channel.pending(), b"");
    }

    #[test]
    fn output_is_exact_and_carries_the_status() {
        let (mut channel, mut guest) = pair();
        let mark = channel.send_script("true").unwrap();
        guest.write_all(format!("no newline{mark} 3 10\nnext").as_bytes()).unwrap();
        let want = Output { status: 3, bytes: b"no newline".to_vec() };
        assert_eq!(channel.output(&mark, SOON).unwrap(), Wait::Done(want));
    }

    #[test]
    fn bytes_that_come_one_by_one_are_put_together() {
        let (mut channel, mut guest) = pair();
        let mark = channel.send_script("true").unwrap();
        let sent = format!("CORDON-BENCH-END\nx{mark} 0 18\n");
        thread::spawn(move || {
            for byte in sent.bytes() {
                guest.write_all(&[byte]).unwrap();
                thread::sleep(Duration::from_millis(1));
            }
            guest
        });
        let want = Output { status: 0, bytes: b"CORDON-BENCH-END\nx".to_vec() };
        assert_eq!(channel.output(&mark, SOON).unwrap(), Wait::Done(want));
    }

    #[test]
    fn lost_bytes_are_noticed() {
        let (mut channel, mut guest) = pair();
        let mark = channel.send_script("true").unwrap();
        guest.write_all(format!("abc{mark} 0 4\n").as_bytes()).unwrap();
        assert!(channel.output(&mark, SOON).is_err());
    }

    #[test]
    fn a_closed_port_is_not_waited_for() {
        let (mut channel, guest) = pair();
        drop(guest);
        assert_eq!(channel.ready(SOON), Wait::Closed);
    }
}
