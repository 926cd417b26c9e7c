//! The instructions of VMX.
//!
//! UNSAFETY: each function is an instruction (or the world switch around VMLAUNCH and VMRESUME) whose preconditions only the
//! MLE's launch order establishes; the preconditions are listed with each. CF and ZF are taken in the asm block of the
//! instruction itself: a second block would see other flags.
#![expect(unsafe_code, reason = "the hardware edge")]

use core::arch::{asm, naked_asm};
use core::mem::offset_of;

use hv::vcpu::Gprs;

use crate::defs::{HOST_RIP, HOST_RSP};
use crate::vmcs::{FieldError, Vmcs};

/// A VMX instruction failed.
///
/// Spec: \[SDM3\] "Conventions" of the VMX instruction reference: CF: VMfailInvalid; ZF: VMfailValid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Failed;

fn check(failed: u8) -> Result<(), Failed> {
    if failed == 0 { Ok(()) } else { Err(Failed) }
}

/// Enters VMX root operation.
///
/// # Safety
/// CR4.VMXE is set, CR0 and CR4 are as the fixed bits ask, IA32_FEATURE_CONTROL allows it; `region` is the physical address of
/// a page with the revision identifier, this CPU's alone for as long as it is in VMX operation.
pub unsafe fn vmxon(region: u64) -> Result<(), Failed> {
    let failed: u8;
    // SAFETY: the caller's promise; the operand is a local.
    unsafe {
        asm!("vmxon [{p}]", "setbe {f}", p = in(reg) &raw const region, f = out(reg_byte) failed, options(nostack))
    };
    check(failed)
}

/// Leaves VMX operation.
///
/// # Safety
/// In VMX root operation; no other VMX instruction is executed on this CPU until the next [`vmxon`].
pub unsafe fn vmxoff() -> Result<(), Failed> {
    let failed: u8;
    // SAFETY: the caller's promise.
    unsafe { asm!("vmxoff", "setbe {f}", f = out(reg_byte) failed, options(nostack)) };
    check(failed)
}

/// Writes a VMCS back to its region and makes it neither active nor launched.
///
/// # Safety
/// In VMX root operation; `region` is a VMCS region of the caller's, whose data nobody else uses.
pub unsafe fn vmclear(region: u64) -> Result<(), Failed> {
    let failed: u8;
    // SAFETY: the caller's promise; the operand is a local.
    unsafe {
        asm!("vmclear [{p}]", "setbe {f}", p = in(reg) &raw const region, f = out(reg_byte) failed, options(nostack))
    };
    check(failed)
}

/// Makes a VMCS the current one.
///
/// # Safety
/// As for [`vmclear`]; the VMCS is active on no other CPU.
pub unsafe fn vmptrld(region: u64) -> Result<(), Failed> {
    let failed: u8;
    // SAFETY: the caller's promise; the operand is a local.
    unsafe {
        asm!("vmptrld [{p}]", "setbe {f}", p = in(reg) &raw const region, f = out(reg_byte) failed, options(nostack))
    };
    check(failed)
}

/// Drops all that the TLB keeps of nested tables and of virtual CPUs: INVEPT and INVVPID of all contexts.
///
/// # Safety
/// In VMX root operation, on a CPU that has both of this type (`caps` asks for them).
pub unsafe fn flush_all() {
    const ALL_CONTEXTS: u64 = 2;
    let descriptor = [0u64; 2];
    // SAFETY: the caller's promise; the operand is a local. Neither can fail with a type that the CPU has.
    unsafe {
        asm!(
            "invept {t}, [{p}]", "invvpid {t}, [{p}]",
            t = in(reg) ALL_CONTEXTS, p = in(reg) &raw const descriptor, options(nostack)
        );
    }
}

/// The VMCS that is current on this CPU.
pub struct Current(());

impl Current {
    /// Says that there is one.
    ///
    /// # Safety
    /// In VMX root operation for as long as this lives.
    pub const unsafe fn new() -> Self {
        Self(())
    }
}

impl Vmcs for Current {
    fn read_raw(&self, encoding: u32) -> Result<u64, FieldError> {
        let (value, failed): (u64, u8);
        // SAFETY: in VMX root operation (`Current::new`); a missing field or VMCS is an error, not a fault.
        unsafe {
            asm!(
                "vmread {v}, {e}", "setbe {f}",
                v = out(reg) value, e = in(reg) u64::from(encoding), f = out(reg_byte) failed, options(nostack, nomem)
            );
        }
        check(failed).map_err(|_| FieldError { encoding })?;
        Ok(value)
    }

    fn write_raw(&mut self, encoding: u32, value: u64) -> Result<(), FieldError> {
        let failed: u8;
        // SAFETY: as above. What a VMCS may hold is decided where it is entered.
        unsafe {
            asm!(
                "vmwrite {e}, {v}", "setbe {f}",
                e = in(reg) u64::from(encoding), v = in(reg) value, f = out(reg_byte) failed, options(nostack)
            );
        }
        check(failed).map_err(|_| FieldError { encoding })
    }
}

/// Runs the guest of the current VMCS until it exits. 0, or 1 (CF) or 2 (ZF) if the entry failed before it began.
///
/// | register | entry |
/// |---|---|
/// | RDI | guest registers: loaded before, stored after (RSP lives in the VMCS) |
/// | RSI | not 0: the VMCS has been launched |
///
/// # Safety
/// In VMX root operation with interrupts off; the current VMCS is the caller's, its host state is this CPU's, its guest cannot
/// reach the MLE's memory.
#[unsafe(naked)]
pub unsafe extern "sysv64" fn enter(gprs: *mut Gprs, launched: u64) -> u64 {
    // x87, SSE, AVX, debug, XCR0 and syscall registers are never touched: what is in them stays the guest's.
    naked_asm!(
        hv::push_preserved!(),
        "push rdi",
        "mov eax, {host_rsp}",
        "vmwrite rax, rsp",
        "jbe 4f",
        "lea rcx, [rip + 3f]",
        "mov eax, {host_rip}",
        "vmwrite rax, rcx",
        "jbe 4f",
        "test rsi, rsi",
        "mov rax, [rdi + {rax}]",
        hv::load_gprs!(),
        "jnz 2f",
        "vmlaunch",
        "jmp 4f",
        "2: vmresume",
        // The instruction failed: the registers are as they were loaded, nothing is to be stored.
        "4: setc al",
        "setz cl",
        "movzx eax, al",
        "movzx ecx, cl",
        "lea eax, [rax + rcx * 2]",
        "pop rdi",
        "jmp 5f",
        // An exit: RSP is the host's again, everything else is the guest's.
        "3: push rax",
        "mov rax, [rsp + 8]",
        hv::store_gprs!(),
        "pop [rax + {rax}]",
        "pop rdi",
        "xor eax, eax",
        "5:",
        hv::pop_preserved!(),
        "ret",
        host_rsp = const HOST_RSP.encoding(),
        host_rip = const HOST_RIP.encoding(),
        rax = const offset_of!(Gprs, rax),
    )
}
