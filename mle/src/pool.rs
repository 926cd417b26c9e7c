//! Pages of the MLE region, handed out once and never returned: page tables, VMCBs, stacks, per-CPU state.
//!
//! There is no heap: what the MLE needs is known at launch and comes from here; after the guest starts nothing is
//! allocated.
//!
//! UNSAFETY: memory becomes Rust objects here, and page-table entries are written through raw pointers.
#![expect(unsafe_code, reason = "the hardware edge")]

use core::sync::atomic::{AtomicU64, Ordering};

use hv::addr::{PAGE_SIZE, PhysRange};
use hv::radix::{ENTRIES, TablePool};

/// Address bits of an entry.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// The free part of the MLE region, handed out from its start.
pub struct PagePool {
    next: u64,
    end: u64,
}

impl PagePool {
    /// # Safety
    /// `free` is memory of the MLE region, mapped one to one and writable for ever, that nothing else uses.
    pub const unsafe fn new(free: PhysRange) -> Self {
        let start = free.start().saturating_add(PAGE_SIZE - 1) & !(PAGE_SIZE - 1);
        Self { next: start, end: free.last().saturating_add(1) & !(PAGE_SIZE - 1) }
    }

    /// `count` pages in a row, zeroed; `None` when the region is used up.
    pub fn pages(&mut self, count: u64) -> Option<u64> {
        let start = self.next;
        let bytes = count.checked_mul(PAGE_SIZE)?;
        let end = start.checked_add(bytes)?;
        if end > self.end {
            return None;
        }
        self.next = end;
        // SAFETY: `new`: the range is mapped, writable, and handed out here for the first time.
        unsafe { core::ptr::write_bytes(start as *mut u8, 0, usize::try_from(bytes).ok()?) };
        Some(start)
    }

    /// A zeroed object in pages of its own, for ever.
    pub fn object<T: zerocopy::FromZeros>(&mut self) -> Option<&'static mut T> {
        const { assert!(align_of::<T>() <= PAGE_SIZE as usize) };
        let start = self.pages((size_of::<T>() as u64).div_ceil(PAGE_SIZE))?;
        // SAFETY: `pages` gave zeroed memory of that size, page aligned, to nobody else; zeros are a `T`.
        Some(unsafe { &mut *(start as *mut T) })
    }

    /// `len` zeroed bytes, for ever.
    pub fn bytes(&mut self, len: usize) -> Option<&'static mut [u8]> {
        let start = self.pages((len as u64).div_ceil(PAGE_SIZE))?;
        // SAFETY: `pages` gave that much zeroed memory to nobody else.
        Some(unsafe { core::slice::from_raw_parts_mut(start as *mut u8, len) })
    }

    /// Where the next page will be: two of these are the bounds of what was handed out between.
    pub fn mark(&self) -> u64 {
        self.next
    }

    /// Bytes left.
    pub fn left(&self) -> u64 {
        self.end.saturating_sub(self.next)
    }
}

/// An entry of a table that came from the pool.
fn slot(table: u64, index: usize) -> Option<&'static AtomicU64> {
    // SAFETY: `TablePool`'s contract: `table` is a page that `alloc` gave, so it is mapped for ever; entries are
    // only ever accessed as atomics, since hardware may be walking them.
    (index < ENTRIES).then(|| unsafe { &*(table as *const AtomicU64).wrapping_add(index) })
}

impl PagePool {
    /// A second root that shares all of `tables` but its own path to the 4 KiB page at `addr`, which must not lie in a
    /// larger page. Gives the root and the table with the entry of that page. `tables` must not change any more.
    pub fn own_path(
        &mut self,
        root: u64,
        levels: u32,
        addr: u64,
    ) -> Option<(u64, &'static [AtomicU64; ENTRIES])> {
        let mut from = root;
        let new_root = self.copy_table(root)?;
        let mut table = new_root;
        for level in (2..=levels).rev() {
            let shift = level.checked_mul(9)?.checked_add(3)?;
            let index = usize::try_from(addr.checked_shr(shift)? & 511).ok()?;
            let entry = self.read(from, index);
            from = entry & ADDRESS;
            let copy = self.copy_table(from)?;
            self.write(table, index, (entry & !ADDRESS) | copy);
            table = copy;
        }
        // SAFETY: a page of the pool, for ever; its entries are only ever accessed as atomics.
        Some((new_root, unsafe { &*(table as *const [AtomicU64; ENTRIES]) }))
    }

    /// The entry that maps `addr` in the tables at `root`, and the bytes that it maps; `None` when nothing does.
    pub fn leaf(&self, root: u64, levels: u32, addr: u64) -> Option<(&'static AtomicU64, u64)> {
        const PRESENT: u64 = 1;
        const LARGE: u64 = 1 << 7;
        let mut table = root;
        for level in (1..=levels).rev() {
            let shift = level.checked_mul(9)?.checked_add(3)?;
            let index = usize::try_from(addr.checked_shr(shift)? & 511).ok()?;
            let entry = self.read(table, index);
            if entry & PRESENT == 0 {
                return None;
            }
            if level == 1 || entry & LARGE != 0 {
                return Some((slot(table, index)?, 1u64.checked_shl(shift)?));
            }
            table = entry & ADDRESS;
        }
        None
    }

    fn copy_table(&mut self, from: u64) -> Option<u64> {
        let to = self.pages(1)?;
        for index in 0..ENTRIES {
            let entry = self.read(from, index);
            self.write(to, index, entry);
        }
        Some(to)
    }

    /// A page of words that hardware and other CPUs may write: never a `&mut`.
    pub fn words(&mut self) -> Option<&'static [AtomicU64; ENTRIES]> {
        let page = self.pages(1)?;
        // SAFETY: a fresh zeroed page, for ever, accessed as atomics only.
        Some(unsafe { &*(page as *const [AtomicU64; ENTRIES]) })
    }
}

impl TablePool for PagePool {
    fn alloc(&mut self) -> Option<u64> {
        self.pages(1)
    }
    fn read(&self, table: u64, index: usize) -> u64 {
        slot(table, index).map_or(0, |s| s.load(Ordering::Relaxed))
    }
    fn write(&mut self, table: u64, index: usize, entry: u64) {
        if let Some(s) = slot(table, index) {
            s.store(entry, Ordering::Release);
        }
    }
}
