//! The CPU vendor's virtualization, chosen once by what the CPU offers. Nothing outside of this module names a vendor's
//! virtual CPU, permission map or table format.
//!
//! An enum, not a type parameter: the MLE's logic is compiled once. What a virtual CPU can do is [`hv::vcpu::Vcpu`], to which
//! [`Vcpu`] dereferences.

mod maps;
mod svm_host;
mod vmx_host;

use core::fmt;
use core::ops::{Deref, DerefMut};

use firmware::smm::check::Words;
use firmware::tables::HypercallInsn;
use hv::io::Msr;
use hv::radix::{self, EPT, Format, NPT, PageSize, Tables};
use hv::space::{AddressSpace, View};
use hv::vcpu::{Exit, Role};
use svm::defs::Vmcb;
use svm::vcpu::{Machine as SvmMachine, SvmVcpu};
use vmx::caps::Caps;
use vmx::mtrr::Types;
use vmx::vcpu::Machine as VmxMachine;

pub use self::maps::{MsrIntercept, MsrMap, PortMap};
use self::svm_host::SvmHost;
pub use self::vmx_host::nmi_arrived;
use self::vmx_host::{Traits, VmxCpu, VmxHost};
use crate::guest::cpuid::Leaf;
use crate::metal::Msrs;
use crate::pool::PagePool;
use crate::trap::{Arrived, Bases};

/// Which back end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vendor {
    /// AMD SVM.
    Svm,
    /// Intel VMX.
    Vmx(Traits),
}

/// Why a CPU cannot run the MLE.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// Neither SVM nor VMX.
    NoVirtualization,
    /// SVM without nested paging.
    NoNestedPaging,
    /// What VMX lacks.
    Vmx(vmx::caps::Refusal),
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoVirtualization => f.write_str("this CPU has neither SVM nor VMX"),
            Self::NoNestedPaging => f.write_str("this CPU has no nested paging (CPUID 8000_000Ah EDX bit 0)"),
            Self::Vmx(refusal) => write!(f, "{refusal}"),
        }
    }
}

impl From<vmx::caps::Refusal> for Refusal {
    fn from(refusal: vmx::caps::Refusal) -> Self {
        Self::Vmx(refusal)
    }
}

impl Vendor {
    /// What the CPU has, or what it lacks. `smx`: it was launched by SENTER.
    pub fn of_cpu(cpuid: impl Fn(u32, u32) -> Leaf, msrs: &impl Msr, smx: bool) -> Result<Self, Refusal> {
        const SVM: u32 = 1 << 2;
        const VMX: u32 = 1 << 5;
        let [.., ext_c, _] = cpuid(0x8000_0001, 0);
        let [.., c, _] = cpuid(1, 0);
        if ext_c & SVM != 0 {
            let [.., d_svm] = cpuid(0x8000_000a, 0);
            return if d_svm & 1 != 0 { Ok(Self::Svm) } else { Err(Refusal::NoNestedPaging) };
        }
        if c & VMX == 0 {
            return Err(Refusal::NoVirtualization);
        }
        Ok(Self::Vmx(Traits { caps: Caps::read(msrs)?, smx }))
    }

    /// Layout of nested tables.
    pub fn nested_format(self) -> &'static Format {
        match self {
            Self::Svm => &NPT,
            Self::Vmx(_) => &EPT,
        }
    }

    /// Largest page of nested tables, where the MLE's own may be as large as `own`.
    pub fn largest_nested(self, own: PageSize) -> PageSize {
        match self {
            Self::Svm => own,
            Self::Vmx(traits) if traits.caps.pages_1g => PageSize::Size1G,
            Self::Vmx(_) => PageSize::Size2M,
        }
    }

    /// Maps what the guest can reach. EPT has to repeat what the MTRRs say of each page, NPT has not.
    pub fn map_guest(
        self,
        space: &AddressSpace,
        nested: &Tables,
        pool: &mut PagePool,
        msrs: &impl Msr,
        bits: u32,
    ) -> Result<(), radix::Error> {
        match self {
            Self::Svm => space.map_view(View::Guest, nested, pool),
            Self::Vmx(_) => {
                let types = Types::read(msrs, bits);
                space.map_view_typed(View::Guest, nested, pool, |at| types.at(at))
            }
        }
    }

    /// The instruction by which the guest calls.
    pub fn hypercall(self) -> HypercallInsn {
        match self {
            Self::Svm => HypercallInsn::Vmmcall,
            Self::Vmx(_) => HypercallInsn::Vmcall,
        }
    }

    /// Whether a guest can be made to run one instruction.
    pub fn can_step(self) -> bool {
        match self {
            Self::Svm => true,
            Self::Vmx(traits) => traits.caps.monitor_trap,
        }
    }

    /// Whether this is AMD's.
    pub fn is_svm(self) -> bool {
        self == Self::Svm
    }
}

/// A virtual machine: what its virtual CPUs have in common, and the nested tables of one of them.
#[derive(Clone, Copy, Debug)]
pub struct Vm {
    /// Whose tables and maps these are.
    pub vendor: Vendor,
    /// Physical address of the [`MsrMap`].
    pub msrs: u64,
    /// Physical address of the [`PortMap`].
    pub ports: u64,
    /// Root of the nested tables.
    pub nested_root: u64,
    /// Tag of its entries in the TLB, not 0.
    pub tag: u16,
}

/// A page for a virtual CPU's state.
#[derive(Clone, Copy)]
pub struct VcpuPage(*mut Vmcb);
// SAFETY: the page belongs to one virtual CPU, whichever CPU it is on.
#[expect(unsafe_code, reason = "a page's address moves with the CPU that owns it")]
unsafe impl Send for VcpuPage {}

impl VcpuPage {
    /// Takes one.
    pub fn new(pool: &mut PagePool) -> Option<Self> {
        Some(Self(pool.object::<Vmcb>()?))
    }

    /// What of the page stays as it is while the virtual CPU lives. Of VMX nothing is known: its layout is the CPU's own, and
    /// what counts may be in the CPU alone.
    pub fn constant(&self, vendor: Vendor) -> Option<(u64, Words)> {
        vendor.is_svm().then_some((self.0 as u64, svm::vcpu::CONSTANT))
    }
}

/// A virtual CPU.
#[expect(clippy::large_enum_variant, reason = "there are as many as CPUs, and no heap")]
pub enum Vcpu<'a> {
    /// Of SVM.
    Svm(SvmVcpu<'a>),
    /// Of VMX.
    Vmx(VmxCpu),
}

impl Vcpu<'_> {
    /// A virtual CPU in the state after INIT.
    ///
    /// # Safety
    /// Nothing else uses the page while the virtual CPU lives.
    #[expect(unsafe_code, reason = "the page is shared with the CPU's microcode")]
    pub unsafe fn new(page: VcpuPage, role: Role, vm: &Vm) -> Self {
        match vm.vendor {
            Vendor::Svm => {
                let machine = SvmMachine {
                    msrpm: vm.msrs,
                    iopm: vm.ports,
                    nested_root: vm.nested_root,
                    asid: vm.tag.into(),
                };
                // SAFETY: `VcpuPage::new` took it from the pool for ever, and the caller has no other use of it now.
                Self::Svm(SvmVcpu::new(unsafe { &mut *page.0 }, role, &machine))
            }
            Vendor::Vmx(traits) => {
                let machine = VmxMachine {
                    msr_bitmap: vm.msrs,
                    io_bitmaps: vm.ports,
                    nested_root: vm.nested_root,
                    vpid: vm.tag,
                };
                // SAFETY: as above.
                Self::Vmx(unsafe { VmxCpu::new(page.0 as u64, role, machine, &traits.caps) })
            }
        }
    }
}

impl Vcpu<'_> {
    /// Whether HLT exits from now on. VMX keeps that a CPU halts, and needs no exit.
    pub fn exit_on_halt(&mut self, on: bool) {
        if let Self::Svm(vcpu) = self {
            vcpu.exit_on_halt(on);
        }
    }
}

impl<'a> Deref for Vcpu<'a> {
    type Target = dyn hv::vcpu::Vcpu + 'a;
    fn deref(&self) -> &Self::Target {
        match self {
            Self::Svm(vcpu) => vcpu,
            Self::Vmx(cpu) => &cpu.vcpu,
        }
    }
}

impl DerefMut for Vcpu<'_> {
    fn deref_mut(&mut self) -> &mut Self::Target {
        match self {
            Self::Svm(vcpu) => vcpu,
            Self::Vmx(cpu) => &mut cpu.vcpu,
        }
    }
}

/// Pages that a CPU gives to its virtualization.
#[derive(Clone, Copy)]
pub struct CpuPages([u64; 2]);

impl CpuPages {
    /// Takes them.
    pub fn new(pool: &mut PagePool) -> Option<Self> {
        Some(Self([pool.pages(1)?, pool.pages(1)?]))
    }
}

/// The running CPU with its virtualization on.
pub enum Host {
    /// SVM.
    Svm(SvmHost),
    /// VMX.
    Vmx(VmxHost),
}

impl Host {
    /// Turns it on.
    ///
    /// # Safety
    /// On bare metal at CPL 0, interrupts off, with this CPU's descriptor tables loaded and the MLE's page tables in force.
    /// The pages are this CPU's.
    #[expect(unsafe_code, reason = "switches virtualization on")]
    pub unsafe fn enable(
        vendor: Vendor,
        pages: CpuPages,
        msrs: &Msrs,
        bases: &Bases,
        arrived: &Arrived,
    ) -> Result<Self, Refusal> {
        let [first, _] = pages.0;
        Ok(match vendor {
            // SAFETY: the caller's promise.
            Vendor::Svm => Self::Svm(unsafe { SvmHost::enable(pages.0, msrs) }),
            Vendor::Vmx(traits) => {
                // SAFETY: the caller's promise.
                Self::Vmx(unsafe { VmxHost::enable(&traits, first, msrs, bases, arrived) }?)
            }
        })
    }

    /// Turns it off, until it is enabled anew: what is pending may come now, and an INIT resets the CPU. False if it is still on.
    pub fn disable(&mut self, msrs: &Msrs, arrived: &Arrived) -> bool {
        match self {
            Self::Svm(host) => {
                host.disable(msrs);
                true
            }
            Self::Vmx(host) => host.disable(arrived),
        }
    }

    /// Whether a Startup IPI of the guest starts its CPU without the MLE's looking at the APIC page.
    pub fn sees_startup(&self) -> bool {
        matches!(self, Self::Vmx(_))
    }

    /// Whether an INIT can do no harm to the MLE. Not so on AMD without VM_CR.R_INIT: there it resets the CPU.
    pub fn redirects_init(&self) -> bool {
        match self {
            Self::Svm(host) => host.guarded_init,
            Self::Vmx(_) => true,
        }
    }

    /// Whether no device can mask address line 20.
    pub fn ignores_a20_mask(&self) -> bool {
        match self {
            Self::Svm(host) => host.ignores_a20,
            // In VMX operation the CPU does.
            Self::Vmx(_) => true,
        }
    }

    /// Runs the guest until it exits. An NMI that arrived in the MLE is the guest's.
    pub fn run(&mut self, vcpu: &mut Vcpu<'_>, arrived: &Arrived) -> Exit {
        match (self, vcpu) {
            (Self::Svm(host), Vcpu::Svm(vcpu)) => host.run(vcpu, arrived),
            (Self::Vmx(host), Vcpu::Vmx(cpu)) => host.run(cpu, arrived),
            _ => Exit::InvalidState,
        }
    }

    /// Runs a sandbox until it exits. With `interruptible`, a pending interrupt ends the run; it stays pending.
    pub fn run_sandbox(
        &mut self,
        vcpu: &mut Vcpu<'_>,
        interruptible: bool,
        msrs: &Msrs,
        arrived: &Arrived,
    ) -> Exit {
        match (self, vcpu) {
            (Self::Svm(host), Vcpu::Svm(vcpu)) => host.run_sandbox(vcpu, interruptible),
            (Self::Vmx(host), Vcpu::Vmx(cpu)) => host.run_sandbox(cpu, interruptible, msrs, arrived),
            _ => Exit::InvalidState,
        }
    }

    /// Lets pending SMI, NMI and INIT be taken here, in the host.
    pub fn let_pending_in(&mut self) {
        match self {
            Self::Svm(host) => host.let_pending_in(),
            // Nothing is held but INIT, which is the guest's exit.
            Self::Vmx(_) => {}
        }
    }

    /// Takes the interrupts that the APIC delivers now.
    pub fn take_interrupts(&mut self) {
        match self {
            Self::Svm(host) => host.take_interrupts(),
            Self::Vmx(host) => host.take_interrupts(),
        }
    }

    /// Waits for an interrupt of any vendor; one that arrived before the call ends it too.
    pub fn doze(&mut self) {
        match self {
            Self::Svm(host) => host.doze(),
            Self::Vmx(host) => host.doze(),
        }
    }
}
