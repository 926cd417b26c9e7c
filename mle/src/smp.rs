//! Application processors: started once by the MLE, parked in it, handed to the guest when it sends a Startup IPI.
//!
//! After SKINIT an AP waits for a Startup IPI and must get no INIT; after SENTER it has joined the MLE and waits there
//! ([`crate::senter::rlp`]). The MLE starts them all before the guest runs, so
//! that none can be started past it, and parks them in HLT with GIF set: an SMI must find all CPUs able to
//! meet. While the guest may want to start an AP its APIC page is watched, see [`crate::guest::windows`].
//!
//! An INIT that the guest sends to an AP that runs it parks that AP again. It is dropped where VM_CR.R_INIT holds; elsewhere
//! it resets the AP, which is started into the MLE at once. The Startup IPI that follows must be seen: so the APIC page is
//! watched as soon as the guest has stopped a CPU, which shows by its APIC being turned off, see [`signs`].
//!
//! A stopped AP halts, and SVM forgets that it does: back from an exit it would go on behind its HLT, in memory that may be
//! another kernel's by then. So its HLT exits, and it is parked at once.
//!
//! UNSAFETY: the start-up code, and the pages that it runs from.
#![expect(unsafe_code, reason = "the hardware edge")]

mod gather;
mod signs;

use core::arch::global_asm;
use core::mem::offset_of;
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};

use heapless::Vec;
use hv::addr::{PAGE_SIZE, PhysRange};
use hv::failure::MleError;
use hv::io::{Mmio, poll_until};
use hv::vcpu::Role;
use spin::Mutex;
use zerocopy::{Immutable, IntoBytes};

pub use self::gather::{Met, meet, reset_others, scatter, want};
pub use self::signs::{Sign, Signs};
use crate::apic::{Command, ICR_HIGH, Xapic, delivery};
use crate::backend::{Vcpu, Vm};
use crate::cpu::{Cpu, CpuMemory, Loaded};
use crate::guest::windows::{View, Windows};
use crate::metal::{PhysWindow, Ports, TscClock};
use crate::pool::PagePool;
use crate::{apic, fatal, paging, run, senter, smi, trap};

/// Most CPUs.
pub const MAX_CPUS: usize = 64;
/// Pages of an AP's stack, under a guard page.
const STACK_PAGES: u64 = 16;
/// Longest wait for all APs to arrive, in microseconds: real ones take some hundred.
const ARRIVAL_BUDGET_US: u64 = 2_000_000;
/// Longest that a Startup IPI of the guest waits for an AP that is on its way to being parked, in microseconds.
const PARK_BUDGET_US: u64 = 200_000;
/// Longest wait for one AP that was sent a Startup IPI of the MLE's, in microseconds, before another is sent.
const RESTART_BUDGET_US: u64 = 10_000;
/// Longest wait for an INIT that another CPU is sending, in microseconds.
const KICK_BUDGET_US: u64 = 100_000;

/// What the start-up code needs; lies in the launch page at [`PARAMS_AT`], at offsets that the code names.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct Params {
    /// LGDT's operand: limit, base, in the last six bytes.
    gdtr: [u16; 4],
    gdt: [u64; 4],
    cr3: u64,
    /// Address of the counter that gives each AP its number.
    counter: u64,
    /// APs there is room for.
    limit: u64,
    /// Address of the table of stacks.
    stacks: u64,
    /// Address of [`entry`].
    entry: u64,
    /// Far pointers: offset, selector.
    jump32: [u32; 2],
    jump64: [u32; 2],
}

const PARAMS_AT: usize = 8;
/// Where in the launch page GDTR's operand is.
pub const GDTR: usize = PARAMS_AT + offset_of!(Params, gdtr) + 2;
const GDT: usize = PARAMS_AT + offset_of!(Params, gdt);
const CR3: usize = PARAMS_AT + offset_of!(Params, cr3);
const COUNTER: usize = PARAMS_AT + offset_of!(Params, counter);
const LIMIT: usize = PARAMS_AT + offset_of!(Params, limit);
const STACKS: usize = PARAMS_AT + offset_of!(Params, stacks);
const ENTRY: usize = PARAMS_AT + offset_of!(Params, entry);
/// Where in the launch page the far pointer to [`ap_32`] is, 32-bit code that expects the page's address in EBX.
pub const JUMP32: usize = PARAMS_AT + offset_of!(Params, jump32);
const JUMP64: usize = PARAMS_AT + offset_of!(Params, jump64);

global_asm!(
    ".pushsection .rodata.ap, \"a\"",
    ".code16",
    "ap_start:",
    "jmp 2f",
    ".org ap_start + {params_end}",
    "2: cli",
    "mov ax, cs",
    "mov ds, ax",
    "xor ebx, ebx",
    "mov bx, ax",
    "shl ebx, 4",
    ".byte 0x66, 0x0f, 0x01, 0x16", // LGDT with a 32-bit base, at a 16-bit address
    ".word {gdtr}",
    "mov eax, 0x11",
    "mov cr0, eax",
    ".byte 0x66, 0xff, 0x2e", // far jump through a 16:32 pointer, at a 16-bit address
    ".word {jump32}",
    ".code32",
    "ap_32:",
    "mov ax, 0x10",
    "mov ds, ax",
    "mov es, ax",
    "mov ss, ax",
    "mov eax, [ebx + {cr3}]",
    "mov cr3, eax",
    "mov eax, 0x20",
    "mov cr4, eax",
    "mov ecx, 0xc0000080",
    "mov eax, 0x900", // LME, NXE; an AP comes out of INIT with the rest clear
    "xor edx, edx",
    "wrmsr",
    "mov eax, 0x80010031",
    "mov cr0, eax",
    "jmp fword ptr [ebx + {jump64}]",
    ".code64",
    "ap_64:",
    "mov rdx, [rbx + {counter}]",
    "mov eax, 1",
    "lock xadd [rdx], eax",
    "cmp eax, [rbx + {limit}]",
    "jae 3f",
    "mov rdx, [rbx + {stacks}]",
    "mov rsp, [rdx + rax * 8]",
    "mov edi, eax",
    "call [rbx + {entry}]",
    // More CPUs than the ACPI tables list: this one stays here, out of the guest's reach.
    "3: cli",
    "hlt",
    "jmp 3b",
    "ap_end:",
    ".popsection",
    params_end = const PARAMS_AT + size_of::<Params>(),
    gdtr = const GDTR,
    jump32 = const JUMP32,
    jump64 = const JUMP64,
    cr3 = const CR3,
    counter = const COUNTER,
    limit = const LIMIT,
    stacks = const STACKS,
    entry = const ENTRY,
);

unsafe extern "C" {
    static ap_start: u8;
    static ap_32: u8;
    static ap_64: u8;
    static ap_end: u8;
}

/// Where a CPU stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
enum State {
    /// Not started.
    Absent = 0,
    /// Waiting for the guest to start it.
    Parked = 1,
    /// The guest has started it, it is on its way.
    Starting = 2,
    /// Runs the guest.
    Running = 3,
    /// Runs the guest, which has turned its APIC off: the next sign of life will be an INIT.
    Stopped = 4,
    /// Reset by an INIT, or about to be, on a CPU without VM_CR.R_INIT.
    Reset = 5,
    /// Reset, and sent a Startup IPI of the MLE's.
    Restarting = 6,
}

/// What CPUs know of each other.
struct Slot {
    state: AtomicU32,
    apic_id: AtomicU32,
    vector: AtomicU32,
    /// Its view of the APIC page is open for good.
    open: AtomicBool,
    /// Another CPU wants it to look at [`Slot::state`], and sent an INIT or SMI to have it do so.
    kicked: AtomicBool,
    /// That is because another kernel has begun: if its own turned the APIC off, it does not run on.
    replaced: AtomicBool,
}

impl Slot {
    fn is(&self, state: State) -> bool {
        self.state.load(Ordering::SeqCst) == state as u32
    }

    fn set(&self, state: State) {
        self.state.store(state as u32, Ordering::SeqCst);
    }

    /// Goes from one state to another; false if it was in neither of them.
    fn change(&self, from: State, to: State) -> bool {
        self.state.compare_exchange(from as u32, to as u32, Ordering::SeqCst, Ordering::SeqCst).is_ok()
    }

    fn id(&self) -> u32 {
        self.apic_id.load(Ordering::Relaxed)
    }
}

static SLOTS: [Slot; MAX_CPUS] = [const {
    Slot {
        state: AtomicU32::new(State::Absent as u32),
        apic_id: AtomicU32::new(0),
        vector: AtomicU32::new(0),
        open: AtomicBool::new(false),
        kicked: AtomicBool::new(false),
        replaced: AtomicBool::new(false),
    }
}; MAX_CPUS];
/// How many CPUs there are.
static COUNT: AtomicUsize = AtomicUsize::new(0);
static ARRIVED: AtomicU32 = AtomicU32::new(0);
static NEXT: AtomicU32 = AtomicU32::new(0);
static ROOT: AtomicU64 = AtomicU64::new(0);
/// Table of where each AP's stack begins.
static STACK_TABLE: AtomicU64 = AtomicU64::new(0);
/// Startup vector of the launch page.
static START_VECTOR: AtomicU32 = AtomicU32::new(0);
/// What each AP takes when it arrives, by its number.
static SETUPS: Mutex<Vec<Setup, MAX_CPUS>> = Mutex::new(Vec::new());

/// What an AP takes with it, each time that it starts.
#[derive(Clone)]
pub struct Setup {
    /// Its memory.
    pub memory: CpuMemory,
    /// The guest's tables, with this CPU's nested root.
    pub vm: Vm,
    /// Its view of registers.
    pub windows: Windows,
    /// Time.
    pub clock: TscClock,
    /// SMEP is there.
    pub smep: bool,
}

/// Why the APs did not come up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SmpError {
    /// Some of them did not arrive in time.
    Missing {
        /// Arrived.
        have: u32,
        /// Listed by the ACPI tables.
        want: u32,
    },
    /// The Startup IPI did not leave.
    Send,
    /// No memory for their stacks.
    OutOfMemory,
    /// The launch page cannot be mapped.
    Tables(hv::radix::Error),
}

impl core::fmt::Display for SmpError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::Missing { have, want } => write!(f, "{have} of {want} APs started"),
            Self::Send => f.write_str("the Startup IPI did not leave the local APIC"),
            Self::OutOfMemory => f.write_str("no memory for the APs' stacks"),
            Self::Tables(e) => write!(f, "launch page: {e}"),
        }
    }
}

fn offset(of: *const u8) -> u64 {
    (of as u64).wrapping_sub(&raw const ap_start as u64)
}

/// Starts all APs, one for each of `setups`, and waits until each is parked.
///
/// `page` is the launch page, writable now and made executable here; `own` are the MLE's tables.
pub fn start(
    setups: Vec<Setup, MAX_CPUS>,
    page: PhysRange,
    own: &hv::radix::Tables,
    pool: &mut PagePool,
    local: &Xapic<PhysWindow>,
    clock: &TscClock,
) -> Result<(), SmpError> {
    let want = u32::try_from(setups.len()).unwrap_or(u32::MAX);
    if let Some(bsp) = SLOTS.first() {
        bsp.apic_id.store(local.id(), Ordering::Relaxed);
        bsp.set(State::Running);
    }
    COUNT.store(setups.len().saturating_add(1), Ordering::Release);
    if want == 0 {
        return Ok(());
    }
    let stacks = pool.pages(1).ok_or(SmpError::OutOfMemory)?;
    for i in 0..u64::from(want) {
        let guard = pool.pages(STACK_PAGES + 1).ok_or(SmpError::OutOfMemory)?;
        paging::guard(pool, own, guard).map_err(SmpError::Tables)?;
        // SAFETY: entry `i` of a fresh page of the pool; at most 64 entries of 8 bytes.
        unsafe {
            (stacks as *mut u64)
                .wrapping_add(i as usize)
                .write(guard.wrapping_add((STACK_PAGES + 1) * PAGE_SIZE))
        };
    }
    ROOT.store(own.root(), Ordering::Release);
    STACK_TABLE.store(stacks, Ordering::Release);
    *SETUPS.lock() = setups;

    let base = page.start();
    let len = offset(&raw const ap_end) as usize;
    // SAFETY: the launch page is mapped writable, checked to be clear of everything else, and longer than the code.
    unsafe { core::ptr::copy_nonoverlapping(&raw const ap_start, base as *mut u8, len) };
    let low = |address: u64| address as u32; // the launch page is below 1 MiB
    let gdt = base.wrapping_add(GDT as u64);
    let params = Params {
        gdtr: [0, 31, gdt as u16, (gdt >> 16) as u16],
        gdt: [0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x00cf_9b00_0000_ffff],
        cr3: own.root(),
        counter: &raw const NEXT as u64,
        limit: want.into(),
        stacks,
        entry: entry as *const () as u64,
        jump32: [low(base.wrapping_add(offset(&raw const ap_32))), 0x18],
        jump64: [low(base.wrapping_add(offset(&raw const ap_64))), 0x08],
    };
    let at = base.wrapping_add(PARAMS_AT as u64) as *mut u8;
    // SAFETY: behind the first instruction of the copy, where the code leaves room for exactly this.
    unsafe { core::ptr::copy_nonoverlapping(params.as_bytes().as_ptr(), at, size_of::<Params>()) };
    let code = PhysRange::new(base, PAGE_SIZE).ok_or(SmpError::OutOfMemory)?;
    own.protect(pool, code, hv::radix::Rights::READ | hv::radix::Rights::EXEC).map_err(SmpError::Tables)?;
    // SAFETY: the page's old rights are forgotten; it was mapped and stays so.
    unsafe { x86::tlb::flush(base as usize) };

    const ALL_BUT_SELF: u32 = 3 << 18;
    let vector = (base >> 12) as u32;
    START_VECTOR.store(vector, Ordering::Relaxed);
    if senter::launched() {
        senter::rlp::release(base);
    } else {
        local
            .send(clock, ALL_BUT_SELF | 1 << 14 | delivery::STARTUP << 8 | vector, 0)
            .map_err(|_| SmpError::Send)?;
    }
    let arrived = || ARRIVED.load(Ordering::Acquire);
    poll_until(clock, ARRIVAL_BUDGET_US, || arrived() == want)
        .map_err(|_| SmpError::Missing { have: arrived(), want })
}

/// An AP's first Rust.
extern "sysv64" fn entry(index: u32) -> ! {
    let number = usize::try_from(index).unwrap_or(usize::MAX);
    if let Some(context) = gather::halted(number.saturating_add(1)) {
        gather::go_on(context);
    }
    let setup = SETUPS.lock().get(number).cloned();
    let number = number.saturating_add(1);
    let (Some(mut setup), Some(slot)) = (setup, SLOTS.get(number)) else {
        fatal::stop(MleError::Cpu, index as u16, format_args!("AP {index} has no set-up"))
    };
    // SAFETY: this CPU came from the start-up code with GIF clear (after SKINIT) or interrupts off, once; or it was reset,
    // and what it had from this memory before is gone with that.
    let loaded = smi::unlooked(|| unsafe { Loaded::new(setup.memory, false) });
    // SAFETY: the tables the CPU runs on already.
    unsafe { paging::activate(ROOT.load(Ordering::Acquire), setup.smep) };
    senter::unmask();
    // SAFETY: which are the MLE's.
    let (mut cpu, page) = match unsafe { loaded.enable(setup.vm.vendor) } {
        Ok(enabled) => enabled,
        Err(refusal) => fatal::stop(MleError::Cpu, index as u16, format_args!("AP {index}: {refusal}")),
    };
    // SAFETY: the APIC page is mapped uncached.
    let local = Xapic(unsafe { PhysWindow::new(apic::XAPIC_BASE, PAGE_SIZE as u32) });
    // SAFETY: CPL 0 on bare metal.
    let ports = unsafe { Ports::new() };
    let clock = setup.clock;
    slot.apic_id.store(local.id(), Ordering::Relaxed);
    smi::compare(local.id(), cpu.msrs());
    if cpu.sees_startup() {
        // It waits as a guest, and the Startup IPI is an exit.
        setup.windows.apic.set(View::Device);
        slot.open.store(true, Ordering::SeqCst);
        slot.set(State::Running);
        ARRIVED.fetch_add(1, Ordering::AcqRel);
        // SAFETY: this CPU's page, used here for the first time since it was reset.
        let mut vcpu =
            smi::with_vcpu(page, setup.vm.vendor, || unsafe { Vcpu::new(page, Role::Guest, &setup.vm) });
        vcpu.wait_for_startup();
        loop {
            run::guest(&mut cpu, &mut vcpu, &mut setup.windows, &local, &clock, ports, number);
        }
    }
    slot.set(State::Parked);
    ARRIVED.fetch_add(1, Ordering::AcqRel);
    loop {
        setup.windows.apic.set(View::Watched);
        slot.open.store(false, Ordering::SeqCst);
        local.quiet();
        while !slot.is(State::Starting) {
            gather::attend(number, slot, &mut cpu, &local, &clock);
            cpu.doze();
        }
        // The wake-up may still be on its way, and what came meanwhile is not the guest's: it was in INIT.
        cpu.take_interrupts();
        local.disable();
        let _ = (cpu.held_interrupts(), cpu.init_arrived(), cpu.nmi_arrived());
        slot.replaced.store(false, Ordering::SeqCst);
        // SAFETY: this CPU's, and the virtual CPU before it is gone.
        let mut vcpu =
            smi::with_vcpu(page, setup.vm.vendor, || unsafe { Vcpu::new(page, Role::Guest, &setup.vm) });
        vcpu.start_at(slot.vector.load(Ordering::Relaxed) as u8);
        slot.set(State::Running);
        run::guest(&mut cpu, &mut vcpu, &mut setup.windows, &local, &clock, ports, number);

        // The guest sent INIT, or stopped this CPU, and will send a Startup IPI.
        while !(slot.change(State::Running, State::Parked) || slot.change(State::Stopped, State::Parked)) {
            // It is an INIT that cannot be dropped, and is on its way.
            cpu.doze();
        }
        kick(number, cpu.redirects_init(), &local, &clock);
    }
}

/// Tells `visit` what each AP takes with it.
pub fn each_setup(visit: impl FnMut(&Setup)) {
    SETUPS.lock().iter().for_each(visit);
}

/// How many CPUs there are.
pub fn count() -> usize {
    COUNT.load(Ordering::Acquire)
}

/// All CPUs that there are.
fn slots() -> impl Iterator<Item = &'static Slot> {
    SLOTS.iter().take(COUNT.load(Ordering::Acquire))
}

/// The boot processor's APIC ID.
fn boot_id() -> u32 {
    SLOTS.first().map_or(0, Slot::id)
}

/// All CPUs but one whose view of the APIC page is open.
fn open_but(this: usize) -> impl Iterator<Item = &'static Slot> {
    let others = slots().enumerate().filter(move |(i, _)| *i != this).map(|(_, slot)| slot);
    others.filter(|slot| slot.open.load(Ordering::SeqCst))
}

/// Has all other CPUs that run the guest come out of it and take note: of whether it stopped them, and of who waits.
pub fn kick(this: usize, redirects_init: bool, local: &Xapic<PhysWindow>, clock: &TscClock) {
    // Intercepted by every guest CPU: the one is dropped, the other finds nothing to do.
    kick_each(open_but(this), redirects_init, local, clock);
}

/// The same, because another kernel begins on this CPU.
pub fn kick_replaced(this: usize, redirects_init: bool, local: &Xapic<PhysWindow>, clock: &TscClock) {
    open_but(this).for_each(|slot| slot.replaced.store(true, Ordering::SeqCst));
    kick(this, redirects_init, local, clock);
}

/// The same for some of them.
fn kick_each(
    which: impl Iterator<Item = &'static Slot>,
    redirects_init: bool,
    local: &Xapic<PhysWindow>,
    clock: &TscClock,
) {
    let mode = if redirects_init { delivery::INIT } else { delivery::SMI };
    let mut any = false;
    for slot in which {
        any = true;
        slot.kicked.store(true, Ordering::SeqCst);
        send(local, clock, mode << 8 | 1 << 14, slot.id());
    }
    if any && !redirects_init {
        // Firmware would wait for this CPU, too.
        send(local, clock, mode << 8 | 1 << 14, local.id());
    }
}

/// Sends a command of the MLE's. The guest may be between the two halves of one of its own.
fn send(local: &Xapic<PhysWindow>, clock: &TscClock, low: u32, destination: u32) {
    let half = local.0.read32(ICR_HIGH);
    // One that does not leave has no effect: whoever needs it waits for that with a limit.
    let _ = local.send(clock, low, destination);
    local.0.write32(ICR_HIGH, half);
}

/// Whether the guest may be about to start an AP: then its APIC page is watched.
fn any_waiting() -> bool {
    slots().any(|s| !(s.is(State::Running) || s.is(State::Absent) || s.is(State::Starting)))
}

/// Opens the view of the APIC page for good, if nothing is to be seen there.
pub fn open(index: usize, windows: &mut Windows) -> bool {
    let Some(slot) = SLOTS.get(index) else { return false };
    // This order, and the other one where a CPU comes to wait: one of the two sees the other.
    slot.open.store(true, Ordering::SeqCst);
    if any_waiting() {
        slot.open.store(false, Ordering::SeqCst);
        return false;
    }
    windows.apic.set(View::Device);
    true
}

/// What is due before the guest runs on. True if it must not: an INIT came for it, its kernel is gone, or the first CPU is wanted
/// alone, and is.
pub fn before_run(
    index: usize,
    cpu: &mut Cpu,
    vcpu: &mut Vcpu<'_>,
    windows: &mut Windows,
    local: &Xapic<PhysWindow>,
    clock: &TscClock,
) -> bool {
    let Some(slot) = SLOTS.get(index) else { return false };
    if slot.kicked.swap(false, Ordering::SeqCst) {
        look(index, local);
        if cpu.redirects_init() {
            // It may still be on its way, and must not be taken for one of the guest's.
            let _ = poll_until(clock, KICK_BUDGET_US, || {
                cpu.let_pending_in();
                cpu.init_arrived()
            });
        }
        if slot.replaced.swap(false, Ordering::SeqCst) && slot.is(State::Stopped) {
            return true;
        }
    } else if cpu.init_arrived() && index != 0 {
        return true;
    }
    if index == 0 {
        if gather::ends() {
            fatal::end(meet(index, cpu, local, clock), clock);
        }
        if gather::alone(cpu, local, clock) {
            return true;
        }
    } else {
        gather::attend(index, slot, cpu, local, clock);
    }
    if any_waiting() {
        if slot.open.load(Ordering::SeqCst) {
            windows.apic.set(View::Watched);
            vcpu.flush_nested();
            slot.open.store(false, Ordering::SeqCst);
        }
        restart_reset(local, clock);
    }
    vcpu.exit_on_halt(slot.is(State::Stopped));
    false
}

/// Takes note of whether the guest has turned this CPU's APIC off. Gives whether it has just done so.
pub fn look(index: usize, local: &Xapic<PhysWindow>) -> bool {
    // The boot processor starts at its firmware after an INIT: that is a reset, and no matter of ours.
    let Some(slot) = SLOTS.get(index).filter(|_| index != 0) else { return false };
    match local.is_enabled() {
        true => {
            slot.change(State::Stopped, State::Running);
            false
        }
        false => slot.change(State::Running, State::Stopped),
    }
}

/// Starts into the MLE what an INIT has reset.
fn restart_reset(local: &Xapic<PhysWindow>, clock: &TscClock) {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let Some(_one) = ONE_AT_A_TIME.try_lock() else { return };
    for (number, slot) in (0u32..).zip(slots().skip(1)) {
        if !slot.change(State::Reset, State::Restarting) {
            continue;
        }
        NEXT.store(number, Ordering::Release);
        let command = 1 << 14 | delivery::STARTUP << 8 | START_VECTOR.load(Ordering::Relaxed);
        send(local, clock, command, slot.id());
        // It may not have come to its reset yet: then the command is lost, and sent again at the next occasion.
        let _ = poll_until(clock, RESTART_BUDGET_US, || !slot.is(State::Restarting));
        slot.change(State::Restarting, State::Reset);
    }
}

/// Carries out an interrupt command of the guest, written while the APIC page is watched.
pub fn command(command: Command, redirects_init: bool, local: &Xapic<PhysWindow>, clock: &TscClock) {
    let this = local.id();
    let reached = || slots().filter(|slot| command.reaches(slot.id(), this));
    match command.mode() {
        delivery::INIT if command.is_deassert() => {}
        // INIT to a parked CPU finds it where it should be.
        delivery::INIT => {
            // One for the boot processor is dropped: it would reset the machine.
            let to = if redirects_init { State::Stopped } else { State::Reset };
            for slot in reached().filter(|slot| slot.id() != boot_id()) {
                if slot.change(State::Running, to) || slot.is(State::Stopped) {
                    slot.change(State::Stopped, to);
                    let _ = local.send(clock, 1 << 14 | delivery::INIT << 8, slot.id());
                }
            }
            restart_reset(local, clock);
        }
        delivery::STARTUP => {
            let runs = |slot: &Slot| slot.is(State::Running) || slot.is(State::Starting);
            for slot in reached().filter(|slot| !runs(slot)) {
                // An INIT just before takes it some time to be parked.
                let _ = poll_until(clock, PARK_BUDGET_US, || {
                    restart_reset(local, clock);
                    slot.is(State::Parked)
                });
                slot.vector.store(command.vector().into(), Ordering::Relaxed);
                if slot.change(State::Parked, State::Starting) {
                    // A wake-up that does not leave keeps the AP parked, as a lost Startup IPI would.
                    let _ = local.send(clock, u32::from(trap::WAKE_VECTOR) | 1 << 14, slot.id());
                }
            }
        }
        // An SMI is not the guest's to raise.
        delivery::SMI => smi::ipi_dropped(this, clock),
        _ => {
            // As the guest wrote it; it waits for delivery itself.
            let _ = local.send(clock, command.low, command.destination);
        }
    }
}
