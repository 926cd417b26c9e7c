//! What the loader asks for: the SLRT, copied once, checked in every field, and kept as the few facts that the
//! launch goes by.

use hv::addr::PhysRange;
use hv::failure::SlbError;
use hv::launch::{
    Blob, CordonEntry, DMA_AREA_SIZE, FLAG_LOCALITY0_ALLOWED, FLAG_RESUME, MLE_REGION_ALIGN, MLE_REGION_MAX,
    MLE_REGION_MIN, MLE_VERSION, MleHeader, policy_difference,
};
use hv::slrt::{
    ARCH_SKINIT, DlInfo, Header, LOG_FORMAT_TPM2, LogInfo, MAX_SIZE, PolicyEntry, Slrt, SlrtError,
    TAG_CORDON, TAG_DL_INFO, TAG_LOG_INFO,
};
use zerocopy::FromBytes;

use super::memmap::MemoryMap;
use super::space::Space;
use super::{Failure, fail};

/// Smallest log area: room for what the SLB stage and the MLE write, in four banks.
pub const LOG_MIN: u64 = 4096;

/// Details of [`SlbError::SlrtField`] and [`SlbError::MleHeader`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Field {
    /// SLRT header: architecture is not SKINIT.
    Architecture = 1,
    /// DL_INFO: the SLB's address is not where we run.
    DceBase = 2,
    /// DL_INFO: the MLE's address is not the start of the MLE region.
    DlmeBase = 3,
    /// LOG_INFO: not a crypto-agile log.
    LogFormat = 4,
    /// Cordon's entry, or the MLE's header: another version.
    Version = 5,
    /// Cordon's entry: unknown flags.
    Flags = 6,
    /// MLE header: magic.
    Magic = 7,
    /// MLE header: image size differs from DL_INFO's.
    ImageSize = 8,
    /// MLE header: entry point outside the image, in the header, or different from DL_INFO's.
    Entry = 9,
    /// MLE header: the region is smaller than the image wants.
    RegionSize = 10,
}

/// Details of [`SlbError::Region`], [`SlbError::Log`] and [`SlbError::MemoryMap`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Place {
    /// Empty, or past the end of the address space.
    Wraps = 1,
    /// Not aligned.
    Alignment = 2,
    /// Too small or too large.
    Size = 3,
    /// Not RAM between 1 MiB and 4 GiB, as far as the CPU knows.
    NotRam = 4,
    /// Overlaps the SLB.
    Slb = 5,
    /// Overlaps the SLRT.
    Slrt = 6,
    /// The log overlaps the MLE region.
    Region = 7,
    /// Overlaps something else that the SLRT names: kernel, initrd, command line, configuration, memory map.
    Blob = 8,
    /// The image does not fit into the region below the part that is for DMA protection.
    Image = 9,
    /// The memory map does not list the MLE region as reserved.
    RegionUnlisted = 10,
    /// The memory map does not list the log as RAM.
    LogUnlisted = 11,
}

/// The facts of a launch. Every range is RAM below 4 GiB; region, log, SLRT and SLB are clear of each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// The SLRT's buffer.
    pub slrt: PhysRange,
    /// Bytes of it in use.
    pub slrt_size: u32,
    /// Memory of the MLE.
    pub region: PhysRange,
    /// The MLE image, at the region's start.
    pub image: PhysRange,
    /// The region's top, for DMA protection.
    pub dma_area: PhysRange,
    /// Entry point of the MLE as DL_INFO has it.
    pub entry: u64,
    /// The event log's area.
    pub log: PhysRange,
    /// The EFI memory map; not checked beyond its range.
    pub memory_map: MemoryMap,
    /// The ACPI RSDP's address; not checked.
    pub rsdp: u64,
    /// Whether a TPM without locality 2 will do.
    pub locality0_allowed: bool,
}

/// Where [`MAX_SIZE`] bytes of SLRT may lie; the answer is needed before a byte of it is read.
pub fn slrt_range(address: u64, slb: &PhysRange, space: &Space) -> Result<PhysRange, Failure> {
    match PhysRange::new(address, MAX_SIZE as u64) {
        Some(range) if space.is_ram(&range) && !range.overlaps(slb) => Ok(range),
        _ => fail(SlbError::SlrtAddress, address >> 16),
    }
}

impl Request {
    /// Checks our copy of the SLRT that lies at `slrt`.
    pub fn check(
        table: &[u8; MAX_SIZE],
        slrt: PhysRange,
        slb: &PhysRange,
        space: &Space,
    ) -> Result<Self, Failure> {
        let field = |field: Field| fail(SlbError::SlrtField, field as u16);
        let parsed = Slrt::parse(table).or_else(malformed)?;
        let (header, _) = Header::ref_from_prefix(table).or_else(|_| fail(SlbError::SlrtFormat, 0_u16))?;
        let dl: DlInfo = parsed.entry(TAG_DL_INFO).or_else(malformed)?;
        let log: LogInfo = parsed.entry(TAG_LOG_INFO).or_else(malformed)?;
        let cordon: CordonEntry = parsed.entry(TAG_CORDON).or_else(malformed)?;
        check_policy(parsed.policy().or_else(malformed)?)?;

        if header.architecture.get() != ARCH_SKINIT {
            return field(Field::Architecture);
        }
        if dl.dce_base.get() != slb.start() {
            return field(Field::DceBase);
        }
        if dl.dlme_base != cordon.mle_region.base {
            return field(Field::DlmeBase);
        }
        if log.format.get() != LOG_FORMAT_TPM2 {
            return field(Field::LogFormat);
        }
        if cordon.version.get() != MLE_VERSION {
            return field(Field::Version);
        }
        if cordon.flags.get() & !(FLAG_LOCALITY0_ALLOWED | FLAG_RESUME) != 0 {
            return field(Field::Flags);
        }

        let region_fault = |place: Place| fail(SlbError::Region, place as u16);
        let log_fault = |place: Place| fail(SlbError::Log, place as u16);
        let Some(region) = range(&cordon.mle_region) else { return region_fault(Place::Wraps) };
        if !region.start().is_multiple_of(MLE_REGION_ALIGN) || !region.len().is_multiple_of(MLE_REGION_ALIGN)
        {
            return region_fault(Place::Alignment);
        }
        if !(MLE_REGION_MIN..=MLE_REGION_MAX).contains(&region.len()) {
            return region_fault(Place::Size);
        }
        let dma_start = region.last().wrapping_sub(DMA_AREA_SIZE).wrapping_add(1);
        let Some(dma_area) = PhysRange::from_last(dma_start, region.last()) else {
            return region_fault(Place::Size);
        };
        let image = match PhysRange::new(region.start(), dl.dlme_size.get()) {
            Some(image) if image.last() < dma_start => image,
            _ => return region_fault(Place::Image),
        };
        let Some(log) = PhysRange::new(log.addr.get(), log.size.get().into()) else {
            return log_fault(Place::Wraps);
        };
        if log.len() < LOG_MIN {
            return log_fault(Place::Size);
        }
        let blobs = [&cordon.kernel, &cordon.initrd, &cordon.cmdline, &cordon.config, &cordon.efi_memory_map];
        for (what, fault) in [(&region, SlbError::Region), (&log, SlbError::Log)] {
            let place = if !space.is_ram(what) {
                Place::NotRam
            } else if what.overlaps(slb) {
                Place::Slb
            } else if what.overlaps(&slrt) {
                Place::Slrt
            } else if blobs.iter().any(|blob| touches(blob, what)) {
                Place::Blob
            } else {
                continue;
            };
            return fail(fault, place as u16);
        }
        if log.overlaps(&region) {
            return log_fault(Place::Region);
        }
        let Some(map) = range(&cordon.efi_memory_map) else {
            return fail(SlbError::MemoryMap, Place::Wraps as u16);
        };
        Ok(Self {
            slrt,
            slrt_size: header.size.get(),
            region,
            image,
            dma_area,
            entry: dl.dlme_entry.get(),
            log,
            memory_map: MemoryMap { range: map, descriptor_size: cordon.efi_descriptor_size.get() },
            rsdp: cordon.acpi_rsdp.get(),
            locality0_allowed: cordon.flags.get() & FLAG_LOCALITY0_ALLOWED != 0,
        })
    }

    /// Checks our copy of the MLE image's header; gives the entry point's address.
    pub fn entry_point(&self, header: &MleHeader) -> Result<u64, Failure> {
        let field = |field: Field| fail(SlbError::MleHeader, field as u16);
        if header.magic != hv::launch::MLE_MAGIC {
            return field(Field::Magic);
        }
        if header.version.get() != MLE_VERSION {
            return field(Field::Version);
        }
        if header.image_size.get() != self.image.len() {
            return field(Field::ImageSize);
        }
        if header.region_size.get() > self.region.len() {
            return field(Field::RegionSize);
        }
        let entry = u64::from(header.entry.get());
        let address = self.image.start().saturating_add(entry);
        if entry != self.entry || entry < size_of::<MleHeader>() as u64 || !self.image.contains_addr(address)
        {
            return field(Field::Entry);
        }
        Ok(address)
    }
}

fn range(blob: &Blob) -> Option<PhysRange> {
    PhysRange::new(blob.base.get(), blob.size.get())
}

/// Whether `blob` shares a byte with `range`; one that wraps touches everything.
fn touches(blob: &Blob, with: &PhysRange) -> bool {
    blob.size.get() != 0 && range(blob).is_none_or(|blob| blob.overlaps(with))
}

fn malformed<T>(error: SlrtError) -> Result<T, Failure> {
    let detail = match error {
        SlrtError::Header { value, .. } => value,
        SlrtError::EntrySize { tag, .. } | SlrtError::Missing(tag) | SlrtError::Twice(tag) => tag,
        SlrtError::Truncated { .. } | SlrtError::NoEnd | SlrtError::Full => 0,
    };
    fail(SlbError::SlrtFormat, detail)
}

/// The policy must be [`hv::launch::POLICY`]: what is measured by it is then known beforehand.
fn check_policy(policy: &[PolicyEntry]) -> Result<(), Failure> {
    match policy_difference(policy) {
        None => Ok(()),
        Some(index) => fail(SlbError::Policy, index as u64),
    }
}

#[cfg(test)]
mod tests;
