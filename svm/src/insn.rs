//! The instructions of SVM.
//!
//! UNSAFETY: each function is an instruction (or the world switch around VMRUN) whose preconditions only the
//! MLE's launch order establishes; the preconditions are listed with each.
#![expect(unsafe_code, reason = "the hardware edge")]

use core::arch::{asm, naked_asm};

use hv::vcpu::Gprs;

/// Sets the global interrupt flag: pending SMI, NMI and INIT are taken now.
///
/// # Safety
/// EFER.SVME is set (or the CPU has SKINIT), and the running IDT handles NMI and #SX.
pub unsafe fn stgi() {
    // SAFETY: the caller's promise; STGI touches no memory of ours, but handlers run: a compiler barrier.
    unsafe { asm!("stgi", options(nostack)) }
}

/// Clears the global interrupt flag.
///
/// # Safety
/// EFER.SVME is set.
pub unsafe fn clgi() {
    // SAFETY: the caller's promise.
    unsafe { asm!("clgi", options(nostack)) }
}

/// Stores FS, GS, TR, LDTR and the syscall MSRs into the VMCB-shaped page at `page`.
///
/// # Safety
/// EFER.SVME is set; `page` is the physical address of 4 KiB that nobody else uses.
pub unsafe fn vmsave(page: u64) {
    // SAFETY: the caller's promise; the memory is not known to the compiler otherwise.
    unsafe { asm!("vmsave rax", in("rax") page, options(nostack)) }
}

/// Runs the guest of `vmcb` until it exits.
///
/// | register | entry |
/// |---|---|
/// | RDI | guest registers: loaded before, stored after (RAX and RSP live in the VMCB) |
/// | RSI | physical address of the VMCB |
/// | RDX | physical address of the host's VMSAVE page |
///
/// Returns with GIF clear, as it was called.
///
/// # Safety
/// EFER.SVME and VM_HSAVE_PA are set on this CPU, GIF is clear, the VMCB is owned by the caller and describes a
/// guest that cannot reach the MLE's memory, and `host` was filled by [`vmsave`] on this CPU.
#[unsafe(naked)]
pub unsafe extern "sysv64" fn vmrun(gprs: *mut Gprs, vmcb: u64, host: u64) {
    // The guest's FS, GS, TR, LDTR and syscall MSRs go in with VMLOAD and come out with VMSAVE; the host's come
    // back last, so that an exception in the MLE finds its TSS. x87, SSE, AVX, debug and XCR0 state is never
    // touched: the MLE is built without floating point, so what is in the registers stays the guest's.
    naked_asm!(
        hv::push_preserved!(),
        "push rdx",
        "push rdi",
        "mov rax, rsi",
        hv::load_gprs!(),
        "vmload rax",
        "vmrun rax",
        "vmsave rax",
        // RAX and RSP are the host's again; everything else is the guest's.
        "mov rax, [rsp]",
        hv::store_gprs!(),
        "pop rdi",
        "pop rax",
        "vmload rax",
        hv::pop_preserved!(),
        "ret",
    )
}
