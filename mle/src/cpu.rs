//! A CPU under the MLE's control: its stacks, descriptor tables and virtualization.
//!
//! UNSAFETY: descriptor tables, registers that the guest's FPU state is in.
#![expect(unsafe_code, reason = "the hardware edge")]

use core::sync::atomic::Ordering;

use firmware::smm::facts;
use hv::addr::{PAGE_SIZE, PhysRange};
use hv::io::Msr;
use hv::radix::Tables;
use hv::vcpu::Exit;

use crate::backend::{CpuPages, Host, Refusal, Vcpu, VcpuPage, Vendor};
use crate::guest::cpuid::Leaf;
use crate::guest::exits::Hardware;
use crate::guest::msr::{self, Guards};
use crate::metal::Msrs;
use crate::paging;
use crate::pool::PagePool;
use crate::trap::{self, Arrived, Bases, IST_STACKS};

const DEBUGCTL: u32 = 0x1d9;
const DEBUGCTL_BTF: u64 = 1 << 1;
/// Pages of an interrupt stack, under a guard page.
const IST_PAGES: u64 = 2;

/// The memory that a CPU needs, allocated before it starts. A CPU that is reset starts with the same again.
#[derive(Clone, Copy)]
pub struct CpuMemory {
    tables: *mut trap::Tables,
    arrived: &'static Arrived,
    stacks: [u64; IST_STACKS],
    pages: CpuPages,
    vcpu: VcpuPage,
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
            pages: CpuPages::new(pool)?,
            vcpu: VcpuPage::new(pool)?,
        })
    }

    /// The descriptor tables, which stay as they are once they are loaded.
    pub fn constant(&self) -> Option<PhysRange> {
        PhysRange::new(self.tables as u64, size_of::<trap::Tables>() as u64)
    }

    /// Unmaps the guard pages.
    pub fn guard(&self, pool: &mut PagePool, own: &Tables) -> Result<(), hv::radix::Error> {
        for top in self.stacks {
            paging::guard(pool, own, top.wrapping_sub((IST_PAGES + 1) * PAGE_SIZE))?;
        }
        Ok(())
    }
}

/// The running CPU with its virtualization on.
pub struct Cpu {
    arrived: &'static Arrived,
    msrs: Msrs,
    efer_bits: u64,
    guards: Guards,
    /// The CPU, if it counts the SMIs that are no exits.
    counting: Option<facts::Cpu>,
    host: Host,
}

/// A CPU with its own descriptor tables, whose virtualization is still off.
pub struct Loaded {
    memory: CpuMemory,
    bases: Bases,
    msrs: Msrs,
}

impl Loaded {
    /// Loads this CPU's descriptor tables.
    ///
    /// # Safety
    /// On bare metal at CPL 0, GIF or IF clear, once for each CPU and each time that it was reset, with the same memory;
    /// `first` on the BSP before the others run.
    pub unsafe fn new(memory: CpuMemory, first: bool) -> Self {
        // SAFETY: `CpuMemory::new` took the pages for one CPU, for ever, and that CPU comes here with nothing else.
        let tables = unsafe { &mut *memory.tables };
        // SAFETY: as above.
        let bases = unsafe { tables.load(memory.arrived, memory.stacks, first) };
        // A CPU that was reset is no longer in VMX operation.
        memory.arrived.vmx.store(false, Ordering::Relaxed);
        // SAFETY: the caller's promise; the MLE keeps EFER and CR0 consistent.
        Self { memory, bases, msrs: unsafe { Msrs::new() } }
    }

    /// Turns virtualization on. Gives the page for this CPU's virtual CPU, too.
    ///
    /// # Safety
    /// The MLE's page tables are in force.
    pub unsafe fn enable(self, vendor: Vendor) -> Result<(Cpu, VcpuPage), Refusal> {
        let Self { memory, bases, msrs } = self;
        // SAFETY: a `Loaded` is on bare metal with its descriptor tables; its pages are its own; paging by the caller.
        let host = unsafe { Host::enable(vendor, memory.pages, &msrs, &bases, memory.arrived) }?;
        let efer_bits = msr::efer_bits(native_cpuid);
        let guards = Guards::of(vendor);
        let intercepts = vendor.is_svm();
        let counting = facts::Cpu::identify(native_cpuid);
        let counting = (!intercepts && counting.counts_smis()).then_some(counting);
        Ok((Cpu { arrived: memory.arrived, msrs, efer_bits, guards, counting, host }, memory.vcpu))
    }
}

impl Cpu {
    /// Whether an INIT can do no harm to the MLE.
    pub fn redirects_init(&self) -> bool {
        self.host.redirects_init()
    }

    /// Whether a Startup IPI of the guest starts its CPU without the MLE's looking at the APIC page.
    pub fn sees_startup(&self) -> bool {
        self.host.sees_startup()
    }

    /// SMIs that this CPU has taken since its reset, where it counts what is no exit.
    pub fn smi_count(&self) -> Option<u32> {
        self.counting.as_ref().and_then(|cpu| facts::smi_count(cpu, &self.msrs))
    }

    /// Its registers.
    pub fn msrs(&self) -> &Msrs {
        &self.msrs
    }

    /// Whether no device can mask address line 20.
    pub fn ignores_a20_mask(&self) -> bool {
        self.host.ignores_a20_mask()
    }

    /// Turns virtualization off, until this CPU is [`Loaded`] anew, see [`Host::disable`].
    pub fn leave_virtualization(&mut self) -> bool {
        self.host.disable(&self.msrs, self.arrived)
    }

    /// Runs the guest until it exits.
    pub fn run(&mut self, vcpu: &mut Vcpu<'_>) -> Exit {
        self.host.run(vcpu, self.arrived)
    }

    /// Runs a sandbox. With `interruptible`, a pending interrupt ends the run; it stays pending.
    pub fn run_sandbox(&mut self, vcpu: &mut Vcpu<'_>, interruptible: bool) -> Exit {
        self.host.run_sandbox(vcpu, interruptible, &self.msrs, self.arrived)
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
        self.host.let_pending_in();
    }

    /// Takes the interrupts that the APIC delivers now: with the timer borrowed, those of the top class alone.
    pub fn take_interrupts(&mut self) {
        self.host.take_interrupts();
    }

    /// Interrupts that were taken for the guest since last asked: see [`trap::Arrived::held`].
    pub fn held_interrupts(&self) -> u32 {
        self.arrived.held.swap(0, Ordering::Relaxed)
    }

    /// Vector of an interrupt that was lost since last asked: see [`trap::Arrived::lost`].
    pub fn lost_interrupt(&self) -> Option<u8> {
        let lost = self.arrived.lost.swap(0, Ordering::Relaxed);
        (lost & trap::LOST != 0).then_some(lost as u8)
    }

    /// Waits for an interrupt of any kind; one that arrived before the call ends it too.
    pub fn doze(&mut self) {
        self.host.doze();
    }

    /// Whether an NMI has come for the guest since last asked: the next run has it otherwise.
    pub fn nmi_arrived(&self) -> bool {
        self.arrived.nmi.swap(false, Ordering::Relaxed)
    }

    /// Whether a redirected INIT has come since last asked.
    pub fn init_arrived(&self) -> bool {
        self.arrived.init.swap(false, Ordering::Relaxed)
    }
}

/// Sets XCR0 to a value that the guest had there, or may have: `exits` compares it with CPUID.
pub fn set_xcr0(value: u64) {
    const CR4_OSXSAVE: u64 = 1 << 18;
    // SAFETY: the CPU has XSAVE, as its guest executed XSETBV, and takes this value.
    unsafe {
        let cr4 = x86::controlregs::cr4().bits() as u64;
        core::arch::asm!(
            "mov cr4, {with}", "xsetbv", "mov cr4, {cr4}",
            with = in(reg) cr4 | CR4_OSXSAVE, cr4 = in(reg) cr4,
            in("ecx") 0, in("eax") value as u32, in("edx") (value >> 32) as u32,
            options(nostack)
        );
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
    fn set_xcr0(&self, value: u64) {
        set_xcr0(value);
    }
    fn efer_bits(&self) -> u64 {
        self.efer_bits
    }
    fn guards(&self) -> Guards {
        self.guards
    }
}

/// Where a virtual CPU stands, for reports.
pub fn describe(vcpu: &Vcpu<'_>) -> impl core::fmt::Display + use<> {
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
