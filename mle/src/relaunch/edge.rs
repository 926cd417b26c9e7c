//! The instructions of a round: out of the MLE, into firmware, to SKINIT, and back.
//!
//! UNSAFETY: stacks and page tables are exchanged under the running code; each function says what makes that right.
#![expect(unsafe_code, reason = "the hardware edge")]

use core::arch::{asm, naked_asm};

use crate::services::GapCall;

/// Where the MLE goes on.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Context {
    rsp: u64,
    cr3: u64,
    cr4: u64,
}

impl Context {
    /// Where its stack is in use from.
    pub fn stack(&self) -> u64 {
        self.rsp
    }
}

/// CR4.SMEP: firmware's pages are user pages in the tables that map all.
const SMEP: i32 = 1 << 20;

/// Calls `leave` with `argument`, on the stack below `stack` and under the tables at `root`, and returns when [`resume_entry`] is
/// entered with `context`, be it by another program that has put this one's memory back.
///
/// To its caller this is a call like any other: one that returns once.
///
/// # Safety
/// The tables map all memory with all rights, nothing else uses that stack. When the context is resumed, memory is what it was at some
/// time after `leave` was called.
#[unsafe(naked)]
pub unsafe extern "sysv64" fn suspend<T>(
    context: *mut Context,
    argument: *mut T,
    leave: unsafe extern "sysv64" fn(*mut T) -> !,
    root: u64,
    stack: u64,
) {
    naked_asm!(
        hv::push_preserved!(),
        "mov [rdi], rsp",
        "mov rax, cr3",
        "mov [rdi + 8], rax",
        "mov rax, cr4",
        "mov [rdi + 16], rax",
        "and rax, {no_smep}",
        "mov cr4, rax",
        "mov cr3, rcx",
        "mov rsp, r8",
        "xor ebp, ebp",
        "mov rdi, rsi",
        "call rdx",
        "ud2",
        no_smep = const !SMEP,
    )
}

/// Where a new launch enters the memory of an old one that it put back.
///
/// | register | entry |
/// |---|---|
/// | RDI | the [`Context`] |
/// | CR3 | tables that map this code executable, and all memory one to one |
/// | IF, GIF | 0 |
///
/// # Safety
/// [`suspend`] wrote the context, and memory is as it asks for; nothing of the present stack is used again.
#[unsafe(naked)]
pub unsafe extern "sysv64" fn resume_entry(context: *const Context) -> ! {
    naked_asm!(
        "mov rax, [rdi + 8]",
        "mov cr3, rax",
        "mov rax, [rdi + 16]",
        "mov cr4, rax",
        "mov rsp, [rdi]",
        hv::pop_preserved!(),
        "ret",
    )
}

/// Calls firmware by UEFI's convention; RAX.
///
/// # Safety
/// `frame` is the frame of a call, on a stack that firmware may use; all memory is mapped with all rights.
#[unsafe(naked)]
pub unsafe extern "sysv64" fn call_firmware(frame: *const GapCall) -> u64 {
    naked_asm!(
        hv::push_preserved!(),
        "mov r12, rsp",
        "mov rax, [rdi]",
        "mov rcx, [rdi + 0x10]",
        "mov rdx, [rdi + 0x18]",
        "mov r8, [rdi + 0x20]",
        "mov r9, [rdi + 0x28]",
        // The call puts its return address where the frame has a place for it.
        "mov rsp, [rdi + 8]",
        "add rsp, 8",
        "call rax",
        "mov rsp, r12",
        "cld",
        "cli",
        hv::pop_preserved!(),
        "ret",
    )
}

/// Copies a page, which may be the one at address 0.
///
/// # Safety
/// Both pages are mapped, and the one at `to` holds no object of this program.
pub unsafe fn copy_page(from: u64, to: u64) {
    // SAFETY: the caller's promise. By an instruction, because a pointer to address 0 would be no pointer.
    unsafe {
        asm!(
            "rep movsq",
            inout("rcx") 512_u64 => _, inout("rsi") from => _, inout("rdi") to => _,
            options(nostack, preserves_flags)
        );
    }
}

/// Jumps to `code`, an SKINIT instruction, with the SLB's address in EAX.
///
/// # Safety
/// `code` is mapped and executable; nothing of this program is used again but by a launch that puts it back.
pub unsafe fn skinit(code: u64, slb: u32) -> ! {
    // SAFETY: the caller's promise.
    unsafe { asm!("jmp {}", in(reg) code, in("eax") slb, options(noreturn)) }
}

/// Jumps to `entry`, [`resume_entry`] of the memory that was put back.
///
/// # Safety
/// `entry` is that function in memory that was verified and is mapped executable; `context` is its [`Context`].
pub unsafe fn jump(entry: u64, context: u64) -> ! {
    // SAFETY: the caller's promise.
    unsafe { asm!("jmp {}", in(reg) entry, in("rdi") context, options(noreturn)) }
}
