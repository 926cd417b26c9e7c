//! The hand-over against a gap that may change every bit of it. What the TPM knows of the root is tested in `tpm`.

use proptest::prelude::*;
use tpm::model::{FakeTpm, Fifo, Ticks};
use tpm::{Bank, Contention, HashAlg, Locality, Tpm};

use super::digest::{Digest, Hash};
use super::leave::end_launch;
use super::*;
use crate::fake::Ram;

const MIB: u64 = 1 << 20;
const REGION: u64 = 2 * MIB;
/// Bytes of the machine's memory.
const MEMORY: u64 = 16 * MIB;
/// What the guest has of it: a piece in two chunks, and one of three pages.
const GUEST: [[u64; 2]; 2] = [[0x1000, 0x30_0fff], [0xe0_2000, 0xe0_4fff]];

fn range(start: u64, len: u64) -> PhysRange {
    PhysRange::new(start, len).unwrap()
}

fn block() -> Block {
    Block::new(range(6 * MIB, relaunch_size(REGION)), range(4 * MIB, REGION)).unwrap()
}

/// A hand-over as the old MLE leaves it: a word on every seventh page of all there is, and its root.
fn left() -> (Ram, Digest) {
    let (mem, block) = (Ram::new(MEMORY as usize), block());
    for page in (0..MEMORY).step_by(0x7000) {
        mem.set(page + page / 0x7000 * 8 % 0x1000, !page);
    }
    let mut ram = [[0; 2]; RAM_MAX];
    ram[..GUEST.len()].copy_from_slice(&GUEST);
    let header = Header {
        magic: MAGIC,
        round: 1,
        pcr: 8,
        region: 4 * MIB,
        code: 0x2_0000,
        entry: 4 * MIB + 0x1234,
        context: 4 * MIB + 0x10_0000,
        launch_page: 0x9_d000,
        log: 0x345,
        count: GUEST.len() as u64,
        ram,
    };
    mem.write(block.at(at::HEADER), header.as_bytes());
    let hash = Hash::new(None);
    hash.write(&header, &block, &mem).unwrap();
    let root = hash.root(&header, &block, &mem).unwrap();
    (mem, root)
}

/// What the new MLE does, with a TPM that knows `root` and no other.
fn verify(mem: &Ram, root: &Digest) -> Result<(), Error> {
    let (hash, block) = (Hash::new(None), block());
    let header = Header::read(&block, mem)?;
    if hash.root(&header, &block, mem)? != *root {
        return Err(Error::Unknown);
    }
    hash.verify(&header, &block, mem)
}

fn flip(mem: &Ram, at: u64, bit: u32) {
    let mut byte = [0];
    assert!(mem.read(at, &mut byte));
    mem.write(at, &[byte[0] ^ 1 << bit]);
}

#[test]
fn a_block_is_divided_and_a_wrong_one_refused() {
    let block = block();
    assert_eq!((block.fresh, block.copy), (range(6 * MIB, REGION), range(8 * MIB, REGION)));
    assert_eq!(block.at(at::HEADER), 10 * MIB);
    let end = block.at(at::DIGESTS) + (CHUNKS_MAX * size_of::<Digest>()) as u64;
    assert!(
        end <= block.whole.end().unwrap()
            && block.mle_file() + hv::launch::RELAUNCH_MLE_MAX <= block.at(at::DIGESTS)
    );
    let region = range(4 * MIB, REGION);
    let what = "memory for relaunch";
    let size = relaunch_size(REGION);
    for (base, size, error) in [
        (6 * MIB, size - 1, InputError::Size { what, size: size - 1, limit: size }),
        (6 * MIB + 0x1000, size, InputError::Place { what, base: 6 * MIB + 0x1000, size }),
        (FOUR_GIB - 2 * MIB, size, InputError::Place { what, base: FOUR_GIB - 2 * MIB, size }),
    ] {
        assert_eq!(Block::new(range(base, size), region), Err(error));
    }
}

#[test]
fn what_was_left_is_accepted_and_a_changed_place_is_named() {
    let (mem, root) = left();
    assert_eq!(verify(&mem, &root), Ok(()));
    let block = block();
    for (at, found) in [
        (0x1000, Some((0x1000, 0x1f_f000))),
        (0x1f_ffff, Some((0x1000, 0x1f_f000))),
        (0x30_0fff, Some((0x20_0000, 0x10_1000))),
        (0xe0_3000, Some((0xe0_2000, 0x3000))),
        (block.copy.start(), Some((block.copy.start(), REGION))),
        (block.copy.last(), Some((block.copy.start(), REGION))),
        (block.at(at::LOG), Some((block.at(at::LOG), at::LOG_SIZE))),
        (block.at(at::PAGE_0), Some((block.at(at::PAGE_0), 0x1000))),
        (block.at(at::LAUNCH_PAGE), Some((block.at(at::LAUNCH_PAGE), 0x2000))),
        // What nobody has digests of: memory that is not the guest's, the old region itself, the gap's answer.
        (0, None),
        (0x30_1000, None),
        (4 * MIB, None),
        (block.at(at::ANSWER), None),
    ] {
        flip(&mem, at, 3);
        let changed = found.map(|(start, len)| Error::Changed { range: range(start, len) });
        assert_eq!(verify(&mem, &root).err(), changed, "{at:#x}");
        flip(&mem, at, 3);
    }
    assert_eq!(verify(&mem, &root), Ok(()));
}

/// The gap makes all digests anew to fit what it changed: the root is another then.
#[test]
fn digests_that_fit_the_change_are_not_those_that_the_tpm_knows() {
    let (mem, root) = left();
    let (hash, block) = (Hash::new(None), block());
    flip(&mem, 0x2000, 0);
    let header = Header::read(&block, &mem).unwrap();
    hash.write(&header, &block, &mem).unwrap();
    assert_eq!(verify(&mem, &root), Err(Error::Unknown));
    // With a TPM that knows whatever it is told, the change would have passed.
    let root = hash.root(&header, &block, &mem).unwrap();
    assert_eq!(verify(&mem, &root), Ok(()));
}

/// Memory that the header leaves out would not be compared: so the header is part of the root.
#[test]
fn a_header_that_leaves_memory_out_is_another() {
    let (mem, root) = left();
    let block = block();
    let mut header = Header::read(&block, &mem).unwrap();
    header.count = 1;
    mem.write(block.at(at::HEADER), header.as_bytes());
    assert_eq!(verify(&mem, &root), Err(Error::Unknown));
}

#[test]
fn fields_of_the_header_are_checked() {
    let (mem, root) = left();
    let block = block();
    let good = Header::read(&block, &mem).unwrap();
    type Set = fn(&mut Header, u64);
    let cases: [(&str, u64, Set); 14] = [
        ("magic", 0, |h, value| h.magic = value),
        ("PCR", 7, |h, value| h.pcr = value),
        ("PCR", 16, |h, value| h.pcr = value),
        ("PCR", 8 | 1 << 32, |h, value| h.pcr = value),
        ("region", 4 * MIB + 0x1000, |h, value| h.region = value),
        ("region", FOUR_GIB, |h, value| h.region = value),
        ("region", 6 * MIB, |h, value| h.region = value),
        ("code", 0, |h, value| h.code = value),
        ("code", 0x1001, |h, value| h.code = value),
        ("code", REGION + 0x1000, |h, value| h.code = value),
        ("entry", 4 * MIB - 1, |h, value| h.entry = value),
        ("entry", 6 * MIB, |h, value| h.entry = value),
        ("log", at::LOG_SIZE + 1, |h, value| h.log = value),
        ("count", RAM_MAX as u64 + 1, |h, value| h.count = value),
    ];
    for (field, value, set) in cases {
        let mut header = good;
        set(&mut header, value);
        mem.write(block.at(at::HEADER), header.as_bytes());
        assert_eq!(verify(&mem, &root), Err(Error::Header { field, value }));
    }
}

#[test]
fn memory_that_is_not_there_ends_it() {
    let (mem, _) = left();
    let (hash, block) = (Hash::new(None), block());
    let mut header = Header::read(&block, &mem).unwrap();
    header.ram[1] = [MEMORY, MEMORY + 0xfff];
    assert_eq!(hash.write(&header, &block, &mem), Err(Error::Unreadable { address: MEMORY }));
    // More chunks than have room.
    let room = CHUNKS_MAX as u64 * 2 * MIB;
    header.ram[1] = [room, 2 * room];
    assert_eq!(hash.root(&header, &block, &mem), Err(Error::TooMuch));
}

/// Codes of the commands that end a launch, in their order: the round's PCR, what the TPM notes, and the four PCRs.
const ENDING: [u32; 8] = [0x182, 0x181, 0x131, 0x165, 0x182, 0x182, 0x182, 0x182];
/// Of them, those after which there is a ticket.
const CAPS: core::ops::Range<usize> = 4..8;

/// Ends a launch with a TPM that refuses the `refused`th command; and what it was sent.
fn end(refused: Option<usize>) -> (Result<tpm::Ticket, Error>, Vec<u32>) {
    let fifo = Fifo::new(FakeTpm::new(&[Bank::computed(HashAlg::SHA256).unwrap()]));
    let mut tpm = Tpm::open(fifo.clone(), Ticks::default(), Locality::Two, Contention::LAUNCH).unwrap();
    let mut number = 0..;
    fifo.state().tpm.remote = Some(Box::new(move |_, command| {
        let code = command[6..10].to_vec();
        let (rc, body) = match u32::from_be_bytes(code.try_into().unwrap()) {
            _ if number.next() == refused => (0x101_u32, vec![]),
            // Each has the fields that count, and zeros.
            0x181 => (0, [vec![0; 16], vec![0, 0, 0, 1], vec![0; 5]].concat()),
            0x131 => (0, [vec![0; 14], vec![0x80, 0x21, 0x40, 0, 0, 7, 0, 2, 0xab, 0xcd]].concat()),
            _ => (0, vec![]),
        };
        let size = 10 + body.len() as u32;
        [vec![0x80, 1], size.to_be_bytes().to_vec(), rc.to_be_bytes().to_vec(), body].concat()
    }));
    let before = fifo.state().tpm.seen.len();
    let (mem, root) = left();
    let ended = end_launch(&mut tpm, &Header::read(&block(), &mem).unwrap(), &root);
    let code = |(_, bytes): &(u8, Vec<u8>)| u32::from_be_bytes(bytes[6..10].try_into().unwrap());
    let sent = fifo.state().tpm.seen[before..].iter().map(code).collect();
    (ended, sent)
}

/// Once a PCR may have ended, the launch must not go on: its guest would have a launch for which no TPM vouches. Before that it
/// may, and the call alone fails.
#[test]
fn a_launch_that_has_begun_to_end_does_not_go_on() {
    let (ended, sent) = end(None);
    assert_eq!(ended.map(|ticket| (ticket.size, ticket.digest[0])), Ok((2, 0xab)));
    assert_eq!(sent, ENDING);
    for refused in 0..ENDING.len() {
        let (ended, sent) = end(Some(refused));
        let error = ended.unwrap_err();
        assert_eq!(error.ends_launch(), CAPS.contains(&refused), "{refused}: {error}");
        // One that cannot be capped does not keep the others from it.
        assert_eq!(sent.len(), if error.ends_launch() { ENDING.len() } else { refused + 1 }, "{refused}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn no_bit_of_what_counts_changes_unseen(place in 0_usize..5, offset: prop::sample::Index, bit in 0_u32..8) {
        let (mem, root) = left();
        let block = block();
        let (start, len) = [
            (block.at(at::HEADER), size_of::<Header>() as u64),
            // Log and copy a chunk each, the guest three.
            (block.at(at::DIGESTS), 5 * size_of::<Digest>() as u64),
            (block.at(at::LOG), at::LOG_SIZE),
            (block.copy.start(), REGION),
            (GUEST[0][0], GUEST[0][1] - GUEST[0][0] + 1),
        ][place];
        flip(&mem, start + offset.index(len as usize) as u64, bit);
        prop_assert!(verify(&mem, &root).is_err());
    }

    #[test]
    fn no_header_makes_it_panic(bytes in prop::collection::vec(any::<u8>(), size_of::<Header>()), near: bool) {
        let (mem, root) = left();
        let address = block().at(at::HEADER);
        mem.write(address, &bytes);
        if near {
            // A good one but for the ranges of RAM and what follows.
            let good = left().0;
            let mut start = vec![0; core::mem::offset_of!(Header, ram)];
            good.read(address, &mut start);
            mem.write(address, &start);
        }
        prop_assert!(verify(&mem, &root).is_err());
    }
}
