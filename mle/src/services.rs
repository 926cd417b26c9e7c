//! EFI runtime services for the guest: the call is copied in, the firmware runs in its sandbox, results are copied out.
//!
//! A call is preempted when an interrupt is pending and the guest would take it: the guest goes on at the same hypercall
//! instruction, takes its interrupt there, and its next attempt continues the call. So the guest never waits for its
//! interrupts, and the time budget of a call that loops is enforced.

use core::fmt::Write;

use firmware::call::{
    Args, Begin, CALL_BUFFER_SIZE, CallBuffer, Gate, OwnVariable, OwnVariables, Pending, ResetKind, Status,
};
use firmware::sandbox::{Reason, Sandbox, Verdict};
use firmware::service::{COUNT, Service};
use firmware::tables::{HYPERCALL_LENGTH, service_at};
use heapless::String;
use hv::addr::{PAGE_SIZE, PhysRange};
use hv::io::{Clock, PhysMem, PortIo};
use hv::radix::{Error, TablePool};
use hv::space::AddressSpace;
use hv::vcpu::{Access, Exception, Exit, Vcpu};
use log::warn;
use spin::Mutex;
use svm::vcpu::SvmVcpu;
use zerocopy::IntoBytes;

use crate::cpu::{Cpu, FpuArea};
use crate::guest::cpuid;
use crate::guest::exits::TWO_BYTES;
use crate::guest::walk::GuestView;
use crate::metal::{Identity, Ports, TscClock};
use crate::{paging, run};

/// Memory that the sandbox works in: page tables, GDT, stack, call buffer.
pub const SANDBOX_SIZE: u64 = TABLES_SIZE + PAGE_SIZE + STACK_SIZE + CALL_BUFFER_SIZE as u64;
/// Tables for 4 GiB in 2 MiB pages.
const TABLES_SIZE: u64 = 6 * PAGE_SIZE;
/// The firmware's stack. Spec: \[UEFI\] "x64 Platforms", 128 KiB or more.
const STACK_SIZE: u64 = 32 * PAGE_SIZE;

/// What a sandbox is made of.
pub struct Parts {
    /// The way of calls.
    pub gate: Gate,
    /// What is done about its exits.
    pub state: Sandbox,
    /// Its virtual CPU.
    pub vcpu: SvmVcpu<'static>,
    /// Entry points in the firmware's runtime code.
    pub entries: [Option<u64>; COUNT],
    /// Its memory, [`SANDBOX_SIZE`] bytes.
    pub area: PhysRange,
    /// The MLE's own call buffer.
    pub buffer: &'static mut CallBuffer,
    /// Where the guest's FPU state waits while firmware runs.
    pub fpu: FpuArea,
    /// An address that the sandbox cannot reach: firmware returns to it.
    pub return_to: u64,
    /// Who may reach what.
    pub space: AddressSpace,
    /// Physical memory.
    pub mem: Identity,
    /// Time.
    pub clock: TscClock,
    /// The DRTM event log.
    pub log: &'static [u8],
    /// What is in force, for the guest to read.
    pub status: String<1024>,
}

/// The services, one call at a time.
pub struct Services {
    parts: Parts,
    root: u64,
    under_way: Option<UnderWay>,
}

/// A preempted call.
struct UnderWay {
    pending: Pending,
    /// The CPU whose guest made it, by its APIC ID.
    owner: u32,
}

static SERVICES: Mutex<Option<Services>> = Mutex::new(None);

/// What the run loop does after a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Run the guest on.
    Resume,
    /// Reset the machine.
    Reset(ResetKind),
}

/// Sets the services up. `pool` gives pages of the area's first part.
pub fn install<P: TablePool>(parts: Parts, pool: impl FnOnce(PhysRange) -> P) -> Result<(), Error> {
    let start = parts.area.start();
    let mut root = 0;
    if let Some(tables) = PhysRange::new(start, TABLES_SIZE) {
        // The tables lie in memory that the sandbox can write: they are a convenience of its address space. What it
        // can reach is decided by the nested tables alone.
        let mut pool = pool(tables);
        root = paging::open_identity(&mut pool)?;
    }
    *SERVICES.lock() = Some(Services { parts, root, under_way: None });
    Ok(())
}

/// Takes a hypercall of the guest that was called from one of its thunks.
pub fn call(cpu: &mut Cpu, vcpu: &mut SvmVcpu<'_>, apic_id: u32, ports: Ports) -> Next {
    let Some(mut services) = SERVICES.try_lock() else {
        // Another CPU's call is running: the guest tries again, and an SMI that the other needs gets through here.
        cpu.let_pending_in();
        return Next::Resume;
    };
    match services.as_mut() {
        Some(services) => services.call(cpu, vcpu, apic_id, ports),
        None => {
            vcpu.inject(Exception::InvalidOpcode);
            Next::Resume
        }
    }
}

/// Contents of Cordon's own variables.
struct Own<'a> {
    log: &'a [u8],
    status: &'a str,
    sandbox: &'a Sandbox,
}

impl OwnVariables for Own<'_> {
    fn fill(&self, which: OwnVariable, out: &mut [u8]) -> usize {
        let mut text = String::<4096>::new();
        let content = match which {
            OwnVariable::DrtmLog => self.log,
            OwnVariable::Status => {
                let c = self.sandbox.counters();
                // 4096 bytes hold all of it.
                let _ = writeln!(text, "{}sandbox: {:?}", self.status, self.sandbox.state());
                let _ = writeln!(text, "calls: {}, exits {}, SMIs {}", c.calls, c.exits, c.smis);
                let _ = writeln!(text, "denied ports: {}, longest call {} us", c.denied_ports, c.longest_us);
                run::write_refusals(&mut text);
                text.as_bytes()
            }
            OwnVariable::Exits => {
                run::write_counts(&mut text);
                text.as_bytes()
            }
        };
        let len = content.len().min(out.len());
        if let (Some(to), Some(from)) = (out.get_mut(..len), content.get(..len)) {
            to.copy_from_slice(from);
        }
        len
    }
}

impl Services {
    fn call(&mut self, cpu: &mut Cpu, vcpu: &mut SvmVcpu<'_>, apic_id: u32, ports: Ports) -> Next {
        let Some(service) = self.called(vcpu) else {
            // Not one of ours: to software that is not on the thunk page there is no hypervisor to call.
            vcpu.inject(Exception::InvalidOpcode);
            return Next::Resume;
        };
        let pending = match self.under_way.take() {
            Some(call) if call.owner == apic_id && call.pending.service() == service => call.pending,
            Some(call) => {
                // The caller of that one is gone (kexec, a crash): the firmware is in the middle of something.
                if self.parts.state.deadline_us().is_some_and(|d| self.parts.clock.now_us() < d) {
                    self.under_way = Some(call);
                    cpu.let_pending_in();
                    return Next::Resume;
                }
                let limit_us = 0;
                self.parts.state.kill(Reason::Budget { used_us: limit_us, limit_us });
                return Next::Resume;
            }
            None => match self.begin(service, vcpu) {
                Ok(pending) => pending,
                Err(next) => return next,
            },
        };
        cpu.swap_fpu(&mut self.parts.fpu);
        let end = self.run(cpu, vcpu, ports);
        cpu.swap_fpu(&mut self.parts.fpu);
        let parts = &mut self.parts;
        let view = GuestView { control: vcpu.control(), space: &parts.space, mem: &parts.mem };
        let outcome = match end {
            End::Preempted => {
                self.under_way = Some(UnderWay { pending, owner: apic_id });
                return Next::Resume;
            }
            End::Returned => {
                copy_buffer(parts.area, parts.buffer, &parts.mem, &pending, Direction::FromSandbox);
                let rax = parts.vcpu.gprs().rax;
                parts.gate.end(pending, rax, &view, parts.buffer)
            }
            End::Dead(reason) => {
                warn!("sandbox is dead: firmware {reason} in {service:?}");
                parts.gate.end_without_firmware(pending, &view, parts.buffer)
            }
        };
        if let Some(anomaly) = outcome.anomaly {
            warn!("firmware returned {anomaly} from {service:?}");
        }
        finish(vcpu, outcome.status);
        Next::Resume
    }

    /// The service whose thunk made the hypercall: at CPL 0, at its place, with its number.
    fn called(&self, vcpu: &SvmVcpu<'_>) -> Option<Service> {
        let service = Service::from_hypercall(vcpu.gprs().rax as u32)?;
        // The page may be mapped at any address; its offset stays.
        let at = service_at(vcpu.rip() & (PAGE_SIZE - 1))?;
        (vcpu.cpl() == 0 && vcpu.code().1 && at == service).then_some(service)
    }

    /// Decodes a new call; what is left to do without firmware is done.
    fn begin(&mut self, service: Service, vcpu: &mut SvmVcpu<'_>) -> Result<Pending, Next> {
        let parts = &mut self.parts;
        let g = vcpu.gprs();
        let [r8, r9, ..] = g.r8_to_15;
        let args = Args { rcx: g.rcx, rdx: g.rdx, r8, r9, rsp: g.rsp };
        let view = GuestView { control: vcpu.control(), space: &parts.space, mem: &parts.mem };
        let own = Own { log: parts.log, status: &parts.status, sandbox: &parts.state };
        let pending = match parts.gate.begin(service, &args, &view, &own, parts.buffer) {
            Begin::Done(status) => {
                finish(vcpu, status);
                return Err(Next::Resume);
            }
            Begin::Reset(kind) => return Err(Next::Reset(kind)),
            Begin::Run(pending) => pending,
        };
        let Some(entry) = parts.entries.get(service.index()).copied().flatten() else {
            parts.state.kill(Reason::NoEntry);
            finish(vcpu, parts.gate.end_without_firmware(pending, &view, parts.buffer).status);
            return Err(Next::Resume);
        };
        if parts.state.start(parts.clock.now_us()).is_err() {
            finish(vcpu, parts.gate.end_without_firmware(pending, &view, parts.buffer).status);
            return Err(Next::Resume);
        }
        copy_buffer(parts.area, parts.buffer, &parts.mem, &pending, Direction::ToSandbox);
        let call = pending.call(buffer_at(parts.area));
        let frame = call.frame(parts.return_to);
        // Aligned so that RSP is 8 modulo 16 at the entry point.
        let rsp = buffer_at(parts.area).wrapping_sub(size_of_val(&frame) as u64).wrapping_sub(8) & !0xf | 8;
        for (at, word) in (rsp..).step_by(8).zip(frame) {
            parts.mem.write(at, &word.to_le_bytes());
        }
        parts.vcpu.start_long_mode(entry, rsp, self.root, (0, 0));
        let g = parts.vcpu.gprs_mut();
        (g.rcx, g.rdx) = (call.rcx, call.rdx);
        g.set_by_encoding(8, call.r8);
        g.set_by_encoding(9, call.r9);
        g.rsp = rsp;
        Ok(pending)
    }

    /// Runs the sandbox until the call ends or has to wait.
    fn run(&mut self, cpu: &mut Cpu, guest: &SvmVcpu<'_>, ports: Ports) -> End {
        let parts = &mut self.parts;
        loop {
            let exit = cpu.run_interruptible(&mut parts.vcpu, guest.takes_interrupts());
            let at_return =
                matches!(exit, Exit::Memory { gpa, access: Access::Fetch, .. } if gpa == parts.return_to);
            let judged = if at_return { Exit::Hypercall } else { exit };
            let al = parts.vcpu.gprs().rax as u8;
            match parts.state.exit(&judged, at_return, al, parts.clock.now_us()) {
                Verdict::Resume => match exit {
                    Exit::Interrupt => return End::Preempted,
                    _ => cpu.let_pending_in(),
                },
                Verdict::Cpuid => {
                    let v = &mut parts.vcpu;
                    let (leaf, subleaf) = (v.gprs().rax as u32, v.gprs().rcx as u32);
                    let [a, b, c, d] = cpuid::cpuid(leaf, subleaf, &v.control(), crate::cpu::native_cpuid);
                    let g = v.gprs_mut();
                    (g.rax, g.rbx, g.rcx, g.rdx) = (a.into(), b.into(), c.into(), d.into());
                    v.advance(TWO_BYTES);
                }
                Verdict::PassPort => port_access(&mut parts.vcpu, exit, Some(ports)),
                Verdict::DenyPort => port_access(&mut parts.vcpu, exit, None),
                Verdict::DenyMsr => {
                    let v = &mut parts.vcpu;
                    if matches!(exit, Exit::MsrRead { .. }) {
                        let all_ones = u64::from(u32::MAX);
                        (v.gprs_mut().rax, v.gprs_mut().rdx) = (all_ones, all_ones);
                    }
                    v.advance(TWO_BYTES);
                }
                Verdict::RaiseSmi { .. } => {
                    port_access(&mut parts.vcpu, exit, Some(ports));
                    cpu.let_pending_in();
                }
                Verdict::Return => return End::Returned,
                Verdict::Stop(reason) => return End::Dead(reason),
            }
        }
    }
}

/// How a run of the sandbox ended.
enum End {
    Returned,
    Preempted,
    Dead(Reason),
}

/// Gives the guest its status.
fn finish(vcpu: &mut SvmVcpu<'_>, status: Status) {
    vcpu.gprs_mut().rax = status.0 as u64;
    vcpu.advance(HYPERCALL_LENGTH);
}

/// Where the sandbox sees the call buffer: at the end of its area.
fn buffer_at(area: PhysRange) -> u64 {
    area.last().wrapping_sub(CALL_BUFFER_SIZE as u64).wrapping_add(1)
}

enum Direction {
    ToSandbox,
    FromSandbox,
}

/// Copies what a call uses of the call buffer between the MLE and the sandbox: each side works on its own.
fn copy_buffer(
    area: PhysRange,
    own: &mut CallBuffer,
    mem: &Identity,
    pending: &Pending,
    direction: Direction,
) {
    let (at, used) = (buffer_at(area), ..pending.used_bytes());
    match direction {
        Direction::ToSandbox => mem.write(at, own.as_bytes().get(used).unwrap_or_default()),
        Direction::FromSandbox => mem.read(at, own.as_mut_bytes().get_mut(used).unwrap_or_default()),
    };
}

/// Goes on after an intercepted port access.
pub fn finish_port(vcpu: &mut SvmVcpu<'_>, exit: Exit) {
    if let Exit::Port { next_rip, .. } = exit {
        vcpu.skip_to(next_rip);
    }
}

/// Does a port access for a virtual machine, or pretends that no device is there.
pub fn port_access(vcpu: &mut SvmVcpu<'_>, exit: Exit, ports: Option<Ports>) {
    let Exit::Port { port, size, input, next_rip, .. } = exit else { return };
    let rax = vcpu.gprs().rax;
    if input {
        let value = match (ports, size) {
            (Some(p), 1) => p.in8(port).into(),
            (Some(p), 2) => p.in16(port).into(),
            (Some(p), _) => u64::from(p.in32(port)),
            (None, _) => u64::MAX,
        };
        vcpu.gprs_mut().rax = match size {
            1 => rax & !0xff | value & 0xff,
            2 => rax & !0xffff | value & 0xffff,
            _ => value & 0xffff_ffff,
        };
    } else if let Some(p) = ports {
        match size {
            1 => p.out8(port, rax as u8),
            2 => p.out16(port, rax as u16),
            _ => p.out32(port, rax as u32),
        }
    }
    vcpu.skip_to(next_rip);
}
