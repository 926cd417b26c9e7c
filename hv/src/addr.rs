//! Physical addresses and ranges that cannot wrap.

use core::fmt;

/// Bytes in the smallest page.
pub const PAGE_SIZE: u64 = 4096;

/// First address past 4 GiB.
pub const FOUR_GIB: u64 = 1 << 32;

/// A non-empty range of physical memory, `start..=last`.
///
/// The last byte, not the end, is stored: a range may reach the top of the address space and no
/// arithmetic on it can wrap.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct PhysRange {
    start: u64,
    last: u64,
}

impl PhysRange {
    /// `len` bytes from `start`; `None` when empty or when the end would pass 2^64.
    pub const fn new(start: u64, len: u64) -> Option<Self> {
        match len.checked_sub(1) {
            None => None,
            Some(more) => match start.checked_add(more) {
                None => None,
                Some(last) => Some(Self { start, last }),
            },
        }
    }

    /// `start..=last`; `None` when `last` is below `start`.
    pub const fn from_last(start: u64, last: u64) -> Option<Self> {
        if last < start { None } else { Some(Self { start, last }) }
    }

    /// First address.
    pub const fn start(&self) -> u64 {
        self.start
    }

    /// Last address inside the range.
    pub const fn last(&self) -> u64 {
        self.last
    }

    /// Length in bytes; saturates for the one range that holds all 2^64 addresses.
    pub const fn len(&self) -> u64 {
        self.last.wrapping_sub(self.start).saturating_add(1)
    }

    /// Never: an empty range cannot be made. Here because `len` is.
    pub const fn is_empty(&self) -> bool {
        false
    }

    /// First address past the range; `None` when the range reaches 2^64.
    pub const fn end(&self) -> Option<u64> {
        self.last.checked_add(1)
    }

    /// Whether `other` lies wholly inside.
    pub const fn contains(&self, other: &Self) -> bool {
        self.start <= other.start && other.last <= self.last
    }

    /// Whether `addr` is inside.
    pub const fn contains_addr(&self, addr: u64) -> bool {
        self.start <= addr && addr <= self.last
    }

    /// Whether the two share a byte.
    pub const fn overlaps(&self, other: &Self) -> bool {
        self.start <= other.last && other.start <= self.last
    }

    /// What the two share; `None` when nothing.
    pub fn intersection(&self, other: &Self) -> Option<Self> {
        Self::from_last(self.start.max(other.start), self.last.min(other.last))
    }

    /// The smallest range of whole pages that holds this one.
    pub const fn page_outward(&self) -> Self {
        let mask = PAGE_SIZE.wrapping_sub(1);
        Self { start: self.start & !mask, last: self.last | mask }
    }
}

impl fmt::Debug for PhysRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}..={:#x}", self.start, self.last)
    }
}

impl fmt::Display for PhysRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// Sorts by range, by insertion: the lists are short and mostly in order already, and the library's sort is two kilobytes
/// of code for each type that it sorts.
pub fn sort_by_range<T>(items: &mut [T], range: impl Fn(&T) -> PhysRange) {
    for end in 1..items.len() {
        for at in (1..=end).rev() {
            match items.get_mut(at.saturating_sub(1)..=at) {
                Some([a, b]) if range(a) > range(b) => core::mem::swap(a, b),
                _ => break,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn empty_and_wrapping_ranges_do_not_exist() {
        assert_eq!(PhysRange::new(0x1000, 0), None);
        assert_eq!(PhysRange::new(u64::MAX, 2), None);
        assert_eq!(PhysRange::new(u64::MAX, 1).map(|r| r.last()), Some(u64::MAX));
    }

    #[test]
    fn touching_ranges_do_not_overlap() {
        let a = PhysRange::new(0x1000, 0x1000).unwrap();
        let b = PhysRange::new(0x2000, 0x1000).unwrap();
        assert!(!a.overlaps(&b) && !b.overlaps(&a));
        assert_eq!(a.intersection(&b), None);
        let across = PhysRange::new(0x1fff, 2).unwrap();
        assert!(a.overlaps(&across));
        assert_eq!(a.intersection(&across), PhysRange::new(0x1fff, 1));
    }

    proptest! {
        #[test]
        fn sorting_is_the_librarys(pages in proptest::collection::vec((0u64..20, 1u64..4), 0..40)) {
            let mut items: Vec<_> =
                pages.iter().enumerate().map(|(i, &(p, n))| (PhysRange::new(p, n).unwrap(), i)).collect();
            let mut expected = items.clone();
            expected.sort_by_key(|item| item.0);
            sort_by_range(&mut items, |item| item.0);
            prop_assert_eq!(items, expected);
        }
    }
}
