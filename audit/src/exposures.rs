//! The exposure log as a whole: its records, what it leads to, and whether it is consistent.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use firmware::call::Status;
use firmware::exposure::{
    AnchorData, BatchHeader, Decision, Exposure, FLAG_LATE, FormatError, Kind, Record, SERVICE_NONE,
};
use firmware::service::Service;
use serde_json::{Map, Value, json};
use tpm::log::EV_NO_ACTION;
use tpm::{Digest, HashAlg};

use crate::text::printable;
use crate::values::{ALGS, name};

/// Some records and what is said about them.
pub struct Batch {
    /// What is said.
    pub header: BatchHeader,
    /// They are not in the PCR yet.
    pub pending: bool,
    /// The records by their sequence numbers.
    pub records: Vec<(u64, Record)>,
}

impl Batch {
    /// Measured later than it should have been.
    pub fn late(&self) -> bool {
        self.header.flags.get() & FLAG_LATE != 0
    }

    /// The relaunch after which it is the first.
    pub fn relaunch(&self) -> Option<u64> {
        self.records.first()?.1.relaunch().map(|(round, _)| round)
    }
}

/// An exposure log.
pub struct Exposures {
    /// What was dropped before the first batch.
    pub anchor: AnchorData,
    /// The batches in their order; the pending records last.
    pub batches: Vec<Batch>,
    /// The values of PCR 22 that it leads to, in the banks that can be replayed.
    pub values: BTreeMap<HashAlg, Digest>,
    /// The batches are only logged: the TPM has no locality that could extend PCR 22.
    pub unextended: bool,
    /// The last relaunch that it tells of.
    pub round: Option<u64>,
    /// What does not fit together. Empty in a log as Cordon writes it.
    pub findings: Vec<String>,
}

impl Exposures {
    /// Reads all of a log. Everything in it is checked but its values, which only a PCR can confirm.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let exposure = Exposure::parse(bytes)?;
        let mut log = Self {
            anchor: *exposure.anchor(),
            batches: Vec::new(),
            values: BTreeMap::new(),
            unextended: false,
            round: None,
            findings: Vec::new(),
        };
        let mut chain = exposure.chain();
        for entry in exposure.entries() {
            let entry = entry?;
            let place = || format!("batch at offset {:#x}", entry.event.offset);
            if let Err(broken) = chain.follow(&entry) {
                log.findings.push(format!("{}: {broken}", place()));
            }
            let records: Result<_, FormatError> = entry.batch.records().collect();
            let records = records.with_context(place)?;
            if let Some(alg) = entry.false_digest() {
                log.findings.push(format!(
                    "{}: its {} digest is not that of its records",
                    place(),
                    name(alg)
                ));
            }
            log.unextended |= !entry.pending && entry.event.event_type == EV_NO_ACTION;
            log.batches.push(Batch { header: entry.batch.header, pending: entry.pending, records });
        }
        for alg in ALGS.into_iter().filter(|alg| exposure.banks().iter().any(|bank| bank.alg == *alg)) {
            log.values.extend(chain.values.get(alg).map(|value| (alg, *value)));
        }
        log.round = chain.round.filter(|round| *round != 0);
        log.check();
        Ok(log)
    }

    /// All records, with the batches that they are in.
    pub fn records(&self) -> impl Iterator<Item = (u64, &Record, &Batch)> {
        self.batches
            .iter()
            .flat_map(|b| b.records.iter().map(move |(sequence, record)| (*sequence, record, b)))
    }

    /// Batches in the PCR that the log still has.
    pub fn measured(&self) -> impl Iterator<Item = &Batch> {
        self.batches.iter().filter(|batch| !batch.pending)
    }

    /// What was said last, in the PCR or about to be.
    fn newest(&self) -> Option<&BatchHeader> {
        self.batches.last().map(|batch| &batch.header)
    }

    /// Records that were never measured.
    pub fn lost(&self) -> u64 {
        self.newest().map_or(0, |header| header.lost.get())
    }

    /// Batches that were measured late.
    pub fn late(&self) -> u64 {
        self.newest().map_or(0, |header| header.late.get())
    }

    /// One line: how many there are of what.
    pub fn summary(&self) -> String {
        let count = |pending| self.records().filter(|(_, _, batch)| batch.pending == pending).count();
        let relaunched = self.round.map(|round| format!("; relaunched, round {round}")).unwrap_or_default();
        format!(
            "{} records in {} batches, {} pending; {} records spilled, {} lost; {} batches late{relaunched}",
            count(false),
            self.measured().count(),
            count(true),
            self.anchor.records,
            self.lost(),
            self.late(),
        )
    }

    /// Batches and records must be numbered without gaps other than those they own up to, and what is counted may not
    /// shrink.
    fn check(&mut self) {
        let mut findings = Vec::new();
        let (mut number, mut accounted) = (self.anchor.batches.get(), self.anchor.records.get());
        let mut next = 0;
        let mut before = [0; 4];
        for Batch { header, records, pending } in &self.batches {
            let mut find = |text: String| findings.push(format!("batch {}: {text}", header.number));
            if header.number.get() != number {
                find(format!("batch {number} should be here"));
            }
            number = header.number.get().saturating_add(1);
            let counts = [header.spilled.get(), header.lost.get(), header.late.get(), header.sealed_us.get()];
            let names = ["records spilled", "records lost", "batches late", "time"];
            // Pending records have no time of their end yet.
            let compared = if *pending { 3 } else { 4 };
            for ((now, then), what) in counts.iter().zip(before).zip(names).take(compared) {
                if *now < then {
                    find(format!("{what} {now}, but {then} before"));
                }
            }
            before = counts;
            if records.first().map(|(sequence, _)| *sequence) != Some(header.first.get()) {
                find(format!("does not begin with record {}", header.first));
            }
            for (sequence, record) in records {
                if record.kind == Kind::RELAUNCHED && *sequence != header.first.get() {
                    find(format!("record {sequence} is of a relaunch and does not begin a batch"));
                }
                accounted = accounted.saturating_add(1);
                if *sequence < next {
                    find(format!("record {sequence} is out of order"));
                }
                next = sequence.saturating_add(1);
            }
            // Of the numbers given out, all that are not here are spilled or lost.
            let missing = next.saturating_sub(accounted.saturating_add(header.lost.get()));
            if missing != 0 {
                find(format!("{missing} records up to {} are missing", next.saturating_sub(1)));
            }
        }
        let measured = self.measured().last().map(|batch| batch.header);
        if let Some(newest) = measured.filter(|newest| newest.spilled != self.anchor.records) {
            findings.push(format!(
                "{} records are left out, but the newest batch knows of {}: the log was cut",
                self.anchor.records, newest.spilled
            ));
        }
        self.findings.append(&mut findings);
    }
}

/// What a record is about: the service, the SMI, or the kind of event.
pub fn what(record: &Record) -> String {
    let service = service(record);
    let kind = kind(record.kind);
    match (record.kind, service) {
        (Kind::CALL, Some(service)) => service,
        (Kind::SMI, _) => format!("SMI {:#04x}", record.smi_command),
        (_, Some(service)) => format!("{kind} ({service})"),
        (_, None) => kind,
    }
}

/// The name of a kind.
fn kind(kind: Kind) -> String {
    kind.name().map_or_else(|| format!("kind {}", kind.0), str::to_owned)
}

/// The name of a decision.
pub fn decision(decision: Decision) -> String {
    decision.name().map_or_else(|| format!("decision {}", decision.0), str::to_owned)
}

/// The name of the service that a record is about.
pub fn service(record: &Record) -> Option<String> {
    let known = || {
        Service::try_from(record.service)
            .map_or_else(|no| format!("service {}", no.0), |s| s.name().to_owned())
    };
    (record.service != SERVICE_NONE).then(known)
}

/// The name of an EFI status.
pub fn status(status: u64) -> String {
    let known = usize::try_from(status).map(|raw| format!("{:?}", Status(raw)));
    known.ok().filter(|name| !name.contains('(')).unwrap_or_else(|| format!("{status:#x}"))
}

/// The status of a record that has one.
fn answered(record: &Record) -> Option<u64> {
    Some(record.status).filter(|status| record.kind == Kind::CALL || *status != 0)
}

/// Accesses denied.
pub fn denied(record: &Record) -> u64 {
    let during = record.denied.map_or(0, |d| [d.ports, d.msrs, d.memory].map(u64::from).iter().sum());
    let alone =
        matches!(record.kind, Kind::DENIED_PORT | Kind::DENIED_MSR | Kind::DENIED_MEMORY | Kind::IOMMU_FAULT);
    u64::saturating_add(during, alone.into())
}

/// The record's further fields, in words.
pub fn details(record: &Record) -> Vec<String> {
    let mut details = Vec::new();
    if record.kind == Kind::SMI {
        details.extend(service(record).map(|service| format!("for {service}")));
    }
    for (count, one, more) in [(record.exits, "exit", "exits"), (record.smis, "SMI", "SMIs")] {
        if count != 0 {
            details.push(format!("{count} {}", if count == 1 { one } else { more }));
        }
    }
    if let Some(variable) = &record.variable {
        let kept = variable.name.as_bytes();
        let cut = if usize::from(variable.name.full_length()) > kept.len() { "…" } else { "" };
        // Of a handler there is the GUID alone.
        let dash = if kept.is_empty() { "" } else { "-" };
        details.push(format!("{}{cut}{dash}{}", printable(kept), variable.guid));
    }
    if let Some(d) = &record.denied {
        for (count, what, last) in [
            (d.ports, "ports", u64::from(d.last_port)),
            (d.msrs, "MSRs", d.last_msr.into()),
            (d.memory, "memory", d.last_address),
        ] {
            if count != 0 {
                details.push(format!("denied {what} {count} (last {last:#x})"));
            }
        }
    }
    if let Some((round, before)) = record.relaunch() {
        details.push(format!("round {round}, PCR 22 was {} before", hex::encode(before)));
    } else if let Some(region) = &record.region {
        let sha256 = hex::encode(region.sha256);
        details.push(format!("{:#x}, {:#x} bytes, now SHA-256 {sha256}", region.base, region.size));
    }
    if let Some(access) = &record.access {
        let source = access.source;
        let from = match record.kind {
            Kind::IOMMU_FAULT => format!(
                "{:04x}:{:02x}:{:02x}.{}",
                source >> 16,
                source >> 8 & 0xff,
                source >> 3 & 0x1f,
                source & 7
            ),
            _ => format!("cpu {source}"),
        };
        details.push(format!("{from} {} {:#x}", how(access.how), access.address));
    }
    if let Some(text) = &record.text {
        details.push(printable(text.as_bytes()));
    }
    details
}

/// What kind of access.
fn how(how: u8) -> String {
    use firmware::exposure::Access;
    let names = [(Access::READ, "read"), (Access::WRITE, "write"), (Access::EXECUTE, "execute")];
    let set: Vec<_> = names.iter().filter(|(bit, _)| how & bit != 0).map(|(_, name)| *name).collect();
    if set.is_empty() { "access".to_owned() } else { set.join("+") }
}

/// A time in seconds.
pub fn seconds(us: u64) -> String {
    format!("{}.{:06}", us / 1_000_000, us % 1_000_000)
}

/// A duration in milliseconds.
pub fn milliseconds(us: u64) -> String {
    format!("{}.{:03} ms", us / 1000, us % 1000)
}

/// One line for people.
pub fn line(sequence: u64, record: &Record, batch: &Batch) -> String {
    let duration =
        if record.duration_us == 0 { String::new() } else { milliseconds(record.duration_us.into()) };
    let status = answered(record).map(status).unwrap_or_default();
    let line = format!(
        "{sequence:>6}{} {:>14} cpu{:<3} {:<25} {:<8} {status:<17} {duration:>12}  {}",
        if batch.pending { '*' } else { ' ' },
        seconds(record.time_us),
        record.cpu,
        what(record),
        decision(record.decision),
        details(record).join(", "),
    );
    line.trim_end().to_owned()
}

/// The record for programs.
pub fn json(sequence: u64, record: &Record, batch: &Batch) -> Value {
    let mut map = Map::new();
    let mut put = |key: &str, value: Value| drop(map.insert(key.to_owned(), value));
    put("sequence", sequence.into());
    put("batch", if batch.pending { Value::Null } else { batch.header.number.get().into() });
    put("late", batch.late().into());
    put("time_us", record.time_us.into());
    put("cpu", record.cpu.into());
    put("kind", kind(record.kind).into());
    put("service", service(record).into());
    put("smi_command", record.smi_command.into());
    put("decision", decision(record.decision).into());
    put("status", answered(record).map(status).into());
    put("status_code", answered(record).into());
    put("duration_us", record.duration_us.into());
    put("exits", record.exits.into());
    put("smis", record.smis.into());
    if let Some(variable) = &record.variable {
        let (name, length) = (printable(variable.name.as_bytes()), variable.name.full_length());
        put("variable", json!({ "guid": variable.guid.to_string(), "name": name, "name_length": length }));
    }
    if let Some(d) = &record.denied {
        put(
            "denied",
            json!({
                "ports": d.ports, "msrs": d.msrs, "memory": d.memory,
                "last_port": d.last_port, "last_msr": d.last_msr, "last_address": d.last_address,
            }),
        );
    }
    if let Some((round, before)) = record.relaunch() {
        put("relaunch", json!({ "round": round, "pcr22_before": hex::encode(before) }));
    } else if let Some(region) = &record.region {
        let sha256 = hex::encode(region.sha256);
        put("region", json!({ "base": region.base, "size": region.size, "sha256": sha256 }));
    }
    if let Some(access) = &record.access {
        put("access", json!({ "source": access.source, "address": access.address, "how": how(access.how) }));
    }
    if let Some(text) = &record.text {
        put("text", printable(text.as_bytes()).into());
    }
    Value::Object(map)
}

/// What was done how often, and what it cost.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sum {
    /// Records.
    pub count: u64,
    /// Calls that ended with an error.
    pub errors: u64,
    /// Time of all together, microseconds.
    pub total_us: u64,
    /// Time of the longest, microseconds.
    pub longest_us: u64,
    /// Exits.
    pub exits: u64,
    /// SMIs.
    pub smis: u64,
    /// Accesses denied.
    pub denied: u64,
}

/// The records by what they are about, in the order of services first, then SMIs, then the rest.
pub fn sums(log: &Exposures) -> Vec<(String, Sum)> {
    let mut sums: BTreeMap<(Kind, u8, u8), (String, Sum)> = BTreeMap::new();
    for (_, record, _) in log.records() {
        let command = if record.kind == Kind::SMI { record.smi_command } else { 0 };
        let service = if record.kind == Kind::SMI { 0 } else { record.service };
        let (_, sum) =
            sums.entry((record.kind, service, command)).or_insert_with(|| (what(record), Sum::default()));
        let add = |to: &mut u64, value: u64| *to = to.saturating_add(value);
        add(&mut sum.count, 1);
        add(&mut sum.errors, record.status >> 63);
        add(&mut sum.total_us, record.duration_us.into());
        sum.longest_us = sum.longest_us.max(record.duration_us.into());
        add(&mut sum.exits, record.exits.into());
        add(&mut sum.smis, record.smis.into());
        add(&mut sum.denied, denied(record));
    }
    sums.into_values().collect()
}

#[cfg(test)]
mod tests {
    use firmware::exposure::{Access, Denied, ExposureLog, Name, Region, Text, Variable};
    use proptest::prelude::*;
    use tpm::{Bank, BankHasher, Banks};

    use super::*;

    /// A log with a record that has everything, and pending ones.
    fn sample() -> Vec<u8> {
        let banks: Banks = Bank::computed(HashAlg::SHA256).into_iter().collect();
        let mut log = Box::new(ExposureLog::<{ 16 * 1024 }>::new());
        log.begin(&banks, true).unwrap();
        for batch in 0..3 {
            log.record(&Record::call(Service::GetTime, Decision::SANDBOX, 0, batch));
            log.record(&Record {
                variable: Some(Variable { guid: Default::default(), name: Name::new(b"n\0a\0m\0e\0") }),
                denied: Some(Denied { ports: 1, ..Denied::default() }),
                region: Some(Region { base: 1, size: 2, sha256: [3; 32] }),
                access: Some(Access { source: 1, address: 2, how: 3 }),
                text: Some(Text::new("text")),
                ..Record::call(Service::SetVariable, Decision::SANDBOX, 0, batch)
            });
            if batch < 2 {
                let mut hasher = BankHasher::new(&banks);
                hasher.update(log.seal(batch).unwrap());
                log.extended(&hasher.finish()).unwrap();
            }
        }
        let mut bytes = vec![0; 64 * 1024];
        let length = log.write_to(&mut bytes, 0);
        bytes.truncate(length);
        bytes
    }

    #[test]
    fn a_log_as_cordon_writes_it_fits_together() {
        let log = Exposures::parse(&sample()).unwrap();
        assert_eq!((log.findings.as_slice(), log.records().count()), (&[][..], 6));
    }

    #[test]
    fn what_does_not_fit_together_is_found() {
        let found = |change: fn(&mut Exposures)| {
            let mut log = Exposures::parse(&sample()).unwrap();
            change(&mut log);
            log.check();
            log.findings.join("; ")
        };
        assert_eq!(found(|_| ()), "");
        let gone = found(|log| drop(log.batches.remove(1)));
        assert_eq!(gone, "batch 2: batch 1 should be here; batch 2: 2 records up to 5 are missing");
        let renumbered = found(|log| log.batches[1].header.number = 0.into());
        assert!(renumbered.contains("batch 0: batch 1 should be here"), "{renumbered}");
        let misplaced = found(|log| log.batches[0].records[1].1.kind = Kind::RELAUNCHED);
        assert_eq!(misplaced, "batch 0: record 1 is of a relaunch and does not begin a batch");
        let forgotten = found(|log| log.batches[0].records = log.batches[0].records.split_off(1));
        assert!(forgotten.contains("batch 0: does not begin with record 0"), "{forgotten}");
        assert!(forgotten.contains("batch 0: 1 records up to 1 are missing"), "{forgotten}");
        let lost = found(|log| {
            log.batches[0].records.pop();
            log.batches.iter_mut().for_each(|batch| batch.header.lost = 1.into());
        });
        assert_eq!(lost, "", "what is owned up to is not missing");
        let twice = found(|log| log.batches[1].records[1].0 = 2);
        assert!(twice.contains("batch 1: record 2 is out of order"), "{twice}");
        for (change, what) in [
            (|log| log.batches[0].header.lost = 1.into(), "batch 1: records lost 0, but 1 before"),
            (|log| log.batches[0].header.late = 1.into(), "batch 1: batches late 0, but 1 before"),
            (|log| log.batches[0].header.spilled = 1.into(), "batch 1: records spilled 0, but 1 before"),
            (|log| log.batches[0].header.sealed_us = 9.into(), "batch 1: time 1, but 9 before"),
            (|log| log.anchor.records = 1.into(), "1 records are left out, but the newest batch knows of 0"),
        ] as [(fn(&mut Exposures), &str); 5]
        {
            let found = found(change);
            assert!(found.contains(what), "{found}");
        }
    }

    proptest! {
        #[test]
        fn whatever_a_log_says_can_be_shown(
            changes in prop::collection::vec((0..1300_usize, any::<u8>()), 0..12)
        ) {
            let mut bytes = sample();
            for (at, value) in changes {
                bytes[at] = value;
            }
            let Ok(log) = Exposures::parse(&bytes) else { return Ok(()) };
            for (sequence, record, batch) in log.records() {
                for text in [line(sequence, record, batch), json(sequence, record, batch).to_string()] {
                    prop_assert!(!text.contains(char::is_control), "{text:?}");
                }
            }
            let mut page = String::new();
            crate::report::chart::calls(&mut page, &log);
            prop_assert_eq!(page.matches("<rect").count(), log.records().count());
            prop_assert_eq!(sums(&log).iter().map(|(_, sum)| sum.count).sum::<u64>(), log.records().count() as u64);
        }
    }
}
