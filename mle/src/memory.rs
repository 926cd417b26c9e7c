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
use crate::guest::pci::Guarded;
use crate::guest::windows::{self, UNIT_BASE, Window, Windows};
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

/// Gives `take` the bytes of `range` by pieces, each copied once. False if one is not memory.
pub fn read_pieces(mem: &impl PhysMem, range: &PhysRange, take: &mut dyn FnMut(&[u8])) -> bool {
    let mut piece = [0; 4096];
    let mut at = range.start();
    while at <= range.last() {
        let left = range.last().saturating_sub(at).saturating_add(1);
        let now = usize::try_from(left).unwrap_or(usize::MAX).min(piece.len());
        let piece = piece.get_mut(..now).unwrap_or_default();
        if !mem.read(at, piece) {
            return false;
        }
        take(piece);
        at = at.saturating_add(now as u64);
    }
    true
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

/// Puts pages of the guest's in place of firmware's, which it does not have: pairs of the address and of the page to be found there.
pub fn map_copies(
    mut pages: impl Iterator<Item = (u64, u64)>,
    nested: &Tables,
    pool: &mut PagePool,
) -> Result<(), MemoryError> {
    pages.try_for_each(|(at, copy)| {
        let page = PhysRange::new(at, PAGE_SIZE).ok_or(MemoryError::OutOfMemory)?;
        Ok(nested.map(pool, page, copy, Rights::READ | Rights::WRITE, MemoryType::Coherent)?)
    })
}

/// The guest's pages of registers in the nested tables that all CPUs share, closed there; each CPU has its own view.
pub struct RegisterPages {
    root: u64,
    levels: u32,
    /// The entry that leads to the APIC, with the rights the address space gives the guest.
    apic: u64,
    unit_shown: bool,
}

impl RegisterPages {
    /// The APIC's page.
    pub const APIC: PhysRange = match PhysRange::new(XAPIC_BASE, PAGE_SIZE) {
        Some(range) => range,
        None => unreachable!(),
    };

    /// Takes them out of `nested`, the tables of all CPUs, which must not change any more; the shown unit's where one is.
    pub fn take(
        space: &AddressSpace,
        nested: &Tables,
        pool: &mut PagePool,
        unit_shown: bool,
    ) -> Result<Self, MemoryError> {
        nested.unmap(pool, if unit_shown { windows::RANGE } else { Self::APIC })?;
        space.map_part(View::Guest, Self::APIC, nested, pool)?;
        let (entry, _) =
            pool.leaf(nested.root(), nested.levels(), XAPIC_BASE).ok_or(MemoryError::OutOfMemory)?;
        let apic = entry.load(Ordering::Relaxed);
        nested.unmap(pool, Self::APIC)?;
        Ok(Self { root: nested.root(), levels: nested.levels(), apic, unit_shown })
    }

    /// Nested tables of one CPU, and its view of the pages.
    pub fn windows(&self, pool: &mut PagePool) -> Result<(u64, Windows), MemoryError> {
        let none = MemoryError::OutOfMemory;
        let (root, table) = pool.own_path(self.root, self.levels, XAPIC_BASE).ok_or(none)?;
        let mut window = |at: u64, device: u64| {
            let entry = table.get(usize::try_from(at >> 12 & 511).ok()?)?;
            let page = pool.words()?;
            let shadow = (self.apic & !XAPIC_BASE) | page.as_ptr() as u64;
            Some(Window::new(entry, device, shadow, page))
        };
        let apic = window(XAPIC_BASE, self.apic).ok_or(none)?;
        let unit = match self.unit_shown {
            true => Some(window(UNIT_BASE, 0).ok_or(none)?),
            false => None,
        };
        Ok((root, Windows::new(apic, unit)))
    }
}
