//! Which MSRs the guest shares with the CPU and which it does not: the table, and the answers.
//!
//! MSRs that are not in [`GUARDED`] and that the permission map covers are the guest's own, read and written
//! without an exit: SYSENTER and SYSCALL, GS bases, PAT, MTRRs (the guest is the one OS of this machine), machine
//! check, performance counters, TSC deadline, SPEC_CTRL. `docs/msrs.md` argues each group.

use hv::vcpu::Vcpu;

use svm::defs::EFER_SVME;

use super::cpuid::Leaf;
use crate::backend::{MsrIntercept, Vendor};

/// IA32_TSC.
pub const TSC: u32 = 0x10;
/// APIC base.
pub const APIC_BASE: u32 = 0x1b;
/// EFER.
pub const EFER: u32 = 0xc000_0080;
const TSC_RATIO: u32 = 0xc000_0104;
const SYSCFG: u32 = 0xc001_0010;
const HWCR: u32 = 0xc001_0015;
const IORR_FIRST: u32 = 0xc001_0016;
const IORR_LAST: u32 = 0xc001_0019;
const TOP_MEM: u32 = 0xc001_001a;
const TOP_MEM2: u32 = 0xc001_001d;
const PATCH_LOADER: u32 = 0xc001_0020;
const SMI_TRIGGER_FIRST: u32 = 0xc001_0050;
const SMI_TRIGGER_LAST: u32 = 0xc001_0056;
const MMIO_CONFIG: u32 = 0xc001_0058;
const SMM_BASE: u32 = 0xc001_0111;
const SMM_MASK: u32 = 0xc001_0113;
const VM_CR: u32 = 0xc001_0114;
const SMM_KEY: u32 = 0xc001_0119;
const SEV_FIRST: u32 = 0xc001_0130;
const SEV_LAST: u32 = 0xc001_0132;
const CPUID_OVERRIDE_FIRST: u32 = 0xc001_1002;
const CPUID_OVERRIDE_LAST: u32 = 0xc001_1005;

/// What happens to an access of a guarded MSR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Guard {
    /// Writes raise #GP, reads are the CPU's.
    ReadOnly,
    /// Both raise #GP, as on a CPU without the register.
    Absent,
    /// Writes may not change these bits: they raise #GP then.
    Fixed(u64),
    /// EFER: SVME is hidden and kept.
    Efer,
    /// Writes have no effect, and raise nothing.
    Dropped,
    /// IA32_FEATURE_CONTROL: locked, with neither VMX nor SMX.
    Locked,
    /// TSC: writes move the guest's offset, not the CPU's counter, which times our own budgets.
    Tsc,
}

/// First and last register, and the guard.
type Rule = (u32, u32, Guard);

/// AMD's. Spec: \[APM2\] "MSR Cross-Reference".
const AMD: [Rule; 16] = [
    (TSC, TSC, Guard::Tsc),
    // The base, the BSP flag and xAPIC mode stay, so that the mediated page stays what it is; the enable bit is the
    // guest's.
    (APIC_BASE, APIC_BASE, Guard::Fixed(!0x800)),
    (EFER, EFER, Guard::Efer),
    // TSC ratio: a part of SVM.
    (TSC_RATIO, TSC_RATIO, Guard::Absent),
    // What is DRAM (20-22: variable MTRRs' DRAM bits, TOM2 and its type), memory encryption (23) and what goes with it
    // (24-26); the enables of the fixed MTRRs are the guest's.
    (SYSCFG, SYSCFG, Guard::Fixed(0x07f0_0000)),
    // SmmLock (0): once set, SMIs can no longer be intercepted. RSM special cycle, SmiSpCycDis (13, 14).
    (HWCR, HWCR, Guard::Fixed(0x6001)),
    // Where RAM ends and what is I/O: nested tables and DMA tables were made from it.
    (IORR_FIRST, IORR_LAST, Guard::ReadOnly),
    (TOP_MEM, TOP_MEM, Guard::ReadOnly),
    (TOP_MEM2, TOP_MEM2, Guard::ReadOnly),
    // Microcode changes the CPU that was measured.
    (PATCH_LOADER, PATCH_LOADER, Guard::Absent),
    // SMI on I/O: another way to raise an SMI at will.
    (SMI_TRIGGER_FIRST, SMI_TRIGGER_LAST, Guard::ReadOnly),
    // Moves PCI configuration space, and with it the guarded IOMMU's.
    (MMIO_CONFIG, MMIO_CONFIG, Guard::ReadOnly),
    (SMM_BASE, SMM_MASK, Guard::ReadOnly),
    // VM_CR, IGNNE, SMM_CTL, VM_HSAVE_PA, SVM_KEY, SMM_KEY.
    (VM_CR, SMM_KEY, Guard::Absent),
    (SEV_FIRST, SEV_LAST, Guard::Absent),
    // CPUID override: would show the guest's processes another CPU than the MLE decided on.
    (CPUID_OVERRIDE_FIRST, CPUID_OVERRIDE_LAST, Guard::ReadOnly),
];

/// Intel's. EFER is not here: the CPU exchanges it and checks what the guest writes. Spec: \[SDM4\] "Architectural MSRs".
const INTEL: [Rule; 20] = [
    (TSC, TSC, Guard::Tsc),
    (APIC_BASE, APIC_BASE, Guard::Fixed(!0x800)),
    (0x3a, 0x3a, Guard::Locked),
    // Microcode changes the CPU that was measured.
    (0x79, 0x79, Guard::Absent),
    // Keys of enclaves' launch.
    (0x8c, 0x8f, Guard::ReadOnly),
    // The monitor of SMM.
    (0x9b, 0x9b, Guard::Absent),
    // MISC_ENABLE: "XD bit disable" (34) would take no-execute from the MLE, "limit CPUID" (22) hide features from it.
    (0x1a0, 0x1a0, Guard::Fixed(1 << 34 | 1 << 22)),
    // SMRR.
    (0x1f2, 0x1f3, Guard::ReadOnly),
    // MTRRs: the guest's memory types are in its EPT, the CPU's own rule the MLE's memory.
    (0x200, 0x21f, Guard::Dropped),
    (0x250, 0x26f, Guard::Dropped),
    (0x2ff, 0x2ff, Guard::Dropped),
    // PEBS and its area: records are written by linear address, in the MLE too.
    (0x3f1, 0x3f1, Guard::Absent),
    (0x600, 0x600, Guard::Absent),
    // Capabilities of VMX.
    (0x480, 0x493, Guard::Absent),
    // Processor trace writes by physical address, past all tables.
    (0x560, 0x561, Guard::Absent),
    (0x570, 0x587, Guard::Absent),
    // Memory encryption.
    (0x981, 0x984, Guard::ReadOnly),
    (0x9fb, 0x9fb, Guard::ReadOnly),
    // Debugging by silicon.
    (0xc80, 0xc80, Guard::ReadOnly),
    // Hardware feedback is written by physical address.
    (0x17d0, 0x17d4, Guard::ReadOnly),
];

/// The table in force.
#[derive(Clone, Copy)]
pub struct Guards(&'static [Rule]);

impl Guards {
    /// AMD's.
    pub const AMD: Self = Self(&AMD);
    /// Intel's.
    pub const INTEL: Self = Self(&INTEL);

    /// The table for CPUs of this back end.
    pub fn of(vendor: Vendor) -> Self {
        if vendor.is_svm() { Self::AMD } else { Self::INTEL }
    }

    /// Marks the guarded registers in a permission map, by `intercept`.
    pub fn intercept(self, mut intercept: impl FnMut(u32, MsrIntercept)) {
        for (first, last, guard) in self.0.iter().copied() {
            let what = match guard {
                Guard::Absent | Guard::Efer | Guard::Locked => MsrIntercept::Both,
                Guard::ReadOnly | Guard::Fixed(_) | Guard::Dropped | Guard::Tsc => MsrIntercept::Write,
            };
            for index in first..=last {
                intercept(index, what);
            }
        }
    }

    /// Answers an intercepted RDMSR.
    pub fn read(self, vcpu: &dyn Vcpu, index: u32) -> Answer {
        match self.guard(index) {
            Some(Guard::Efer) => Answer::Value(vcpu.control().efer & !EFER_SVME),
            Some(Guard::Locked) => Answer::Value(1),
            // The others are either not intercepted for reads or absent, and what no map covers does not exist.
            _ => Answer::Fault,
        }
    }

    /// Answers an intercepted WRMSR. `current` reads the CPU's register, `tsc` is the CPU's counter,
    /// `efer_bits` what [`efer_bits`] gave.
    pub fn write(
        self,
        vcpu: &mut dyn Vcpu,
        index: u32,
        value: u64,
        current: impl Fn() -> u64,
        tsc: u64,
        efer_bits: u64,
    ) -> Answer {
        match self.guard(index) {
            Some(Guard::Efer) => {
                let control = vcpu.control();
                let changed = value ^ control.efer;
                if value & !efer_bits != 0 || (changed & EFER_LME != 0 && control.cr0 & CR0_PG != 0) {
                    return Answer::Fault;
                }
                vcpu.set_efer(value);
                Answer::Done
            }
            Some(Guard::Tsc) => {
                vcpu.set_tsc_offset(value.wrapping_sub(tsc));
                Answer::Done
            }
            Some(Guard::Fixed(bits)) => {
                if (value ^ current()) & bits == 0 {
                    Answer::Forward
                } else {
                    Answer::Fault
                }
            }
            Some(Guard::Dropped) => Answer::Done,
            Some(Guard::ReadOnly | Guard::Absent | Guard::Locked) | None => Answer::Fault,
        }
    }

    fn guard(self, index: u32) -> Option<Guard> {
        self.0.iter().find(|(first, last, _)| (*first..=*last).contains(&index)).map(|(_, _, g)| *g)
    }
}

/// The answer to an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// RDMSR gives this value.
    Value(u64),
    /// WRMSR is done, nothing is left to do.
    Done,
    /// WRMSR goes through to the CPU.
    Forward,
    /// #GP.
    Fault,
}

/// The EFER bits of this CPU: what a guest may set without VMRUN refusing the state. SVME is not one of them.
///
/// Spec: \[APM2\] "Extended Feature Enable Register (EFER)"; \[APM3\] the CPUID functions named.
pub fn efer_bits(native: impl Fn(u32, u32) -> Leaf) -> u64 {
    const SCE_LME_LMA: u64 = 0x501;
    let [_, _, ext_c, ext_d] = native(0x8000_0001, 0);
    let [_, cap_b, ..] = native(0x8000_0008, 0);
    let [ext2_a, ..] = native(0x8000_0021, 0);
    let with = |word: u32, bit: u32, efer: u64| if word & 1 << bit != 0 { 1 << efer } else { 0 };
    SCE_LME_LMA
        | with(ext_d, 20, 11) // NXE
        | with(!cap_b, 20, 13) // LMSLE
        | with(ext_d, 25, 14) // FFXSR
        | with(ext_c, 17, 15) // TCE
        | with(cap_b, 8, 17) // MCOMMIT
        | with(cap_b, 13, 18) // INTWB
        | with(ext2_a, 7, 20) // UAIE
        | with(ext2_a, 8, 21) // AIBRSE
}

const EFER_LME: u64 = 1 << 8;
const CR0_PG: u64 = 1 << 31;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::FakeVcpu;
    use svm::maps::Msrpm;

    #[test]
    fn the_map_and_the_table_agree() {
        let mut map = Msrpm::open();
        Guards::AMD.intercept(|index, what| map.intercept(index, what));
        assert_eq!(map.intercepts(EFER), (true, true));
        assert_eq!(map.intercepts(VM_CR), (true, true));
        assert_eq!(map.intercepts(0xc001_0117), (true, true));
        assert_eq!(map.intercepts(APIC_BASE), (false, true));
        assert_eq!(map.intercepts(0xc000_0102), (false, false), "KERNEL_GS_BASE is the guest's");
        assert_eq!(map.intercepts(0x6e0), (false, false), "TSC deadline is the guest's");
    }

    #[test]
    fn svme_is_invisible_and_cannot_be_set() {
        let mut v = FakeVcpu::default();
        v.control.efer = EFER_SVME | 0xd01;
        assert_eq!(Guards::AMD.read(&v, EFER), Answer::Value(0xd01));
        assert_eq!(Guards::AMD.write(&mut v, EFER, EFER_SVME | 0xd01, || 0, 0, 0xd01), Answer::Fault);
        assert_eq!(Guards::AMD.write(&mut v, EFER, 0xd00, || 0, 0, 0xd01), Answer::Done);
        assert_eq!(v.control.efer & 0xd01, 0xd00);
    }

    #[test]
    fn efer_bits_that_the_cpu_lacks_fault() {
        assert_eq!(efer_bits(|_, _| [0; 4]) & (1 << 11 | 1 << 21), 0);
        assert_eq!(efer_bits(|_, _| [u32::MAX; 4]), 0x36_cd01);
        let mut v = FakeVcpu::default();
        assert_eq!(Guards::AMD.write(&mut v, EFER, 1 << 14, || 0, 0, 0xd01), Answer::Fault);
    }

    #[test]
    fn long_mode_cannot_be_switched_while_paging() {
        let mut v = FakeVcpu::default();
        v.control.cr0 = CR0_PG;
        assert_eq!(Guards::AMD.write(&mut v, EFER, 0, || 0, 0, 0xd01), Answer::Fault);
    }

    #[test]
    fn the_apic_page_stays_and_its_mode_may_change() {
        let mut v = FakeVcpu::default();
        let now = || 0xfee0_0900;
        assert_eq!(Guards::AMD.write(&mut v, APIC_BASE, 0xfee0_0100, now, 0, 0xd01), Answer::Forward);
        assert_eq!(Guards::AMD.write(&mut v, APIC_BASE, 0xfee0_0d00, now, 0, 0xd01), Answer::Fault, "x2APIC");
        assert_eq!(Guards::AMD.write(&mut v, APIC_BASE, 0xfed0_0900, now, 0, 0xd01), Answer::Fault);
        assert_eq!(Guards::AMD.write(&mut v, APIC_BASE, 0xfee0_0800, now, 0, 0xd01), Answer::Fault);
    }

    #[test]
    fn the_smm_lock_cannot_be_set_behind_our_back() {
        let mut v = FakeVcpu::default();
        assert_eq!(Guards::AMD.write(&mut v, HWCR, 1, || 0, 0, 0xd01), Answer::Fault);
        assert_eq!(Guards::AMD.write(&mut v, HWCR, 1 << 18, || 0, 0, 0xd01), Answer::Forward);
    }

    #[test]
    fn svm_registers_fault_as_on_a_cpu_without_it() {
        let mut v = FakeVcpu::default();
        for index in [VM_CR, 0xc001_0117, 0xc001_0118, PATCH_LOADER, 0x4b56_4d00] {
            assert_eq!(Guards::AMD.read(&v, index), Answer::Fault, "{index:#x}");
            assert_eq!(Guards::AMD.write(&mut v, index, 0, || 0, 0, 0xd01), Answer::Fault, "{index:#x}");
        }
    }

    #[test]
    fn a_tsc_write_moves_the_guests_time_only() {
        let mut v = FakeVcpu::default();
        assert_eq!(Guards::AMD.write(&mut v, TSC, 1000, || 0, 5000, 0xd01), Answer::Done);
        assert_eq!(v.tsc_offset.wrapping_add(5000), 1000);
    }

    #[test]
    fn intels_map_and_table_agree() {
        let mut map = vmx::maps::MsrBitmap::open();
        Guards::INTEL.intercept(|index, what| map.intercept(index, what == MsrIntercept::Both));
        assert_eq!(map.intercepts(0x3a), (true, true));
        assert_eq!(map.intercepts(0x480), (true, true));
        assert_eq!(map.intercepts(0x570), (true, true));
        assert_eq!(map.intercepts(APIC_BASE), (false, true));
        assert_eq!(map.intercepts(0x2ff), (false, true));
        for of_the_guest in [0x277, 0x174, 0x6e0, 0x48, 0x4c1, 0x38f, EFER, 0xc000_0082, 0xc000_0102] {
            assert_eq!(map.intercepts(of_the_guest), (false, false), "{of_the_guest:#x}");
        }
    }

    #[test]
    fn vmx_looks_as_if_firmware_had_locked_it_away() {
        let mut v = FakeVcpu::default();
        let guards = Guards::INTEL;
        assert_eq!(guards.read(&v, 0x3a), Answer::Value(1));
        assert_eq!(guards.write(&mut v, 0x3a, 5, || 0, 0, 0), Answer::Fault);
        for index in [0x79, 0x480, 0x48b, 0x570, 0x600, 0x9b, 0xc001_0015] {
            assert_eq!(guards.read(&v, index), Answer::Fault, "{index:#x}");
            assert_eq!(guards.write(&mut v, index, 0, || 0, 0, 0), Answer::Fault, "{index:#x}");
        }
    }

    #[test]
    fn mtrrs_stay_and_no_execute_stays_on() {
        let mut v = FakeVcpu::default();
        let guards = Guards::INTEL;
        for index in [0x200, 0x20f, 0x250, 0x26f, 0x2ff] {
            assert_eq!(guards.write(&mut v, index, 6, || 0, 0, 0), Answer::Done, "{index:#x}");
        }
        assert_eq!(guards.write(&mut v, 0x1a0, 1 << 34, || 0, 0, 0), Answer::Fault);
        assert_eq!(guards.write(&mut v, 0x1a0, 1, || 0, 0, 0), Answer::Forward);
    }
}
