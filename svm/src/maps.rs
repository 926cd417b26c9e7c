//! Permission maps: which MSRs and ports make a guest exit.
//!
//! Spec: \[APM2\] "MSR Intercepts" (MSRPM, two bits an MSR, read then write), "I/O Intercepts" (IOPM, one bit a port).

/// The MSR permission map: 8 KiB, page aligned. MSRs that it does not cover always exit.
#[derive(zerocopy::FromZeros)]
#[repr(C, align(4096))]
pub struct Msrpm([u8; 0x2000]);

/// What of an MSR exits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MsrIntercept {
    /// RDMSR and WRMSR.
    Both,
    /// WRMSR only.
    Write,
}

impl Msrpm {
    /// A map under which no covered MSR exits.
    pub const fn open() -> Self {
        Self([0; 0x2000])
    }

    /// Makes all of them exit (the sandbox).
    pub fn close(&mut self) {
        self.0.fill(0xff);
    }

    /// Lets RDMSR of an MSR through. Those outside the map exit all the same.
    pub fn allow_read(&mut self, index: u32) {
        if let Some((byte, bit)) = Self::position(index)
            && let Some(slot) = self.0.get_mut(byte)
        {
            *slot &= !1u8.checked_shl(bit).unwrap_or(0);
        }
    }

    /// Byte and bit of an MSR's read bit; `None` for MSRs outside the three ranges.
    const fn position(index: u32) -> Option<(usize, u32)> {
        let (vector, first) = match index {
            0x0000_0000..=0x0000_1fff => (0x000, 0x0000_0000),
            0xc000_0000..=0xc000_1fff => (0x800, 0xc000_0000),
            0xc001_0000..=0xc001_1fff => (0x1000, 0xc001_0000),
            _ => return None,
        };
        let bit = index.wrapping_sub(first).wrapping_mul(2);
        Some(((bit >> 3).wrapping_add(vector) as usize, bit & 7))
    }

    /// Makes an MSR exit. MSRs outside the map exit anyway.
    pub fn intercept(&mut self, index: u32, what: MsrIntercept) {
        let bits = match what {
            MsrIntercept::Both => 0b11u8,
            MsrIntercept::Write => 0b10,
        };
        if let Some((byte, bit)) = Self::position(index)
            && let Some(slot) = self.0.get_mut(byte)
        {
            *slot |= bits.checked_shl(bit).unwrap_or(0);
        }
    }

    /// Whether (reads, writes) of an MSR exit.
    pub fn intercepts(&self, index: u32) -> (bool, bool) {
        match Self::position(index) {
            None => (true, true),
            Some((byte, bit)) => {
                let two = self.0.get(byte).copied().unwrap_or(0xff).checked_shr(bit).unwrap_or(3);
                (two & 1 != 0, two & 2 != 0)
            }
        }
    }
}

/// The I/O permission map: 12 KiB, page aligned; the last bytes serve accesses that run past port FFFFh.
#[derive(zerocopy::FromZeros)]
#[repr(C, align(4096))]
pub struct Iopm([u8; 0x3000]);

impl Iopm {
    /// A map under which no port exits.
    pub const fn open() -> Self {
        Self([0; 0x3000])
    }

    /// Makes all of them exit (the sandbox).
    pub fn close(&mut self) {
        self.0.fill(0xff);
    }

    /// Makes a port exit, also when it is a part of a wider access.
    pub fn intercept(&mut self, port: u16) {
        if let Some(slot) = self.0.get_mut(usize::from(port >> 3)) {
            *slot |= 1 << (port & 7);
        }
    }

    /// Lets accesses of a port through, as far as they reach no other that exits.
    pub fn allow(&mut self, port: u16) {
        if let Some(slot) = self.0.get_mut(usize::from(port >> 3)) {
            *slot &= !(1 << (port & 7));
        }
    }

    /// Where a port's bit is: offset of an aligned word of eight bytes, and the bit in it.
    pub const fn place(port: u16) -> (u64, u64) {
        ((port as u64 >> 6) << 3, 1 << (port % 64))
    }

    /// Whether an access of `size` bytes to `port` exits.
    pub fn intercepts(&self, port: u16, size: u8) -> bool {
        (0..u32::from(size)).any(|i| {
            let p = u32::from(port).saturating_add(i);
            self.0.get((p >> 3) as usize).is_none_or(|b| b & (1 << (p & 7)) != 0)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_are_the_manuals() {
        // Typed from [APM2]: C000_0080h (EFER) is the 81st of the second range: byte 800h + 80h*2/8, bits 0 and 1.
        assert_eq!(Msrpm::position(0xc000_0080), Some((0x820, 0)));
        assert_eq!(Msrpm::position(0xc001_0114), Some((0x1045, 0)));
        assert_eq!(Msrpm::position(0x1b), Some((6, 6)));
        assert_eq!(Msrpm::position(0x2000), None);
        assert_eq!(Msrpm::position(0xc001_2000), None);
    }

    #[test]
    fn one_msr_is_intercepted_and_its_neighbours_are_not() {
        let mut m = Msrpm::open();
        m.intercept(0x1b, MsrIntercept::Write);
        assert_eq!(m.intercepts(0x1b), (false, true));
        assert_eq!(m.intercepts(0x1a), (false, false));
        assert_eq!(m.intercepts(0x1c), (false, false));
        assert_eq!(m.intercepts(0x4000_0000), (true, true));
    }

    #[test]
    fn a_closed_map_lets_through_what_is_allowed_to_be_read() {
        let mut m = Msrpm::open();
        m.close();
        m.allow_read(0x1b);
        assert_eq!(m.intercepts(0x1b), (false, true));
        assert_eq!((m.intercepts(0x1a), m.intercepts(0x1c)), ((true, true), (true, true)));
    }

    #[test]
    fn a_wide_access_that_touches_the_port_exits() {
        let mut m = Iopm::open();
        m.intercept(0xb2);
        assert!(m.intercepts(0xb2, 1) && m.intercepts(0xb0, 4) && m.intercepts(0xb1, 2));
        assert!(!m.intercepts(0xb3, 1) && !m.intercepts(0xb0, 2));
        let (offset, bit) = Iopm::place(0xb2);
        let at = usize::try_from(offset).unwrap();
        assert_eq!(m.0[at..at + 8], bit.to_le_bytes());
        assert!(!m.intercepts(0xffff, 4));
        m.close();
        assert!(m.intercepts(0xffff, 4));
        m.allow(0xb3);
        assert!(!m.intercepts(0xb3, 1));
        assert!(
            m.intercepts(0xb2, 1) && m.intercepts(0xb2, 2) && m.intercepts(0xb3, 2) && m.intercepts(0xb4, 1)
        );
    }
}
