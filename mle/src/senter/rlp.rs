//! The other CPUs ("responding logical processors"): woken out of SINIT's wait into the MLE while the memory types are still
//! SINIT's, and held there until [`crate::smp`] has a place for them.
//!
//! UNSAFETY: their first instructions, and the block that these read.
#![expect(unsafe_code, reason = "the hardware edge")]

use core::arch::global_asm;
use core::cell::UnsafeCell;
use core::mem::offset_of;
use core::sync::atomic::{AtomicU32, Ordering};

use hv::io::{Clock, poll_until};

use super::mtrr::{DEF_TYPE, ENABLED, FIRST_PAIR, MISC_CLEARED_RLP, MISC_ENABLE, PAIRS_MAX, Saved};
use super::{Error, insn};
use crate::smp::{GDTR, JUMP32};

/// Longest wait for all of them, in microseconds: they wait on a store, or for a message between CPUs.
const JOIN_BUDGET_US: u64 = 1_000_000;
/// Selector of flat code; data is behind it, then the block itself.
const CODE: u32 = 0x08;
const BLOCK_SELECTOR: u32 = 0x18;

/// What SENTER's microcode reads at TXT.MLE.JOIN, and what the CPUs themselves read; they reach it by FS.
///
/// Spec: \[TXT\] "MLE JOIN Data Structure": it must not straddle pages.
#[repr(C, align(1024))]
struct Block {
    /// Limit and base of the GDT, selector of code, physical entry point.
    join: [u32; 4],
    gdt: [u64; 4],
    default_type: u64,
    misc_enable: u64,
    pairs: [[u64; 2]; PAIRS_MAX],
    count: u32,
    /// How many have come.
    arrived: AtomicU32,
    /// Where they go: the launch page, once it is ready.
    page: AtomicU32,
}
const _: () = assert!(size_of::<Block>() <= 1024);

struct Shared(UnsafeCell<Block>);
// SAFETY: written by the first CPU before the others are woken; from then on all use the atomics alone.
unsafe impl Sync for Shared {}

static BLOCK: Shared = Shared(UnsafeCell::new(Block {
    join: [0; 4],
    gdt: [0; 4],
    default_type: 0,
    misc_enable: 0,
    pairs: [[0; 2]; PAIRS_MAX],
    count: 0,
    arrived: AtomicU32::new(0),
    page: AtomicU32::new(0),
}));

global_asm!(
    // In the state of the JOIN block: 32-bit, flat segments from our GDT, no paging, caches as reset leaves them. No stack.
    ".pushsection .text.senter_rlp, \"ax\"",
    ".code32",
    ".globl senter_rlp",
    "senter_rlp:",
    "cli",
    "cld",
    "mov eax, {selector}",
    "mov fs, ax",
    // Memory types as before SENTER, with caches off and empty.
    "mov eax, cr0",
    "and eax, 0x9fffffff",
    "or eax, 0x40000000",
    "mov cr0, eax",
    "wbinvd",
    "mov ecx, {def_type}",
    "rdmsr",
    "and eax, {mtrr_off}",
    "wrmsr",
    "xor esi, esi",
    "mov ecx, {first_pair}",
    "2:",
    "cmp esi, fs:[{count}]",
    "jae 3f",
    "mov edi, esi",
    "shl edi, 4",
    "mov eax, fs:[edi + {pairs}]",
    "mov edx, fs:[edi + {pairs} + 4]",
    "wrmsr",
    "inc ecx",
    "mov eax, fs:[edi + {pairs} + 8]",
    "mov edx, fs:[edi + {pairs} + 12]",
    "wrmsr",
    "inc ecx",
    "inc esi",
    "jmp 2b",
    "3:",
    "wbinvd",
    "mov ecx, {def_type}",
    "mov eax, fs:[{default_type}]",
    "mov edx, fs:[{default_type} + 4]",
    "wrmsr",
    "mov eax, cr0",
    "and eax, 0x9fffffff",
    "mov cr0, eax",
    "mov ecx, {misc}",
    "rdmsr",
    "and eax, {misc_kept}",
    "or eax, fs:[{misc_enable}]",
    "wrmsr",
    "lock inc dword ptr fs:[{arrived}]",
    "4:",
    "pause",
    "mov ebx, fs:[{page}]",
    "test ebx, ebx",
    "jz 4b",
    // Into the code by which a Startup IPI comes, where that has left real mode.
    "lgdt [ebx + {gdtr}]",
    "jmp fword ptr [ebx + {jump32}]",
    ".code64",
    ".popsection",
    selector = const BLOCK_SELECTOR,
    def_type = const DEF_TYPE,
    mtrr_off = const !(ENABLED as u32),
    first_pair = const FIRST_PAIR,
    misc = const MISC_ENABLE,
    misc_kept = const !(MISC_CLEARED_RLP as u32),
    count = const offset_of!(Block, count),
    pairs = const offset_of!(Block, pairs),
    default_type = const offset_of!(Block, default_type),
    misc_enable = const offset_of!(Block, misc_enable),
    arrived = const offset_of!(Block, arrived),
    page = const offset_of!(Block, page),
    gdtr = const GDTR,
    jump32 = const JUMP32,
);

unsafe extern "C" {
    static senter_rlp: u8;
}

/// Prepares what the others read, and gives its address for TXT.MLE.JOIN.
pub fn prepare(saved: &Saved) -> u64 {
    let block = BLOCK.0.get();
    let base = block as u64;
    let low = |address: u64| address as u32; // the image is below 4 GiB
    let pairs = base & 0xff_ffff;
    // A data segment whose base is the block: 4 GiB, writable.
    let own = 0x00cf_9300_0000_ffff | pairs << 16 | (base & 0xff00_0000) << 32;
    // SAFETY: nobody reads it before TXT.MLE.JOIN is written, and this runs once.
    unsafe {
        (*block).gdt = [0, 0x00cf_9b00_0000_ffff, 0x00cf_9300_0000_ffff, own];
        (*block).join = [
            31,
            low(base.wrapping_add(offset_of!(Block, gdt) as u64)),
            CODE,
            low(&raw const senter_rlp as u64),
        ];
        (*block).default_type = saved.default_type;
        (*block).misc_enable = saved.misc_enable & MISC_CLEARED_RLP;
        (*block).pairs = saved.pairs;
        (*block).count = u32::try_from(saved.count).unwrap_or(0);
    }
    insn::write_back_caches();
    base
}

/// Waits until `count` of them have come.
///
/// # Errors
/// [`Error::Missing`]: some did not in time.
pub fn wait(count: u32, clock: &impl Clock) -> Result<(), Error> {
    // SAFETY: an atomic, for the image's life.
    let arrived = unsafe { &(*BLOCK.0.get()).arrived };
    joined(count, || arrived.load(Ordering::Acquire), clock)
}

fn joined(count: u32, arrived: impl Fn() -> u32, clock: &impl Clock) -> Result<(), Error> {
    poll_until(clock, JOIN_BUDGET_US, || arrived() >= count)
        .map_err(|_| Error::Missing { have: arrived(), want: count })
}

/// Sends them on to the start-up code in the launch page at `page`.
pub fn release(page: u64) {
    // SAFETY: as in `wait`.
    let at = unsafe { &(*BLOCK.0.get()).page };
    at.store(page as u32, Ordering::Release); // below 1 MiB
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    struct Steps(Cell<u64>);
    impl Clock for Steps {
        fn now_us(&self) -> u64 {
            self.0.set(self.0.get() + 1000);
            self.0.get()
        }
    }

    #[test]
    fn one_that_never_joins_ends_the_launch_in_time() {
        let clock = Steps(Cell::new(0));
        assert_eq!(joined(3, || 2, &clock), Err(Error::Missing { have: 2, want: 3 }));
        assert!(clock.0.get() < 2 * JOIN_BUDGET_US);
        assert_eq!(joined(3, || 3, &clock), Ok(()));
        assert_eq!(joined(0, || 0, &clock), Ok(()));
    }
}
