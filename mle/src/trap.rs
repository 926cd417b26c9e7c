//! Descriptor tables of the MLE: one GDT, TSS and set of interrupt stacks per CPU, one IDT for all.
//!
//! The MLE takes no interrupts by intent. What can arrive, in the short windows with GIF set: an NMI (kept for the
//! guest), #SX for a redirected INIT, the wake-up of a parked AP and the timer's, and while the timer is the MLE's what other
//! CPUs send to the guest. An interrupt of any other vector, which only an 8259 or a device can have sent by ExtINT past the task
//! priority, is noted and lost. Everything else is a fault of ours, and fatal.
//!
//! UNSAFETY: loading descriptor tables and the entry code of the vectors.
#![expect(unsafe_code, reason = "the hardware edge")]

use core::arch::{asm, naked_asm};
use core::cell::UnsafeCell;
use core::mem::offset_of;
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use hv::addr::PhysRange;
use x86::bits64::task::TaskStateSegment;
use zerocopy::IntoBytes;

/// Vector of the IPI that wakes a parked AP, and of the timer while it is the MLE's.
pub const WAKE_VECTOR: u8 = 0xf0;
/// Vector of #SX: an INIT that VM_CR.R_INIT redirected.
const SX_VECTOR: u64 = 30;
const NMI_VECTOR: u64 = 2;
const RFLAGS_IF: u64 = 1 << 9;

/// Selector of 64-bit code.
pub const CODE: u16 = 0x08;
/// Selector of data.
pub const DATA: u16 = 0x10;
/// Selector of the TSS.
pub const TSS: u16 = 0x18;

/// What interrupt handlers tell the CPU they ran on. GS points to it.
#[repr(C)]
#[derive(Default)]
pub struct Arrived {
    /// An NMI came while the MLE ran: the guest gets it.
    pub nmi: AtomicBool,
    /// A redirected INIT came.
    pub init: AtomicBool,
    /// The CPU is in VMX root operation.
    pub vmx: AtomicBool,
    /// Interrupts of the top priority class that came for the guest while the MLE had the timer: a bit for each vector from
    /// E0h on.
    pub held: AtomicU32,
    /// The latest interrupt that was lost: its vector and [`LOST`].
    pub lost: AtomicU32,
}

/// [`Arrived::lost`] holds one.
pub const LOST: u32 = 1 << 8;

/// Descriptor tables of one CPU.
#[repr(C, align(16))]
pub struct Tables {
    gdt: [u64; 5],
    tss: TaskStateSegment,
}

/// Where a CPU's tables are.
#[derive(Clone, Copy, Debug)]
pub struct Bases {
    /// GDT.
    pub gdt: u64,
    /// IDT.
    pub idt: u64,
    /// TSS.
    pub tss: u64,
    /// [`Arrived`].
    pub arrived: u64,
}

/// Interrupt stack table slots in use.
pub const IST_STACKS: usize = 5;

/// One gate of the IDT. Spec: \[APM2\] "Long-Mode Interrupt-Gate and Trap-Gate Descriptors".
#[derive(Clone, Copy)]
#[repr(C)]
struct Gate {
    low: u64,
    high: u64,
}

#[repr(C, align(4096))]
struct Idt(UnsafeCell<[Gate; 256]>);
// SAFETY: written once by the BSP before any other CPU runs (`build_idt`), only read by CPUs afterwards.
unsafe impl Sync for Idt {}
static IDT: Idt = Idt(UnsafeCell::new([Gate { low: 0, high: 0 }; 256]));

/// Where the IDT is, which stays as it is.
pub fn idt() -> Option<PhysRange> {
    PhysRange::new(IDT.0.get() as u64, size_of::<Idt>() as u64)
}

/// Bytes between the entry points of two vectors.
const STUB_SIZE: u64 = 8;

/// Entry points of all 256 vectors: push the vector, of which the low byte counts (PUSH extends its sign), and go where it
/// is known whether the CPU pushed an error code before.
#[unsafe(naked)]
unsafe extern "C" fn stubs() {
    naked_asm!(
        ".set vector, 0",
        ".rept 256",
        ".balign 8",
        ".if vector < 128",
        "push vector",
        ".else",
        "push vector - 256",
        ".endif",
        ".if vector == 8 || (vector >= 10 && vector <= 14) || vector == 17 || vector == 21 || vector == 29 || vector == 30",
        "jmp {with_error}",
        ".else",
        "jmp {without_error}",
        ".endif",
        ".set vector, vector + 1",
        ".endr",
        with_error = sym with_error,
        without_error = sym without_error,
    )
}

/// An exception pushes an error code. An interrupt by the same vector does not: there CS is where RIP would be, and no code is
/// at that address.
#[unsafe(naked)]
unsafe extern "C" fn with_error() {
    naked_asm!(
        "cmp qword ptr [rsp + 16], {code}",
        "jne {common}",
        "jmp {without_error}",
        code = const CODE,
        common = sym common,
        without_error = sym without_error,
    )
}

/// Puts 0 where the CPU pushes an error code, below the vector.
#[unsafe(naked)]
unsafe extern "C" fn without_error() {
    naked_asm!("push [rsp]", "mov qword ptr [rsp + 8], 0", "jmp {common}", common = sym common)
}

/// What the stubs and the CPU pushed.
#[derive(Debug)]
#[repr(C)]
pub struct Frame {
    /// R11, R10, R9, R8, RSI, RDI, RDX, RCX, RAX: what a call may clobber.
    pub scratch: [u64; 9],
    /// Vector.
    pub vector: u64,
    /// Error code or 0.
    pub error: u64,
    /// RIP.
    pub rip: u64,
    /// CS.
    pub cs: u64,
    /// RFLAGS.
    pub rflags: u64,
    /// RSP.
    pub rsp: u64,
    /// SS.
    pub ss: u64,
}

#[unsafe(naked)]
unsafe extern "C" fn common() {
    // Entered with RSP 16-byte aligned: five words from the CPU, error code, vector, nine registers are sixteen.
    naked_asm!(
        "push rax", "push rcx", "push rdx", "push rdi", "push rsi", "push r8", "push r9", "push r10", "push r11",
        "movzx eax, byte ptr [rsp + {vector}]",
        "mov [rsp + {vector}], rax",
        "cld",
        "mov rdi, rsp",
        "call {handler}",
        "pop r11", "pop r10", "pop r9", "pop r8", "pop rsi", "pop rdi", "pop rdx", "pop rcx", "pop rax",
        "add rsp, 16",
        "iretq",
        vector = const offset_of!(Frame, vector),
        handler = sym handler,
    )
}

/// Called for faults of the MLE; set once.
static FATAL: AtomicU64 = AtomicU64::new(0);

/// Says what ends the machine when the MLE itself faults.
pub fn on_fatal(handler: fn(&Frame) -> !) {
    FATAL.store(handler as usize as u64, Ordering::Release);
}

extern "sysv64" fn handler(frame: &Frame) {
    match frame.vector {
        NMI_VECTOR => {
            let arrived = arrived();
            arrived.nmi.store(true, Ordering::Relaxed);
            if arrived.vmx.load(Ordering::Relaxed) {
                crate::backend::nmi_arrived();
            }
        }
        SX_VECTOR => arrived().init.store(true, Ordering::Relaxed),
        v if v == u64::from(WAKE_VECTOR) => end_of_interrupt(),
        v if v > u64::from(WAKE_VECTOR) => {
            arrived().held.fetch_or(1 << (v & 31), Ordering::Relaxed);
            end_of_interrupt();
        }
        // The MLE takes interrupts at instructions that do not fault, and runs all others with interrupts off.
        v if frame.rflags & RFLAGS_IF != 0 => arrived().lost.store(LOST | v as u32, Ordering::Relaxed),
        _ => {
            let fatal = FATAL.load(Ordering::Acquire);
            if fatal != 0 {
                // SAFETY: the only value ever stored besides 0 is a function of this type (`on_fatal`).
                let fatal: fn(&Frame) -> ! = unsafe { core::mem::transmute(fatal as usize) };
                fatal(frame)
            }
            loop {
                // SAFETY: nothing is left to do on this CPU.
                unsafe { x86::halt() }
            }
        }
    }
}

/// Acknowledges the wake-up IPI.
fn end_of_interrupt() {
    const EOI: u32 = 0xb0;
    use hv::io::Mmio;
    // SAFETY: the wake-up is sent through the xAPIC page at its fixed address, which the MLE maps uncached.
    let apic = unsafe { crate::metal::PhysWindow::new(crate::apic::XAPIC_BASE, 0x1000) };
    apic.write32(EOI, 0);
}

/// This CPU's [`Arrived`].
pub fn arrived() -> &'static Arrived {
    let this: u64;
    // SAFETY: `Tables::load` pointed GS at an `Arrived` that lives for ever; its first word is read through GS only
    // to compute nothing: the base itself is read from the MSR.
    unsafe { this = x86::msr::rdmsr(x86::msr::IA32_GS_BASE) };
    // SAFETY: as above; the fields are atomics, so sharing with the handlers is sound.
    unsafe { &*(this as *const Arrived) }
}

fn build_idt() {
    let base = stubs as *const () as u64;
    for (vector, slot) in (0u64..256).zip(
        // SAFETY: called on the BSP before any other CPU runs and before the table is loaded.
        unsafe { (*IDT.0.get()).iter_mut() },
    ) {
        let address = base.wrapping_add(vector.wrapping_mul(STUB_SIZE));
        // A stack each for what can interrupt what: NMI, double fault, machine check, #SX and wake-up, the rest.
        let ist: u64 = match vector {
            NMI_VECTOR => 2,
            8 => 3,
            18 => 4,
            v if v == SX_VECTOR || v == u64::from(WAKE_VECTOR) => 5,
            _ => 1,
        };
        *slot = Gate {
            low: address & 0xffff
                | u64::from(CODE) << 16
                | ist << 32
                | 0x8e << 40
                | (address >> 16 & 0xffff) << 48,
            high: address >> 32,
        };
    }
}

impl Tables {
    /// Fills in and loads this CPU's tables. `stacks` are the tops of the interrupt stacks.
    ///
    /// # Safety
    /// At CPL 0 in 64-bit mode, GIF clear; `self` and `arrived` live for ever and are this CPU's alone; the stacks
    /// are mapped, writable and nobody else's. `first` on the first CPU only, before the others run.
    pub unsafe fn load(
        &'static mut self,
        arrived: &'static Arrived,
        stacks: [u64; IST_STACKS],
        first: bool,
    ) -> Bases {
        if first {
            build_idt();
        }
        self.tss = TaskStateSegment::new();
        for (i, top) in stacks.into_iter().enumerate() {
            self.tss.set_ist(i, top);
        }
        let tss = &raw const self.tss as u64;
        let limit = size_of::<TaskStateSegment>().saturating_sub(1) as u64;
        self.gdt = [
            0,
            0x00af_9b00_0000_ffff,
            0x00cf_9300_0000_ffff,
            limit | (tss & 0xff_ffff) << 16 | 0x89 << 40 | (tss >> 24 & 0xff) << 56,
            tss >> 32,
        ];
        let gdt = pointer(self.gdt.as_ptr() as u64, size_of_val(&self.gdt));
        let idt = pointer(IDT.0.get() as u64, size_of::<Idt>());
        // SAFETY: both tables were filled in above and live for ever; the far return reloads CS from the new GDT
        // with the same flat 64-bit code the CPU runs already.
        unsafe {
            asm!(
                "lgdt [{gdt}]",
                "lidt [{idt}]",
                "push {code}",
                "lea {tmp}, [rip + 2f]",
                "push {tmp}",
                "retfq",
                "2:",
                "mov ds, {data:x}",
                "mov es, {data:x}",
                "mov ss, {data:x}",
                "xor {tmp:e}, {tmp:e}",
                "mov fs, {tmp:x}",
                "mov gs, {tmp:x}",
                "lldt {tmp:x}",
                "ltr {tss:x}",
                gdt = in(reg) gdt.as_bytes().as_ptr(),
                idt = in(reg) idt.as_bytes().as_ptr(),
                code = const CODE,
                data = in(reg) u64::from(DATA),
                tss = in(reg) u64::from(TSS),
                tmp = out(reg) _,
            );
            x86::msr::wrmsr(x86::msr::IA32_GS_BASE, arrived as *const Arrived as u64);
        }
        Bases {
            gdt: self.gdt.as_ptr() as u64,
            idt: IDT.0.get() as u64,
            tss,
            arrived: arrived as *const Arrived as u64,
        }
    }
}

/// The operand of LGDT and LIDT: limit, base.
fn pointer(base: u64, size: usize) -> [u8; 10] {
    let mut bytes = [0; 10];
    let (limit, address) = bytes.split_at_mut(2);
    limit.copy_from_slice(&(size.saturating_sub(1) as u16).to_le_bytes());
    address.copy_from_slice(&base.to_le_bytes());
    bytes
}
