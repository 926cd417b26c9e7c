//! The MSR bitmap. I/O bitmaps have the layout of SVM's permission map, the two pages one after the other.
//!
//! Spec: \[SDM3\] "MSR-Bitmap Address": read low, read high, write low, write high, 1 KiB each.

/// 4 KiB, page aligned. MSRs that it does not cover always exit.
#[derive(zerocopy::FromZeros)]
#[repr(C, align(4096))]
pub struct MsrBitmap([u8; 0x1000]);

const WRITE: usize = 0x800;

impl MsrBitmap {
    /// A map under which no covered MSR exits.
    pub const fn open() -> Self {
        Self([0; 0x1000])
    }

    /// Makes all of them exit (the sandbox).
    pub fn close(&mut self) {
        self.0.fill(0xff);
    }

    /// Byte and mask of an MSR's read bit; `None` for MSRs outside the two ranges.
    const fn position(index: u32) -> Option<(usize, u8)> {
        let (part, bit) = match index {
            0x0000_0000..=0x0000_1fff => (0, index),
            0xc000_0000..=0xc000_1fff => (0x400, index & 0x1fff),
            _ => return None,
        };
        Some(((bit >> 3).wrapping_add(part) as usize, 1 << (bit & 7)))
    }

    /// Lets RDMSR of an MSR through. Those outside the map exit all the same.
    pub fn allow_read(&mut self, index: u32) {
        if let Some((byte, mask)) = Self::position(index)
            && let Some(slot) = self.0.get_mut(byte)
        {
            *slot &= !mask;
        }
    }

    /// Makes WRMSR of an MSR exit, and RDMSR too if `read`. MSRs outside the map exit anyway.
    pub fn intercept(&mut self, index: u32, read: bool) {
        let Some((byte, mask)) = Self::position(index) else { return };
        if let Some(slot) = self.0.get_mut(byte.wrapping_add(WRITE)) {
            *slot |= mask;
        }
        if read && let Some(slot) = self.0.get_mut(byte) {
            *slot |= mask;
        }
    }

    /// Whether (reads, writes) of an MSR exit.
    pub fn intercepts(&self, index: u32) -> (bool, bool) {
        let Some((byte, mask)) = Self::position(index) else { return (true, true) };
        let at = |byte: usize| self.0.get(byte).is_none_or(|b| b & mask != 0);
        (at(byte), at(byte.wrapping_add(WRITE)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_are_the_manuals() {
        let mut m = MsrBitmap::open();
        m.intercept(0x1b, false);
        m.intercept(0xc000_0080, true);
        assert_eq!((m.0[3], m.0[0x803]), (0, 8));
        assert_eq!((m.0[0x410], m.0[0xc10]), (1, 1));
        assert_eq!(m.0.iter().map(|b| b.count_ones()).sum::<u32>(), 3);
        assert_eq!(m.intercepts(0x1b), (false, true));
        assert_eq!(m.intercepts(0xc001_0015), (true, true), "AMD's are outside");
        m.close();
        m.allow_read(0x1b);
        assert_eq!((m.intercepts(0x1b), m.intercepts(0x1a)), ((false, true), (true, true)));
    }
}
