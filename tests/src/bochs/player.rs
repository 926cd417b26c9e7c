//! The board's TPM and TXT, and SENTER, played through the debugger.
//!
//! From the moment at which the firmware says what it starts: until then there is no TPM, so that the firmware does not spend a
//! minute of the emulator's on measuring.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use anyhow::{Result, ensure};

use super::debugger::{Debugger, Registers as Cpu, Stop};
use crate::senter::crb::{self, Crb};
use crate::senter::registers::{Effect, Registers};
use crate::senter::sinit::{self, Launch, Memory, Refusal, Senter};
use crate::senter::{Fault, Target, acm, layout as at, vt_d};
use crate::skinit;
use crate::stage::Stage;
use crate::swtpm::{Control, Link};

const GETSEC: [u8; 2] = [0x0f, 0x37];
/// Bytes before a GETSEC, at each of which the machine is to stop too. With several CPUs, Bochs 2.7's debugger lets each execute a few
/// instructions at a time and, where these end, forgets to look for a breakpoint at the next. After a stop it counts anew, so none is
/// forgotten that has one at the instruction before it.
const BEFORE: u64 = 3;
/// Page where the other CPUs start, and its number.
const START_PAGE: u64 = 0x8000;
const CR4_SMXE: u32 = 1 << 14;
const CR4_VMXE: u64 = 1 << 13;
/// GETSEC's leaves, in EAX.
mod leaf {
    pub const CAPABILITIES: u32 = 0;
    pub const SENTER: u32 = 4;
    pub const SEXIT: u32 = 5;
    pub const PARAMETERS: u32 = 6;
    pub const SMCTRL: u32 = 7;
    pub const WAKEUP: u32 = 8;
}
/// A chipset with TXT is there; ENTERACCS, EXITAC, SENTER, SEXIT, PARAMETERS, SMCTRL, WAKEUP.
const CAPABILITIES: u64 = 0x1fd;

/// Folders in the run's folder with each CPU's state that [`Player::repair`] sets at its first exit, and at its second.
const REPAIRS: [&str; 2] = ["first-exit", "second-exit"];
/// What Bochs has masked in VMX root operation with EFLAGS.IF clear: INIT, and four kinds of interrupts; neither NMI nor SMI.
const EVENT_MASK: &str = "event_mask = 0xe44";

/// Writes what the player has Bochs read, into the run's folder.
pub fn write_states(dir: &Path, cpus: u32) -> Result<()> {
    let states = ["pending_event = 0x0\n  ", ""];
    for (folder, state) in REPAIRS.iter().map(|folder| dir.join(folder)).zip(states) {
        fs::create_dir(&folder)?;
        for cpu in 1..cpus {
            fs::write(
                folder.join(format!("cpu{cpu}")),
                format!("cpu{cpu} = {{\n  {state}{EVENT_MASK}\n}}\n"),
            )?;
        }
    }
    Ok(())
}

/// What the player has seen.
#[derive(Clone, Default)]
pub struct State {
    /// How far the launch has come.
    pub stage: Option<Stage>,
    /// The launch, once there was one.
    pub launch: Option<Launch>,
    /// Why SINIT refused it.
    pub refusal: Option<Refusal>,
    /// The TXT.ERRORCODE with which the platform was reset.
    pub reset: Option<u32>,
    /// The MLE's SEXIT, once there was one: whether TXT.E2STS has SECRETS set then.
    pub exited: Option<bool>,
    /// Why the player had to give up.
    pub failure: Option<String>,
}

/// The player's state, for those who watch.
#[derive(Clone, Default)]
pub struct Watch(Arc<Mutex<State>>);

impl Watch {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// As it is now.
    pub fn state(&self) -> State {
        self.lock().clone()
    }

    pub(super) fn fail(&self, why: String) {
        self.lock().failure = Some(why);
    }
}

impl Target for Debugger {
    fn read(&mut self, at: u64, length: usize) -> Result<Vec<u8>> {
        Debugger::read(self, at, length)
    }

    fn write(&mut self, at: u64, bytes: &[u8]) -> Result<()> {
        Debugger::write(self, at, bytes)
    }
}

/// What the player needs to know of its machine.
pub struct Part {
    /// The TPM's control channel.
    pub control: Control,
    /// Its commands.
    pub chip: Link,
    /// Its active banks.
    pub banks: String,
    /// Memory of the machine.
    pub memory: Memory,
    /// CPUs.
    pub cpus: u32,
    /// Whether they show SMX. Where they do not, CR4.SMXE cannot be set either, and GETSEC is \#UD when no breakpoint stops it.
    pub smx: bool,
    /// Whether what the firmware starts may execute GETSEC. A kernel that it starts itself does not, and has the bytes more often
    /// than there are breakpoints.
    pub launches: bool,
    /// What goes wrong.
    pub fault: Option<Fault>,
    /// Where to say what was done.
    pub log: File,
}

/// Plays.
pub struct Player {
    part: Part,
    crb: Crb,
    registers: Option<Registers>,
    /// Breakpoints: number and address.
    points: Vec<(u32, u64)>,
    /// What the other CPUs' start page held.
    saved: Option<Vec<u8>>,
    /// For each CPU how often it has left its guest, as far as that is watched.
    exits: Vec<usize>,
    since: Instant,
    watch: Watch,
}

impl Player {
    /// Waits for the firmware's word.
    pub fn new(debugger: &mut Debugger, part: Part, watch: Watch) -> Result<Self> {
        debugger.watch_writes(at::MAILBOX, 8)?;
        let (crb, since, exits) = (Crb::default(), Instant::now(), vec![0; part.cpus as usize]);
        Ok(Self { part, crb, registers: None, points: Vec::new(), saved: None, exits, since, watch })
    }

    fn say(&mut self, text: &str) {
        // The log is a convenience; a full disk must not change the machine's course.
        let _ = writeln!(self.part.log, "{:7.2} s  {text}", self.since.elapsed().as_secs_f64());
    }

    /// The machine stands still for `stop`; whether it goes on.
    pub fn stopped(&mut self, machine: &mut Debugger, stop: &Stop) -> Result<bool> {
        match *stop {
            Stop::Write { at: at::MAILBOX, .. } => self.begin(machine)?,
            Stop::Write { at, .. } if at & !0xffff == crb::BASE => {
                self.crb.written(machine, &mut self.part.chip, at)?;
                if at == crb::BASE + crb::LOC_CTRL {
                    self.look_for_launch_page(machine)?;
                }
            }
            Stop::Write { at, .. } if at & !0xfff == vt_d::BASE => vt_d::written(machine, at)?,
            Stop::Write { at, .. } => {
                let Some(registers) = &mut self.registers else { return Ok(true) };
                if registers.written(machine, &mut self.crb, at)? == Effect::Reset {
                    let code = registers.errorcode();
                    self.say(&format!("TXT.CMD.RESET with TXT.ERRORCODE {code:#x}"));
                    self.watch.lock().reset = Some(code);
                    return Ok(false);
                }
            }
            Stop::VmExit { cpu } => self.repair(machine, cpu)?,
            Stop::Breakpoint { cpu } => {
                machine.select(cpu)?;
                let registers = machine.registers()?;
                return self.breakpoint(machine, cpu, &registers);
            }
            _ => {}
        }
        Ok(true)
    }

    /// The firmware starts something: the board's TPM and TXT are there from now on.
    fn begin(&mut self, machine: &mut Debugger) -> Result<()> {
        let (base, size) = (machine.read64(at::MAILBOX)?, machine.read64(at::MAILBOX + 8)?);
        self.say(&format!("firmware starts {size:#x} bytes at {base:#x}"));
        for locality in 0..crb::LOCALITIES {
            self.crb.open(machine, locality, locality == 0)?;
            machine.watch_writes(crb::BASE + 0x1000 * locality, crb::REGISTERS)?;
        }
        self.registers = Some(Registers::new(machine)?);
        for space in [at::PRIVATE, at::PUBLIC] {
            machine.watch_writes(space, at::REGISTERS_END)?;
        }
        vt_d::begin(machine)?;
        machine.watch_writes(vt_d::BASE, vt_d::SIZE)?;
        if self.part.launches { self.arm(machine, base, size as usize) } else { Ok(()) }
    }

    /// Sets breakpoints on all that may be GETSEC in memory.
    fn arm(&mut self, machine: &mut Debugger, base: u64, size: usize) -> Result<()> {
        let bytes = machine.read(base, size)?;
        let found = bytes.windows(2).enumerate().filter(|(_, w)| *w == GETSEC);
        for address in found.map(|(offset, _)| base + offset as u64).collect::<Vec<_>>() {
            for address in address - BEFORE..=address {
                let number = machine.break_at(address)?;
                self.points.push((number, address));
            }
            self.say(&format!("GETSEC may be at {address:#x}"));
        }
        Ok(())
    }

    /// The loader executes SENTER in its launch page, which it fills before it gives up locality 0. It jumps there, so there is no
    /// instruction before it at which to stop; behind it there is one that nothing else reaches (see `breakpoint`).
    fn look_for_launch_page(&mut self, machine: &mut Debugger) -> Result<()> {
        if self.watch.lock().stage.is_some() {
            return Ok(());
        }
        for page in skinit::CANDIDATES {
            let address = page * 0x1000 + skinit::SKINIT_OFFSET;
            if !self.points.iter().any(|&(_, at)| at == address) && machine.read(address, 2)? == GETSEC {
                for address in [address, address + GETSEC.len() as u64] {
                    let number = machine.break_at(address)?;
                    self.points.push((number, address));
                }
                self.say(&format!("GETSEC written to {address:#x}"));
            }
        }
        Ok(())
    }

    fn disarm(&mut self, machine: &mut Debugger) -> Result<()> {
        self.points.drain(..).try_for_each(|(number, _)| machine.remove(number))
    }

    fn breakpoint(&mut self, machine: &mut Debugger, cpu: u32, registers: &Cpu) -> Result<bool> {
        let rip = registers.get("rip")?;
        // Loader, SINIT and MLE have memory mapped to itself; a program of the guest's may have its own at such an address.
        if !machine.maps_to_itself(rip)? {
            return Ok(true);
        }
        let launch = self.watch.lock().launch.clone();
        if let Some(launch) = launch.filter(|launch| launch.entry == rip && self.saved.is_some()) {
            self.entered(machine, &launch)?;
            return Ok(true);
        }
        // Bochs' own GETSEC changes nothing. Behind the launch page's, its breakpoint was forgotten: it is carried out now.
        let before = rip - GETSEC.len() as u64;
        let behind = before & 0xfff == skinit::SKINIT_OFFSET && machine.read(before, 2)? == GETSEC;
        let rip = if behind { before } else { rip };
        let is = machine.read(rip, GETSEC.len() + BEFORE as usize)?;
        if !is.starts_with(&GETSEC) && is.windows(2).any(|bytes| bytes == GETSEC) {
            return Ok(true);
        }
        ensure!(is.starts_with(&GETSEC), "stopped at {rip:#x}, where there is no GETSEC");
        let leaf = registers.get("rax")? as u32;
        let mut answer: &[(&str, u64)] = &[];
        match leaf {
            leaf::CAPABILITIES => answer = &[("rax", CAPABILITIES)],
            leaf::PARAMETERS => answer = &[("rax", 0), ("rbx", 0), ("rcx", 0)],
            leaf::SENTER => return self.senter(machine, cpu, registers),
            leaf::SMCTRL => {}
            leaf::WAKEUP => machine.write32(at::SINIT_BASE + acm::WAKEUP, 1)?,
            leaf::SEXIT => self.exit(machine, cpu)?,
            other => anyhow::bail!("GETSEC[{other}] at {rip:#x}: #GP"),
        }
        for &(name, value) in answer {
            machine.set_register(name, value)?;
        }
        machine.set_register("rip", rip + GETSEC.len() as u64)?;
        self.say(&format!("GETSEC[{leaf}] at {rip:#x} on CPU {cpu}"));
        Ok(true)
    }

    fn senter(&mut self, machine: &mut Debugger, cpu: u32, registers: &Cpu) -> Result<bool> {
        let senter =
            Senter { ebx: registers.get("rbx")?, ecx: registers.get("rcx")?, edx: registers.get("rdx")? };
        self.say(&format!("GETSEC[SENTER] on CPU {cpu}: {senter:x?}"));
        ensure!(cpu == 0, "GETSEC[SENTER] on CPU {cpu}, which is not the boot processor: #GP");
        self.watch.lock().stage = Some(Stage::Skinit);
        if let Some(fault) = self.part.fault {
            sinit::spoil(machine, fault)?;
        }
        let Part { control, chip, memory, banks, .. } = &mut self.part;
        let launch = match sinit::launch(machine, control, chip, memory, banks, senter)? {
            Ok(launch) => launch,
            Err(refusal) => {
                let Refusal { code, why } = &refusal;
                self.say(&format!("SINIT refuses: {why}; TXT.ERRORCODE {code:#x}"));
                let mut state = self.watch.lock();
                state.reset = Some(refusal.code);
                state.refusal = Some(refusal);
                return Ok(false);
            }
        };
        for (bank, [code, authorities]) in &launch.pcrs {
            let (code, authorities) = (hex::encode(code), hex::encode(authorities));
            self.say(&format!(
                "measured {:#x} bytes, {bank}: PCR 17 {code}, 18 {authorities}",
                launch.image.len()
            ));
        }
        if let Some(registers) = &mut self.registers {
            registers.renew(machine)?;
        }
        self.crb.open(machine, 2, true)?;
        self.disarm(machine)?;
        let parameters = acm::Parameters {
            cr4: if self.part.smx { CR4_SMXE } else { 0 },
            others: self.part.cpus - 1,
            start_page: (START_PAGE >> 12) as u8,
            entry: launch.entry as u32,
            page_tables: launch.page_tables as u32,
            never_join: self.part.fault == Some(Fault::RlpMissing),
        };
        let start = acm::start_code(at::SINIT_BASE);
        self.saved = Some(machine.read(START_PAGE, start.len())?);
        machine.write(START_PAGE, &start)?;
        machine.write(at::SINIT_BASE + acm::PARAMETERS, &parameters.bytes())?;
        machine.set_register("rip", at::SINIT_BASE + acm::CODE)?;
        let number = machine.break_at(launch.entry)?;
        self.points.push((number, launch.entry));
        if self.part.fault == Some(Fault::DmarChanged) {
            let elsewhere = sinit::change_dmar(machine)?;
            self.say(&format!("ACPI's DMAR has the unit at {elsewhere:#x} now"));
        }
        self.say(&format!("SINIT runs, to enter the MLE at {:#x}", launch.entry));
        self.watch.lock().launch = Some(launch);
        Ok(true)
    }

    /// The MLE's first instruction.
    fn entered(&mut self, machine: &mut Debugger, launch: &Launch) -> Result<()> {
        self.disarm(machine)?;
        if let Some(saved) = self.saved.take() {
            machine.write(START_PAGE, &saved)?;
        }
        let intact = machine.read(launch.base, launch.image.len())? == launch.image;
        self.say(&format!("MLE entered, {}", if intact { "unchanged" } else { "CHANGED" }));
        self.watch.lock().stage = Some(Stage::Mle);
        for cpu in 1..self.part.cpus {
            machine.watch_exits(cpu, true)?;
        }
        self.arm(machine, launch.base, launch.image.len())
    }

    /// Repairs two defects of Bochs 2.7. An INIT that came in VMX non-root operation stays pending after its exit, until a reset; and
    /// NMI and SMI, which are masked while a guest waits for its Startup IPI, stay so after the exit by that IPI.
    ///
    /// The debugger does not tell of that exit, which Bochs carries out on the CPU that sent the IPI. So the first exit told of a CPU
    /// that waits is by INIT, where nothing else is pending, after which it waits on and the second is in the guest; or already the
    /// first is in the guest.
    fn repair(&mut self, machine: &mut Debugger, cpu: u32) -> Result<()> {
        let Some(exits) = self.exits.get_mut(cpu as usize) else { return Ok(()) };
        let Some(folder) = REPAIRS.get(*exits) else { return Ok(()) };
        *exits += 1;
        let last = *exits == REPAIRS.len();
        machine.restore_cpu(cpu, folder)?;
        if last {
            machine.watch_exits(cpu, false)?;
        }
        self.say(&format!("CPU {cpu} has left its guest: {folder}"));
        Ok(())
    }

    /// A real one waits without a bound for CPUs that wait for a Startup IPI. Here the MLE's code, outside of VMX operation, is where
    /// all must be.
    ///
    /// Spec: \[SDM2\] "GETSEC\[SEXIT\]".
    fn exit(&mut self, machine: &mut Debugger, cpu: u32) -> Result<()> {
        ensure!(cpu == 0, "GETSEC[SEXIT] on CPU {cpu}, which is not the boot processor: #GP");
        let launch = self.watch.lock().launch.clone();
        let (base, size) = launch.map_or((0, 0), |launch| (launch.base, launch.image.len() as u64));
        for cpu in (0..self.part.cpus).rev() {
            machine.select(cpu)?;
            let (cr4, rip) = (machine.cr4()?, machine.registers()?.get("rip")?);
            ensure!(cr4 & CR4_VMXE == 0, "GETSEC[SEXIT] with CPU {cpu} in VMX operation, CR4 {cr4:#x}");
            ensure!(
                (base..base + size).contains(&rip),
                "GETSEC[SEXIT] with CPU {cpu} at {rip:#x}, the MLE has {size:#x} bytes at {base:#x}"
            );
            self.say(&format!("at GETSEC[SEXIT]: CPU {cpu} at {rip:#x}, CR4 {cr4:#x}"));
        }
        if let Some(registers) = &mut self.registers {
            registers.set(machine, at::STS, at::STS_SEXIT_DONE.into())?;
        }
        self.watch.lock().exited = self.registers.as_ref().map(Registers::secrets);
        Ok(())
    }
}
