//! The image: entry, exceptions, the hardware behind [`mle::slb`], and the jump to the MLE.
//!
//! UNSAFETY: the first Rust code after SKINIT. It turns addresses that the linker script and the CPU vouch for
//! into references, loads control registers, and hands the instruction pointer on.
#![expect(unsafe_code, reason = "the hardware edge")]

use core::arch::x86_64::__cpuid;
use core::arch::{asm, global_asm};
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use hv::addr::{FOUR_GIB, PhysRange};
use hv::failure::SlbError;
use hv::io::{Clock, PhysMem, PortIo};
use hv::launch::{Handoff, SLB_SIZE, SLB_SLRT_POINTER_OFFSET};
use hv::slrt::MAX_SIZE;
use iommu::Platform;
use mle::metal::{Identity, Msrs, PhysWindow, Ports, Serial, TscClock};
use mle::slb::launch::{Buffers, IVRS_MAX, Launch, Slb, launch};
use mle::slb::paging::{Layout, PAT_RESET, Tables, UNCACHED_FROM};
use mle::slb::space::Space;
use mle::slb::{Failure, stop, timer};
use x86::dtables::DescriptorTablePointer;

const DATA: u32 = 0x10;
const CODE64: u16 = 0x18;

global_asm!(
    include_str!("entry.s"),
    slrt_pointer = const SLB_SLRT_POINTER_OFFSET,
    data = const DATA,
    code64 = const CODE64,
    present_write = const 3,
    present_write_large = const 0x83,
    // PE, ET, NE, WP, PG; PAE; LME and NXE.
    cr0 = const 0x8001_0031_u32,
    cr4 = const 0x20,
    efer = const 0xc000_0080_u32,
    efer_value = const 0x900,
    pat = const 0x277,
    pat_low = const PAT_RESET as u32,
    pat_high = const (PAT_RESET >> 32) as u32,
);

/// Ticks per millisecond, once known. Before, more than any CPU has: waits are then too long and still end.
static TSC_KHZ: AtomicU64 = AtomicU64::new(0);
const KHZ_UNKNOWN: u64 = 20_000_000;
/// A failure is being handled; another one resets at once.
static FAILING: AtomicBool = AtomicBool::new(false);

fn clock() -> TscClock {
    match TSC_KHZ.load(Ordering::Relaxed) {
        0 => TscClock { khz: KHZ_UNKNOWN },
        khz => TscClock { khz },
    }
}

fn ports() -> Ports {
    // SAFETY: this image runs at CPL 0 on bare metal, and on one CPU.
    unsafe { Ports::new() }
}

/// Not on the stack: it has room for one such buffer.
static mut IVRS: [u8; IVRS_MAX] = [0; IVRS_MAX];

/// First Rust code: long mode, one GiB mapped, the stack at the top of the SLB, the scratch half zeroed. `tables`
/// are the page tables in use, `measured` the bytes of the measured part.
#[unsafe(no_mangle)]
extern "C" fn slb_main(base: u64, slrt_pointer: u64, tables: &mut Tables, measured: u64) -> ! {
    let idt = exception_table();
    load_exception_table(&idt);
    let layout = Layout { slb: base, measured };
    tables.fill(&raw const *tables as u64, &layout);
    load_tables(tables);

    let mut slrt = [0; MAX_SIZE];
    let ivrs = &raw mut IVRS;
    // SAFETY: this function runs once and nobody else names the buffer.
    let buffers = Buffers { slrt: &mut slrt, ivrs: unsafe { &mut *ivrs } };
    match run(slrt_pointer, &layout, buffers) {
        Ok(launch) => {
            tables.allow_execute(&launch.image);
            load_tables(tables);
            Serial(ports()).text("slb: entering the MLE\n");
            enter(&launch.handoff, launch.entry)
        }
        Err(failure) => give_up(failure),
    }
}

fn run(slrt_pointer: u64, layout: &Layout, buffers: Buffers<'_>) -> Result<Launch, Failure> {
    Serial(ports()).text("slb: started\n");
    /// 8000_0001h EDX.
    const GIB_PAGES: u32 = 1 << 26;
    if __cpuid(0x8000_0001).edx & GIB_PAGES == 0 {
        return Err(Failure { error: SlbError::NoGibPages, detail: 0 });
    }
    let base = layout.slb;
    // SAFETY: as for `ports`; `Space` only reads.
    let space = Space::read(&unsafe { Msrs::new() })?;
    let range = match PhysRange::new(base, SLB_SIZE) {
        Some(range) if base.is_multiple_of(SLB_SIZE) && space.is_ram(&range) => range,
        _ => return Err(Failure { error: SlbError::SlbBase, detail: (base >> 16) as u16 }),
    };
    // SAFETY: RDTSC reads a counter.
    let tsc_khz = timer::tsc_khz(&ports(), || unsafe { core::arch::x86_64::_rdtsc() })?;
    TSC_KHZ.store(tsc_khz, Ordering::Relaxed);
    // SAFETY: `Tables` maps all below 4 GiB one to one, writable but for the SLB's measured part and guard page,
    // which like all our objects lie in the SLB.
    let memory = unsafe { Identity::new(FOUR_GIB, (base, SLB_SIZE)) };
    let machine = Machine { memory, space };
    // SAFETY: these bytes are mapped read-only for as long as we run, so nothing changes them.
    let measured = unsafe { core::slice::from_raw_parts(base as *const u8, layout.measured as usize) };
    launch(&machine, clock(), &machine.space, &Slb { range, measured, slrt_pointer }, tsc_khz, buffers)
}

/// The machine as [`mle::slb::launch`] sees it.
struct Machine {
    memory: Identity,
    space: Space,
}

impl PhysMem for Machine {
    fn read(&self, addr: u64, out: &mut [u8]) -> bool {
        PhysRange::new(addr, out.len() as u64).is_some_and(|range| self.space.is_readable(&range))
            && self.memory.read(addr, out)
    }
    fn write(&self, addr: u64, data: &[u8]) -> bool {
        PhysRange::new(addr, data.len() as u64).is_some_and(|range| self.space.is_ram(&range))
            && self.memory.write(addr, data)
    }
}

impl PortIo for Machine {
    fn in8(&self, port: u16) -> u8 {
        ports().in8(port)
    }
    fn in16(&self, port: u16) -> u16 {
        ports().in16(port)
    }
    fn in32(&self, port: u16) -> u32 {
        ports().in32(port)
    }
    fn out8(&self, port: u16, value: u8) {
        ports().out8(port, value);
    }
    fn out16(&self, port: u16, value: u16) {
        ports().out16(port, value);
    }
    fn out32(&self, port: u16, value: u32) {
        ports().out32(port, value);
    }
}

impl Clock for Machine {
    fn now_us(&self) -> u64 {
        clock().now_us()
    }
}

impl Platform for Machine {
    type Window = PhysWindow;

    fn map(&self, base: u64, len: u32) -> Option<PhysWindow> {
        let end = base.checked_add(len.into())?;
        // SAFETY: `Tables` maps what lies between the two limits one to one and uncached, and no object of ours is
        // there unless the SLB itself is, which no window may overlap.
        (base >= UNCACHED_FROM && end <= FOUR_GIB).then(|| unsafe { PhysWindow::new(base, len) })
    }

    fn random(&self) -> u64 {
        /// 1 ECX.
        const RDRAND: u32 = 1 << 30;
        let mut value = 0_u64;
        if __cpuid(1).ecx & RDRAND != 0 {
            // SAFETY: the CPU has the instruction. When it has no number at hand it gives 0, and the counter must do.
            unsafe { asm!("rdrand {}", out(reg) value, options(nomem, nostack)) };
        }
        // SAFETY: RDTSC reads a counter.
        value ^ unsafe { core::arch::x86_64::_rdtsc() }.wrapping_mul(0x9e37_79b9_7f4a_7c15)
    }
}

type ExceptionTable = [[u64; 2]; 32];

/// Interrupt gates to the two stubs in `entry.s`: present, 64-bit, on the current stack.
///
/// Spec: \[APM2\] "Interrupt-Gate and Trap-Gate Descriptors—Long Mode", "Exceptions and Interrupts", error codes.
fn exception_table() -> ExceptionTable {
    /// Vectors 8, 10 to 14, 17, 21, 29, 30 push an error code.
    const WITH_CODE: u32 = 0x6022_7d00;
    let (plain, with_code): (u64, u64);
    // SAFETY: computes two addresses.
    unsafe {
        asm!(
            "lea {}, [rip + slb_exception]",
            "lea {}, [rip + slb_exception_with_code]",
            out(reg) plain, out(reg) with_code,
            options(nomem, nostack),
        );
    }
    let mut codes = WITH_CODE;
    [(); 32].map(|()| {
        let stub = if codes & 1 != 0 { with_code } else { plain };
        codes >>= 1;
        // The SLB lies below 4 GiB: the upper half of the address is zero.
        [stub & 0xffff | (stub & 0xffff_0000) << 32 | 0x8e00 << 32 | u64::from(CODE64) << 16, 0]
    })
}

/// Makes `table` the CPU's; its owner, [`slb_main`], does not return.
fn load_exception_table(table: &ExceptionTable) {
    let pointer = DescriptorTablePointer::new(table);
    // SAFETY: the gates lead to our stubs, in our code segment.
    unsafe { x86::dtables::lidt(&pointer) };
}

fn load_tables(tables: &Tables) {
    // SAFETY: `Tables::fill` maps our code, data and stack where they are.
    unsafe { x86::controlregs::cr3_write(Tables::root_at(&raw const *tables as u64)) };
}

/// Jumps to the MLE: RDI is the handoff's address. It lies on our stack, which nobody uses any more.
fn enter(handoff: &Handoff, entry: u64) -> ! {
    // SAFETY: `launch` measured the image around `entry` and found the entry point inside; its pages are executable.
    unsafe { asm!("jmp {}", in(reg) entry, in("rdi") &raw const *handoff, options(noreturn)) }
}

/// An exception in our own code, at `rip`.
#[unsafe(no_mangle)]
extern "C" fn slb_fault(rip: u64) -> ! {
    // The SLB's base is a multiple of 64 KiB.
    give_up(Failure { error: SlbError::Exception, detail: rip as u16 })
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    give_up(Failure { error: SlbError::Panic, detail: 0 })
}

fn give_up(failure: Failure) -> ! {
    if FAILING.swap(true, Ordering::Relaxed) {
        stop::reset(&ports());
    } else {
        stop::stop(&ports(), failure, || {
            // SAFETY: whoever used the TPM does not come back; its registers are in the last GiB, which is mapped
            // uncached from the DRAM's end on.
            stop::cap(unsafe { PhysWindow::new(tpm::BASE, tpm::WINDOW_SIZE) }, clock());
        });
    }
    let none: ExceptionTable = [[0; 2]; 32];
    load_exception_table(&none);
    // SAFETY: an exception without a handler is a shutdown: the last way to a reset, and no code runs after it.
    unsafe { asm!("ud2", options(noreturn)) }
}
