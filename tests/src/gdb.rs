//! A client of the GDB remote serial protocol, as far as QEMU's stub needs it.
//!
//! Spec: GDB manual, appendix "GDB Remote Serial Protocol". All-stop mode: while the machine runs the
//! stub answers nothing, and a stop stops every CPU.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

/// How long the stub may take for anything but running.
const REPLY_TIME: Duration = Duration::from_secs(30);
/// Bytes of memory per packet: two hex digits each must fit QEMU's 4096-byte packets.
const MEMORY_CHUNK: usize = 1024;
/// The byte that stops a running machine.
const INTERRUPT: &[u8] = b"\x03";

/// What a breakpoint waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Break {
    /// Execution of the instruction at an address.
    Execute(u64),
    /// A write to one of the four bytes at an address.
    Write(u64),
}

impl Break {
    fn packet(self, insert: bool) -> String {
        let verb = if insert { 'Z' } else { 'z' };
        match self {
            Self::Execute(addr) => format!("{verb}1,{addr:x},1"),
            Self::Write(addr) => format!("{verb}2,{addr:x},4"),
        }
    }
}

/// Why the machine came to rest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stop {
    /// A CPU hit something.
    Thread {
        /// The CPU's name, as the stub writes it.
        name: String,
        /// The [`Break::Write`] it hit, if it was one.
        written: Option<u64>,
    },
    /// The machine is gone.
    Exited,
}

/// A register as the stub's target description names it.
#[derive(Debug)]
struct Register {
    name: String,
    bytes: usize,
}

/// A connection to the stub. The machine stops when it is made.
pub struct Gdb {
    stream: UnixStream,
    buffer: Vec<u8>,
    registers: Vec<Register>,
}

impl Gdb {
    /// Takes over a fresh connection and learns the machine's registers.
    pub fn new(stream: UnixStream) -> Result<Self> {
        let mut gdb = Self { stream, buffer: Vec::new(), registers: Vec::new() };
        let mut reply = gdb.request("qSupported:xmlRegisters=i386")?;
        while parse_stop(&reply).is_ok() {
            // A machine that ran has just been stopped, and that is told first.
            reply = gdb.receive(Some(REPLY_TIME))?.context("gdb stub: connection closed")?;
        }
        let target = gdb.description("target.xml")?;
        for include in between(&target, "xi:include href=\"", "\"") {
            let file = gdb.description(include)?;
            gdb.registers.extend(parse_registers(&file)?);
        }
        ensure!(!gdb.registers.is_empty(), "gdb stub: target description without registers");
        Ok(gdb)
    }

    fn description(&mut self, name: &str) -> Result<String> {
        let mut text = String::new();
        loop {
            let part = self.request(&format!("qXfer:features:read:{name}:{:x},ff0", text.len()))?;
            let (more, data) = part.split_at_checked(1).context("gdb stub: empty qXfer reply")?;
            text.push_str(data);
            match more {
                "m" => ensure!(!data.is_empty(), "gdb stub: {name} never ends"),
                "l" => return Ok(text),
                _ => bail!("gdb stub: reply {part:?} to a read of {name}"),
            }
        }
    }

    /// Sends one packet and gives the reply.
    fn request(&mut self, payload: &str) -> Result<String> {
        self.send(payload)?;
        self.receive(Some(REPLY_TIME))?
            .with_context(|| format!("gdb stub: connection closed instead of a reply to {payload:?}"))
    }

    fn acknowledged(&mut self, payload: &str) -> Result<()> {
        let reply = self.request(payload)?;
        ensure!(reply == "OK", "gdb stub: reply {reply:?} to {payload:?}");
        Ok(())
    }

    /// Runs a command of QEMU's monitor. What it prints is dropped.
    pub fn monitor(&mut self, command: &str) -> Result<()> {
        let mut reply = self.request(&format!("qRcmd,{}", hex::encode(command)))?;
        while reply != "OK" {
            ensure!(reply.starts_with('O'), "gdb stub: reply {reply:?} to {command:?}");
            reply = self.receive(Some(REPLY_TIME))?.context("gdb stub: connection closed")?;
        }
        Ok(())
    }

    fn send(&mut self, payload: &str) -> Result<()> {
        let sum = payload.bytes().fold(0u8, u8::wrapping_add);
        self.stream
            .write_all(format!("${payload}#{sum:02x}").as_bytes())
            .with_context(|| format!("gdb stub: sending {payload:?}"))
    }

    /// The next packet; `None` when the stub closed the connection.
    fn receive(&mut self, limit: Option<Duration>) -> Result<Option<String>> {
        let deadline = limit.map(|l| Instant::now() + l);
        loop {
            if let Some((packet, used)) = parse_packet(&self.buffer)? {
                self.buffer.drain(..used);
                // A stub that is about to exit does not wait for this.
                let _ = self.stream.write_all(b"+");
                return Ok(Some(packet));
            }
            let left = match deadline {
                None => None,
                Some(end) => {
                    let left = end.saturating_duration_since(Instant::now());
                    ensure!(!left.is_zero(), "gdb stub: no answer for {} s", REPLY_TIME.as_secs());
                    Some(left)
                }
            };
            self.stream.set_read_timeout(left)?;
            let mut chunk = [0; 4096];
            match self.stream.read(&mut chunk) {
                Ok(0) => return Ok(None),
                Ok(n) => self.buffer.extend_from_slice(&chunk[..n]),
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if e.kind() == ErrorKind::ConnectionReset => return Ok(None),
                Err(e) => return Err(e).context("gdb stub: reading"),
            }
        }
    }

    /// Lets all CPUs run.
    pub fn resume(&mut self) -> Result<()> {
        self.send("c")
    }

    /// Waits, without limit, for the machine to stop or to go away.
    pub fn wait(&mut self) -> Result<Stop> {
        let Some(packet) = self.receive(None)? else { return Ok(Stop::Exited) };
        parse_stop(&packet)
    }

    /// Runs one instruction on one CPU while the others rest; breakpoints on it do not count.
    pub fn step(&mut self, thread: &str) -> Result<()> {
        let reply = self.request(&format!("vCont;s:{thread}"))?;
        parse_stop(&reply).map(drop)
    }

    /// Lets one CPU run for a while, and the others rest.
    pub fn run_alone(&mut self, thread: &str, time: Duration) -> Result<()> {
        self.send(&format!("vCont;c:{thread}"))?;
        thread::sleep(time);
        self.stream.write_all(INTERRUPT).context("gdb stub: sending an interrupt")?;
        let reply = self.receive(Some(REPLY_TIME))?.context("gdb stub: connection closed while a CPU ran")?;
        parse_stop(&reply).map(drop)
    }

    /// The CPUs, in their order; the first is the one that started first.
    pub fn threads(&mut self) -> Result<Vec<String>> {
        let mut names = Vec::new();
        let mut reply = self.request("qfThreadInfo")?;
        while let Some(list) = reply.strip_prefix('m') {
            names.extend(list.split(',').map(str::to_owned));
            reply = self.request("qsThreadInfo")?;
        }
        Ok(names)
    }

    /// Chooses the CPU whose registers and address space the other calls use.
    pub fn select(&mut self, thread: &str) -> Result<()> {
        self.acknowledged(&format!("Hg{thread}"))
    }

    /// Sets a breakpoint.
    pub fn insert(&mut self, point: Break) -> Result<()> {
        self.acknowledged(&point.packet(true))
    }

    /// Removes a breakpoint.
    pub fn remove(&mut self, point: Break) -> Result<()> {
        self.acknowledged(&point.packet(false))
    }

    fn register_index(&self, name: &str) -> Result<usize> {
        self.registers
            .iter()
            .position(|r| r.name == name)
            .with_context(|| format!("gdb stub: no register {name}"))
    }

    /// Reads a register of up to 64 bits.
    pub fn register(&mut self, name: &str) -> Result<u64> {
        let index = self.register_index(name)?;
        let reply = self.request(&format!("p{index:x}"))?;
        let bytes = hex::decode(&reply).with_context(|| format!("gdb stub: reply {reply:?} for {name}"))?;
        let mut value = [0; 8];
        value
            .get_mut(..bytes.len())
            .with_context(|| format!("gdb stub: {name} has {} bytes", bytes.len()))?
            .copy_from_slice(&bytes);
        Ok(u64::from_le_bytes(value))
    }

    /// Writes a register of up to 64 bits.
    pub fn set_register(&mut self, name: &str, value: u64) -> Result<()> {
        let index = self.register_index(name)?;
        let width = self.registers[index].bytes;
        let bytes = value.to_le_bytes();
        let bytes = bytes.get(..width).with_context(|| format!("gdb stub: {name} has {width} bytes"))?;
        self.acknowledged(&format!("P{index:x}={}", hex::encode(bytes)))
    }

    /// Reads memory as the chosen CPU sees it.
    pub fn read(&mut self, addr: u64, len: usize) -> Result<Vec<u8>> {
        let mut data = Vec::with_capacity(len);
        while data.len() < len {
            let at = addr + data.len() as u64;
            let chunk = MEMORY_CHUNK.min(len - data.len());
            let reply = self.request(&format!("m{at:x},{chunk:x}"))?;
            let bytes = hex::decode(&reply).unwrap_or_default();
            ensure!(bytes.len() == chunk, "gdb stub: reply {reply:?} to a read of {chunk} bytes at {at:#x}");
            data.extend(bytes);
        }
        Ok(data)
    }

    /// Writes memory as the chosen CPU sees it, whatever its page tables allow.
    pub fn write(&mut self, addr: u64, data: &[u8]) -> Result<()> {
        for (i, chunk) in data.chunks(MEMORY_CHUNK).enumerate() {
            let at = addr + (i * MEMORY_CHUNK) as u64;
            self.acknowledged(&format!("M{at:x},{:x}:{}", chunk.len(), hex::encode(chunk)))?;
        }
        Ok(())
    }

    /// Writes physical memory, past everything that protects it.
    pub fn write_physical(&mut self, addr: u64, data: &[u8]) -> Result<()> {
        self.acknowledged("Qqemu.PhyMemMode:1")?;
        self.write(addr, data)?;
        self.acknowledged("Qqemu.PhyMemMode:0")
    }

    /// Leaves: the stub drops all breakpoints and lets the machine run.
    pub fn detach(mut self) -> Result<()> {
        self.acknowledged("D")
    }
}

/// Splits the first whole packet off `buffer`: its payload, and how many bytes it took.
fn parse_packet(buffer: &[u8]) -> Result<Option<(String, usize)>> {
    let Some(start) = buffer.iter().position(|&b| b == b'$') else { return Ok(None) };
    let Some(hash) = buffer[start..].iter().position(|&b| b == b'#').map(|i| start + i) else {
        return Ok(None);
    };
    let Some(sum) = buffer.get(hash + 1..hash + 3) else { return Ok(None) };
    let body = &buffer[start + 1..hash];
    let want = body.iter().fold(0u8, |a, &b| a.wrapping_add(b));
    ensure!(
        std::str::from_utf8(sum).ok().and_then(|s| u8::from_str_radix(s, 16).ok()) == Some(want),
        "gdb stub: packet with a wrong checksum"
    );
    let mut payload = Vec::with_capacity(body.len());
    let mut bytes = body.iter();
    while let Some(&b) = bytes.next() {
        // "}" escapes the next byte, which is XORed with 20h.
        payload.push(if b == b'}' { bytes.next().map_or(b, |next| next ^ 0x20) } else { b });
    }
    Ok(Some((String::from_utf8_lossy(&payload).into_owned(), hash + 3)))
}

fn parse_stop(packet: &str) -> Result<Stop> {
    match packet.as_bytes().first() {
        Some(b'T') => {
            let name = between(packet, "thread:", ";").next();
            let name = name.with_context(|| format!("gdb stub: stop {packet:?} names no thread"))?.to_owned();
            let written = between(packet, "watch:", ";").next();
            let written = written.map(|addr| u64::from_str_radix(addr, 16)).transpose();
            Ok(Stop::Thread { name, written: written.with_context(|| format!("gdb stub: stop {packet:?}"))? })
        }
        Some(b'W' | b'X') => Ok(Stop::Exited),
        _ => bail!("gdb stub: {packet:?} is no stop"),
    }
}

fn parse_registers(xml: &str) -> Result<Vec<Register>> {
    // QEMU's description has registers commented out, which take no number.
    let live: String = xml.split("<!--").map(|s| s.split_once("-->").map_or(s, |(_, after)| after)).collect();
    between(&live, "<reg ", ">")
        .map(|tag| {
            let attribute = |name: &str| between(tag, &format!("{name}=\""), "\"").next();
            let bits = attribute("bitsize").and_then(|b| b.parse::<usize>().ok());
            match (attribute("name"), bits) {
                (Some(name), Some(bits)) => Ok(Register { name: name.to_owned(), bytes: bits / 8 }),
                _ => bail!("gdb stub: register description {tag:?}"),
            }
        })
        .collect()
}

/// Every stretch of `text` between `open` and the `close` that follows it.
fn between<'a>(text: &'a str, open: &str, close: &str) -> impl Iterator<Item = &'a str> {
    text.split(open).skip(1).filter_map(move |rest| rest.split_once(close).map(|(inside, _)| inside))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake_gdb::{FakeCpu, FakeStub};

    #[test]
    fn a_packet_cut_anywhere_is_not_a_packet_yet() {
        let whole = b"+$T05thread:01;#07";
        for n in 0..whole.len() {
            assert!(parse_packet(&whole[..n]).unwrap().is_none(), "{n}");
        }
        assert_eq!(parse_packet(whole).unwrap().unwrap(), ("T05thread:01;".to_owned(), whole.len()));
    }

    #[test]
    fn a_wrong_checksum_is_an_error() {
        assert!(parse_packet(b"$OK#00").is_err());
    }

    #[test]
    fn escapes_are_undone() {
        let body = b"a}\x03b";
        let sum = body.iter().fold(0u8, |a, &b| a.wrapping_add(b));
        let mut packet = b"$".to_vec();
        packet.extend_from_slice(body);
        packet.extend(format!("#{sum:02x}").bytes());
        assert_eq!(parse_packet(&packet).unwrap().unwrap().0, "a#b");
    }

    #[test]
    fn stops_name_their_cpu() {
        let stop = |name: &str, written| Stop::Thread { name: name.to_owned(), written };
        assert_eq!(parse_stop("T05thread:02;watch:9e0f0;").unwrap(), stop("02", Some(0x9e0f0)));
        assert_eq!(parse_stop("T05thread:01;").unwrap(), stop("01", None));
        assert_eq!(parse_stop("W00").unwrap(), Stop::Exited);
        assert!(parse_stop("S05").is_err());
    }

    #[test]
    fn registers_in_comments_are_none() {
        let xml = r#"<reg name="gs" bitsize="32"/><!-- <reg name="ss_base" bitsize="64"/> --><reg name="cr0" bitsize="64"/>"#;
        let names: Vec<_> = parse_registers(xml).unwrap().into_iter().map(|r| r.name).collect();
        assert_eq!(names, ["gs", "cr0"]);
    }

    #[test]
    fn registers_and_memory_go_both_ways() {
        let stub = FakeStub::start(vec![FakeCpu::default()]);
        let mut gdb = Gdb::new(stub.connect()).unwrap();
        gdb.set_register("eflags", 2).unwrap();
        gdb.set_register("rax", 0x1122_3344_5566_7788).unwrap();
        assert_eq!(gdb.register("rax").unwrap(), 0x1122_3344_5566_7788);
        assert_eq!(gdb.register("eflags").unwrap(), 2);
        let data: Vec<u8> = (0..3000u32).map(|i| i as u8).collect();
        gdb.write(0x1234, &data).unwrap();
        assert_eq!(gdb.read(0x1234, data.len()).unwrap(), data);
        assert!(gdb.register("nonsense").is_err());
    }

    #[test]
    fn a_stub_that_hangs_up_is_an_exit_not_a_hang() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut gdb = Gdb { stream: ours, buffer: Vec::new(), registers: Vec::new() };
        drop(theirs);
        assert_eq!(gdb.wait().unwrap(), Stop::Exited);
        assert!(gdb.resume().is_err());
    }
}
