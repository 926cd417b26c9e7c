//! SMIs: those that firmware in the sandbox asks for, those that the guest asks for, and those that come by themselves.
//!
//! UNSAFETY: the instruction that gives random numbers.
#![expect(unsafe_code, reason = "the hardware edge")]

pub mod count;

use core::fmt::{Display, Write};
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use firmware::exposure::{CALL_SMIS, Decision, Kind, Record, Text};
use firmware::sandbox::SMI_COMMAND;
use firmware::service::Service;
use firmware::smm::check::{GuardError, Guarded, Sums};
use firmware::smm::communicate::{self, CommunicateError, CorePrivate, Request, SmmPolicy, judge};
use firmware::smm::facts::{self, Fact, Facts};
use heapless::Vec;
use hv::addr::{PAGE_SIZE, PhysRange};
use hv::failure::MleError;
use hv::io::PortIo;
use hv::radix::Tables;
use iommu::pci::Function;
use log::warn;
use spin::{Mutex, MutexGuard, Once};

use crate::backend::{Vcpu, VcpuPage, Vendor};
use crate::cpu::{Cpu, native_cpuid};
use crate::exposure::told;
use crate::guest::windows::Windows;
use crate::metal::{Identity, Msrs, Ports, TscClock};
use crate::pool::PagePool;
use crate::services::PRISTINE_MAX;
use crate::smp::MAX_CPUS;
use crate::{dma, exposure, fatal};

/// Room for the WSMT: 40 bytes, and what a later version may add.
const WSMT_MAX: usize = 256;
/// How long after an SMI of ours the other CPUs may take theirs: the chipset sends it to all, microseconds.
const ECHO_US: u64 = 1_000_000;

/// Until when an SMI of a CPU is the echo of one that is on record.
static ECHO_UNTIL: AtomicU64 = AtomicU64::new(0);
/// What that was when each CPU had its echo: there is one of each.
static ECHO_HEARD: [AtomicU64; MAX_CPUS] = [const { AtomicU64::new(0) }; MAX_CPUS];

/// What SMM must not have changed.
static GUARD: Mutex<Guard> =
    Mutex::new(Guard { sums: Guarded::NONE, look: Look::Done, mem: None, left_out: 0 });

/// A look costs as much as a firmware call; so often it may.
const LOOK_PERIOD_US: u64 = 100_000;
/// Before this time SMIs are not looked after one by one.
static NEXT_LOOK_US: AtomicU64 = AtomicU64::new(0);
/// An SMI has come that nobody looked after.
static LOOK_OWED: AtomicBool = AtomicBool::new(false);
/// A look has begun and is not at its end.
static LOOKING: AtomicBool = AtomicBool::new(false);

/// How far a look is.
enum Look {
    /// None is under way.
    Done,
    /// At that page of the MLE's memory.
    Memory(usize),
    /// At the IOMMUs.
    Dma,
}

struct Guard {
    sums: Guarded,
    look: Look,
    /// There is something to look at.
    mem: Option<Identity>,
    /// Pieces of memory for which there was no room.
    left_out: u32,
}

impl Guard {
    /// Of what is not looked at the first is told; `Status` has the number.
    fn leave_out(&mut self, error: GuardError) {
        if self.left_out == 0 {
            warn!("not all of the MLE is looked at after an SMI: {error}");
        }
        self.left_out = self.left_out.saturating_add(1);
    }
}

/// Writes how much is looked at after an SMI, and how many pieces found no room.
pub fn write_guarded(out: &mut impl Write) {
    let guard = GUARD.lock();
    let (regions, pages, sets) = guard.sums.counts();
    // A full buffer ends the report early.
    let _ = writeln!(
        out,
        "looked at after SMIs: {regions} regions, {pages} pages, {sets} virtual CPUs; {} left out",
        guard.left_out
    );
}

/// Whether the guest may raise software SMIs.
static GUEST_MAY: AtomicBool = AtomicBool::new(false);

/// How far SMM is locked down, as this CPU and the chipset tell.
pub fn facts(msrs: &Msrs, ports: &Ports, mem: &Identity, rsdp: u64) -> Facts {
    let mut wsmt = [0; WSMT_MAX];
    let wsmt = iommu::acpi::copy_table(mem, rsdp, *b"WSMT", &mut wsmt).ok().and_then(|len| wsmt.get(..len));
    Facts::read(
        &facts::Cpu::identify(native_cpuid),
        msrs,
        ports,
        |id, offset| Function::new(ports, id).read(offset),
        wsmt,
    )
}

/// What the first CPU's registers say, once it is known: firmware has to lock each CPU.
static FACTS: Once<Facts> = Once::new();
/// CPUs that say otherwise, with the first such fact.
static OTHERWISE: Mutex<Vec<(u32, Fact), MAX_CPUS>> = Mutex::new(Vec::new());

/// Has the CPUs that start from now on compare what their registers say.
pub fn compare_with(facts: &Facts) {
    FACTS.call_once(|| facts.clone());
}

/// Compares this CPU's registers with the first one's.
pub fn compare(id: u32, msrs: &Msrs) {
    let cpu = facts::Cpu::identify(native_cpuid);
    if let Some(fact) = FACTS.get().and_then(|facts| facts.contradiction(&cpu, msrs)) {
        warn!("CPU {id} says otherwise: {fact}");
        let mut otherwise = OTHERWISE.lock();
        if otherwise.iter().all(|(known, _)| *known != id) {
            // There is room for each CPU.
            let _ = otherwise.push((id, fact));
        }
    }
}

/// Records of the CPUs on which firmware locked less, or more, than on the first.
pub fn each_otherwise(now_us: u64, mut record: impl FnMut(&Record)) {
    for (id, fact) in OTHERWISE.lock().iter() {
        record(&Record { text: Some(Text::new(fact)), ..Record::new(Kind::LEFT_OPEN, *id, now_us) });
    }
}

/// Decides about the sandbox's software SMIs.
pub struct SmiGate {
    /// Where the firmware keeps what it asks of SMM; none in firmware that asks nothing, or in another way.
    pub core: Option<CorePrivate>,
    /// Runtime data regions: a request lies in one of them.
    pub runtime: Vec<PhysRange, PRISTINE_MAX>,
    /// Which requests may be made.
    pub policy: SmmPolicy,
}

/// Looks after each SMI from now on, at virtual CPUs as they are made and at what [`looked_at`] adds.
pub fn guard(mem: Identity, sums: &'static mut Sums) {
    let mut guard = GUARD.lock();
    guard.sums.begin(key(), sums);
    guard.mem = Some(mem);
}

/// For adding to what is looked at.
pub fn looked_at(mem: Identity) -> Adding {
    Adding { guard: GUARD.lock(), mem }
}

/// Adds to what is looked at. No CPU looks meanwhile.
pub struct Adding {
    guard: MutexGuard<'static, Guard>,
    mem: Identity,
}

impl Adding {
    /// Adds the bits of `mask` of each word of `range`.
    pub fn bits(&mut self, range: Option<PhysRange>, mask: u64) {
        let Some(range) = range else { return };
        if let Err(error) = self.guard.sums.add(range, mask, &self.mem) {
            self.guard.leave_out(error);
        }
    }

    /// Adds memory from `from` to `to`.
    pub fn range(&mut self, from: u64, to: u64) {
        if from < to {
            self.bits(PhysRange::from_last(from, to.saturating_sub(1)), u64::MAX);
        }
    }

    /// Adds page tables.
    pub fn tables(&mut self, tables: &Tables, pool: &PagePool, mask: u64) {
        tables.each_table(pool, &mut |at| self.bits(PhysRange::new(at, PAGE_SIZE), mask));
    }

    /// Adds nested tables of one CPU in which the entries of `windows` change: [`PagePool::own_path`] made them.
    pub fn path(&mut self, root: u64, windows: &Windows) {
        let (first, end) = windows.entries();
        self.range(root, first);
        self.range(end, (first | PAGE_SIZE.saturating_sub(1)).saturating_add(1));
    }
}

/// Makes a virtual CPU on `page`, which is looked at from then on. No CPU looks meanwhile, and may take what it sees for damage.
pub fn with_vcpu<'a>(page: VcpuPage, vendor: Vendor, make: impl FnOnce() -> Vcpu<'a>) -> Vcpu<'a> {
    let mut guard = GUARD.lock();
    let vcpu = make();
    if let (Some(mem), Some((base, words))) = (guard.mem, page.constant(vendor))
        && let Err(error) = guard.sums.set_words(base, words, &mem)
    {
        guard.leave_out(error);
    }
    vcpu
}

/// Runs what changes memory that is looked at, and puts it back as it was.
pub fn unlooked<T>(change: impl FnOnce() -> T) -> T {
    let _guard = GUARD.lock();
    change()
}

/// A key that firmware cannot know beforehand; a CPU without random numbers has the time since power-on for one.
fn key() -> [u8; 16] {
    const RDRAND: u32 = 1 << 30;
    let [_, _, features, _] = native_cpuid(1, 0);
    let word = || {
        let mut value = 0;
        // SAFETY: the CPU has the instruction; it writes nothing but the value.
        let random = features & RDRAND != 0 && unsafe { x86::random::rdrand64(&mut value) };
        // SAFETY: reads a counter.
        if random { value } else { unsafe { x86::time::rdtsc() } }
    };
    let (low, high) = (word(), word());
    (u128::from(high) << 64 | u128::from(low)).to_le_bytes()
}

/// After an SMI: ends the launch if SMM changed what is the MLE's. Of SMIs that follow each other closely the first is looked
/// after at once, and the others together, at the next exit after [`LOOK_PERIOD_US`].
fn look_for_damage(id: u32, clock: &TscClock) {
    owe_look();
    look_if_owed(|| id, clock);
}

/// Has somebody look for damage when it is time.
pub fn owe_look() {
    LOOK_OWED.store(true, Ordering::Relaxed);
}

/// Whether a look is under way, or would begin now.
pub fn look_waits(clock: &TscClock) -> bool {
    let due = || exposure::now_us(clock) >= NEXT_LOOK_US.load(Ordering::Relaxed);
    LOOKING.load(Ordering::Relaxed) || LOOK_OWED.load(Ordering::Relaxed) && due()
}

/// Looks for damage, if an SMI is still to be looked after and it is time. Cheap when not; called at each exit that
/// [`look_on`] is not.
pub fn look_if_owed(id: impl FnOnce() -> u32, clock: &TscClock) {
    if look_waits(clock) {
        let id = id();
        while look_part(id, clock) {}
    }
}

/// The same in parts, at an exit that comes again if nothing is done about it. True while a look is under way, by this CPU or
/// another: the guest is to go on at the same instruction, and takes its interrupts before the next part.
pub fn look_on(id: impl FnOnce() -> u32, clock: &TscClock) -> bool {
    let waits = look_waits(clock);
    if waits {
        look_part(id(), clock);
    }
    waits
}

/// Looks at a part; true while there are more.
fn look_part(id: u32, clock: &TscClock) -> bool {
    // Another CPU looks already.
    let Some(mut guard) = GUARD.try_lock() else { return false };
    let Some(mem) = guard.mem else {
        LOOK_OWED.store(false, Ordering::Relaxed);
        return false;
    };
    let from = match guard.look {
        Look::Dma => None,
        Look::Memory(from) => Some(from),
        Look::Done => {
            LOOK_OWED.store(false, Ordering::Relaxed);
            NEXT_LOOK_US.store(exposure::now_us(clock).saturating_add(LOOK_PERIOD_US), Ordering::Relaxed);
            LOOKING.store(true, Ordering::Relaxed);
            Some(0)
        }
    };
    guard.look = match from.map(|from| guard.sums.check_part(from, &mem)) {
        Some(Ok(Some(next))) => Look::Memory(next),
        Some(Ok(None)) => Look::Dma,
        Some(Err(damage)) => stop(&damage, (damage.range.start() / PAGE_SIZE) as u16, id, clock),
        None => match dma::look(clock) {
            Ok(true) => Look::Dma,
            Ok(false) => Look::Done,
            Err(damage) => stop(&damage, 0, id, clock),
        },
    };
    let more = !matches!(guard.look, Look::Done);
    LOOKING.store(more, Ordering::Relaxed);
    more
}

/// Ends the launch: SMM changed what is the MLE's.
pub fn stop(damage: &dyn Display, detail: u16, id: u32, clock: &TscClock) -> ! {
    let record = Record::new(Kind::REGION_CHANGED, id, exposure::now_us(clock));
    exposure::record(&Record { text: Some(Text::new(damage)), ..record });
    exposure::flush(clock);
    fatal::stop(MleError::Damage, detail, format_args!("after an SMI: {damage}"))
}

/// What became of an SMI that firmware asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It was raised.
    Raised,
    /// It was not, and firmware will find that its request was denied.
    Withdrawn,
    /// It was not, and there is no way to tell firmware: it must not run on as if SMM had done something.
    Refused,
}

/// A record that says what of SMM is asked for.
fn about(pending: &Result<Option<Request<'_>>, CommunicateError>, record: Record) -> Record {
    match pending {
        Ok(Some(request)) => {
            Record { variable: request.variable(), text: Some(Text::new(request)), ..record }
        }
        Ok(None) => record,
        Err(error) => Record { text: Some(Text::new(error)), ..record },
    }
}

impl SmiGate {
    /// Judges an SMI that firmware asks for, the `nth` of a call of `service` on `cpu`, raises it with `raise` if it may be, and
    /// puts it on record.
    pub fn of_sandbox(
        &self,
        (command, nth): (u8, u64),
        mem: &Identity,
        service: Service,
        cpu: u32,
        clock: &TscClock,
        raise: impl FnOnce(),
    ) -> Answer {
        let mut name = communicate::Name::default();
        let core = self.core.as_ref();
        let pending = core.map_or(Ok(None), |core| core.pending(mem, &self.runtime, &mut name));
        let since = exposure::now_us(clock);
        let record =
            Record { service: service as u8, smi_command: command, ..Record::new(Kind::SMI, cpu, since) };
        let mut record = about(&pending, record);
        match judge(&self.policy, command, &pending) {
            communicate::Decision::Allow => {
                expect_echoes(since);
                raise();
                // Before the guest has the call's result.
                owe_look();
                record.decision = Decision::PASSED;
                let took = exposure::now_us(clock).saturating_sub(since);
                record.duration_us = u32::try_from(took).unwrap_or(u32::MAX);
                if nth <= CALL_SMIS as u64 {
                    exposure::record(&record);
                }
                Answer::Raised
            }
            communicate::Decision::Refuse(refusal) => {
                record.decision = Decision::DENIED;
                if told::REFUSED_SMIS.record(record) {
                    warn!("SMI {command:#x} of {service:?} is refused: {refusal}");
                }
                // What is left pending would be served with the next SMI, whoever raises it.
                match &self.core {
                    Some(core) if core.withdraw(mem) => Answer::Withdrawn,
                    _ => Answer::Refused,
                }
            }
        }
    }

    /// Answers what firmware left for SMM and did not ask for with an SMI of its own: the next one, whoever raises it, would
    /// carry it out unjudged. To be called before an SMI of another cause, and when a call ends.
    pub fn withdraw_unasked(&self, mem: &Identity, service: Service, cpu: u32, clock: &TscClock) {
        let Some(core) = &self.core else { return };
        let mut name = communicate::Name::default();
        let pending = core.pending(mem, &self.runtime, &mut name);
        if pending == Ok(None) {
            return;
        }
        core.withdraw(mem);
        let record = Record::new(Kind::REFUSED, cpu, exposure::now_us(clock));
        let record = Record { decision: Decision::DENIED, service: service as u8, ..record };
        if told::REFUSED_SMIS.record(about(&pending, record)) {
            warn!("a request to SMM without an SMI, in {service:?}, is withdrawn");
        }
    }
}

/// Lets the guest raise SMIs itself, or not.
pub fn set_guest_policy(allowed: bool) {
    GUEST_MAY.store(allowed, Ordering::Relaxed);
}

/// A write of the guest to an SMI command port, which policy lets through or not.
pub fn of_guest((port, command): (u16, u8), id: u32, cpu: &mut Cpu, ports: &Ports, clock: &TscClock) {
    let since = exposure::now_us(clock);
    let mut record = Record {
        smi_command: command,
        decision: Decision::DENIED,
        text: (port != SMI_COMMAND).then(|| Text::new(format_args!("port {port:#x}"))),
        ..Record::new(Kind::GUEST_SMI, id, since)
    };
    if GUEST_MAY.load(Ordering::Relaxed) {
        expect_echoes(since);
        ports.out8(port, command);
        cpu.let_pending_in();
        look_for_damage(id, clock);
        record.decision = Decision::PASSED;
        let took = exposure::now_us(clock).saturating_sub(since);
        record.duration_us = u32::try_from(took).unwrap_or(u32::MAX);
    }
    told::GUEST_SMIS.record(record);
}

/// An SMI that the guest sent to CPUs by its APIC, and that was dropped.
pub fn ipi_dropped(id: u32, clock: &TscClock) {
    let record = Record::new(Kind::GUEST_SMI, id, exposure::now_us(clock));
    told::GUEST_SMIS.record(Record {
        decision: Decision::DENIED,
        text: Some(Text::new("by the APIC")),
        ..record
    });
}

/// An SMI that a CPU took while the guest ran: those that nobody is known to have asked for go on record.
pub fn arrived(index: usize, id: u32, took_us: u64, clock: &TscClock) {
    let now = exposure::now_us(clock);
    let until = ECHO_UNTIL.load(Ordering::Relaxed);
    let heard = ECHO_HEARD.get(index).map(|heard| heard.swap(until, Ordering::Relaxed));
    let echo = until > now && heard.is_some_and(|heard| heard != until);
    if !echo {
        look_for_damage(id, clock);
        let duration_us = u32::try_from(took_us).unwrap_or(u32::MAX);
        told::UNASKED_SMIS
            .record(Record { duration_us, ..Record::new(Kind::SMI, id, now.saturating_sub(took_us)) });
    }
}

fn expect_echoes(now_us: u64) {
    count::asked();
    ECHO_UNTIL.store(now_us.saturating_add(ECHO_US), Ordering::Relaxed);
}
