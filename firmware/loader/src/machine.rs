//! Whether this machine can be launched at all. Asked before ExitBootServices, so that a refusal changes nothing.

use core::fmt;

use hv::io::{Mmio, Msr, PhysMem};
use iommu::acpi;
use iommu::ivrs::{self, Ivrs};
use raw_cpuid::{CpuId, CpuIdReader};

use crate::tpm::{self, Interface};

/// VM_CR. Spec: \[APM2\] "VM_CR MSR".
const VM_CR: u32 = 0xc001_0114;
/// VM_CR: the other bits of SVM control can't be changed.
const VM_CR_LOCK: u64 = 1 << 3;
/// VM_CR: EFER.SVME can't be set.
const VM_CR_SVMDIS: u64 = 1 << 4;

/// Why the machine can't be launched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// No AMD CPU.
    Vendor,
    /// The CPU has no SVM.
    NoSvm,
    /// SVM is switched off; the value of VM_CR.
    SvmDisabled(u64),
    /// CPUID does not offer SKINIT.
    NoSkinit,
    /// The CPU has no pages of 1 GiB, which the SLB stage maps memory with.
    NoGibPages,
    /// The local APIC is off, moved, or not the boot processor's; the value of APIC_BASE.
    Apic(u64),
    /// The time-stamp counter stands still.
    Tsc,
    /// The firmware hands out no ACPI 2.0 tables.
    NoAcpi,
    /// No readable table of IOMMUs.
    Iommu(acpi::Error),
    /// The table of IOMMUs makes no sense.
    Ivrs(ivrs::Error),
    /// The table of IOMMUs names none.
    NoIommu,
    /// An IOMMU serves devices of this PCI segment: the SLB stage sees the first one only.
    Segment(u16),
    /// No TPM answers; the first register's value.
    NoTpm(u32),
    /// The TPM has an interface of an unknown type.
    TpmInterface(u32),
    /// Neither firmware nor ACPI know a TPM 2.0.
    NotTpm2(acpi::Error),
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vendor => write!(f, "CPU: not AMD, whose SKINIT this launch needs"),
            Self::NoSvm => write!(f, "CPU: no SVM (CPUID 8000_0001h ECX bit 2 is 0)"),
            Self::SvmDisabled(vm_cr) => {
                let locked = if vm_cr & VM_CR_LOCK != 0 { " and locked" } else { "" };
                write!(
                    f,
                    "CPU: SVM is disabled{locked} by the firmware (VM_CR is {vm_cr:#x}); its set-up may have a switch"
                )
            }
            Self::NoSkinit => write!(
                f,
                "CPU: no SKINIT (CPUID 8000_0001h ECX bit 12 is 0); where it is only hidden, the entry can insist: cordon-skinit insist"
            ),
            Self::NoGibPages => write!(f, "CPU: no 1 GiB pages (CPUID 8000_0001h EDX bit 26 is 0)"),
            Self::Apic(base) => {
                write!(f, "CPU: local APIC off, moved, or not the boot processor's (APIC_BASE is {base:#x})")
            }
            Self::Tsc => write!(f, "CPU: the time-stamp counter stands still"),
            Self::NoAcpi => write!(f, "firmware: no ACPI 2.0 tables"),
            Self::Iommu(error) => write!(f, "IOMMU: {error}; is it enabled in the firmware's set-up?"),
            Self::Ivrs(error) => write!(f, "IOMMU: {error}"),
            Self::NoIommu => write!(f, "IOMMU: the IVRS names none"),
            Self::Segment(segment) => {
                write!(f, "IOMMU: the IVRS names one on PCI segment {segment}, limit 0; ")?;
                write!(f, "have the firmware's set-up use a single segment")
            }
            Self::NoTpm(value) => {
                write!(f, "TPM: none at {:#x} (first register reads {value:#x})", tpm::BASE)
            }
            Self::TpmInterface(id) => write!(f, "TPM: neither TIS nor CRB (interface identifier is {id:#x})"),
            Self::NotTpm2(error) => write!(f, "TPM: not known as a TPM 2.0 (no TCG2 protocol; {error})"),
        }
    }
}

impl core::error::Error for Refusal {}

/// Checks the CPU. With `insist` SKINIT need not be offered.
pub fn check_cpu<R: CpuIdReader>(cpuid: &CpuId<R>, msr: &impl Msr, insist: bool) -> Result<(), Refusal> {
    if cpuid.get_vendor_info().is_none_or(|vendor| vendor.as_str() != "AuthenticAMD") {
        return Err(Refusal::Vendor);
    }
    let features = cpuid.get_extended_processor_and_feature_identifiers().ok_or(Refusal::NoSvm)?;
    if !features.has_svm() {
        return Err(Refusal::NoSvm);
    }
    let vm_cr = msr.rdmsr(VM_CR);
    if vm_cr & VM_CR_SVMDIS != 0 {
        return Err(Refusal::SvmDisabled(vm_cr));
    }
    if !features.has_skinit() && !insist {
        return Err(Refusal::NoSkinit);
    }
    if !features.has_1gib_pages() {
        return Err(Refusal::NoGibPages);
    }
    Ok(())
}

/// Longest IVRS accepted, bytes.
const IVRS_MAX: usize = 4096;
/// Longest TPM2 table accepted, bytes.
const TPM2_MAX: usize = 256;

/// Checks that there is an AMD IOMMU, and none that the launch would refuse. `rsdp` is the ACPI root pointer's address.
pub fn check_iommu(mem: &impl PhysMem, rsdp: u64) -> Result<(), Refusal> {
    let mut table = [0; IVRS_MAX];
    let length = acpi::copy_table(mem, rsdp, *b"IVRS", &mut table).map_err(Refusal::Iommu)?;
    let ivrs = Ivrs::new(table.get(..length).unwrap_or_default()).map_err(Refusal::Ivrs)?;
    if ivrs.units().next().is_none() {
        return Err(Refusal::NoIommu);
    }
    let elsewhere = ivrs.units().map(|unit| unit.segment()).find(|segment| *segment != 0);
    elsewhere.map_or(Ok(()), |segment| Err(Refusal::Segment(segment)))
}

/// Checks that there is a TPM 2.0. `tcg2`: whether the firmware offers the TCG2 protocol.
pub fn check_tpm(mem: &impl PhysMem, rsdp: u64, tpm: &impl Mmio, tcg2: bool) -> Result<Interface, Refusal> {
    let interface = tpm::interface(tpm)?;
    if !tcg2 {
        acpi::copy_table(mem, rsdp, *b"TPM2", &mut [0; TPM2_MAX]).map_err(Refusal::NotTpm2)?;
    }
    Ok(interface)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tpm::tests::FakeTpm;
    use alloc::string::ToString;
    use raw_cpuid::CpuIdResult;

    struct VmCr(u64);
    impl Msr for VmCr {
        fn rdmsr(&self, index: u32) -> u64 {
            assert_eq!(index, VM_CR);
            self.0
        }
        fn wrmsr(&self, _: u32, _: u64) {
            panic!("a check writes nothing");
        }
    }

    /// A CPU with 1 GiB pages, this vendor and these bits in 8000_0001h ECX.
    fn cpu(vendor: &'static [u8; 12], ecx: u32) -> CpuId<impl CpuIdReader> {
        cpu_with(vendor, ecx, GIB_PAGES)
    }

    fn cpu_with(vendor: &'static [u8; 12], ecx: u32, edx: u32) -> CpuId<impl CpuIdReader> {
        let word = move |i: usize| u32::from_le_bytes(vendor[i..i + 4].try_into().unwrap());
        CpuId::with_cpuid_reader(move |leaf: u32, _: u32| {
            let none = CpuIdResult { eax: 0, ebx: 0, ecx: 0, edx: 0 };
            match leaf {
                0 => CpuIdResult { eax: 1, ebx: word(0), edx: word(4), ecx: word(8) },
                0x8000_0000 => CpuIdResult { eax: 0x8000_0001, ..none },
                0x8000_0001 => CpuIdResult { ecx, edx, ..none },
                _ => none,
            }
        })
    }

    const SVM: u32 = 1 << 2;
    const SKINIT: u32 = 1 << 12;
    const GIB_PAGES: u32 = 1 << 26;

    #[test]
    fn each_cpu_that_cannot_is_refused_with_its_reason() {
        let amd = b"AuthenticAMD";
        assert_eq!(check_cpu(&cpu(amd, SVM | SKINIT), &VmCr(VM_CR_LOCK), false), Ok(()));
        assert_eq!(check_cpu(&cpu(b"GenuineIntel", SVM | SKINIT), &VmCr(0), true), Err(Refusal::Vendor));
        assert_eq!(check_cpu(&cpu(amd, SKINIT), &VmCr(0), true), Err(Refusal::NoSvm));
        let disabled =
            check_cpu(&cpu(amd, SVM | SKINIT), &VmCr(VM_CR_SVMDIS | VM_CR_LOCK), true).unwrap_err();
        assert!(
            disabled.to_string().contains("disabled and locked by the firmware (VM_CR is 0x18)"),
            "{disabled}"
        );
        assert_eq!(check_cpu(&cpu(amd, SVM), &VmCr(0), false), Err(Refusal::NoSkinit));
        let small = cpu_with(amd, SVM | SKINIT, !GIB_PAGES);
        assert_eq!(check_cpu(&small, &VmCr(0), true), Err(Refusal::NoGibPages));
    }

    #[test]
    fn insisting_replaces_the_skinit_bit_and_nothing_else() {
        let amd = b"AuthenticAMD";
        assert_eq!(check_cpu(&cpu(amd, SVM), &VmCr(0), true), Ok(()));
        assert_eq!(
            check_cpu(&cpu(amd, SVM), &VmCr(VM_CR_SVMDIS), true),
            Err(Refusal::SvmDisabled(VM_CR_SVMDIS))
        );
    }

    /// ACPI tables in a flat memory.
    struct Tables(Vec<u8>);
    impl PhysMem for Tables {
        fn read(&self, addr: u64, out: &mut [u8]) -> bool {
            let from = usize::try_from(addr).ok().and_then(|a| self.0.get(a..)?.get(..out.len()));
            from.map(|bytes| out.copy_from_slice(bytes)).is_some()
        }
        fn write(&self, _: u64, _: &[u8]) -> bool {
            panic!("a check writes nothing");
        }
    }

    const RSDP: u64 = 0x10;

    fn sealed(mut bytes: Vec<u8>, at: usize) -> Vec<u8> {
        bytes[at] = 0u8.wrapping_sub(bytes.iter().fold(0, |sum, b| sum.wrapping_add(*b)));
        bytes
    }

    fn table(signature: &[u8; 4], body: &[u8]) -> Vec<u8> {
        let mut t = signature.to_vec();
        t.extend_from_slice(&(36 + body.len() as u32).to_le_bytes());
        t.resize(36, 0);
        t.extend_from_slice(body);
        sealed(t, 9)
    }

    /// The body of an IVRS with this many IOMMUs (IVHD type 10h), each with registers of its own.
    fn ivrs(units: u8) -> Vec<u8> {
        let mut body = vec![0; 12];
        for unit in 0..units {
            body.extend_from_slice(&[0x10, 0, 24, 0, unit, 0, 0x40, 0]);
            body.extend_from_slice(&(0xfed8_0000 + (u64::from(unit) << 20)).to_le_bytes());
            body.extend_from_slice(&[0; 8]);
        }
        body
    }

    /// Memory with a root pointer, an XSDT and these tables.
    fn tables(list: &[Vec<u8>]) -> Tables {
        let mut memory = vec![0; 0x1000];
        let mut root = Vec::new();
        for (i, table) in list.iter().enumerate() {
            let at = 0x200 + i * 0x100;
            memory[at..at + table.len()].copy_from_slice(table);
            root.extend_from_slice(&(at as u64).to_le_bytes());
        }
        let root = table(b"XSDT", &root);
        memory[0x100..0x100 + root.len()].copy_from_slice(&root);
        let mut rsdp = sealed([b"RSD PTR ".as_slice(), &[0; 7], &[2], &[0; 4]].concat(), 8);
        rsdp.extend_from_slice(&[36, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        memory[0x10..0x34].copy_from_slice(&sealed(rsdp, 32));
        Tables(memory)
    }

    #[test]
    fn each_platform_that_cannot_is_refused_with_its_reason() {
        let check = |list: &[Vec<u8>], tpm: &FakeTpm, tcg2| {
            check_iommu(&tables(list), RSDP)?;
            check_tpm(&tables(list), RSDP, tpm, tcg2)
        };
        let tis = FakeTpm::tis();
        let (iommu, tpm2) = (table(b"IVRS", &ivrs(1)), table(b"TPM2", &[0; 40]));
        let both = [iommu.clone(), tpm2.clone()];
        assert_eq!(check(&both, &tis, false), Ok(Interface::Tis));
        assert_eq!(check(core::slice::from_ref(&iommu), &FakeTpm::crb(), true), Ok(Interface::Crb));
        assert_eq!(check(&[tpm2], &tis, true), Err(Refusal::Iommu(acpi::Error::Missing(*b"IVRS"))));
        assert_eq!(check(&[table(b"IVRS", &ivrs(0))], &tis, true), Err(Refusal::NoIommu));
        let mut second = ivrs(2);
        let segment = second.len() - 8;
        second[segment] = 3;
        assert_eq!(check(&[table(b"IVRS", &second)], &tis, true), Err(Refusal::Segment(3)));
        let said = Refusal::Segment(3).to_string();
        assert!(said.contains("segment 3, limit 0") && said.contains("a single segment"), "{said}");
        assert!(matches!(check(&[table(b"IVRS", &[7; 40])], &tis, true), Err(Refusal::Ivrs(_))));
        assert_eq!(check(&[iommu], &tis, false), Err(Refusal::NotTpm2(acpi::Error::Missing(*b"TPM2"))));
        assert_eq!(check(&both, &FakeTpm::absent(), true), Err(Refusal::NoTpm(u32::MAX)));
    }
}
