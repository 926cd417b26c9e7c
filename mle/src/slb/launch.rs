//! The launch, step by step.

use hv::addr::PhysRange;
use hv::failure::SlbError;
use hv::io::{Clock, Mmio, PhysMem};
use hv::launch::{HANDOFF_MAGIC, Handoff, MleHeader, PCR_CODE, PCR_CONFIG, POLICY};
use hv::slrt::MAX_SIZE;
use iommu::Platform;
use iommu::acpi::{self, copy_table};
use iommu::amd_vi::{DmaArea, deny_all};
use tpm::{Contention, HashAlg, Locality, Sha256, Tpm};
use zerocopy::{FromZeros, IntoBytes};

use super::memmap::Use;
use super::request::{Place, Request, slrt_range};
use super::space::Space;
use super::{Failure, fail};

/// Longest IVRS accepted: an IOMMU takes some 100 bytes. What is left of a page beside the image's other static data.
pub const IVRS_MAX: usize = 4000;
/// Memory is measured by pieces of this size.
const PIECE: usize = 512;

/// The SLB as SKINIT left it.
#[derive(Clone, Copy)]
pub struct Slb<'a> {
    /// All 64 KiB.
    pub range: PhysRange,
    /// The bytes that SKINIT measured.
    pub measured: &'a [u8],
    /// What the loader wrote at [`hv::launch::SLB_SLRT_POINTER_OFFSET`].
    pub slrt_pointer: u64,
}

/// A launch that is complete but for the jump.
#[derive(Clone, Copy, Debug)]
pub struct Launch {
    /// For the MLE.
    pub handoff: Handoff,
    /// Address of the MLE's entry point.
    pub entry: u64,
    /// The measured MLE image.
    pub image: PhysRange,
}

/// The large buffers of a launch: kept out of the functions' frames, where they would make every access to a local
/// variable three bytes longer.
pub struct Buffers<'a> {
    /// For the SLRT.
    pub slrt: &'a mut [u8; MAX_SIZE],
    /// For the IVRS.
    pub ivrs: &'a mut [u8; IVRS_MAX],
}

/// Blocks DMA, measures the MLE and the policy, and tells where to jump. `machine` reads and writes RAM as `space`
/// has it, and nothing of the SLB.
///
/// What is read before DMA is blocked serves to block it (SLRT: where the tables go; ACPI: where the IOMMUs are)
/// and is copied once. A device may change the originals up to that moment and gains nothing: the copies are what
/// counts. The SLRT must still be the same afterwards, because the MLE takes a copy of its own.
#[inline(never)]
pub fn launch<P: Platform, C: Clock + Copy>(
    machine: &P,
    clock: C,
    space: &Space,
    slb: &Slb<'_>,
    tsc_khz: u64,
    buffers: Buffers<'_>,
) -> Result<Launch, Failure> {
    let slrt = slrt_range(slb.slrt_pointer, &slb.range, space)?;
    let Buffers { slrt: table, ivrs } = buffers;
    read(machine, slrt.start(), table)?;
    let request = Request::check(table, slrt, &slb.range, space)?;
    let iommu_count = block_dma(machine, slb, &request, ivrs)?;
    unchanged(machine, table, slrt)?;
    for (range, purpose, place) in
        [(&request.region, Use::Mle, Place::RegionUnlisted), (&request.log, Use::Data, Place::LogUnlisted)]
    {
        if !request.memory_map.lists(machine, range, purpose) {
            return fail(SlbError::MemoryMap, place as u16);
        }
    }
    let mut header = MleHeader::new_zeroed();
    read(machine, request.image.start(), header.as_mut_bytes())?;
    let entry = request.entry_point(&header)?;

    let mut chip = Chip::open(machine, clock, request.locality0_allowed)?;
    chip.check_launch(slb.measured)?;
    let mle_sha256 = hash_image(machine, &header, &request.image)?;
    chip.measure(PCR_CODE, &mle_sha256)?;
    chip.measure(PCR_CONFIG, POLICY.as_bytes())?; // the one there can be: it was compared
    let degraded = chip.degraded;
    chip.tpm.release();

    let handoff = Handoff {
        magic: HANDOFF_MAGIC,
        slb_base: slb.range.start(),
        slrt_base: slrt.start(),
        slrt_size: request.slrt_size.into(),
        log_base: request.log.start(),
        log_size: request.log.len(),
        mle_sha256,
        region_base: request.region.start(),
        region_size: request.region.len(),
        tsc_khz,
        tpm_degraded: degraded.into(),
        iommu_count,
    };
    Ok(Launch { handoff, entry, image: request.image })
}

/// From here on no device reads or writes memory. Returns the number of IOMMUs.
fn block_dma<P: Platform>(
    machine: &P,
    slb: &Slb<'_>,
    request: &Request,
    table: &mut [u8; IVRS_MAX],
) -> Result<u64, Failure> {
    let length = copy_table(machine, request.rsdp, *b"IVRS", table).or_else(no_ivrs)?;
    let table = table.get(..length).unwrap_or_default();
    let Some(area) = DmaArea::at_top_of(&request.region) else {
        return fail(SlbError::Region, Place::Alignment as u16);
    };
    let units = deny_all(machine, table, area, &[slb.range, request.region])
        .or_else(|error| fail(SlbError::Dma, error.code()))?;
    Ok(units.count() as u64)
}

fn no_ivrs<T>(error: acpi::Error) -> Result<T, Failure> {
    let detail: u16 = match error {
        acpi::Error::Unreadable(_) => 1,
        acpi::Error::Signature(_) => 2,
        acpi::Error::Checksum(_) => 3,
        acpi::Error::Length { .. } => 4,
        acpi::Error::Missing(_) => 5,
        acpi::Error::Twice(..) => 6,
    };
    fail(SlbError::Ivrs, detail)
}

/// The SLRT in memory, where now nobody changes it, must be the one that we go by.
fn unchanged(mem: &impl PhysMem, table: &[u8; MAX_SIZE], slrt: PhysRange) -> Result<(), Failure> {
    let mut now = [0; PIECE];
    let (pieces, _) = table.as_chunks::<PIECE>();
    for (ours, offset) in pieces.iter().zip((0_u64..).step_by(PIECE)) {
        read(mem, slrt.start().saturating_add(offset), &mut now)?;
        if !now.iter().eq(ours) {
            return fail(SlbError::SlrtChanged, offset);
        }
    }
    Ok(())
}

fn read(mem: &impl PhysMem, address: u64, out: &mut [u8]) -> Result<(), Failure> {
    if mem.read(address, out) { Ok(()) } else { fail(SlbError::Unreadable, address >> 16) }
}

/// The header as we checked it, then the rest of the image: each byte read once (I2).
fn hash_image(mem: &impl PhysMem, header: &MleHeader, image: &PhysRange) -> Result<[u8; 32], Failure> {
    let mut hasher = Sha256::new(sha256::software);
    hasher.update(header.as_bytes());
    let mut piece = [0; PIECE];
    let mut at = image.start().saturating_add(size_of::<MleHeader>() as u64);
    while at <= image.last() {
        let left = image.last().saturating_sub(at).saturating_add(1);
        let piece = piece.get_mut(..(PIECE as u64).min(left) as usize).unwrap_or_default();
        read(mem, at, piece)?;
        hasher.update(piece);
        at = at.saturating_add(PIECE as u64);
    }
    Ok(hasher.finish())
}

/// The TPM, which hashes for us in all its banks.
struct Chip<W, C> {
    tpm: Tpm<W, C>,
    degraded: bool,
}

/// Opens the TPM; kept in one piece, because two copies of it are an eighth of the image.
#[inline(never)]
pub(super) fn take_tpm<W: Mmio, C: Clock>(
    window: W,
    clock: C,
    locality: Locality,
) -> Result<Tpm<W, C>, tpm::Error> {
    Tpm::attach(window, clock, locality, Contention::LAUNCH)
}

impl<W: Mmio, C: Clock + Copy> Chip<W, C> {
    fn open(machine: &impl Platform<Window = W>, clock: C, locality0_allowed: bool) -> Result<Self, Failure> {
        let open = |locality| {
            let window = machine.map(tpm::BASE, tpm::WINDOW_SIZE).ok_or(tpm::Error::Absent)?;
            take_tpm(window, clock, locality)
        };
        let (tpm, degraded) = match open(Locality::Two) {
            Err(tpm::Error::LocalityUnavailable { .. }) if locality0_allowed => (open(Locality::Zero), true),
            Err(tpm::Error::LocalityUnavailable { .. }) => return fail(SlbError::NoLocality2, 0_u16),
            other => (other, false),
        };
        let tpm = tpm.or_else(|error| fail(SlbError::Tpm, error.code()))?;
        Ok(Self { tpm, degraded })
    }

    /// PCR 17 must hold what SKINIT puts there for `measured`. It does not when we were called without SKINIT, or when
    /// other CPUs were not parked. A TPM without a SHA-256 bank is refused: we compute no other digest.
    ///
    /// Spec: \[TPM2.1\] "Dynamic Root of Trust Measurement": H(0 ‖ H(data)).
    fn check_launch(&mut self, measured: &[u8]) -> Result<(), Failure> {
        let sha256 = |parts: &[&[u8]]| Sha256::digest(sha256::software, parts);
        let wanted = sha256(&[&[0; 32], &sha256(&[measured])]);
        let found = self
            .tpm
            .read_pcr(HashAlg::SHA256, PCR_CODE)
            .or_else(|error| fail(SlbError::Tpm, error.code()))?;
        if found.is_some_and(|found| found.as_bytes() == wanted) {
            Ok(())
        } else {
            fail(SlbError::NotLaunched, HashAlg::SHA256.0)
        }
    }

    /// Extends `pcr`. With a TPM that has no locality 2 the refusal is put up with; the MLE logs it as not extended.
    fn measure(&mut self, pcr: u32, data: &[u8]) -> Result<(), Failure> {
        /// TPM_RC_LOCALITY.
        const RC_LOCALITY: u32 = 0x907;
        match self.tpm.event(pcr, data) {
            Ok(()) => Ok(()),
            Err(tpm::Error::Refused { rc: RC_LOCALITY, .. }) if self.degraded => Ok(()),
            Err(error) => fail(SlbError::Extend, error.code()),
        }
    }
}

#[cfg(test)]
mod tests;
