use proptest::prelude::*;

use super::*;
use crate::model::{Machine, RAM_TOP};

const RSDP: u64 = 0x000f_0010;
const ROOT: u64 = 0x7000;
const FIRST: u64 = 0x8000;
const SECOND: u64 = 0x9000;

fn fix_sum(bytes: &mut [u8], at: usize) {
    bytes[at] = 0;
    bytes[at] = bytes.iter().fold(0u8, |sum, byte| sum.wrapping_sub(*byte));
}

fn table(signature: &[u8; 4], body: &[u8]) -> Vec<u8> {
    let mut bytes = signature.to_vec();
    bytes.extend((HEADER_SIZE as u32 + body.len() as u32).to_le_bytes());
    bytes.resize(HEADER_SIZE, 0);
    bytes.extend(body);
    fix_sum(&mut bytes, 9);
    bytes
}

fn rsdp(revision: u8) -> Vec<u8> {
    let mut bytes = b"RSD PTR ".to_vec();
    bytes.resize(36, 0);
    bytes[15] = revision;
    bytes[16..20].copy_from_slice(&(ROOT as u32).to_le_bytes());
    fix_sum(&mut bytes[..20], 8);
    bytes[20] = 36;
    bytes[24..32].copy_from_slice(&ROOT.to_le_bytes());
    fix_sum(&mut bytes, 32);
    bytes
}

/// Firmware of revision 2 with two tables, by an XSDT.
fn modern() -> Machine {
    let machine = Machine::new();
    machine.write(RSDP, &rsdp(2));
    let entries = [FIRST, SECOND, 0].map(u64::to_le_bytes).concat();
    machine.write(ROOT, &table(b"XSDT", &entries));
    machine.write(FIRST, &table(b"FACP", &[1; 8]));
    machine.write(SECOND, &table(b"IVRS", &[2; 12]));
    machine
}

fn find_ivrs(machine: &Machine) -> Result<usize, Error> {
    copy_table(machine, RSDP, *b"IVRS", &mut [0; 256])
}

#[test]
fn finds_the_table_by_xsdt_and_by_rsdt() {
    let machine = modern();
    let mut out = [0; 256];
    assert_eq!(copy_table(&machine, RSDP, *b"IVRS", &mut out), Ok(48));
    assert_eq!(out[..48], table(b"IVRS", &[2; 12]));

    machine.write(RSDP, &rsdp(0)[..20]);
    let entries = [FIRST as u32, SECOND as u32].map(u32::to_le_bytes).concat();
    machine.write(ROOT, &table(b"RSDT", &entries));
    assert_eq!(find_ivrs(&machine), Ok(48));
}

#[test]
fn refuses_what_is_broken() {
    let cases: [(u64, &[u8], Error); 9] = [
        (RSDP, b"X", Error::Signature(RSDP)),
        (RSDP + 9, &[1], Error::Checksum(RSDP)),
        (RSDP + 33, &[1], Error::Checksum(RSDP)),
        (ROOT, b"R", Error::Signature(ROOT)),
        (ROOT + 10, &[1], Error::Checksum(ROOT)),
        (ROOT + 5, &[0x20], Error::Length { address: ROOT, length: 0x203c, limit: 4096 }),
        (SECOND + 10, &[1], Error::Checksum(SECOND)),
        (SECOND + 5, &[1], Error::Length { address: SECOND, length: 0x130, limit: 256 }),
        (SECOND, b"J", Error::Missing(*b"IVRS")),
    ];
    for (address, bytes, error) in cases {
        let machine = modern();
        machine.write(address, bytes);
        assert_eq!(find_ivrs(&machine), Err(error));
    }
    assert_eq!(copy_table(&modern(), RAM_TOP, *b"IVRS", &mut []), Err(Error::Unreadable(RAM_TOP)));
}

#[test]
fn a_second_table_of_the_name_is_refused() {
    let machine = modern();
    machine.write(FIRST, &table(b"IVRS", &[]));
    assert_eq!(find_ivrs(&machine), Err(Error::Twice(FIRST, SECOND)));
}

#[test]
fn a_table_that_changes_between_two_reads_is_refused() {
    let machine = modern();
    machine.attack(|machine| {
        // Valid at every moment; only the length differs, each time it is looked at.
        let longer = machine.peek64(SECOND) >> 32 == 48;
        machine.poke64(SECOND, u64::from(u32::from_le_bytes(*b"IVRS")) | if longer { 47 } else { 48 } << 32);
    });
    assert!(find_ivrs(&machine).is_err());
}

proptest! {
    #[test]
    fn never_panics(changes in prop::collection::vec((0usize..4, 0u64..64, any::<u8>()), 0..8)) {
        let machine = modern();
        for (which, offset, byte) in changes {
            machine.write([RSDP, ROOT, FIRST, SECOND][which] + offset, &[byte]);
        }
        let _ = find_ivrs(&machine);
    }
}
