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
mod tests;
