//! The page tables by which SINIT finds the MLE's pages.
//!
//! Spec: \[TXT\] "MLE Page Tables": PAE paging, pages of 4 KiB alone; page directory pointers, directory, tables and pages
//! lie in rising order, without gaps in linear space.

use hv::addr::PAGE_SIZE;

/// Entry is valid.
const PRESENT: u64 = 1;
/// Entries of a table.
const ENTRIES: u64 = 512;

/// Bytes of the tables for an image of `size` bytes that is linear from 0: pointers, one directory (1 GiB), and tables.
pub const fn size(size: u64) -> u64 {
    let pages = size.div_ceil(PAGE_SIZE);
    PAGE_SIZE.saturating_mul(pages.div_ceil(ENTRIES).saturating_add(2))
}

/// Writes into `out`, zeroed and of [`size`] bytes at physical address `at`, the tables of the image at `image`, which comes
/// after them.
///
/// None when the image is larger than a directory maps, the room is another, or the order is wrong.
pub fn build(out: &mut [u8], at: u64, image: u64, image_size: u64) -> Option<()> {
    let pages = image_size.div_ceil(PAGE_SIZE);
    let tables = pages.div_ceil(ENTRIES);
    let end = at.checked_add(out.len() as u64)?;
    if tables > ENTRIES || out.len() as u64 != size(image_size) || end > image {
        return None;
    }
    let mut put = |at: u64, value: u64| {
        let at = usize::try_from(at).ok()?;
        out.get_mut(at..at.checked_add(8)?)?.copy_from_slice(&(value | PRESENT).to_le_bytes());
        Some(())
    };
    put(0, at.checked_add(PAGE_SIZE)?)?;
    for table in 0..tables {
        let place = table.saturating_add(2).saturating_mul(PAGE_SIZE);
        put(PAGE_SIZE.saturating_add(table.saturating_mul(8)), at.checked_add(place)?)?;
    }
    for page in 0..pages {
        // Tables follow each other, so their entries do.
        let entry = PAGE_SIZE.saturating_mul(2).saturating_add(page.saturating_mul(8));
        put(entry, image.checked_add(page.saturating_mul(PAGE_SIZE))?)?;
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_page_is_found_and_no_other() {
        let bytes = 600 * 4096 - 5;
        assert_eq!(size(bytes), 4 * 4096);
        let (at, image) = (0x10_0000, 0x20_0000);
        let mut out = vec![0; 4 * 4096];
        build(&mut out, at, image, bytes).unwrap();
        let entry = |table: u64, index: usize| {
            let from = (table - at) as usize + index * 8;
            u64::from_le_bytes(out[from..from + 8].try_into().unwrap())
        };
        let follow = |value: u64| (value & 1 == 1).then_some(value & !0xfff);
        let mut last = at;
        for page in 0..1024 {
            let found = follow(entry(at, 0))
                .and_then(|directory| follow(entry(directory, page / 512)))
                .and_then(|table| follow(entry(table, page % 512)));
            assert_eq!(found, (page < 600).then_some(image + page as u64 * 4096));
            assert!(found.is_none_or(|page| page > last));
            last = found.unwrap_or(last);
        }
    }

    #[test]
    fn wrong_places_are_refused() {
        let mut out = vec![0; 3 * 4096];
        assert_eq!(build(&mut out, 0x2000, 0x4000, 4096), None, "tables reach the image");
        assert_eq!(build(&mut out, 0x2000, 0x1000, 4096), None, "image before the tables");
        assert_eq!(build(&mut out[..4096], 0x2000, 0x9000, 4096), None, "no room");
        assert_eq!(build(&mut out, 0x2000, 0x5000, 4096), Some(()));
    }
}
