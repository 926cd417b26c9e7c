//! The log against a model that forgets nothing, the bytes against a copy typed from the documentation.

use proptest::prelude::*;
use tpm::log::extended_all;
use tpm::{Bank, BankHasher, Banks, Digests, HashAlg};

use super::*;
use crate::call::Status;
use crate::service::Service;

const SMALL: usize = 15 * 1024;

fn banks(algs: &[HashAlg]) -> Banks {
    algs.iter().map(|alg| Bank::computed(*alg).unwrap()).collect()
}

fn sha256() -> Banks {
    banks(&[HashAlg::SHA256])
}

fn digests(banks: &Banks, data: &[u8]) -> Digests {
    let mut hasher = BankHasher::new(banks);
    hasher.update(data);
    hasher.finish()
}

fn utf16(name: &str) -> Vec<u8> {
    name.encode_utf16().chain([0]).flat_map(u16::to_le_bytes).collect()
}

fn begun<const N: usize>() -> Box<ExposureLog<N>> {
    let mut log = Box::new(ExposureLog::new());
    log.begin(&sha256(), true).unwrap();
    log
}

fn read(time_us: u64) -> Record {
    Record::call(Service::GetVariable, Decision::SANDBOX, 0, time_us)
}

fn write(time_us: u64) -> Record {
    Record::call(Service::SetVariable, Decision::SANDBOX, 0, time_us)
}

/// Seals and extends, as the MLE does; false when nothing was pending.
fn measure<const N: usize>(log: &mut ExposureLog<N>, now_us: u64) -> bool {
    let Some(digests) = log.seal(now_us).map(|bytes| digests(&sha256(), bytes)) else { return false };
    log.extended(&digests).unwrap();
    true
}

fn bytes<const N: usize>(log: &ExposureLog<N>) -> Vec<u8> {
    let mut bytes = vec![0xaa; 80 * 1024];
    let length = log.write_to(&mut bytes, 0);
    assert_eq!(length, ExposureLog::<N>::SIZE);
    bytes.truncate(length);
    bytes
}

#[test]
fn a_record_has_the_documented_bytes() {
    let guid = Guid::from_bytes(*b"0123456789abcdef");
    let record = Record {
        status: 0x8000_0000_0000_000e,
        duration_us: 0x0d0c_0b0a,
        exits: 3,
        smis: 2,
        smi_command: 0xef,
        variable: Some(Variable { guid, name: Name::new(&utf16("Bo\u{f6}t")) }),
        denied: Some(Denied {
            ports: 1,
            msrs: 2,
            memory: 3,
            last_port: 0xcf9,
            last_msr: 0xc001_0015,
            last_address: 0xfee0_0000,
        }),
        region: Some(Region { base: 0x1000, size: 0x2000, sha256: [7; 32] }),
        access: Some(Access { source: 0x0010_00fa, address: 0x3000, how: Access::WRITE }),
        text: Some(Text::new("why")),
        ..Record::call(Service::SetVariable, Decision::DEFERRED, 5, 0x1122_3344_5566_7788)
    };
    let expected = [
        // size, call, SetVariable, SMI command, deferred, all tails, CPU
        "9a01_08ef_051f_05000000",
        // sequence number, time, status
        "0201000000000000 8877665544332211 0e00000000000080",
        // duration, exits, SMIs
        "0a0b0c0d 03000000 02000000",
        // variable
        "30313233343536373839616263646566 0500 426fc3b674",
        // denied
        "0100 0200 0300 f90c 150001c0 0000e0fe00000000",
        // region
        "0010000000000000 0020000000000000",
        "0707070707070707070707070707070707070707070707070707070707070707",
        // access
        "fa001000 0030000000000000 02",
        // text
        "03 776879",
    ]
    .concat()
    .replace(['_', ' '], "");
    let encoded = encoded(&record, 0x102);
    let hex: String = encoded.iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(hex, expected);
    assert_eq!(Record::parse(&encoded), Ok((0x102, record, &[][..])));
}

fn encoded(record: &Record, sequence: u64) -> Vec<u8> {
    let mut bytes = vec![0; RECORD_MAX];
    let size = record.encode(sequence, &mut bytes).unwrap();
    bytes.truncate(size);
    bytes
}

#[test]
fn a_long_name_is_cut_and_its_length_told() {
    let name = Name::new(&utf16(&"x".repeat(300)));
    assert_eq!((name.full_length(), name.as_bytes()), (300, "x".repeat(64).as_bytes()));
    let lone = [0x00, 0xd8, b'a', 0, 0, 0, b'b', 0];
    assert_eq!(Name::new(&lone).as_bytes(), "\u{fffd}a".as_bytes());
    let variable = Some(Variable { guid: Guid::default(), name });
    assert_eq!(encoded(&Record { variable, ..read(0) }, 0).len(), 128);
    assert_eq!(Text::new("y".repeat(60)).as_bytes(), "y".repeat(45).as_bytes());
}

#[test]
fn only_plain_reads_wait() {
    let urgency = |record: Record| record.urgency();
    let waits = Urgency::Batch { deadline_us: BATCH_DELAY_US + 17 };
    let read = Record { duration_us: 7, ..read(10) };
    assert_eq!(urgency(read), waits);
    let service = |service: Service| Record { service: service as u8, ..read };
    for waiting in [
        Record { status: Status::NOT_FOUND.0 as u64, ..read },
        Record { status: Status::BUFFER_TOO_SMALL.0 as u64, ..read },
        Record { decision: Decision::OWN, ..read },
        Record { kind: Kind::SMI, decision: Decision::PASSED, smi_command: 0xef, ..read },
        service(Service::GetNextVariableName),
        service(Service::QueryVariableInfo),
        service(Service::GetTime),
        service(Service::GetWakeupTime),
        service(Service::QueryCapsuleCapabilities),
    ] {
        assert_eq!(urgency(waiting), waits, "{waiting:?}");
    }
    for at_once in [
        Record { status: Status::DEVICE_ERROR.0 as u64, ..read },
        Record { decision: Decision::DENIED, ..read },
        Record { denied: Some(Denied { ports: 1, ..Denied::default() }), ..read },
        Record { region: Some(Region { base: 0, size: 1, sha256: [0; 32] }), ..read },
        Record { kind: Kind::SMI, decision: Decision::DENIED, ..read },
        Record { kind: Kind::SMI, decision: Decision::PASSED, ..write(0) },
        Record { kind: Kind::SMI, decision: Decision::PASSED, service: SERVICE_NONE, ..read },
        Record { kind: Kind(200), ..read },
        service(Service::SetVariable),
        service(Service::SetTime),
        service(Service::SetWakeupTime),
        service(Service::GetNextHighMonotonicCount),
        service(Service::ResetSystem),
        service(Service::UpdateCapsule),
    ] {
        assert_eq!(urgency(at_once), Urgency::AtOnce, "{at_once:?}");
    }
    for kind in Kind::ALL.iter().filter(|kind| **kind != Kind::CALL) {
        assert_eq!(urgency(Record::new(*kind, 0, 0)), Urgency::AtOnce);
    }
}

#[test]
fn reads_are_due_by_number_or_by_time_and_all_else_at_once() {
    let mut log = begun::<SMALL>();
    assert!(!log.due(u64::MAX) && log.seal(0).is_none());
    for time in 0..63 {
        log.record(&read(time));
    }
    assert!(!log.due(BATCH_DELAY_US - 1) && log.due(BATCH_DELAY_US));
    log.record(&read(63));
    assert!(log.due(64), "64 records");
    assert!(measure(&mut log, 64) && !log.due(u64::MAX));
    log.record(&write(65));
    assert!(log.due(65));
    let batch = log.seal(66).map(|bytes| digests(&sha256(), bytes)).unwrap();
    // While the TPM works a read ends: it goes with the next batch, without waiting.
    log.record(&read(67));
    log.mark_late();
    log.extended(&batch).unwrap();
    assert!(log.due(67) && log.counters().pending == 1 && log.counters().late == 0);
    assert!(measure(&mut log, 68) && !log.due(u64::MAX));
    assert_eq!(log.counters().late, 1, "it was said of the rest");
}

#[test]
fn where_there_is_room_all_records_of_a_call_have_it() {
    let text = Some(Text::new("z".repeat(TEXT_MAX)));
    let name = Name::new(&utf16(&"n".repeat(NAME_MAX)));
    let variable = Some(Variable { guid: Guid::from_bytes([0; 16]), name });
    let smi = Record { variable, text, ..Record::new(Kind::SMI, 0, 0) };
    let died = Record { access: Some(Access { source: 0, address: 0, how: 0 }), ..smi };
    let call = Record { denied: Some(Denied::default()), ..smi };
    let fill = |count| {
        let mut log = begun::<SMALL>();
        for _ in 0..count {
            log.record(&write(0));
        }
        log
    };
    // The fullest in which a call may begin.
    let fullest = (0..).take_while(|count| fill(*count).has_room()).last().unwrap();
    let mut log = fill(fullest);
    for record in [smi; 2 * CALL_SMIS].iter().chain(&[died, call, call, smi]) {
        log.record(record);
    }
    assert_eq!(log.counters().lost, 0);
}

#[test]
fn a_busy_tpm_makes_batches_late_and_loses_records_by_number_only() {
    let mut log = begun::<SMALL>();
    let mut recorded = 0;
    while log.has_room() {
        log.record(&write(recorded));
        recorded += 1;
    }
    assert!(recorded > BATCH_RECORDS.into());
    let loud = Record { text: Some(Text::new("z".repeat(45))), ..write(0) };
    for _ in 0..100 {
        log.record(&loud);
        recorded += 1;
    }
    let lost = log.counters().lost;
    assert!(lost > 0 && log.due(0));
    log.mark_late();
    measure(&mut log, 5_000_000);
    log.record(&write(6_000_000));
    measure(&mut log, 6_000_000);
    assert_eq!(
        *log.counters(),
        Counters { records: recorded + 1, batches: 2, lost, late: 1, ..Counters::default() }
    );
    let bytes = bytes(&log);
    let exposure = Exposure::parse(&bytes).unwrap();
    let headers: Vec<_> = exposure.entries().map(|entry| entry.unwrap().batch.header).collect();
    assert_eq!(headers[0].flags, FLAG_LATE);
    assert_eq!(
        (headers[0].lost.get(), headers[0].late.get(), headers[0].sealed_us.get()),
        (lost, 1, 5_000_000)
    );
    assert_eq!((headers[1].flags.get(), headers[1].late.get(), headers[1].lost.get()), (0, 1, lost));
    assert_eq!(headers[1].first.get(), recorded);
}

#[test]
fn the_log_can_be_read_in_pieces_and_has_one_size() {
    let mut log = begun::<SMALL>();
    measure(&mut log, 0);
    for n in 0..40 {
        log.record(&write(n));
        if n % 3 == 0 {
            measure(&mut log, n);
        }
    }
    let whole = bytes(&log);
    for size in [1, 100, 977] {
        let mut pieces = Vec::new();
        let mut piece = vec![0xaa; size];
        loop {
            let length = log.write_to(&mut piece, pieces.len());
            if length == 0 {
                break;
            }
            pieces.extend_from_slice(&piece[..length]);
        }
        assert!(pieces == whole, "{size}");
    }
    // Before the banks are known records are kept, and there is no log yet.
    let mut early = Box::new(ExposureLog::<SMALL>::new());
    early.record(&Record::new(Kind::LAUNCH, 0, 0));
    assert!(early.seal(0).is_none() && bytes(&early).iter().all(|byte| *byte == 0));
    early.begin(&sha256(), true).unwrap();
    assert!(measure(&mut early, 1));
}

#[test]
fn without_a_locality_batches_are_logged_and_not_replayed() {
    let mut log = Box::new(ExposureLog::<SMALL>::new());
    log.begin(&sha256(), false).unwrap();
    for n in 0..200 {
        log.record(&write(n));
        measure(&mut log, n);
    }
    let bytes = bytes(&log);
    let exposure = Exposure::parse(&bytes).unwrap();
    assert!(exposure.anchor().batches.get() > 0);
    assert_eq!(exposure.replay().unwrap(), Digests::zero(&sha256()));
    assert!(exposure.entries().all(|entry| entry.unwrap().false_digest().is_none()));
}

/// The batches of a log with two relaunches, and where PCR 22 was when each of its three chains ended.
fn relaunched_twice() -> (Vec<u8>, [Digests; 3]) {
    let mut log = begun::<SMALL>();
    let ends = core::array::from_fn(|round| {
        if round != 0 {
            assert_eq!(log.relaunched(round as u64, 0, 5), Ok(Urgency::AtOnce));
        }
        for n in 0..3 {
            log.record(&write(n));
            measure(&mut log, n);
        }
        Exposure::parse(&bytes(&log)).unwrap().replay().unwrap()
    });
    (bytes(&log), ends)
}

/// What is wrong with the chains of a log.
fn broken(exposure: &Exposure<'_>) -> Vec<LinkError> {
    let mut chain = exposure.chain();
    exposure.entries().filter_map(|entry| chain.follow(&entry.unwrap()).err()).collect()
}

#[test]
fn a_relaunch_begins_a_chain_that_is_bound_to_the_one_before() {
    let (bytes, ends) = relaunched_twice();
    let exposure = Exposure::parse(&bytes).unwrap();
    assert_eq!(broken(&exposure), []);
    let value = |end: &Digests| <[u8; 32]>::try_from(end.get(HashAlg::SHA256).unwrap().as_bytes()).unwrap();
    let links: Vec<_> = exposure.entries().map(|entry| entry.unwrap().batch.relaunch()).collect();
    let none = [None, None];
    assert_eq!(links[..4], [&[None][..], &none, &[Some((1, value(&ends[0])))]].concat());
    assert_eq!(links[4..], [&none[..], &[Some((2, value(&ends[1])))], &none].concat());
    // Only the last chain is in the PCR.
    let mut last = Digests::zero(&sha256());
    for entry in exposure.entries().skip(6) {
        last = extended_all(&last, &entry.unwrap().event.digests);
    }
    assert_eq!(exposure.replay().unwrap(), last);
}

#[test]
fn records_that_wait_keep_a_chain_from_beginning() {
    let mut log = begun::<SMALL>();
    log.record(&write(0));
    assert!(log.relaunched(1, 0, 0).is_err());
    measure(&mut log, 0);
    assert!(log.relaunched(1, 0, 0).is_ok());
    // Until the record is measured the PCR is zero, as the log says.
    assert_eq!(Exposure::parse(&bytes(&log)).unwrap().replay().unwrap(), Digests::zero(&sha256()));
    let mut sha1 = Box::new(ExposureLog::<SMALL>::new());
    sha1.begin(&banks(&[HashAlg::SHA1]), true).unwrap();
    assert!(sha1.relaunched(1, 0, 0).is_err(), "nothing to bind it by");
}

/// Someone changes what was before a relaunch, digests and all. The PCR does not show it; the link does.
#[test]
fn an_old_chain_that_was_changed_is_found_though_the_pcr_is_right() {
    let (bytes, _) = relaunched_twice();
    let whole = Exposure::parse(&bytes).unwrap();
    let entries: Vec<_> = whole.entries().map(Result::unwrap).collect();
    let rewritten = |change: &dyn Fn(usize, &mut Vec<u8>) -> bool| {
        let mut out = vec![0; bytes.len()];
        let mut writer = tpm::LogWriter::create(&mut out, &sha256()).unwrap();
        let anchor = tpm::Log::parse(&bytes).unwrap().events().next().unwrap().unwrap();
        writer.append(anchor.pcr, anchor.event_type, &anchor.digests, anchor.data).unwrap();
        for (index, entry) in entries.iter().enumerate() {
            let mut data = entry.event.data.to_vec();
            if change(index, &mut data) {
                let Entry { event, .. } = entry;
                writer.append(event.pcr, event.event_type, &digests(&sha256(), &data), &data).unwrap();
            }
        }
        let exposure = Exposure::parse(&out).unwrap();
        assert!(exposure.entries().all(|entry| entry.unwrap().false_digest().is_none()));
        (broken(&exposure), exposure.replay().unwrap() == whole.replay().unwrap())
    };
    assert_eq!(rewritten(&|_, _| true), (vec![], true));
    let value = |index: usize| entries[index].batch.relaunch().unwrap().1;
    // The status of a record of the first chain.
    let changed = rewritten(&|index, data| {
        data[64 + 26] ^= u8::from(index == 1);
        true
    });
    assert_eq!(changed, (vec![LinkError::Value { round: 1, said: value(3) }], true));
    // A batch of the second chain is left out, or the relaunch itself.
    let left_out = (vec![LinkError::Value { round: 2, said: value(6) }], true);
    assert_eq!(rewritten(&|index, _| index != 4), left_out);
    let hidden = rewritten(&|index, _| index != 3);
    assert_eq!(hidden.0.len(), 1, "{hidden:?}");
    // All of the first chain is left out.
    assert_eq!(
        rewritten(&|index, _| index >= 3),
        (vec![LinkError::Value { round: 1, said: value(3) }], true)
    );
    // What the last chain says of itself is in the PCR.
    let (_, same) = rewritten(&|index, data| {
        if index == 6 {
            data[64 + 46 + 8] ^= 1;
        }
        true
    });
    assert!(!same);
}

#[test]
fn rounds_are_counted() {
    let mut log = begun::<SMALL>();
    log.record(&write(0));
    measure(&mut log, 0);
    for round in [2, 3, 3] {
        log.relaunched(round, 0, 0).unwrap();
        measure(&mut log, 0);
    }
    let bytes = bytes(&log);
    let wrong = [LinkError::Round { round: 2, wanted: 1 }, LinkError::Round { round: 3, wanted: 4 }];
    assert_eq!(broken(&Exposure::parse(&bytes).unwrap()), wrong);
}

#[test]
fn a_relaunch_without_its_value_is_refused() {
    let bytes = encoded(&Record::new(Kind::RELAUNCHED, 0, 0), 0);
    let error = Record::parse(&bytes).unwrap_err().to_string();
    assert_eq!(error, "exposure log: record.tails of a relaunch is 0x0, limit 0x4");
}

#[test]
fn digests_of_other_banks_change_nothing() {
    let mut log = begun::<SMALL>();
    assert!(log.extended(&digests(&sha256(), b"")).is_err(), "nothing is sealed");
    log.record(&write(0));
    assert!(log.seal(0).is_some());
    assert!(log.extended(&digests(&banks(&[HashAlg::SHA1]), b"")).is_err());
    assert_eq!(log.counters().pending, 1);
    assert!(measure(&mut log, 0));
}

#[test]
fn a_batch_with_another_content_is_found() {
    let mut log = begun::<SMALL>();
    log.record(&write(0));
    measure(&mut log, 0);
    let mut bytes = bytes(&log);
    let end = bytes.iter().rposition(|byte| *byte != 0).unwrap();
    bytes[end] ^= 1;
    let exposure = Exposure::parse(&bytes).unwrap();
    let entry = exposure.entries().next().unwrap().unwrap();
    assert_eq!(entry.false_digest(), Some(HashAlg::SHA256));
}

#[test]
fn refusals_name_field_value_and_limit() {
    let mut log = begun::<SMALL>();
    log.record(&Record { text: Some(Text::new("why")), ..write(0) });
    let batch = log.seal(0).unwrap().to_vec();
    let message = |at: usize, value: u8| {
        let mut batch = batch.clone();
        batch[at] = value;
        match Batch::parse(&batch).map(|batch| batch.records().find_map(Result::err)) {
            Ok(error) => error.unwrap().to_string(),
            Err(error) => error.to_string(),
        }
    };
    assert_eq!(message(0, 0), "exposure log: batch.tag is 0x42505800, limit 0x42505843");
    assert_eq!(message(4, 0xff), "exposure log: batch.size is 0xff, limit 0x6a");
    assert_eq!(message(8, 9), "exposure log: batch.version is 0x9, limit 0x1");
    assert_eq!(message(15, 0x80), "exposure log: batch.count is 0x80000001, limit 0x1");
    assert_eq!(message(12, 0), "exposure log: bytes after a batch's records is 0x32, limit 0x0");
    assert_eq!(message(64, 0xff), "exposure log: record.size needs 255 bytes, there are 50");
    assert_eq!(message(64, 3), "exposure log: record needs 46 bytes, there are 3");
    assert_eq!(message(64, 49), "exposure log: record.text needs 3 bytes, there are 2");
    assert_eq!(message(69, 0), "exposure log: record.size is 0x32, limit 0x2e");
    assert_eq!(message(69, 0x20), "exposure log: record.tails is 0x20, limit 0x1f");
    assert_eq!(message(64 + 46, 46), "exposure log: record.text.length is 0x2e, limit 0x2d");
    assert_eq!(
        Exposure::parse(&[]).err().map(|e| e.to_string()).unwrap(),
        "exposure log: event log: record at offset 0x0 ends before its field first record"
    );
}

/// What may happen to a log.
#[derive(Clone, Debug)]
enum Step {
    Record(Box<Record>),
    /// Seals; records what follows before the TPM is done, or has the TPM fail.
    Measure {
        meanwhile: Vec<Record>,
        fails: bool,
        late: bool,
    },
    Relaunch,
}

fn name() -> impl Strategy<Value = Name> {
    prop::collection::vec(any::<u8>(), 0..200).prop_map(|utf16| Name::new(&utf16))
}

prop_compose! {
    fn tails()(
        variable in prop::option::of((any::<[u8; 16]>(), name())),
        denied in prop::option::of(any::<(u16, u16, u16, u16, u32, u64)>()),
        region in prop::option::weighted(0.1, any::<(u64, u64, [u8; 32])>()),
        access in prop::option::weighted(0.1, any::<(u32, u64, u8)>()),
        text in prop::option::weighted(0.2, ".{0,50}"),
    ) -> Record {
        Record {
            variable: variable.map(|(guid, name)| Variable { guid: Guid::from_bytes(guid), name }),
            denied: denied.map(|(ports, msrs, memory, last_port, last_msr, last_address)| {
                Denied { ports, msrs, memory, last_port, last_msr, last_address }
            }),
            region: region.map(|(base, size, sha256)| Region { base, size, sha256 }),
            access: access.map(|(source, address, how)| Access { source, address, how }),
            text: text.map(Text::new),
            ..read(0)
        }
    }
}

/// Not of a relaunch: that record has a place of its own.
fn any_kind() -> impl Strategy<Value = Kind> {
    any::<u8>().prop_map(Kind).prop_filter("not of a relaunch", |kind| *kind != Kind::RELAUNCHED)
}

prop_compose! {
    fn record()(
        kind in any_kind(), service in any::<u8>(), smi_command in any::<u8>(), decision in any::<u8>(),
        cpu in any::<u32>(), time_us in any::<u64>(), status in any::<u64>(),
        (duration_us, exits, smis) in any::<(u32, u32, u32)>(),
        tails in prop_oneof![2 => Just(read(0)), 1 => tails()],
    ) -> Record {
        Record {
            kind, service, smi_command, decision: Decision(decision), cpu, time_us, status,
            duration_us, exits, smis, ..tails
        }
    }
}

fn step() -> impl Strategy<Value = Step> {
    let measure =
        (prop::collection::vec(record(), 0..3), prop::bool::weighted(0.1), prop::bool::weighted(0.1))
            .prop_map(|(meanwhile, fails, late)| Step::Measure { meanwhile, fails, late });
    let record = record().prop_map(|record| Step::Record(Box::new(record)));
    prop_oneof![12 => record, 4 => measure, 1 => Just(Step::Relaunch)]
}

fn some_banks() -> impl Strategy<Value = Banks> {
    let all = [HashAlg::SHA256, HashAlg::SHA1, HashAlg::SHA384, HashAlg::SHA512];
    (1..=4_usize, any::<bool>()).prop_map(move |(n, unknown)| {
        let mut banks = banks(&all[..n]);
        if unknown {
            banks.push(Bank { alg: HashAlg(0x12), size: 32 }).unwrap();
        }
        banks
    })
}

/// Runs `steps` and compares the log that is read with a model that forgets nothing.
fn agrees_with_the_model<const N: usize>(banks: &Banks, steps: &[Step]) -> Result<(), TestCaseError> {
    let mut log = Box::new(ExposureLog::<N>::new());
    log.begin(banks, true).unwrap();
    let mut made: Vec<Record> = Vec::new();
    let mut pcr = Digests::zero(banks);
    let (mut late, mut rounds) = (0, 0);
    for step in steps {
        match step {
            Step::Record(record) => {
                made.push(**record);
                log.record(record);
            }
            Step::Relaunch => {
                if log.relaunched(rounds + 1, 2, 3).is_err() {
                    prop_assert_ne!(log.counters().pending, 0);
                    continue;
                }
                rounds += 1;
                let before = pcr.get(HashAlg::SHA256).unwrap().as_bytes().try_into().unwrap();
                made.push(Record::relaunched(rounds, before, 2, 3));
                pcr = Digests::zero(banks);
            }
            Step::Measure { meanwhile, fails, late: now_late } => {
                if *now_late {
                    log.mark_late();
                }
                let Some(batch) = log.seal(made.len() as u64).map(<[u8]>::to_vec) else { continue };
                late += u64::from(Batch::parse(&batch).unwrap().header.flags == FLAG_LATE && !fails);
                for record in meanwhile {
                    made.push(*record);
                    log.record(record);
                }
                if !fails {
                    let digests = digests(banks, &batch);
                    pcr = extended_all(&pcr, &digests);
                    log.extended(&digests).unwrap();
                }
            }
        }
    }
    let bytes = bytes(&log);
    let exposure = Exposure::parse(&bytes).unwrap();
    prop_assert_eq!(exposure.replay().unwrap(), pcr);
    let counters = *log.counters();
    let anchor = *exposure.anchor();
    prop_assert_eq!(
        (anchor.batches.get(), anchor.records.get()),
        (counters.spilled_batches, counters.spilled)
    );
    let mut chain = exposure.chain();
    let (mut present, mut pending, mut number, mut highest) = (0, 0, anchor.batches.get(), None);
    for entry in exposure.entries() {
        let entry = entry.unwrap();
        prop_assert_eq!(entry.false_digest(), None);
        prop_assert_eq!(chain.follow(&entry), Ok(()));
        let batch = entry.batch;
        let header = batch.header;
        prop_assert_eq!(header.number.get(), number);
        prop_assert!(header.spilled.get() <= counters.spilled && header.lost.get() <= counters.lost);
        prop_assert_eq!(batch.records().next().unwrap().unwrap().0, header.first.get());
        prop_assert_eq!(batch.records().count(), header.count.get() as usize);
        for record in batch.records() {
            let (sequence, record) = record.unwrap();
            prop_assert_eq!(record, made[sequence as usize]);
            prop_assert!(highest.replace(sequence) < Some(sequence));
        }
        let count = u64::from(header.count.get());
        if entry.pending {
            pending += count;
        } else {
            (present, number) = (present + count, number + 1);
        }
    }
    prop_assert!(chain.round.is_none_or(|round| round == rounds));
    prop_assert_eq!(counters.batches, number);
    prop_assert_eq!(counters.pending, pending);
    prop_assert_eq!(counters.records, made.len() as u64);
    prop_assert_eq!(counters.records, present + counters.spilled + counters.lost + pending);
    prop_assert_eq!(counters.late, late);
    Ok(())
}

proptest! {
    #[test]
    fn a_name_is_what_the_standard_library_makes_of_it(
        ascii in "[ -~]{0,70}", rest in prop::collection::vec(any::<u16>(), 0..6)
    ) {
        let units: Vec<u16> = ascii.encode_utf16().chain(rest).collect();
        let whole: Vec<u16> = units.iter().copied().take_while(|unit| *unit != 0).collect();
        let whole = String::from_utf16_lossy(&whole);
        let bytes: Vec<u8> = units.iter().flat_map(|unit| unit.to_le_bytes()).collect();
        let name = Name::new(&bytes);
        prop_assert_eq!(usize::from(name.full_length()), whole.len());
        prop_assert_eq!(name.as_bytes(), &whole.as_bytes()[..whole.len().min(64)]);
    }

    #[test]
    fn records_are_what_they_were(record in record(), sequence: u64, after: Vec<u8>) {
        let mut bytes = encoded(&record, sequence);
        let mut short = vec![0; bytes.len() - 1];
        prop_assert_eq!(record.encode(sequence, &mut short), None);
        bytes.extend_from_slice(&after);
        prop_assert_eq!(Record::parse(&bytes), Ok((sequence, record, &after[..])));
    }

    #[test]
    fn no_bytes_make_the_reader_panic(
        steps in prop::collection::vec(step(), 0..30),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..20),
        random in prop::collection::vec(any::<u8>(), 0..300),
    ) {
        let mut log = begun::<SMALL>();
        for step in steps {
            match step {
                Step::Record(record) => drop(log.record(&record)),
                Step::Measure { .. } => drop(measure(&mut log, 0)),
                Step::Relaunch => drop(log.relaunched(1, 0, 0)),
            }
        }
        let mut changed = bytes(&log);
        changed.truncate(changed.iter().rposition(|byte| *byte != 0).unwrap() + 1);
        for (at, value) in changes {
            let at = at.index(changed.len());
            changed[at] = value;
        }
        for bytes in [&changed, &random] {
            if let Ok(exposure) = Exposure::parse(bytes) {
                let _ = exposure.replay();
                for entry in exposure.entries().flatten() {
                    let _ = entry.false_digest();
                    let _ = entry.batch.records().count();
                }
            }
        }
        if let Ok(batch) = Batch::parse(&random) {
            let _ = batch.records().count();
        }
        let _ = Record::parse(&random);
    }
}

proptest! {
    // Each case is hundreds of hashes.
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn the_log_leads_to_the_pcr_and_accounts_for_every_record(
        banks in some_banks(), steps in prop::collection::vec(step(), 0..250)
    ) {
        agrees_with_the_model::<SMALL>(&banks, &steps)?;
        agrees_with_the_model::<{ 16 * 1024 }>(&banks, &steps)?;
        agrees_with_the_model::<DEFAULT_SIZE>(&banks, &steps)?;
    }
}
