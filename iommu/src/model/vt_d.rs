//! A VT-d unit: registers, queue, caches that keep what they should have forgotten, protected regions, interrupt tables
//! and fault records. What software must not do panics.

use std::collections::HashMap;
use std::ops::RangeInclusive;

use super::{Machine, PAGE, Target};

/// How a modelled unit misbehaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Defect {
    /// It takes no descriptors.
    QueueStuck,
    /// It calls every descriptor an error.
    QueueRefuses,
    /// Its global status never changes.
    StatusStuck,
    /// It knows no interrupts of compatibility format beside remapping.
    NoCompatible,
    /// Protected memory is never reported as protected.
    RegionsStuck,
    /// Writes to this register are lost.
    Ignores(u32),
}

const TRANSLATION: u32 = 1 << 31;
const FAULT_LOG: u32 = 1 << 28;
const QUEUE: u32 = 1 << 26;
const INTERRUPTS: u32 = 1 << 25;
const COMPATIBLE: u32 = 1 << 23;
/// Bits of the command register that do something once.
const ONCE: u32 = 1 << 30 | 1 << 29 | 1 << 27 | 1 << 24;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// What a unit can do, in the bits of CAP and ECAP.
#[derive(Clone, Copy, Debug)]
pub struct Features {
    /// SAGAW, bit 1 three levels, bit 2 four, bit 3 five.
    pub depths: u64,
    /// SLLPS: bit 0 2 MiB, bit 1 1 GiB.
    pub large: u64,
    pub low_region: bool,
    pub high_region: bool,
    pub write_buffer: bool,
    pub coherent: bool,
    pub queue: bool,
    pub interrupts: bool,
    pub page_selective: bool,
    pub records: u64,
}

impl Features {
    /// A current server's.
    pub const fn full() -> Self {
        Self {
            depths: 0b0110,
            large: 0b11,
            low_region: true,
            high_region: true,
            write_buffer: false,
            coherent: true,
            queue: true,
            interrupts: true,
            page_selective: true,
            records: 4,
        }
    }

    fn cap(&self) -> u64 {
        let bit = |set: bool, bit: u32| u64::from(set) << bit;
        bit(self.write_buffer, 4)
            | bit(self.low_region, 5)
            | bit(self.high_region, 6)
            | self.depths << 8
            | 38 << 16
            | (RECORDS as u64 / 16) << 24
            | self.large << 34
            | bit(self.page_selective, 39)
            | (self.records - 1) << 40
            | 9 << 48
            | 3 << 54
    }

    fn ecap(&self) -> u64 {
        let bit = |set: bool, bit: u32| u64::from(set) << bit;
        bit(self.coherent, 0) | bit(self.queue, 1) | bit(self.interrupts, 3) | 0xf0 << 8
    }
}

/// Offset of the fault records: beyond the first page.
const RECORDS: u32 = 0x1200;

/// A modelled unit.
pub struct Unit {
    pub base: u64,
    pub serves: RangeInclusive<u16>,
    pub features: Features,
    /// Granule of the protected regions.
    pub granule: u64,
    /// Whether protected regions also block requests that are translated: a unit may or may not.
    pub regions_block_translated: bool,
    pub registers: HashMap<u32, u64>,
    pub status: u32,
    /// What the last set-pointer commands took.
    root: u64,
    interrupt_table: u64,
    pub cached_contexts: HashMap<u16, [u64; 2]>,
    pub cached_pages: HashMap<(u16, u64), (u64, u64)>,
    pub cached_interrupts: HashMap<u16, [u64; 2]>,
    pub records: Vec<[u64; 2]>,
    next_record: usize,
    pub defect: Option<Defect>,
    /// Page-selective invalidations so far: address and order.
    pub page_invalidations: Vec<(u64, u64)>,
}

impl Unit {
    pub fn new(base: u64, serves: RangeInclusive<u16>, features: Features) -> Self {
        Self {
            base,
            serves,
            features,
            granule: 2 << 20,
            regions_block_translated: false,
            registers: HashMap::new(),
            status: 0,
            root: 0,
            interrupt_table: 0,
            cached_contexts: HashMap::new(),
            cached_pages: HashMap::new(),
            cached_interrupts: HashMap::new(),
            records: vec![[0; 2]; features.records as usize],
            next_record: 0,
            defect: None,
            page_invalidations: vec![],
        }
    }

    pub fn register(&self, offset: u32) -> u64 {
        self.registers.get(&offset).copied().unwrap_or(0)
    }

    /// The gap turned it on with these tables, and everything is as it wants.
    pub fn hijack(&mut self, root: u64) {
        self.root = root;
        self.registers.insert(0x20, root);
        self.status |= TRANSLATION | 1 << 30;
    }

    fn protected(&self) -> bool {
        self.register(0x64) & 1 != 0
    }

    /// Whether protected memory holds `address`.
    pub fn in_region(&self, address: u64) -> bool {
        let holds = |base, limit| {
            let last = self.register(limit) | (self.granule - 1);
            (self.register(base)..=last).contains(&address)
        };
        self.protected()
            && (self.features.low_region && address >> 32 == 0 && holds(0x68, 0x6c)
                || self.features.high_region && holds(0x70, 0x78))
    }

    pub(super) fn read64(&self, offset: u32) -> u64 {
        match offset {
            0x08 => self.features.cap(),
            0x10 => self.features.ecap(),
            0x20 | 0x70 | 0x78 | 0x80 | 0x88 | 0x90 | 0xb8 => self.register(offset),
            RECORDS.. => self.records[((offset - RECORDS) / 16) as usize][((offset >> 3) & 1) as usize],
            _ => panic!("64-bit read of {offset:#x}"),
        }
    }

    pub(super) fn read32(&self, offset: u32) -> u32 {
        match offset {
            0x1c => self.status,
            0x34 => {
                let pending = self.records.iter().any(|record| record[1] >> 63 != 0);
                let first = self.records.iter().position(|record| record[1] >> 63 != 0).unwrap_or(0);
                self.register(0x34) as u32 | u32::from(pending) << 1 | (first as u32) << 8
            }
            0x38 | 0x64 | 0x68 | 0x6c | 0xa0 | 0xe0 => self.register(offset) as u32,
            _ => panic!("32-bit read of {offset:#x}"),
        }
    }

    pub(super) fn write64(&mut self, machine: &Machine, offset: u32, value: u64) {
        if self.defect == Some(Defect::Ignores(offset)) {
            return;
        }
        match offset {
            0x20 | 0xb8 => {
                self.registers.insert(offset, value);
            }
            0x70 | 0x78 if self.features.high_region => self.set_region(offset, value, (1 << 46) - 1),
            0x88 => {
                self.registers.insert(offset, value);
                self.run_queue(machine);
            }
            0x90 => {
                assert_eq!(self.status & QUEUE, 0, "the queue is moved while in use");
                self.registers.insert(offset, value);
            }
            _ => panic!("64-bit write of {offset:#x}"),
        }
    }

    pub(super) fn write32(&mut self, machine: &Machine, offset: u32, value: u32) {
        if self.defect == Some(Defect::Ignores(offset)) {
            return;
        }
        match offset {
            0x18 => self.command(machine, value),
            0x34 => {
                let now = self.register(0x34) & !u64::from(value & 0x71);
                self.registers.insert(0x34, now);
            }
            0x38 | 0xa0 | 0xe0 => {
                self.registers.insert(offset, value.into());
            }
            0x64 => {
                let on = u64::from(value >> 31);
                let status = if self.defect == Some(Defect::RegionsStuck) { 0 } else { on };
                self.registers.insert(0x64, on << 31 | status);
            }
            0x68 | 0x6c if self.features.low_region => self.set_region(offset, value.into(), 0xffff_ffff),
            RECORDS.. if offset & 0xf == 12 => {
                if value >> 31 != 0 {
                    self.records[((offset - RECORDS) / 16) as usize] = [0; 2];
                }
            }
            _ => panic!("32-bit write of {offset:#x}"),
        }
    }

    fn set_region(&mut self, offset: u32, value: u64, reach: u64) {
        assert!(!self.protected(), "a protected region is changed while in force");
        self.registers.insert(offset, value & reach & !(self.granule - 1));
    }

    fn command(&mut self, machine: &Machine, value: u32) {
        let changes = (value & !ONCE ^ self.status & !ONCE).count_ones() + (value & ONCE).count_ones();
        assert!(changes <= 1, "more than one bit of the command register at once");
        if self.defect == Some(Defect::StatusStuck) {
            return;
        }
        if value & INTERRUPTS != 0 {
            assert!(value & QUEUE != 0, "interrupts are remapped without a queue");
        }
        if self.status & QUEUE == 0 && value & QUEUE != 0 {
            assert_eq!(self.register(0x88), 0, "the queue starts with a tail");
            self.registers.insert(0x80, 0);
        }
        self.status = value & !ONCE | self.status & ONCE;
        if self.defect == Some(Defect::NoCompatible) {
            self.status &= !COMPATIBLE;
        }
        if value & 1 << 30 != 0 {
            self.root = self.register(0x20);
            self.status |= 1 << 30;
        }
        if value & 1 << 24 != 0 {
            self.interrupt_table = self.register(0xb8);
            self.status |= 1 << 24;
        }
        if value & 1 << 27 != 0 {
            machine.0.buffered.borrow_mut().clear();
        }
    }

    fn run_queue(&mut self, machine: &Machine) {
        if self.status & QUEUE == 0 || self.defect == Some(Defect::QueueStuck) {
            return;
        }
        let queue = self.register(0x90);
        assert_eq!(queue & 0xfff, 0, "one page, small descriptors");
        while self.register(0x80) != self.register(0x88) && self.register(0x34) & 0x70 == 0 {
            let head = self.register(0x80);
            let at = (queue & ADDRESS) + head;
            let [low, high] = [machine.peek64(at), machine.peek64(at + 8)];
            let domain = low >> 16 & 0xffff;
            match (low & 0xf, low >> 4 & 3) {
                _ if self.defect == Some(Defect::QueueRefuses) => {
                    self.registers.insert(0x34, 1 << 4);
                    return;
                }
                (1, 1) => self.cached_contexts.clear(),
                (2, 1) => self.cached_pages.clear(),
                (2, 2) => {
                    assert_eq!(domain, 1);
                    self.cached_pages.clear();
                }
                (2, 3) => {
                    assert!(self.features.page_selective && domain == 1 && high & 0x3f <= 9);
                    let order = high & 0x3f;
                    let first = (high & !0xfff) / PAGE;
                    assert!(first.is_multiple_of(1 << order));
                    self.page_invalidations.push((first * PAGE, order));
                    self.cached_pages.retain(|(_, page), _| page >> order != first >> order);
                }
                (4, 0) => self.cached_interrupts.clear(),
                (4, 1) => {
                    self.cached_interrupts.remove(&((low >> 32) as u16));
                }
                (5, 2) => {
                    machine.copy_in(high, &((low >> 32) as u32).to_le_bytes());
                }
                _ => {
                    self.registers.insert(0x34, 1 << 4);
                    return;
                }
            }
            self.registers.insert(0x80, (head + 16) % PAGE);
        }
    }

    fn fault(&mut self, machine: &Machine, device: u16, code: u64, address: u64, write: bool) {
        if self.status & FAULT_LOG != 0 {
            // The log in memory, which no table and no region rules.
            machine.poke64(self.register(0x58), address);
        }
        let index = self.next_record;
        if self.records[index][1] >> 63 != 0 {
            let status = self.register(0x34) | 1;
            self.registers.insert(0x34, status);
            return;
        }
        self.records[index] = [address, 1 << 63 | u64::from(!write) << 62 | code << 32 | u64::from(device)];
        self.next_record = (index + 1) % self.records.len();
    }

    /// An entry of 16 bytes, as the unit sees it.
    fn entry(&self, machine: &Machine, at: u64) -> [u64; 2] {
        [self.table64(machine, at), self.table64(machine, at + 8)]
    }

    fn table64(&self, machine: &Machine, at: u64) -> u64 {
        let stale = |lines: &HashMap<u64, [u8; 64]>| {
            let line = lines.get(&(at / 64))?;
            Some(u64::from_le_bytes(line[(at % 64) as usize..][..8].try_into().unwrap()))
        };
        if !self.features.coherent
            && let Some(old) = stale(&machine.0.cached.borrow())
        {
            return old;
        }
        if self.features.write_buffer
            && let Some(old) = stale(&machine.0.buffered.borrow())
        {
            return old;
        }
        machine.peek64(at)
    }

    pub(super) fn translate(
        &mut self,
        machine: &Machine,
        device: u16,
        address: u64,
        data: &[u8],
        write: bool,
    ) -> Option<Target> {
        if (0xfee0_0000..0xfef0_0000).contains(&address) {
            return if write { self.interrupt(machine, device, address, data) } else { None };
        }
        if self.status & TRANSLATION == 0 {
            return (!self.in_region(address)).then_some(Target::Memory(address));
        }
        if self.regions_block_translated && self.in_region(address) {
            return None;
        }
        let wanted = if write { 2 } else { 1 };
        let page = address / PAGE;
        let (physical, rights) = match self.cached_pages.get(&(device, page)) {
            Some(cached) => *cached,
            None => match self.walk(machine, device, address) {
                Ok(found) => {
                    self.cached_pages.insert((device, page), found);
                    found
                }
                Err(0) => (0, 0),
                Err(code) => {
                    self.fault(machine, device, code, address & !0xfff, write);
                    return None;
                }
            },
        };
        if rights & wanted == 0 {
            self.fault(machine, device, if write { 5 } else { 6 }, address & !0xfff, write);
            return None;
        }
        Some(Target::Memory(physical * PAGE + address % PAGE))
    }

    /// Page and rights; `Err(0)`: no right at all.
    fn walk(&mut self, machine: &Machine, device: u16, address: u64) -> Result<(u64, u64), u64> {
        let context = match self.cached_contexts.get(&device) {
            Some(context) => *context,
            None => {
                assert_eq!(self.root & 0xc00, 0, "legacy mode");
                let root = self.entry(machine, (self.root & ADDRESS) + u64::from(device >> 8) * 16);
                if root[0] & 1 == 0 {
                    return Err(1);
                }
                let context = self.entry(machine, (root[0] & ADDRESS) + u64::from(device & 0xff) * 16);
                if context[0] & 1 == 0 {
                    return Err(2);
                }
                self.cached_contexts.insert(device, context);
                context
            }
        };
        if context[0] >> 2 & 3 == 2 {
            return Ok((address / PAGE, 3));
        }
        let mut level = (context[1] & 7) as u32 + 2;
        if context[0] & 0xc != 0 || self.features.depths >> (level - 2) & 1 == 0 {
            return Err(3);
        }
        if address >> (12 + 9 * level) != 0 {
            return Err(4);
        }
        let mut rights = 3;
        let mut table = context[0] & ADDRESS;
        loop {
            let shift = 12 + 9 * (level - 1);
            let entry = self.table64(machine, table + (address >> shift & 0x1ff) * 8);
            rights &= entry & 3;
            if rights == 0 {
                return Err(0);
            }
            let large = level > 1 && entry & 0x80 != 0;
            if large {
                assert!((2..=3).contains(&level) && self.features.large >> (level - 2) & 1 != 0, "page size");
            }
            if level == 1 || large {
                let inside = (1u64 << shift) - 1;
                return Ok(((entry & ADDRESS & !inside | address & inside) / PAGE, rights));
            }
            table = entry & ADDRESS;
            level -= 1;
        }
    }

    fn interrupt(&mut self, machine: &Machine, device: u16, address: u64, data: &[u8]) -> Option<Target> {
        if self.status & INTERRUPTS == 0 {
            return Some(Target::Interrupt(None));
        }
        if address & 1 << 4 == 0 {
            if self.status & COMPATIBLE != 0 {
                return Some(Target::Interrupt(None));
            }
            self.fault(machine, device, 0x25, 0, true);
            return None;
        }
        let handle = (address >> 5 & 0x7fff | (address >> 2 & 1) << 15) as u16;
        let offset = if address & 8 != 0 { u16::from(data.first().copied().unwrap_or(0)) } else { 0 };
        let index = handle.wrapping_add(offset);
        if u64::from(index) >> ((self.interrupt_table & 0xf) + 1) != 0 {
            self.fault(machine, device, 0x21, u64::from(index) << 48, true);
            return None;
        }
        let entry = match self.cached_interrupts.get(&index) {
            Some(entry) => *entry,
            None => {
                let entry = self.entry(machine, (self.interrupt_table & ADDRESS) + u64::from(index) * 16);
                if entry[0] & 1 != 0 {
                    self.cached_interrupts.insert(index, entry);
                }
                entry
            }
        };
        if entry[0] & 1 == 0 {
            self.fault(machine, device, 0x22, u64::from(index) << 48, true);
            return None;
        }
        if entry[1] >> 18 & 3 == 1 && entry[1] & 0xffff != u64::from(device) {
            self.fault(machine, device, 0x26, u64::from(index) << 48, true);
            return None;
        }
        let vector = entry[0] >> 16 & 0xff;
        let mode = entry[0] >> 5 & 7;
        Some(Target::Interrupt(Some(mode << 8 | vector)))
    }
}
