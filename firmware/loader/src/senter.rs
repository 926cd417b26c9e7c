//! A launch by GETSEC\[SENTER\]: whether the machine can be launched, and what SINIT is given. `docs/boot-entry.md` lists
//! the refusals.
//!
//! Spec: \[TXT\] "Pre-SENTER Preparation".

use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::fmt;

use hv::addr::{FOUR_GIB, PAGE_SIZE, PhysRange};
use hv::failure::Record;
use hv::io::{Mmio, Msr, PhysMem};
use hv::slrt::{IntelInfo, MtrrPair, TAG_INTEL, entry_header};
use iommu::acpi;
use iommu::dmar::{self, Dmar};
use raw_cpuid::{CpuId, CpuIdReader};
use vmx::txt::acm::{Platform, Sinit};
use vmx::txt::{getsec, heap, regs};
use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

/// IA32_PLATFORM_ID.
const PLATFORM_ID: u32 = 0x17;
/// IA32_FEATURE_CONTROL.
const FEATURE_CONTROL: u32 = 0x3a;
/// Lock, VMX inside SMX, and SENTER: its local functions and the whole.
const FEATURES_WANTED: u64 = 1 << 0 | 1 << 1 | 0x7f << 8 | 1 << 15;
/// IA32_MCG_STATUS: a machine check is being handled.
const MCG_STATUS: u32 = 0x17a;
const MCG_IN_PROGRESS: u64 = 1 << 2;
const MISC_ENABLE: u32 = 0x1a0;
const MTRRCAP: u32 = 0xfe;
const MTRR_DEF_TYPE: u32 = 0x2ff;
const MTRR_BASE: u32 = 0x200;
/// MTRRs are on.
const MTRR_ENABLED: u64 = 1 << 11;
const MTRR_VALID: u64 = 1 << 11;
const WRITE_BACK: u64 = 6;
/// Longest DMAR accepted, bytes.
const DMAR_MAX: usize = 4096;
/// Least that SINIT is left of the heap for SinitMleData, bytes.
const SINIT_MLE_MIN: u64 = 0x1000;

/// Why the machine can't be launched so.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The CPU is not Intel's.
    Vendor,
    /// CPUID 1 ECX lacks SMX or VMX; the register.
    NoSmx(u32),
    /// The firmware has not enabled it; IA32_FEATURE_CONTROL.
    FeatureControl(u64),
    /// GETSEC\[CAPABILITIES\] lacks the chipset or a leaf.
    Capabilities(u32),
    /// A machine check is being handled.
    MachineCheck,
    /// TXT's registers read as nothing.
    NoTxt,
    /// A launch is in force: TXT.STS.
    Launched(u64),
    /// An earlier error needs a power cycle: TXT.ESTS.
    NeedsPowerCycle(u64),
    /// A range that the firmware set is of no use.
    Range {
        /// Which one.
        what: &'static str,
        /// Its registers: base, size.
        base: u64,
        /// Bytes.
        size: u64,
    },
    /// The heap has no room for what is to be written.
    HeapFull {
        /// Bytes of BiosData.
        bios: u64,
        /// Bytes of the heap.
        size: u64,
    },
    /// No readable table of IOMMUs.
    Iommu(acpi::Error),
    /// The table of IOMMUs makes no sense.
    Dmar(dmar::Error),
    /// It names none.
    NoIommu,
    /// No module fits; why not, one by one.
    NoSinit(Vec<(String, String)>),
    /// The CPU takes no module of this size.
    ModuleSize {
        /// Bytes of the module.
        size: u64,
        /// The CPU's limit.
        most: u32,
    },
    /// The module and the MLE do not fit together.
    Sinit {
        /// Which field.
        field: &'static str,
        /// Its value.
        value: u32,
        /// What it must be at least.
        at_least: u32,
    },
    /// The MLE has no header for SINIT where it says.
    MleHeader(u32),
    /// Something lies where PMRs do not protect it.
    Unprotected {
        /// What.
        what: &'static str,
        /// Its last byte.
        last: u64,
        /// Where protection ends.
        end: u64,
    },
    /// There are not enough MTRRs for the module's memory.
    Mtrrs {
        /// Needed.
        need: usize,
        /// There are.
        have: usize,
    },
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vendor => write!(f, "CPU: not Intel, whose SENTER this launch needs"),
            Self::NoSmx(ecx) => write!(
                f,
                "CPU: no SMX or no VMX (CPUID 1 ECX is {ecx:#x}, bits 6 and 5); where they are only hidden, the entry can insist: cordon-txt insist"
            ),
            Self::FeatureControl(value) => write!(
                f,
                "CPU: the firmware has not enabled TXT (IA32_FEATURE_CONTROL is {value:#x}, bits {FEATURES_WANTED:#x} are needed); its set-up may have a switch"
            ),
            Self::Capabilities(eax) => {
                write!(
                    f,
                    "CPU: GETSEC[CAPABILITIES] is {eax:#x}, bits {:#x} are needed",
                    getsec::CHIPSET | getsec::LEAVES
                )
            }
            Self::MachineCheck => write!(f, "CPU: a machine check is in progress (IA32_MCG_STATUS bit 2)"),
            Self::NoTxt => write!(f, "TXT: no registers at {:#x}", regs::PUBLIC),
            Self::Launched(sts) => write!(f, "TXT: a launch is in force (TXT.STS is {sts:#x})"),
            Self::NeedsPowerCycle(ests) => {
                write!(f, "TXT: an earlier error needs a power cycle (TXT.ESTS is {ests:#x})")
            }
            Self::Range { what, base, size } => {
                write!(
                    f,
                    "TXT: {what} is {size:#x} bytes at {base:#x}; whole pages between 1 MiB and 4 GiB are needed"
                )
            }
            Self::HeapFull { bios, size } => write!(
                f,
                "TXT: the heap has {size:#x} bytes, BiosData takes {bios:#x}; {:#x} more are needed",
                (heap::WRITTEN as u64).saturating_add(SINIT_MLE_MIN)
            ),
            Self::Iommu(error) => write!(f, "IOMMU: {error}; is it enabled in the firmware's set-up?"),
            Self::Dmar(error) => write!(f, "IOMMU: {error}"),
            Self::NoIommu => write!(f, "IOMMU: the DMAR names none"),
            Self::NoSinit(tried) => {
                write!(f, "TXT: no SINIT module for this platform")?;
                if tried.is_empty() {
                    write!(f, ": the entry names none (cordon-sinit)")?;
                }
                tried.iter().try_for_each(|(file, why)| write!(f, "; {file}: {why}"))
            }
            Self::ModuleSize { size, most } => {
                write!(f, "TXT: the SINIT module has {size} bytes, this CPU takes {most}")
            }
            Self::Sinit { field, value, at_least } => {
                write!(f, "TXT: {field} is {value:#x}, must be at least {at_least:#x}")
            }
            Self::MleHeader(at) => write!(f, "TXT: the MLE has no header for SINIT at {at:#x}"),
            Self::Unprotected { what, last, end } => {
                write!(f, "TXT: {what} ends at {last:#x}, memory is protected from DMA up to {end:#x}")
            }
            Self::Mtrrs { need, have } => {
                write!(f, "CPU: SINIT's memory takes {need} MTRRs, there are {have}")
            }
        }
    }
}

impl core::error::Error for Refusal {}

/// Checks the CPU, but for what GETSEC says of itself. With `insist` nothing of it is asked for.
///
/// # Errors
/// What is missing.
pub fn check_cpu<R: CpuIdReader>(cpuid: &CpuId<R>, msr: &impl Msr, insist: bool) -> Result<(), Refusal> {
    if insist {
        return Ok(());
    }
    if cpuid.get_vendor_info().is_none_or(|vendor| vendor.as_str() != "GenuineIntel") {
        return Err(Refusal::Vendor);
    }
    let has = cpuid.get_feature_info().is_some_and(|f| f.has_smx() && f.has_vmx());
    if !has {
        return Err(Refusal::NoSmx(
            cpuid.get_feature_info().map_or(0, |f| u32::from(f.has_smx()) << 6 | u32::from(f.has_vmx()) << 5),
        ));
    }
    let control = msr.rdmsr(FEATURE_CONTROL);
    if control & FEATURES_WANTED != FEATURES_WANTED {
        return Err(Refusal::FeatureControl(control));
    }
    if msr.rdmsr(MCG_STATUS) & MCG_IN_PROGRESS != 0 {
        return Err(Refusal::MachineCheck);
    }
    Ok(())
}

/// Checks what GETSEC\[CAPABILITIES\] answered.
///
/// # Errors
/// The chipset or a leaf is missing.
pub fn check_capabilities(eax: u32) -> Result<(), Refusal> {
    const WANTED: u32 = getsec::CHIPSET | getsec::LEAVES;
    if eax & WANTED == WANTED { Ok(()) } else { Err(Refusal::Capabilities(eax)) }
}

/// What the chipset and the firmware have for a launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Txt {
    /// The heap.
    pub heap: PhysRange,
    /// Where SINIT goes.
    pub sinit: PhysRange,
    /// Bytes of BiosData, with its size.
    pub bios: u64,
    /// TXT.ERRORCODE as it was found.
    pub errorcode: u32,
    /// TXT.DIDVID.
    didvid: u64,
    production: bool,
}

/// Checks TXT's registers (`txt`: the public space) and the heap that the firmware left.
///
/// # Errors
/// What does not allow a launch.
pub fn check_txt(txt: &impl Mmio, mem: &impl PhysMem) -> Result<Txt, Refusal> {
    let sts = txt.read64(regs::STS);
    let didvid = txt.read64(regs::DIDVID);
    if sts == u64::MAX || didvid & 0xffff != 0x8086 {
        return Err(Refusal::NoTxt);
    }
    if sts & regs::STS_SENTER_DONE != 0 {
        return Err(Refusal::Launched(sts));
    }
    let ests = txt.read64(regs::ESTS);
    if ests & regs::ESTS_RESET != 0 {
        return Err(Refusal::NeedsPowerCycle(ests));
    }
    let range = |what, base, size| {
        let (base, size) = (txt.read64(base), txt.read64(size));
        let range = PhysRange::new(base, size).filter(|r| {
            base >= 1 << 20
                && r.last() < FOUR_GIB
                && base.is_multiple_of(PAGE_SIZE)
                && size.is_multiple_of(PAGE_SIZE)
        });
        range.ok_or(Refusal::Range { what, base, size })
    };
    let heap = range("the heap", regs::HEAP_BASE, regs::HEAP_SIZE)?;
    let sinit = range("SINIT's memory", regs::SINIT_BASE, regs::SINIT_SIZE)?;
    let mut word = [0; 8];
    mem.read(heap.start(), &mut word);
    let bios = u64::from_le_bytes(word);
    let needed = bios.saturating_add(heap::WRITTEN as u64).saturating_add(SINIT_MLE_MIN);
    if bios < heap::SIZE_WORD.saturating_add(heap::bios::MIN)
        || !bios.is_multiple_of(8)
        || needed > heap.len()
    {
        return Err(Refusal::HeapFull { bios, size: heap.len() });
    }
    // Chipsets have the one register or the other.
    let fuses = match txt.read64(regs::VER_FSBIF) {
        value if value as u32 == u32::MAX => txt.read64(regs::VER_EMIF),
        value => value,
    };
    Ok(Txt {
        heap,
        sinit,
        bios,
        errorcode: txt.read32(regs::ERRORCODE),
        didvid,
        production: fuses & regs::VER_PRODUCTION != 0,
    })
}

/// Why an earlier launch failed, as TXT.ERRORCODE has it, for people. `None` when there is nothing to say.
pub fn earlier_failure(errorcode: u32) -> Option<String> {
    const VALID: u32 = 1 << 31;
    const SUCCESS: u32 = 0xc000_0001;
    if errorcode & VALID == 0 || errorcode == SUCCESS {
        return None;
    }
    let by = match (Record::from_errorcode(errorcode), errorcode >> 30 & 1, errorcode >> 15 & 1) {
        (Some(record), ..) => return Some(record.to_string()),
        (None, 0, _) => "by the CPU",
        (None, _, 1) => "by software that was launched",
        _ if errorcode & 0xf == 0 => "by the BIOS's module",
        _ => "by SINIT",
    };
    let class = match errorcode >> 4 & 0x3f {
        1 => "entry",
        2 => "MTRRs",
        4 => "TPM",
        6 => "launch control policy",
        9 => "heap",
        0xe => "protected memory regions",
        0xf => "MLE header",
        0x10 => "MLE page tables",
        0x14 => "event log",
        _ => "see the module's manual",
    };
    let (major, minor) = (errorcode >> 10 & 0x1f, errorcode >> 16 & 0x3fff);
    Some(alloc::format!(
        "TXT.ERRORCODE {errorcode:#x}, {by}, class {class}, major {major:#x}, minor {minor:#x}"
    ))
}

/// Bases of the IOMMUs' registers.
///
/// # Errors
/// There is no usable DMAR.
pub fn iommus(mem: &impl PhysMem, rsdp: u64) -> Result<Vec<u64>, Refusal> {
    let mut table = [0; DMAR_MAX];
    let length = acpi::copy_table(mem, rsdp, *b"DMAR", &mut table).map_err(Refusal::Iommu)?;
    let dmar = Dmar::new(table.get(..length).unwrap_or_default()).map_err(Refusal::Dmar)?;
    let bases: Vec<u64> = dmar.units().map(|unit| unit.base()).collect();
    if bases.is_empty() { Err(Refusal::NoIommu) } else { Ok(bases) }
}

/// The platform that a module must be for.
pub fn platform<R: CpuIdReader>(cpuid: &CpuId<R>, msr: &impl Msr, txt: &Txt, insist: bool) -> Platform {
    let fms = cpuid.get_feature_info().map_or(0, |f| {
        u32::from(f.extended_family_id()) << 20
            | u32::from(f.extended_model_id()) << 16
            | u32::from(f.base_family_id()) << 8
            | u32::from(f.base_model_id()) << 4
            | u32::from(f.stepping_id())
    });
    // A CPU whose word is not asked for need not have the register.
    let platform_id = if insist { 0 } else { msr.rdmsr(PLATFORM_ID) };
    Platform { didvid: txt.didvid, fms, platform_id, production: txt.production }
}

/// The TXT MLE header, as far as it concerns the loader.
///
/// Spec: \[TXT\] "MLE Header".
#[derive(Clone, Copy, Debug, FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct MleHeader {
    uuid: [u8; 16],
    length: U32,
    version: U32,
    /// 32-bit entry point, bytes from the image's start.
    pub entry: U32,
    first_page: U32,
    start: U32,
    end: U32,
    capabilities: U32,
}

const MLE_UUID: [u8; 16] =
    [0x5a, 0xac, 0x82, 0x90, 0x6f, 0x47, 0xa7, 0x74, 0x0f, 0x5c, 0x55, 0xa2, 0xcb, 0x51, 0xb6, 0x42];

/// The header at `at` in the image.
///
/// # Errors
/// There is none.
pub fn mle_header(image: &[u8], at: u32) -> Result<MleHeader, Refusal> {
    let rest = usize::try_from(at).ok().and_then(|at| image.get(at..)).unwrap_or_default();
    let header = MleHeader::read_from_prefix(rest).map(|(header, _)| header);
    header.ok().filter(|h| h.uuid == MLE_UUID).ok_or(Refusal::MleHeader(at))
}

/// What OsSinitData asks for: what module and MLE have in common, one way to wake the other processors, TPM 2.0's way to
/// use PCRs.
///
/// # Errors
/// The module is too old for the MLE, or the other way round.
pub fn capabilities(sinit: &Sinit<'_>, mle: &MleHeader) -> Result<u32, Refusal> {
    use heap::capability::{ECX_PAGE_TABLES, TCG_LOG, WAKE_GETSEC, WAKE_MONITOR};
    let (value, at_least) = (sinit.os_sinit_version(), heap::os_sinit::VERSION_TPM2);
    if value < at_least {
        return Err(Refusal::Sinit { field: "SINIT's OsSinitData version", value, at_least });
    }
    let (value, at_least) = (mle.version.get(), sinit.min_mle_header());
    if value < at_least {
        return Err(Refusal::Sinit { field: "the MLE header's version", value, at_least });
    }
    let common = sinit.capabilities() & mle.capabilities.get();
    let wake = if common & WAKE_MONITOR != 0 { WAKE_MONITOR } else { common & WAKE_GETSEC };
    if wake == 0 {
        let (value, at_least) = (sinit.capabilities(), WAKE_GETSEC);
        return Err(Refusal::Sinit {
            field: "SINIT's capabilities (a way to wake processors)",
            value,
            at_least,
        });
    }
    Ok(wake | common & (ECX_PAGE_TABLES | TCG_LOG))
}

/// PMRs over all memory below the end of `ram`'s parts, in whole units: low base, low size, high base, high size.
///
/// # Errors
/// Something of `what` lies outside.
pub fn pmrs(
    ram: impl Iterator<Item = PhysRange> + Clone,
    what: &[(&'static str, u64)],
) -> Result<[u64; 4], Refusal> {
    const UNIT: u64 = heap::os_sinit::PMR_UNIT;
    let end = |below| {
        let ends =
            ram.clone().filter(|r| (r.last() < FOUR_GIB) == below).filter_map(|r| r.last().checked_add(1));
        ends.max().unwrap_or(0) & !(UNIT.saturating_sub(1))
    };
    let (low, high) = (end(true), end(false).max(FOUR_GIB));
    match what.iter().find(|(_, last)| *last >= low) {
        Some(&(what, last)) => Err(Refusal::Unprotected { what, last, end: low }),
        None => Ok([0, low, FOUR_GIB, high.saturating_sub(FOUR_GIB)]),
    }
}

/// What SENTER changes, as it is, for the MLE to restore.
pub fn saved(msr: &impl Msr, heap: &PhysRange) -> IntelInfo {
    let count = (msr.rdmsr(MTRRCAP) & 0xff).min(32);
    let mut info = IntelInfo {
        hdr: entry_header::<IntelInfo>(TAG_INTEL),
        boot_params_addr: 0.into(),
        txt_heap: heap.start().into(),
        saved_misc_enable: msr.rdmsr(MISC_ENABLE).into(),
        mtrr_default_type: msr.rdmsr(MTRR_DEF_TYPE).into(),
        mtrr_count: count.into(),
        mtrr_pairs: [MtrrPair { base: 0.into(), mask: 0.into() }; 32],
    };
    for (pair, index) in info.mtrr_pairs.iter_mut().zip((MTRR_BASE..).step_by(2)).take(count as usize) {
        pair.base = msr.rdmsr(index).into();
        pair.mask = msr.rdmsr(index | 1).into();
    }
    info
}

/// The pairs of MTRRs by which a module of `size` bytes at `base` alone is write-back: aligned blocks that are powers of two.
///
/// # Errors
/// The CPU has too few (`have`).
pub fn module_mtrrs(base: u64, size: u64, phys_bits: u32, have: usize) -> Result<Vec<(u64, u64)>, Refusal> {
    let address = u64::MAX.checked_shl(phys_bits).map_or(u64::MAX, |above| !above) & !0xfff;
    let mut pairs = Vec::new();
    let (mut at, mut left) = (base, size.next_multiple_of(PAGE_SIZE));
    while left > 0 {
        let aligned = 1u64.checked_shl(at.trailing_zeros()).unwrap_or(1 << 63);
        let fits = 1u64.checked_shl(left.ilog2()).unwrap_or(1 << 63);
        let block = aligned.min(fits);
        pairs.push((at | WRITE_BACK, address & !(block.saturating_sub(1)) | MTRR_VALID));
        at = at.saturating_add(block);
        left = left.saturating_sub(block);
    }
    if pairs.len() > have { Err(Refusal::Mtrrs { need: pairs.len(), have }) } else { Ok(pairs) }
}

/// How many pairs of MTRRs there are.
pub fn mtrr_count(msr: &impl Msr) -> usize {
    (msr.rdmsr(MTRRCAP) & 0xff) as usize
}

/// Writes the MTRRs: `pairs` and no others, all else uncached. The caller has caches off.
pub fn set_mtrrs(msr: &impl Msr, pairs: &[(u64, u64)]) {
    msr.wrmsr(MTRR_DEF_TYPE, 0);
    for number in 0..mtrr_count(msr) {
        let index = MTRR_BASE.saturating_add((number as u32).saturating_mul(2));
        let &(base, mask) = pairs.get(number).unwrap_or(&(0, 0));
        msr.wrmsr(index, base);
        msr.wrmsr(index | 1, mask);
    }
    msr.wrmsr(MTRR_DEF_TYPE, MTRR_ENABLED);
}

/// Clears what the banks of machine checks hold: SENTER refuses to start with an error in one.
///
/// Spec: \[SDM2\] "GETSEC\[SENTER\]"; \[SDM3\] "Error-Reporting Register Banks".
pub fn clear_machine_checks(msr: &impl Msr) {
    const MCG_CAP: u32 = 0x179;
    const FIRST_STATUS: u32 = 0x401;
    let banks = (msr.rdmsr(MCG_CAP) & 0xff) as usize;
    for status in (FIRST_STATUS..).step_by(4).take(banks) {
        msr.wrmsr(status, 0);
    }
}

/// Stops an IOMMU from translating, remapping interrupts and reading its queue, as SINIT wants it. False when it does not
/// within some polls.
///
/// Spec: \[VTD\] "Global Command Register".
pub fn quiet_iommu(regs: &impl Mmio) -> bool {
    const GCMD: u32 = 0x18;
    const GSTS: u32 = 0x1c;
    /// Bits of GSTS that are states, and stay as they are unless cleared one by one.
    const LASTING: u32 = 1 << 31 | 1 << 28 | 1 << 26 | 1 << 25 | 1 << 23;
    const POLLS: u32 = 1_000_000;
    // Translation, interrupt remapping, queued invalidation: in this order.
    for bit in [1 << 31, 1 << 25, 1 << 26] {
        let status = regs.read32(GSTS);
        if status & bit == 0 {
            continue;
        }
        regs.write32(GCMD, status & LASTING & !bit);
        if !(0..POLLS).any(|_| regs.read32(GSTS) & bit == 0) {
            return false;
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use core::cell::RefCell;
    use std::collections::BTreeMap;

    use proptest::prelude::*;
    use raw_cpuid::CpuIdResult;

    use super::*;

    /// Registers by number: MSRs, or a register space. What is not there must not be asked for.
    #[derive(Default)]
    struct Registers(RefCell<BTreeMap<u32, u64>>);

    impl Registers {
        fn new(values: &[(u32, u64)]) -> Self {
            Self(RefCell::new(values.iter().copied().collect()))
        }
        fn get(&self, index: u32) -> u64 {
            *self.0.borrow().get(&index).unwrap_or_else(|| panic!("register {index:#x} is not there"))
        }
    }

    impl Msr for Registers {
        fn rdmsr(&self, index: u32) -> u64 {
            self.get(index)
        }
        fn wrmsr(&self, index: u32, value: u64) {
            self.0.borrow_mut().insert(index, value);
        }
    }

    impl Mmio for Registers {
        fn read8(&self, _: u32) -> u8 {
            panic!("no byte is read")
        }
        fn read32(&self, offset: u32) -> u32 {
            self.get(offset) as u32
        }
        fn read64(&self, offset: u32) -> u64 {
            self.get(offset)
        }
        fn write8(&self, _: u32, _: u8) {
            panic!("no byte is written")
        }
        fn write32(&self, offset: u32, value: u32) {
            self.wrmsr(offset, value.into());
        }
        fn write64(&self, _: u32, _: u64) {
            panic!("no quadword is written")
        }
    }

    fn cpu(vendor: &'static [u8; 12], ecx: u32) -> CpuId<impl CpuIdReader> {
        let word = move |i: usize| u32::from_le_bytes(vendor[i..i + 4].try_into().unwrap());
        CpuId::with_cpuid_reader(move |leaf: u32, _: u32| match leaf {
            0 => CpuIdResult { eax: 1, ebx: word(0), edx: word(4), ecx: word(8) },
            1 => CpuIdResult { eax: 0x2_0652, ebx: 0, ecx, edx: 0 },
            _ => CpuIdResult { eax: 0, ebx: 0, ecx: 0, edx: 0 },
        })
    }

    const INTEL: &[u8; 12] = b"GenuineIntel";
    const BOTH: u32 = 1 << 6 | 1 << 5;

    #[test]
    fn each_cpu_that_cannot_is_refused_with_its_reason() {
        let msrs = |control, mcg| Registers::new(&[(0x3a, control), (0x17a, mcg)]);
        let check = |cpu: &CpuId<_>, control, mcg| check_cpu(cpu, &msrs(control, mcg), false);
        assert_eq!(check(&cpu(INTEL, BOTH), 0xff07, 0), Ok(()));
        assert_eq!(check_cpu(&cpu(b"AuthenticAMD", BOTH), &msrs(0xff07, 0), false), Err(Refusal::Vendor));
        for ecx in [1 << 6, 1 << 5] {
            assert_eq!(check_cpu(&cpu(INTEL, ecx), &msrs(0xff07, 0), false), Err(Refusal::NoSmx(ecx)));
        }
        for control in [0, 0xff05, 0xff06, 0x7f07, 0xfe07] {
            assert_eq!(check(&cpu(INTEL, BOTH), control, 0), Err(Refusal::FeatureControl(control)));
        }
        assert_eq!(check(&cpu(INTEL, BOTH), 0xff07, 4), Err(Refusal::MachineCheck));
        assert_eq!(check_capabilities(0x1ff), Ok(()));
        assert_eq!(
            check_capabilities(0x1fe).unwrap_err().to_string(),
            "CPU: GETSEC[CAPABILITIES] is 0x1fe, bits 0x1f1 are needed"
        );
    }

    #[test]
    fn insisting_asks_the_cpu_nothing() {
        assert_eq!(check_cpu(&cpu(b"AuthenticAMD", 0), &Registers::default(), true), Ok(()));
    }

    /// The heap, at 1 MiB.
    struct Heap(Vec<u8>);
    impl PhysMem for Heap {
        fn read(&self, addr: u64, out: &mut [u8]) -> bool {
            let at = (addr - 0x10_0000) as usize;
            out.copy_from_slice(&self.0[at..at + out.len()]);
            true
        }
        fn write(&self, _: u64, _: &[u8]) -> bool {
            panic!("a check writes nothing")
        }
    }

    #[test]
    fn each_chipset_that_cannot_is_refused_with_its_reason() {
        let good = [
            (0x000, 0),
            (0x008, 0),
            (0x030, 0),
            (0x100, 0xffff_ffff),
            (0x110, 0x1_b001_8086),
            (0x200, 0x8000_0000),
            (0x270, 0x7fd0_0000),
            (0x278, 0x2_0000),
            (0x300, 0x10_0000),
            (0x308, 0x2_0000),
        ];
        let with = |register, value, bios: u64| {
            let txt = Registers::new(&good);
            txt.wrmsr(register, value);
            check_txt(&txt, &Heap(bios.to_le_bytes().to_vec()))
        };
        let txt = with(0x000, 0, 48).unwrap();
        assert_eq!((txt.heap.start(), txt.heap.len(), txt.bios), (0x10_0000, 0x2_0000, 48));
        assert_eq!((txt.sinit.start(), txt.didvid, txt.production), (0x7fd0_0000, 0x1_b001_8086, true));
        assert!(!with(0x100, 0, 48).unwrap().production, "the older register counts where it is there");
        assert_eq!(with(0x000, u64::MAX, 48), Err(Refusal::NoTxt));
        assert_eq!(with(0x110, u64::MAX, 48), Err(Refusal::NoTxt));
        assert_eq!(with(0x000, 1, 48), Err(Refusal::Launched(1)));
        assert_eq!(with(0x008, 1, 48), Err(Refusal::NeedsPowerCycle(1)));
        for (register, value) in
            [(0x300, 0), (0x300, 0x10_0001), (0x308, 0), (0x308, 1 << 32), (0x270, 1 << 32)]
        {
            assert!(
                matches!(with(register, value, 48), Err(Refusal::Range { .. })),
                "{register:#x} {value:#x}"
            );
        }
        for bios in [0, 40, 50, 0x1_f000, u64::MAX] {
            assert_eq!(with(0x000, 0, bios), Err(Refusal::HeapFull { bios, size: 0x2_0000 }));
        }
    }

    #[test]
    fn an_earlier_failure_is_told_by_who_and_what() {
        for quiet in [0, 0xc000_0001, 0x7fff_ffff] {
            assert_eq!(earlier_failure(quiet), None);
        }
        let told = |code| earlier_failure(code).unwrap();
        assert_eq!(
            told(0x8000_000d),
            "TXT.ERRORCODE 0x8000000d, by the CPU, class see the module's manual, major 0x0, minor 0x0"
        );
        assert_eq!(told(0xc000_0491), "TXT.ERRORCODE 0xc0000491, by SINIT, class heap, major 0x1, minor 0x0");
        assert_eq!(
            told(0xc000_8001),
            "TXT.ERRORCODE 0xc0008001, by software that was launched, class see the module's manual, major 0x0, minor 0x0"
        );
        // Ours.
        assert!(told(0xd234_c003).contains("does not cover the MLE region"), "{}", told(0xd234_c003));
    }

    #[test]
    fn protected_ranges_cover_memory_in_whole_units() {
        let range = |start, last| PhysRange::from_last(start, last).unwrap();
        let ram = [range(0, 0x9_ffff), range(0x10_0000, 0x7fed_ffff), range(1 << 32, 0x1_7fff_ffff)];
        let all = pmrs(ram.into_iter(), &[("x", 0x7fdf_ffff)]);
        assert_eq!(all, Ok([0, 0x7fe0_0000, 1 << 32, 0x8000_0000]));
        let error = pmrs(ram.into_iter(), &[("x", 1), ("the MLE region", 0x7fe0_0000)]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "TXT: the MLE region ends at 0x7fe00000, memory is protected from DMA up to 0x7fe00000"
        );
        assert_eq!(pmrs(ram[..2].iter().copied(), &[]), Ok([0, 0x7fe0_0000, 1 << 32, 0]));
    }

    #[test]
    fn memory_types_are_saved_and_set() {
        let msrs = Registers::new(&[
            (0xfe, 0x502),
            (0x2ff, 0xc06),
            (0x1a0, 0x85),
            (0x200, 6),
            (0x201, 0xf_8000_0800),
            (0x202, 0),
            (0x203, 0),
        ]);
        let info = saved(&msrs, &PhysRange::new(0x10_0000, 0x2_0000).unwrap());
        assert_eq!(
            (info.mtrr_count.get(), info.mtrr_default_type.get(), info.saved_misc_enable.get()),
            (2, 0xc06, 0x85)
        );
        assert_eq!((info.mtrr_pairs[0].base.get(), info.mtrr_pairs[0].mask.get()), (6, 0xf_8000_0800));
        set_mtrrs(&msrs, &[(0x7fd0_0006, 0xf_ffff_0800)]);
        assert_eq!(
            [0x200, 0x201, 0x202, 0x203, 0x2ff].map(|i| msrs.get(i)),
            [0x7fd0_0006, 0xf_ffff_0800, 0, 0, 0x800]
        );
    }

    #[test]
    fn no_bank_of_machine_checks_is_left_with_an_error() {
        let msrs = Registers::new(&[(0x179, 0x1c02), (0x401, 7), (0x405, 7), (0x409, 7)]);
        clear_machine_checks(&msrs);
        assert_eq!([0x401, 0x405, 0x409].map(|i| msrs.get(i)), [0, 0, 7]);
    }

    proptest! {
        #[test]
        fn the_module_alone_is_cached(page in 0x100u64..0xf_0000, size in 1u64..0x8_0000) {
            let base = page << 12;
            let pairs = module_mtrrs(base, size, 36, 64).unwrap();
            let cached = |at: u64| {
                let hits = pairs.iter().filter(|(b, m)| at & m & !0xfff == b & m & !0xfff).count();
                prop_assert!(hits < 2);
                Ok(hits == 1)
            };
            let end = (base + size).next_multiple_of(4096);
            for at in [base, base + size - 1, (base + end) / 2, end - 1] {
                prop_assert!(cached(at)?, "{:#x}", at);
            }
            for at in [base - 1, end, 0, 0xfee0_0000] {
                prop_assert!((base..end).contains(&at) || !cached(at)?, "{:#x}", at);
            }
            let need = pairs.len();
            prop_assert_eq!(module_mtrrs(base, size, 36, need - 1), Err(Refusal::Mtrrs { need, have: need - 1 }));
        }

        #[test]
        fn no_image_makes_it_panic(image in proptest::collection::vec(any::<u8>(), 0..200), at: u32) {
            let _ = mle_header(&image, at);
            let _ = mle_header(&image, at % 256);
        }
    }

    /// The header that the manual has for version 2.2, its UUID typed as four words.
    #[test]
    fn the_mles_header_is_found_by_its_uuid() {
        let words: [u32; 13] = [
            0x9082_ac5a,
            0x74a7_476f,
            0xa255_5c0f,
            0x42b6_51cb,
            0x34,
            0x2_0002,
            0x1054,
            0,
            0,
            0x4_0000,
            0x227,
            0,
            0,
        ];
        let mut image = vec![0; 64];
        image.extend(words.iter().flat_map(|word| word.to_le_bytes()));
        let header = mle_header(&image, 64).unwrap();
        assert_eq!(
            (header.entry.get(), header.version.get(), header.capabilities.get()),
            (0x1054, 0x2_0002, 0x227)
        );
        assert_eq!(mle_header(&image, 60).err(), Some(Refusal::MleHeader(60)));
        assert_eq!(mle_header(&image, 65).err(), Some(Refusal::MleHeader(65)));
    }

    #[test]
    fn an_iommu_is_quiet_or_the_launch_ends() {
        struct Unit {
            status: core::cell::Cell<u32>,
            stuck: bool,
            commands: RefCell<Vec<u32>>,
        }
        impl Mmio for Unit {
            fn read8(&self, _: u32) -> u8 {
                panic!()
            }
            fn read32(&self, offset: u32) -> u32 {
                assert_eq!(offset, 0x1c);
                self.status.get()
            }
            fn read64(&self, _: u32) -> u64 {
                panic!()
            }
            fn write8(&self, _: u32, _: u8) {
                panic!()
            }
            fn write32(&self, offset: u32, value: u32) {
                assert_eq!(offset, 0x18);
                self.commands.borrow_mut().push(value);
                if !self.stuck {
                    self.status.set(value);
                }
            }
            fn write64(&self, _: u32, _: u64) {
                panic!()
            }
        }
        let unit = |status, stuck| Unit {
            status: core::cell::Cell::new(status),
            stuck,
            commands: RefCell::default(),
        };
        let translating = unit(0x8600_0000, false);
        assert!(quiet_iommu(&translating));
        assert_eq!(*translating.commands.borrow(), [0x0600_0000, 0x0400_0000, 0]);
        let idle = unit(0, true);
        assert!(quiet_iommu(&idle) && idle.commands.borrow().is_empty());
        assert!(!quiet_iommu(&unit(0x8000_0000, true)));
    }
}
