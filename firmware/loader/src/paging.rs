//! Makes one page of the firmware's page tables executable: firmware may map data with no-execute, and SKINIT is
//! issued from a page that is data to it.
//!
//! Spec: \[APM2\] "Long-Mode Page Translation".

use hv::io::PhysMem;

const PRESENT: u64 = 1;
const LARGE: u64 = 1 << 7;
const NO_EXECUTE: u64 = 1 << 63;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
/// Levels with 4-level paging.
pub const LEVELS: u32 = 4;
/// Levels with 5-level paging.
pub const LEVELS_LA57: u32 = 5;

/// `addr` is not mapped: the walk met an entry that is not present, or tables that can't be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotMapped;

/// Clears no-execute in every entry on the way to `addr`; `root` is CR3, `levels` is [`LEVELS`] or [`LEVELS_LA57`].
pub fn make_executable(mem: &impl PhysMem, root: u64, levels: u32, addr: u64) -> Result<(), NotMapped> {
    let mut table = root & ADDRESS;
    for level in (0..levels).rev() {
        // 9 bits of the address a level, 12 below them; an entry has 8 bytes.
        let index = addr >> level.saturating_mul(9).saturating_add(12) & 0x1ff;
        let at = table | index << 3;
        let mut bytes = [0; 8];
        if !mem.read(at, &mut bytes) {
            return Err(NotMapped);
        }
        let entry = u64::from_le_bytes(bytes);
        if entry & PRESENT == 0 {
            return Err(NotMapped);
        }
        if entry & NO_EXECUTE != 0 && !mem.write(at, &(entry & !NO_EXECUTE).to_le_bytes()) {
            return Err(NotMapped);
        }
        if entry & LARGE != 0 {
            break;
        }
        table = entry & ADDRESS;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::cell::RefCell;
    use std::collections::BTreeMap;

    struct Tables(RefCell<BTreeMap<u64, u64>>);
    impl PhysMem for Tables {
        fn read(&self, addr: u64, out: &mut [u8]) -> bool {
            let entry = self.0.borrow().get(&addr).copied();
            entry.map(|e| out.copy_from_slice(&e.to_le_bytes())).is_some()
        }
        fn write(&self, addr: u64, data: &[u8]) -> bool {
            self.0.borrow_mut().insert(addr, u64::from_le_bytes(data.try_into().unwrap()));
            true
        }
    }

    fn tables(entries: &[(u64, u64)]) -> Tables {
        Tables(RefCell::new(entries.iter().copied().collect()))
    }

    #[test]
    fn no_execute_goes_from_the_walk_and_from_nothing_else() {
        let nx = NO_EXECUTE;
        // Tables at 1000h..4000h; page 9e000h is index 9eh of the last.
        let t = tables(&[
            (0x1000, 0x2003),
            (0x2000, nx | 0x3003),
            (0x3000, 0x4003),
            (0x4000 + 0x9e * 8, nx | 0x9e063),
            (0x4000 + 0x9f * 8, nx | 0x9f063),
        ]);
        assert_eq!(make_executable(&t, 0x1018, LEVELS, 0x9e0f0), Ok(()));
        let now: Vec<u64> = t.0.borrow().values().copied().collect();
        assert_eq!(now, [0x2003, 0x3003, 0x4003, 0x9e063, nx | 0x9f063]);
    }

    #[test]
    fn large_pages_end_the_walk() {
        let t = tables(&[(0x1000, 0x2003), (0x2000, 0x3003), (0x3000, NO_EXECUTE | 0x83)]);
        assert_eq!(make_executable(&t, 0x1000, LEVELS, 0x9e0f0), Ok(()));
        assert_eq!(t.0.borrow()[&0x3000], 0x83);
        let t = tables(&[(0x0000, 0x1003), (0x1000, 0x2003), (0x2000, NO_EXECUTE | 0x83)]);
        assert_eq!(make_executable(&t, 0, LEVELS_LA57, 0x9e0f0), Ok(()));
        assert_eq!(t.0.borrow()[&0x2000], 0x83);
    }

    #[test]
    fn what_is_not_mapped_is_an_error() {
        assert_eq!(
            make_executable(&tables(&[(0x1000, 0x2003), (0x2000, 0x3002)]), 0x1000, LEVELS, 0),
            Err(NotMapped)
        );
        assert_eq!(make_executable(&tables(&[(0x1000, 0x2003)]), 0x1000, LEVELS, 0), Err(NotMapped));
    }
}
