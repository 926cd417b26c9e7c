//! How many records of a sort there are: whoever causes them chooses how often, and each is a measurement.

use core::fmt::{self, Display, Formatter, Write};

use firmware::exposure::{CALL_SMIS, Meter, Record, Text};
use spin::Mutex;

/// SMIs that were raised and that nobody is known to have asked for.
pub static UNASKED_SMIS: Told = Told::new();
/// SMIs of the guest.
pub static GUEST_SMIS: Told = Told::new();
/// SMIs that firmware was refused.
pub static REFUSED_SMIS: Told = Told::new();
/// Ends of the machine, by a port, that firmware with the guest's rights was refused.
pub static REFUSED_ENDS: Told = Told::new();
/// Memory that the guest was refused.
pub static GUEST_MEMORY: Told = Told::new();

const _: () = assert!(CALL_SMIS == Meter::BURST as usize);

/// Which records of one sort there are: as many as [`Meter`] lets through.
pub struct Told(Mutex<Meter>);

impl Told {
    const fn new() -> Self {
        Self(Mutex::new(Meter::new()))
    }

    /// Puts `record` on record, with how many before it were not, or counts it. True if it is on record.
    pub fn record(&self, record: Record) -> bool {
        let record = self.admit(record);
        record.as_ref().map(super::record).is_some()
    }

    /// Counts one that would say again what is on record.
    pub fn pass_over(&self) {
        self.0.lock().pass_over();
    }

    fn admit(&self, record: Record) -> Option<Record> {
        let untold = self.0.lock().admit(record.time_us)?;
        let text = match (record.text, untold) {
            (text, 0) => text,
            // The number comes first: it is not what is cut.
            (text, n) => {
                let mut all = Text::new(format_args!("{n} times more before it"));
                if let Some(text) = text {
                    all.append(&text);
                }
                Some(all)
            }
        };
        Some(Record { text, ..record })
    }
}

/// How many there were.
impl Display for Told {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let meter = self.0.lock();
        write!(f, "{}, {} of them since the last record of one", meter.seen(), meter.silent())
    }
}

/// Writes how many there were of each sort but memory, which has more to it.
pub fn write(out: &mut impl Write) {
    for (told, name) in [
        (&UNASKED_SMIS, "SMIs unasked for"),
        (&GUEST_SMIS, "SMIs of the guest"),
        (&REFUSED_SMIS, "SMIs refused to firmware"),
        (&REFUSED_ENDS, "ends of the machine refused to firmware"),
    ] {
        // A full buffer ends the report early.
        let _ = writeln!(out, "{name}: {told}");
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
        let records = (0..999).filter_map(|n| told.admit(at(n)));
        assert!(records.map(|record| record.text).eq([None; Meter::BURST as usize]));
        told.pass_over();
        assert_eq!(told.to_string(), "1000, 984 of them since the last record of one");
        let named = Record { text: Some(Text::new("port 0x1480")), ..at(Meter::PERIOD_US) };
        let text = told.admit(named).unwrap().text;
        assert_eq!(text, Some(Text::new("984 times more before it; port 0x1480")));
        assert_eq!(told.admit(at(Meter::PERIOD_US)), None);
        let next = told.admit(at(2 * Meter::PERIOD_US)).unwrap().text;
        assert_eq!(next, Some(Text::new("1 times more before it")));
    }
}
