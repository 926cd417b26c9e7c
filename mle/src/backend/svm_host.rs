//! SVM on a CPU: switched on, the world switch, GIF.
//!
//! UNSAFETY: the instructions of [`svm::insn`], whose preconditions hold because an [`SvmHost`] exists.
#![expect(unsafe_code, reason = "the hardware edge")]

use core::sync::atomic::Ordering;

use hv::io::Msr;
use hv::vcpu::Exit;
use svm::defs::EFER_SVME;
use svm::vcpu::SvmVcpu;

use crate::guest::msr;
use crate::metal::Msrs;
use crate::trap::Arrived;

const VM_CR: u32 = 0xc001_0114;
const VM_HSAVE_PA: u32 = 0xc001_0117;
/// VM_CR.R_INIT: an INIT becomes #SX instead of a reset that would leave the MLE.
const VM_CR_R_INIT: u64 = 1 << 1;
/// VM_CR.DIS_A20M: the mask of address line 20 is ignored.
const VM_CR_DIS_A20M: u64 = 1 << 2;

/// The running CPU with SVM on.
pub struct SvmHost {
    vmload_area: u64,
    /// INIT becomes #SX.
    pub guarded_init: bool,
    /// No device can mask address line 20.
    pub ignores_a20: bool,
}

impl SvmHost {
    /// Turns SVM on.
    ///
    /// # Safety
    /// As for [`super::Host::enable`].
    pub unsafe fn enable([host_save, vmload_area]: [u64; 2], msrs: &Msrs) -> Self {
        let efer = msrs.rdmsr(msr::EFER);
        msrs.wrmsr(msr::EFER, efer | EFER_SVME);
        // SAFETY: SVME was set above. SKINIT left GIF clear already; an AP that firmware started has it set.
        unsafe { svm::insn::clgi() };
        msrs.wrmsr(VM_HSAVE_PA, host_save);
        let vm_cr = msrs.rdmsr(VM_CR);
        msrs.wrmsr(VM_CR, vm_cr | VM_CR_R_INIT | VM_CR_DIS_A20M);
        let vm_cr = msrs.rdmsr(VM_CR);
        // SAFETY: SVME is set; the page is this CPU's alone.
        unsafe { svm::insn::vmsave(vmload_area) };
        let (guarded_init, ignores_a20) = (vm_cr & VM_CR_R_INIT != 0, vm_cr & VM_CR_DIS_A20M != 0);
        Self { vmload_area, guarded_init, ignores_a20 }
    }

    /// Turns SVM off: what is pending may come now, and an INIT resets the CPU.
    pub fn disable(&mut self, msrs: &Msrs) {
        msrs.wrmsr(VM_CR, msrs.rdmsr(VM_CR) & !VM_CR_R_INIT);
        // SAFETY: SVM is on, and this CPU's IDT handles NMI; interrupts are off.
        unsafe { svm::insn::stgi() };
        msrs.wrmsr(msr::EFER, msrs.rdmsr(msr::EFER) & !EFER_SVME);
    }

    /// Runs `vcpu` until it exits.
    pub fn run(&mut self, vcpu: &mut SvmVcpu<'_>, arrived: &Arrived) -> Exit {
        if arrived.nmi.swap(false, Ordering::Relaxed) {
            vcpu.inject_nmi();
        }
        vcpu.prepare();
        let (gprs, vmcb) = vcpu.parts();
        // SAFETY: SVM is on (`enable`), GIF is clear but for `let_pending_in`; the VMCB's nested tables leave out the MLE
        // (checked where they are built), and the VMLOAD area is this CPU's.
        unsafe { svm::insn::vmrun(gprs, vmcb, self.vmload_area) };
        vcpu.exit()
    }

    /// Runs a sandbox.
    pub fn run_sandbox(&mut self, vcpu: &mut SvmVcpu<'_>, interruptible: bool) -> Exit {
        if interruptible {
            // SAFETY: GIF is clear, so IF lets nothing in here: it is what V_INTR_MASKING looks at.
            unsafe { x86::irq::enable() };
        }
        vcpu.prepare();
        let (gprs, vmcb) = vcpu.parts();
        // SAFETY: as in `run`.
        unsafe {
            svm::insn::vmrun(gprs, vmcb, self.vmload_area);
            x86::irq::disable();
        }
        vcpu.exit()
    }

    /// Lets pending SMI, NMI and INIT be taken here, in the host.
    pub fn let_pending_in(&mut self) {
        // SAFETY: SVM is on and this CPU's IDT handles NMI and #SX; interrupts are off.
        unsafe {
            svm::insn::stgi();
            svm::insn::clgi();
        }
    }

    /// Takes the interrupts that the APIC delivers now.
    pub fn take_interrupts(&mut self) {
        // SAFETY: as for `let_pending_in`; the handlers of these vectors acknowledge and return. STI holds interrupts for
        // one instruction.
        unsafe {
            svm::insn::stgi();
            core::arch::asm!("sti", "nop", "cli", options(nostack));
            svm::insn::clgi();
        }
    }

    /// Waits for an interrupt of any vendor.
    pub fn doze(&mut self) {
        // SAFETY: as for `let_pending_in`; STI holds interrupts until HLT waits, so a wake-up cannot be lost.
        unsafe {
            svm::insn::stgi();
            core::arch::asm!("sti", "hlt", "cli", options(nostack));
            svm::insn::clgi();
        }
    }
}
