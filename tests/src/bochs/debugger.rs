//! Bochs' internal debugger over its standard input and output: the only door that Bochs has.
//!
//! It answers each command with text and a prompt. While the machine runs it reads nothing; SIGINT stops the machine.

use std::fs::File;
use std::io::{Read, Write};
use std::process::{ChildStdin, ChildStdout};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

/// How long a command may take; the first prompt comes after Bochs has set up its memory.
const REPLY_TIME: Duration = Duration::from_secs(120);
/// 32-bit words of memory per request.
const WORDS: usize = 1024;

/// Why the machine came to rest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stop {
    /// A CPU is about to execute an instruction with a breakpoint.
    Breakpoint {
        /// The CPU's number.
        cpu: u32,
    },
    /// A CPU has executed an instruction that read what is watched.
    Read {
        /// The CPU's number.
        cpu: u32,
        /// Physical address of the access.
        at: u64,
    },
    /// The same for a write.
    Write {
        /// The CPU's number.
        cpu: u32,
        /// Physical address of the access.
        at: u64,
    },
    /// A CPU has left its guest, and is at the first instruction of its host.
    VmExit {
        /// The CPU's number.
        cpu: u32,
    },
    /// Somebody asked for it.
    Interrupted,
    /// The machine is gone.
    Exited,
}

/// The connection.
pub struct Debugger {
    input: ChildStdin,
    output: Receiver<Vec<u8>>,
    buffer: Vec<u8>,
    log: File,
    cpu: u32,
}

impl Debugger {
    /// Waits for the first prompt. What is said goes to `log`.
    pub fn new(input: ChildStdin, mut output: ChildStdout, log: File) -> Result<Self> {
        let (sender, receiver) = channel();
        thread::spawn(move || {
            let mut chunk = [0; 65536];
            while let Ok(n @ 1..) = output.read(&mut chunk) {
                if sender.send(chunk[..n].to_vec()).is_err() {
                    break;
                }
            }
        });
        let mut debugger = Self { input, output: receiver, buffer: Vec::new(), log, cpu: 0 };
        debugger.reply(Some(REPLY_TIME))?.context("Bochs ended before its first prompt")?;
        Ok(debugger)
    }

    /// The text up to the next prompt; nothing when Bochs has ended.
    fn reply(&mut self, limit: Option<Duration>) -> Result<Option<String>> {
        let end = limit.map(|limit| Instant::now() + limit);
        let mut searched = 0;
        loop {
            if let Some((text, used)) = split_prompt(&self.buffer, searched) {
                self.buffer.drain(..used);
                return Ok(Some(text));
            }
            searched = self.buffer.len().saturating_sub(PROMPT_MAX);
            let left = end.map_or(REPLY_TIME, |end| end.saturating_duration_since(Instant::now()));
            match self.output.recv_timeout(left) {
                Ok(chunk) => self.buffer.extend(chunk),
                Err(RecvTimeoutError::Disconnected) => {
                    let _ = self.log.write_all(&self.buffer);
                    return Ok(None);
                }
                Err(RecvTimeoutError::Timeout) if end.is_none() => {}
                Err(RecvTimeoutError::Timeout) => {
                    bail!("Bochs' debugger: no answer for {} s", REPLY_TIME.as_secs())
                }
            }
        }
    }

    /// Gives a command and takes its answer.
    pub fn ask(&mut self, command: &str) -> Result<String> {
        writeln!(self.input, "{command}").with_context(|| format!("Bochs' debugger: {command:?}"))?;
        let reply = self.reply(Some(REPLY_TIME))?;
        reply.with_context(|| format!("Bochs ended instead of an answer to {command:?}"))
    }

    /// Lets the machine run until it stops.
    pub fn run(&mut self) -> Result<Stop> {
        writeln!(self.input, "c").context("Bochs' debugger")?;
        let Some(text) = self.reply(None)? else { return Ok(Stop::Exited) };
        let stop = parse_stop(&text);
        if stop == Stop::Interrupted {
            // Whatever it is, the log has it.
            let _ = self.log.write_all(text.as_bytes());
        }
        Ok(stop)
    }

    /// Chooses the CPU whose registers the other calls use.
    pub fn select(&mut self, cpu: u32) -> Result<()> {
        if self.cpu != cpu {
            self.ask(&format!("set $cpu = {cpu}"))?;
            self.cpu = cpu;
        }
        Ok(())
    }

    /// All general registers and the instruction pointer, by the debugger's names.
    pub fn registers(&mut self) -> Result<Registers> {
        let text = self.ask("r")?;
        Ok(Registers(parse_registers(&text)))
    }

    /// CR4.
    pub fn cr4(&mut self) -> Result<u64> {
        let reply = self.ask("creg")?;
        parse_cr4(&reply).with_context(|| format!("Bochs' debugger: control registers: {}", reply.trim()))
    }

    /// Sets a general register or `rip`.
    pub fn set_register(&mut self, name: &str, value: u64) -> Result<()> {
        let reply = self.ask(&format!("set {name} = {value:#x}"))?;
        ensure!(!reply.contains("rror"), "Bochs' debugger: {name} = {value:#x}: {}", reply.trim());
        Ok(())
    }

    /// Stops before any CPU executes the instruction at a linear address. Gives the breakpoint's number.
    ///
    /// Not at a physical one: for that Bochs walks all page tables before each instruction, which then takes four times as long.
    pub fn break_at(&mut self, linear: u64) -> Result<u32> {
        let reply = self.ask(&format!("lb {linear:#x}"))?;
        ensure!(!reply.contains("rror"), "Bochs' debugger: breakpoint at {linear:#x}: {}", reply.trim());
        let list = self.ask("blist")?;
        let number = list.lines().filter_map(|line| line.split_whitespace().next()?.parse().ok()).max();
        number.with_context(|| format!("Bochs' debugger: no breakpoint in {list:?}"))
    }

    /// Whether the CPU has the page of this address mapped to itself.
    pub fn maps_to_itself(&mut self, linear: u64) -> Result<bool> {
        let reply = self.ask(&format!("page {linear:#x}"))?;
        Ok(parse_page(&reply).is_some_and(|physical| physical == linear & !0xfff))
    }

    /// The emulator's clock, which goes on by one with each instruction of a CPU, and as it likes while all are halted.
    pub fn ticks(&mut self) -> Result<u64> {
        let reply = self.ask("ptime")?;
        parse_ticks(&reply).with_context(|| format!("Bochs' debugger: time: {}", reply.trim()))
    }

    /// Takes a breakpoint away.
    pub fn remove(&mut self, number: u32) -> Result<()> {
        self.ask(&format!("d {number}")).map(drop)
    }

    /// Stops after each write to physical memory in a range.
    pub fn watch_writes(&mut self, physical: u64, length: u64) -> Result<()> {
        self.watch("w", physical, length)
    }

    /// Stops after each read of physical memory in a range.
    pub fn watch_reads(&mut self, physical: u64, length: u64) -> Result<()> {
        self.watch("r", physical, length)
    }

    /// Stops at VM exits of a CPU, or no longer.
    pub fn watch_exits(&mut self, cpu: u32, watched: bool) -> Result<()> {
        self.select(cpu)?;
        let reply = self.ask("vmexitbp")?;
        let wanted = if watched { "enabled" } else { "disabled" };
        ensure!(reply.contains(wanted), "Bochs' debugger: VM exits of CPU {cpu}: {}", reply.trim());
        Ok(())
    }

    /// Takes part of a CPU's state from the file `cpuN` in a folder below Bochs' working folder.
    pub fn restore_cpu(&mut self, cpu: u32, folder: &str) -> Result<()> {
        self.ask(&format!("restore \"cpu{cpu}\" \"{folder}\"")).map(drop)
    }

    fn watch(&mut self, kind: &str, physical: u64, length: u64) -> Result<()> {
        let reply = self.ask(&format!("watch {kind} {physical:#x} {length:#x}"))?;
        ensure!(reply.contains("inserted"), "Bochs' debugger: watch {physical:#x}: {}", reply.trim());
        Ok(())
    }

    /// Reads physical memory.
    pub fn read(&mut self, at: u64, length: usize) -> Result<Vec<u8>> {
        let start = at & !3;
        let skip = (at - start) as usize;
        let mut bytes = Vec::with_capacity(length + 8);
        while bytes.len() < skip + length {
            let from = start + bytes.len() as u64;
            let words = (skip + length - bytes.len()).div_ceil(4).min(WORDS);
            let reply = self.ask(&format!("xp /{words}wx {from:#x}"))?;
            let before = bytes.len();
            for line in reply.lines() {
                let Some((_, values)) = line.split_once(">:") else { continue };
                for value in values.split_whitespace() {
                    let digits = value.trim_start_matches("0x");
                    let word = u32::from_str_radix(digits, 16).with_context(|| line.to_owned())?;
                    bytes.extend_from_slice(&word.to_le_bytes());
                }
            }
            ensure!(bytes.len() - before == words * 4, "Bochs' debugger: memory at {from:#x}: {reply:?}");
        }
        Ok(bytes[skip..skip + length].to_vec())
    }

    /// Writes physical memory.
    pub fn write(&mut self, at: u64, bytes: &[u8]) -> Result<()> {
        let mut at = at;
        let mut rest = bytes;
        while !rest.is_empty() {
            let size = if at.is_multiple_of(4) && rest.len() >= 4 { 4 } else { 1 };
            let (head, tail) = rest.split_at(size);
            let value = head.iter().rev().fold(0u32, |value, &byte| value << 8 | u32::from(byte));
            let reply = self.ask(&format!("setpmem {at:#x} {size} {value:#x}"))?;
            ensure!(!reply.contains("rror"), "Bochs' debugger: memory at {at:#x}: {}", reply.trim());
            (at, rest) = (at + size as u64, tail);
        }
        Ok(())
    }
}

/// What `page` said: a page's physical address, if it has one.
fn parse_page(text: &str) -> Option<u64> {
    let digits = text.split_once("maps to physical page 0x")?.1.split_whitespace().next()?;
    u64::from_str_radix(digits, 16).ok()
}

/// What `ptime` said: instructions, on one CPU, since power-on.
fn parse_ticks(text: &str) -> Option<u64> {
    text.split_once("ptime: ")?.1.split_whitespace().next()?.parse().ok()
}

/// What `r` said.
pub struct Registers(Vec<(String, u64)>);

impl Registers {
    /// A register's value.
    pub fn get(&self, name: &str) -> Result<u64> {
        let found = self.0.iter().find(|(n, _)| n == name);
        Ok(found.with_context(|| format!("Bochs' debugger: no register {name}"))?.1)
    }
}

fn parse_registers(text: &str) -> Vec<(String, u64)> {
    text.lines()
        .filter_map(|line| {
            let (name, value) = line.split_once(": ")?;
            let digits: String = value.trim().chars().filter(|&c| c != '_').collect();
            Some((name.trim().to_owned(), u64::from_str_radix(&digits, 16).ok()?))
        })
        .collect()
}

/// What `creg` said of CR4.
fn parse_cr4(text: &str) -> Option<u64> {
    let (digits, _) = text.split_once("CR4=0x")?.1.split_once(':')?;
    u64::from_str_radix(digits, 16).ok()
}

/// `<bochs:N>`, with some reserve for the number.
const PROMPT_MAX: usize = 32;

/// The text before the first prompt that starts at or after `from`, and how many bytes both take.
fn split_prompt(buffer: &[u8], from: usize) -> Option<(String, usize)> {
    const START: &[u8] = b"<bochs:";
    let tail = buffer.get(from..)?;
    for at in tail.windows(START.len()).enumerate().filter(|(_, w)| *w == START).map(|(i, _)| from + i) {
        let number = &buffer[at + START.len()..];
        let digits = number.iter().take_while(|b| b.is_ascii_digit()).count();
        if digits > 0 && number.get(digits) == Some(&b'>') {
            let text = String::from_utf8_lossy(&buffer[..at]).into_owned();
            return Some((text, at + START.len() + digits + 1));
        }
    }
    None
}

fn parse_stop(text: &str) -> Stop {
    for line in text.lines() {
        // "(1) Caught write watch point at 0xfed40000", "(0) Breakpoint 3, in 0010:...".
        let Some((cpu, said)) = line.trim_start().strip_prefix('(').and_then(|l| l.split_once(')')) else {
            continue;
        };
        let Ok(cpu) = cpu.parse() else { continue };
        let said = said.trim_start();
        if said.starts_with("Breakpoint ") {
            return Stop::Breakpoint { cpu };
        }
        if said.starts_with("Caught VMEXIT breakpoint") {
            return Stop::VmExit { cpu };
        }
        let watched = |kind: &str| {
            let address = said.strip_prefix(&format!("Caught {kind} watch point at "))?;
            let digits = address.trim().trim_start_matches("0x");
            let end = digits.find(|c: char| !c.is_ascii_hexdigit()).unwrap_or(digits.len());
            u64::from_str_radix(&digits[..end], 16).ok()
        };
        if let Some(at) = watched("read") {
            return Stop::Read { cpu, at };
        }
        if let Some(at) = watched("write") {
            return Stop::Write { cpu, at };
        }
    }
    Stop::Interrupted
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prompt_counts_when_it_is_whole() {
        assert_eq!(split_prompt(b"text <bochs:1", 0), None);
        assert_eq!(split_prompt(b"a <bochs:> b\n<bochs:12> c", 0), Some(("a <bochs:> b\n".into(), 23)));
    }

    #[test]
    fn stops_name_cpu_and_address() {
        let text = "(1) Caught write watch point at 0x0000fed40018\nNext at t=1\n(1) [0x...] x\n";
        assert_eq!(parse_stop(text), Stop::Write { cpu: 1, at: 0xfed4_0018 });
        let text = "(1) Caught VMEXIT breakpoint\nNext at t=1\n";
        assert_eq!(parse_stop(text), Stop::VmExit { cpu: 1 });
        let text = "(0) Breakpoint 2, in 0038:000000003d9a1eac ()\nNext at t=1\n";
        assert_eq!(parse_stop(text), Stop::Breakpoint { cpu: 0 });
        assert_eq!(parse_stop("Next at t=5\n(0) [0x1] 2:3 (unk. ctxt): hlt\n"), Stop::Interrupted);
    }

    #[test]
    fn time_is_a_number_of_ticks() {
        assert_eq!(parse_ticks("ptime: 12345678901\n"), Some(12_345_678_901));
        assert_eq!(parse_ticks("syntax error"), None);
    }

    #[test]
    fn a_page_is_known_by_its_physical_address() {
        let text =
            "PTE: 00000000b9e00161 g\nlinear page 0x00000000b9e00000 maps to physical page 0x0000b9e01000\n";
        assert_eq!(parse_page(text), Some(0xb9e0_1000));
        assert_eq!(parse_page("physical address not available for linear 0x00000000b9e00000\n"), None);
    }

    #[test]
    fn cr4_is_found_among_the_control_registers() {
        assert_eq!(parse_cr4("CR3=0x000001000\nCR4=0x00002020: vmx PAE\nEFER=0x0"), Some(0x2020));
        assert_eq!(parse_cr4("syntax error"), None);
    }

    #[test]
    fn registers_are_64_bits_wide() {
        let registers = Registers(parse_registers("CPU0:\nrax: 00000001_fffffff0\nr8 : 00000000_00000007\n"));
        assert_eq!((registers.get("rax").unwrap(), registers.get("r8").unwrap()), (0x1_ffff_fff0, 7));
        assert!(registers.get("cr0").is_err());
    }
}
