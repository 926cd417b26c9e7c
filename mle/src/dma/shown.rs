//! The VT-d unit that the guest is shown, so that its own driver has devices send what can be checked (ADR 0012).

use firmware::exposure::{Decision, Kind, Meter, Record, Text};
use hv::addr::PhysRange;
use hv::failure::MleError;
use hv::radix::Rights;
use hv::space::{AddressSpace, View};
use iommu::vt_d::shown::{GuestRam, Shown};
use spin::Mutex;

use super::{ALL_INTERRUPTS, DMA, Dma, Iommus};
use crate::metal::TscClock;
use crate::{exposure, fatal};

/// The unit, and what came of it.
pub struct Unit {
    registers: Shown,
    /// Where the guest's devices may read and write.
    space: AddressSpace,
    refused: Meter,
    /// Devices' interrupts are checked from now on.
    enabled: bool,
}

/// Shows it to the guest.
pub fn begin(space: AddressSpace) {
    if let Some(dma) = DMA.get() {
        let unit = Unit { registers: Shown::default(), space, refused: Meter::new(), enabled: false };
        dma.lock().shown = Some(unit);
    }
}

/// The 64 bits that hold the register at `offset`.
pub fn read(offset: u32) -> u64 {
    let dma = DMA.get().map(Mutex::lock);
    dma.as_ref().and_then(|dma| dma.shown.as_ref()).map_or(0, |unit| unit.registers.read(offset))
}

/// The guest wrote to the register at `offset`, and `word` is what the 64 bits that hold it have become. What was refused is
/// counted and on record, and so is that compatibility format is blocked.
pub fn write((offset, word): (u32, u64), id: u32, clock: &TscClock) {
    let Some(mut dma) = DMA.get().map(Mutex::lock) else { return };
    let Dma { iommus: Iommus::VtD(all), machine, shown: Some(unit), .. } = &mut *dma else { return };
    let Unit { registers, space, refused, enabled } = unit;
    let reaches = |at: u64, length: u64| {
        PhysRange::new(at, length)
            .is_some_and(|range| space.permits(View::Device, range, Rights::READ | Rights::WRITE))
    };
    let ram = GuestRam { mem: &machine.mem, reaches: &reaches };
    let outcome = match registers.write((offset, word), all, machine, &ram) {
        Ok(outcome) => outcome,
        Err(error) => fatal::stop(MleError::Interrupts, 0, format_args!("interrupts of devices: {error}")),
    };
    let now = exposure::now_us(clock);
    let record = |kind, decision, text| {
        exposure::record(&Record { text: Some(text), decision, ..Record::new(kind, id, now) });
    };
    if outcome.enabled && !core::mem::replace(enabled, true) {
        record(Kind::CLOSED, Decision::NONE, Text::new(ALL_INTERRUPTS));
    }
    if let Some((index, why)) = outcome.first
        && let Some(untold) = refused.admit(now)
    {
        let more = untold.saturating_add(outcome.refused.saturating_sub(1).into());
        let text = match more {
            0 => Text::new(format_args!("IRTE {index}: {why}")),
            more => Text::new(format_args!("IRTE {index}, {more} more: {why}")),
        };
        record(Kind::REFUSED, Decision::DENIED, text);
    }
}
