//! The hardware, as the firmware leaves it to us: mapped one to one, at CPL 0.
//!
//! UNSAFETY: instructions and volatile accesses that the compiler can't check. All of it leans on one fact: this is
//! a UEFI application, and UEFI runs applications at CPL 0 with all memory and device registers mapped one to one
//! (\[UEFI\] "x64 Platforms").
#![expect(unsafe_code, reason = "the hardware edge")]

use core::arch::asm;
use core::fmt;
use core::time::Duration;

use hv::addr::PAGE_SIZE;
use hv::io::{Clock, Mmio, Msr, PhysMem, PortIo};
use loader::screen::{Channel, Mode};
use uefi::boot::{self, OpenProtocolAttributes, OpenProtocolParams};
use uefi::proto::console::gop::{GraphicsOutput, PixelFormat};

/// The MSRs of this CPU.
pub struct Msrs;

impl Msr for Msrs {
    fn rdmsr(&self, index: u32) -> u64 {
        // SAFETY: CPL 0; the trait's contract: the register exists.
        unsafe { x86::msr::rdmsr(index) }
    }
    fn wrmsr(&self, index: u32, value: u64) {
        // SAFETY: as above; the registers written are the x2APIC's interrupt command and, with caches off and the firmware
        // left, those of memory types and of machine checks.
        unsafe { x86::msr::wrmsr(index, value) }
    }
}

/// The I/O ports.
pub struct Ports;

macro_rules! port_access {
    ($($read:ident $write:ident $ty:ty, $inx:path, $outx:path;)*) => {$(
        fn $read(&self, port: u16) -> $ty {
            // SAFETY: CPL 0; an IN moves no memory of ours.
            unsafe { $inx(port) }
        }
        fn $write(&self, port: u16, value: $ty) {
            // SAFETY: CPL 0; the ports written (RTC, serial port, reset) start no DMA.
            unsafe { $outx(port, value) }
        }
    )*};
}

impl PortIo for Ports {
    port_access! {
        in8 out8 u8, x86::io::inb, x86::io::outb;
        in16 out16 u16, x86::io::inw, x86::io::outw;
        in32 out32 u32, x86::io::inl, x86::io::outl;
    }
}

/// A page of device registers.
pub struct Page(u64);

impl Page {
    /// The page at `base`.
    pub fn new(base: u64) -> Self {
        Self(base & !(PAGE_SIZE.wrapping_sub(1)))
    }

    /// Address of an aligned access of `size` bytes; `None` outside the page.
    fn at(&self, offset: u32, size: usize) -> Option<u64> {
        let offset = u64::from(offset);
        (offset < PAGE_SIZE && offset.is_multiple_of(size as u64)).then_some(self.0 | offset)
    }
}

macro_rules! access {
    ($($read:ident $write:ident $ty:ty;)*) => {$(
        fn $read(&self, offset: u32) -> $ty {
            match self.at(offset, size_of::<$ty>()) {
                // SAFETY: mapped (see the module's head), aligned and inside the page (`at`); a read of the APIC's or
                // the TPM's registers changes no memory.
                Some(addr) => unsafe { (addr as *const $ty).read_volatile() },
                None => <$ty>::MAX,
            }
        }
        fn $write(&self, offset: u32, value: $ty) {
            if let Some(addr) = self.at(offset, size_of::<$ty>()) {
                // SAFETY: as for reads; no Rust object is in a page of device registers.
                unsafe { (addr as *mut $ty).write_volatile(value) }
            }
        }
    )*};
}

impl Mmio for Page {
    access! {
        read8 write8 u8;
        read32 write32 u32;
        read64 write64 u64;
    }
}

/// Memory by physical address: ACPI's tables, and the page tables.
pub struct Identity;

/// Whether a read or write of `len` bytes at `addr` stays clear of page 0 and of the upper half.
fn plausible(addr: u64, len: usize) -> bool {
    addr >= PAGE_SIZE && addr.checked_add(len as u64).is_some_and(|end| end < 1 << 47)
}

impl PhysMem for Identity {
    fn read(&self, addr: u64, out: &mut [u8]) -> bool {
        let reachable = plausible(addr, out.len());
        if reachable {
            // SAFETY: an address that the firmware or the CPU names as one of a table; mapped (see the module's
            // head). A raw copy makes no reference.
            unsafe { core::ptr::copy(addr as *const u8, out.as_mut_ptr(), out.len()) };
        }
        reachable
    }
    fn write(&self, addr: u64, data: &[u8]) -> bool {
        let reachable = plausible(addr, data.len());
        if reachable {
            // SAFETY: written are entries of the page tables that the CPU uses, and memory that the firmware set aside for
            // TXT; no Rust object is among them.
            unsafe { core::ptr::copy(data.as_ptr(), addr as *mut u8, data.len()) };
        }
        reachable
    }
}

/// The time-stamp counter as a clock.
pub struct TscClock {
    /// Ticks in a millisecond.
    khz: u64,
}

fn ticks() -> u64 {
    // SAFETY: reads a counter; CR4.TSD does not bind CPL 0.
    unsafe { x86::time::rdtsc() }
}

impl TscClock {
    /// Measures the counter against the firmware's clock; `None` when it stands still.
    pub fn calibrate() -> Option<Self> {
        const MILLISECONDS: u64 = 10;
        let start = ticks();
        boot::stall(Duration::from_millis(MILLISECONDS));
        let khz = ticks().saturating_sub(start) / MILLISECONDS;
        (khz > 0).then_some(Self { khz })
    }
}

impl Clock for TscClock {
    fn now_us(&self) -> u64 {
        let us = u128::from(ticks()).saturating_mul(1000).checked_div(self.khz.into());
        us.map_or(0, |us| u64::try_from(us).unwrap_or(u64::MAX))
    }
}

/// The first serial port, as the firmware set it up: the only console left after ExitBootServices.
pub struct Serial;

impl fmt::Write for Serial {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        const COM1: u16 = 0x3f8;
        const LINE_STATUS: u16 = COM1 + 5;
        const SENDER_EMPTY: u8 = 1 << 5;
        // A port that is missing reads as all ones, one that is stuck gets a bounded wait.
        const POLLS: u32 = 100_000;
        for byte in text.bytes() {
            let _ = (0..POLLS).any(|_| Ports.in8(LINE_STATUS) & SENDER_EMPTY != 0);
            Ports.out8(COM1, byte);
        }
        Ok(())
    }
}

/// Resets the machine: by the reset control register, else by a triple fault.
pub fn reset() -> ! {
    const RESET_CONTROL: u16 = 0xcf9;
    Ports.out8(RESET_CONTROL, 0x02);
    Ports.out8(RESET_CONTROL, 0x06);
    for _ in 0..50_000 {
        // Port 80h takes about a microsecond.
        Ports.out8(0x80, 0);
    }
    let no_idt = [0u8; 10];
    // SAFETY: nothing is to run after this. With an empty IDT the next exception shuts the CPU down, which resets a
    // machine whose chipset did not listen.
    unsafe { asm!("lidt [{}]", "ud2", in(reg) no_idt.as_ptr(), options(noreturn)) }
}

/// Interrupts off.
pub fn disable_interrupts() {
    // SAFETY: the firmware is left; its interrupt handlers, which may be gone any time now, must not run.
    unsafe { asm!("cli", options(nomem, nostack)) }
}

/// The code segment in use.
pub fn code_segment() -> u16 {
    let selector: u16;
    // SAFETY: reads a register.
    unsafe { asm!("mov {:x}, cs", out(reg) selector, options(nomem, nostack, preserves_flags)) };
    selector
}

/// Makes `idt` the table of exception handlers.
///
/// # Safety
/// `idt` holds gates to code that stays, and stays itself.
pub unsafe fn load_idt(idt: &[u8]) {
    let mut pointer = [0u8; 10];
    let limit = u16::try_from(idt.len().saturating_sub(1)).unwrap_or(u16::MAX);
    let (low, high) = pointer.split_at_mut(2);
    low.copy_from_slice(&limit.to_le_bytes());
    high.copy_from_slice(&(idt.as_ptr() as u64).to_le_bytes());
    // SAFETY: the caller's promise; LIDT reads the ten bytes of `pointer`.
    unsafe { asm!("lidt [{}]", in(reg) pointer.as_ptr(), options(readonly, nostack, preserves_flags)) }
}

/// Root of the page tables, and their levels.
pub fn page_tables() -> (u64, u32) {
    const LA57: u64 = 1 << 12;
    let (cr3, cr4): (u64, u64);
    // SAFETY: reads registers.
    unsafe {
        asm!("mov {}, cr3", "mov {}, cr4", out(reg) cr3, out(reg) cr4, options(nomem, nostack, preserves_flags));
    }
    (cr3, if cr4 & LA57 != 0 { loader::paging::LEVELS_LA57 } else { loader::paging::LEVELS })
}

/// Lets CPL 0 write to read-only pages, as firmware maps its page tables; and ends control-flow enforcement, which
/// needs that protection and would not let us jump to the launch page.
pub fn lift_write_protection() {
    const CR0_WP: u64 = 1 << 16;
    const CR4_CET: u64 = 1 << 23;
    // SAFETY: the firmware's mapping stays as it is; rights only grow, for code that is ours alone from here on.
    unsafe {
        asm!(
            "mov {tmp}, cr4", "and {tmp}, {cet}", "mov cr4, {tmp}",
            "mov {tmp}, cr0", "and {tmp}, {wp}", "mov cr0, {tmp}",
            tmp = out(reg) _, cet = in(reg) !CR4_CET, wp = in(reg) !CR0_WP,
            options(nostack),
        );
    }
}

/// Drops what the CPU remembers of the mapping of `addr`.
pub fn forget_mapping(addr: u64) {
    // SAFETY: the CPU walks the tables again; they are as valid as before.
    unsafe { asm!("invlpg [{}]", in(reg) addr, options(nostack, preserves_flags)) }
}

/// Jumps to `code`, an SKINIT instruction, with the SLB's address in EAX.
///
/// # Safety
/// `code` is mapped, executable, and ends this program: by SKINIT, or by an exception whose handler resets.
pub unsafe fn skinit(code: u64, slb: u32) -> ! {
    // SAFETY: the caller's promise.
    unsafe { asm!("jmp {}", in(reg) code, in("eax") slb, options(noreturn)) }
}

const CR4_SMXE: u64 = 1 << 14;

/// GETSEC: EAX after `leaf` with this EBX.
///
/// # Safety
/// CPUID offers SMX, and the leaf is CAPABILITIES or PARAMETERS.
pub unsafe fn getsec(leaf: u32, ebx: u32) -> u32 {
    let eax: u32;
    // SAFETY: the caller's promise: SMXE may be set, and these leaves change the registers named here alone. RBX is the
    // compiler's, so it is kept.
    unsafe {
        asm!(
            "mov {tmp}, cr4", "or {tmp}, {smxe}", "mov cr4, {tmp}",
            "mov {kept}, rbx", "mov ebx, {ebx:e}", "getsec", "mov rbx, {kept}",
            tmp = out(reg) _, kept = out(reg) _, smxe = in(reg) CR4_SMXE, ebx = in(reg) ebx,
            inout("eax") leaf => eax, out("ecx") _, out("edx") _, options(nostack),
        );
    }
    eax
}

/// Runs `change` with caches off and empty, as changes of memory types want it.
///
/// Spec: \[SDM3\] "MTRR Considerations in MP Systems", for the one processor that runs.
pub fn with_caches_off(change: impl FnOnce()) {
    const CR0_CD: u64 = 1 << 30;
    const CR0_NW: u64 = 1 << 29;
    /// Empties caches and what is remembered of the page tables.
    fn flush() {
        // SAFETY: writes back all that is cached; the page tables stay the same.
        unsafe { asm!("wbinvd", "mov {tmp}, cr3", "mov cr3, {tmp}", tmp = out(reg) _, options(nostack)) }
    }
    // SAFETY: memory is coherent with caches off too; interrupts are off, and the firmware is left.
    unsafe {
        asm!("mov {tmp}, cr0", "and {tmp}, {nw}", "or {tmp}, {cd}", "mov cr0, {tmp}",
             tmp = out(reg) _, nw = in(reg) !CR0_NW, cd = in(reg) CR0_CD, options(nostack));
    }
    flush();
    change();
    flush();
    // SAFETY: as above.
    unsafe {
        asm!("mov {tmp}, cr0", "and {tmp}, {cd}", "mov cr0, {tmp}",
             tmp = out(reg) _, cd = in(reg) !(CR0_CD | CR0_NW), options(nostack));
    }
}

/// Jumps to `code`, a GETSEC instruction, with what SENTER takes: SINIT's address and size. CR4.SMXE is set only with `smx`,
/// whether CPUID offers it.
///
/// # Safety
/// `code` is mapped, executable, and ends this program: by SENTER, or by an exception whose handler resets.
pub unsafe fn senter(code: u64, sinit: u32, size: u32, smx: bool) -> ! {
    const CR0_NE: u64 = 1 << 5;
    let smxe = if smx { CR4_SMXE } else { 0 };
    // SAFETY: the caller's promise. Nothing of this program runs afterwards, so RBX and RDI may be taken.
    unsafe {
        asm!(
            "mov rdi, cr4", "or rdi, {smxe}", "mov cr4, rdi",
            "mov rdi, cr0", "or rdi, {ne}", "mov cr0, rdi",
            "mov ebx, {sinit:e}", "xor edx, edx", "jmp {code}",
            in("rdi") 0u64, smxe = in(reg) smxe, ne = in(reg) CR0_NE, sinit = in(reg) sinit, code = in(reg) code,
            in("eax") vmx::txt::getsec::SENTER, in("ecx") size, options(noreturn),
        )
    }
}

/// The graphics mode that the firmware's console uses, when it has a frame buffer.
pub fn graphics_mode() -> Option<Mode> {
    let handle = boot::get_handle_for_protocol::<GraphicsOutput>().ok()?;
    let params = OpenProtocolParams { handle, agent: boot::image_handle(), controller: None };
    // SAFETY: an exclusive open would take the screen from the console; this one is gone before anything else runs.
    let mut gop =
        unsafe { boot::open_protocol::<GraphicsOutput>(params, OpenProtocolAttributes::GetProtocol) }.ok()?;
    let info = gop.current_mode_info();
    let masks = match (info.pixel_format(), info.pixel_bitmask()) {
        (PixelFormat::Rgb, _) => [0xff, 0xff00, 0xff_0000, 0xff00_0000],
        (PixelFormat::Bgr, _) => [0xff_0000, 0xff00, 0xff, 0xff00_0000],
        (PixelFormat::Bitmask, Some(mask)) => [mask.red, mask.green, mask.blue, mask.reserved],
        _ => return None,
    };
    let (width, height) = info.resolution();
    Some(Mode {
        width: width.try_into().ok()?,
        height: height.try_into().ok()?,
        stride: info.stride().try_into().ok()?,
        base: gop.frame_buffer().as_mut_ptr() as u64,
        channels: masks.map(Channel::of_mask),
    })
}
