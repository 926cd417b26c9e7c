//! Did SMM change what is the MLE's? A keyed sum of each guarded page, taken at launch and compared after an SMI.
//!
//! It finds stray writes, and writes by SMM code that was not made against it. Code that was can read the key,
//! or change the check itself: nothing that runs after SMM can find that. See `docs/smm.md`.
//!
//! The sum is SipHash-1-3 under a key drawn at launch: 64-bit integer code, so no vector register of the guest is
//! touched, and any change stays unseen with a chance of 2^-64.

use core::fmt;
use core::hash::Hasher;

use heapless::Vec;
use hv::addr::{PAGE_SIZE, PhysRange};
use hv::io::PhysMem;
use siphasher::sip::SipHasher13;

/// Most regions.
pub const REGIONS_MAX: usize = 16;
/// Most pages in all regions, those in part included: 1 MiB. It bounds what an SMI costs.
pub const PAGES_MAX: usize = 256;

/// Regions of memory that are to stay as they are.
pub struct Guarded {
    key: [u8; 16],
    regions: Vec<PhysRange, REGIONS_MAX>,
    /// For each page of each region in order; a region's first and last may be parts of pages.
    sums: Vec<u64, PAGES_MAX>,
}

/// Why regions cannot be guarded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuardError {
    /// More than [`REGIONS_MAX`] regions; how many.
    Regions(usize),
    /// More than [`PAGES_MAX`] pages.
    Pages,
    /// Memory that cannot be read.
    Unreadable(PhysRange),
}

impl fmt::Display for GuardError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("guarded memory: ")?;
        match self {
            Self::Regions(count) => write!(f, "{count} regions, limit {REGIONS_MAX}"),
            Self::Pages => write!(f, "more pages than the limit of {PAGES_MAX}"),
            Self::Unreadable(range) => write!(f, "{range} cannot be read"),
        }
    }
}

/// Guarded memory that is not what it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tampered {
    /// The first page, or the guarded part of it.
    pub range: PhysRange,
}

impl fmt::Display for Tampered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "memory of the MLE changed at {}", self.range)
    }
}

impl fmt::Debug for Guarded {
    /// Not the key.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Guarded").field("regions", &self.regions).finish_non_exhaustive()
    }
}

impl Guarded {
    /// Takes the sums. `key` is random and known to nobody else. The regions hold what nobody writes while the guest
    /// runs, the CPU and devices included: of page tables, those made with their accessed and dirty bits set.
    pub fn new(key: [u8; 16], regions: &[PhysRange], mem: &impl PhysMem) -> Result<Self, GuardError> {
        let mut guarded = Self { key, regions: Vec::new(), sums: Vec::new() };
        guarded.regions.extend_from_slice(regions).map_err(|_| GuardError::Regions(regions.len()))?;
        for page in regions.iter().flat_map(pages) {
            let sum = guarded.sum(mem, &page).ok_or(GuardError::Unreadable(page))?;
            guarded.sums.push(sum).map_err(|_| GuardError::Pages)?;
        }
        Ok(guarded)
    }

    /// The first page that changed; a page that cannot be read any more has.
    pub fn check(&self, mem: &impl PhysMem) -> Option<Tampered> {
        let mut pages = self.regions.iter().flat_map(pages).zip(&self.sums);
        let (range, _) = pages.find(|(page, sum)| self.sum(mem, page) != Some(**sum))?;
        Some(Tampered { range })
    }

    /// Takes new sums of the pages that hold a part of `changed`, after the MLE changed it. What SMM changed on
    /// these pages since the last check is taken for good: check first.
    pub fn rearm(&mut self, changed: &PhysRange, mem: &impl PhysMem) -> Result<(), GuardError> {
        let changed = changed.page_outward();
        let mut sums = core::mem::take(&mut self.sums);
        let mut result = Ok(());
        for (page, sum) in self.regions.iter().flat_map(pages).zip(&mut sums) {
            if page.overlaps(&changed) {
                match self.sum(mem, &page) {
                    Some(new) => *sum = new,
                    None => result = Err(GuardError::Unreadable(page)),
                }
            }
        }
        self.sums = sums;
        result
    }

    fn sum(&self, mem: &impl PhysMem, page: &PhysRange) -> Option<u64> {
        let mut copy = [0; PAGE_SIZE as usize];
        let copy = copy.get_mut(..usize::try_from(page.len()).ok()?)?;
        if !mem.read(page.start(), copy) {
            return None;
        }
        let mut hasher = SipHasher13::new_with_key(&self.key);
        hasher.write(copy);
        Some(hasher.finish())
    }
}

/// The pages of a region, cut to it.
fn pages(region: &PhysRange) -> impl Iterator<Item = PhysRange> {
    let region = *region;
    let mut next = Some(region.start());
    core::iter::from_fn(move || {
        let page = PhysRange::from_last(next?, next? | (PAGE_SIZE - 1))?.intersection(&region)?;
        next = page.end();
        Some(page)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testmem::Ram;
    use proptest::prelude::*;

    const KEY: [u8; 16] = *b"0123456789abcdef";
    const BASE: u64 = 0x10_0000;

    fn ram(pages: usize) -> Ram {
        let ram = Ram::new(BASE, pages * 4096);
        for page in 0..pages as u64 {
            ram.write(BASE + page * 4096 + 8, &page.to_le_bytes());
        }
        ram
    }

    fn range(start: u64, len: u64) -> PhysRange {
        PhysRange::new(BASE + start, len).unwrap()
    }

    fn flip(ram: &Ram, at: u64, bit: u8) {
        let mut byte = [0];
        assert!(ram.read(at, &mut byte));
        assert!(ram.write(at, &[byte[0] ^ 1 << bit]));
    }

    #[test]
    fn a_change_is_found_with_its_page_and_only_inside() {
        let ram = ram(8);
        let guarded = Guarded::new(KEY, &[range(0x100, 0x1f80), range(0x3000, 0x2000)], &ram).unwrap();
        assert_eq!(guarded.check(&ram), None);
        for (at, page) in [
            (0x0ff, None),
            (0x100, Some((0x100, 0xf00))),
            (0xfff, Some((0x100, 0xf00))),
            (0x1000, Some((0x1000, 0x1000))),
            (0x207f, Some((0x2000, 0x80))),
            (0x2080, None),
            (0x4abc, Some((0x4000, 0x1000))),
            (0x5000, None),
        ] {
            flip(&ram, BASE + at, 3);
            let expected = page.map(|(start, len)| Tampered { range: range(start, len) });
            assert_eq!(guarded.check(&ram), expected, "{at:#x}");
            flip(&ram, BASE + at, 3);
        }
        assert_eq!(guarded.check(&ram), None);
    }

    #[test]
    fn exchanged_pages_are_changed_pages() {
        let ram = ram(2);
        let guarded = Guarded::new(KEY, &[range(0, 0x2000)], &ram).unwrap();
        ram.write(BASE + 8, &1u64.to_le_bytes());
        ram.write(BASE + 0x1008, &0u64.to_le_bytes());
        assert!(guarded.check(&ram).is_some());
    }

    #[test]
    fn the_sum_depends_on_the_key() {
        let ram = ram(1);
        let sums = [KEY, [0; 16]].map(|key| Guarded::new(key, &[range(0, 0x1000)], &ram).unwrap().sums);
        assert_ne!(sums[0], sums[1]);
    }

    #[test]
    fn what_the_mle_changed_is_taken_over_and_nothing_else() {
        let ram = ram(4);
        let mut guarded = Guarded::new(KEY, &[range(0, 0x4000)], &ram).unwrap();
        flip(&ram, BASE + 0x1ffe, 0);
        flip(&ram, BASE + 0x3000, 0);
        guarded.rearm(&range(0x1ffe, 1), &ram).unwrap();
        assert_eq!(guarded.check(&ram), Some(Tampered { range: range(0x3000, 0x1000) }));
        guarded.rearm(&range(0x2fff, 2), &ram).unwrap();
        assert_eq!(guarded.check(&ram), None);
        assert!(guarded.rearm(&range(0, 1), &Ram::new(0, 1)).is_err());
        assert_eq!(guarded.check(&ram), None);
    }

    #[test]
    fn limits_are_errors() {
        let ram = ram(4);
        let error = |regions: &[PhysRange]| Guarded::new(KEY, regions, &ram).unwrap_err();
        assert_eq!(error(&[range(0, 1); 17]), GuardError::Regions(17));
        assert_eq!(error(&[range(0, 0x5000)]), GuardError::Unreadable(range(0x4000, 0x1000)));
        let large = Ram::new(BASE, 257 * 4096);
        assert_eq!(Guarded::new(KEY, &[range(0, 257 * 4096)], &large).unwrap_err(), GuardError::Pages);
        let most = Guarded::new(KEY, &[range(0, 256 * 4096)], &large).unwrap();
        assert!(most.check(&Ram::new(0, 1)).is_some());
        let top = PhysRange::from_last(u64::MAX - 0x1800, u64::MAX).unwrap();
        assert_eq!(pages(&top).count(), 2);
    }

    /// `cargo test --release -p firmware -- --ignored --nocapture cost`
    #[test]
    #[ignore = "a measurement, not a test"]
    fn cost() {
        let ram = ram(128);
        let guarded = Guarded::new(KEY, &[range(0, 128 * 4096)], &ram).unwrap();
        let start = std::time::Instant::now();
        for _ in 0..200 {
            assert_eq!(guarded.check(&ram), None);
        }
        println!("{} ns/KiB", start.elapsed().as_nanos() / (200 * 512));
    }

    proptest! {
        #[test]
        fn every_flipped_bit_is_found(start in 0u64..0x2000, len in 1u64..0x3000, key: [u8; 16], at: u64, bit in 0u8..8) {
            let ram = ram(5);
            let region = range(start, len);
            let guarded = Guarded::new(key, &[region], &ram).unwrap();
            prop_assert_eq!(guarded.check(&ram), None);
            let at = region.start() + at % len;
            flip(&ram, at, bit);
            let found = guarded.check(&ram).unwrap();
            prop_assert!(found.range.contains_addr(at) && region.contains(&found.range));
        }
    }
}
