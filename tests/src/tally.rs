//! What the exposure log and the MLE's status have of a storm that is over: all of it is counted, and a few are on record.

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::edu::Guest;

/// Most records of a kind that are told at once, and the time that earns one more (`docs/exposure-log.md`).
const BURST: u64 = 16;
const PERIOD_US: u64 = 1_000_000;

/// One kind of what happens in a storm: as the MLE's status has it, and as the exposure log has it.
#[derive(Debug, Default)]
pub struct Tally {
    /// How often, by the status.
    pub counted: u64,
    /// How often since the last record of it, by the status.
    since: u64,
    /// When its records were made, in microseconds since the MLE's start.
    records: Vec<u64>,
    /// How often it has no record of its own, by the texts of later ones.
    left_out: u64,
}

/// How many before it have no record, by a record's text.
fn left_out(text: &str) -> Result<u64> {
    let Some((before, _)) = text.split_once(" more before it") else { return Ok(0) };
    let number = before.trim_end_matches(" times").rsplit(' ').next().unwrap_or_default();
    number.parse().with_context(|| format!("text of a record: {text}"))
}

impl Tally {
    fn told(&mut self, record: &Value) -> Result<()> {
        self.records.push(record["time_us"].as_u64().context("a record's time")?);
        self.left_out += left_out(record["text"].as_str().unwrap_or_default())?;
        Ok(())
    }

    /// Nothing is lost, and there are no more records than may be.
    fn check(&self) -> Result<()> {
        let told = self.records.len() as u64;
        ensure!(told + self.left_out + self.since == self.counted, "records and count differ: {self:?}");
        let periods = |time: Option<&u64>| time.map_or(0, |time| time / PERIOD_US);
        let most = BURST + periods(self.records.last()) - periods(self.records.first());
        ensure!(told <= most, "{told} records, {most} at most");
        Ok(())
    }

    /// How many records there are.
    pub fn records(&self) -> usize {
        self.records.len()
    }
}

/// The records of the exposure log.
pub fn records(guest: &mut impl Guest) -> Result<Vec<Value>> {
    let log = guest.check("cordon log --json")?;
    log.lines().map(|line| serde_json::from_str(line).context("a record")).collect()
}

/// The numbers in the lines of the MLE's status that begin with `start`.
fn status(guest: &mut impl Guest, start: &str) -> Result<Vec<u64>> {
    let lines = guest.check(&format!("tail -c +5 /sys/firmware/efi/efivars/Status-* | grep '^{start}'"))?;
    let words = lines.split(|c: char| !c.is_alphanumeric());
    Ok(words.filter_map(|word| word.parse().ok()).collect())
}

/// What the guest finds of stopped accesses, and of logs that ran over. Status, log and table of the log agree.
pub fn dma(guest: &mut impl Guest) -> Result<[Tally; 2]> {
    // Programs ask CPUID: these exits have the MLE look for what is left.
    guest.check("for i in 1 2 3 4 5; do usleep 200000; true | cat; done")?;
    let numbers = status(guest, "DMA:")?;
    let &[_, counted, since, overflows, overflows_since] = numbers.as_slice() else { bail!("{numbers:?}") };
    let mut faults = Tally { counted, since, ..Tally::default() };
    let mut overflows = Tally { counted: overflows, since: overflows_since, ..Tally::default() };
    for record in records(guest)?.iter().filter(|record| record["kind"] == "IOMMU fault") {
        if record["access"].is_null() { &mut overflows } else { &mut faults }.told(record)?;
    }
    faults.check().context("faults")?;
    overflows.check().context("overflows")?;
    let table = guest.check("cordon exposure | grep '^IOMMU fault'")?;
    let told = faults.records.len() + overflows.records.len();
    ensure!(
        table.split_whitespace().nth(2) == Some(told.to_string().as_str()),
        "{told} records, and {table}"
    );
    Ok([faults, overflows])
}

/// What the guest finds of a sort that has the line `sort` in the status; `is` picks their records. Status and log agree.
pub fn of(guest: &mut impl Guest, sort: &str, is: impl Fn(&Value) -> bool) -> Result<Tally> {
    let numbers = status(guest, &format!("{sort}:"))?;
    let &[counted, since] = numbers.as_slice() else { bail!("{numbers:?}") };
    let mut tally = Tally { counted, since, ..Tally::default() };
    records(guest)?.iter().filter(|record| is(record)).try_for_each(|record| tally.told(record))?;
    tally.check().with_context(|| sort.to_owned())?;
    Ok(tally)
}

/// Batches that were measured, and records that are no longer in the log or never were in it.
pub fn measured(guest: &mut impl Guest) -> Result<(u64, u64)> {
    let numbers = status(guest, "exposure:")?;
    let &[_, batches, spilled, lost, _] = numbers.as_slice() else { bail!("{numbers:?}") };
    Ok((batches, spilled + lost))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_says_how_many_it_stands_for() {
        for (text, number) in [
            ("", 0),
            ("port 0x1480", 0),
            ("3 times more before it", 3),
            ("984 times more before it; port 0x1480", 984),
            ("not mapped; 12 more before it", 12),
            ("a log ran over; 7 times more before it", 7),
        ] {
            assert_eq!(left_out(text).unwrap(), number, "{text}");
        }
        assert!(left_out("many more before it").is_err());
    }

    #[test]
    fn what_is_missing_or_too_much_is_found() {
        let told =
            |records: u64, counted| Tally { counted, records: vec![0; records as usize], ..Tally::default() };
        assert!(told(BURST, BURST).check().is_ok());
        assert!(told(BURST, BURST + 1).check().is_err());
        assert!(told(BURST + 1, BURST + 1).check().is_err());
    }
}
