//! A gdb stub with a machine behind it that follows a script: for tests of the client and the player.

use std::collections::{BTreeMap, VecDeque};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;

const REGISTERS: [(&str, usize); 17] = [
    ("rax", 64),
    ("rbx", 64),
    ("rcx", 64),
    ("rdx", 64),
    ("rsi", 64),
    ("rdi", 64),
    ("rbp", 64),
    ("rsp", 64),
    ("rip", 64),
    ("eflags", 32),
    ("cs", 32),
    ("ss", 32),
    ("cr0", 64),
    ("cr3", 64),
    ("cr4", 64),
    ("efer", 64),
    ("r8", 64),
];

/// A CPU's registers.
#[derive(Clone, Debug, Default)]
pub struct FakeCpu(pub BTreeMap<&'static str, u64>);

impl<const N: usize> From<[(&'static str, u64); N]> for FakeCpu {
    fn from(registers: [(&'static str, u64); N]) -> Self {
        Self(BTreeMap::from(registers))
    }
}

impl FakeCpu {
    /// As INIT leaves it.
    pub fn in_init() -> Self {
        Self::from([("rip", 0xfff0), ("cs", 0xf000), ("cr0", 0x6000_0010)])
    }
}

/// What happens at one `c`: changes the machine, gives the stop packet.
pub type Event = Box<dyn FnOnce(&mut FakeMachine) -> String + Send>;

/// All that a test looks at.
#[derive(Default)]
pub struct FakeMachine {
    pub cpus: Vec<FakeCpu>,
    pub memory: BTreeMap<u64, u8>,
    /// Packets of the breakpoints that are set, without their verb.
    pub points: Vec<String>,
    pub steps: usize,
    pub detached: bool,
    pub script: VecDeque<Event>,
    /// What a CPU that runs alone becomes, each time.
    pub alone: VecDeque<FakeCpu>,
    selected: usize,
}

impl FakeMachine {
    pub fn load(&mut self, addr: u64, data: &[u8]) {
        self.memory.extend(data.iter().enumerate().map(|(i, &b)| (addr + i as u64, b)));
    }

    pub fn bytes(&self, addr: u64, len: u64) -> Vec<u8> {
        (addr..addr + len).map(|a| self.memory.get(&a).copied().unwrap_or(0)).collect()
    }

    fn answer(&mut self, packet: &str) -> Option<String> {
        let ok = || Some("OK".to_owned());
        if packet == "c" {
            // Script at an end: the machine ends.
            return Some(self.script.pop_front().map_or_else(|| "W00".to_owned(), |event| event(self)));
        }
        if packet.starts_with("qXfer:features:read:target.xml") {
            return Some("l<xi:include href=\"regs.xml\"/>".to_owned());
        }
        if packet.starts_with("qXfer:features:read:regs.xml") {
            let tags: String =
                REGISTERS.iter().map(|(n, b)| format!("<reg name=\"{n}\" bitsize=\"{b}\"/>")).collect();
            return Some(format!("l{tags}"));
        }
        if packet == "qfThreadInfo" {
            let names: Vec<_> = (1..=self.cpus.len()).map(|n| format!("{n:02x}")).collect();
            return Some(format!("m{}", names.join(",")));
        }
        if packet == "qsThreadInfo" {
            return Some("l".to_owned());
        }
        if let Some(thread) = packet.strip_prefix("Hg") {
            self.selected = usize::from_str_radix(thread, 16).unwrap() - 1;
            return ok();
        }
        if let Some(thread) = packet.strip_prefix("vCont;c:") {
            if let Some(cpu) = self.alone.pop_front() {
                self.cpus[usize::from_str_radix(thread, 16).unwrap() - 1] = cpu;
            }
            return Some(format!("T02thread:{thread};"));
        }
        if packet.starts_with("vCont;s:") {
            self.steps += 1;
            return Some("T05thread:01;".to_owned());
        }
        if packet == "D" {
            self.detached = true;
            return ok();
        }
        let (verb, rest) = packet.split_at(1);
        match verb {
            "Z" => self.points.push(rest.to_owned()),
            "z" => {
                let at = self.points.iter().position(|p| p == rest)?;
                self.points.remove(at);
            }
            "p" => {
                let (name, bits) = REGISTERS[usize::from_str_radix(rest, 16).unwrap()];
                let value = self.cpus[self.selected].0.get(name).copied().unwrap_or(0);
                return Some(hex::encode(&value.to_le_bytes()[..bits / 8]));
            }
            "P" => {
                let (index, value) = rest.split_once('=').unwrap();
                let (name, bits) = REGISTERS[usize::from_str_radix(index, 16).unwrap()];
                let mut bytes = [0; 8];
                hex::decode_to_slice(value, &mut bytes[..bits / 8]).unwrap();
                self.cpus[self.selected].0.insert(name, u64::from_le_bytes(bytes));
            }
            "m" => {
                let (addr, len) = rest.split_once(',').unwrap();
                let number = |s| u64::from_str_radix(s, 16).unwrap();
                return Some(hex::encode(self.bytes(number(addr), number(len))));
            }
            "M" => {
                let (place, data) = rest.split_once(':').unwrap();
                let addr = u64::from_str_radix(place.split_once(',').unwrap().0, 16).unwrap();
                self.load(addr, &hex::decode(data).unwrap());
            }
            _ => return Some(String::new()),
        }
        ok()
    }
}

/// A stub at the other end of a socket.
pub struct FakeStub {
    machine: Arc<Mutex<FakeMachine>>,
}

impl FakeStub {
    pub fn start(cpus: Vec<FakeCpu>) -> Self {
        Self { machine: Arc::new(Mutex::new(FakeMachine { cpus, ..FakeMachine::default() })) }
    }

    pub fn machine(&self) -> MutexGuard<'_, FakeMachine> {
        self.machine.lock().unwrap()
    }

    pub fn connect(&self) -> UnixStream {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let machine = Arc::clone(&self.machine);
        thread::spawn(move || {
            let mut byte = [0];
            let mut packet = String::new();
            while theirs.read_exact(&mut byte).is_ok() {
                match byte[0] {
                    b'$' => packet.clear(),
                    b'#' => {
                        theirs.read_exact(&mut [0; 2]).unwrap();
                        let Some(reply) = machine.lock().unwrap().answer(&packet) else { break };
                        let sum = reply.bytes().fold(0u8, u8::wrapping_add);
                        if theirs.write_all(format!("+${reply}#{sum:02x}").as_bytes()).is_err() {
                            break;
                        }
                    }
                    other => packet.push(other.into()),
                }
            }
        });
        ours
    }
}
