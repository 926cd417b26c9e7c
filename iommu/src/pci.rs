//! PCI configuration space of segment 0 by ports CF8h and CFCh, and the search for IOMMUs in it.
//!
//! Spec: \[PCI\] "Configuration Mechanism #1", "Type 00h Configuration Space Header", "Capabilities List".

use hv::io::PortIo;

const ADDRESS: u16 = 0xcf8;
const DATA: u16 = 0xcfc;
/// Capabilities that fit the 192 bytes behind a header: a longer list is a loop.
const CAPABILITIES_MAX: usize = 48;

/// One PCI function of segment 0.
#[derive(Clone, Copy)]
pub struct Function<'a, P> {
    ports: &'a P,
    /// Bus in bits 15:8, device in 7:3, function in 2:0.
    pub id: u16,
}

impl<'a, P: PortIo> Function<'a, P> {
    /// The function with this id, whether it exists or not.
    pub const fn new(ports: &'a P, id: u16) -> Self {
        Self { ports, id }
    }

    fn select(&self, offset: u8) {
        let address = 0x8000_0000 | u32::from(self.id) << 8 | u32::from(offset & 0xfc);
        self.ports.out32(ADDRESS, address);
    }

    /// The register that holds byte `offset`; all ones when there is no such function.
    pub fn read(&self, offset: u8) -> u32 {
        self.select(offset);
        self.ports.in32(DATA)
    }

    /// Writes the register that holds byte `offset`.
    pub fn write(&self, offset: u8, value: u32) {
        self.select(offset);
        self.ports.out32(DATA, value);
    }

    /// Whether something answers.
    pub fn exists(&self) -> bool {
        self.read(0) & 0xffff != 0xffff
    }

    /// Base class and sub-class, e.g. 0806h.
    pub fn class(&self) -> u16 {
        (self.read(8) >> 16) as u16
    }

    /// Whether it has a bus behind it: a PCI or CardBus bridge.
    pub fn is_bridge(&self) -> bool {
        matches!(self.header_type(), 1 | 2)
    }

    fn header_type(&self) -> u32 {
        self.read(0x0c) >> 16 & 0x7f
    }

    /// Offset of the first capability whose header `wanted` accepts.
    pub fn capability(&self, wanted: impl Fn(u32) -> bool) -> Option<u8> {
        const LIST: u32 = 1 << 20;
        if self.read(4) & LIST == 0 {
            return None;
        }
        let mut at = self.read(0x34) as u8 & 0xfc;
        for _ in 0..CAPABILITIES_MAX {
            if at < 0x40 {
                return None;
            }
            let header = self.read(at);
            if wanted(header) {
                return Some(at);
            }
            at = (header >> 8) as u8 & 0xfc;
        }
        None
    }

    /// The first base address register that may decode `address`, an address above 4 GiB.
    ///
    /// The size of a region is not asked for (that would move it): a region is aligned to its size, so the lowest
    /// set bit of its base is the most that it can be. Whether decoding is enabled does not matter here.
    pub fn claims(&self, address: u64) -> Option<u8> {
        const MEMORY_64: u32 = 0b100;
        let registers = match self.header_type() {
            0 => 6,
            1 => 2,
            _ => 0,
        };
        let mut index = 0u8;
        while index < registers {
            let offset = index.wrapping_mul(4).wrapping_add(0x10);
            let low = self.read(offset);
            let wide = low & 0b111 == MEMORY_64;
            if wide {
                let high = u64::from(self.read(offset.wrapping_add(4))) << 32;
                let base = high | u64::from(low & !0xf);
                // A register of zero was never given an address.
                if base != 0 && address >= base && address.wrapping_sub(base) >> base.trailing_zeros() == 0 {
                    return Some(offset);
                }
            }
            index = index.wrapping_add(if wide { 2 } else { 1 });
        }
        None
    }
}

/// All functions of segment 0 that answer. Every id is asked: a function 0 that hides, or that denies to have
/// sisters, hides nothing.
pub fn functions<P: PortIo>(ports: &P) -> impl Iterator<Item = Function<'_, P>> {
    (0..=u16::MAX).map(|id| Function::new(ports, id)).filter(Function::exists)
}

#[cfg(test)]
mod tests;
