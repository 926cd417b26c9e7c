//! A machine with IOMMUs of AMD's ([`Unit`]) or Intel's ([`vt_d::Unit`]), for tests: registers, commands, caches that keep what they should have forgotten, an
//! event log, and devices that try their DMA after every access of the software under test.
#![allow(
    clippy::arithmetic_side_effects,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::new_without_default,
    clippy::panic,
    clippy::unwrap_used,
    missing_docs,
    reason = "a model stops its test by a panic, and its names say what they are"
)]

pub mod dmar;
pub mod vt_d;

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::ops::{Range, RangeInclusive};
use std::rc::Rc;

use hv::addr::PhysRange;
use hv::io::{Clock, Mmio, PhysMem, PortIo};
use hv::radix::TablePool;

use crate::Platform;
use crate::vt_d::WriteBack;

/// First address that is no memory.
pub const RAM_TOP: u64 = 1 << 32;
const PAGE: u64 = 4096;
const WINDOW: u64 = 0x4000;
/// Code of a page fault in the event log.
const PAGE_FAULT: u64 = 2 << 12;

/// How a modelled IOMMU misbehaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Defect {
    /// It takes no commands.
    CommandsStuck,
    /// Its status register never changes.
    StatusStuck,
    /// Writes to this register are lost.
    Ignores(u32),
}

/// A modelled IOMMU.
pub struct Unit {
    pub base: u64,
    pub serves: RangeInclusive<u16>,
    pub registers: HashMap<u32, u64>,
    pub cached_entries: HashMap<u16, [u64; 4]>,
    pub cached_pages: HashMap<(u16, u64), u64>,
    pub defect: Option<Defect>,
    /// Whether ids beyond the table's size are refused, as hardware does and QEMU does not.
    pub checks_size: bool,
}

impl Unit {
    pub fn register(&self, offset: u32) -> u64 {
        self.registers.get(&offset).copied().unwrap_or(0)
    }
}

type Attack = Rc<dyn Fn(&Machine)>;

/// The machine.
#[derive(Clone, Default)]
pub struct Machine(Rc<State>);

#[derive(Default)]
struct State {
    ram: RefCell<HashMap<u64, Box<[u8; PAGE as usize]>>>,
    config: RefCell<HashMap<u16, [u32; 64]>>,
    config_address: Cell<u32>,
    time: Cell<u64>,
    random: Cell<u64>,
    units: RefCell<Vec<Unit>>,
    vt_d: RefCell<Vec<vt_d::Unit>>,
    /// What memory holds of lines that the CPU wrote and that units do not see yet: in its caches, in a write buffer.
    cached: RefCell<HashMap<u64, [u8; 64]>>,
    buffered: RefCell<HashMap<u64, [u8; 64]>>,
    attack: RefCell<Option<Attack>>,
    attacking: Cell<bool>,
    /// Memory whose first write by the CPU starts the count of `breaches`.
    watched: RefCell<Option<RangeInclusive<u64>>>,
    guarding: Cell<bool>,
    breaches: Cell<u32>,
    interrupts: RefCell<Vec<u64>>,
}

/// Where a request ends that was let through.
enum Target {
    Memory(u64),
    /// Data of the interrupt, where it is not what the device sent.
    Interrupt(Option<u64>),
}

impl Machine {
    pub fn new() -> Self {
        let machine = Self::default();
        machine.0.random.set(0x9e37_79b9_7f4a_7c15);
        machine
    }

    /// Adds an IOMMU that knows INVALIDATE_ALL or not, and its PCI function.
    pub fn add_unit(&self, device: u16, base: u64, serves: RangeInclusive<u16>, invalidate_all: bool) {
        let features = 2 << 10 | u64::from(invalidate_all) << 6;
        let mut config = [0; 64];
        config[0] = 0x1451_1022;
        config[1] = 1 << 20;
        config[2] = 0x0806_0000;
        config[0x34 / 4] = 0x40;
        config[0x40 / 4] = 0x0b03_000f;
        config[0x44 / 4] = base as u32 | 1;
        config[0x48 / 4] = (base >> 32) as u32;
        self.0.config.borrow_mut().insert(device, config);
        self.0.units.borrow_mut().push(Unit {
            base,
            serves,
            registers: HashMap::from([(0x30, features)]),
            cached_entries: HashMap::new(),
            cached_pages: HashMap::new(),
            defect: None,
            checks_size: true,
        });
    }

    /// Adds a VT-d unit.
    pub fn add_vt_d(&self, unit: vt_d::Unit) {
        self.0.vt_d.borrow_mut().push(unit);
    }

    pub fn with_vt_d<T>(&self, index: usize, change: impl FnOnce(&mut vt_d::Unit) -> T) -> T {
        change(&mut self.0.vt_d.borrow_mut()[index])
    }

    pub fn with_unit<T>(&self, index: usize, change: impl FnOnce(&mut Unit) -> T) -> T {
        change(&mut self.0.units.borrow_mut()[index])
    }

    /// Sets a configuration register; a function exists once it has a vendor.
    pub fn set_config(&self, device: u16, offset: u8, value: u32) {
        let mut config = self.0.config.borrow_mut();
        config.entry(device).or_insert([0; 64])[usize::from(offset / 4)] = value;
    }

    pub fn seed(&self, seed: u64) {
        self.0.random.set(seed | 1);
    }

    /// Runs `attack` after each access from now on.
    pub fn attack(&self, attack: impl Fn(&Machine) + 'static) {
        *self.0.attack.borrow_mut() = Some(Rc::new(attack));
    }

    /// Ends the attack.
    pub fn peace(&self) {
        *self.0.attack.borrow_mut() = None;
    }

    /// Counts DMA that succeeds after the CPU's first write to `range`.
    pub fn watch(&self, range: RangeInclusive<u64>) {
        *self.0.watched.borrow_mut() = Some(range);
        self.0.guarding.set(false);
        self.0.breaches.set(0);
    }

    /// Whether the CPU wrote to the memory watched.
    pub fn guarding(&self) -> bool {
        self.0.guarding.get()
    }

    pub fn breaches(&self) -> u32 {
        self.0.breaches.get()
    }

    /// Data of the interrupts that reached a CPU.
    pub fn interrupts(&self) -> Vec<u64> {
        self.0.interrupts.borrow().clone()
    }

    fn tick(&self) {
        let attack = self.0.attack.borrow().clone();
        if let Some(attack) = attack
            && !self.0.attacking.replace(true)
        {
            attack(self);
            self.0.attacking.set(false);
        }
    }

    pub fn peek64(&self, address: u64) -> u64 {
        let mut bytes = [0; 8];
        self.copy_out(address, &mut bytes);
        u64::from_le_bytes(bytes)
    }

    pub fn poke64(&self, address: u64, value: u64) {
        self.copy_in(address, &value.to_le_bytes());
    }

    /// Remembers what memory holds where the CPU is about to write, when some unit goes on seeing that.
    fn keep_stale(&self, address: u64, len: usize) {
        let units = self.0.vt_d.borrow();
        let keep = |lines: &RefCell<HashMap<u64, [u8; 64]>>| {
            for line in address / 64..(address + len as u64).div_ceil(64) {
                lines.borrow_mut().entry(line).or_insert_with(|| {
                    let mut old = [0; 64];
                    self.copy_out(line * 64, &mut old);
                    old
                });
            }
        };
        if units.iter().any(|unit| !unit.features.coherent) {
            keep(&self.0.cached);
        }
        if units.iter().any(|unit| unit.features.write_buffer) {
            keep(&self.0.buffered);
        }
    }

    fn copy_out(&self, address: u64, out: &mut [u8]) -> bool {
        if address >= RAM_TOP {
            return false;
        }
        let ram = self.0.ram.borrow();
        for (at, bytes) in in_pages(address, out.len()) {
            let part = &mut out[bytes];
            match ram.get(&(at / PAGE)) {
                Some(page) => part.copy_from_slice(&page[(at % PAGE) as usize..][..part.len()]),
                None => part.fill(0),
            }
        }
        true
    }

    fn copy_in(&self, address: u64, data: &[u8]) -> bool {
        if address >= RAM_TOP {
            return false;
        }
        let mut ram = self.0.ram.borrow_mut();
        for (at, bytes) in in_pages(address, data.len()) {
            let part = &data[bytes];
            let page = ram.entry(at / PAGE).or_insert_with(|| Box::new([0; PAGE as usize]));
            page[(at % PAGE) as usize..][..part.len()].copy_from_slice(part);
        }
        true
    }

    /// A device writes; whether it got there.
    pub fn dma_write(&self, device: u16, address: u64, data: &[u8]) -> bool {
        let Some(target) = self.translate(device, address, data, true) else { return false };
        if self.0.guarding.get() {
            self.0.breaches.set(self.0.breaches.get() + 1);
        }
        match target {
            Target::Interrupt(remapped) => {
                let mut bytes = [0; 8];
                bytes[..data.len()].copy_from_slice(data);
                self.0.interrupts.borrow_mut().push(remapped.unwrap_or(u64::from_le_bytes(bytes)));
            }
            Target::Memory(address) => {
                let mut units = self.0.units.borrow_mut();
                let mut registers =
                    units.iter_mut().filter(|unit| (unit.base..unit.base + WINDOW).contains(&address));
                match registers.next() {
                    // Peer to peer, into an IOMMU's own registers.
                    Some(unit) if let Ok(value) = data.try_into() => {
                        unit.registers.insert((address - unit.base) as u32, u64::from_le_bytes(value));
                        self.run_commands(unit);
                    }
                    _ => {
                        self.copy_in(address, data);
                    }
                }
            }
        }
        true
    }

    /// A device reads; whether it may.
    pub fn dma_read(&self, device: u16, address: u64) -> bool {
        self.translate(device, address, &[], false).is_some()
    }

    fn translate(&self, device: u16, address: u64, data: &[u8], write: bool) -> Option<Target> {
        let mut units = self.0.units.borrow_mut();
        let Some(unit) = units.iter_mut().find(|unit| unit.serves.contains(&device)) else {
            let mut vt_d = self.0.vt_d.borrow_mut();
            return match vt_d.iter_mut().find(|unit| unit.serves.contains(&device)) {
                Some(unit) => unit.translate(self, device, address, data, write),
                None => Some(Target::Memory(address)),
            };
        };
        if unit.register(0x18) & 1 == 0 {
            return Some(Target::Memory(address));
        }
        if let Some(page) = unit.cached_pages.get(&(device, address / PAGE)) {
            return Some(Target::Memory(page * PAGE + address % PAGE));
        }
        let entry = match unit.cached_entries.get(&device) {
            Some(entry) => *entry,
            None => {
                let table = unit.register(0);
                let at = (table & 0x000f_ffff_ffff_f000) + u64::from(device) * 32;
                if unit.checks_size && u64::from(device) / 128 > table & 0x1ff {
                    self.log(unit, 1 << 12, device, at);
                    return None;
                }
                let mut bytes = [0; 32];
                if !self.copy_out(at, &mut bytes) {
                    self.log(unit, 3 << 12, device, at);
                    return None;
                }
                let entry = [0, 8, 16, 24].map(|n| u64::from_le_bytes(bytes[n..n + 8].try_into().unwrap()));
                unit.cached_entries.insert(device, entry);
                entry
            }
        };
        if (0xfee0_0000..0xfef0_0000).contains(&address) {
            let mode = data.get(1).map_or(0, |byte| byte & 7);
            let passes = entry[2] & 1 == 0 || entry[2] >> 60 & 3 == 1 && mode <= 1;
            if write && passes {
                return Some(Target::Interrupt(None));
            }
            self.log(unit, PAGE_FAULT | 1 << 3 | u64::from(write) << 5, device, address);
            return None;
        }
        let excluded = unit.register(0x20) & 1 != 0;
        if excluded || entry[0] & 1 == 0 {
            return Some(Target::Memory(address));
        }
        let right = if write { 1 << 62 } else { 1 << 61 };
        let mut now = entry[0];
        let mut level = now >> 9 & 7;
        let mut offset = None;
        let reach = 12 + 9 * level;
        let mut fault = (13..64).contains(&reach) && address >> reach != 0;
        loop {
            fault |= now & 1 == 0 || now & right == 0;
            if fault {
                self.log(unit, PAGE_FAULT | u64::from(write) << 5, device, address);
                return None;
            }
            if level == 0 {
                break;
            }
            now = self.peek64((now & 0x000f_ffff_ffff_f000) + (address >> (3 + 9 * level) << 3 & 0xff8));
            offset = Some((1 << (3 + 9 * level)) - 1);
            level = now >> 9 & 7;
        }
        let Some(offset) = offset else { return Some(Target::Memory(address)) };
        let physical = now & 0x000f_ffff_ffff_f000 & !offset | address & offset;
        if now >> 61 & 3 == 3 {
            unit.cached_pages.insert((device, address / PAGE), physical / PAGE);
        }
        Some(Target::Memory(physical))
    }

    /// `code`: bits 15:12 the event's code, below its flags.
    fn log(&self, unit: &mut Unit, code: u64, device: u16, address: u64) {
        if unit.register(0x18) & 4 == 0 || unit.register(0x2020) & 1 != 0 {
            return;
        }
        let tail = unit.register(0x2018);
        let next = (tail + 16) % PAGE;
        if next == unit.register(0x2010) {
            *unit.registers.entry(0x2020).or_default() |= 1;
            return;
        }
        let at = (unit.register(0x10) & 0x000f_ffff_ffff_f000) + tail;
        self.poke64(at, code << 48 | u64::from(device));
        self.poke64(at + 8, address);
        unit.registers.insert(0x2018, next);
    }

    fn run_commands(&self, unit: &mut Unit) {
        const ON: u64 = 1 | 1 << 12;
        if unit.register(0x18) & ON != ON || unit.defect == Some(Defect::CommandsStuck) {
            return;
        }
        let ring = unit.register(8);
        let size = 16 << (ring >> 56 & 0xf);
        while unit.register(0x2000) != unit.register(0x2008) {
            let head = unit.register(0x2000);
            let at = (ring & 0x000f_ffff_ffff_f000) + head;
            let command = [self.peek64(at), self.peek64(at + 8)];
            let id = command[0] as u16;
            match command[0] >> 60 {
                1 if command[0] & 1 != 0 => self.poke64(command[0] & 0x000f_ffff_ffff_fff8, command[1]),
                2 => {
                    unit.cached_entries.remove(&id);
                }
                3 => {
                    // Without the domain of each page at hand, no page is kept that a domain might have.
                    unit.cached_pages.clear();
                }
                8 if unit.register(0x30) & 1 << 6 != 0 => {
                    unit.cached_entries.clear();
                    unit.cached_pages.clear();
                }
                _ => {}
            }
            unit.registers.insert(0x2000, (head + 16) % size);
        }
    }
}

/// Cuts `len` bytes at `address` at page boundaries: addresses, and which bytes lie there.
fn in_pages(address: u64, len: usize) -> impl Iterator<Item = (u64, Range<usize>)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        let at = address + done as u64;
        let part = (len - done).min((PAGE - at % PAGE) as usize);
        done += part;
        (part > 0).then(|| (at, done - part..done))
    })
}

/// The register window of one modelled IOMMU.
pub struct Window {
    machine: Machine,
    unit: Which,
}

/// Index of a unit among those of its vendor.
#[derive(Clone, Copy)]
enum Which {
    Amd(usize),
    VtD(usize),
}

impl Mmio for Window {
    fn read8(&self, _: u32) -> u8 {
        panic!("no IOMMU has 8-bit registers")
    }
    fn read32(&self, offset: u32) -> u32 {
        let Which::VtD(unit) = self.unit else { panic!("not used") };
        let value = self.machine.with_vt_d(unit, |unit| unit.read32(offset));
        self.machine.tick();
        value
    }
    fn read64(&self, offset: u32) -> u64 {
        let value = match self.unit {
            Which::VtD(unit) => self.machine.with_vt_d(unit, |unit| unit.read64(offset)),
            Which::Amd(unit) => self.machine.with_unit(unit, |unit| {
                let control = unit.register(0x18);
                let running = match unit.defect {
                    Some(Defect::StatusStuck) => 0x10,
                    _ => (control & 1) * ((control >> 2 & 1) << 3 | (control >> 12 & 1) << 4),
                };
                unit.register(offset) | if offset == 0x2020 { running } else { 0 }
            }),
        };
        self.machine.tick();
        value
    }
    fn write8(&self, _: u32, _: u8) {
        panic!("no IOMMU has 8-bit registers")
    }
    fn write32(&self, offset: u32, value: u32) {
        let Which::VtD(unit) = self.unit else { panic!("not used") };
        self.machine.with_vt_d(unit, |unit| unit.write32(&self.machine, offset, value));
        self.machine.tick();
    }
    fn write64(&self, offset: u32, value: u64) {
        match self.unit {
            Which::VtD(unit) => {
                self.machine.with_vt_d(unit, |unit| unit.write64(&self.machine, offset, value));
            }
            Which::Amd(unit) => self.machine.with_unit(unit, |unit| {
                if unit.defect == Some(Defect::Ignores(offset)) {
                    return;
                }
                let value = if offset == 0x2020 { unit.register(offset) & !value } else { value };
                unit.registers.insert(offset, value);
                self.machine.run_commands(unit);
            }),
        }
        self.machine.tick();
    }
}

impl PortIo for Machine {
    fn in8(&self, _: u16) -> u8 {
        panic!("not used")
    }
    fn in16(&self, _: u16) -> u16 {
        panic!("not used")
    }
    fn in32(&self, port: u16) -> u32 {
        assert_eq!(port, 0xcfc);
        let address = self.0.config_address.get();
        let config = self.0.config.borrow();
        let function = config.get(&((address >> 8) as u16));
        function.map_or(u32::MAX, |registers| registers[(address as usize & 0xff) / 4])
    }
    fn out8(&self, _: u16, _: u8) {
        panic!("not used")
    }
    fn out16(&self, _: u16, _: u16) {
        panic!("not used")
    }
    fn out32(&self, port: u16, value: u32) {
        match port {
            0xcf8 => self.0.config_address.set(value),
            _ => {
                let address = self.0.config_address.get();
                let mut config = self.0.config.borrow_mut();
                // Registers of the IOMMU's base: written once, then locked.
                if let Some(registers) = config.get_mut(&((address >> 8) as u16))
                    && registers[0x44 / 4] & 1 == 0
                    && matches!(address & 0xff, 0x44 | 0x48)
                {
                    registers[(address as usize & 0xff) / 4] = value;
                }
            }
        }
    }
}

impl Clock for Machine {
    fn now_us(&self) -> u64 {
        self.0.time.set(self.0.time.get() + 1000);
        self.0.time.get()
    }
}

impl PhysMem for Machine {
    fn read(&self, address: u64, out: &mut [u8]) -> bool {
        let read = self.copy_out(address, out);
        self.tick();
        read
    }
    fn write(&self, address: u64, data: &[u8]) -> bool {
        if self.0.watched.borrow().as_ref().is_some_and(|range| range.contains(&address)) {
            self.0.guarding.set(true);
        }
        self.keep_stale(address, data.len());
        let written = self.copy_in(address, data);
        self.tick();
        written
    }
}

impl Platform for Machine {
    type Window = Window;

    fn map(&self, base: u64, len: u32) -> Option<Window> {
        let amd = self.0.units.borrow().iter().position(|unit| unit.base == base).map(Which::Amd);
        let vt_d = || self.0.vt_d.borrow().iter().position(|unit| unit.base == base).map(Which::VtD);
        let unit = amd.or_else(vt_d)?;
        assert!(matches!(unit, Which::VtD(_)) || u64::from(len) == WINDOW);
        Some(Window { machine: self.clone(), unit })
    }

    fn random(&self) -> u64 {
        // xorshift64: repeatable.
        let mut x = self.0.random.get();
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        self.0.random.set(x);
        x
    }
}

impl crate::vt_d::WriteBack for Machine {
    fn write_back(&self, range: hv::addr::PhysRange) {
        let mut cached = self.0.cached.borrow_mut();
        for line in range.start() / 64..=range.last() / 64 {
            cached.remove(&line);
        }
    }
}

/// Pages of the machine's memory for tables.
pub struct Pages<'a> {
    machine: &'a Machine,
    /// The first that was not handed out.
    pub next: u64,
    /// Whether IOMMUs see what is written at once: [`WriteBack`].
    pub writes_back: bool,
}

impl<'a> Pages<'a> {
    pub fn new(machine: &'a Machine, first: u64, writes_back: bool) -> Self {
        Self { machine, next: first, writes_back }
    }

    fn put(&self, at: u64, bytes: &[u8]) -> bool {
        let done = PhysMem::write(self.machine, at, bytes);
        if self.writes_back {
            self.machine.write_back(PhysRange::new(at, bytes.len() as u64).unwrap());
        }
        done
    }
}

impl TablePool for Pages<'_> {
    fn alloc(&mut self) -> Option<u64> {
        let page = self.next;
        self.next += PAGE;
        self.put(page, &[0; PAGE as usize]).then_some(page)
    }
    fn read(&self, table: u64, index: usize) -> u64 {
        self.machine.peek64(table + 8 * index as u64)
    }
    fn write(&mut self, table: u64, index: usize, entry: u64) {
        self.put(table + 8 * index as u64, &entry.to_le_bytes());
    }
}

/// Builds an IVRS.
pub struct Table(Vec<u8>);

impl Table {
    pub fn new() -> Self {
        Self(vec![0; 48])
    }

    pub fn block(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }

    pub fn unit(self, kind: u8, device: u16, base: u64, segment: u16, entries: &[u8]) -> Self {
        let header = if kind == 0x10 { 24 } else { 40 };
        let length = (header + entries.len()) as u16;
        let mut block = vec![kind, 0];
        block.extend(length.to_le_bytes());
        block.extend(device.to_le_bytes());
        block.extend(0x40u16.to_le_bytes());
        block.extend(base.to_le_bytes());
        block.extend(segment.to_le_bytes());
        block.resize(header, 0);
        block.extend(entries);
        self.block(&block)
    }

    /// The table, with length and checksum.
    pub fn finish(mut self) -> Vec<u8> {
        self.0[..4].copy_from_slice(b"IVRS");
        let length = self.0.len() as u32;
        self.0[4..8].copy_from_slice(&length.to_le_bytes());
        self.0[9] = 0;
        self.0[9] = self.0.iter().fold(0u8, |sum, byte| sum.wrapping_sub(*byte));
        self.0
    }
}

/// Reads all that an IVRS says, when it says anything: what the fuzz targets do. Returns the items read.
pub fn walk_ivrs(bytes: &[u8]) -> usize {
    let Ok(ivrs) = crate::ivrs::Ivrs::new(bytes) else { return 0 };
    let of_unit =
        |unit: crate::ivrs::Unit<'_>| (unit.capability(), unit.base(), unit.entries().count()).2 + 1;
    let units: usize = ivrs.units().map(of_unit).sum();
    let _ = ivrs.lists_io_apic();
    units + ivrs.memory().count() + ivrs.reserved().count()
}

/// Reads all that a DMAR says, paths through bridges included; see [`walk_ivrs`].
pub fn walk_dmar(bytes: &[u8]) -> usize {
    let Ok(dmar) = crate::dmar::Dmar::new(bytes) else { return 0 };
    let machine = Machine::new();
    // Every function there is looks like a bridge back to its own bus.
    machine.set_config(0, 0, 1);
    machine.set_config(0, 0x0c, 1 << 16);
    let of_scopes = |scopes: &mut dyn Iterator<Item = crate::dmar::Scope<'_>>| -> usize {
        scopes.map(|scope| scope.path().count() + usize::from(scope.resolve(&machine).is_ok())).sum()
    };
    let units: usize = dmar.units().map(|unit| of_scopes(&mut unit.scopes()) + unit.size() as usize).sum();
    let ports: usize = dmar.ats_ports().map(|ports| of_scopes(&mut ports.scopes()) + 1).sum();
    let devices: usize = dmar.ats_devices().map(|devices| of_scopes(&mut devices.scopes()) + 1).sum();
    let names: usize = dmar.acpi_devices().map(|device| device.name().len() + 1).sum();
    units + ports + devices + names + dmar.affinities().count() + dmar.reserved(&machine).count()
}
