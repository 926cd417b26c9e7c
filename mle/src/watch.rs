//! Firmware's code, and whether what runs is what was measured.
//!
//! EDK2 loads whole images into runtime code, their data included, so a write there is common and no attack by itself. Each
//! page of runtime code is therefore executable or writable, never both: the first write makes it data, and when it is
//! executed afterwards it is hashed again first. So changed code is on record before it runs, and what is only data costs one
//! exit for good.

use core::sync::atomic::{AtomicU64, Ordering};

use firmware::exposure::{Kind, Record, Region, Text};
use firmware::memmap::{MemoryMap, MemoryType};
use firmware::service::Service;
use heapless::Vec;
use hv::addr::{PAGE_SIZE, PhysRange};
use hv::io::PhysMem;
use hv::radix::{Format, Rights, Tables};
use hv::vcpu::Access;
use tpm::Sha256;

use crate::exposure;
use crate::memory::read_pieces;
use crate::metal::{Identity, TscClock};
use crate::pool::PagePool;

/// Most leaves of nested tables that are watched; with 4 KiB pages 4 MiB of code.
pub const LEAVES_MAX: usize = 1024;
/// After so many turns a page is taken for one that has both code and data: code that writes to its own page could not go on
/// otherwise.
const TURNS_MAX: u16 = 64;
const CODE: Rights = Rights::READ.union(Rights::EXEC);
const DATA: Rights = Rights::READ.union(Rights::WRITE);

/// Of an entry in nested tables, the bits that are not changed here.
pub const fn constant(format: &Format) -> u64 {
    !format.rights_mask()
}

/// What one entry of nested tables maps of runtime code.
struct Leaf {
    entry: &'static AtomicU64,
    /// The same of the tables with which firmware runs natively, if there are any.
    native: Option<&'static AtomicU64>,
    format: &'static Format,
    range: PhysRange,
    sha256: [u8; 32],
    /// How often it was executed after it was written.
    turns: u16,
}

/// The watched code.
pub struct Watch {
    leaves: Vec<Leaf, LEAVES_MAX>,
    /// Bytes of runtime code that found no room.
    pub unwatched: u64,
}

impl Leaf {
    /// Gives the page other rights. False when the format has no such rights.
    fn set(&self, rights: Rights) -> bool {
        let Ok(entry) = self.format.with_rights(self.entry.load(Ordering::Relaxed), rights) else {
            return false;
        };
        for to in [Some(self.entry), self.native].into_iter().flatten() {
            to.store(entry, Ordering::Relaxed);
        }
        true
    }
}

impl Watch {
    /// One that watches nothing.
    pub const EMPTY: Self = Self { leaves: Vec::new(), unwatched: 0 };

    /// Watches the runtime code of `map` in the sandbox's nested tables, and in those with which firmware runs natively,
    /// before it first runs. Both map it alike.
    pub fn begin(
        &mut self,
        map: &MemoryMap,
        tables: &Tables,
        native: Option<&Tables>,
        pool: &PagePool,
        mem: &Identity,
    ) {
        for region in map.runtime().filter(|r| r.ty == MemoryType::RUNTIME_SERVICES_CODE) {
            let mut next = Some(region.range.start());
            while let Some(at) = next.filter(|at| *at <= region.range.last()) {
                let (leaf, size) = match pool.leaf(tables.root(), 4, at) {
                    Some((entry, size)) => (Some(entry), size),
                    None => (None, PAGE_SIZE),
                };
                let Some(piece) = PhysRange::from_last(at, at | size.saturating_sub(1))
                    .and_then(|p| p.intersection(&region.range))
                else {
                    break;
                };
                let leaf = leaf.zip(hash(mem, &piece)).map(|(entry, sha256)| Leaf {
                    entry,
                    native: native.and_then(|t| pool.leaf(t.root(), 4, at)).map(|(entry, _)| entry),
                    format: tables.format(),
                    range: piece,
                    sha256,
                    turns: 0,
                });
                if let Some(leaf) = leaf
                    && (!leaf.set(CODE) || self.leaves.push(leaf).is_err())
                {
                    self.unwatched = self.unwatched.saturating_add(piece.len());
                }
                next = piece.end();
            }
        }
    }

    /// Firmware ran where it is not watched: all of its code is looked at again before it runs.
    pub fn distrust(&mut self) {
        for leaf in &self.leaves {
            let _ = leaf.set(DATA);
        }
    }

    /// Answers a fault of the sandbox in a call of `service` by CPU `cpu`. True when the access may be made now; what the CPU
    /// has cached of the tables is to be flushed first.
    pub fn fault(
        &mut self,
        gpa: u64,
        access: Access,
        mem: &impl PhysMem,
        (cpu, service): (u32, Service),
        clock: &TscClock,
    ) -> bool {
        let Some(leaf) = self.leaves.iter_mut().find(|leaf| leaf.range.contains_addr(gpa)) else {
            return false;
        };
        let rights = leaf.format.rights(leaf.entry.load(Ordering::Relaxed));
        match access {
            Access::Write if !rights.contains(Rights::WRITE) => leaf.set(DATA),
            Access::Fetch if !rights.contains(Rights::EXEC) => {
                let Some(sha256) = hash(mem, &leaf.range) else { return false };
                if sha256 != leaf.sha256 {
                    leaf.sha256 = sha256;
                    let region = Some(Region { base: leaf.range.start(), size: leaf.range.len(), sha256 });
                    let record = Record::new(Kind::REGION_CHANGED, cpu, exposure::now_us(clock));
                    exposure::record(&Record { region, service: service as u8, ..record });
                }
                leaf.turns = leaf.turns.saturating_add(1);
                let mixed = leaf.turns >= TURNS_MAX;
                if mixed {
                    let text =
                        Some(Text::new(format_args!("{} is code and data, and not watched on", leaf.range)));
                    let record = Record::new(Kind::REGION_CHANGED, cpu, exposure::now_us(clock));
                    exposure::record(&Record { text, service: service as u8, ..record });
                }
                leaf.set(if mixed { Rights::all() } else { CODE })
            }
            _ => false,
        }
    }
}

fn hash(mem: &impl PhysMem, range: &PhysRange) -> Option<[u8; 32]> {
    let mut hasher = Sha256::new(sha256::software);
    read_pieces(mem, range, &mut |piece| hasher.update(piece)).then(|| hasher.finish())
}

#[cfg(test)]
mod tests {
    use std::boxed::Box;
    use std::cell::Cell;

    use hv::radix::{EPT, NPT};

    use super::*;

    const CLOCK: TscClock = TscClock { khz: 1000 };
    const PAGE: u64 = 0x5000;
    const BY: (u32, Service) = (0, Service::ALL[0]);

    /// One page of memory, every byte the same.
    struct Page(Cell<u8>);

    impl PhysMem for Page {
        fn read(&self, addr: u64, out: &mut [u8]) -> bool {
            out.fill(self.0.get());
            addr >= PAGE && addr + out.len() as u64 <= PAGE + PAGE_SIZE
        }
        fn write(&self, _: u64, _: &[u8]) -> bool {
            unreachable!("nothing here writes")
        }
    }

    fn watch(format: &'static Format, mem: &Page) -> (Watch, &'static AtomicU64, u64) {
        let all = format.with_rights(PAGE, Rights::all()).unwrap();
        let entry: &'static AtomicU64 = Box::leak(Box::new(AtomicU64::new(all)));
        let range = PhysRange::new(PAGE, PAGE_SIZE).unwrap();
        let leaf = Leaf { entry, native: None, format, range, sha256: hash(mem, &range).unwrap(), turns: 0 };
        assert!(leaf.set(CODE));
        let mut watch = Watch::EMPTY;
        assert!(watch.leaves.push(leaf).is_ok());
        (watch, entry, all & constant(format))
    }

    #[test]
    fn written_code_is_hashed_again_before_it_runs() {
        for format in [&NPT, &EPT] {
            let mem = Page(Cell::new(0x90));
            let (mut watch, entry, rest) = watch(format, &mem);
            let rights = || format.rights(entry.load(Ordering::Relaxed));
            let before = watch.leaves[0].sha256;
            // What is allowed already is no fault of ours.
            assert!(!watch.fault(PAGE + 8, Access::Fetch, &mem, BY, &CLOCK));
            assert!(!watch.fault(PAGE + PAGE_SIZE, Access::Write, &mem, BY, &CLOCK));
            assert!(watch.fault(PAGE + 8, Access::Write, &mem, BY, &CLOCK));
            assert_eq!(rights(), DATA, "{format:?}");
            mem.0.set(0xcc);
            assert!(watch.fault(PAGE + 8, Access::Fetch, &mem, BY, &CLOCK));
            assert_eq!(rights(), CODE, "{format:?}");
            assert_ne!(watch.leaves[0].sha256, before, "{format:?}");
            assert_eq!(entry.load(Ordering::Relaxed) & constant(format), rest);
        }
    }

    #[test]
    fn a_page_of_code_and_data_is_given_up() {
        for format in [&NPT, &EPT] {
            let mem = Page(Cell::new(0));
            let (mut watch, entry, _) = watch(format, &mem);
            for _ in 0..TURNS_MAX {
                assert!(watch.fault(PAGE, Access::Write, &mem, BY, &CLOCK));
                assert!(watch.fault(PAGE, Access::Fetch, &mem, BY, &CLOCK));
            }
            assert_eq!(format.rights(entry.load(Ordering::Relaxed)), Rights::all(), "{format:?}");
        }
    }

    #[test]
    fn execution_is_bit_2_in_ept_and_bit_63_in_npt() {
        let bits = |format: &Format| !constant(format);
        assert_eq!(bits(&EPT), 0b111);
        assert_eq!(bits(&NPT), 1 << 63 | 1 << 1);
    }
}
