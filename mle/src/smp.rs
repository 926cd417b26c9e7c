//! Application processors: started once by the MLE, parked in it, handed to the guest when it sends a Startup IPI.
//!
//! After SKINIT an AP waits for a Startup IPI and must get no INIT. The MLE starts them all before the guest runs, so
//! that none can be started past it, and parks them in HLT with GIF set: an SMI must find all CPUs able to
//! meet. While an AP is parked the guest's APIC page is watched, see [`crate::guest::apic_window`].
//!
//! UNSAFETY: the start-up code, and the pages that it runs from.
#![expect(unsafe_code, reason = "the hardware edge")]

use core::arch::global_asm;
use core::mem::offset_of;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use heapless::Vec;
use hv::addr::{PAGE_SIZE, PhysRange};
use hv::failure::MleError;
use hv::io::poll_until;
use spin::Mutex;
use svm::vcpu::{Machine as VmTables, Role, SvmVcpu};
use zerocopy::{Immutable, IntoBytes};

use crate::apic::{Command, Xapic, delivery};
use crate::cpu::{Cpu, CpuMemory};
use crate::guest::apic_window::ApicWindow;
use crate::metal::{PhysWindow, Ports, TscClock};
use crate::pool::PagePool;
use crate::{apic, fatal, paging, run, trap};

/// Most CPUs.
pub const MAX_CPUS: usize = 64;
/// Pages of an AP's stack, under a guard page.
const STACK_PAGES: u64 = 16;
/// Longest wait for all APs to arrive, in microseconds: real ones take some hundred.
const ARRIVAL_BUDGET_US: u64 = 2_000_000;

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
const GDTR: usize = PARAMS_AT + offset_of!(Params, gdtr) + 2;
const GDT: usize = PARAMS_AT + offset_of!(Params, gdt);
const CR3: usize = PARAMS_AT + offset_of!(Params, cr3);
const COUNTER: usize = PARAMS_AT + offset_of!(Params, counter);
const LIMIT: usize = PARAMS_AT + offset_of!(Params, limit);
const STACKS: usize = PARAMS_AT + offset_of!(Params, stacks);
const ENTRY: usize = PARAMS_AT + offset_of!(Params, entry);
const JUMP32: usize = PARAMS_AT + offset_of!(Params, jump32);
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
}

/// What CPUs know of each other.
struct Slot {
    state: AtomicU32,
    apic_id: AtomicU32,
    vector: AtomicU32,
}

static SLOTS: [Slot; MAX_CPUS] = [const {
    Slot {
        state: AtomicU32::new(State::Absent as u32),
        apic_id: AtomicU32::new(0),
        vector: AtomicU32::new(0),
    }
}; MAX_CPUS];
static ARRIVED: AtomicU32 = AtomicU32::new(0);
static NEXT: AtomicU32 = AtomicU32::new(0);
static ROOT: AtomicU64 = AtomicU64::new(0);
static SETUPS: Mutex<Vec<Setup, MAX_CPUS>> = Mutex::new(Vec::new());

/// What an AP takes with it.
pub struct Setup {
    /// Its memory.
    pub memory: CpuMemory,
    /// The guest's tables, with this CPU's nested root.
    pub vm: VmTables,
    /// Its view of the APIC page.
    pub window: ApicWindow,
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
        bsp.state.store(State::Running as u32, Ordering::Release);
    }
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
    local
        .send(clock, ALL_BUT_SELF | 1 << 14 | delivery::STARTUP << 8 | vector, 0)
        .map_err(|_| SmpError::Send)?;
    let arrived = || ARRIVED.load(Ordering::Acquire);
    poll_until(clock, ARRIVAL_BUDGET_US, || arrived() == want)
        .map_err(|_| SmpError::Missing { have: arrived(), want })
}

/// An AP's first Rust.
extern "sysv64" fn entry(index: u32) -> ! {
    let setup = SETUPS.lock().pop();
    let Some(Setup { memory, vm, mut window, clock, smep }) = setup else {
        fatal::stop(MleError::Cpu, index as u16, format_args!("AP {index} has no set-up"))
    };
    // SAFETY: this CPU came from the start-up code with GIF clear (after SKINIT) or interrupts off, once.
    let (mut cpu, vmcb) = unsafe { Cpu::load(memory, false) };
    // SAFETY: the tables the CPU runs on already.
    unsafe { paging::activate(ROOT.load(Ordering::Acquire), smep) };
    cpu.enable_svm();
    // SAFETY: the APIC page is mapped uncached.
    let local = Xapic(unsafe { PhysWindow::new(apic::XAPIC_BASE, PAGE_SIZE as u32) });
    let slot = usize::try_from(index).ok().and_then(|i| SLOTS.get(i.checked_add(1)?));
    let Some(slot) = slot else {
        fatal::stop(MleError::Cpu, index as u16, format_args!("AP {index} is one too many"))
    };
    slot.apic_id.store(local.id(), Ordering::Relaxed);
    slot.state.store(State::Parked as u32, Ordering::Release);
    local.enable();
    ARRIVED.fetch_add(1, Ordering::AcqRel);
    while slot.state.load(Ordering::Acquire) != State::Starting as u32 {
        cpu.doze();
    }
    local.disable();
    let mut vcpu = SvmVcpu::new(vmcb, Role::Guest, &vm);
    vcpu.start_at(slot.vector.load(Ordering::Relaxed) as u8);
    slot.state.store(State::Running as u32, Ordering::Release);
    // SAFETY: CPL 0 on bare metal.
    let ports = unsafe { Ports::new() };
    let number = usize::try_from(index).unwrap_or(0).saturating_add(1);
    run::guest(&mut cpu, &mut vcpu, &mut window, &local, &clock, ports, number)
}

/// Whether an AP still waits for the guest.
pub fn any_parked() -> bool {
    SLOTS.iter().any(|s| s.state.load(Ordering::Acquire) == State::Parked as u32)
}

/// Carries out an interrupt command of the guest, written while the APIC page is watched.
pub fn command(command: Command, local: &Xapic<PhysWindow>, clock: &TscClock) {
    let this = local.id();
    match command.mode() {
        // INIT to a parked CPU finds it where it should be; running ones are not re-started while others are parked.
        delivery::INIT => {}
        delivery::STARTUP => {
            for slot in &SLOTS {
                let id = slot.apic_id.load(Ordering::Relaxed);
                if command.reaches(id, this) && slot.state.load(Ordering::Acquire) == State::Parked as u32 {
                    slot.vector.store(command.vector().into(), Ordering::Relaxed);
                    slot.state.store(State::Starting as u32, Ordering::Release);
                    // A wake-up that does not leave keeps the AP parked, as a lost Startup IPI would.
                    let _ = local.send(clock, u32::from(trap::WAKE_VECTOR) | 1 << 14, id);
                }
            }
        }
        // An SMI is not the guest's to raise.
        delivery::SMI => {}
        _ => {
            // As the guest wrote it; it waits for delivery itself.
            let _ = local.send(clock, command.low, command.destination);
        }
    }
}
