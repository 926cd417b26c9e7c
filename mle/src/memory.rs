//! Who may reach which memory, and each CPU's own view of its APIC page.

use core::fmt;
use core::sync::atomic::Ordering;

use firmware::memmap::{self, MemoryMap};
use hv::addr::{PAGE_SIZE, PhysRange};
use hv::io::PhysMem;
use hv::radix::{self, MemoryType, Rights, Tables};
use hv::space::{self, AddressSpace, Hole, Kind, View};

use crate::acpi::Ecam;
use crate::apic::XAPIC_BASE;
use crate::boot::Layout;
use crate::devices::Claim;
use crate::guest::apic_window::ApicWindow;
use crate::guest::pci::Guarded;
use crate::inputs::{Inputs, TXT_REGISTERS};
use crate::measure::TPM_CLOSED;
use crate::pool::PagePool;

/// Copies to `to` from as many bytes at `from`, by pieces.
///
/// # Errors
/// The piece that is not memory.
pub fn copy(mem: &impl PhysMem, from: u64, to: &PhysRange) -> Result<(), PhysRange> {
    let mut piece = [0; 4096];
    let mut done = 0;
    while done < to.len() {
        let now = usize::try_from(to.len().saturating_sub(done)).unwrap_or(usize::MAX).min(piece.len());
        let part = piece.get_mut(..now).unwrap_or_default();
        let (source, target) = (from.saturating_add(done), to.start().saturating_add(done));
        if !mem.read(source, part) {
            return Err(PhysRange::new(source, now as u64).unwrap_or(*to));
        }
        if !mem.write(target, part) {
            return Err(PhysRange::new(target, now as u64).unwrap_or(*to));
        }
        done = done.saturating_add(now as u64);
    }
    Ok(())
}

/// Why tables could not be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemoryError {
    /// The builder's error.
    Tables(radix::Error),
    /// The MLE region has no page left.
    OutOfMemory,
}

impl fmt::Display for MemoryError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tables(e) => write!(f, "{e}"),
            Self::OutOfMemory => f.write_str("the MLE region has no room left for nested tables"),
        }
    }
}

impl From<radix::Error> for MemoryError {
    fn from(e: radix::Error) -> Self {
        Self::Tables(e)
    }
}

/// Who may reach what: the one description from which guest, sandbox and device tables are made (I1). `iommus` are
/// register windows, `ecam` is PCI configuration space, which stays the guest's alone; so do runtime regions that devices claim.
pub fn describe(
    inputs: &Inputs,
    map: &MemoryMap,
    claims: &[Claim],
    layout: &Layout,
    iommus: impl Iterator<Item = PhysRange>,
    ecam: &[Ecam],
    phys_bits: u32,
) -> Result<AddressSpace, space::Error> {
    let mut space = AddressSpace::new(phys_bits, inputs.region, inputs.slb)?;
    space.assign(inputs.launch_page, Kind::Closed(Hole::LaunchPage))?;
    if let Some(txt) = &inputs.txt {
        for range in [txt.heap, txt.sinit, txt.page_tables, TXT_REGISTERS] {
            space.assign(range.page_outward(), Kind::Closed(Hole::Txt))?;
        }
    }
    space.assign(TPM_CLOSED, Kind::Closed(Hole::TpmLocality))?;
    for window in iommus {
        space.assign(window, Kind::Closed(Hole::IommuRegisters))?;
    }
    let guests = |range: &PhysRange| {
        ecam.iter().any(|e| e.range.overlaps(range))
            || claims.iter().any(|c| !c.allowed && c.region == *range)
    };
    for region in map.runtime().filter(|r| !guests(&r.range)) {
        let kind = match region.ty {
            // The firmware's drivers mix code and data in these pages.
            memmap::MemoryType::RUNTIME_SERVICES_CODE => Kind::FirmwareImage,
            memmap::MemoryType::MMIO => Kind::FirmwareMmio,
            _ => Kind::FirmwareData,
        };
        space.assign(region.range, kind)?;
    }
    for range in [Some(layout.sandbox), layout.staging].into_iter().flatten() {
        space.assign(range, Kind::CallBuffer)?;
    }
    if let Some(block) = &inputs.relaunch {
        space.assign(block.whole, Kind::Closed(Hole::Mle))?;
    }
    for range in layout.map.ram() {
        space.assign(range, Kind::Ram)?;
    }
    Ok(space)
}

/// Puts the pages of `copies` in place of the guarded functions' in the guest's configuration space in memory.
pub fn replace_config_space(
    ecam: &[Ecam],
    guarded: &[Guarded],
    copies: PhysRange,
    nested: &Tables,
    pool: &mut PagePool,
) -> Result<(), MemoryError> {
    let ours = ecam.iter().filter(|e| e.segment == 0);
    for (function, copy) in guarded.iter().zip((copies.start()..).step_by(PAGE_SIZE as usize)) {
        for page in ours.clone().filter_map(|e| e.page(function.id)) {
            nested.unmap(pool, page)?;
            nested.map(pool, page, copy, Rights::READ | Rights::WRITE, MemoryType::Device)?;
        }
    }
    Ok(())
}

/// The guest's APIC page in the nested tables that all CPUs share, closed there; each CPU has its own view.
pub struct ApicPage {
    root: u64,
    levels: u32,
    /// The entry that leads to the device, with the rights the address space gives the guest.
    device: u64,
}

impl ApicPage {
    /// The page.
    pub const RANGE: PhysRange = match PhysRange::new(XAPIC_BASE, PAGE_SIZE) {
        Some(range) => range,
        None => unreachable!(),
    };

    /// Takes the page out of `nested`, the tables of all CPUs, which must not change any more.
    pub fn take(space: &AddressSpace, nested: &Tables, pool: &mut PagePool) -> Result<Self, MemoryError> {
        nested.unmap(pool, Self::RANGE)?;
        space.map_part(View::Guest, Self::RANGE, nested, pool)?;
        let (_, entry) =
            pool.own_path(nested.root(), nested.levels(), XAPIC_BASE).ok_or(MemoryError::OutOfMemory)?;
        let device = entry.load(Ordering::Relaxed);
        nested.unmap(pool, Self::RANGE)?;
        Ok(Self { root: nested.root(), levels: nested.levels(), device })
    }

    /// Nested tables of one CPU, and its view of the page.
    pub fn window(&self, pool: &mut PagePool) -> Result<(u64, ApicWindow), MemoryError> {
        let none = MemoryError::OutOfMemory;
        let Some((root, entry)) = pool.own_path(self.root, self.levels, XAPIC_BASE) else {
            return Err(none);
        };
        let Some(page) = pool.words() else { return Err(none) };
        let shadow = (self.device & !XAPIC_BASE) | page.as_ptr() as u64;
        Ok((root, ApicWindow::new(entry, self.device, shadow, page)))
    }
}
