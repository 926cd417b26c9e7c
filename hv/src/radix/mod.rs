//! 512-way radix page tables: one builder for nested tables, device tables and the MLE's own.
//!
//! A [`Format`] is data, not a type: the builder is compiled once per pool of table pages, whatever the
//! number of formats. Table pages come from a [`TablePool`], so nothing here touches memory itself.
//!
//! Every operation either does all of its work or changes no translation. A table, once in place, stays:
//! at any address at most one table per level is ever taken from the pool, whatever the history of
//! operations. Addresses are those before translation: guest-physical, I/O virtual, or virtual in the
//! lower half.
//!
//! Restricting or replacing a translation takes effect when the caller has flushed the TLBs concerned.

mod format;
#[cfg(test)]
pub(crate) mod tests;

use core::fmt;

use format::{ADDRESS, shift, span};
pub use format::{AMD_VI, EPT, Format, MemoryType, NPT, PageSize, Rights, STAGE1, VT_D};

use crate::addr::{PAGE_SIZE, PhysRange};

/// Entries in a table.
pub const ENTRIES: usize = 512;

/// Memory for tables. Two sets of tables may share one pool.
pub trait TablePool {
    /// Physical address of a page of zeros, below 2^52, for the tables to keep; `None` when none is left.
    fn alloc(&mut self) -> Option<u64>;
    /// Entry `index` (below [`ENTRIES`]) of the table at `table`, an address that [`Self::alloc`] gave.
    fn read(&self, table: u64, index: usize) -> u64;
    /// Stores an entry, in one access: the hardware may be walking the table. For units that do not snoop
    /// the CPU caches the implementation also writes the line back.
    fn write(&mut self, table: u64, index: usize, entry: u64);
}

/// Why an operation was refused. Nothing was changed then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Error {
    /// The pool has no page left.
    OutOfTables,
    /// An address or length is not a multiple of 4 KiB, or the pool gave a page that is no page.
    Misaligned {
        /// The value.
        value: u64,
    },
    /// An address is past what the tables can map or an entry can hold.
    BeyondLimit {
        /// The address.
        value: u64,
        /// First address that is too high.
        limit: u64,
    },
    /// A page of the range is mapped.
    AlreadyMapped {
        /// The first such.
        at: u64,
    },
    /// A page of the range is not mapped.
    NotMapped {
        /// The first such.
        at: u64,
    },
    /// The format cannot express these rights, or forbids them.
    Rights {
        /// What was asked for.
        rights: Rights,
        /// Name of the format.
        format: &'static str,
    },
    /// The format has no tables of this depth.
    Levels {
        /// What was asked for.
        levels: u32,
        /// Name of the format.
        format: &'static str,
    },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OutOfTables => f.write_str("no page left for tables"),
            Self::Misaligned { value } => write!(f, "{value:#x} is not page aligned"),
            Self::BeyondLimit { value, limit } => write!(f, "address {value:#x} is not below {limit:#x}"),
            Self::AlreadyMapped { at } => write!(f, "{at:#x} is mapped"),
            Self::NotMapped { at } => write!(f, "{at:#x} is not mapped"),
            Self::Rights { rights, format } => {
                write!(f, "{format} does not give rights {:#x}", rights.bits())
            }
            Self::Levels { levels, format } => write!(f, "{format} has no tables of {levels} levels"),
        }
    }
}

/// Where an address leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// Physical address, offset in the page included.
    pub phys: u64,
    /// What may be done there.
    pub rights: Rights,
    /// Size of the page that maps it.
    pub size: PageSize,
}

/// One leaf: `size` bytes from `addr` lead to `phys` onward.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leaf {
    /// First address before translation.
    pub addr: u64,
    /// Where it leads.
    pub mapping: Mapping,
}

/// One set of tables.
#[derive(Debug)]
pub struct Tables {
    format: &'static Format,
    root: u64,
    levels: u32,
    largest: PageSize,
    limit: u64,
}

impl Tables {
    /// Empty tables: one page from the pool. `largest` is the largest page that the hardware takes.
    pub fn new<P: TablePool>(
        format: &'static Format,
        levels: u32,
        largest: PageSize,
        pool: &mut P,
    ) -> Result<Self, Error> {
        let limit = format.limit(levels).ok_or(Error::Levels { levels, format: format.name() })?;
        Ok(Self { format, root: alloc(pool)?, levels, largest, limit })
    }

    /// Physical address of the root table.
    pub fn root(&self) -> u64 {
        self.root
    }

    /// The layout of the entries.
    pub fn format(&self) -> &'static Format {
        self.format
    }

    /// Table levels: 3 to 5.
    pub fn levels(&self) -> u32 {
        self.levels
    }

    /// First address that cannot be mapped.
    pub fn limit(&self) -> u64 {
        self.limit
    }

    /// Maps `range`, whole pages and all unmapped, to memory from `to` onward, with the largest pages that
    /// fit. Where tables are already in place, left from smaller pages, they are used.
    pub fn map<P: TablePool>(
        &self,
        pool: &mut P,
        range: PhysRange,
        to: u64,
        rights: Rights,
        memory: MemoryType,
    ) -> Result<(), Error> {
        self.check(range)?;
        check_phys(to, range.len())?;
        let bits = self.format.leaf_bits(rights, memory)?;
        let mut slots = Slots::new(range);
        while let Some(slot) = slots.next(self, pool) {
            if self.format.is_present(slot.entry) {
                return Err(Error::AlreadyMapped { at: slot.start.max(range.start()) });
            }
        }

        let offset = to.wrapping_sub(range.start());
        let mut at = range.start();
        loop {
            match self.map_pages(pool, at, range.last(), offset, bits) {
                Ok(last) if last >= range.last() => return Ok(()),
                Ok(last) => at = last.saturating_add(1),
                Err(error) => {
                    if let Some(done) = at.checked_sub(1).and_then(|l| PhysRange::from_last(range.start(), l))
                    {
                        self.clear(pool, done);
                    }
                    return Err(error);
                }
            }
        }
    }

    /// [`Self::map`] of addresses to themselves.
    pub fn map_identity<P: TablePool>(
        &self,
        pool: &mut P,
        range: PhysRange,
        rights: Rights,
        memory: MemoryType,
    ) -> Result<(), Error> {
        self.map(pool, range, range.start(), rights, memory)
    }

    /// Takes `range` out, whole pages; splits larger pages that reach beyond it. Unmapped parts stay so.
    pub fn unmap<P: TablePool>(&self, pool: &mut P, range: PhysRange) -> Result<(), Error> {
        self.check(range)?;
        self.split_edges(pool, range)?;
        self.clear(pool, range);
        Ok(())
    }

    /// Changes the rights of `range`, whole pages and all mapped; splits larger pages that reach beyond it.
    /// The memory type stays.
    pub fn protect<P: TablePool>(&self, pool: &mut P, range: PhysRange, rights: Rights) -> Result<(), Error> {
        self.check(range)?;
        self.format.with_rights(0, rights)?;
        let mut slots = Slots::new(range);
        while let Some(slot) = slots.next(self, pool) {
            if !self.format.is_present(slot.entry) {
                return Err(Error::NotMapped { at: slot.start.max(range.start()) });
            }
        }
        self.split_edges(pool, range)?;
        let mut slots = Slots::new(range);
        while let Some(slot) = slots.next(self, pool) {
            pool.write(slot.table, slot.index, self.format.with_rights(slot.entry, rights)?);
        }
        Ok(())
    }

    /// Where `addr` leads; `None` when nothing is mapped there.
    pub fn walk<P: TablePool>(&self, pool: &P, addr: u64) -> Option<Mapping> {
        if addr >= self.limit {
            return None;
        }
        let slot = self.find(pool, addr);
        let inside = addr.wrapping_sub(slot.start);
        self.mapping(&slot).map(|m| Mapping { phys: m.phys.wrapping_add(inside), ..m })
    }

    /// All leaves, by rising address.
    pub fn leaves<'a, P: TablePool>(&'a self, pool: &'a P) -> impl Iterator<Item = Leaf> + 'a {
        let mut slots = Slots { at: Some(0), last: self.limit.saturating_sub(1) };
        core::iter::from_fn(move || {
            loop {
                let slot = slots.next(self, pool)?;
                if let Some(mapping) = self.mapping(&slot) {
                    return Some(Leaf { addr: slot.start, mapping });
                }
            }
        })
    }

    /// Tells `visit` the address of each table, one page each, the root first.
    pub fn each_table<P: TablePool>(&self, pool: &P, visit: &mut dyn FnMut(u64)) {
        self.each_table_below(pool, self.root, self.levels, visit);
    }

    fn each_table_below<P: TablePool>(&self, pool: &P, table: u64, level: u32, visit: &mut dyn FnMut(u64)) {
        visit(table);
        for entry in (0..ENTRIES).map(|index| pool.read(table, index)) {
            if self.format.is_present(entry) && !self.format.is_leaf(entry, level) {
                self.each_table_below(pool, entry & ADDRESS, level.saturating_sub(1), visit);
            }
        }
    }

    fn mapping(&self, slot: &Slot) -> Option<Mapping> {
        self.format.is_present(slot.entry).then(|| Mapping {
            phys: slot.entry & ADDRESS,
            rights: self.format.rights(slot.entry),
            size: PageSize::of_level(slot.level),
        })
    }

    fn check(&self, range: PhysRange) -> Result<(), Error> {
        if range.last() >= self.limit {
            return Err(Error::BeyondLimit { value: range.last(), limit: self.limit });
        }
        aligned(range.start())?;
        aligned(range.len())
    }

    /// The entry that decides about `addr`: a leaf or an unused one.
    fn find<P: TablePool>(&self, pool: &P, addr: u64) -> Slot {
        let (mut table, mut level) = (self.root, self.levels);
        loop {
            let index = index(addr, level);
            let entry = pool.read(table, index);
            if !self.format.is_present(entry) || self.format.is_leaf(entry, level) {
                return Slot { table, index, entry, level, start: addr & !mask(level) };
            }
            table = entry & ADDRESS;
            level = level.saturating_sub(1);
        }
    }

    /// Maps a page at `at`, the largest that fits up to `last`, and such pages behind it as far as its table goes; gives their last
    /// address.
    fn map_pages<P: TablePool>(
        &self,
        pool: &mut P,
        at: u64,
        last: u64,
        offset: u64,
        bits: u64,
    ) -> Result<u64, Error> {
        let phys = at.wrapping_add(offset);
        let mut table = self.root;
        for level in (1..=self.levels).rev() {
            let index = index(at, level);
            let entry = pool.read(table, index);
            let page_last = at | mask(level);
            let fits = level <= self.largest.level() && (at | phys) & mask(level) == 0 && page_last <= last;
            table = if self.format.is_present(entry) {
                entry & ADDRESS
            } else if fits {
                let place =
                    Slot { table, index, entry: self.format.leaf_entry(bits, phys, level), level, start: at };
                return Ok(self.fill(pool, place, last));
            } else {
                let new = alloc(pool)?;
                pool.write(table, index, self.format.table_entry(new, level));
                new
            };
        }
        Err(Error::AlreadyMapped { at })
    }

    /// Writes the leaf of `first` to its place and, with rising addresses, to those behind it: in the same table, unused, and for
    /// pages up to `last`. Gives the last address of these pages. A CPU without 1 GiB pages has 262144 of them in 512 GiB: too
    /// many to walk to each.
    fn fill<P: TablePool>(&self, pool: &mut P, first: Slot, last: u64) -> u64 {
        let Slot { table, mut index, mut entry, level, start } = first;
        let mut page_last = start | mask(level);
        loop {
            pool.write(table, index, entry);
            index = index.saturating_add(1);
            let next_last = page_last.saturating_add(span(level));
            if index >= ENTRIES || next_last > last || self.format.is_present(pool.read(table, index)) {
                return page_last;
            }
            entry = entry.saturating_add(span(level));
            page_last = next_last;
        }
    }

    /// Clears the leaves of `range`, none of which reaches beyond it.
    fn clear<P: TablePool>(&self, pool: &mut P, range: PhysRange) {
        let mut slots = Slots::new(range);
        while let Some(slot) = slots.next(self, pool) {
            if self.format.is_present(slot.entry) {
                pool.write(slot.table, slot.index, 0);
            }
        }
    }

    /// Makes both ends of `range` ends of leaves. No translation changes.
    fn split_edges<P: TablePool>(&self, pool: &mut P, range: PhysRange) -> Result<(), Error> {
        self.split(pool, range.start())?;
        match range.end() {
            Some(end) if end < self.limit => self.split(pool, end),
            _ => Ok(()),
        }
    }

    /// Splits until a leaf starts at `at` or nothing is mapped there. The new table is complete before an
    /// entry points to it, so a hardware walk sees the same translation at every moment.
    fn split<P: TablePool>(&self, pool: &mut P, at: u64) -> Result<(), Error> {
        loop {
            let slot = self.find(pool, at);
            if !self.format.is_present(slot.entry) || slot.start == at {
                return Ok(());
            }
            let table = alloc(pool)?;
            let mut phys = slot.entry & ADDRESS;
            for index in 0..ENTRIES {
                pool.write(table, index, self.format.part_of(slot.entry, phys, slot.level));
                phys = phys.wrapping_add(span(slot.level.saturating_sub(1)));
            }
            pool.write(slot.table, slot.index, self.format.table_entry(table, slot.level));
        }
    }
}

/// A place in a table, and what is there.
struct Slot {
    table: u64,
    index: usize,
    entry: u64,
    level: u32,
    /// First address that the entry covers.
    start: u64,
}

/// Goes through the leaves and unused entries that cover a range. The pool is lent for each step, so that
/// the caller may write to it between two.
struct Slots {
    at: Option<u64>,
    last: u64,
}

impl Slots {
    fn new(range: PhysRange) -> Self {
        Self { at: Some(range.start()), last: range.last() }
    }

    fn next<P: TablePool>(&mut self, tables: &Tables, pool: &P) -> Option<Slot> {
        let slot = tables.find(pool, self.at.filter(|at| *at <= self.last)?);
        self.at = (slot.start | mask(slot.level)).checked_add(1);
        Some(slot)
    }
}

/// Offset bits within what an entry of a table of `level` covers.
const fn mask(level: u32) -> u64 {
    span(level).wrapping_sub(1)
}

const fn index(addr: u64, level: u32) -> usize {
    // Below ENTRIES, so the cast loses nothing.
    (addr.wrapping_shr(shift(level)) & 511) as usize
}

fn aligned(value: u64) -> Result<(), Error> {
    if value.is_multiple_of(PAGE_SIZE) { Ok(()) } else { Err(Error::Misaligned { value }) }
}

/// Whether entries can hold the addresses of `len` bytes from `phys`.
fn check_phys(phys: u64, len: u64) -> Result<(), Error> {
    const LIMIT: u64 = ADDRESS + PAGE_SIZE;
    aligned(phys)?;
    match phys.checked_add(len) {
        Some(end) if end <= LIMIT => Ok(()),
        _ => Err(Error::BeyondLimit { value: phys.saturating_add(len.saturating_sub(1)), limit: LIMIT }),
    }
}

fn alloc<P: TablePool>(pool: &mut P) -> Result<u64, Error> {
    let table = pool.alloc().ok_or(Error::OutOfTables)?;
    check_phys(table, PAGE_SIZE)?;
    Ok(table)
}
