//! The SLB stage's own page tables: memory below 4 GiB one to one, nothing executable but the measured part.

use core::sync::atomic::{Ordering, compiler_fence};

use hv::addr::{FOUR_GIB, PAGE_SIZE, PhysRange};

const PRESENT: u64 = 1;
const WRITE: u64 = 1 << 1;
/// Strong uncacheable: both bits together select it under the reset value of the PAT.
const UNCACHED: u64 = 1 << 3 | 1 << 4;
const LARGE: u64 = 1 << 7;
const NO_EXECUTE: u64 = 1 << 63;
/// The address in the entry of a page of 2 MiB or more.
const LARGE_ADDRESS: u64 = 0x000f_ffff_ffe0_0000;

/// The PAT's value at reset, by which these tables are meant.
pub const PAT_RESET: u64 = 0x0007_0406_0007_0406;

const GIB: u64 = 1 << 30;
const MIB2: u64 = 2 << 20;
/// From here to 4 GiB nothing is cached: the device registers that are used here lie there.
pub const UNCACHED_FROM: u64 = FOUR_GIB - GIB;

type Table = [u64; 512];

/// Four pages in the scratch half of the SLB, right below the stack. The entry code has filled all but
/// `slb_pages` for the SLB's GiB.
#[repr(C, align(4096))]
pub struct Tables {
    /// One entry a GiB.
    gibs: Table,
    /// The GiB of the SLB by 2 MiB pages.
    slb_gib: Table,
    /// The 2 MiB of the SLB by 4 KiB pages.
    slb_pages: Table,
    /// What CR3 points to. Complete since entry, and in these tables not mapped: the stack's guard page.
    root: Table,
}

/// Where the SLB is.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    /// The SLB's base, 64 KiB aligned.
    pub slb: u64,
    /// Bytes of its measured part, whole pages: read and execute.
    pub measured: u64,
}

/// A page of data; in the last GiB of device registers, which no cache may hold. RAM there is merely slow.
const fn data(addr: u64) -> u64 {
    let cache = if addr >= UNCACHED_FROM { UNCACHED } else { 0 };
    addr | PRESENT | WRITE | NO_EXECUTE | cache
}

fn fill(table: &mut Table, first: u64, step: u64, entry: impl Fn(u64) -> u64) {
    let mut addr = first;
    for slot in table {
        *slot = entry(addr);
        addr = addr.wrapping_add(step);
    }
}

impl Tables {
    /// Writes the tables, which lie at `at` and which the CPU is using, with the SLB's GiB mapped one to one: what
    /// an entry points to is there before the entry. Load [`Tables::root`] afterwards.
    pub fn fill(&mut self, at: u64, layout: &Layout) {
        let slb_gib = layout.slb & !(GIB - 1);
        let slb_2m = layout.slb & !(MIB2 - 1);
        let guard = Self::root_at(at);
        fill(&mut self.slb_pages, slb_2m, PAGE_SIZE, |addr| match addr {
            _ if addr.wrapping_sub(layout.slb) < layout.measured => addr | PRESENT,
            _ if addr == guard => 0,
            _ => data(addr),
        });
        compiler_fence(Ordering::SeqCst);
        fill(&mut self.slb_gib, slb_gib, MIB2, |addr| match addr {
            _ if addr == slb_2m => at.wrapping_add(2 * PAGE_SIZE) | PRESENT | WRITE,
            _ => data(addr) | LARGE,
        });
        compiler_fence(Ordering::SeqCst);
        fill(&mut self.gibs, 0, GIB, |addr| match addr {
            _ if addr == slb_gib => at.wrapping_add(PAGE_SIZE) | PRESENT | WRITE,
            _ if addr < FOUR_GIB => data(addr) | LARGE,
            _ => 0,
        });
    }

    /// The value for CR3 of tables at `at`.
    pub const fn root_at(at: u64) -> u64 {
        at.wrapping_add(3 * PAGE_SIZE)
    }

    /// Makes the large pages that hold any of `range` executable. Load CR3 afterwards.
    pub fn allow_execute(&mut self, range: &PhysRange) {
        for (table, size) in [(&mut self.gibs, GIB), (&mut self.slb_gib, MIB2)] {
            for entry in table.iter_mut().filter(|entry| **entry & LARGE != 0) {
                let page = PhysRange::new(*entry & LARGE_ADDRESS, size);
                if page.is_some_and(|page| page.overlaps(range)) {
                    *entry &= !NO_EXECUTE;
                }
            }
        }
    }

    /// The leaf entry for `addr`, found as the CPU does, and its page's size; zeros: not mapped.
    #[cfg(test)]
    fn walk(&self, at: u64, addr: u64) -> (u64, u64) {
        let tables = [&self.gibs, &self.slb_gib, &self.slb_pages];
        let mut table = &self.root;
        for shift in [39, 30, 21, 12] {
            let entry = table[usize::try_from(addr >> shift & 511).unwrap()];
            if entry & PRESENT == 0 {
                return (0, 0);
            }
            if shift == 12 || entry & LARGE != 0 {
                return (entry, 1 << shift);
            }
            table = tables[usize::try_from((entry & !0xfff & !NO_EXECUTE) - at).unwrap() / 4096];
        }
        unreachable!()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Offset of the tables in the SLB, and of the page that is not mapped.
    const TABLES: u64 = 0x9000;
    const GUARD: u64 = 0xc000;

    fn tables(slb: u64) -> Box<Tables> {
        let at = slb + TABLES;
        let mut tables =
            Box::new(Tables { gibs: [0; 512], slb_gib: [0; 512], slb_pages: [0; 512], root: [0; 512] });
        tables.root[0] = at | PRESENT | WRITE; // as the entry code leaves it
        tables.fill(at, &Layout { slb, measured: 0x5000 });
        tables
    }

    fn slbs() -> impl Strategy<Value = u64> {
        (0u64..0x1_0000).prop_map(|i| i << 16)
    }

    proptest! {
        #[test]
        fn all_below_4_gib_is_one_to_one_and_nothing_else_is_mapped(
            slb in slbs(),
            addr in prop_oneof![0..FOUR_GIB, FOUR_GIB..1 << 48],
        ) {
            let (entry, size) = tables(slb).walk(slb + TABLES, addr);
            if addr >= FOUR_GIB || addr.wrapping_sub(slb) >> 12 == GUARD >> 12 {
                prop_assert_eq!(entry, 0);
            } else {
                prop_assert_eq!(entry & 0x000f_ffff_ffff_f000, addr & !(size - 1));
                let uncached = addr >= 0xc000_0000 && addr.wrapping_sub(slb) >= 0x5000;
                prop_assert_eq!(entry & UNCACHED, if uncached { UNCACHED } else { 0 });
            }
        }

        #[test]
        fn no_page_is_writable_and_executable_and_only_the_measured_part_executes(
            slb in slbs(),
            offset in 0u64..0x1_0000,
            addr in 0..FOUR_GIB,
        ) {
            let tables = tables(slb);
            for addr in [addr, slb + offset] {
                let (entry, _) = tables.walk(slb + TABLES, addr);
                let measured = addr.wrapping_sub(slb) < 0x5000;
                if entry != 0 {
                    prop_assert_eq!(entry & NO_EXECUTE == 0, measured);
                    prop_assert_eq!(entry & WRITE == 0, measured);
                }
            }
        }

        #[test]
        fn the_mle_becomes_executable_and_the_slb_does_not(
            slb in slbs(),
            mle in (0u64..0x7ff).prop_map(|i| i << 21),
        ) {
            prop_assume!(mle >> 21 != slb >> 21);
            let mut tables = tables(slb);
            let image = PhysRange::new(mle, 0x4_0000).unwrap();
            tables.allow_execute(&image);
            let at = slb + TABLES;
            prop_assert_eq!(tables.walk(at, mle).0 & NO_EXECUTE, 0);
            prop_assert_eq!(tables.walk(at, image.last()).0 & NO_EXECUTE, 0);
            prop_assert_ne!(tables.walk(at, slb + 0x6000).0 & NO_EXECUTE, 0);
        }
    }
}
