//! How many SMIs go on record: whoever raises them chooses how many there are, and each record is a measurement.

use core::fmt::Write;

use firmware::exposure::{Record, Text};
use iommu::fault::Meter;
use spin::Mutex;

use crate::exposure;

/// SMIs that were raised and that nobody is known to have asked for.
pub static UNASKED: Told = Told::new();
/// SMIs of the guest.
pub static OF_GUEST: Told = Told::new();
/// SMIs that firmware was refused.
pub static REFUSED: Told = Told::new();

/// Most SMIs of one call of firmware that go on record one by one. The call's own record has their number.
pub const OF_CALL: u64 = 16;

/// Which SMIs of one sort go on record: as many as of accesses that an IOMMU stopped ([`Meter`]).
pub struct Told(Mutex<Meter>);

impl Told {
    const fn new() -> Self {
        Self(Mutex::new(Meter::new()))
    }

    /// Puts `record` on record, with how many before it were not, or counts it. True if it is on record.
    pub fn record(&self, record: Record) -> bool {
        let record = self.admit(record);
        record.as_ref().map(exposure::record).is_some()
    }

    fn admit(&self, record: Record) -> Option<Record> {
        let untold = self.0.lock().admit(record.time_us)?;
        let text = match (record.text, untold) {
            (text, 0) => text,
            (None, n) => Some(Text::new(format_args!("{n} times more before it"))),
            (Some(mut text), n) => {
                // What has no room is left out.
                let _ = write!(text, "; {n} times more before it");
                Some(text)
            }
        };
        Some(Record { text, ..record })
    }
}

/// Writes how many SMIs of each sort there were.
pub fn write(out: &mut impl Write) {
    for (told, name) in
        [(&UNASKED, "unasked for"), (&OF_GUEST, "of the guest"), (&REFUSED, "refused to firmware")]
    {
        let meter = told.0.lock();
        // A full buffer ends the report early.
        let _ = writeln!(
            out,
            "SMIs {name}: {}, {} of them since the last record of one",
            meter.seen(),
            meter.silent()
        );
    }
}

#[cfg(test)]
mod tests {
    use firmware::exposure::Kind;

    use super::*;

    #[test]
    fn a_storm_is_counted_and_on_record_in_part() {
        let told = Told::new();
        let at = |time_us| Record::new(Kind::SMI, 0, time_us);
        let records = (0..1000).filter_map(|n| told.admit(at(n)));
        assert!(records.map(|record| record.text).eq([None; Meter::BURST as usize]));
        let named = Record { text: Some(Text::new("port 0x1480")), ..at(Meter::PERIOD_US) };
        let text = told.admit(named).unwrap().text;
        assert_eq!(text, Some(Text::new("port 0x1480; 984 times more before it")));
        assert_eq!(told.admit(at(Meter::PERIOD_US)), None);
        let next = told.admit(at(2 * Meter::PERIOD_US)).unwrap().text;
        assert_eq!(next, Some(Text::new("1 times more before it")));
    }
}
