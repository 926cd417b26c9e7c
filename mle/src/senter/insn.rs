//! Instructions of a launch by SENTER.
//!
//! UNSAFETY: this module is instructions; each function says why it harms nobody.
#![expect(unsafe_code, reason = "the hardware edge")]

use core::arch::asm;

/// GETSEC with the leaf `function` and EBX = `argument`.
///
/// # Safety
/// CPL 0, outside VMX non-root operation; the leaf's own conditions.
pub unsafe fn getsec(function: u32, argument: u32) {
    const SMXE: u64 = 1 << 14;
    // To set it is an error where CPUID does not offer SMX. Where that is only hidden, GETSEC will say so.
    let offered = raw_cpuid::CpuId::new().get_feature_info().is_some_and(|f| f.has_smx());
    // SAFETY: the caller's promise; the CPU has the bit.
    unsafe { execute(function, argument, if offered { SMXE } else { 0 }) }
}

/// The one place that executes GETSEC, in the first page of the image; with `cr4` set in CR4.
#[cfg(target_os = "none")]
#[unsafe(naked)]
#[unsafe(link_section = ".mle.entry")]
unsafe extern "sysv64" fn execute(function: u32, argument: u32, cr4: u64) {
    core::arch::naked_asm!(
        "push rbx",
        "mov rax, cr4",
        "or rax, rdx",
        "mov cr4, rax",
        "mov eax, edi",
        "mov ebx, esi",
        "xor ecx, ecx",
        "xor edx, edx",
        ".byte 0x0f, 0x37",
        "pop rbx",
        "ret",
    )
}

/// On the host there is no GETSEC.
#[cfg(not(target_os = "none"))]
unsafe fn execute(_: u32, _: u32, _: u64) {
    unreachable!("GETSEC on the host")
}

/// WBINVD.
pub fn write_back_caches() {
    // SAFETY: loses nothing.
    unsafe { asm!("wbinvd", options(nostack)) }
}

/// Runs `change` with the caches off and empty.
///
/// Spec: \[SDM3\] "MTRR Considerations in MP Systems".
pub fn without_caches(change: impl FnOnce()) {
    const CD: u64 = 1 << 30;
    const NW: u64 = 1 << 29;
    // SAFETY: with CD set and NW clear memory stays coherent; the bits come back as they were, caches on.
    unsafe {
        let cr0: u64;
        asm!("mov {}, cr0", out(reg) cr0, options(nomem, nostack));
        asm!("mov cr0, {}", "wbinvd", in(reg) cr0 & !NW | CD, options(nostack));
        change();
        asm!("wbinvd", "mov cr0, {}", in(reg) cr0 & !(NW | CD), options(nostack));
    }
}

/// Lets NMIs in again, which SENTER masks until the first IRET.
pub fn unmask_nmi() {
    // SAFETY: returns to the next instruction with the same stack, segments and flags; the CPU has its IDT.
    unsafe {
        asm!(
            "mov {stack}, rsp",
            "mov {at:e}, ss",
            "push {at}",
            "push {stack}",
            "pushfq",
            "mov {at:e}, cs",
            "push {at}",
            "lea {at}, [rip + 2f]",
            "push {at}",
            "iretq",
            "2:",
            stack = out(reg) _,
            at = out(reg) _,
        );
    }
}
