//! The log's bytes against a copy typed from the specification, public tools and hostile changes.

use proptest::prelude::*;

use super::*;

fn banks(algs: &[HashAlg]) -> Banks {
    algs.iter().map(|alg| Bank::computed(*alg).unwrap()).collect()
}

/// SHA-1 and SHA-256, two events.
fn sample() -> Vec<u8> {
    let banks = banks(&[HashAlg::SHA1, HashAlg::SHA256]);
    let mut buffer = vec![0; 4096];
    let mut log = LogWriter::create(&mut buffer, &banks).unwrap();
    for (pcr, event) in [(17, "SKINIT"), (18, "")] {
        let mut hasher = crate::BankHasher::new(&banks);
        hasher.update(b"abc");
        log.append(pcr, 0x502, &hasher.finish(), event.as_bytes()).unwrap();
    }
    let used = log.used();
    buffer.truncate(used);
    buffer
}

#[test]
fn the_bytes_are_the_specified_ones() {
    let abc = "0400a9993e364706816aba3e25717850c26c9cd0d89d\
               0b00ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
    let expected = [
        // PCR 0, EV_NO_ACTION, no digest, 37 bytes
        "0000000003000000000000000000000000000000000000000000000025000000",
        // "Spec ID Event03", class, 2.0 errata 0, 64-bit
        "53706563204944204576656e743033000000000000020002",
        // two banks, no vendor information
        "02000000040014000b00200000",
        "110000000205000002000000",
        abc,
        "06000000534b494e4954",
        "120000000205000002000000",
        abc,
        "00000000",
    ];
    assert_eq!(hex::encode(sample()), expected.concat());
}

#[test]
fn what_is_written_is_read() {
    let bytes = sample();
    let log = Log::parse(&bytes).unwrap();
    let events: Vec<_> = log.events().map(Result::unwrap).collect();
    assert_eq!(events.len(), 2);
    assert_eq!((events[0].offset, events[0].pcr, events[0].data), (69, 17, &b"SKINIT"[..]));
    assert_eq!((events[1].pcr, events[1].event_type, events[1].data), (18, 0x502, &b""[..]));
    // SHA-256 of 32 zeros and SHA-256("abc"), by sha256sum.
    assert_eq!(
        log.replay(HashAlg::SHA256, 17).unwrap().to_string(),
        "589f9ffed4c477966bfb8d41f37895b08c69047df8f911d6f3b57fbe08faee8d"
    );
    assert_eq!(log.replay(HashAlg::SHA384, 17), Err(LogError::NoSuchBank { alg: 12 }));
}

#[test]
fn zeros_after_the_last_event_are_its_end() {
    let mut bytes = sample();
    bytes.resize(4096, 0);
    assert_eq!(Log::parse(&bytes).unwrap().events().filter(Result::is_ok).count(), 2);
    bytes[4095] = 1;
    assert!(Log::parse(&bytes).unwrap().events().any(|event| event.is_err()));
}

#[test]
fn events_of_no_action_are_not_replayed() {
    let mut bytes = sample();
    bytes[69 + 4..69 + 8].copy_from_slice(&EV_NO_ACTION.to_le_bytes());
    let log = Log::parse(&bytes).unwrap();
    assert_eq!(log.replay(HashAlg::SHA1, 17).unwrap().as_bytes(), [0; 20]);
}

#[test]
fn a_log_cut_anywhere_but_between_events_is_refused() {
    let bytes = sample();
    let whole = [69, 69 + 12 + 56 + 10, bytes.len()];
    for end in 0..bytes.len() {
        let events = Log::parse(&bytes[..end]).map(|log| log.events().all(|event| event.is_ok()));
        // A piece that is all zeros cannot be told from the end; there is none in this log.
        assert_eq!(events == Ok(true), whole.contains(&end), "cut at {end}: {events:?}");
    }
}

#[test]
fn faults_are_named_with_their_record() {
    let good = sample();
    let field = |field, value, record| Some(LogError::Field { field, value, record });
    for (at, value, error) in [
        (0, 1, field("PCR, type or digest of the first record", 0, 0)),
        (32, 0, field("signature", 0, 0)),
        (56, 0, field("numberOfAlgorithms", 0, 0)),
        (60, 0xb, field("digestSize", 20, 0)),
        (62, 65, field("digestSize", 65, 0)),
        (64, 4, field("digestSize", 32, 0)),
        (69, 24, field("pcrIndex", 24, 69)),
        (77, 1, field("digest count", 1, 69)),
        (77, 3, field("digest count", 3, 69)),
        (81, 9, field("hashAlg", 9, 69)),
        (81 + 22, 4, field("hashAlg", 4, 69)),
        (140, 1, Some(LogError::Truncated { field: "event", record: 69 })),
    ] {
        let mut bytes = good.clone();
        bytes[at] = value;
        let found = match Log::parse(&bytes) {
            Err(error) => Some(error),
            Ok(log) => log.events().find_map(Result::err),
        };
        assert_eq!(found, error, "byte {at} = {value}");
    }
}

#[test]
fn a_full_log_stays_as_it_was() {
    let banks = banks(&[HashAlg::SHA256]);
    let digests = Digests::cap(&banks);
    let mut buffer = [0xee; 65 + 16 + 34 + 4];
    assert!(LogWriter::create(&mut buffer[..64], &banks).is_err());
    let mut log = LogWriter::create(&mut buffer, &banks).unwrap();
    assert_eq!(log.used(), 65);
    assert_eq!(log.append(17, 1, &digests, b"12345"), Err(Error::LogFull { need: 55, have: 54 }));
    assert_eq!(log.append(17, 1, &Digests::default(), b""), Err(Error::Digests));
    assert_eq!(log.used(), 65);
    log.append(17, 1, &digests, b"1234").unwrap();
    assert_eq!(log.append(17, 1, &digests, b""), Err(Error::LogFull { need: 50, have: 0 }));
}

#[test]
fn a_log_is_continued_only_with_its_own_banks() {
    let bytes = sample();
    let mut buffer = bytes.clone();
    buffer.resize(4096, 0x55);
    let own = banks(&[HashAlg::SHA1, HashAlg::SHA256]);
    for wrong in [banks(&[HashAlg::SHA256]), banks(&[HashAlg::SHA256, HashAlg::SHA1]), Banks::new()] {
        assert_eq!(LogWriter::resume(&mut buffer, bytes.len(), &wrong).err(), Some(LogError::Resume));
    }
    assert_eq!(LogWriter::resume(&mut buffer, 4097, &own).err(), Some(LogError::Resume));
    assert_eq!(LogWriter::resume(&mut buffer, 20, &own).err(), Some(LogError::Resume));
    let mut log = LogWriter::resume(&mut buffer, bytes.len(), &own).unwrap();
    log.append(19, 0x502, &Digests::cap(&own), b"more").unwrap();
    let used = log.used();
    let last = Log::parse(&buffer[..used]).unwrap().events().last().unwrap().unwrap();
    assert_eq!((last.pcr, last.data), (19, &b"more"[..]));
}

/// Runs the public tool where it is installed; the golden bytes above are the check that always runs.
#[test]
fn tpm2_eventlog_reads_and_replays_it() {
    let file = std::env::temp_dir().join(format!("cordon-log-{}", std::process::id()));
    std::fs::write(&file, sample()).unwrap();
    let output = std::process::Command::new("tpm2_eventlog").arg(&file).output();
    std::fs::remove_file(&file).unwrap();
    let output = match output {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            eprintln!("tpm2_eventlog is not installed: not run");
            return;
        }
        other => other.unwrap(),
    };
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let bytes = sample();
    let log = Log::parse(&bytes).unwrap();
    for alg in [HashAlg::SHA1, HashAlg::SHA256] {
        for pcr in [17, 18] {
            let line = format!("{pcr} : 0x{}", log.replay(alg, pcr).unwrap());
            assert!(text.contains(&line), "{line} not in:\n{text}");
        }
    }
}

proptest! {
    #[test]
    fn no_bytes_make_the_reader_panic(bytes: Vec<u8>) {
        let _ = Log::parse(&bytes).map(|log| log.events().count());
    }

    #[test]
    fn nor_does_a_log_with_bytes_changed(changes in prop::collection::vec((0_usize..220, any::<u8>()), 1..6)) {
        let mut bytes = sample();
        for (at, value) in changes {
            if let Some(byte) = bytes.get_mut(at) {
                *byte = value;
            }
        }
        if let Ok(log) = Log::parse(&bytes) {
            prop_assert!(log.events().count() < 100);
            let _ = log.replay(HashAlg::SHA256, 17);
        }
        let own = banks(&[HashAlg::SHA1, HashAlg::SHA256]);
        let _ = LogWriter::resume(&mut bytes, 100, &own);
    }
}
