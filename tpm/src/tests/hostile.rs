//! Responses that no honest TPM sends, and those that an honest one sends seldom.

use proptest::prelude::*;
use tpm2_protocol::frame::TpmCommand;

use super::{ALL, launched, open};
use crate::model::{Crb, Fifo};
use crate::{Error, Field, HashAlg, MAX_BANKS};

/// The error of an open when the first command is answered with `answer`.
fn answered(answer: &[u8]) -> Option<Error> {
    let fifo = Fifo::new(launched());
    fifo.state().tpm.answer.push_back(answer.to_vec());
    let error = open(&fifo).0.err();
    assert!(fifo.is_idle());
    error
}

/// A GetCapability response with these selections.
fn banks(count: u32, selections: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0x80, 1, 0, 0, 0, 19 + selections.len() as u8, 0, 0, 0, 0, 0, 0, 0, 0, 5];
    bytes.extend(count.to_be_bytes());
    bytes.extend(selections);
    bytes
}

#[test]
fn commands_are_those_of_the_specification() {
    let fifo = Fifo::new(crate::model::FakeTpm::with(&[HashAlg::SHA256]));
    fifo.state().tpm.drtm(b"");
    let mut tpm = open(&fifo).0.unwrap();
    tpm.extend(17, &tpm.digests_of(b"abc")).unwrap();
    tpm.read_pcr(HashAlg::SHA256, 17).unwrap();
    let seen: Vec<_> = fifo.state().tpm.seen.iter().map(|(_, bytes)| hex::encode(bytes)).collect();
    assert_eq!(
        seen,
        [
            "80010000001600000\
             17a000000050000000000000001",
            "80020000004100000182000000110000000940000009000000000000000001000b\
             ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
            "8001000000140000017e00000001000b03000002",
        ]
    );
    // An independent reader of the format agrees.
    for (_, bytes) in &fifo.state().tpm.seen {
        TpmCommand::cast(bytes).unwrap().validate().unwrap();
    }
}

/// A CreatePrimary response: handle, sizes of what describes the object, ticket.
fn created(tag: u16, hierarchy: u32, ticket: &[u8]) -> Vec<u8> {
    let mut bytes =
        vec![0x80, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0x80, 0, 0, 1, 0, 0, 0, 0, 0, 1, 0xaa, 0, 0, 0, 2, 0xbb, 0xcc];
    bytes.extend(tag.to_be_bytes());
    bytes.extend(hierarchy.to_be_bytes());
    bytes.extend((ticket.len() as u16).to_be_bytes());
    bytes.extend(ticket);
    bytes[5] = bytes.len() as u8;
    bytes
}

#[test]
fn tickets_are_those_of_the_specification() {
    let fifo = Fifo::new(launched());
    let mut tpm = open(&fifo).0.unwrap();
    let clock = |size: u8| {
        [&[0x80, 1, 0, 0, 0, size][..], &[0; 23], &[2, 0, 0, 0, 3], &[0; 9]].concat()[..size.into()].to_vec()
    };
    let mut asked = |answer: Vec<u8>| {
        let commands = fifo.state().tpm.seen.len();
        fifo.state().tpm.answer.push_back(clock(35));
        // The model knows no objects: what it is asked after this answer it refuses.
        fifo.state().tpm.answer.push_back(answer);
        let result = tpm.vouch(&[18, 8, 17], &[0x5a; 32]);
        (result, fifo.state().tpm.seen[commands..].to_vec())
    };
    let (result, seen) = asked(created(0x8021, 0x4000_0007, &[9; 48]));
    assert_eq!(result, Err(Error::Refused { command: 0x165, rc: 0x143 }), "the object is flushed");
    let [(2, read_clock), (2, create), (2, flush)] = &seen[..] else { panic!("{seen:?}") };
    assert_eq!(hex::encode(read_clock), "80010000000a00000181");
    assert_eq!(hex::encode(flush), "80010000000e0000016580000001");
    for command in [read_clock, create, flush] {
        TpmCommand::cast(command).unwrap().validate().unwrap();
    }
    let outside =
        crate::digest_of(HashAlg::SHA256, &[&[0x5a; 32], &[0, 0, 0, 2, 0, 0, 0, 3]]).unwrap().to_string();
    assert_eq!(
        hex::encode(create),
        "8002".to_owned()
            + "0000005f"
            + "00000131"
            + "40000007"
            + "00000009"
            + "400000090000000000"
            + "000400000000"
            + "0010"
            + "0008"
            + "000b"
            + "00040472"
            + "0000"
            + "0005"
            + "000b"
            + "0000"
            + "0020"
            + &outside
            + "00000001"
            + "000b"
            + "03"
            + "000106"
    );
    let bad = |value| Err(Error::Response { field: Field::Ticket, value });
    assert_eq!(asked(created(0x8022, 0x4000_0007, &[9; 48])).0, bad(0x8022));
    assert_eq!(asked(created(0x8021, 0x4000_0001, &[9; 48])).0, bad(0x4000_0001));
    assert_eq!(asked(created(0x8021, 0x4000_0007, &[9; 65])).0, bad(65));
    for size in [34, 36] {
        fifo.state().tpm.answer.push_back(clock(size));
        let field = if size < 35 { Field::Clock } else { Field::Trailing };
        let error = Error::Response { field, value: u32::from(size > 35) };
        assert_eq!(tpm.vouch(&[17], &[0; 32]), Err(error));
    }
    assert_eq!(tpm.vouch(&[24], &[0; 32]), Err(Error::Response { field: Field::Pcr, value: 24 }));
}

#[test]
fn a_busy_tpm_is_asked_again() {
    let fifo = Fifo::new(launched());
    fifo.state().tpm.refuse.extend([0x922, 0x908, 0x90a]);
    assert!(open(&fifo).0.is_ok());
    assert_eq!(fifo.state().tpm.seen.len(), 4);
}

#[test]
fn but_not_for_ever() {
    let fifo = Fifo::new(launched());
    fifo.state().tpm.refuse.extend([0x922; 40_000]);
    let (tpm, time) = open(&fifo);
    assert_eq!(tpm.err(), Some(Error::Refused { command: 0x17a, rc: 0x922 }));
    assert!((30_000..31_000).contains(&time), "{time} ms");
}

#[test]
fn a_tpm_that_was_not_started_is_refused() {
    let fifo = Fifo::new(launched());
    fifo.state().tpm.refuse.push_back(0x100);
    assert_eq!(open(&fifo).0.err(), Some(Error::NotStarted));
    assert_eq!(fifo.state().active, None);
}

#[test]
fn malformed_responses_are_named() {
    let field = |field, value| Some(Error::Response { field, value });
    let size = |size| Some(Error::ResponseSize { size, limit: 576 });
    let sha256: &[u8] = &[0, 11, 3, 255, 255, 255];
    for (answer, error) in [
        // A TPM 1.2.
        (vec![0, 0xc4, 0, 0, 0, 10, 0, 0, 0, 0x1e], field(Field::Tag, 0xc4)),
        (vec![0x80, 1, 0, 0, 0, 9, 0, 0, 0, 0], size(9)),
        (vec![0x80, 1, 0, 0, 2, 0x41, 0, 0, 0, 0], size(577)),
        (vec![0x80, 1, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0], size(u32::MAX)),
        (vec![0x80, 1, 0, 0, 0, 10, 0, 0, 0, 0], field(Field::MoreData, 0)),
        (vec![0x80, 1, 0, 0, 0, 11, 0, 0, 0, 0, 1], field(Field::MoreData, 1)),
        (vec![0x80, 1, 0, 0, 0, 15, 0, 0, 0, 0, 0, 0, 0, 0, 6], field(Field::Capability, 6)),
        (banks(2, sha256), field(Field::Hash, 0)),
        (banks(u32::MAX, sha256), field(Field::Hash, 0)),
        (banks(0, sha256), field(Field::Trailing, 6)),
        (banks(1, &[0, 11, 4, 255, 255, 255]), field(Field::Select, 0)),
        (banks(2, &[sha256, sha256].concat()), field(Field::Hash, 11)),
        (banks(0, &[]), Some(Error::NoBanks)),
        (banks(1, &[0, 11, 3, 0, 0, 0]), Some(Error::NoBanks)),
        (
            banks(9, &(0..=MAX_BANKS as u8).flat_map(|n| [1, n, 3, 255, 255, 255]).collect::<Vec<_>>()),
            Some(Error::TooManyBanks),
        ),
        // An unknown bank whose size the TPM then does not tell.
        (banks(1, &[0x77, 0x77, 3, 255, 255, 255]), field(Field::Hash, 0x7777)),
    ] {
        assert_eq!(answered(&answer), error, "{answer:x?}");
    }
}

#[test]
fn a_pcr_of_another_size_or_bank_is_refused() {
    let fifo = Fifo::new(launched());
    let mut tpm = open(&fifo).0.unwrap();
    let mut read = |change: fn(&mut Vec<u8>)| {
        let mut answer = vec![0x80, 1, 0, 0, 0, 62, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1];
        answer.extend([0, 11, 3, 0, 0, 2, 0, 0, 0, 1, 0, 32]);
        answer.extend([5; 32]);
        change(&mut answer);
        fifo.state().tpm.answer.push_back(answer);
        tpm.read_pcr(HashAlg::SHA256, 17)
    };
    assert_eq!(read(|_| ()).unwrap().unwrap().as_bytes(), [5; 32]);
    let bad = |field, value| Err(Error::Response { field, value });
    assert_eq!(read(|a| a[19] = 12), bad(Field::Hash, 12));
    assert_eq!(read(|a| a[17] = 2), bad(Field::SelectionCount, 2));
    assert_eq!(read(|a| a[23] = 4), bad(Field::DigestCount, 1));
    assert_eq!(read(|a| a[27] = 2), bad(Field::DigestCount, 2));
    assert_eq!(read(|a| a[29] = 33), bad(Field::Digest, 0));
    assert_eq!(read(|a| a[29] = 31), bad(Field::Trailing, 1));
    assert_eq!(
        read(|a| {
            a.pop();
            (a[5], a[29]) = (61, 31);
        }),
        bad(Field::DigestSize, 31)
    );
    assert_eq!(tpm.read_pcr(HashAlg::SHA256, 24), bad(Field::Pcr, 24));
    assert_eq!(tpm.read_pcr(HashAlg::SHA256, 32), bad(Field::Pcr, 32));
}

/// Answers of any bytes, most of them with a header that gets past the first checks.
fn any_answer() -> impl Strategy<Value = Vec<u8>> {
    (prop::collection::vec(any::<u8>(), 10..300), any::<bool>(), any::<bool>()).prop_map(
        |(mut bytes, sized, good)| {
            if sized {
                let size = bytes.len() as u32;
                bytes[2..6].copy_from_slice(&size.to_be_bytes());
                bytes[..2].copy_from_slice(&[0x80, 1]);
            }
            if good {
                bytes[6..10].fill(0);
            }
            bytes
        },
    )
}

proptest! {
    #[test]
    fn no_answer_makes_the_driver_panic(answers in prop::collection::vec(any_answer(), 1..4)) {
        let fifo = Fifo::new(launched());
        fifo.state().tpm.answer.extend(answers.clone());
        let _ = open(&fifo).0;
        prop_assert!(fifo.is_idle());
        let crb = Crb::new(launched());
        crb.state().tpm.answer.extend(answers.clone());
        let _ = open(&crb).0;
        prop_assert!(crb.state().idle);
        let fifo = Fifo::new(launched());
        let mut tpm = open(&fifo).0.unwrap();
        for answer in answers {
            for clock in [true, false] {
                let good = [&[0x80, 1, 0, 0, 0, 35][..], &[0; 20], &[1; 9]].concat();
                fifo.state().tpm.answer.extend(clock.then_some(good).into_iter().chain([answer.clone()]));
                let _ = tpm.vouch(&[17], &[0; 32]);
                fifo.state().tpm.answer.clear();
            }
            fifo.state().tpm.answer.push_back(answer);
            let _ = tpm.read_pcr(HashAlg::SHA256, 17);
            let _ = tpm.extend(17, &tpm.digests_of(b"x"));
        }
    }

    #[test]
    fn nor_does_an_honest_one_with_a_byte_changed(at in 0_usize..43, value: u8) {
        let all = ALL.len() as u32;
        let mut answer = banks(all, &ALL.map(|alg| [0, alg.0 as u8, 3, 255, 255, 255]).concat());
        answer[at] = value;
        let fifo = Fifo::new(launched());
        fifo.state().tpm.answer.push_back(answer);
        let _ = open(&fifo).0;
        prop_assert!(fifo.is_idle());
    }
}
