//! Memory that firmware wants devices to go on reaching when DMA is under control: IVMD in the IVRS, RMRR in the DMAR.
//!
//! Devices that the gap set to work may use it, for the firmware or against it, and all devices of the guest share one table. So
//! it is closed to them unless the configuration opens it, and either is on record.

use core::fmt;

use firmware::exposure::{Access, Decision, Kind, Record, Text};
use heapless::Vec;
use hv::io::PortIo;
use hv::space::AddressSpace;
use iommu::reserved::{self, Reserved};

use super::{Error, Listed};

/// Most ranges.
pub const RESERVED_MAX: usize = 32;

/// A range, with the first device that wants it, and what became of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// The range.
    pub reserved: Reserved,
    /// Devices reach it.
    pub open: bool,
}

impl fmt::Display for Wanted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let range = self.reserved.range;
        write!(f, "reserved memory {:#x}, {} bytes", range.start(), range.len())
    }
}

impl Wanted {
    /// For the exposure log.
    pub fn on_record(&self, cpu: u32, now_us: u64) -> Record {
        let (kind, decision) = match self.open {
            true => (Kind::LEFT_OPEN, Decision::PASSED),
            false => (Kind::REFUSED, Decision::DENIED),
        };
        let address = self.reserved.range.start();
        let how = Access::READ | Access::WRITE;
        let access = self.reserved.first.map(|source| Access { source, address, how });
        Record { decision, access, text: Some(Text::new(self)), ..Record::new(kind, cpu, now_us) }
    }
}

/// Finds all that `listed` names, and opens it in `space` if `allowed`.
///
/// # Errors
/// There are too many, or one that is to be opened is not the devices' to have.
pub fn settle(
    listed: Listed<'_>,
    ports: &impl PortIo,
    space: &mut AddressSpace,
    allowed: bool,
) -> Result<Vec<Wanted, RESERVED_MAX>, Error> {
    let mut all = Vec::<Wanted, RESERVED_MAX>::new();
    for reserved in listed.reserved(ports)? {
        if all.iter().any(|known| known.reserved.range == reserved.range) {
            continue;
        }
        if allowed {
            reserved::open(space, reserved.range).map_err(Error::Reserved)?;
        }
        all.push(Wanted { reserved, open: allowed }).map_err(|_| Error::TooManyReserved)?;
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use hv::addr::PhysRange;
    use hv::space::{Kind as Of, View};
    use iommu::model::{Machine, dmar};
    use iommu::vt_d::Protection;

    use super::*;

    const MLE: u64 = 0x4000_0000;

    fn settled(table: &[u8], allowed: bool) -> (Result<Vec<Wanted, RESERVED_MAX>, Error>, AddressSpace) {
        let mut space = AddressSpace::new(40, PhysRange::new(MLE, 16 << 20).unwrap(), None).unwrap();
        let listed = Listed::Dmar(table, Protection::InForce);
        (settle(listed, &Machine::new(), &mut space, allowed), space)
    }

    #[test]
    fn each_range_is_on_record_once_and_open_only_when_allowed() {
        let scopes = [0x14, 0x15].map(|device| dmar::scope(1, 0, 0, &[(device, 0)])).concat();
        let table = dmar::Table::new(39)
            .region(0, 0x7200_0000, 0x7200_ffff, &scopes)
            .region(0, 0x7300_0000, 0x7300_0fff, &[])
            .finish();
        for (allowed, kind, decision) in
            [(false, Kind::REFUSED, Decision::DENIED), (true, Kind::LEFT_OPEN, Decision::PASSED)]
        {
            let (all, space) = settled(&table, allowed);
            let all = all.unwrap();
            let records = all.iter().map(|wanted| wanted.on_record(7, 9)).collect::<Vec<_, 4>>();
            let texts: Vec<_, 4> = records.iter().map(|record| record.text.unwrap()).collect();
            assert_eq!(
                texts,
                ["reserved memory 0x72000000, 65536 bytes", "reserved memory 0x73000000, 4096 bytes"]
                    .map(Text::new)
            );
            let access = Access { source: 0xa0, address: 0x7200_0000, how: 3 };
            assert_eq!((records[0].access, records[1].access), (Some(access), None));
            assert!(records.iter().all(|record| (record.kind, record.decision) == (kind, decision)));
            let reached = |at| space.find(at).unwrap().kind.access(View::Device).is_some();
            assert_eq!((reached(0x7200_f000), reached(0x7300_0000)), (allowed, allowed));
        }
    }

    #[test]
    fn what_cannot_be_had_is_told() {
        let table = dmar::Table::new(39).region(0, MLE, MLE + 0xfff, &[]).finish();
        assert!(settled(&table, false).0.is_ok());
        let error = settled(&table, true).0.unwrap_err();
        assert!(matches!(error, Error::Reserved(_)));
        let (_, space) = settled(&table, true);
        assert!(matches!(space.find(MLE).unwrap().kind, Of::Closed(_)));

        let mut many = dmar::Table::new(39);
        for n in 0..=RESERVED_MAX as u64 {
            many = many.region(0, 0x7000_0000 + n * 0x1000, 0x7000_0fff + n * 0x1000, &[]);
        }
        let error = settled(&many.finish(), false).0.unwrap_err();
        assert_eq!(error.to_string(), "more than 32 ranges of memory reserved for devices in IVRS or DMAR");
    }
}
