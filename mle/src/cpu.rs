//! A CPU under the MLE's control: its stacks, descriptor tables and SVM state, and the world switch's contract.
//!
//! UNSAFETY: turning SVM on, and the instructions of [`svm::insn`], whose preconditions hold because a [`Cpu`] exists.
#![expect(unsafe_code, reason = "the hardware edge")]

use core::sync::atomic::Ordering;

use hv::addr::PAGE_SIZE;
use hv::io::Msr;
use hv::radix::Tables;
use hv::vcpu::{Exit, Vcpu};
use svm::defs::{EFER_SVME, Vmcb};
use svm::vcpu::SvmVcpu;

use crate::guest::cpuid::Leaf;
use crate::guest::exits::Hardware;
use crate::guest::msr;
use crate::metal::Msrs;
use crate::paging;
use crate::pool::PagePool;
use crate::trap::{self, Arrived, IST_STACKS};

const VM_CR: u32 = 0xc001_0114;
const VM_HSAVE_PA: u32 = 0xc001_0117;
/// VM_CR.R_INIT: an INIT becomes #SX instead of a reset that would leave the MLE.
const VM_CR_R_INIT: u64 = 1 << 1;
const DEBUGCTL: u32 = 0x1d9;
const DEBUGCTL_BTF: u64 = 1 << 1;
/// VM_CR.DIS_A20M: the mask of address line 20 is ignored.
const VM_CR_DIS_A20M: u64 = 1 << 2;
/// Pages of an interrupt stack, under a guard page.
const IST_PAGES: u64 = 2;

/// The memory that a CPU needs, allocated before it starts. A CPU that is reset starts with the same again.
#[derive(Clone, Copy)]
pub struct CpuMemory {
    tables: *mut trap::Tables,
    arrived: &'static Arrived,
    stacks: [u64; IST_STACKS],
    host_save: u64,
    vmload_area: u64,
    vmcb: *mut Vmcb,
}
// SAFETY: the memory belongs to one CPU, whichever one makes use of it: `Cpu::load` says so.
unsafe impl Send for CpuMemory {}

impl CpuMemory {
    /// Takes pages for one CPU; guard pages under stacks are unmapped from `own`, once that is known.
    pub fn new(pool: &mut PagePool) -> Option<Self> {
        let block = pool.pages(
            const { (size_of::<trap::Tables>() + size_of::<Arrived>()).div_ceil(PAGE_SIZE as usize) } as u64,
        )?;
        let mut stacks = [0; IST_STACKS];
        for top in &mut stacks {
            let guard = pool.pages(IST_PAGES + 1)?;
            *top = guard.checked_add((IST_PAGES + 1) * PAGE_SIZE)?;
        }
        let arrived_at = block.checked_add(size_of::<trap::Tables>() as u64)?;
        Some(Self {
            // Fresh zeroed pages, aligned to more than both types ask; zeros are valid for both.
            tables: block as *mut trap::Tables,
            // SAFETY: as above, behind the tables, whose size is a multiple of their alignment.
            arrived: unsafe { &*(arrived_at as *const Arrived) },
            stacks,
            host_save: pool.pages(1)?,
            vmload_area: pool.pages(1)?,
            vmcb: pool.object()?,
        })
    }

    /// Unmaps the guard pages.
    pub fn guard(&self, pool: &mut PagePool, own: &Tables) -> Result<(), hv::radix::Error> {
        for top in self.stacks {
            paging::guard(pool, own, top.wrapping_sub((IST_PAGES + 1) * PAGE_SIZE))?;
        }
        Ok(())
    }
}

/// The running CPU with SVM on.
pub struct Cpu {
    arrived: &'static Arrived,
    host_save: u64,
    vmload_area: u64,
    msrs: Msrs,
    efer_bits: u64,
    guarded_init: bool,
    ignores_a20: bool,
}

impl Cpu {
    /// Loads this CPU's descriptor tables. Gives what [`Cpu::enable_svm`] needs, and the VMCB.
    ///
    /// # Safety
    /// On bare metal at CPL 0, GIF clear, once for each CPU and each time that it was reset, with the same memory; `first`
    /// on the BSP before the others run.
    pub unsafe fn load(memory: CpuMemory, first: bool) -> (Self, &'static mut Vmcb) {
        // SAFETY: `CpuMemory::new` took the pages for one CPU, for ever, and that CPU comes here with nothing else.
        let (tables, vmcb) = unsafe { (&mut *memory.tables, &mut *memory.vmcb) };
        // SAFETY: as above.
        unsafe { tables.load(memory.arrived, memory.stacks, first) };
        let cpu = Self {
            arrived: memory.arrived,
            host_save: memory.host_save,
            vmload_area: memory.vmload_area,
            // SAFETY: the caller's promise; this module keeps EFER and CR0 consistent.
            msrs: unsafe { Msrs::new() },
            efer_bits: msr::efer_bits(native_cpuid),
            guarded_init: false,
            ignores_a20: false,
        };
        (cpu, vmcb)
    }

    /// Turns SVM on.
    pub fn enable_svm(&mut self) {
        let efer = self.msrs.rdmsr(msr::EFER);
        self.msrs.wrmsr(msr::EFER, efer | EFER_SVME);
        // SAFETY: SVME was set above. SKINIT left GIF clear already; an AP that firmware started has it set.
        unsafe { svm::insn::clgi() };
        self.msrs.wrmsr(VM_HSAVE_PA, self.host_save);
        let vm_cr = self.msrs.rdmsr(VM_CR);
        self.msrs.wrmsr(VM_CR, vm_cr | VM_CR_R_INIT | VM_CR_DIS_A20M);
        let vm_cr = self.msrs.rdmsr(VM_CR);
        self.guarded_init = vm_cr & VM_CR_R_INIT != 0;
        self.ignores_a20 = vm_cr & VM_CR_DIS_A20M != 0;
        // SAFETY: SVME is set; the page is this CPU's alone.
        unsafe { svm::insn::vmsave(self.vmload_area) };
    }

    /// Whether an INIT that gets through becomes #SX. False on CPUs without VM_CR.R_INIT: there INIT resets.
    pub fn redirects_init(&self) -> bool {
        self.guarded_init
    }

    /// Whether no device can mask address line 20.
    pub fn ignores_a20_mask(&self) -> bool {
        self.ignores_a20
    }

    /// Runs `vcpu` until it exits.
    pub fn run(&mut self, vcpu: &mut SvmVcpu<'_>) -> Exit {
        if self.arrived.nmi.swap(false, Ordering::Relaxed) {
            vcpu.inject_nmi();
        }
        vcpu.prepare();
        let (gprs, vmcb) = vcpu.parts();
        // SAFETY: SVM is on (`enable_svm` comes before any run), GIF is clear but for `let_pending_in`; the VMCB's
        // nested tables leave out the MLE (checked where they are built), and the VMLOAD area is this CPU's.
        unsafe { svm::insn::vmrun(gprs, vmcb, self.vmload_area) };
        vcpu.exit()
    }

    /// Runs a sandbox. With `interruptible`, a pending interrupt ends the run; it stays pending.
    pub fn run_interruptible(&mut self, vcpu: &mut SvmVcpu<'_>, interruptible: bool) -> Exit {
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

    /// Makes single steps step by instructions, not by branches; says whether the guest had it otherwise.
    ///
    /// Spec: \[APM2\] "Debug-Control MSR (DebugCtl)", BTF.
    pub fn hold_branch_trap(&self) -> bool {
        let value = self.msrs.rdmsr(DEBUGCTL);
        if value & DEBUGCTL_BTF != 0 {
            self.msrs.wrmsr(DEBUGCTL, value & !DEBUGCTL_BTF);
        }
        value & DEBUGCTL_BTF != 0
    }

    /// Ends what [`Cpu::hold_branch_trap`] began.
    pub fn restore_branch_trap(&self, was_on: bool) {
        if was_on {
            self.msrs.wrmsr(DEBUGCTL, self.msrs.rdmsr(DEBUGCTL) | DEBUGCTL_BTF);
        }
    }

    /// Exchanges the FPU, SSE and AVX registers with what `area` keeps: firmware must neither see nor change the guest's.
    pub fn swap_fpu(&mut self, area: &mut FpuArea) {
        area.swap();
    }

    /// Lets pending SMI, NMI and INIT be taken here, in the host.
    pub fn let_pending_in(&mut self) {
        // SAFETY: SVM is on and this CPU's IDT handles NMI and #SX; interrupts are off.
        unsafe {
            svm::insn::stgi();
            svm::insn::clgi();
        }
    }

    /// Takes the interrupts that the APIC delivers now: with the timer borrowed, those of the top class alone.
    pub fn take_interrupts(&mut self) {
        // SAFETY: as for `let_pending_in`; the handlers of these vectors acknowledge and return. STI holds interrupts for
        // one instruction.
        unsafe {
            svm::insn::stgi();
            core::arch::asm!("sti", "nop", "cli", options(nostack));
            svm::insn::clgi();
        }
    }

    /// Interrupts that were taken for the guest since last asked: see [`trap::Arrived::held`].
    pub fn held_interrupts(&self) -> u32 {
        self.arrived.held.swap(0, Ordering::Relaxed)
    }

    /// Waits for an interrupt of any kind; one that arrived before the call ends it too.
    pub fn doze(&mut self) {
        // SAFETY: as for `let_pending_in`; STI holds interrupts until HLT waits, so a wake-up cannot be lost.
        unsafe {
            svm::insn::stgi();
            core::arch::asm!("sti", "hlt", "cli", options(nostack));
            svm::insn::clgi();
        }
    }

    /// Whether a redirected INIT has come since last asked.
    pub fn init_arrived(&self) -> bool {
        self.arrived.init.swap(false, Ordering::Relaxed)
    }
}

/// CPUID.
pub fn native_cpuid(leaf: u32, subleaf: u32) -> Leaf {
    let r = core::arch::x86_64::__cpuid_count(leaf, subleaf);
    [r.eax, r.ebx, r.ecx, r.edx]
}

impl Hardware for Cpu {
    fn cpuid(&self, leaf: u32, subleaf: u32) -> Leaf {
        native_cpuid(leaf, subleaf)
    }
    fn rdmsr(&self, index: u32) -> u64 {
        self.msrs.rdmsr(index)
    }
    fn wrmsr(&self, index: u32, value: u64) {
        self.msrs.wrmsr(index, value);
    }
    fn tsc(&self) -> u64 {
        // SAFETY: RDTSC reads a counter.
        unsafe { x86::time::rdtsc() }
    }
    fn write_back_caches(&self) {
        // SAFETY: WBINVD at CPL 0 loses nothing.
        unsafe { core::arch::asm!("wbinvd", options(nostack)) }
    }
    fn efer_bits(&self) -> u64 {
        self.efer_bits
    }
}

/// Where a virtual CPU stands, for reports.
pub fn describe(vcpu: &SvmVcpu<'_>) -> impl core::fmt::Display + use<> {
    let (c, rip, cpl) = (vcpu.control(), vcpu.rip(), vcpu.cpl());
    Description { rip, cr0: c.cr0, cr3: c.cr3, cr4: c.cr4, efer: c.efer, cpl }
}

struct Description {
    rip: u64,
    cr0: u64,
    cr3: u64,
    cr4: u64,
    efer: u64,
    cpl: u8,
}

impl core::fmt::Display for Description {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(
            f,
            "rip {:#x} cpl {} cr0 {:#x} cr3 {:#x} cr4 {:#x} efer {:#x}",
            self.rip, self.cpl, self.cr0, self.cr3, self.cr4, self.efer
        )
    }
}

/// Two sets of extended registers: whoever does not run has its own here.
pub struct FpuArea {
    /// 64-byte aligned: what to load next, and where what is in the registers goes.
    load: u64,
    store: u64,
    xsave: bool,
}

impl FpuArea {
    /// Room for both sets; the first load gives registers as after reset.
    pub fn new(pool: &mut PagePool) -> Option<Self> {
        const XSAVE: u32 = 1 << 26;
        const FXSAVE_FCW: u64 = 0x37f;
        const MXCSR_AT: u64 = 24;
        let [_, _, features, _] = native_cpuid(1, 0);
        let [_, _, size, _] = native_cpuid(0xd, 0);
        let xsave = features & XSAVE != 0;
        let pages = if xsave { u64::from(size).div_ceil(PAGE_SIZE).max(1) } else { 1 };
        let (load, store) = (pool.pages(pages)?, pool.pages(pages)?);
        // SAFETY: fresh pages; control word and MXCSR of the FXSAVE layout, which both instructions use.
        unsafe {
            (load as *mut u64).write(FXSAVE_FCW);
            (load.wrapping_add(MXCSR_AT) as *mut u32).write(0x1f80);
        }
        Some(Self { load, store, xsave })
    }

    fn swap(&mut self) {
        const CR4_OSXSAVE: u64 = 1 << 18;
        // SAFETY: both areas are aligned and large enough for all that CPUID leaf Dh lists; what is loaded was stored
        // here, or is the state of reset. CR4 allows the instructions while they are executed; the MLE itself uses none
        // of these registers.
        unsafe {
            let cr4 = x86::controlregs::cr4().bits() as u64;
            let with = cr4 | if self.xsave { CR4_OSXSAVE } else { 0 };
            core::arch::asm!("mov cr4, {}", in(reg) with, options(nostack));
            if self.xsave {
                core::arch::asm!(
                    "xsave64 [{store}]",
                    "xrstor64 [{load}]",
                    store = in(reg) self.store,
                    load = in(reg) self.load,
                    in("eax") u32::MAX,
                    in("edx") u32::MAX,
                    options(nostack)
                );
            } else {
                core::arch::asm!(
                    "fxsave64 [{store}]",
                    "fxrstor64 [{load}]",
                    store = in(reg) self.store,
                    load = in(reg) self.load,
                    options(nostack)
                );
            }
            core::arch::asm!("mov cr4, {}", in(reg) cr4, options(nostack));
        }
        core::mem::swap(&mut self.load, &mut self.store);
    }
}
