//! The readers of both tables against a corpus of real ones, whole and damaged: what the fuzz targets in `iommu/fuzz`
//! do, without a fuzzer.

use std::fs;
use std::path::PathBuf;

use crate::model::{walk_dmar, walk_ivrs};
use crate::qemu::Handle;

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

/// Writes the corpus: `cargo test -p iommu -- --ignored the_corpus`.
#[test]
#[ignore = "writes files of the repository"]
fn the_corpus_is_what_qemu_makes() {
    const TOPOLOGIES: [(&str, &str); 6] = [
        ("plain", ""),
        ("ports", "-device pcie-root-port,id=a,chassis=1,slot=1,addr=6 -device edu,bus=a"),
        (
            "switch",
            "-device pcie-root-port,id=a,chassis=1,slot=1,addr=6 -device x3130-upstream,id=u,bus=a \
             -device xio3130-downstream,id=d,bus=u,chassis=2,slot=0 -device edu,bus=d",
        ),
        ("pci-bridge", "-device pcie-pci-bridge,id=p,addr=5 -device edu,bus=p,addr=3"),
        (
            "two-roots",
            "-device pxb-pcie,id=x,bus_nr=128,addr=9 -device pcie-root-port,id=a,bus=x,chassis=3,slot=3 \
             -device edu,bus=a",
        ),
        (
            "many",
            "-device e1000e,addr=9 -device qemu-xhci,addr=10 -device ich9-ahci,addr=11 \
             -device i82801b11-bridge,addr=0x1e",
        ),
    ];
    let kinds = [
        ("dmar", "intel", "intel-iommu,intremap=on"),
        ("dmar", "intel-ats", "intel-iommu,intremap=on,aw-bits=48,device-iotlb=on,caching-mode=on"),
        ("ivrs", "amd", "amd-iommu,intremap=on"),
        ("ivrs", "amd-no-ir", "amd-iommu,intremap=off"),
    ];
    for (table, iommu, device) in kinds {
        for (topology, arguments) in TOPOLOGIES {
            let qemu = Handle::start(device, &arguments.split_whitespace().collect::<Vec<_>>());
            let name = table.to_uppercase();
            let bytes = qemu.table(name.as_bytes().try_into().unwrap());
            fs::write(corpus(table).join(format!("{iommu}-{topology}")), bytes).unwrap();
        }
    }
}
