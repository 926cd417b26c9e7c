//! A stock kernel as guest, without firmware: it and its RAM disk are behind this program on the disk.
//!
//! Spec: \[LINUX-BOOT\] "64-bit Boot Protocol", "The Real-Mode Kernel Header".

use hv::vcpu::Vcpu;

/// Sectors of the disk from which the kernel and the RAM disk are.
const KERNEL_AT: u32 = 0x1000;
const INITRD_AT: u32 = 0x10000;
/// Where they are read to.
const KERNEL: u64 = 0x1000_0000;
const INITRD: u64 = 0x1800_0000;
/// Where the kernel runs.
const LOAD: u64 = 0x100_0000;
/// First page of the guest's memory below 1 MiB: the zero page, the command line; what is behind them is the kernel's.
const ZERO_PAGE: u64 = 0x9_2000;
const CMDLINE: u64 = 0x9_3000;
const LOW: u64 = 0x9_4000;
/// End of memory, without what the BIOS keeps its tables in.
const TOP: u64 = 0x1fff_0000;
const WORDS: &[u8] =
    b"console=ttyS0 earlyprintk=serial,ttyS0 nokaslr no_timer_check mitigations=off nomodeset \
cryptomgr.notests panic=-1 rdinit=/init\0";

/// Reads `len` bytes from a sector of the first disk on, by programmed I/O.
fn read_disk(sector: u32, len: u32, to: u64) {
    const DATA: u16 = 0x1f0;
    const READ: u8 = 0x20;
    let sectors = len.div_ceil(512);
    for (at, to) in (sector..sector + sectors).zip((to..).step_by(512)) {
        let [a, b, c, d] = at.to_le_bytes();
        // SAFETY: the emulated disk; a sector of the memory that `load`'s caller gave.
        unsafe {
            for (port, value) in (DATA + 2..).zip([1, a, b, c, 0xe0 | d, READ]) {
                x86::io::outb(port, value);
            }
            while x86::io::inb(DATA + 7) & 0x88 != 0x08 {}
            core::arch::asm!(
                "rep insw", in("dx") DATA, inout("rcx") 256 => _, inout("rdi") to => _, options(nostack)
            );
        }
    }
}

/// Puts the kernel in place and makes `vcpu` start it, with page tables at `cr3`.
///
/// # Safety
/// The memory named above is the guest's, and nothing else uses it.
pub unsafe fn load(vcpu: &mut dyn Vcpu, cr3: u64, gdt: u64, kernel_len: u32, initrd_len: u32) {
    const HEADER: u64 = 0x1f1;
    const SETUP_SECTS: u64 = 0x1f1;
    read_disk(KERNEL_AT, kernel_len, KERNEL);
    read_disk(INITRD_AT, initrd_len, INITRD);
    let put = |at: u64, value: u32| {
        // SAFETY: the zero page.
        unsafe { ((ZERO_PAGE + at) as *mut u32).write_unaligned(value) };
    };
    // SAFETY: the caller's promise; the lengths are those of the files.
    unsafe {
        core::ptr::write_bytes(ZERO_PAGE as *mut u8, 0, 0x1000);
        let header_end = 0x202 + u64::from(((KERNEL + 0x201) as *const u8).read());
        core::ptr::copy_nonoverlapping(
            (KERNEL + HEADER) as *const u8,
            (ZERO_PAGE + HEADER) as *mut u8,
            (header_end - HEADER) as usize,
        );
        let setup = (1 + u64::from(((KERNEL + SETUP_SECTS) as *const u8).read())) * 512;
        let len = u64::from(kernel_len) - setup;
        core::ptr::copy_nonoverlapping((KERNEL + setup) as *const u8, LOAD as *mut u8, len as usize);
        core::ptr::copy_nonoverlapping(WORDS.as_ptr(), CMDLINE as *mut u8, WORDS.len());
        ((ZERO_PAGE + 0x210) as *mut u8).write(0xff);
        (gdt as *mut [u64; 4]).write([0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff]);
    }
    put(0x218, INITRD as u32);
    put(0x21c, initrd_len);
    put(0x228, CMDLINE as u32);
    let map = [(LOW, 0x9_f000, 1u32), (LOAD, TOP, 1), (TOP, 0x2000_0000, 3)];
    // SAFETY: the zero page.
    unsafe { ((ZERO_PAGE + 0x1e8) as *mut u8).write(map.len() as u8) };
    for (at, (start, end, kind)) in (0x2d0..).step_by(20).zip(map) {
        put(at, start as u32);
        put(at + 4, 0);
        put(at + 8, (end - start) as u32);
        put(at + 12, 0);
        put(at + 16, kind);
    }
    vcpu.start_long_mode(LOAD + 0x200, LOW + 0x2000, cr3, (gdt, 31));
    vcpu.gprs_mut().rsi = ZERO_PAGE;
}
