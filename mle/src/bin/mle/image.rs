//! Entry code and panic handler.
//!
//! UNSAFETY: the first instructions of the image, before there is a stack, and the linker's symbols.
#![expect(unsafe_code, reason = "the entry of the image")]

use core::arch::naked_asm;
use core::panic::PanicInfo;

use hv::launch::Handoff;
use mle::launch::Image;

unsafe extern "C" {
    static mle_start: u8;
    static mle_rodata: u8;
    static mle_data: u8;
    static mle_file_end: u8;
    static mle_end: u8;
}

/// Stack of the first CPU, its lowest page a guard page; memory maps are copied onto it.
const BOOT_STACK: usize = 0x4_0000;
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

extern "sysv64" fn main(handoff: *const Handoff) -> ! {
    // SAFETY: the SLB stage wrote the block before it jumped here; it lies in the SLB, which nothing writes now.
    let handoff = unsafe { handoff.read() };
    let image = Image {
        start: &raw const mle_start as u64,
        rodata: &raw const mle_rodata as u64,
        data: &raw const mle_data as u64,
        file_end: &raw const mle_file_end as u64,
        end: &raw const mle_end as u64,
        stack_guard: &raw const STACK as u64,
    };
    // SAFETY: called once, on the BSP, at CPL 0 with GIF clear, in the identity map of the SLB stage.
    unsafe { mle::launch::start(&handoff, None, image) }
}

#[panic_handler]
fn panic(info: &PanicInfo) -> ! {
    mle::fatal::stop(hv::failure::MleError::Panic, 0, format_args!("panic: {info}"))
}
