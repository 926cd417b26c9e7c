//! EFI runtime services for the guest: the call is copied in, the firmware runs in its sandbox, results are copied out.
//!
//! A call is preempted when an interrupt is pending and the guest would take it: the guest goes on at the same hypercall
//! instruction, takes its interrupt there, and its next attempt continues the call. So the guest never waits for its
//! interrupts, and the time budget of a call that loops is enforced.

mod deferred;
mod gap;
mod own;
mod sandboxed;

use core::fmt::{self, Write};

use firmware::call::{
    Answer, Args, Begin, CALL_BUFFER_SIZE, CallBuffer, FirmwareCall, Gate, Pending, ResetKind,
    Services as Unlocked, Status,
};
use firmware::capsule::{self, CapsuleError, StagedQuery, Staging};
use firmware::deferred::Overlay;
use firmware::exposure::{self as log_format, Decision, Denied, Kind, Name, Record, Text, Variable};
use firmware::prm::{self, Handlers};
use firmware::sandbox::{Counters, Place, Reason, Sandbox};
use firmware::service::{Service, TABLE_COUNT, Target};
use firmware::tables::{HYPERCALL_LENGTH, hypercall_address};
use heapless::{String, Vec};
use hv::addr::{PAGE_SIZE, PhysRange};
use hv::io::Clock;
use hv::launch::PCR_EXPOSURE;
use hv::radix::{Error, TablePool};
use hv::space::AddressSpace;
use hv::vcpu::{Access, Exception};
use log::warn;
use spin::{Mutex, Once};

pub use self::gap::{GapCall, relaunch};
use self::own::Own;
use self::sandboxed::{Direction, End, buffer_at, copy_buffer};
use crate::apic::Xapic;
use crate::backend::{PortMap, Vcpu};
use crate::cpu::{Cpu, FpuArea};
use crate::exposure::{self, Settled};
use crate::guest::walk::{GuestView, Tlb};
use crate::metal::{Identity, PhysWindow, Ports, TscClock};
use crate::paging;
use crate::relaunch::Took;
use crate::smi::{self, SmiGate};
use crate::watch::Watch;

/// Memory that the sandbox works in: page tables, GDT, stack, call buffer.
pub const SANDBOX_SIZE: u64 = TABLES_SIZE + PAGE_SIZE + STACK_SIZE + CALL_BUFFER_SIZE as u64;
/// Tables for 4 GiB in 2 MiB pages.
const TABLES_SIZE: u64 = 6 * PAGE_SIZE;
/// The firmware's stack. Spec: \[UEFI\] "x64 Platforms", 128 KiB or more.
const STACK_SIZE: u64 = 32 * PAGE_SIZE;

/// Longest part of the status that is fixed at launch, in bytes.
pub const STATUS_MAX: usize = 2048;
/// Most ranges of firmware memory that a dead sandbox is made anew from.
pub const PRISTINE_MAX: usize = 32;

/// How long a call that firmware has ended may wait for its caller, in microseconds.
const ABANDONED_US: u64 = 10_000_000;

/// What a sandbox is made of.
pub struct Parts {
    /// The way of calls.
    pub gate: Gate,
    /// What is done about its exits.
    pub state: Sandbox,
    /// Its virtual CPU.
    pub vcpu: Runner,
    /// The virtual CPU of calls that run natively, if there are to be any.
    pub native: Option<Runner>,
    /// Entry points in the firmware's runtime code.
    pub entries: [Option<u64>; TABLE_COUNT],
    /// Handlers of the Platform Runtime Mechanism, where the guest may call them.
    pub handlers: Option<Handlers>,
    /// Its memory, [`SANDBOX_SIZE`] bytes.
    pub area: PhysRange,
    /// Memory in which capsules are staged for it, if any service takes them.
    pub staging: Option<PhysRange>,
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
    /// Writes that wait for the machine's reset.
    pub overlay: &'static mut Overlay,
    /// What firmware has of a variable that is written.
    pub scratch: &'static mut CallBuffer,
    /// Firmware's code, and whether it changes.
    pub watch: &'static Mutex<Watch>,
    /// Software SMIs.
    pub smi: SmiGate,
    /// Memory as it was at launch: what a dead sandbox is made anew from.
    pub pristine: Vec<(PhysRange, &'static [u8]), PRISTINE_MAX>,
    /// The PCR that shows what the guest unlocked.
    pub unlock_pcr: u32,
    /// The DRTM event log.
    pub log: &'static mut [u8],
    /// Bytes of it that are used.
    pub log_used: usize,
    /// What is in force, for the guest to read.
    pub status: String<STATUS_MAX>,
    /// Ports at which the sandbox exits.
    pub ports: &'static mut PortMap,
    /// The last of the launch's rounds under policy `relaunch`: its number, and how long it took.
    pub relaunched: Option<(u64, Took)>,
}

/// A virtual CPU for firmware.
pub struct Runner {
    /// It.
    pub vcpu: Vcpu<'static>,
    /// The CPU that it was on last, by its APIC ID: another may have older entries of its nested tables in the TLB.
    pub on: Option<u32>,
}

impl Parts {
    /// The virtual CPU that a call runs on. Where there is none for a native call it gets the lesser rights.
    fn runner(&mut self, place: Place) -> &mut Runner {
        match (&mut self.native, place) {
            (Some(native), Place::Native) => native,
            _ => &mut self.vcpu,
        }
    }

    /// Nested tables have changed.
    fn flush_nested(&mut self) {
        for runner in [Some(&mut self.vcpu), self.native.as_mut()].into_iter().flatten() {
            runner.vcpu.flush_nested();
        }
    }
}

/// The services, one call at a time.
pub struct Services {
    parts: Parts,
    root: u64,
    tlb: Tlb,
    under_way: Option<(Call, Phase)>,
    /// Of the call that is under way, or was last.
    told: Told,
}

/// A call whose status the guest does not know yet. The guest is at the hypercall instruction, and each time it runs into
/// it the call goes on.
#[derive(Clone, Copy)]
struct Call {
    target: Target,
    /// The service whose policy it is under.
    service: Service,
    /// The CPU whose guest made it, by its APIC ID.
    owner: u32,
    /// When it began, since the MLE's start.
    since_us: u64,
    /// Where firmware runs.
    place: Place,
}

/// What only the records of a call need: it is too long to be moved about with the call.
#[derive(Default)]
struct Told {
    /// What the sandbox had done before.
    before: Counters,
    /// The variable that the call is about, by the MLE's own copy of the arguments.
    variable: Option<Variable>,
}

/// What firmware is to do, and where its results go.
enum Job {
    /// A call by the call buffer.
    Call(Pending),
    /// The question what firmware has of a variable, before a write that waits.
    Lookup { lookup: Pending, write: Pending },
    /// Capsules. The machine is to be reset if firmware takes them.
    Update { initiate_reset: bool },
    /// A question about capsules.
    Query(StagedQuery),
    /// A PRM handler.
    Handler(prm::Staged),
}

/// How far a call is. A record of what happened comes before the measurement, the measurement before the guest sees it.
enum Phase {
    /// Firmware runs.
    Running(Job),
    /// That this launch ends for firmware is on record.
    Leaving(Job),
    /// Firmware returned this in RAX. It is on record; the results are still in the buffer.
    Returned(Job, u64),
    /// All is on record but for the guest's knowing the status.
    Answered(Status),
    /// The request to unlock is on record; nothing is open yet.
    Unlocking(Unlocked),
    /// The wish for a reset is on record.
    Resetting(ResetKind),
}

static SERVICES: Once<Mutex<Services>> = Once::new();

/// What the run loop does after a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Run the guest on.
    Resume,
    /// Reset the machine.
    Reset(ResetKind),
    /// End this launch, see [`relaunch`].
    Relaunch,
}

/// Builds the sandbox's own page tables, at the start of its area: their root, and where they are. `pool` gives pages of
/// that part.
///
/// The sandbox can write them: they are a convenience of its address space. What it can reach is decided by the nested
/// tables alone.
pub fn own_tables<P: TablePool>(
    area: &PhysRange,
    pool: impl FnOnce(PhysRange) -> P,
) -> Result<(u64, PhysRange), Error> {
    let tables = PhysRange::new(area.start(), TABLES_SIZE).ok_or(Error::OutOfTables)?;
    Ok((paging::open_identity(&mut pool(tables))?, tables))
}

/// Opens the services. `root` is that of the sandbox's own tables.
pub fn open(parts: Parts, root: u64) {
    SERVICES.call_once(|| {
        Mutex::new(Services { parts, root, tlb: Tlb::default(), under_way: None, told: Told::default() })
    });
}

/// Takes a hypercall of the guest that was called from one of its thunks.
pub fn call(cpu: &mut Cpu, vcpu: &mut Vcpu<'_>, local: &Xapic<PhysWindow>, ports: Ports) -> Next {
    let Some(services) = SERVICES.get() else {
        vcpu.inject(Exception::InvalidOpcode);
        return Next::Resume;
    };
    match services.try_lock() {
        Some(mut services) => services.call(cpu, vcpu, local, ports),
        None => {
            // Another CPU's call is running: the guest tries again, and an SMI that the other needs gets through here.
            cpu.let_pending_in();
            Next::Resume
        }
    }
}

/// The guest ends the machine in another way than by ResetSystem: what waited for that is carried out.
pub fn end_of_guest(cpu: &mut Cpu, local: &Xapic<PhysWindow>, ports: Ports) {
    let Some(services) = SERVICES.get() else { return };
    loop {
        if let Some(mut services) = services.try_lock() {
            // A call of another CPU that is under way ends here: its firmware does not run on in the middle.
            if let Some((call, Phase::Running(_))) = services.under_way.take() {
                services.parts.state.kill(Reason::Abandoned { used_us: 0 });
                services.revive(&call);
            }
            return services.end(cpu, local, ports);
        }
        cpu.let_pending_in();
    }
}

impl Services {
    fn call(&mut self, cpu: &mut Cpu, vcpu: &mut Vcpu<'_>, local: &Xapic<PhysWindow>, ports: Ports) -> Next {
        self.tlb.flush();
        let apic_id = local.id();
        let Some(target) = self.called(vcpu) else {
            // Not one of ours: to software that is not on the thunk page there is no hypervisor to call.
            vcpu.inject(Exception::InvalidOpcode);
            return Next::Resume;
        };
        let (call, mut phase) = match self.under_way.take() {
            Some((call, phase)) if call.owner == apic_id && call.target == target => (call, phase),
            Some((call, phase)) => {
                self.wait_for(call, phase);
                cpu.let_pending_in();
                return Next::Resume;
            }
            None => match self.begin(target, vcpu, apic_id) {
                Some(begun) => begun,
                None => return Next::Resume,
            },
        };
        loop {
            let next = match phase {
                Phase::Running(job) => self.run_firmware(&call, job, cpu, vcpu, local, ports),
                Phase::Leaving(job) => match exposure::flush_on(&self.parts.clock) {
                    Settled::Wait | Settled::Working => Err(Phase::Leaving(job)),
                    Settled::Late => Ok(Phase::Answered(Status::DEVICE_ERROR)),
                    Settled::Measured if self.leaves_too_long(&call) => Ok(self.stays(&call)),
                    Settled::Measured => {
                        self.under_way = Some((call, Phase::Leaving(job)));
                        return Next::Relaunch;
                    }
                },
                Phase::Returned(..) | Phase::Answered(_) if smi::look_waits(&self.parts.clock) => Err(phase),
                Phase::Returned(job, rax) => match exposure::settle_on(&self.parts.clock) {
                    Settled::Wait | Settled::Working => Err(Phase::Returned(job, rax)),
                    Settled::Measured | Settled::Late => Ok(self.give(&call, job, rax, vcpu)),
                },
                Phase::Answered(status) => match exposure::settle_on(&self.parts.clock) {
                    Settled::Wait | Settled::Working => Err(Phase::Answered(status)),
                    Settled::Measured | Settled::Late => {
                        finish(vcpu, status);
                        return Next::Resume;
                    }
                },
                Phase::Unlocking(services) => self.unlock(services),
                Phase::Resetting(kind) => match exposure::flush_on(&self.parts.clock) {
                    Settled::Wait | Settled::Working => Err(Phase::Resetting(kind)),
                    Settled::Measured | Settled::Late => {
                        self.end(cpu, local, ports);
                        return Next::Reset(kind);
                    }
                },
            };
            match next {
                Ok(next) => phase = next,
                Err(waiting) => {
                    self.under_way = Some((call, waiting));
                    return Next::Resume;
                }
            }
        }
    }

    /// Another CPU's call, or another service, while a call is under way: it waits. When the time of the call is up its
    /// caller is gone (kexec, a crash), and firmware may be in the middle of something.
    fn wait_for(&mut self, call: Call, phase: Phase) {
        let now = self.parts.clock.now_us();
        match self.parts.state.deadline_us() {
            Some(deadline) if now < deadline => self.under_way = Some((call, phase)),
            Some(_) => {
                let used_us = exposure::now_us(&self.parts.clock).saturating_sub(call.since_us);
                self.died(&call, Reason::Abandoned { used_us });
                self.parts.state.kill(Reason::Abandoned { used_us });
            }
            // Only the measurement is left. It does not take this long unless the caller is gone.
            None => {
                let since = exposure::now_us(&self.parts.clock).saturating_sub(call.since_us);
                if since < ABANDONED_US {
                    self.under_way = Some((call, phase));
                }
            }
        }
    }

    /// Runs firmware. `Err` is the phase in which the call waits.
    fn run_firmware(
        &mut self,
        call: &Call,
        job: Job,
        cpu: &mut Cpu,
        vcpu: &Vcpu<'_>,
        local: &Xapic<PhysWindow>,
        ports: Ports,
    ) -> Result<Phase, Phase> {
        cpu.swap_fpu(&mut self.parts.fpu);
        let end = self.run(call, cpu, vcpu.takes_interrupts(), local, ports);
        cpu.swap_fpu(&mut self.parts.fpu);
        if end != End::Preempted {
            let parts = &self.parts;
            parts.smi.withdraw_unasked(&parts.mem, call.service, call.owner, &parts.clock);
        }
        match end {
            End::Preempted => Err(Phase::Running(job)),
            End::Returned => {
                let rax = self.parts.runner(call.place).vcpu.gprs().rax;
                if let Job::Lookup { lookup, write } = job {
                    return Ok(self.defer(call, Some((&lookup, rax)), &write));
                }
                exposure::record(&self.record_of(call, call.place.decision(), rax));
                Ok(Phase::Returned(job, rax))
            }
            End::Dead(reason) => {
                self.died(call, reason);
                let status = Status::DEVICE_ERROR;
                let record = self.record_of(call, call.place.decision(), status.0 as u64);
                exposure::record(&record);
                Ok(Phase::Answered(status))
            }
        }
    }

    /// Checks firmware's results and copies them to the guest.
    fn give(&mut self, call: &Call, job: Job, mut rax: u64, vcpu: &Vcpu<'_>) -> Phase {
        let results = match &job {
            Job::Call(pending) => Some(pending.results()),
            Job::Handler(_) => Some(prm::Staged::used()),
            Job::Lookup { .. } | Job::Update { .. } | Job::Query(_) => None,
        };
        let parts = &mut self.parts;
        if let Some(results) = results {
            copy_buffer(parts.area, parts.buffer, &parts.mem, results, Direction::FromSandbox);
        }
        if let Job::Call(pending) = &job {
            if self.is_hidden(pending, rax) {
                pending.ask_on(self.parts.buffer);
                self.hand_over(pending.arguments(self.parts.buffer));
                let registers = pending.call(buffer_at(self.parts.area));
                return self.enter_or_end(call, job, &registers);
            }
            rax = self.overlaid(pending, Some(rax)).unwrap_or(rax);
        }
        let parts = &mut self.parts;
        let view = GuestView::new(vcpu.control(), &parts.space, &parts.mem, &self.tlb);
        let strange = |anomaly: &dyn fmt::Display| {
            warn!("{anomaly} from {:?}", call.service);
            Some(Text::new(anomaly))
        };
        let (status, text) = match job {
            Job::Call(pending) => {
                let outcome = parts.gate.end(pending, rax, &view, parts.buffer);
                (outcome.status, outcome.anomaly.and_then(|anomaly| strange(&anomaly)))
            }
            // Its answer was the MLE's.
            Job::Lookup { .. } => (Status::DEVICE_ERROR, None),
            Job::Update { initiate_reset } => match firmware::call::status(rax) {
                Ok(Status::SUCCESS) if initiate_reset => return reset(call, ResetKind::Warm, &parts.clock),
                Ok(status) => (status, None),
                Err(anomaly) => (Status::DEVICE_ERROR, strange(&anomaly)),
            },
            Job::Handler(staged) => match (firmware::call::status(rax), &parts.handlers) {
                (Ok(status), Some(handlers)) => {
                    match handlers.finish(&staged, (&view, &parts.mem), parts.buffer) {
                        Ok(()) => (status, None),
                        Err(error) => (error.status(), strange(&error)),
                    }
                }
                (Ok(_), None) => (Status::NOT_FOUND, None),
                (Err(anomaly), _) => (Status::DEVICE_ERROR, strange(&anomaly)),
            },
            Job::Query(query) => match firmware::call::status(rax) {
                Ok(Status::SUCCESS) => match staging(parts).and_then(|s| query.finish(&view, &s)) {
                    Ok(()) => (Status::SUCCESS, None),
                    Err(error) => (error.status(), strange(&error)),
                },
                Ok(status) => (status, None),
                Err(anomaly) => (Status::DEVICE_ERROR, strange(&anomaly)),
            },
        };
        if text.is_some() {
            let record = self.record_of(call, Decision::DENIED, status.0 as u64);
            exposure::record(&Record { text, kind: Kind::REFUSED, ..record });
        }
        Phase::Answered(status)
    }

    /// Opens what the guest asked for, once its wish is in the PCRs.
    fn unlock(&mut self, services: Unlocked) -> Result<Phase, Phase> {
        let pcr = self.parts.unlock_pcr;
        let mut measured = exposure::flush_on(&self.parts.clock);
        if measured == Settled::Measured && (pcr != PCR_EXPOSURE || !exposure::measures()) {
            let mut text = String::<256>::new();
            // The fourteen names take 215 bytes.
            let _ = write!(text, "unlock {services}");
            measured = exposure::extend(pcr, text.as_bytes());
        }
        match measured {
            Settled::Wait | Settled::Working => Err(Phase::Unlocking(services)),
            Settled::Late => Ok(Phase::Answered(Status::DEVICE_ERROR)),
            Settled::Measured => {
                self.parts.gate.unlock(services);
                Ok(Phase::Answered(Status::SUCCESS))
            }
        }
    }

    /// What is on record of a call so far.
    fn record_of(&self, call: &Call, decision: Decision, status: u64) -> Record {
        let (now, before) = (self.parts.state.counters(), &self.told.before);
        let grown = |now: u64, before: u64| now.saturating_sub(before);
        let small = |n: u64| u16::try_from(n).unwrap_or(u16::MAX);
        let (ports, msrs) =
            (grown(now.denied_ports, before.denied_ports), grown(now.denied_msrs, before.denied_msrs));
        let denied = Denied {
            ports: small(ports),
            msrs: small(msrs),
            last_port: now.last_denied_port.unwrap_or(0),
            last_msr: now.last_denied_msr.unwrap_or(0),
            ..Denied::default()
        };
        let long = |n: u64| u32::try_from(n).unwrap_or(u32::MAX);
        Record {
            status,
            duration_us: long(exposure::now_us(&self.parts.clock).saturating_sub(call.since_us)),
            exits: long(grown(now.exits, before.exits)),
            smis: long(grown(now.smis, before.smis)),
            variable: self.told.variable,
            denied: (ports != 0 || msrs != 0).then_some(denied),
            ..Record::call(call.service, decision, call.owner, call.since_us)
        }
    }

    /// The sandbox is dead: says so and puts it on record.
    fn died(&self, call: &Call, reason: Reason) {
        warn!("sandbox is dead: firmware {reason} in {:?}", call.service);
        let access = match reason {
            Reason::Memory { gpa, access } => {
                let how = match access {
                    Access::Read => log_format::Access::READ,
                    Access::Write => log_format::Access::WRITE,
                    Access::Fetch => log_format::Access::EXECUTE,
                };
                Some(log_format::Access { source: call.owner, address: gpa, how })
            }
            _ => None,
        };
        let text = Some(Text::new(reason));
        exposure::record(&Record {
            access,
            text,
            service: call.service as u8,
            ..Record::new(Kind::SANDBOX_DIED, call.owner, exposure::now_us(&self.parts.clock))
        });
    }

    /// Where the thunk leads to that made the hypercall: at CPL 0, at its place, with its number.
    fn called(&self, vcpu: &Vcpu<'_>) -> Option<Target> {
        let target = Target::from_hypercall(vcpu.gprs().rax as u32)?;
        // The page may be mapped at any address; its offset stays.
        let in_place = vcpu.rip() & (PAGE_SIZE - 1) == hypercall_address(0, target);
        (in_place && vcpu.cpl() == 0 && vcpu.code().1).then_some(target)
    }

    /// Decodes a new call. `None` when the guest has its answer already.
    fn begin(&mut self, target: Target, vcpu: &mut Vcpu<'_>, apic_id: u32) -> Option<(Call, Phase)> {
        let service = target.service();
        if !exposure::has_room() && exposure::flush(&self.parts.clock) != Settled::Measured {
            // Nothing is done that could not go on record.
            finish(vcpu, Status::NOT_READY);
            return None;
        }
        let mut call = self.new_call(target, apic_id);
        let parts = &mut self.parts;
        let g = vcpu.gprs();
        let [r8, r9, ..] = g.r8_to_15;
        let args = Args { rcx: g.rcx, rdx: g.rdx, r8, r9, rsp: g.rsp };
        let view = GuestView::new(vcpu.control(), &parts.space, &parts.mem, &self.tlb);
        let log = parts.log.get(..parts.log_used).unwrap_or_default();
        let (status, sandbox, relaunched) = (&parts.status, &parts.state, parts.relaunched);
        let own = Own { log, status, sandbox, relaunched };
        let begun = match target {
            Target::Service(service) => parts.gate.begin(service, &args, &view, &own, parts.buffer),
            Target::Handler(n) => match parts.handlers.as_ref().and_then(|handlers| handlers.get(n)) {
                Some(handler) => parts.gate.begin_handler(n, handler.guid, parts.buffer),
                None => Begin::Done(Answer { status: Status::NOT_FOUND, decision: Decision::OWN }),
            },
        };
        self.told.variable = parts.buffer.variable(service).map(|(guid, name)| Variable {
            guid: firmware::call::Guid::from_bytes(*guid),
            name: Name::new(name),
        });
        // A write that waits does not get to firmware: it is asked.
        if !matches!(begun, Begin::Defer(_)) {
            call.place = parts.gate.place(service, parts.buffer);
        }
        let phase = match begun {
            // The MLE's own answers are no exposure.
            Begin::Done(Answer { status, decision: Decision::OWN }) => {
                finish(vcpu, status);
                return None;
            }
            Begin::Done(Answer { status, decision }) => {
                exposure::record(&self.record_of(&call, decision, status.0 as u64));
                Phase::Answered(status)
            }
            Begin::Unlock(services) => {
                let text = Some(Text::new(services));
                let record = Record::new(Kind::UNLOCKED, apic_id, call.since_us);
                exposure::record(&Record { text, decision: Decision::PASSED, ..record });
                Phase::Unlocking(services)
            }
            Begin::Reset(kind) => reset(&call, kind, &parts.clock),
            Begin::Capsules => {
                let staged = staging(parts).and_then(|to| match service {
                    Service::UpdateCapsule => {
                        let staged = capsule::stage_update(&args, &view, &view, &to)?;
                        Ok((Job::Update { initiate_reset: staged.initiate_reset }, staged.call))
                    }
                    _ => {
                        let staged = capsule::stage_query(&args, &view, &to)?;
                        let registers = staged.call;
                        Ok((Job::Query(staged), registers))
                    }
                });
                match staged {
                    Ok((job, registers)) => self.enter_or_end(&call, job, &registers),
                    Err(error) => self.not_staged(&call, &error, error.status()),
                }
            }
            Begin::Handler(n) => {
                let handlers = parts.handlers.as_ref().ok_or(prm::CallError::NoHandler(n));
                let staged = handlers.and_then(|handlers| {
                    let buffer = (&mut *parts.buffer, buffer_at(parts.area));
                    handlers.stage(n, args.rcx, (&view, &parts.mem), buffer)
                });
                match staged {
                    Ok(staged) => {
                        self.hand_over(prm::Staged::used());
                        let registers = staged.call(buffer_at(self.parts.area));
                        self.enter_or_end(&call, Job::Handler(staged), &registers)
                    }
                    Err(error) => self.not_staged(&call, &error, error.status()),
                }
            }
            Begin::Defer(write) => {
                let key = parts.buffer.key();
                if key.is_some_and(|key| parts.overlay.get(key).is_some()) {
                    self.defer(&call, None, &write)
                } else {
                    // Firmware gets the variable's name and not its new content, which stays in the MLE's buffer.
                    let Parts { scratch, buffer, .. } = parts;
                    scratch.zero();
                    scratch.copy_name_of(buffer);
                    let lookup = Pending::lookup(scratch);
                    let pieces = lookup.arguments(parts.scratch);
                    copy_buffer(parts.area, parts.scratch, &parts.mem, pieces, Direction::ToSandbox);
                    let registers = lookup.call(buffer_at(parts.area));
                    self.enter_or_end(&call, Job::Lookup { lookup, write }, &registers)
                }
            }
            Begin::Run(pending) => match self.overlaid(&pending, None) {
                Some(rax) => {
                    let parts = &mut self.parts;
                    let view = GuestView::new(vcpu.control(), &parts.space, &parts.mem, &self.tlb);
                    // Firmware had no part in it: no exposure.
                    finish(vcpu, parts.gate.end(pending, rax, &view, parts.buffer).status);
                    return None;
                }
                None => {
                    self.hand_over(pending.arguments(self.parts.buffer));
                    let registers = pending.call(buffer_at(self.parts.area));
                    self.enter_or_end(&call, Job::Call(pending), &registers)
                }
            },
        };
        Some((call, phase))
    }

    /// A call that begins now.
    fn new_call(&mut self, target: Target, owner: u32) -> Call {
        self.told = Told { before: *self.parts.state.counters(), variable: None };
        let since_us = exposure::now_us(&self.parts.clock);
        Call { target, service: target.service(), owner, since_us, place: Place::Sandbox }
    }

    /// What the guest wants firmware to have cannot be given to it.
    fn not_staged(&self, call: &Call, error: &dyn fmt::Display, status: Status) -> Phase {
        warn!("{:?} of the guest: {error}", call.service);
        let record = self.record_of(call, Decision::NONE, status.0 as u64);
        exposure::record(&Record { text: Some(Text::new(error)), ..record });
        Phase::Answered(status)
    }

    /// Prepares the sandbox for a call, or ends it when there is none.
    fn enter_or_end(&mut self, call: &Call, job: Job, registers: &FirmwareCall) -> Phase {
        if call.place == Place::Gap {
            return self.leave(call, job);
        }
        if self.enter(call, registers).is_ok() {
            return Phase::Running(job);
        }
        let status = Status::DEVICE_ERROR;
        exposure::record(&self.record_of(call, Decision::NONE, status.0 as u64));
        Phase::Answered(status)
    }
}

/// Puts the guest's wish for a reset on record.
fn reset(call: &Call, kind: ResetKind, clock: &TscClock) -> Phase {
    let text = Some(Text::new(format_args!("{kind:?}")));
    let record = Record::new(Kind::RESET, call.owner, exposure::now_us(clock));
    exposure::record(&Record { text, service: call.service as u8, ..record });
    Phase::Resetting(kind)
}

/// The memory in which capsules are staged.
fn staging(parts: &Parts) -> Result<Staging<'_, Identity>, CapsuleError> {
    let range = parts.staging.unwrap_or(parts.area);
    if parts.staging.is_some() { Staging::new(&parts.mem, range) } else { Err(CapsuleError::Staging(range)) }
}

/// Gives the guest its status.
fn finish(vcpu: &mut Vcpu<'_>, status: Status) {
    vcpu.gprs_mut().rax = status.0 as u64;
    vcpu.advance(HYPERCALL_LENGTH);
}
