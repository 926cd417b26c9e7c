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
pub const REGIONS_MAX: usize = 256;
/// Most pages in all regions, those in part included: 6 MiB. It bounds what an SMI costs. A CPU without 1 GiB pages takes a page of
/// nested tables for each GiB of its address space, 512 at the most, and as many of device tables for each GiB of memory.
pub const PAGES_MAX: usize = 1536;
/// Room for the sums of so many.
pub type Sums = [u64; PAGES_MAX];
/// Most sets of words: a virtual CPU for each CPU, and the sandbox.
pub const WORD_SETS_MAX: usize = 65;
/// Pages of one part of a check: the guest's interrupts wait for as long.
pub const PART_PAGES: usize = 4;

/// Words of a page that stay as they are among others that change: offset, and which bits of the word.
pub type Words = &'static [(u16, u64)];

/// Memory that is to stay as it is.
pub struct Guarded {
    key: [u8; 16],
    regions: Vec<Region, REGIONS_MAX>,
    /// For each page of each region in order; a region's first and last may be parts of pages. The rest is room.
    sums: Option<&'static mut Sums>,
    pages: usize,
    sets: Vec<WordSet, WORD_SETS_MAX>,
}

struct Region {
    range: PhysRange,
    /// Of each 64-bit word, the bits that stay.
    mask: u64,
}

struct WordSet {
    base: u64,
    words: Words,
    sum: u64,
}

/// Why memory cannot be guarded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuardError {
    /// More than [`REGIONS_MAX`] regions.
    Regions,
    /// More than [`PAGES_MAX`] pages.
    Pages,
    /// More than [`WORD_SETS_MAX`] sets of words.
    WordSets,
    /// Memory that cannot be read.
    Unreadable(PhysRange),
}

impl fmt::Display for GuardError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("guarded memory: ")?;
        match self {
            Self::Regions => write!(f, "more than {REGIONS_MAX} regions"),
            Self::Pages => write!(f, "more than {PAGES_MAX} pages"),
            Self::WordSets => write!(f, "more than {WORD_SETS_MAX} sets of words"),
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
        let (regions, sets) = (self.regions.len(), self.sets.len());
        f.debug_struct("Guarded").field("regions", &regions).field("sets", &sets).finish_non_exhaustive()
    }
}

impl Guarded {
    /// Guards nothing, and has no room for it. All zeros, so that an image need not hold it.
    pub const NONE: Self = Self { key: [0; 16], regions: Vec::new(), sums: None, pages: 0, sets: Vec::new() };

    /// Guards nothing yet, in that room, under a key that is random and known to nobody else.
    pub fn begin(&mut self, key: [u8; 16], sums: &'static mut Sums) {
        (self.key, self.sums) = (key, Some(sums));
    }

    /// Guards `range`: of each of its 64-bit words the bits of `mask`, which nobody writes while the guest runs, the CPU and
    /// devices included: of page tables, those made with their accessed and dirty bits set. On an error, nothing of it.
    pub fn add(&mut self, range: PhysRange, mask: u64, mem: &impl PhysMem) -> Result<(), GuardError> {
        let region = Region { range, mask };
        let mut all = self.pages;
        for page in pages(&range) {
            let sum = self.sum(mem, &page, mask).ok_or(GuardError::Unreadable(page))?;
            *self.sums.as_mut().and_then(|sums| sums.get_mut(all)).ok_or(GuardError::Pages)? = sum;
            all = all.saturating_add(1);
        }
        self.regions.push(region).map_err(|_| GuardError::Regions)?;
        self.pages = all;
        Ok(())
    }

    /// Guards words of the page at `base`, from now on as they are now.
    pub fn set_words(&mut self, base: u64, words: Words, mem: &impl PhysMem) -> Result<(), GuardError> {
        let unreadable =
            || PhysRange::new(base, PAGE_SIZE).map_or(GuardError::WordSets, GuardError::Unreadable);
        let sum = self.sum_words(mem, base, words).ok_or_else(unreadable)?;
        let set = WordSet { base, words, sum };
        if let Some(known) = self.sets.iter_mut().find(|set| set.base == base) {
            *known = set;
            return Ok(());
        }
        self.sets.push(set).map_err(|_| GuardError::WordSets)
    }

    /// How many regions, pages and sets of words are guarded.
    pub fn counts(&self) -> (usize, usize, usize) {
        (self.regions.len(), self.pages, self.sets.len())
    }

    /// Checks [`PART_PAGES`] pages from the `from`th on, and with the last of them the sets of words. Gives the page at which the
    /// next part begins, or `None` when there is none.
    ///
    /// # Errors
    /// The first page that changed; a page that cannot be read any more has.
    pub fn check_part(&self, from: usize, mem: &impl PhysMem) -> Result<Option<usize>, Tampered> {
        let pages = self.regions.iter().flat_map(|r| pages(&r.range).map(|page| (page, r.mask)));
        let page = pages
            .zip(self.sums.iter().flat_map(|sums| sums.iter()))
            .skip(from)
            .take(PART_PAGES)
            .find(|((page, mask), sum)| self.sum(mem, page, *mask) != Some(**sum));
        if let Some(((range, _), _)) = page {
            return Err(Tampered { range });
        }
        let next = from.saturating_add(PART_PAGES);
        if next < self.pages {
            return Ok(Some(next));
        }
        let set = self.sets.iter().find(|set| self.sum_words(mem, set.base, set.words) != Some(set.sum));
        match set.and_then(|set| PhysRange::new(set.base, PAGE_SIZE)) {
            Some(range) => Err(Tampered { range }),
            None => Ok(None),
        }
    }

    fn sum(&self, mem: &impl PhysMem, page: &PhysRange, mask: u64) -> Option<u64> {
        let mut copy = [0; PAGE_SIZE as usize];
        let copy = copy.get_mut(..usize::try_from(page.len()).ok()?)?;
        if !mem.read(page.start(), copy) {
            return None;
        }
        if mask != u64::MAX {
            let (words, rest) = copy.as_chunks_mut();
            words.iter_mut().for_each(|word| *word = (u64::from_le_bytes(*word) & mask).to_le_bytes());
            rest.iter_mut().zip(mask.to_le_bytes()).for_each(|(byte, mask)| *byte &= mask);
        }
        let mut hasher = SipHasher13::new_with_key(&self.key);
        hasher.write(copy);
        Some(hasher.finish())
    }

    fn sum_words(&self, mem: &impl PhysMem, base: u64, words: Words) -> Option<u64> {
        let mut hasher = SipHasher13::new_with_key(&self.key);
        for (offset, mask) in words {
            let mut word = [0; 8];
            if !mem.read(base.checked_add(u64::from(*offset))?, &mut word) {
                return None;
            }
            hasher.write_u64(u64::from_le_bytes(word) & mask);
        }
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
    use std::boxed::Box;

    const KEY: [u8; 16] = *b"0123456789abcdef";
    const BASE: u64 = 0x10_0000;

    /// The first difference, found part by part.
    fn check(guarded: &Guarded, ram: &Ram) -> Option<Tampered> {
        let mut next = Some(0);
        while let Some(from) = next {
            match guarded.check_part(from, ram) {
                Ok(more) => next = more,
                Err(tampered) => return Some(tampered),
            }
        }
        None
    }

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

    fn empty(key: [u8; 16]) -> Guarded {
        let mut guarded = Guarded::NONE;
        guarded.begin(key, Box::leak(Box::new([0; PAGES_MAX])));
        guarded
    }

    fn guarded(key: [u8; 16], regions: &[PhysRange], ram: &Ram) -> Result<Guarded, GuardError> {
        let mut guarded = empty(key);
        regions.iter().try_for_each(|region| guarded.add(*region, u64::MAX, ram))?;
        Ok(guarded)
    }

    #[test]
    fn a_change_is_found_with_its_page_and_only_inside() {
        let ram = ram(8);
        let guarded = guarded(KEY, &[range(0x100, 0x1f80), range(0x3000, 0x2000)], &ram).unwrap();
        assert_eq!(check(&guarded, &ram), None);
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
            assert_eq!(check(&guarded, &ram), expected, "{at:#x}");
            flip(&ram, BASE + at, 3);
        }
        assert_eq!(check(&guarded, &ram), None);
    }

    #[test]
    fn bits_outside_of_the_mask_may_change() {
        let ram = ram(2);
        let mut guarded = empty(KEY);
        guarded.add(range(0x1000, 0x1000), !(1 << 63 | 2), &ram).unwrap();
        for (at, bit, found) in [(0x1ff8, 1, false), (0x1fff, 7, false), (0x1ff8, 2, true), (0x1ff9, 1, true)]
        {
            flip(&ram, BASE + at, bit);
            assert_eq!(check(&guarded, &ram).is_some(), found, "{at:#x} {bit}");
            flip(&ram, BASE + at, bit);
        }
    }

    #[test]
    fn words_are_guarded_as_they_were_last_set() {
        const WORDS: Words = &[(0, u64::MAX), (0x58, 0xffff_ffff), (0xff8, u64::MAX)];
        let ram = ram(2);
        let mut guarded = empty(KEY);
        guarded.set_words(BASE + 0x1000, WORDS, &ram).unwrap();
        for (at, found) in [(0, true), (8, false), (0x5b, true), (0x5c, false), (0xfff, true)] {
            flip(&ram, BASE + 0x1000 + at, 0);
            let expected = found.then_some(Tampered { range: range(0x1000, 0x1000) });
            assert_eq!(check(&guarded, &ram), expected, "{at:#x}");
            flip(&ram, BASE + 0x1000 + at, 0);
        }
        flip(&ram, BASE + 0x1000, 0);
        guarded.set_words(BASE + 0x1000, WORDS, &ram).unwrap();
        assert_eq!((check(&guarded, &ram), guarded.sets.len()), (None, 1));
        let missing = guarded.set_words(BASE + 0x2000, WORDS, &ram);
        assert_eq!(missing, Err(GuardError::Unreadable(range(0x2000, 0x1000))));
        for n in 1..WORD_SETS_MAX as u64 {
            guarded.set_words(BASE + n * 8, &[(0, 1)], &ram).unwrap();
        }
        assert_eq!(guarded.set_words(BASE, &[], &ram), Err(GuardError::WordSets));
    }

    #[test]
    fn exchanged_pages_are_changed_pages() {
        let ram = ram(2);
        let guarded = guarded(KEY, &[range(0, 0x2000)], &ram).unwrap();
        ram.write(BASE + 8, &1u64.to_le_bytes());
        ram.write(BASE + 0x1008, &0u64.to_le_bytes());
        assert!(check(&guarded, &ram).is_some());
    }

    #[test]
    fn the_sum_depends_on_the_key() {
        let ram = ram(1);
        let sums =
            [KEY, [0; 16]].map(|key| guarded(key, &[range(0, 0x1000)], &ram).unwrap().sums.unwrap()[0]);
        assert_ne!(sums[0], sums[1]);
    }

    #[test]
    fn limits_are_errors_and_leave_what_was_guarded() {
        let large = Ram::new(BASE, (PAGES_MAX + 1) * 4096);
        let page = |n: usize| range(n as u64 * 4096, 4096);
        let mut most = guarded(KEY, &[range(0, PAGES_MAX as u64 * 4096)], &large).unwrap();
        assert_eq!(most.add(page(PAGES_MAX), u64::MAX, &large), Err(GuardError::Pages));
        assert_eq!(check(&most, &large), None);
        assert!(check(&most, &Ram::new(0, 1)).is_some());
        let beyond = page(PAGES_MAX + 1);
        let all: std::vec::Vec<_> = (0..REGIONS_MAX).map(page).collect();
        let mut many = guarded(KEY, &all, &large).unwrap();
        assert_eq!(many.add(beyond, u64::MAX, &large), Err(GuardError::Unreadable(beyond)));
        assert_eq!(many.add(page(REGIONS_MAX), u64::MAX, &large), Err(GuardError::Regions));
        assert_eq!(check(&many, &large), None);
        flip(&large, BASE + 0x5000, 0);
        assert_eq!(check(&many, &large), Some(Tampered { range: page(5) }));
        let top = PhysRange::from_last(u64::MAX - 0x1800, u64::MAX).unwrap();
        assert_eq!(pages(&top).count(), 2);
    }

    /// `cargo test --release -p firmware -- --ignored --nocapture cost`
    #[test]
    #[ignore = "a measurement, not a test"]
    fn cost() {
        let ram = ram(128);
        let guarded = guarded(KEY, &[range(0, 128 * 4096)], &ram).unwrap();
        let start = std::time::Instant::now();
        for _ in 0..200 {
            assert_eq!(check(&guarded, &ram), None);
        }
        println!("{} ns/KiB", start.elapsed().as_nanos() / (200 * 512));
    }

    proptest! {
        #[test]
        fn every_flipped_bit_is_found(start in 0u64..0x2000, len in 1u64..0x3000, key: [u8; 16], at: u64, bit in 0u8..8) {
            let ram = ram(5);
            let region = range(start, len);
            let guarded = guarded(key, &[region], &ram).unwrap();
            prop_assert_eq!(check(&guarded, &ram), None);
            let at = region.start() + at % len;
            flip(&ram, at, bit);
            let found = check(&guarded, &ram).unwrap();
            prop_assert!(found.range.contains_addr(at) && region.contains(&found.range));
        }
    }
}
