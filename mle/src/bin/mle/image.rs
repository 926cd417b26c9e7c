//! Entry code and panic handler.
//!
//! UNSAFETY: the first instructions of the image, before there is a stack, and the linker's symbols.
#![expect(unsafe_code, reason = "the entry of the image")]

use core::arch::{global_asm, naked_asm};
use core::panic::PanicInfo;

use hv::failure::{Record, SenterError, Stage};
use hv::launch::{Handoff, MleHeader};
use mle::launch::Image;
use mle::senter::regs;
use vmx::txt::heap::{SIZE_WORD, capability, os_sinit};

/// What an MLE of ours can do: both ways to wake the other processors, page tables by ECX, details and authorities in PCR 17 and 18,
/// SINIT's log in the TCG's format. Linux offers the same.
const TXT_CAPABILITIES: u32 = capability::WAKE_GETSEC
    | capability::WAKE_MONITOR
    | capability::ECX_PAGE_TABLES
    | 1 << 5
    | capability::TCG_LOG;
const PAT_RESET: u64 = mle::slb::paging::PAT_RESET;

const fn errorcode(error: SenterError) -> u32 {
    Record { stage: Stage::Senter, code: error as u16, detail: 0 }.errorcode()
}

global_asm!(
    include_str!("senter.s"),
    at = const 0x40,
    // The UUID of all MLEs. Spec: [TXT] "MLE Header".
    uuid0 = const 0x9082_ac5a_u32,
    uuid1 = const 0x74a7_476f_u32,
    uuid2 = const 0xa255_5c0f_u32,
    uuid3 = const 0x42b6_51cb_u32,
    header_version = const 0x2_0002,
    capabilities = const TXT_CAPABILITIES,
    data = const 0x10,
    code64 = const 0x18,
    private = const regs::PRIVATE as u32,
    public = const regs::PUBLIC as u32,
    sts = const regs::STS,
    sts_wanted = const regs::STS_LAUNCHED as u32,
    heap_base = const regs::HEAP_BASE,
    heap_size = const regs::HEAP_SIZE,
    errorcode = const regs::ERRORCODE,
    cmd_reset = const regs::CMD_RESET,
    e2sts = const regs::E2STS,
    os_sinit_min = const SIZE_WORD + os_sinit::ELEMENTS,
    page_tables = const SIZE_WORD + os_sinit::MLE,
    pmr_low_base = const SIZE_WORD + os_sinit::PMR,
    pmr_low_size = const SIZE_WORD + os_sinit::PMR + 8,
    region_size = const core::mem::offset_of!(MleHeader, region_size),
    not_senter = const errorcode(SenterError::NotSenter),
    bad_heap = const errorcode(SenterError::Heap),
    uncovered = const errorcode(SenterError::Region),
    bad_tables = const errorcode(SenterError::PageTables),
    present_write = const 3,
    present_write_large = const 0x83,
    uncached = const 0x18,
    // PE, ET, NE, WP, PG; PAE; LME.
    cr0 = const 0x8001_0031_u32,
    cr4 = const 0x20,
    efer = const 0xc000_0080_u32,
    efer_value = const 0x100,
    pat = const 0x277,
    pat_low = const PAT_RESET as u32,
    pat_high = const (PAT_RESET >> 32) as u32,
);

unsafe extern "C" {
    static mle_start: u8;
    static mle_rodata: u8;
    static mle_data: u8;
    static mle_file_end: u8;
    static mle_end: u8;
}

/// Stack of the first CPU, its lowest page a guard page; memory maps are copied onto it.
const BOOT_STACK: usize = 0x8_0000;
#[repr(C, align(4096))]
struct BootStack([u8; BOOT_STACK]);
static mut STACK: BootStack = BootStack([0; BOOT_STACK]);

/// Entered by the SLB stage.
///
/// | register | entry |
/// |---|---|
/// | RDI | address of the [`Handoff`] |
/// | CR3 | the SLB's tables: 0 to 4 GiB one to one, this image writable and executable |
/// | IF, GIF | 0 |
///
/// Zeroes what the file does not hold, applies the relocations, takes its own stack.
#[unsafe(naked)]
#[unsafe(no_mangle)]
#[unsafe(link_section = ".mle.entry")]
unsafe extern "C" fn mle_entry() {
    naked_asm!(
        "cli",
        "cld",
        "mov r12, rdi",
        "lea rbx, [rip + mle_start]",
        "lea rdi, [rip + mle_file_end]",
        "lea rcx, [rip + mle_end]",
        "sub rcx, rdi",
        "xor eax, eax",
        "rep stosb",
        ".globl mle_relocate",
        "mle_relocate:", // senter.s ends here: rbx and r12 as now, the rest zeroed
        // [gABI] "Relative Relocation Table": an even word is a place; an odd one has a bit for each of the 63 words
        // that follow the last place, or the last such group.
        "lea rsi, [rip + mle_relr]",
        "lea rdx, [rip + mle_relr_end]",
        "2:",
        "cmp rsi, rdx",
        "jae 6f",
        "lodsq",
        "test al, 1",
        "jnz 3f",
        "add [rbx + rax], rbx",
        "lea rdi, [rbx + rax + 8]",
        "jmp 2b",
        "3:",
        "mov rcx, rdi",
        "add rdi, 63 * 8",
        "4:",
        "shr rax",
        "jz 2b",
        "test al, 1",
        "jz 5f",
        "add [rcx], rbx",
        "5:",
        "add rcx, 8",
        "jmp 4b",
        "6:",
        "lea rsp, [rip + {stack} + {size}]",
        "xor ebp, ebp",
        "mov rdi, r12",
        "call {main}",
        "ud2",
        stack = sym STACK,
        size = const BOOT_STACK,
        main = sym main,
    )
}

/// `handoff` is null after SENTER.
extern "sysv64" fn main(handoff: *const Handoff) -> ! {
    let image = Image {
        start: &raw const mle_start as u64,
        rodata: &raw const mle_rodata as u64,
        data: &raw const mle_data as u64,
        file_end: &raw const mle_file_end as u64,
        end: &raw const mle_end as u64,
        stack_guard: &raw const STACK as u64,
    };
    if handoff.is_null() {
        // SAFETY: called once, on the BSP, at CPL 0 with all interrupts masked, in the identity map of `senter.s`.
        unsafe { mle::senter::start(image) }
    }
    // SAFETY: the SLB stage wrote the block before it jumped here; it lies in the SLB, which nothing writes now.
    let handoff = unsafe { handoff.read() };
    // SAFETY: called once, on the BSP, at CPL 0 with GIF clear, in the identity map of the SLB stage.
    unsafe { mle::launch::start(&handoff, None, image) }
}

#[panic_handler]
fn panic(info: &PanicInfo) -> ! {
    mle::fatal::stop(hv::failure::MleError::Panic, 0, format_args!("panic: {info}"))
}
