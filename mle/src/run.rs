//! The run loop of a guest CPU.

use core::fmt::{self, Write};
use core::sync::atomic::{AtomicU64, Ordering};

use firmware::exposure::{self as log_format, Decision, Kind, Record};
use hv::failure::MleError;
use hv::io::{Clock, Mmio};
use hv::vcpu::{Access, Exit};
use spin::Mutex;

use crate::apic::{Command, ICR_HIGH, Xapic};
use crate::backend::Vcpu;
use crate::cpu::{self, Cpu};
use crate::exposure::{Settled, told};
use crate::guest::exits::{self, Next};
use crate::guest::windows::{Collected, Registers, Windows};
use crate::guest::{ends, ports as guarded};
use crate::metal::{PhysWindow, Ports, TscClock};
use crate::{dma, exposure, fatal, senter, services, smi, smp};

/// Exits of each CPU, by kind.
static EXITS: [[AtomicU64; Exit::KINDS]; smp::MAX_CPUS] =
    [const { [const { AtomicU64::new(0) }; Exit::KINDS] }; smp::MAX_CPUS];

fn count(index: usize, exit: &Exit) {
    if let Some(counter) = EXITS.get(index).and_then(|c| c.get(exit.kind())) {
        counter.fetch_add(1, Ordering::Relaxed);
    }
}

/// Writes a line for each CPU that had exits: the total, and each kind that there was.
pub fn write_counts(out: &mut impl Write) {
    for (index, counters) in EXITS.iter().enumerate() {
        let value = |c: &AtomicU64| c.load(Ordering::Relaxed);
        let total = counters.iter().map(value).fold(0, u64::wrapping_add);
        if total == 0 {
            continue;
        }
        // A full buffer ends the report early.
        let _ = write!(out, "cpu{index}: total {total}");
        for (kind, count) in counters.iter().map(value).enumerate().filter(|(_, n)| *n != 0) {
            let _ = write!(out, ", {} {count}", Exit::kind_name(kind));
        }
        let _ = writeln!(out);
    }
}

/// An access of the guest to memory that is not its own.
#[derive(Clone, Copy)]
struct Refusal {
    cpu: usize,
    gpa: u64,
    access: Access,
    rip: u64,
}

/// The last refusals. [`told::GUEST_MEMORY`] counts all.
static REFUSALS: Mutex<Refusals> = Mutex::new(Refusals { last: heapless::HistoryBuf::new() });

struct Refusals {
    last: heapless::HistoryBuf<Refusal, 8>,
}

impl Refusal {
    /// For the exposure log.
    fn on_record(&self, id: u32, clock: &TscClock) -> Record {
        let how = match self.access {
            Access::Read => log_format::Access::READ,
            Access::Write => log_format::Access::WRITE,
            Access::Fetch => log_format::Access::EXECUTE,
        };
        let access = Some(log_format::Access { source: id, address: self.gpa, how });
        let record = Record::new(Kind::DENIED_MEMORY, id, exposure::now_us(clock));
        Record { access, decision: Decision::DENIED, ..record }
    }
}

impl Refusals {
    /// Takes note of a refusal. True if it is not like one of the last: a guest that goes on trying the same page is counted.
    fn is_new(&mut self, refusal: Refusal) -> bool {
        let sort = |r: &Refusal| (r.gpa >> 12, r.access);
        let again = self.last.iter().any(|r| sort(r) == sort(&refusal));
        self.last.write(refusal);
        !again
    }
}

/// Writes how many accesses were refused, and the last ones.
pub fn write_refusals(out: &mut impl Write) {
    // A full buffer ends the report early.
    let _ = writeln!(out, "refused accesses: {}", told::GUEST_MEMORY);
    for r in REFUSALS.lock().last.oldest_ordered() {
        let _ = writeln!(out, "  cpu{} {:?} of {:#x} at rip {:#x}", r.cpu, r.access, r.gpa, r.rip);
    }
}

/// Ends the launch for the guest, on whichever CPU that shows.
fn end(
    cpu: &mut Cpu,
    local: &Xapic<PhysWindow>,
    clock: &TscClock,
    ports: Ports,
    index: usize,
    why: fmt::Arguments<'_>,
) -> ! {
    fatal::end_by_guest(ports, clock, why, || smp::meet(index, cpu, local, clock))
}

fn see_smis(index: usize, cpu: &Cpu, local: &Xapic<PhysWindow>, clock: &TscClock) {
    if let Some(count) = cpu.smi_count() {
        smi::count::see(index, count, || local.id(), clock);
    }
}

/// Runs the guest on this CPU until it sends INIT to it or stops it; on the first CPU, until the launch has to be done again for a firmware call.
pub fn guest(
    cpu: &mut Cpu,
    vcpu: &mut Vcpu<'_>,
    windows: &mut Windows,
    local: &Xapic<PhysWindow>,
    clock: &TscClock,
    ports: Ports,
    index: usize,
) {
    let mut branch_trap = false;
    let mut signs = smp::Signs::default();
    see_smis(index, cpu, local, clock);
    loop {
        if smp::before_run(index, cpu, vcpu, windows, local, clock) {
            return;
        }
        let exit = cpu.run(vcpu);
        see_smis(index, cpu, local, clock);
        count(index, &exit); // before it is handled: the exit that ends us is in the statistics
        if let Some(step) = vcpu.end_step(exit) {
            cpu.restore_branch_trap(branch_trap);
            let collected = windows.take_back(step.executed);
            vcpu.flush_nested();
            match collected {
                Some(Collected::Command(low)) => {
                    let destination = local.0.read32(ICR_HIGH) >> 24;
                    smp::command(Command { low, destination }, cpu.redirects_init(), local, clock);
                }
                Some(Collected::Unit { offset, word }) => {
                    dma::shown::write((offset, word), local.id(), clock)
                }
                None => {}
            }
            if step.answered {
                continue;
            }
        }
        // These two come again, and are what a guest has of exits while firmware is called: its interrupts do not wait for a look
        // or a measurement.
        let comes_again = matches!(exit, Exit::Cpuid | Exit::Hypercall);
        let works = || smi::look_on(|| local.id(), clock) || exposure::settle_on(clock) == Settled::Working;
        if comes_again && works() {
            continue;
        }
        match exits::answer(&mut **vcpu, exit, cpu, |page| windows.watched(page)) {
            Next::Resume => {}
            Next::Refused { gpa, access } => {
                let refusal = Refusal { cpu: index, gpa, access, rip: vcpu.rip() };
                if REFUSALS.lock().is_new(refusal) {
                    told::GUEST_MEMORY.record(refusal.on_record(local.id(), clock));
                } else {
                    told::GUEST_MEMORY.pass_over();
                }
            }
            Next::Registers { of: Registers::Apic, .. } if smp::open(index, windows) => {}
            Next::Registers { of, offset, access } => {
                match of {
                    Registers::Apic => windows.lend_apic(offset, access),
                    Registers::Unit => windows.lend_unit(offset, access, dma::shown::read(offset)),
                }
                branch_trap = cpu.hold_branch_trap();
                vcpu.begin_step();
            }
            Next::Nmi => cpu.let_pending_in(),
            Next::Smi => {
                let since = clock.now_us();
                cpu.let_pending_in();
                smi::arrived(index, local.id(), clock.now_us().saturating_sub(since), clock);
            }
            // It has gone with the exit. The first CPU's would reset the machine: dropped.
            Next::Init if cpu.sees_startup() => {
                if index != 0 {
                    // At once: the Startup IPI is lost unless the CPU waits for it.
                    vcpu.wait_for_startup();
                }
                continue;
            }
            Next::Startup { vector } => {
                vcpu.start_at(vector);
                continue;
            }
            Next::Init if cpu.redirects_init() => cpu.let_pending_in(),
            // It cannot be dropped, and the Startup IPI behind it must not start the CPU past the MLE.
            Next::Init => end(cpu, local, clock, ports, index, format_args!("INIT to CPU {index}")),
            Next::Firmware => match services::call(cpu, vcpu, local, ports) {
                services::Next::Resume => {}
                services::Next::Relaunch => smp::want(index, cpu, local, clock),
                // A shutdown is a reset too: what powers this machine off is known to ACPI, not to us.
                services::Next::Reset(kind) => {
                    end(cpu, local, clock, ports, index, format_args!("ResetSystem, {kind:?}"))
                }
            },
            Next::Port { .. } => {
                let id = local.id();
                guarded::guarded_access(vcpu, exit, id, &ports, clock, |port, size, value| {
                    if ends::is_end(port, size, value) {
                        services::end_of_guest(cpu, local, ports);
                        if senter::launched() {
                            ends::keep(port, size, value);
                            end(cpu, local, clock, ports, index, format_args!("OUT to port {port:#x}"));
                        }
                    }
                    guarded::write(&ports, port, size, value, |at, command| {
                        smi::of_guest((at, command), id, cpu, &ports, clock)
                    });
                });
            }
            // Whatever comes now, the guest's kernel does not expect to run on.
            Next::Halt => return,
            Next::Shutdown => {
                services::end_of_guest(cpu, local, ports);
                let at = cpu::describe(vcpu);
                end(cpu, local, clock, ports, index, format_args!("triple fault on CPU {index}: {at}"))
            }
            Next::Fatal(exit) => {
                let why = format_args!("guest exit: {exit}; {}", cpu::describe(vcpu));
                fatal::stop(MleError::GuestExit, 0, why);
            }
        }
        if !cpu.sees_startup() && matches!(exit, Exit::Cpuid | Exit::InvalidateCaches) && vcpu.cpl() == 0 {
            match signs.of(vcpu.rip(), local.is_enabled()) {
                smp::Sign::Off if smp::look(index, local) => {
                    smp::kick(index, cpu.redirects_init(), local, clock);
                }
                smp::Sign::Replaced => smp::kick_replaced(index, cpu.redirects_init(), local, clock),
                smp::Sign::Off | smp::Sign::None => {}
            }
        }
        dma::settle(|| local.id(), clock);
        if !comes_again {
            // What waits for the guest's own use of the TPM is tried again at the next exit.
            exposure::settle(clock);
            smi::look_if_owed(|| local.id(), clock);
        }
    }
}
