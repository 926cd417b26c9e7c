//! Memory that firmware wants devices to go on reaching: AMD's unity and exclusion ranges (IVMD), Intel's reserved
//! regions (RMRR). Whether it gets them is the caller's decision; that it asked is always told.

use hv::addr::PhysRange;
use hv::space::{AddressSpace, Error, Kind, Region};

/// A stretch of memory, and who wants it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reserved {
    /// The memory, as the table gives it.
    pub range: PhysRange,
    /// First device that wants it: PCI segment in bits 31:16, device id in 15:0. `None` when the table names it by a
    /// path that leads nowhere.
    pub first: Option<u32>,
    /// Last device, in the same form.
    pub last: Option<u32>,
    /// Whether firmware wants the devices' requests not to be translated at all. They are, in any case.
    pub untranslated: bool,
}

/// Opens `range` to DMA by all of the guest's devices: they share one table. What of it is the guest's memory is open to them
/// anyway, and stays what it is.
///
/// # Errors
/// [`Error`]: there is memory of the MLE or of firmware in it, or registers that are closed. What comes before those is open.
pub fn open(space: &mut AddressSpace, range: PhysRange) -> Result<(), Error> {
    let pages = range.page_outward();
    if pages.last() >= space.limit() {
        return Err(Error::BeyondLimit { range, limit: space.limit() });
    }
    let is_open = |kind| matches!(kind, Kind::Ram | Kind::DmaReserved);
    loop {
        let closed = |region: Region| (!is_open(region.kind)).then_some(region.range);
        let part = space.regions().filter_map(closed).find_map(|range| range.intersection(&pages));
        match part {
            Some(part) => space.assign(part, Kind::DmaReserved)?,
            None => return Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use hv::space::View;

    use super::*;
    use crate::dmar::Dmar;
    use crate::ivrs::Ivrs;
    use crate::model::{Machine, Table, dmar};

    const MLE: u64 = 0x4000_0000;

    fn space() -> AddressSpace {
        AddressSpace::new(40, PhysRange::new(MLE, 16 << 20).unwrap(), None).unwrap()
    }

    fn reaches(space: &AddressSpace, address: u64) -> bool {
        space.find(address).unwrap().kind.access(View::Device).is_some()
    }

    fn ivmd(kind: u8, flags: u8, segment: u16, start: u64, length: u64) -> Vec<u8> {
        let mut block = vec![kind, flags, 32, 0, 8, 0, 0x10, 0];
        block.extend(segment.to_le_bytes());
        block.extend([0; 6]);
        block.extend(start.to_le_bytes());
        block.extend(length.to_le_bytes());
        block
    }

    #[test]
    fn ranges_of_firmware_are_found_and_opened() {
        let ivrs = Table::new()
            .block(&ivmd(0x22, 7, 0, 0x7000_0800, 0x1000))
            .block(&ivmd(0x21, 8, 1, 0x7100_0000, 0x1000))
            .finish();
        let dmar = dmar::Table::new(39)
            .region(0, 0x7200_0000, 0x7200_ffff, &dmar::scope(1, 0, 0, &[(0x14, 0)]))
            .region(0, 0x7300_0000, 0x7300_0fff, &dmar::scope(1, 0, 0, &[(3, 0), (0, 0)]))
            .finish();
        let machine = Machine::new();
        let wanted: Vec<_> = Ivrs::new(&ivrs)
            .unwrap()
            .reserved()
            .chain(Dmar::new(&dmar).unwrap().reserved(&machine))
            .collect();
        let range = |start, last| PhysRange::from_last(start, last).unwrap();
        let one = |first, range, untranslated| Reserved { range, first, last: first, untranslated };
        assert_eq!(
            wanted,
            [
                Reserved {
                    range: range(0x7000_0800, 0x7000_17ff),
                    first: Some(8),
                    last: Some(0x10),
                    untranslated: false,
                },
                one(Some(0x1_0008), range(0x7100_0000, 0x7100_0fff), true),
                one(Some(0xa0), range(0x7200_0000, 0x7200_ffff), false),
                // No bridge at 00:03.0.
                one(None, range(0x7300_0000, 0x7300_0fff), false),
            ]
        );
        let mut space = space();
        let guests = range(0x7200_4000, 0x7200_4fff);
        space.assign(guests, Kind::Ram).unwrap();
        let places = [0x7000_0000, 0x7000_1fff, 0x7100_0000, 0x7200_0000, 0x7200_ffff, 0x7300_0000];
        assert!(!places.iter().any(|at| reaches(&space, *at)));
        for reserved in &wanted {
            open(&mut space, reserved.range).unwrap();
        }
        for at in places {
            assert_eq!(space.find(at).unwrap().kind, Kind::DmaReserved, "{at:#x}");
        }
        assert_eq!(space.find(0x7200_4000).unwrap(), Region { range: guests, kind: Kind::Ram });
        assert!(!reaches(&space, 0x7000_2000) && !reaches(&space, 0x7201_0000));
        let beyond = range(space.limit() - 1, space.limit());
        assert!(matches!(open(&mut space, beyond), Err(Error::BeyondLimit { .. })));
    }

    #[test]
    fn nothing_opens_the_mle() {
        let table = dmar::Table::new(39).region(0, MLE - 0x1000, MLE + 0xfff, &[]).finish();
        let machine = Machine::new();
        let mut space = space();
        let wanted = Dmar::new(&table).unwrap().reserved(&machine).next().unwrap();
        assert!(matches!(open(&mut space, wanted.range), Err(Error::Overlap { .. })));
        assert!(!reaches(&space, MLE));
    }
}
