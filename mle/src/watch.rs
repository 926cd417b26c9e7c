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
use hv::radix::Tables;
use hv::vcpu::Access;
use sha2::{Digest, Sha256};

use crate::exposure;
use crate::metal::{Identity, TscClock};
use crate::pool::PagePool;

/// Most leaves of nested tables that are watched; with 4 KiB pages 4 MiB of code.
pub const LEAVES_MAX: usize = 1024;
/// After so many turns a page is taken for one that has both code and data: code that writes to its own page could not go on
/// otherwise.
const TURNS_MAX: u16 = 64;
const WRITABLE: u64 = 1 << 1;
const NO_EXECUTE: u64 = 1 << 63;

/// Of an entry in nested tables, the bits that are not changed here.
pub const CONSTANT: u64 = !(WRITABLE | NO_EXECUTE);

/// What one entry of nested tables maps of runtime code.
struct Leaf {
    entry: &'static AtomicU64,
    /// The same of the tables with which firmware runs natively, if there are any.
    native: Option<&'static AtomicU64>,
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
    fn set(&self, entry: u64) {
        for to in [Some(self.entry), self.native].into_iter().flatten() {
            to.store(entry, Ordering::Relaxed);
        }
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
                    range: piece,
                    sha256,
                    turns: 0,
                });
                if let Some(leaf) = leaf {
                    leaf.set(leaf.entry.load(Ordering::Relaxed) & !WRITABLE);
                    if self.leaves.push(leaf).is_err() {
                        self.unwatched = self.unwatched.saturating_add(piece.len());
                    }
                }
                next = piece.end();
            }
        }
    }

    /// Answers a fault of the sandbox in a call of `service` by CPU `cpu`. True when the access may be made now; what the CPU
    /// has cached of the tables is to be flushed first.
    pub fn fault(
        &mut self,
        gpa: u64,
        access: Access,
        mem: &Identity,
        (cpu, service): (u32, Service),
        clock: &TscClock,
    ) -> bool {
        let Some(leaf) = self.leaves.iter_mut().find(|leaf| leaf.range.contains_addr(gpa)) else {
            return false;
        };
        let entry = leaf.entry.load(Ordering::Relaxed);
        match access {
            Access::Write if entry & WRITABLE == 0 => {
                leaf.set(entry | WRITABLE | NO_EXECUTE);
                true
            }
            Access::Fetch if entry & NO_EXECUTE != 0 => {
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
                let closed = if mixed { NO_EXECUTE } else { WRITABLE | NO_EXECUTE };
                leaf.set(entry & !closed);
                true
            }
            _ => false,
        }
    }
}

fn hash(mem: &Identity, range: &PhysRange) -> Option<[u8; 32]> {
    let mut hasher = Sha256::new();
    let mut piece = [0; PAGE_SIZE as usize];
    let mut at = range.start();
    while at <= range.last() {
        let left = range.last().saturating_sub(at).saturating_add(1);
        let piece = piece.get_mut(..usize::try_from(left.min(PAGE_SIZE)).ok()?)?;
        if !mem.read(at, piece) {
            return None;
        }
        hasher.update(&*piece);
        at = at.saturating_add(piece.len() as u64);
    }
    Some(hasher.finalize().into())
}
