//! PCI configuration space of segment 0 by ports CF8h and CFCh, and the search for IOMMUs in it.
//!
//! Spec: \[PCI\] "Configuration Mechanism #1", "Type 00h Configuration Space Header", "Capabilities List".

use hv::addr::PhysRange;
use hv::io::PortIo;

const ADDRESS: u16 = 0xcf8;
const DATA: u16 = 0xcfc;
/// Class and sub-class.
const HOST_BRIDGE: u16 = 0x0600;
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
    /// The size of a region is not asked for (that would move it): it is taken for the most that it can be. Whether decoding
    /// is enabled does not matter here.
    pub fn claims(&self, address: u64) -> Option<u8> {
        self.memory_bars().find(|bar| bar.wide && bar.most.contains_addr(address)).map(|bar| bar.offset)
    }

    /// Memory that a base address register of this function decodes, or that goes over this bridge, if any of it is in `range`.
    /// Whether decoding is enabled does not matter. Expansion ROMs are left out: they can be read, and do nothing.
    ///
    /// Where its base does not tell, a register's size is asked for, by writing it: nobody else may use the device meanwhile.
    pub fn decodes(&self, range: &PhysRange) -> Option<PhysRange> {
        // Taking a host bridge's away for a moment may take memory away.
        let is_host = self.class() == HOST_BRIDGE;
        self.memory_bars()
            .filter(|bar| bar.most.overlaps(range))
            .map(|bar| if is_host { bar.most } else { self.measure(&bar) })
            .chain(self.windows().into_iter().flatten())
            .find(|decoded| decoded.overlaps(range))
    }

    /// Its base address registers that have been given memory.
    fn memory_bars(&self) -> impl Iterator<Item = Bar> {
        const IO: u32 = 1;
        const MEMORY_64: u32 = 0b100;
        let registers = match self.header_type() {
            0 => 6,
            1 => 2,
            2 => 1,
            _ => 0,
        };
        let mut index = 0u8;
        core::iter::from_fn(move || {
            while index < registers {
                let offset = index.wrapping_mul(4).wrapping_add(0x10);
                let low = self.read(offset);
                let wide = low & 0b111 == MEMORY_64;
                index = index.wrapping_add(if wide { 2 } else { 1 });
                let high = if wide { u64::from(self.read(offset.wrapping_add(4))) << 32 } else { 0 };
                let base = high | u64::from(low & !0xf);
                // A register of zero was never given an address.
                let last = base | base.wrapping_sub(1);
                let last = if wide { last } else { last.min(u32::MAX.into()) };
                if low & IO == 0
                    && base != 0
                    && let Some(most) = PhysRange::from_last(base, last)
                {
                    return Some(Bar { offset, most, wide });
                }
            }
            None
        })
    }

    /// What a base address register decodes.
    ///
    /// Spec: \[PCI\] "Base Addresses".
    fn measure(&self, bar: &Bar) -> PhysRange {
        const COMMAND: u8 = 4;
        const MEMORY_SPACE: u32 = 1 << 1;
        let high_at = bar.offset.wrapping_add(4);
        // Status, in the upper half, is cleared by ones.
        let command = self.read(COMMAND) & 0xffff;
        self.write(COMMAND, command & !MEMORY_SPACE);
        let low = self.read(bar.offset);
        self.write(bar.offset, u32::MAX);
        let mut writable = u64::from(self.read(bar.offset) & !0xf) | u64::from(u32::MAX) << 32;
        self.write(bar.offset, low);
        if bar.wide {
            let high = self.read(high_at);
            self.write(high_at, u32::MAX);
            writable &= u64::from(self.read(high_at)) << 32 | u64::from(u32::MAX);
            self.write(high_at, high);
        }
        self.write(COMMAND, command);
        let size = 1u64.checked_shl(writable.trailing_zeros()).unwrap_or(0);
        PhysRange::new(bar.most.start(), size).unwrap_or(bar.most)
    }

    /// Memory that a bridge passes on.
    ///
    /// Spec: \[PCI\] "PCI-to-PCI Bridge", Memory Base and Limit, Prefetchable Memory Base and Limit; "CardBus Bridge".
    fn windows(&self) -> [Option<PhysRange>; 2] {
        const MIB: u64 = 0xf_ffff;
        match self.header_type() {
            1 => {
                let window = |register: u32, high_base: u32, high_limit: u32| {
                    let base = u64::from(high_base) << 32 | u64::from(register & 0xfff0) << 16;
                    let limit = u64::from(high_limit) << 32 | u64::from(register & 0xfff0_0000) | MIB;
                    PhysRange::from_last(base, limit)
                };
                let prefetchable = self.read(0x24);
                let wide = prefetchable & 0xf == 1;
                let high = |offset| if wide { self.read(offset) } else { 0 };
                [window(self.read(0x20), 0, 0), window(prefetchable, high(0x28), high(0x2c))]
            }
            2 => [0x1c, 0x24].map(|at: u8| {
                let limit = self.read(at.wrapping_add(4)) | 0xfff;
                PhysRange::from_last(u64::from(self.read(at) & !0xfff), u64::from(limit))
            }),
            _ => [None; 2],
        }
    }
}

/// A base address register of memory that has a base.
struct Bar {
    offset: u8,
    /// The most that it can decode: a region is aligned to its size.
    most: PhysRange,
    wide: bool,
}

/// All functions of segment 0 that answer. Every id is asked: a function 0 that hides, or that denies to have
/// sisters, hides nothing.
pub fn functions<P: PortIo>(ports: &P) -> impl Iterator<Item = Function<'_, P>> {
    (0..=u16::MAX).map(|id| Function::new(ports, id)).filter(Function::exists)
}

#[cfg(test)]
mod tests;
