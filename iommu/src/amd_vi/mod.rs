//! AMD-Vi: from an IOMMU in whatever state the gap left it to one that lets no device through, and on to the guest's
//! own memory.
//!
//! [`deny_all`] is the SLB stage's; [`AmdVi::take_over`] and what follows is the MLE's. The reasons for the order of
//! steps, and what remains unproven, are in `docs/adr/0001-closing-the-dma-window.md`.

mod area;
mod defs;
mod error;
mod event;
mod unit;

pub use crate::area::DmaArea;
pub use error::Error;

use core::ops::Range;

use hv::addr::PhysRange;
use hv::io::Mmio;

use crate::Platform;
use crate::fault::{Drained, Fault};
use crate::ivrs::Ivrs;
use crate::pci::{self, Function};
use defs::{DEVICES, DTE_SIZE, Dte, capability, dte};
use unit::Unit;

/// IOMMUs that can be handled: a machine with more is refused.
pub const MAX_UNITS: usize = 16;
/// Rounds of invalidation before the first table is trusted: a device that still holds a cached translation must
/// spoil every one of them, unseen (ADR 0001).
const ROUNDS: u32 = 16;
/// Events that one look takes out of the log of one IOMMU: what a device can cost a CPU at once.
const DRAIN_MAX: u32 = 64;
/// Entries of the device table that are written or compared at once.
const BLOCK: usize = 16;
/// Entries of one part of a comparison; whole blocks.
const PART_DEVICES: u32 = 2048;
const BLOCK_SIZE: usize = BLOCK * DTE_SIZE as usize;

/// All IOMMUs of the machine, set up by this crate.
pub struct AmdVi<W> {
    units: [Option<Unit<W>>; MAX_UNITS],
    area: DmaArea,
    /// What the device table holds for each device but the IOMMUs themselves.
    entry: Dte,
}

/// The memory that guest devices may reach: a page table in AMD-Vi format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Root {
    /// Physical address of the top table, page aligned, below 2^52.
    pub table: u64,
    /// Levels, 1 to 6.
    pub levels: u8,
}

/// What becomes of interrupts (writes to FEExxxxxh) that devices of the guest send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interrupts {
    /// Fixed and lowest-priority interrupts pass as they are; SMI, NMI, INIT and ExtINT are blocked.
    Ordinary,
    /// All pass: for IOMMUs that can't handle interrupts. An exposure: a device may send INIT, NMI or SMI.
    Unchecked,
}

impl Interrupts {
    /// The strictest choice that works. QEMU's `amd-iommu` with `intremap=off` blocks every interrupt of a device
    /// whose entry has valid interrupt fields, and lists no I/O APIC; hardware lists one.
    pub fn for_machine(ivrs: &Ivrs<'_>) -> Self {
        if ivrs.lists_io_apic() { Self::Ordinary } else { Self::Unchecked }
    }
}

/// Blocks all DMA and all interrupts of all devices, whatever the gap left in the IOMMUs.
///
/// `ivrs` is a private copy of the table, `area` memory that nothing else uses, `keep_clear` what no IOMMU's register
/// window may cover (the SLB, the MLE region). On `Ok` the device table at the start of `area` is in force in every
/// IOMMU and says no to every device; nothing outside the SLB may be trusted before.
///
/// # Errors
/// [`Error`]: some IOMMU is not known to block, so the launch must end.
pub fn deny_all<P: Platform>(
    platform: &P,
    ivrs: &[u8],
    area: DmaArea,
    keep_clear: &[PhysRange],
) -> Result<AmdVi<P::Window>, Error> {
    let nowhere = area::nowhere(platform.random());
    let ivrs = Ivrs::new(ivrs)?;
    let all = AmdVi::discover(platform, &ivrs, area, keep_clear, Some(nowhere))?;
    all.point_nowhere(platform, nowhere)?;
    all.forget(platform, nowhere)?;
    all.write_deny_table(platform)?;
    all.switch_to_table(platform)?;
    all.verify(platform)?;
    Ok(all)
}

impl<W: Mmio> AmdVi<W> {
    /// The IOMMUs as [`deny_all`] left them: found anew, and every register and table entry compared. `count` is the
    /// number that the SLB stage reported; the other arguments are those of [`deny_all`].
    ///
    /// # Errors
    /// [`Error`] when anything is not as it was left.
    pub fn take_over<P: Platform<Window = W>>(
        platform: &P,
        ivrs: &[u8],
        area: DmaArea,
        keep_clear: &[PhysRange],
        count: u64,
    ) -> Result<Self, Error> {
        let all = Self::discover(platform, &Ivrs::new(ivrs)?, area, keep_clear, None)?;
        if all.count() as u64 != count {
            return Err(Error::Count { found: all.count() as u64, wanted: count });
        }
        all.verify(platform)?;
        Ok(all)
    }

    /// IOMMUs handled.
    pub fn count(&self) -> usize {
        self.units().count()
    }

    /// Register windows of all IOMMUs: the guest must not reach them.
    pub fn windows(&self) -> impl Iterator<Item = PhysRange> + '_ {
        self.units().filter_map(Unit::window_range)
    }

    /// Device ids of the IOMMUs: the guest must not reach their configuration space.
    pub fn devices(&self) -> impl Iterator<Item = u16> + '_ {
        self.units().map(|unit| unit.device)
    }

    /// Gives all devices but the IOMMUs themselves the memory that `root` maps.
    ///
    /// # Errors
    /// [`Error`]; DMA may then be open for some devices and blocked for others, but never reaches beyond `root`.
    pub fn open_guest<P: Platform<Window = W>>(
        &mut self,
        platform: &P,
        root: Root,
        interrupts: Interrupts,
    ) -> Result<(), Error> {
        const GUEST_DOMAIN: u64 = 1;
        let levels = self.units().map(Unit::levels).min().unwrap_or(0);
        if root.table & !0x000f_ffff_ffff_f000 != 0 || root.levels == 0 || root.levels > levels {
            return Err(Error::Root { root, levels });
        }
        let rights = dte::VALID | dte::TRANSLATION_VALID | dte::READ | dte::WRITE;
        let interrupts = match interrupts {
            Interrupts::Ordinary => dte::INTERRUPT_VALID | dte::INTERRUPT_PASS,
            Interrupts::Unchecked => 0,
        };
        self.install(
            platform,
            [rights | u64::from(root.levels) << 9 | root.table, GUEST_DOMAIN, interrupts, 0],
        )
    }

    /// Blocks all devices again, at the end of the launch.
    ///
    /// # Errors
    /// [`Error`]: some device may still have access.
    pub fn close<P: Platform<Window = W>>(&mut self, platform: &P) -> Result<(), Error> {
        self.install(platform, dte::DENY)
    }

    /// Drops all cached translations: after a change of the guest's page table.
    ///
    /// # Errors
    /// [`Error`]: the old translations may still be in use.
    pub fn flush<P: Platform<Window = W>>(&self, platform: &P) -> Result<(), Error> {
        for (index, unit) in self.units().enumerate() {
            unit.flush(platform, || self.area.command_page(index))?;
        }
        Ok(())
    }

    /// Compares registers and device table with what was left there, e.g. after an SMI.
    ///
    /// # Errors
    /// [`Error`] names the first difference.
    pub fn verify<P: Platform<Window = W>>(&self, platform: &P) -> Result<(), Error> {
        self.verify_registers()?;
        self.each_block(platform, 0..DEVICES, compare)
    }

    /// Compares [`PART_DEVICES`] entries of the device table from the `from`th on. Gives where the next part begins, or `None` when
    /// there is none.
    ///
    /// # Errors
    /// [`Error`] names the first difference.
    pub fn verify_part<P: Platform<Window = W>>(
        &self,
        from: u32,
        platform: &P,
    ) -> Result<Option<u32>, Error> {
        let next = from.saturating_add(PART_DEVICES).min(DEVICES);
        self.each_block(platform, from..next, compare)?;
        Ok((next < DEVICES).then_some(next))
    }

    /// Compares the registers only: a few reads for each IOMMU.
    ///
    /// # Errors
    /// [`Error::Register`] names the first difference.
    pub fn verify_registers(&self) -> Result<(), Error> {
        for (index, unit) in self.units().enumerate() {
            unit.verify(self.area.table_register())?;
            unit.verify_event_log(self.area.event_page(index))?;
        }
        Ok(())
    }

    /// Takes what was stopped out of the IOMMUs' logs, at most 64 faults of each; three register reads for an IOMMU
    /// that stopped nothing. A log that ran over is started again. Which faults to tell is the caller's choice.
    ///
    /// # Errors
    /// [`Error`] when a log is not readable or an IOMMU does not restart it.
    pub fn drain<P: Platform<Window = W>>(
        &self,
        platform: &P,
        mut sink: impl FnMut(Fault),
    ) -> Result<Drained, Error> {
        let mut total = Drained::default();
        for (index, unit) in self.units().enumerate() {
            total.add(unit.drain(platform, self.area.event_page(index), DRAIN_MAX, &mut sink)?);
        }
        Ok(total)
    }

    fn units(&self) -> impl Iterator<Item = &Unit<W>> {
        self.units.iter().flatten()
    }

    /// Finds the IOMMUs in PCI configuration space and in the IVRS, and insists that both name the same. With an
    /// address given, also insists that no PCI function decodes it.
    fn discover<P: Platform<Window = W>>(
        platform: &P,
        ivrs: &Ivrs<'_>,
        area: DmaArea,
        keep_clear: &[PhysRange],
        nowhere: Option<u64>,
    ) -> Result<Self, Error> {
        if let Some(unit) = ivrs.units().find(|unit| unit.segment() != 0) {
            return Err(Error::Segment { device: unit.device(), segment: unit.segment() });
        }
        let mut all = Self { units: [const { None }; MAX_UNITS], area, entry: dte::DENY };
        for function in pci::functions(platform) {
            if let Some(register) = nowhere.and_then(|address| function.claims(address)) {
                return Err(Error::Claimed { device: function.id, register });
            }
            let Some(offset) = function.capability(capability::is_iommu) else {
                if function.class() == capability::CLASS {
                    return Err(Error::NoCapability { device: function.id });
                }
                continue;
            };
            let device = function.id;
            let listed = ivrs.units().find(|unit| unit.device() == device);
            let base = listed.ok_or(Error::Unlisted { device })?.base();
            check_base(&function, offset, base)?;
            let header = function.read(offset);
            let unit = Unit::map(platform, device, base, header)?;
            let window = unit.window_range().ok_or(Error::Base { device, base })?;
            let clash = |range: PhysRange| range.overlaps(&window);
            if clash(area.range()) || keep_clear.iter().copied().any(clash) || all.windows().any(clash) {
                return Err(Error::Base { device, base });
            }
            let slot = all.units.iter_mut().find(|slot| slot.is_none()).ok_or(Error::TooMany)?;
            *slot = Some(unit);
        }
        let mut listed = ivrs.units().map(|unit| unit.device());
        if let Some(device) = listed.find(|device| !all.devices().any(|found| found == *device)) {
            return Err(Error::Absent { device });
        }
        if all.count() == 0 {
            return Err(Error::None);
        }
        Ok(all)
    }

    /// Step 1: no IOMMU can read a device table any more, so none lets a request through but what it has cached.
    fn point_nowhere<P: Platform<Window = W>>(&self, platform: &P, nowhere: u64) -> Result<(), Error> {
        self.units().try_for_each(|unit| unit.point_nowhere(platform, nowhere))
    }

    /// Step 2: nothing is cached any more. All units in each round: while one of them still has cached rights, its
    /// devices can attack the command buffers of all.
    fn forget<P: Platform<Window = W>>(&self, platform: &P, nowhere: u64) -> Result<(), Error> {
        for _ in 0..ROUNDS {
            for unit in self.units() {
                unit.verify(nowhere)?;
                unit.flush(platform, || self.area.any_page(platform.random()))?;
                unit.verify(nowhere)?;
            }
        }
        Ok(())
    }

    /// Step 3: a table that says no, written and read back while no device can reach it.
    fn write_deny_table<P: Platform<Window = W>>(&self, platform: &P) -> Result<(), Error> {
        self.each_block(platform, 0..DEVICES, |platform, at, block| {
            if platform.write(at, block) { Ok(()) } else { Err(Error::Memory { address: at }) }
        })?;
        self.each_block(platform, 0..DEVICES, compare)
    }

    /// Step 4: that table in force, and the event log on.
    fn switch_to_table<P: Platform<Window = W>>(&self, platform: &P) -> Result<(), Error> {
        for (index, unit) in self.units().enumerate() {
            unit.switch(platform, self.area.table_register(), self.area.event_page(index))?;
        }
        self.flush(platform)
    }

    /// Calls `visit` with the address and the wanted bytes of each block of the device table.
    #[inline(never)] // the SLB has no room for one copy a caller
    fn each_block<P: Platform<Window = W>>(
        &self,
        platform: &P,
        devices: Range<u32>,
        visit: fn(&P, u64, &[u8]) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let mut bytes = [0; BLOCK_SIZE];
        let mut stale = true;
        for first in devices.step_by(BLOCK) {
            // Which entry is an IOMMU's is asked only where some IOMMU's is: most of two megabytes is the same again.
            let special = self.devices().any(|own| u32::from(own).wrapping_sub(first) < BLOCK as u32);
            if special || stale {
                let devices = first..=u32::MAX;
                for (device, out) in devices.zip(bytes.as_chunks_mut().0) {
                    *out = dte_bytes(self.entry_of(device as u16));
                }
            }
            stale = special;
            visit(platform, self.area.entry(first), &bytes)?;
        }
        Ok(())
    }

    fn entry_of(&self, device: u16) -> Dte {
        // An IOMMU has no business of its own in memory that a device table rules.
        if self.devices().any(|own| own == device) { dte::DENY } else { self.entry }
    }

    /// Replaces the table's entries, which are in use, one by one. Whatever moment an IOMMU reads one at, it finds
    /// the old rights, none, or the new ones: the byte with the rights goes first and comes back last.
    fn install<P: Platform<Window = W>>(&mut self, platform: &P, entry: Dte) -> Result<(), Error> {
        const RIGHTS: usize = 7;
        self.entry = entry;
        for device in 0..DEVICES {
            let address = self.area.entry(device);
            let rights = address.wrapping_add(RIGHTS as u64);
            let mut bytes = dte_bytes(self.entry_of(device as u16));
            let last = core::mem::take(&mut bytes[RIGHTS]);
            let written = platform.write(rights, &[0])
                && platform.write(address, &bytes)
                && platform.write(rights, &[last]);
            if !written {
                return Err(Error::Memory { address });
            }
        }
        self.flush(platform)?;
        self.verify(platform)
    }
}

/// Compares the capability's register base with the IVRS's, which is the gap's word alone.
fn check_base<P: Platform>(function: &Function<'_, P>, offset: u8, base: u64) -> Result<(), Error> {
    const ENABLED: u32 = 1;
    let low_register = offset.wrapping_add(capability::BASE_LOW);
    let high_register = offset.wrapping_add(capability::BASE_HIGH);
    if function.read(low_register) & ENABLED == 0 {
        // Never enabled since reset: the base is ours to set, and locked from then on.
        function.write(high_register, (base >> 32) as u32);
        function.write(low_register, base as u32 | ENABLED);
    }
    let low = function.read(low_register);
    let address = low & !0x3fff;
    // QEMU's capability can't be enabled and, before 7.2.17, names no base: the completion wait is the proof then.
    if low & ENABLED == 0 && address == 0 {
        return Ok(());
    }
    let capability = u64::from(function.read(high_register)) << 32 | u64::from(address);
    if capability == base {
        Ok(())
    } else {
        Err(Error::BaseDiffers { device: function.id, table: base, capability })
    }
}

fn compare<P: Platform>(platform: &P, at: u64, wanted: &[u8]) -> Result<(), Error> {
    let mut found = [0; BLOCK_SIZE];
    let found = found.get_mut(..wanted.len()).ok_or(Error::Memory { address: at })?;
    if !platform.read(at, found) {
        return Err(Error::Memory { address: at });
    }
    // By words: the whole table is two megabytes.
    if words(found).eq(words(wanted)) { Ok(()) } else { Err(Error::Tampered { address: at }) }
}

fn words(bytes: &[u8]) -> impl Iterator<Item = u64> {
    bytes.as_chunks().0.iter().map(|word| u64::from_ne_bytes(*word))
}

fn dte_bytes(entry: Dte) -> [u8; DTE_SIZE as usize] {
    let mut bytes = [0; DTE_SIZE as usize];
    for (out, quad) in bytes.as_chunks_mut().0.iter_mut().zip(entry) {
        *out = quad.to_le_bytes();
    }
    bytes
}

#[cfg(test)]
mod qemu_tests;
#[cfg(test)]
mod tests;
