//! The readers of both tables against a corpus of real ones, whole and damaged: what the fuzz targets in `iommu/fuzz`
//! do, without a fuzzer.

use std::fs;
use std::path::PathBuf;

use crate::model::{walk_dmar, walk_ivrs};

/// Damaged tables read for each whole one.
const DAMAGED: u32 = 4000;

fn corpus(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(name)
}

/// Repeatable bytes.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 = self.0.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        (self.0 >> 33) as usize % sides
    }

    /// Changes, inserts, removes or repeats some bytes behind the header; most often mends the length field.
    fn damage(&mut self, table: &mut Vec<u8>) {
        for _ in 0..=self.roll(4) {
            let at = 36 + self.roll(table.len().saturating_sub(36).max(1));
            if at >= table.len() {
                continue;
            }
            let end = (at + 1 + self.roll(24)).min(table.len());
            match self.roll(6) {
                0 => table[at] = self.roll(256) as u8,
                1 => table[at] = [0, 1, 4, 8, 0x10, 0x11, 0x20, 0x40, 0x7f, 0xf0, 0xff][self.roll(11)],
                2 => table[at] ^= 1 << self.roll(8),
                3 => drop(table.drain(at..end)),
                4 => table.truncate(at),
                _ => {
                    let part = table[at..end].to_vec();
                    table.splice(at..at, part);
                }
            }
        }
        if self.roll(8) != 0 {
            let length = (table.len() as u32).to_le_bytes();
            table[4..8].copy_from_slice(&length);
        }
    }
}

fn run(name: &str, walk: fn(&[u8]) -> usize) {
    let mut dice = Dice(1);
    let mut tables = 0;
    let mut accepted = 0;
    for file in fs::read_dir(corpus(name)).unwrap() {
        let whole = fs::read(file.unwrap().path()).unwrap();
        assert_ne!(walk(&whole), 0);
        tables += 1;
        for _ in 0..DAMAGED {
            let mut table = whole.clone();
            dice.damage(&mut table);
            accepted += u32::from(walk(&table) > 0);
        }
    }
    assert!(tables > 4, "the corpus is there");
    // Damage that every reader refuses at once would test nothing.
    assert!(accepted > DAMAGED && accepted < DAMAGED * tables, "{accepted} of {tables} times {DAMAGED}");
}

#[test]
fn damaged_ivrs_never_panics() {
    run("ivrs", walk_ivrs);
}

#[test]
fn damaged_dmar_never_panics() {
    run("dmar", walk_dmar);
}
