//! The sandbox's state machine: what is done about each of its exits, and when it is given up.
//!
//! Independent of the CPU. The back end runs the virtual CPU and reports [`Exit`]s; what is decided here
//! costs the caller an EFI error at worst (I6), never the guest or the MLE.

use core::fmt;

use hv::vcpu::{Access, Exit};

use crate::acpi::Ports;
use crate::config::{Config, Denied, OnDeath, PortRange, SandboxConfig};
use crate::exposure::Decision;

/// Index port of the real-time clock.
pub const RTC_INDEX: u16 = 0x70;
/// Bit of the index port that masks the machine's NMIs.
const NMI_MASK: u8 = 1 << 7;
/// Last register of the clock itself; behind it CMOS memory begins.
///
/// Spec: \[ICH9\] "RTC Indexed Registers".
const RTC_LAST: u8 = 0x0d;
/// Where firmware keeps the century.
const RTC_CENTURY: u8 = 0x32;
/// Data port of the real-time clock.
pub const RTC_DATA: u16 = 0x71;

/// Of so many accesses of [`RTC_INDEX`] one is judged like any other exit, by the time it is then, too.
const JUDGED_SHORTLY: u32 = 64;

/// Whether a register is the clock's. CMOS memory is not: others keep their settings there.
pub const fn is_clock(index: u8) -> bool {
    index <= RTC_LAST || index == RTC_CENTURY
}
/// Writes raise a software SMI. The ACPI table that may name another port is firmware's own word, and would give the sandbox
/// the port it likes: another counts for it only if the configuration lists it, too.
pub const SMI_COMMAND: u16 = 0xb2;
/// A byte that travels with the SMI; writing it does nothing, and takes no exit.
pub const SMI_DATA: u16 = 0xb3;

/// Why the sandbox is dead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// A call took longer than its budget; microseconds.
    Budget {
        /// Time it had taken.
        used_us: u64,
        /// Time it was allowed.
        limit_us: u64,
    },
    /// Whoever made the call did not come back for its result; microseconds.
    Abandoned {
        /// Time since the call began.
        used_us: u64,
    },
    /// A call made more exits than it may.
    Exits {
        /// How many it may make.
        limit: u32,
    },
    /// It reached for memory that it does not have.
    Memory {
        /// Physical address.
        gpa: u64,
        /// What it tried.
        access: Access,
    },
    /// It used a model-specific register.
    Msr {
        /// Register number.
        index: u32,
        /// WRMSR rather than RDMSR.
        write: bool,
    },
    /// It used a port that it may not.
    Port {
        /// Port number.
        port: u16,
        /// IN rather than OUT.
        input: bool,
    },
    /// It raised a software SMI that it may not.
    Smi {
        /// The command byte.
        command: u8,
    },
    /// It used a string instruction on a port.
    StringPort(u16),
    /// It executed HLT: no interrupt would wake it.
    Halt,
    /// It made a hypercall elsewhere than at its return address.
    Hypercall,
    /// It executed an instruction of the virtualization extension, or INVD.
    Instruction,
    /// It raised an exception that it could not handle.
    Exception {
        /// Vector.
        vector: u8,
        /// Error code, or 0.
        error: u64,
    },
    /// Triple fault.
    Shutdown,
    /// The CPU did not run it, or stopped for a cause nobody asked for.
    Cpu {
        /// Raw exit code, all ones for a refused state.
        code: u64,
    },
    /// The firmware's tables name no entry point in runtime code for the service.
    NoEntry,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Budget { used_us, limit_us } => {
                write!(f, "call took {} ms, budget {} ms", used_us / 1000, limit_us / 1000)
            }
            Self::Abandoned { used_us } => write!(f, "call was abandoned for {} ms", used_us / 1000),
            Self::Exits { limit } => write!(f, "call made more than {limit} exits"),
            Self::Port { port, input } => {
                write!(f, "tried to {} port {port:#x}", if input { "read" } else { "write" })
            }
            Self::Smi { command } => write!(f, "asked for an SMI it may not raise, command {command:#x}"),
            Self::Memory { gpa, access } => {
                let verb = match access {
                    Access::Read => "read",
                    Access::Write => "write",
                    Access::Fetch => "execute",
                };
                write!(f, "tried to {verb} memory at {gpa:#x}")
            }
            Self::Msr { index, write } => {
                write!(f, "tried to {} MSR {index:#x}", if write { "write" } else { "read" })
            }
            Self::StringPort(port) => write!(f, "used a string instruction on port {port:#x}"),
            Self::Halt => f.write_str("halted"),
            Self::Hypercall => f.write_str("made a hypercall of its own"),
            Self::Instruction => f.write_str("executed a forbidden instruction"),
            Self::Exception { vector, error } => write!(f, "raised exception {vector}, error {error:#x}"),
            Self::Shutdown => f.write_str("triple fault"),
            Self::Cpu { code } => write!(f, "stopped with exit code {code:#x}"),
            Self::NoEntry => f.write_str("has no entry point in runtime code"),
        }
    }
}

/// With which rights a call runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// With firmware's own memory and devices, and the ports and registers that the configuration lists.
    Sandbox,
    /// With what the guest's kernel has, too.
    Native,
    /// With all, on the bare machine, between two launches: not here.
    Gap,
}

impl Place {
    /// As the exposure log has it.
    pub fn decision(self) -> Decision {
        match self {
            Self::Sandbox => Decision::SANDBOX,
            Self::Native => Decision::NATIVE,
            Self::Gap => Decision::RELAUNCH,
        }
    }
}

/// Whether calls may start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// A call may start.
    Ready,
    /// A call is running since that moment, in microseconds.
    Running {
        /// When it started.
        since_us: u64,
    },
    /// No call runs until [`Sandbox::revive`].
    Dead(Reason),
}

/// Why a call did not start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotReady {
    /// Another call is running.
    Busy,
    /// The sandbox is dead.
    Dead(Reason),
}

/// What to do about an exit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Let the host take what is pending, then run on.
    Resume,
    /// Answer CPUID, advance, run on.
    Cpuid,
    /// Do the port access for the firmware, advance, run on.
    PassPort,
    /// Do the port access as for the guest's kernel, from which this port is guarded, advance, run on.
    GuardedPort,
    /// Write `index` to [`RTC_INDEX`] in place of what the firmware gave, advance, run on.
    SelectRtc {
        /// The register of the clock, without the bit that masks NMIs.
        index: u8,
    },
    /// Do the access of [`RTC_DATA`] for the firmware, advance, run on. The guest may have selected another register meanwhile.
    RtcData {
        /// The register that the firmware selected last.
        index: u8,
    },
    /// IN reads all ones, OUT is dropped; advance, run on.
    DenyPort,
    /// RDMSR reads all ones, WRMSR is dropped; advance, run on.
    DenyMsr,
    /// Raise a software SMI with this command byte, advance, run on.
    RaiseSmi {
        /// [`SMI_COMMAND`], or the other port that the FADT names.
        port: u16,
        /// The byte written there.
        command: u8,
    },
    /// The firmware returned; RAX is its status.
    Return,
    /// The sandbox is dead from now on.
    Stop(Reason),
}

/// What firmware may do with [`RTC_INDEX`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RtcIndex {
    /// Read it.
    Read,
    /// Select this register, see [`Verdict::SelectRtc`].
    Select(u8),
}

/// What the sandbox did so far, for the status report. Counts saturate.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Calls started.
    pub calls: u64,
    /// Those of them that ran natively.
    pub native: u64,
    /// Exits of all kinds.
    pub exits: u64,
    /// Software SMIs requested.
    pub smis: u64,
    /// Port accesses denied.
    pub denied_ports: u64,
    /// MSR accesses denied, but for a last one that killed the sandbox.
    pub denied_msrs: u64,
    /// The MSR denied last.
    pub last_denied_msr: Option<u32>,
    /// How often it was made anew.
    pub restarts: u64,
    /// The port denied last.
    pub last_denied_port: Option<u16>,
    /// Longest call, in microseconds.
    pub longest_us: u64,
}

/// One sandbox: at most one call at a time, on one CPU.
#[derive(Debug)]
pub struct Sandbox {
    state: State,
    config: SandboxConfig,
    acpi: Ports,
    /// The register of the clock that it selected last.
    rtc_index: u8,
    exits: u32,
    counters: Counters,
    /// Where the call runs that runs, or ran last.
    place: Place,
}

impl Sandbox {
    /// A sandbox that is ready. `acpi`: firmware waits with the ACPI timer, and may read it.
    pub fn new(config: &Config, acpi: Ports) -> Self {
        let config = config.sandbox.clone();
        Self {
            state: State::Ready,
            config,
            acpi,
            rtc_index: 0,
            exits: 0,
            counters: Counters::default(),
            place: Place::Sandbox,
        }
    }

    fn limit_us(&self) -> u64 {
        u64::from(self.config.budget_ms).saturating_mul(1000)
    }

    /// Whether calls may start.
    pub fn state(&self) -> State {
        self.state
    }

    /// What it did so far.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// When the running call's budget ends: the moment a timer of the host must stop it.
    pub fn deadline_us(&self) -> Option<u64> {
        match self.state {
            State::Running { since_us } => Some(since_us.saturating_add(self.limit_us())),
            State::Ready | State::Dead(_) => None,
        }
    }

    /// Starts a call.
    pub fn start(&mut self, now_us: u64, place: Place) -> Result<(), NotReady> {
        match self.state {
            State::Ready => {
                self.state = State::Running { since_us: now_us };
                self.exits = 0;
                self.place = place;
                bump(&mut self.counters.calls);
                if place == Place::Native {
                    bump(&mut self.counters.native);
                }
                Ok(())
            }
            State::Running { .. } => Err(NotReady::Busy),
            State::Dead(reason) => Err(NotReady::Dead(reason)),
        }
    }

    /// Gives the sandbox up for a reason found outside of it.
    pub fn kill(&mut self, reason: Reason) {
        self.state = State::Dead(reason);
    }

    /// Makes a dead sandbox ready, if the configuration wants that: its memory and CPU are as they were at launch.
    /// False when it is to stay dead.
    pub fn revive(&mut self) -> bool {
        let restart = self.config.on_death == OnDeath::Restart;
        if restart && matches!(self.state, State::Dead(_)) {
            self.state = State::Ready;
            bump(&mut self.counters.restarts);
        }
        restart
    }

    /// Exits of the call that runs, or ran last.
    pub fn exits(&self) -> u32 {
        self.exits
    }

    /// Decides about a byte access of [`RTC_INDEX`] as [`Self::exit`] would, in fewer instructions: reading the clock takes
    /// twenty of them. `al` as there. `None`: this one is an exit like any other.
    pub fn rtc_index(&mut self, input: bool, al: u8) -> Option<RtcIndex> {
        let exits = self.exits.saturating_add(1);
        let shortly = matches!((self.state, self.place), (State::Running { .. }, Place::Sandbox))
            && !exits.is_multiple_of(JUDGED_SHORTLY)
            && exits <= self.config.budget_exits;
        if !shortly {
            return None;
        }
        self.exits = exits;
        bump(&mut self.counters.exits);
        if input {
            return Some(RtcIndex::Read);
        }
        self.rtc_index = al & !NMI_MASK;
        Some(RtcIndex::Select(self.rtc_index))
    }

    /// Decides about an exit of the running call. `at_return`: RIP is at the hypercall that the call was
    /// to return to. `al`: the low byte of RAX, which OUT writes.
    pub fn exit(&mut self, exit: &Exit, at_return: bool, al: u8, now_us: u64) -> Verdict {
        bump(&mut self.counters.exits);
        self.exits = self.exits.saturating_add(1);
        let used_us = match self.state {
            State::Running { since_us } => now_us.saturating_sub(since_us),
            State::Ready => return Verdict::Stop(Reason::Cpu { code: u64::MAX }),
            State::Dead(reason) => return Verdict::Stop(reason),
        };
        self.counters.longest_us = self.counters.longest_us.max(used_us);
        let mut verdict = self.judge(exit, at_return, al);
        // A call that comes back late has come back.
        if verdict == Verdict::Return {
            self.state = State::Ready;
            return verdict;
        }
        let (limit_us, limit) = (self.limit_us(), self.config.budget_exits);
        if !matches!(verdict, Verdict::Stop(_)) {
            if used_us > limit_us {
                verdict = Verdict::Stop(Reason::Budget { used_us, limit_us });
            } else if self.exits > limit {
                verdict = Verdict::Stop(Reason::Exits { limit });
            }
        }
        match verdict {
            Verdict::Stop(reason) => self.state = State::Dead(reason),
            Verdict::RaiseSmi { .. } => bump(&mut self.counters.smis),
            Verdict::SelectRtc { index } => self.rtc_index = index,
            Verdict::DenyPort => {
                bump(&mut self.counters.denied_ports);
                if let Exit::Port { port, .. } = exit {
                    self.counters.last_denied_port = Some(*port);
                }
            }
            Verdict::DenyMsr => {
                bump(&mut self.counters.denied_msrs);
                if let Exit::MsrRead { index } | Exit::MsrWrite { index, .. } = exit {
                    self.counters.last_denied_msr = Some(*index);
                }
            }
            _ => {}
        }
        verdict
    }

    fn judge(&self, exit: &Exit, at_return: bool, al: u8) -> Verdict {
        let stop = Verdict::Stop;
        match *exit {
            Exit::Cpuid => Verdict::Cpuid,
            Exit::Interrupt | Exit::Nmi | Exit::Smi | Exit::Init | Exit::Absorbed => Verdict::Resume,
            Exit::Port { port, string: true, .. } => stop(Reason::StringPort(port)),
            Exit::Port { port, size, input, .. } => self.port(port, size, input, al),
            Exit::Hypercall if at_return => Verdict::Return,
            Exit::Hypercall => stop(Reason::Hypercall),
            Exit::MsrRead { .. } | Exit::MsrWrite { .. } if self.config.denied_msrs == Denied::Ignore => {
                Verdict::DenyMsr
            }
            Exit::MsrRead { index } => stop(Reason::Msr { index, write: false }),
            Exit::MsrWrite { index, .. } => stop(Reason::Msr { index, write: true }),
            Exit::Memory { gpa, access, .. } => stop(Reason::Memory { gpa, access }),
            Exit::VirtualizationInstruction | Exit::InvalidateCaches | Exit::SetXcr { .. } => {
                stop(Reason::Instruction)
            }
            // It never waits for one.
            Exit::Startup { .. } => stop(Reason::Cpu { code: 0 }),
            Exit::Halt => stop(Reason::Halt),
            Exit::Shutdown => stop(Reason::Shutdown),
            Exit::Exception { vector, error } => stop(Reason::Exception { vector, error }),
            Exit::InvalidState => stop(Reason::Cpu { code: u64::MAX }),
            Exit::Unexpected { code, .. } => stop(Reason::Cpu { code }),
        }
    }

    /// A wider access reaches the next ports too, so each port has one width.
    fn port(&self, port: u16, size: u8, input: bool, al: u8) -> Verdict {
        let reached = |smi: u16| smi.checked_sub(port).is_some_and(|offset| offset < u16::from(size));
        match (port, size, input) {
            (SMI_COMMAND, 1, false) => Verdict::RaiseSmi { port, command: al },
            (p, 1, false) if self.place == Place::Native && Some(p) == self.acpi.smi_command => {
                Verdict::RaiseSmi { port, command: al }
            }
            // The others do not even exit.
            _ if self.place == Place::Native => Verdict::GuardedPort,
            (RTC_INDEX, 1, false) => Verdict::SelectRtc { index: al & !NMI_MASK },
            (RTC_DATA, 1, false) if !is_clock(self.rtc_index) => self.denied(port, input),
            (RTC_DATA, 1, _) => Verdict::RtcData { index: self.rtc_index },
            (RTC_INDEX | SMI_DATA, 1, _) | (SMI_COMMAND, 1, true) => Verdict::PassPort,
            (p, 4, true) if Some(p) == self.acpi.pm_timer => Verdict::PassPort,
            _ if !self.config.ports.iter().any(|r| r.width == size && whole(r, port)) => {
                self.denied(port, input)
            }
            (p, 1, false) if Some(p) == self.acpi.smi_command => Verdict::RaiseSmi { port, command: al },
            // A wider write would get a command past the gate.
            (.., false) if reached(SMI_COMMAND) || self.acpi.smi_command.is_some_and(reached) => {
                self.denied(port, input)
            }
            _ => Verdict::PassPort,
        }
    }

    fn denied(&self, port: u16, input: bool) -> Verdict {
        match self.config.denied_ports {
            Denied::Stop => Verdict::Stop(Reason::Port { port, input }),
            Denied::Ignore => Verdict::DenyPort,
        }
    }
}

/// Whether an access of the range's width at `port` stays in the range.
fn whole(range: &PortRange, port: u16) -> bool {
    let last = port.checked_add(u16::from(range.width).saturating_sub(1));
    range.ports.contains(&port) && last.is_some_and(|last| range.ports.contains(&last))
}

fn bump(counter: &mut u64) {
    *counter = counter.saturating_add(1);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn running() -> Sandbox {
        let mut s = Sandbox::new(
            &Config::parse(b"sandbox.budget-ms = 100").unwrap(),
            Ports { pm_timer: Some(0x608), smi_command: None },
        );
        s.start(1_000, Place::Sandbox).unwrap();
        s
    }

    fn port(port: u16, size: u8, input: bool) -> Exit {
        Exit::Port { port, size, input, string: false, next_rip: 0 }
    }

    #[test]
    fn one_call_after_the_other() {
        let mut s = running();
        assert_eq!(s.start(2_000, Place::Sandbox), Err(NotReady::Busy));
        assert_eq!(s.deadline_us(), Some(101_000));
        assert_eq!(s.exit(&Exit::Hypercall, true, 0, 50_000), Verdict::Return);
        assert_eq!((s.state(), s.deadline_us()), (State::Ready, None));
        assert_eq!(s.start(60_000, Place::Sandbox), Ok(()));
        assert_eq!((s.counters().calls, s.counters().longest_us), (2, 49_000));
    }

    #[test]
    fn the_budget_ends_a_call_and_the_sandbox_for_good() {
        let mut s = running();
        assert_eq!(s.exit(&Exit::Interrupt, false, 0, 101_000), Verdict::Resume);
        let reason = Reason::Budget { used_us: 100_001, limit_us: 100_000 };
        assert_eq!(s.exit(&Exit::Interrupt, false, 0, 101_001), Verdict::Stop(reason));
        assert_eq!(s.start(200_000, Place::Sandbox), Err(NotReady::Dead(reason)));
        assert_eq!(s.exit(&Exit::Cpuid, false, 0, 0), Verdict::Stop(reason));
        assert_eq!(reason.to_string(), "call took 100 ms, budget 100 ms");
        // Each call has a budget of its own, and a late return is a return.
        let mut s = running();
        assert_eq!(s.exit(&Exit::Hypercall, true, 0, 500_000), Verdict::Return);
        s.start(600_000, Place::Sandbox).unwrap();
        assert_eq!(s.exit(&Exit::Interrupt, false, 0, 650_000), Verdict::Resume);
    }

    #[test]
    fn the_short_way_to_the_clock_decides_as_the_long_one() {
        let (mut short, mut long) = (running(), running());
        for n in 1..=1000_u32 {
            let (input, al) = (n % 2 == 0, (n % 251) as u8);
            let verdict = long.exit(&port(RTC_INDEX, 1, input), false, al, 1_000);
            match short.rtc_index(input, al) {
                Some(RtcIndex::Read) => assert_eq!(verdict, Verdict::PassPort),
                Some(RtcIndex::Select(index)) => assert_eq!(verdict, Verdict::SelectRtc { index }),
                None => {
                    assert_eq!(n % JUDGED_SHORTLY, 0);
                    assert_eq!(short.exit(&port(RTC_INDEX, 1, input), false, al, 1_000), verdict);
                }
            }
            assert_eq!((short.exits(), short.counters()), (long.exits(), long.counters()));
            assert_eq!(short.rtc_index, long.rtc_index);
        }
    }

    #[test]
    fn nothing_ends_later_by_the_short_way_to_the_clock() {
        let ends = |s: &mut Sandbox, now_us| {
            (1..=JUDGED_SHORTLY).find_map(|_| match s.rtc_index(true, 0) {
                Some(_) => None,
                None => Some(s.exit(&port(RTC_INDEX, 1, true), false, 0, now_us)),
            })
        };
        let late = Reason::Budget { used_us: 100_001, limit_us: 100_000 };
        let mut s = running();
        assert_eq!(ends(&mut s, 101_001), Some(Verdict::Stop(late)));
        assert_eq!(s.rtc_index(false, 0), None, "it is dead");
        let mut s = running();
        s.exits = s.config.budget_exits;
        let limit = s.config.budget_exits;
        assert_eq!(ends(&mut s, 1_000), Some(Verdict::Stop(Reason::Exits { limit })));
        // What is not the sandbox's way is judged by whose it is.
        let mut s = Sandbox::new(&Config::default(), Ports::default());
        assert_eq!(s.rtc_index(true, 0), None, "no call runs");
        s.start(0, Place::Native).unwrap();
        assert_eq!(s.rtc_index(true, 0), None);
    }

    #[test]
    fn only_the_listed_ports_at_their_widths_are_reached() {
        let mut s = running();
        let open: [(u16, u8, bool); 5] =
            [(0x70, 1, true), (0xb2, 1, true), (0xb3, 1, true), (0xb3, 1, false), (0x608, 4, true)];
        for port_number in 0..=u16::MAX {
            for size in [1, 2, 4] {
                for input in [true, false] {
                    // Bit 7 of port 70h is not the clock's.
                    let al = if port_number == 0x70 { 0x8a } else { 0x5a };
                    let verdict = s.exit(&port(port_number, size, input), false, al, 1_000);
                    let expected = if open.contains(&(port_number, size, input)) {
                        Verdict::PassPort
                    } else if (port_number, size, input) == (0x70, 1, false) {
                        Verdict::SelectRtc { index: 0x0a }
                    } else if (port_number, size) == (0x71, 1) {
                        Verdict::RtcData { index: 0x0a }
                    } else if (port_number, size, input) == (0xb2, 1, false) {
                        Verdict::RaiseSmi { port: SMI_COMMAND, command: 0x5a }
                    } else {
                        Verdict::DenyPort
                    };
                    assert_eq!(verdict, expected, "{port_number:#x} {size} {input}");
                }
            }
        }
        assert_eq!((s.counters().smis, s.counters().last_denied_port), (1, Some(0xffff)));
        assert_eq!(s.counters().denied_ports, 65536 * 6 - 9);
        let mut s = Sandbox::new(&Config::default(), Ports::default());
        s.start(0, Place::Sandbox).unwrap();
        assert_eq!(s.exit(&port(0x608, 4, true), false, 0, 0), Verdict::DenyPort);
    }

    #[test]
    fn the_clock_is_written_and_the_memory_behind_it_is_read_alone() {
        let mut s = running();
        for index in 0..=0xffu8 {
            let selected = Verdict::SelectRtc { index: index & 0x7f };
            assert_eq!(s.exit(&port(0x70, 1, false), false, index, 1_000), selected);
            let data = Verdict::RtcData { index: index & 0x7f };
            assert_eq!(s.exit(&port(0x71, 1, true), false, 0, 1_000), data);
            let expected = match index & 0x7f {
                0..=0x0d | 0x32 => data,
                _ => Verdict::DenyPort,
            };
            assert_eq!(s.exit(&port(0x71, 1, false), false, 0, 1_000), expected, "{index:#x}");
        }
    }

    #[test]
    fn the_configuration_opens_ports_whole() {
        let config = Config::parse(b"sandbox.port.0x400-0x405 = dword\nsandbox.denied-ports = stop").unwrap();
        let mut s = Sandbox::new(&config, Ports::default());
        s.start(0, Place::Sandbox).unwrap();
        assert_eq!(s.exit(&port(0x402, 4, true), false, 0, 0), Verdict::PassPort);
        assert_eq!(s.exit(&port(0xb2, 1, true), false, 0, 0), Verdict::PassPort);
        let reason = Reason::Port { port: 0x403, input: true };
        assert_eq!(s.exit(&port(0x403, 4, true), false, 0, 0), Verdict::Stop(reason));
        assert_eq!(reason.to_string(), "tried to read port 0x403");
    }

    #[test]
    fn no_write_to_an_smi_command_port_passes_unjudged() {
        let listed =
            b"sandbox.port.0x1480 = byte\nsandbox.port.0x1480-0x1483 = dword\nsandbox.port.0xb0-0xb3 = dword";
        let other = Ports { pm_timer: None, smi_command: Some(0x1480) };
        for (config, acpi, at, size, expected) in [
            (&b""[..], other, 0x1480, 1, Verdict::DenyPort),
            (listed, other, 0x1480, 1, Verdict::RaiseSmi { port: 0x1480, command: 9 }),
            (listed, other, 0x1480, 4, Verdict::DenyPort),
            (listed, other, 0xb0, 4, Verdict::DenyPort),
            (listed, Ports::default(), 0x1480, 1, Verdict::PassPort),
            (listed, Ports::default(), 0xb0, 4, Verdict::DenyPort),
        ] {
            let mut s = Sandbox::new(&Config::parse(config).unwrap(), acpi);
            s.start(0, Place::Sandbox).unwrap();
            assert_eq!(s.exit(&port(at, size, false), false, 9, 0), expected, "{at:#x} {size}");
        }
        let mut s = Sandbox::new(&Config::parse(listed).unwrap(), other);
        s.start(0, Place::Sandbox).unwrap();
        assert_eq!(s.exit(&port(0x1480, 1, true), false, 0, 0), Verdict::PassPort);
    }

    #[test]
    fn natively_a_port_that_exits_is_one_that_the_kernel_has_not_and_smis_are_asked_for_all_the_same() {
        const OTHER: Ports = Ports { pm_timer: None, smi_command: Some(0x1480) };
        let mut s = Sandbox::new(&Config::parse(b"sandbox.denied-ports = stop").unwrap(), OTHER);
        s.start(0, Place::Native).unwrap();
        assert_eq!(s.exit(&port(0xcf8, 4, false), false, 0, 0), Verdict::GuardedPort);
        assert_eq!(s.exit(&port(0x71, 1, false), false, 0, 0), Verdict::GuardedPort);
        assert_eq!(
            s.exit(&port(0xb2, 1, false), false, 0x5a, 0),
            Verdict::RaiseSmi { port: 0xb2, command: 0x5a }
        );
        assert_eq!(s.exit(&port(0xb2, 2, false), false, 0x5a, 0), Verdict::GuardedPort);
        let other = Verdict::RaiseSmi { port: 0x1480, command: 0x5a };
        assert_eq!(s.exit(&port(0x1480, 1, false), false, 0x5a, 0), other);
        // What is nobody's but the MLE's is not firmware's either.
        let hole = Exit::Memory { gpa: 0x1000, access: Access::Read, table_walk: false };
        assert!(matches!(s.exit(&hole, false, 0, 0), Verdict::Stop(Reason::Memory { .. })));
        assert_eq!((s.counters().calls, s.counters().native), (1, 1));
        let mut s = running();
        s.exit(&Exit::Hypercall, true, 0, 1_000);
        s.start(2_000, Place::Native).unwrap();
        s.exit(&Exit::Hypercall, true, 0, 2_000);
        s.start(3_000, Place::Sandbox).unwrap();
        assert_eq!(s.exit(&port(0xcf8, 4, false), false, 0, 3_000), Verdict::DenyPort);
    }

    #[test]
    fn a_call_has_a_budget_of_exits() {
        let mut s = Sandbox::new(&Config::parse(b"sandbox.budget-exits = 1000").unwrap(), Ports::default());
        s.start(0, Place::Sandbox).unwrap();
        for _ in 0..1000 {
            assert_eq!(s.exit(&Exit::Cpuid, false, 0, 0), Verdict::Cpuid);
        }
        let reason = Reason::Exits { limit: 1000 };
        assert_eq!(s.exit(&Exit::Cpuid, false, 0, 0), Verdict::Stop(reason));
        assert_eq!(reason.to_string(), "call made more than 1000 exits");
    }

    #[test]
    fn only_the_configuration_brings_the_dead_back() {
        let mut s = running();
        s.kill(Reason::Halt);
        assert!(!s.revive());
        assert_eq!(s.start(0, Place::Sandbox), Err(NotReady::Dead(Reason::Halt)));
        let config = Config::parse(b"sandbox.on-death = restart\nsandbox.denied-msrs = ignore").unwrap();
        let mut s = Sandbox::new(&config, Ports::default());
        s.kill(Reason::Halt);
        assert!(s.revive());
        assert_eq!((s.start(0, Place::Sandbox), s.counters().restarts), (Ok(()), 1));
        assert_eq!(s.exit(&Exit::MsrRead { index: 0x1b }, false, 0, 0), Verdict::DenyMsr);
        assert_eq!(s.counters().denied_msrs, 1);
    }

    #[test]
    fn whatever_it_may_not_do_kills_it_with_a_reason() {
        let string = Exit::Port { port: 0x71, size: 1, input: true, string: true, next_rip: 0 };
        let cases = [
            (Exit::Hypercall, "made a hypercall of its own"),
            (Exit::MsrRead { index: 0x1b }, "tried to read MSR 0x1b"),
            (Exit::MsrWrite { index: 0xc000_0080, value: 0 }, "tried to write MSR 0xc0000080"),
            (
                Exit::Memory { gpa: 0x1000, access: Access::Write, table_walk: false },
                "tried to write memory at 0x1000",
            ),
            (Exit::Halt, "halted"),
            (Exit::Shutdown, "triple fault"),
            (Exit::VirtualizationInstruction, "executed a forbidden instruction"),
            (Exit::InvalidateCaches, "executed a forbidden instruction"),
            (Exit::Exception { vector: 14, error: 2 }, "raised exception 14, error 0x2"),
            (Exit::InvalidState, "stopped with exit code 0xffffffffffffffff"),
            (Exit::Unexpected { code: 0x99, info1: 0, info2: 0 }, "stopped with exit code 0x99"),
            (string, "used a string instruction on port 0x71"),
        ];
        for (exit, text) in cases {
            let mut s = running();
            let Verdict::Stop(reason) = s.exit(&exit, false, 0, 1_000) else { panic!("{exit:?}") };
            assert_eq!(reason.to_string(), text);
            assert_eq!(s.state(), State::Dead(reason));
        }
    }

    #[test]
    fn it_can_be_given_up_from_outside() {
        let mut s = running();
        s.kill(Reason::NoEntry);
        assert_eq!(s.start(0, Place::Sandbox), Err(NotReady::Dead(Reason::NoEntry)));
        let mut idle = Sandbox::new(&Config::default(), Ports::default());
        assert!(matches!(idle.exit(&Exit::Cpuid, false, 0, 0), Verdict::Stop(_)));
    }

    proptest! {
        #[test]
        fn death_is_final(ports in proptest::collection::vec((any::<u16>(), 0u64..300_000), 1..40)) {
            let mut s = running();
            let mut dead = None;
            for (number, now) in ports {
                let verdict = s.exit(&port(number, 1, true), false, 0, now);
                if let Some(reason) = dead {
                    prop_assert_eq!(verdict, Verdict::Stop(reason));
                } else if let Verdict::Stop(reason) = verdict {
                    prop_assert!(now > 101_000);
                    dead = Some(reason);
                }
            }
        }
    }
}
