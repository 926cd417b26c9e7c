//! VMX on a CPU: switched on, the world switch, and what SVM's GIF does elsewhere.
//!
//! Interrupts are off whenever the MLE runs. An NMI that arrives then is noted by its handler and delivered to the guest; so
//! that none is noted between the last look and the entry, and forgotten, the handler also asks the current VMCS for an exit
//! as soon as an NMI can be delivered. INIT waits in VMX root operation until a guest runs, which it makes exit. An SMI cannot be
//! held or seen.
//!
//! UNSAFETY: the instructions of [`vmx::insn`], whose preconditions hold because a [`VmxHost`] exists.
#![expect(unsafe_code, reason = "the hardware edge")]

use core::arch::asm;
use core::sync::atomic::Ordering;

use hv::io::Msr;
use hv::vcpu::{Exit, Role};
use vmx::caps::{Caps, Refusal, allow_vmxon};
use vmx::defs::{CR4_VMXE, PRIMARY_CONTROLS, primary};
use vmx::insn::{self, Current, Failed};
use vmx::vcpu::{HostState, Machine, VmxVcpu};
use vmx::vmcs::{FieldError, Vmcs};

use crate::guest::msr;
use crate::metal::Msrs;
use crate::trap::{self, Arrived, Bases};

const PAT: u32 = 0x277;
const KERNEL_GS_BASE: u32 = 0xc000_0102;
/// The raw exit code of a VMCS field that the CPU does not take; exit reasons have 32 bits.
const FIELD_ERROR: u64 = 1 << 32;
/// The raw exit code of an entry that failed before it began; the VM-instruction error follows.
const ENTRY_ERROR: u64 = 2 << 32;

/// Whether a VMX operation inside SMX is meant, and what the CPU can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Traits {
    /// Capabilities.
    pub caps: Caps,
    /// SENTER was before.
    pub smx: bool,
}

/// A virtual CPU with its VMCS.
pub struct VmxCpu {
    /// Its logic.
    pub vcpu: VmxVcpu,
    region: u64,
    /// The region has a revision identifier, and no CPU keeps anything of it.
    clean: bool,
    launched: bool,
}

impl VmxCpu {
    /// A virtual CPU whose VMCS will be in the page at `region`.
    ///
    /// # Safety
    /// Nothing else uses the page while the virtual CPU lives.
    pub unsafe fn new(region: u64, role: Role, machine: Machine, caps: &Caps) -> Self {
        // SAFETY: a page of the pool, mapped; the caller gives it away.
        unsafe { (region as *mut u32).write(caps.revision) };
        Self { vcpu: VmxVcpu::new(caps, role, machine), region, clean: false, launched: false }
    }
}

/// The running CPU in VMX root operation.
pub struct VmxHost {
    host: HostState,
    vmcs: Current,
    /// Region of the current VMCS, or 0.
    current: u64,
}

/// What an MLE's NMI handler does on a CPU in VMX root operation: see the module.
pub fn nmi_arrived() {
    // SAFETY: `Arrived::vmx` said so.
    let mut vmcs = unsafe { Current::new() };
    // Without a current VMCS there is nothing to ask: the next entry looks.
    let _ =
        vmcs.read(PRIMARY_CONTROLS).and_then(|now| vmcs.write(PRIMARY_CONTROLS, now | primary::NMI_WINDOW));
}

impl VmxHost {
    /// Enters VMX root operation.
    ///
    /// # Safety
    /// As for [`super::Host::enable`].
    pub unsafe fn enable(
        traits: &Traits,
        region: u64,
        msrs: &Msrs,
        bases: &Bases,
        arrived: &Arrived,
    ) -> Result<Self, Refusal> {
        const SMX: u32 = 1 << 6;
        let [_, _, features, _] = crate::cpu::native_cpuid(1, 0);
        allow_vmxon(msrs, traits.smx, features & SMX != 0)?;
        let (cr0, cr3, cr4): (u64, u64, u64);
        // SAFETY: reads control registers.
        unsafe {
            asm!("mov {}, cr0", out(reg) cr0, options(nostack, nomem));
            asm!("mov {}, cr3", out(reg) cr3, options(nostack, nomem));
            asm!("mov {}, cr4", out(reg) cr4, options(nostack, nomem));
        }
        let (cr0, cr4) = (cr0 | traits.caps.cr0_fixed, cr4 | traits.caps.cr4_fixed | CR4_VMXE);
        // SAFETY: bits that VMX operation needs: PE, NE, PG, which are set, and VMXE, which only allows VMXON. The region is
        // this CPU's page.
        unsafe {
            asm!("mov cr0, {}", in(reg) cr0, options(nostack));
            asm!("mov cr4, {}", in(reg) cr4, options(nostack));
            (region as *mut u32).write(traits.caps.revision);
            insn::vmxon(region).map_err(|_| Refusal::Instruction("VMXON"))?;
        }
        arrived.vmx.store(true, Ordering::Relaxed);
        let host = HostState {
            cr0,
            cr3,
            cr4,
            efer: msrs.rdmsr(msr::EFER),
            pat: msrs.rdmsr(PAT),
            cs: trap::CODE,
            data: trap::DATA,
            tr: trap::TSS,
            gs_base: bases.arrived,
            tr_base: bases.tss,
            gdtr_base: bases.gdt,
            idtr_base: bases.idt,
        };
        // SAFETY: VMXON succeeded, and nothing leaves VMX operation while the MLE runs guests.
        Ok(Self { host, vmcs: unsafe { Current::new() }, current: 0 })
    }

    /// Leaves VMX operation, so that CR4.VMXE is clear and INIT, as outside of it, not blocked. False if VMXOFF failed.
    pub fn disable(&mut self, arrived: &Arrived) -> bool {
        // First, because an NMI's handler asks the current VMCS while this is set.
        arrived.vmx.store(false, Ordering::Relaxed);
        self.current = 0;
        // SAFETY: VMX is on (`enable`); no guest runs on this CPU before it is enabled anew. CR4.VMXE may be cleared outside of VMX
        // operation alone: where VMXOFF failed, it stays.
        unsafe {
            let off = insn::vmxoff().is_ok();
            if off {
                asm!("mov cr4, {}", in(reg) self.host.cr4 & !CR4_VMXE, options(nostack));
            }
            off
        }
    }

    /// Runs `cpu` until it exits.
    pub fn run(&mut self, cpu: &mut VmxCpu, arrived: &Arrived) -> Exit {
        if let Some(cr2) = cpu.vcpu.take_cr2() {
            write_cr2(cr2);
        }
        self.switch(cpu, Some(arrived), false)
    }

    /// Runs a sandbox: on whatever CPU makes the call.
    pub fn run_sandbox(
        &mut self,
        cpu: &mut VmxCpu,
        interruptible: bool,
        msrs: &Msrs,
        arrived: &Arrived,
    ) -> Exit {
        // What an exit does not exchange, and the sandbox could read or change without one: CR2, and by SWAPGS
        // KERNEL_GS_BASE. A run that takes no interrupts holds all but ExtINT by the task priority.
        let (cr2, kernel_gs) = (read_cr2(), msrs.rdmsr(KERNEL_GS_BASE));
        write_cr2(0);
        msrs.wrmsr(KERNEL_GS_BASE, 0);
        let priority = (!interruptible).then(|| exchange_priority(0xf));
        let exit = self.switch(cpu, None, interruptible);
        if let Some(priority) = priority {
            exchange_priority(priority);
        }
        msrs.wrmsr(KERNEL_GS_BASE, kernel_gs);
        write_cr2(cr2);
        if exit == Exit::Nmi {
            arrived.nmi.store(true, Ordering::Relaxed);
        }
        // The next call may be on another CPU, which must not find anything of it here.
        self.current = 0;
        cpu.launched = false;
        // SAFETY: the sandbox's own region.
        if unsafe { insn::vmclear(cpu.region) }.is_err() {
            return Exit::InvalidState;
        }
        exit
    }

    fn switch(&mut self, cpu: &mut VmxCpu, guest: Option<&Arrived>, interruptible: bool) -> Exit {
        match self.try_switch(cpu, guest, interruptible) {
            Ok(exit) => exit,
            Err(FieldError { encoding }) => {
                Exit::Unexpected { code: FIELD_ERROR | u64::from(encoding), info1: 0, info2: 0 }
            }
        }
    }

    fn try_switch(
        &mut self,
        cpu: &mut VmxCpu,
        guest: Option<&Arrived>,
        interruptible: bool,
    ) -> Result<Exit, FieldError> {
        if self.current != cpu.region && self.make_current(cpu).is_err() {
            return Ok(Exit::InvalidState);
        }
        if !cpu.launched {
            cpu.vcpu.set_host(&mut self.vmcs, &self.host)?;
        }
        let waiting = guest.is_some_and(|arrived| arrived.nmi.load(Ordering::Relaxed));
        let delivered = cpu.vcpu.enter(&mut self.vmcs, waiting)?;
        if guest.is_none() {
            cpu.vcpu.exit_on_interrupts(&mut self.vmcs, interruptible)?;
        }
        if let Some(arrived) = guest.filter(|_| delivered) {
            arrived.nmi.store(false, Ordering::Relaxed);
        }
        if cpu.vcpu.take_flush() || !cpu.launched {
            // SAFETY: in VMX root operation; `Caps::read` asked for both instructions with this type.
            unsafe { insn::flush_all() };
        }
        // SAFETY: in VMX root operation with interrupts off; the VMCS is current, its host state is this CPU's, and its
        // nested tables leave out the MLE (checked where they are built).
        let failed = unsafe { insn::enter(cpu.vcpu.gprs_pointer(), cpu.launched.into()) };
        if failed != 0 {
            let error = self.vmcs.read(vmx::defs::INSTRUCTION_ERROR).unwrap_or(0);
            return Ok(Exit::Unexpected { code: ENTRY_ERROR | failed, info1: error.into(), info2: 0 });
        }
        cpu.launched = true;
        let exit = cpu.vcpu.exit(&self.vmcs)?;
        if let (Exit::Nmi, Some(arrived)) = (exit, guest)
            && !cpu.vcpu.nmi_window_opened()
        {
            arrived.nmi.store(true, Ordering::Relaxed);
        }
        Ok(exit)
    }

    fn make_current(&mut self, cpu: &mut VmxCpu) -> Result<(), Failed> {
        // SAFETY: the region is this virtual CPU's, and active on no other CPU: a guest's never is, the sandbox's is cleared
        // after each run.
        unsafe {
            if !cpu.clean {
                insn::vmclear(cpu.region)?;
                cpu.clean = true;
            }
            insn::vmptrld(cpu.region)?;
        }
        self.current = cpu.region;
        Ok(())
    }

    /// Takes the interrupts that the APIC delivers now.
    pub fn take_interrupts(&mut self) {
        // SAFETY: the handlers of these vectors acknowledge and return. STI holds interrupts for one instruction.
        unsafe { asm!("sti", "nop", "cli", options(nostack)) }
    }

    /// Waits for an interrupt of any kind.
    pub fn doze(&mut self) {
        // SAFETY: as above; STI holds interrupts until HLT waits, so a wake-up cannot be lost.
        unsafe { asm!("sti", "hlt", "cli", options(nostack)) }
    }
}

fn read_cr2() -> u64 {
    let value;
    // SAFETY: reads a register.
    unsafe { asm!("mov {}, cr2", out(reg) value, options(nostack, nomem)) };
    value
}

fn write_cr2(value: u64) {
    // SAFETY: the MLE has no use of CR2 but in reports of its own faults.
    unsafe { asm!("mov cr2, {}", in(reg) value, options(nostack, nomem)) }
}

/// Sets the task priority of this CPU's APIC; gives what it was.
fn exchange_priority(new: u64) -> u64 {
    let old;
    // SAFETY: it decides which interrupts wait, and the MLE runs with interrupts off.
    unsafe { asm!("mov {}, cr8", "mov cr8, {}", out(reg) old, in(reg) new, options(nostack)) };
    old
}
