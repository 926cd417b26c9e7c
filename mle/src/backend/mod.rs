//! The CPU vendor's virtualization, chosen once by what the CPU offers. Nothing outside of this module names a vendor's
//! virtual CPU, permission map or table format.
//!
//! An enum, not a type parameter: the MLE's logic is compiled once. What a virtual CPU can do is [`hv::vcpu::Vcpu`], to which
//! [`Vcpu`] dereferences.

mod maps;
mod svm_host;

use core::ops::{Deref, DerefMut};

use ::svm::defs::Vmcb;
use ::svm::vcpu::{Machine as SvmMachine, SvmVcpu};
use firmware::tables::HypercallInsn;
use hv::radix::{Format, NPT};
use hv::vcpu::{Exit, Role};

pub use self::maps::{MsrIntercept, MsrMap, PortMap};
use self::svm_host::SvmHost;
use crate::guest::cpuid::Leaf;
use crate::metal::Msrs;
use crate::pool::PagePool;
use crate::trap::Arrived;

/// Which back end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vendor {
    /// AMD SVM.
    Svm,
}

impl Vendor {
    /// What the CPU has, or what it lacks.
    pub fn of_cpu(cpuid: impl Fn(u32, u32) -> Leaf) -> Result<Self, &'static str> {
        let [.., d_svm] = cpuid(0x8000_000a, 0);
        if d_svm & 1 == 0 {
            return Err("has no nested paging (CPUID 8000_000Ah EDX bit 0)");
        }
        Ok(Self::Svm)
    }

    /// Layout of nested tables.
    pub fn nested_format(self) -> &'static Format {
        match self {
            Self::Svm => &NPT,
        }
    }

    /// The instruction by which the guest calls.
    pub fn hypercall(self) -> HypercallInsn {
        match self {
            Self::Svm => HypercallInsn::Vmmcall,
        }
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
}

/// A virtual CPU.
pub enum Vcpu<'a> {
    /// Of SVM.
    Svm(SvmVcpu<'a>),
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
        }
    }
}

impl<'a> Deref for Vcpu<'a> {
    type Target = dyn hv::vcpu::Vcpu + 'a;
    fn deref(&self) -> &Self::Target {
        match self {
            Self::Svm(vcpu) => vcpu,
        }
    }
}

impl DerefMut for Vcpu<'_> {
    fn deref_mut(&mut self) -> &mut Self::Target {
        match self {
            Self::Svm(vcpu) => vcpu,
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
}

impl Host {
    /// Turns it on.
    ///
    /// # Safety
    /// On bare metal at CPL 0, interrupts off, with this CPU's descriptor tables loaded and the MLE's page tables in force.
    /// The pages are this CPU's.
    #[expect(unsafe_code, reason = "switches virtualization on")]
    pub unsafe fn enable(vendor: Vendor, pages: CpuPages, msrs: &Msrs) -> Self {
        match vendor {
            // SAFETY: the caller's promise.
            Vendor::Svm => Self::Svm(unsafe { SvmHost::enable(pages.0, msrs) }),
        }
    }

    /// Whether an INIT can do no harm to the MLE. Not so on AMD without VM_CR.R_INIT: there it resets the CPU.
    pub fn redirects_init(&self) -> bool {
        match self {
            Self::Svm(host) => host.guarded_init,
        }
    }

    /// Whether no device can mask address line 20.
    pub fn ignores_a20_mask(&self) -> bool {
        match self {
            Self::Svm(host) => host.ignores_a20,
        }
    }

    /// Runs the guest until it exits. An NMI that arrived in the MLE is the guest's.
    pub fn run(&mut self, vcpu: &mut Vcpu<'_>, arrived: &Arrived) -> Exit {
        match (self, vcpu) {
            (Self::Svm(host), Vcpu::Svm(vcpu)) => host.run(vcpu, arrived),
        }
    }

    /// Runs a sandbox until it exits. With `interruptible`, a pending interrupt ends the run; it stays pending.
    pub fn run_sandbox(&mut self, vcpu: &mut Vcpu<'_>, interruptible: bool) -> Exit {
        match (self, vcpu) {
            (Self::Svm(host), Vcpu::Svm(vcpu)) => host.run_sandbox(vcpu, interruptible),
        }
    }

    /// Lets pending SMI, NMI and INIT be taken here, in the host.
    pub fn let_pending_in(&mut self) {
        match self {
            Self::Svm(host) => host.let_pending_in(),
        }
    }

    /// Takes the interrupts that the APIC delivers now.
    pub fn take_interrupts(&mut self) {
        match self {
            Self::Svm(host) => host.take_interrupts(),
        }
    }

    /// Waits for an interrupt of any vendor; one that arrived before the call ends it too.
    pub fn doze(&mut self) {
        match self {
            Self::Svm(host) => host.doze(),
        }
    }
}
