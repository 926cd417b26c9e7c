//! The checks after SENTER, on what SINIT and the loader left in memory.
//!
//! What came before, in `senter.s`: the image lies in one piece, and the low protected range covers its region.

use hv::addr::{FOUR_GIB, PAGE_SIZE, PhysRange};
use hv::failure::SenterError;
use hv::io::{Mmio, PhysMem};
use hv::launch::{CordonEntry, FLAG_LOCALITY0_ALLOWED, FLAG_REGIONS_OPTIONAL, HANDOFF_MAGIC, Handoff};
use hv::slrt::{self, DlInfo, Header, IntelInfo, LOG_FORMAT_TPM2, LogInfo, Slrt};
use iommu::dmar::Dmar;
use iommu::vt_d::Protection;
use vmx::txt::heap::{self, ELEMENT_END, ELEMENT_LOG, SIZE_WORD, capability};
use zerocopy::FromBytes;

use super::heap::{Table, Which};
use super::mtrr::{PAIRS_MAX, Saved};
use super::regs::{self, Registers};
use super::{
    Error, FIELD_DMAR, FIELD_FLAGS, FIELD_IMAGE, FIELD_LAUNCH_PAGE, FIELD_LOG, FIELD_LOG_FORMAT,
    FIELD_RANGES, FIELD_SHAPE, FIELD_SLRT, FIELD_TECHNOLOGY, FIELD_VERSION, FIELD_WAKEUP, fail,
};
use crate::inputs::Txt;

/// Longest DMAR accepted.
pub const DMAR_MAX: usize = 4096;
/// Longest log of SINIT's accepted.
pub const LOG_MAX: usize = 0x8000;
/// Most processors: what the MADT's reader has room for as well.
const PROCESSORS_MAX: u32 = 1024;
/// Bytes of one of SINIT's memory ranges: address, length, type.
const MDR_SIZE: u64 = 24;
/// Most of SINIT's memory ranges that are looked at.
const RANGES_MAX: u32 = 64;
/// Versions with the fields that are used; TPM 2.0.
const OS_SINIT_VERSIONS: core::ops::RangeInclusive<u32> = heap::os_sinit::VERSION_TPM2..=16;
const SINIT_MLE_VERSIONS: core::ops::RangeInclusive<u32> = 8..=16;
/// Where copies go: they stay for as long as the image runs.
pub struct Buffers {
    /// SINIT's DMAR.
    pub dmar: &'static mut [u8; DMAR_MAX],
    /// SINIT's events.
    pub log: &'static mut [u8; LOG_MAX],
}

/// How the other processors are woken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wake {
    /// By a store to this address.
    Monitor(u64),
    /// By GETSEC\[WAKEUP\].
    Getsec,
}

/// What the stage found.
#[derive(Clone, Copy, Debug)]
pub struct Found {
    /// For the launch, but for the frequency of the time-stamp counter.
    pub handoff: Handoff,
    /// The same.
    pub txt: Txt,
    /// Memory types before SENTER, unchecked.
    pub saved: Saved,
    /// Processors beside this one.
    pub others: u32,
    /// How they are woken.
    pub wake: Wake,
}

/// Checks everything. `image` is the running image with all memory that it uses, `region_size` what its header asks for.
///
/// # Errors
/// The first thing that is not as it must be.
pub fn check<M: Mmio>(
    registers: &Registers<M>,
    mem: &impl PhysMem,
    image: PhysRange,
    region_size: u64,
    buffers: Buffers,
) -> Result<Found, Error> {
    let errorcode = registers.read(regs::ERRORCODE);
    if errorcode != regs::ERRORCODE_SUCCESS {
        return fail(SenterError::ErrorCode, errorcode as u16);
    }
    let range = |base, size, error| {
        let range = PhysRange::new(registers.read(base), registers.read(size));
        range.filter(|r| r.start() >= PAGE_SIZE && r.last() < FOUR_GIB).ok_or(Error::Checked(error, 0))
    };
    let txt_heap = range(regs::HEAP_BASE, regs::HEAP_SIZE, SenterError::Heap)?;
    let sinit = range(regs::SINIT_BASE, regs::SINIT_SIZE, SenterError::Heap)?;
    let table = |which| Table::find(mem, &txt_heap, which);
    let (bios, os_mle) = (table(Which::Bios)?, table(Which::OsMle)?);
    let (os_sinit, sinit_mle) = (table(Which::OsSinit)?, table(Which::SinitMle)?);

    let processors = bios.u32(mem, heap::bios::PROCESSORS)?;
    if !(1..=PROCESSORS_MAX).contains(&processors) {
        return Err(bios.error(1));
    }
    let version = |table: &Table, at, accepted: core::ops::RangeInclusive<u32>| match table.u32(mem, at)? {
        version if accepted.contains(&version) => Ok(()),
        _ => Err(table.error(FIELD_VERSION)),
    };
    version(&os_mle, heap::os_mle::VERSION, heap::os_mle::VERSION_1..=heap::os_mle::VERSION_1)?;
    version(&os_sinit, heap::os_sinit::VERSION, OS_SINIT_VERSIONS)?;
    version(&sinit_mle, heap::sinit_mle::VERSION, SINIT_MLE_VERSIONS)?;

    let protected = Protected::read(mem, &os_sinit)?;
    let page_tables = page_tables(mem, &os_sinit)?;
    let ranges = Ranges::new(mem, &sinit_mle)?;
    // What is read before the tables for devices are ours must be out of their reach; what becomes ours must be memory.
    let place = |what: PhysRange| {
        protected.covers(&what)?;
        ranges.has(&what)
    };
    // Of the SLRT as much as a table can be.
    let slrt_base = os_mle.u64(mem, heap::os_mle::SLRT)?;
    let bytes = PhysRange::new(slrt_base, slrt::MAX_SIZE as u64);
    let bytes = bytes.filter(|r| r.last() < FOUR_GIB && !r.overlaps(&image));
    place(bytes.ok_or(os_mle.error(FIELD_SLRT))?)?;
    let slrt = Loaders::read(mem, slrt_base, image, region_size)?;
    for what in [slrt.region, slrt.log] {
        place(what)?;
    }
    if u64::from(os_mle.u32(mem, heap::os_mle::AP_WAKE)?) != slrt.launch_page {
        return Err(os_mle.error(FIELD_LAUNCH_PAGE));
    }

    let capabilities = os_sinit.u32(mem, heap::os_sinit::CAPABILITIES)?;
    let wake = if capabilities & capability::WAKE_MONITOR == 0 {
        Wake::Getsec
    } else {
        let address = u64::from(sinit_mle.u32(mem, heap::sinit_mle::WAKEUP)?);
        let word = PhysRange::new(address, 4)
            .filter(|word| address >= PAGE_SIZE && address.is_multiple_of(4) && !word.overlaps(&slrt.region));
        Wake::Monitor(word.ok_or(sinit_mle.error(FIELD_WAKEUP))?.start())
    };
    let Buffers { dmar, log } = buffers;
    let dmar = copy_dmar(mem, &sinit_mle, dmar)?;
    let log = copy_log(mem, &os_sinit, &slrt.log, log)?;
    let optional = slrt.flags & FLAG_REGIONS_OPTIONAL != 0;
    let protection = if optional { Protection::InForceIfAny } else { Protection::InForce };
    let handoff = Handoff {
        magic: HANDOFF_MAGIC,
        slb_base: 0,
        slrt_base,
        slrt_size: slrt.size,
        log_base: slrt.log.start(),
        log_size: slrt.log.len(),
        mle_sha256: [0; 32],
        region_base: slrt.region.start(),
        region_size: slrt.region.len(),
        tsc_khz: 0,
        tpm_degraded: 0,
        iommu_count: 0,
    };
    let txt = Txt { heap: txt_heap, sinit, page_tables, dmar, log, protection };
    Ok(Found { handoff, txt, saved: slrt.saved, others: processors.saturating_sub(1), wake })
}

/// Memory that no device reaches while VT-d does not translate, as the loader asked SINIT for it. That the units were set so is
/// looked at before they are touched ([`iommu::vt_d::deny_all`]).
struct Protected([Option<PhysRange>; 2]);

impl Protected {
    fn read(mem: &impl PhysMem, os_sinit: &Table) -> Result<Self, Error> {
        let region = |at: u64| {
            let (base, size) = (os_sinit.u64(mem, at)?, os_sinit.u64(mem, at.saturating_add(8))?);
            Ok(PhysRange::new(base, size))
        };
        Ok(Self([region(heap::os_sinit::PMR)?, region(heap::os_sinit::PMR + 16)?]))
    }

    fn covers(&self, what: &PhysRange) -> Result<(), Error> {
        match self.0.iter().flatten().any(|range| range.contains(what)) {
            true => Ok(()),
            false => fail(SenterError::Unprotected, mib(what)),
        }
    }
}

/// SINIT's list of what is memory.
struct Ranges<'a, P: PhysMem> {
    mem: &'a P,
    table: &'a Table,
    first: u64,
    count: u32,
}

impl<'a, P: PhysMem> Ranges<'a, P> {
    const USABLE: u8 = 0;

    fn new(mem: &'a P, table: &'a Table) -> Result<Self, Error> {
        let bad = table.error(FIELD_RANGES);
        let count = table.u32(mem, heap::sinit_mle::MDRS)?;
        let offset = u64::from(table.u32(mem, heap::sinit_mle::MDRS + 4)?);
        // Offsets of this table count from its size word.
        let first = offset.checked_sub(SIZE_WORD).filter(|_| (1..=RANGES_MAX).contains(&count)).ok_or(bad)?;
        Ok(Self { mem, table, first, count })
    }

    fn entry(&self, index: u32) -> Result<(Option<PhysRange>, u8), Error> {
        let mut entry = [0; MDR_SIZE as usize];
        let at = self.first.saturating_add(MDR_SIZE.saturating_mul(index.into()));
        self.table.copy(self.mem, at, &mut entry).map_err(|_| self.table.error(FIELD_RANGES))?;
        let [address, length, kind] = entry.as_chunks().0 else { return Err(self.table.error(FIELD_RANGES)) };
        let range = PhysRange::new(u64::from_le_bytes(*address), u64::from_le_bytes(*length));
        Ok((range, kind[0]))
    }

    /// Whether `what` is memory: a range of it that is a device's, or nothing, would not keep what is written.
    fn has(&self, what: &PhysRange) -> Result<(), Error> {
        // Neighbours count as one range: each round goes on where a range ends that holds the next byte.
        let mut at = what.start();
        for _ in 0..self.count {
            let mut end = None;
            for index in 0..self.count {
                let (range, kind) = self.entry(index)?;
                if let Some(range) = range.filter(|r| kind == Self::USABLE && r.contains_addr(at)) {
                    end = end.max(Some(range.last()));
                }
            }
            match end {
                Some(last) if last >= what.last() => return Ok(()),
                Some(last) => at = last.saturating_add(1),
                None => break,
            }
        }
        fail(SenterError::Memory, mib(what))
    }
}

fn mib(what: &PhysRange) -> u16 {
    (what.start() >> 20).min(u16::MAX.into()) as u16
}

/// Where the page tables lie by which SINIT found the image. `senter.s` followed them.
fn page_tables(mem: &impl PhysMem, os_sinit: &Table) -> Result<PhysRange, Error> {
    const ADDRESS: u64 = 0xffff_f000;
    let mut first = u64::MAX;
    let mut last = 0;
    let mut at = os_sinit.u64(mem, heap::os_sinit::MLE)? & ADDRESS;
    for _ in 0..3 {
        (first, last) = (first.min(at), last.max(at | (PAGE_SIZE - 1)));
        let mut entry = [0; 8];
        if !mem.read(at, &mut entry) {
            return fail(SenterError::PageTables, (at >> 20) as u16);
        }
        at = u64::from_le_bytes(entry) & ADDRESS;
    }
    PhysRange::from_last(first, last).ok_or(Error::Checked(SenterError::PageTables, 0))
}

/// What the loader says in the SLRT.
struct Loaders {
    size: u64,
    region: PhysRange,
    log: PhysRange,
    launch_page: u64,
    flags: u32,
    saved: Saved,
}

impl Loaders {
    fn read(mem: &impl PhysMem, base: u64, image: PhysRange, region_size: u64) -> Result<Self, Error> {
        let bad = |field| Error::Checked(SenterError::Slrt, field);
        let shape = |_| bad(FIELD_SHAPE);
        let mut copy = [0; slrt::MAX_SIZE];
        if !mem.read(base, &mut copy) {
            return Err(bad(FIELD_SHAPE));
        }
        let (header, _) = Header::read_from_prefix(&copy).map_err(|_| bad(FIELD_SHAPE))?;
        if header.architecture.get() != slrt::ARCH_TXT {
            return Err(bad(FIELD_TECHNOLOGY));
        }
        let table = Slrt::parse(&copy).map_err(shape)?;
        let image_info: DlInfo = table.entry(slrt::TAG_DL_INFO).map_err(shape)?;
        let log: LogInfo = table.entry(slrt::TAG_LOG_INFO).map_err(shape)?;
        let cordon: CordonEntry = table.entry(slrt::TAG_CORDON).map_err(shape)?;
        let intel: IntelInfo = table.entry(slrt::TAG_INTEL).map_err(shape)?;
        if log.format.get() != LOG_FORMAT_TPM2 {
            return Err(bad(FIELD_LOG_FORMAT));
        }
        let flags = cordon.flags.get();
        if flags & !(FLAG_LOCALITY0_ALLOWED | FLAG_REGIONS_OPTIONAL) != 0 {
            return Err(bad(FIELD_FLAGS));
        }
        let region = PhysRange::new(cordon.mle_region.base.get(), cordon.mle_region.size.get());
        let region = region.filter(|region| {
            region.start() == image.start() && region.contains(&image) && region.len() >= region_size
        });
        if image_info.dlme_base.get() != image.start() {
            return Err(bad(FIELD_IMAGE));
        }
        let mut pairs = [[0; 2]; PAIRS_MAX];
        for (to, from) in pairs.iter_mut().zip(&intel.mtrr_pairs) {
            *to = [from.base.get(), from.mask.get()];
        }
        Ok(Self {
            size: header.size.get().into(),
            region: region.ok_or(bad(FIELD_IMAGE))?,
            log: PhysRange::new(log.addr.get(), log.size.get().into()).ok_or(bad(FIELD_LOG))?,
            launch_page: cordon.launch_page.get(),
            flags,
            saved: Saved {
                misc_enable: intel.saved_misc_enable.get(),
                default_type: intel.mtrr_default_type.get(),
                count: usize::try_from(intel.mtrr_count.get()).unwrap_or(usize::MAX),
                pairs,
            },
        })
    }
}

/// SINIT's copy of the DMAR, the one that counts: the table in ACPI's memory is the gap's.
fn copy_dmar(
    mem: &impl PhysMem,
    sinit_mle: &Table,
    out: &'static mut [u8; DMAR_MAX],
) -> Result<&'static [u8], Error> {
    let size = sinit_mle.u32(mem, heap::sinit_mle::DMAR)?;
    let offset = u64::from(sinit_mle.u32(mem, heap::sinit_mle::DMAR + 4)?);
    let bad = Error::Checked(SenterError::Dmar, size.min(u16::MAX.into()) as u16);
    let out = usize::try_from(size).ok().and_then(|size| out.get_mut(..size)).ok_or(bad)?;
    let at = offset.checked_sub(SIZE_WORD).ok_or(sinit_mle.error(FIELD_DMAR))?;
    sinit_mle.copy(mem, at, out).map_err(|_| sinit_mle.error(FIELD_DMAR))?;
    Dmar::new(out).map(|_| &*out).map_err(|_| bad)
}

/// The events that SINIT logged, which must lie in the event log's area.
fn copy_log(
    mem: &impl PhysMem,
    os_sinit: &Table,
    area: &PhysRange,
    out: &'static mut [u8; LOG_MAX],
) -> Result<&'static [u8], Error> {
    /// Type, size, address, bytes of the area, offsets of the first event and behind the last.
    const LOG_ELEMENT: u32 = 28;
    const HEADER: u32 = 8;
    let bad = os_sinit.error(FIELD_LOG);
    let mut at = heap::os_sinit::ELEMENTS;
    loop {
        let (kind, size) = (os_sinit.u32(mem, at)?, os_sinit.u32(mem, at.saturating_add(4))?);
        match kind {
            ELEMENT_LOG if size == LOG_ELEMENT => break,
            ELEMENT_END => return Err(bad),
            _ if size < HEADER => return Err(bad),
            // The table's end bounds the loop.
            _ => at = at.saturating_add(size.into()),
        }
    }
    let base = os_sinit.u64(mem, at.saturating_add(8))?;
    let word = |offset| os_sinit.u32(mem, at.saturating_add(offset));
    let (room, first, next) = (word(16)?, word(20)?, word(24)?);
    let all = PhysRange::new(base, room.into()).filter(|all| area.contains(all));
    let Some(all) = all.filter(|_| first <= next && next <= room) else { return fail(SenterError::Log, 0) };
    let used = usize::try_from(next.saturating_sub(first)).ok();
    let out = used.and_then(|used| out.get_mut(..used)).ok_or(bad)?;
    if !mem.read(all.start().saturating_add(first.into()), out) {
        return Err(bad);
    }
    Ok(out)
}

#[cfg(test)]
mod tests;
