//! One unit: its registers, and descriptors given to it.

use hv::addr::{FOUR_GIB, PAGE_SIZE, PhysRange};
use hv::io::{Mmio, poll_until};

use super::defs::{
    Capabilities, ENTRY_SIZE, Entry, MASKED, PMEN_ENABLE, PMEN_STATUS, descriptor, fsts, global, irte, reg,
};
use super::{Error, Machine, Need, Protection, fault};
use crate::fault::{Drained, Fault};

/// Longest wait for a unit.
const WAIT_US: u64 = 500_000;
/// Descriptors that a queue of one page holds.
const QUEUE_ENTRIES: u64 = PAGE_SIZE / ENTRY_SIZE;
/// Bits of a queue head or tail register.
const QUEUE_OFFSET: u64 = 0x7fff0;
/// The finest that any document lets a protected region be: bits below count as ones in a limit.
const FINEST_REGION: u64 = 1 << 20;

/// One unit.
pub(super) struct Unit<W> {
    /// Its register base.
    pub base: u64,
    /// What it can do.
    pub can: Capabilities,
    /// Whether its protected regions are on.
    pub guarded: bool,
    window: W,
    window_size: u64,
    queue: u64,
    status: u64,
}

/// What registers must hold.
pub(super) struct Wanted {
    /// The root table.
    pub root: u64,
    /// The interrupt table.
    pub interrupts: u64,
    /// Which of interrupt remapping and compatibility format are on.
    pub global: u32,
}

/// The registers of one protected region, which differ in width.
struct Region {
    base: u32,
    limit: u32,
    /// Bits of both.
    mask: u64,
}

const LOW: Region = Region { base: reg::PLMBASE, limit: reg::PLMLIMIT, mask: 0xffff_ffff };
const HIGH: Region = Region { base: reg::PHMBASE, limit: reg::PHMLIMIT, mask: u64::MAX };

impl<W: Mmio> Unit<W> {
    /// `size` is that of the register window, by the DMAR; `queue` and `status` are the unit's own memory.
    pub fn map<P: Machine<Window = W>>(
        platform: &P,
        base: u64,
        size: u64,
        queue: u64,
        status: u64,
    ) -> Result<Self, Error> {
        const FIRST: u32 = PAGE_SIZE as u32;
        let map = |len| platform.map(base, len).ok_or(Error::Base { base });
        let mut window = map(FIRST)?;
        let can = Capabilities { cap: window.read64(reg::CAP), ecap: window.read64(reg::ECAP) };
        if matches!(can.cap, 0 | u64::MAX) {
            return Err(Error::Silent { base });
        }
        let lacks = |need| Err(Error::Lacks { base, need });
        if !can.queue() {
            return lacks(Need::Queue);
        }
        if !(3..=5).any(|levels| can.walks(levels)) {
            return lacks(Need::Levels);
        }
        if can.window_size() > FIRST {
            window = map(can.window_size())?;
        }
        let window_size = size.max(can.window_size().into());
        Ok(Self { base, can, guarded: false, window, window_size, queue, status })
    }

    pub fn window_range(&self) -> Option<PhysRange> {
        PhysRange::new(self.base, self.window_size)
    }

    /// Step 1: the protected regions cover `low` and `high`.
    pub fn protect<P: Machine>(
        &mut self,
        platform: &P,
        [low, high]: [Option<PhysRange>; 2],
        reserved: impl Iterator<Item = PhysRange> + Clone,
        protection: Protection,
    ) -> Result<(), Error> {
        if self.read_protected() && self.covers(&LOW, low) && self.covers(&HIGH, high) {
            self.guarded = true;
            return Ok(());
        }
        let in_force = matches!(protection, Protection::InForce | Protection::InForceIfAny);
        if in_force && protection.needs(self.can) {
            let range = low.or(high).ok_or(Error::None)?;
            return Err(Error::Uncovered { base: self.base, range });
        }
        let missing = match (low, high) {
            (Some(_), _) if !self.can.low_region() => Some(Need::LowRegion),
            (_, Some(_)) if !self.can.high_region() => Some(Need::HighRegion),
            _ => None,
        };
        match missing {
            Some(_) if !protection.needs(self.can) => return Ok(()),
            Some(need) => return Err(Error::Lacks { base: self.base, need }),
            None => {}
        }
        // Not to be changed while in force; what it covered was not enough.
        self.set_protected(platform, false)?;
        if self.can.low_region() {
            self.set_region(&LOW, low, reserved.clone())?;
        }
        if self.can.high_region() {
            self.set_region(&HIGH, high, reserved)?;
        }
        self.set_protected(platform, true)?;
        self.guarded = true;
        Ok(())
    }

    /// Whether the protected region that is on covers `range`, as far as its registers say without a write.
    fn covers(&self, region: &Region, range: Option<PhysRange>) -> bool {
        let Some(range) = range else { return true };
        let (base, limit) = (self.read(region, region.base), self.read(region, region.limit));
        let last = limit | FINEST_REGION.wrapping_sub(1);
        PhysRange::from_last(base, last).is_some_and(|covered| covered.contains(&range))
    }

    /// Sets a protected region to `range`, rounded outward to what the unit can express, or to nothing.
    fn set_region(
        &self,
        region: &Region,
        range: Option<PhysRange>,
        mut reserved: impl Iterator<Item = PhysRange>,
    ) -> Result<(), Error> {
        // The lowest bit that takes a one is the granule, the highest the reach.
        self.write(region, region.base, u64::MAX);
        let bits = self.read(region, region.base);
        let granule = bits & bits.wrapping_neg();
        if bits == 0 {
            return Err(Error::Register {
                base: self.base,
                register: region.base,
                wanted: region.mask,
                found: 0,
            });
        }
        let Some(range) = range else {
            // A limit below the base.
            self.write(region, region.limit, 0);
            return self.expect(region, region.limit, 0);
        };
        let inside = granule.wrapping_sub(1);
        let (base, limit) = (range.start() & !inside, range.last() & !inside);
        if let Some(rounded) = PhysRange::from_last(base, limit | inside)
            && let Some(overlapped) = reserved.find(|reserved| reserved.overlaps(&rounded))
        {
            return Err(Error::Overlap { base: self.base, range: overlapped });
        }
        self.write(region, region.base, base);
        self.write(region, region.limit, limit);
        self.expect(region, region.base, base)?;
        self.expect(region, region.limit, limit)
    }

    fn read(&self, region: &Region, register: u32) -> u64 {
        if region.mask == u64::MAX {
            self.window.read64(register)
        } else {
            self.window.read32(register).into()
        }
    }

    fn write(&self, region: &Region, register: u32, value: u64) {
        if region.mask == u64::MAX {
            self.window.write64(register, value);
        } else {
            self.window.write32(register, (value & region.mask) as u32);
        }
    }

    fn expect(&self, region: &Region, register: u32, wanted: u64) -> Result<(), Error> {
        self.same(register, wanted, self.read(region, register), u64::MAX)
    }

    /// Whether its protected regions are on.
    pub fn read_protected(&self) -> bool {
        const ON: u32 = PMEN_ENABLE | PMEN_STATUS;
        (self.can.low_region() || self.can.high_region()) && self.window.read32(reg::PMEN) & ON == ON
    }

    fn set_protected<P: Machine>(&self, platform: &P, on: bool) -> Result<(), Error> {
        let (enable, status) = if on { (PMEN_ENABLE, PMEN_STATUS) } else { (0, 0) };
        self.window.write32(reg::PMEN, enable);
        let done = || self.window.read32(reg::PMEN) & PMEN_STATUS == status;
        self.wait(platform, reg::PMEN, status, done)
    }

    /// Last step: the protected regions are off.
    pub fn release<P: Machine>(&mut self, platform: &P) -> Result<(), Error> {
        if self.guarded {
            self.set_protected(platform, false)?;
            self.guarded = false;
        }
        Ok(())
    }

    /// Step 2: neither translates nor takes descriptors. Until now it may have let requests through by tables of the
    /// gap's, whatever the protected regions say; from now on it is they that count.
    pub fn stop<P: Machine>(&self, platform: &P) -> Result<(), Error> {
        self.switch(platform, global::TRANSLATION, false)?;
        // The unit itself would write where the gap said: a log of faults, and messages that tell of events.
        self.switch(platform, global::FAULT_LOG, false)?;
        for register in [reg::FECTL, reg::IECTL] {
            self.window.write32(register, MASKED);
        }
        if self.can.page_requests() {
            self.window.write32(reg::PECTL, MASKED);
        }
        self.switch(platform, global::INTERRUPTS, false)?;
        if self.window.read32(reg::GSTS) & global::QUEUE != 0 {
            // What the gap queued may never end; the switch below says whether the unit lets go of it.
            let idle = || (self.window.read64(reg::IQH) ^ self.window.read64(reg::IQT)) & QUEUE_OFFSET == 0;
            let _ = poll_until(platform, WAIT_US, idle);
            self.switch(platform, global::QUEUE, false)?;
        }
        Ok(())
    }

    /// Step 4: the tables that `wanted` names are in force, and nothing is cached from before.
    pub fn start<P: Machine>(&self, platform: &P, wanted: &Wanted) -> Result<(), Error> {
        self.window.write32(reg::FSTS, fsts::OVERFLOW | fsts::QUEUE_ERRORS);
        self.window.write64(reg::IQT, 0);
        self.window.write64(reg::IQA, self.queue);
        self.switch(platform, global::QUEUE, true)?;
        // QEMU shows the address once the queue is on; it is empty until then.
        self.same(reg::IQA, self.queue, self.window.read64(reg::IQA), u64::MAX)?;
        self.set_root(platform, wanted.root)?;
        if self.can.interrupts() {
            self.set(reg::IRTA, wanted.interrupts | irte::FULL_TABLE)?;
            self.once(platform, global::INTERRUPT_POINTER, global::INTERRUPT_POINTER)?;
            self.submit(platform, &[descriptor::INTERRUPTS])?;
        }
        self.set_interrupts(platform, wanted.global)?;
        self.switch(platform, global::TRANSLATION, true)
    }

    /// Another root table, at once and as a whole, and all that came from the one before forgotten.
    pub fn set_root<P: Machine>(&self, platform: &P, root: u64) -> Result<(), Error> {
        self.write_buffer(platform)?;
        self.set(reg::RTADDR, root)?;
        self.once(platform, global::ROOT_POINTER, global::ROOT_POINTER)?;
        let translations = descriptor::translations(self.can.drains());
        self.submit(platform, &[descriptor::CONTEXT, translations])
    }

    /// Turns interrupt remapping and compatibility format on or off, as the bits of `wanted` say.
    pub fn set_interrupts<P: Machine>(&self, platform: &P, wanted: u32) -> Result<(), Error> {
        // Compatibility format goes first when it goes, so that remapping is never on with more than wanted.
        let wanted = self.possible(wanted);
        let lacks = Error::Lacks { base: self.base, need: Need::Compatible };
        let compatible = wanted & global::COMPATIBLE;
        self.switch(platform, global::COMPATIBLE, compatible != 0).map_err(|error| match error {
            Error::Timeout { .. } if compatible != 0 => lacks,
            other => other,
        })?;
        self.switch(platform, global::INTERRUPTS, wanted & global::INTERRUPTS != 0)
    }

    /// Of the bits about interrupts, those that the unit knows.
    fn possible(&self, global: u32) -> u32 {
        if self.can.interrupts() { global } else { 0 }
    }

    /// The registers on which it hangs whether DMA and interrupts are ruled by our tables.
    pub fn verify(&self, wanted: &Wanted) -> Result<(), Error> {
        const CHECKED: u32 =
            global::TRANSLATION | global::QUEUE | global::INTERRUPTS | global::COMPATIBLE | global::FAULT_LOG;
        let on = global::TRANSLATION | global::QUEUE | self.possible(wanted.global);
        self.same(reg::GSTS, on.into(), self.window.read32(reg::GSTS).into(), CHECKED.into())?;
        self.same(reg::RTADDR, wanted.root, self.window.read64(reg::RTADDR), u64::MAX)?;
        self.same(reg::IQA, self.queue, self.window.read64(reg::IQA), u64::MAX)?;
        if self.can.interrupts() {
            let table = wanted.interrupts | irte::FULL_TABLE;
            self.same(reg::IRTA, table, self.window.read64(reg::IRTA), u64::MAX)?;
        }
        for register in [reg::FECTL, reg::IECTL] {
            self.same(register, MASKED.into(), self.window.read32(register).into(), MASKED.into())?;
        }
        let status = u32::from(self.guarded);
        match self.can.low_region() || self.can.high_region() {
            true => {
                self.same(reg::PMEN, status.into(), self.window.read32(reg::PMEN).into(), PMEN_STATUS.into())
            }
            false => Ok(()),
        }
    }

    /// Has the unit forget the guest's translations: those of `range`, or all.
    pub fn flush<P: Machine>(&self, platform: &P, range: Option<PhysRange>) -> Result<(), Error> {
        use super::defs::context::GUEST_DOMAIN;
        let whole = descriptor::domain(GUEST_DOMAIN, self.can.drains());
        let command = match range.map(|range| (range, order_of(&range))) {
            Some((range, order)) if self.can.page_selective() && order <= self.can.most_pages() => {
                let mask = PAGE_SIZE.wrapping_shl(order).wrapping_neg();
                descriptor::pages(GUEST_DOMAIN, range.start() & mask, order, self.can.drains())
            }
            _ => whole,
        };
        self.write_buffer(platform)?;
        self.submit(platform, &[command])
    }

    /// Has the unit forget an interrupt entry.
    pub fn forget_interrupt<P: Machine>(&self, platform: &P, index: u16) -> Result<(), Error> {
        self.write_buffer(platform)?;
        self.submit(platform, &[descriptor::interrupt(index)])
    }

    /// Gives descriptors to the unit and waits until they are done.
    fn submit<P: Machine>(&self, platform: &P, commands: &[Entry]) -> Result<(), Error> {
        let nonce = platform.random() as u32;
        write(platform, self.status, &(!nonce).to_le_bytes())?;
        let mut tail = self.window.read64(reg::IQT) & QUEUE_OFFSET;
        let wait = descriptor::wait(self.status, nonce);
        for command in commands.iter().chain([&wait]) {
            write_entry(platform, self.queue.wrapping_add(tail), *command, self.can.coherent())?;
            tail = tail.wrapping_add(ENTRY_SIZE) % (QUEUE_ENTRIES * ENTRY_SIZE);
        }
        self.window.write64(reg::IQT, tail);
        let refused = || self.window.read32(reg::FSTS) & fsts::QUEUE_ERRORS;
        let stored = || {
            let mut word = [0; 4];
            platform.read(self.status, &mut word) && word == nonce.to_le_bytes()
        };
        let _ = poll_until(platform, WAIT_US, || stored() || refused() != 0);
        match refused() {
            0 if stored() => Ok(()),
            0 => Err(Error::Timeout { base: self.base, register: 0, wanted: nonce.into() }),
            status => Err(Error::Invalidation { base: self.base, status }),
        }
    }

    /// Takes up to `limit` records out.
    pub fn drain(&self, segment: u16, limit: u32, sink: &mut impl FnMut(Fault)) -> Drained {
        const RECORD: u32 = ENTRY_SIZE as u32;
        let mut drained = Drained::default();
        let status = self.window.read32(reg::FSTS);
        if status & (fsts::PENDING | fsts::OVERFLOW) == 0 {
            return drained;
        }
        let records = self.can.fault_records();
        let mut index = fsts::first(status);
        for _ in 0..records {
            index = if index < records { index } else { 0 };
            let at = self.can.fault_offset().saturating_add(index.saturating_mul(RECORD));
            let record = [self.window.read64(at), self.window.read64(at.saturating_add(8))];
            if record[1] & fault::RECORDED == 0 {
                break;
            }
            if drained.events == limit {
                drained.more = true;
                break;
            }
            sink(fault::decode(segment, record));
            // The bit is cleared by a one; the unit records nothing here before.
            self.window.write32(at.saturating_add(12), (fault::RECORDED >> 32) as u32);
            drained.events = drained.events.saturating_add(1);
            index = index.saturating_add(1);
        }
        if status & fsts::OVERFLOW != 0 {
            drained.overflowed = true;
            self.window.write32(reg::FSTS, fsts::OVERFLOW);
        }
        drained
    }

    /// What the CPU wrote reaches memory before the unit is told of it, where units need that.
    fn write_buffer<P: Machine>(&self, platform: &P) -> Result<(), Error> {
        if self.can.needs_write_buffer_flush() {
            self.once(platform, global::WRITE_BUFFER, 0)
        } else {
            Ok(())
        }
    }

    /// Turns one function on or off.
    fn switch<P: Machine>(&self, platform: &P, bit: u32, on: bool) -> Result<(), Error> {
        let now = self.window.read32(reg::GSTS);
        let wanted = if on { bit } else { 0 };
        if now & bit == wanted {
            return Ok(());
        }
        self.window.write32(reg::GCMD, now & global::KEPT & !bit | wanted);
        let done = || self.window.read32(reg::GSTS) & bit == wanted;
        self.wait(platform, reg::GSTS, wanted, done)
    }

    /// Starts what is done once, and waits until its status bit is `wanted`.
    fn once<P: Machine>(&self, platform: &P, bit: u32, wanted: u32) -> Result<(), Error> {
        let now = self.window.read32(reg::GSTS);
        self.window.write32(reg::GCMD, now & global::KEPT | bit);
        let done = || self.window.read32(reg::GSTS) & bit == wanted;
        self.wait(platform, reg::GSTS, wanted, done)
    }

    fn wait<P: Machine>(
        &self,
        platform: &P,
        register: u32,
        wanted: u32,
        done: impl FnMut() -> bool,
    ) -> Result<(), Error> {
        let timeout = Error::Timeout { base: self.base, register, wanted: wanted.into() };
        poll_until(platform, WAIT_US, done).map_err(|_| timeout)
    }

    fn set(&self, register: u32, value: u64) -> Result<(), Error> {
        self.window.write64(register, value);
        self.same(register, value, self.window.read64(register), u64::MAX)
    }

    fn same(&self, register: u32, wanted: u64, found: u64, mask: u64) -> Result<(), Error> {
        if (found ^ wanted) & mask == 0 {
            return Ok(());
        }
        Err(Error::Register { base: self.base, register, wanted, found })
    }
}

/// Log2 of the fewest pages, aligned to their number, that hold `range`.
fn order_of(range: &PhysRange) -> u32 {
    let differ = (range.start() ^ range.last()) / PAGE_SIZE;
    u64::BITS.wrapping_sub(differ.leading_zeros())
}

/// The parts of `ranges` below and above 4 GiB, each as the smallest range that holds them.
pub(super) fn hulls(ranges: &[PhysRange]) -> [Option<PhysRange>; 2] {
    let all = [(0, FOUR_GIB.wrapping_sub(1)), (FOUR_GIB, u64::MAX)];
    all.map(|(start, last)| {
        let side = PhysRange::from_last(start, last)?;
        let parts = ranges.iter().filter_map(|range| range.intersection(&side));
        parts.reduce(|a, b| {
            // Both ends come from ranges, so they are in order.
            PhysRange::from_last(a.start().min(b.start()), a.last().max(b.last())).unwrap_or(a)
        })
    })
}

/// Writes memory of ours.
pub(super) fn write<P: Machine>(platform: &P, address: u64, bytes: &[u8]) -> Result<(), Error> {
    if platform.write(address, bytes) { Ok(()) } else { Err(Error::Memory { address }) }
}

/// Writes an entry or descriptor, and writes it back for units that do not see the CPU's caches.
pub(super) fn write_entry<P: Machine>(
    platform: &P,
    address: u64,
    entry: Entry,
    coherent: bool,
) -> Result<(), Error> {
    write(platform, address, &entry_bytes(entry))?;
    if !coherent && let Some(range) = PhysRange::new(address, ENTRY_SIZE) {
        platform.write_back(range);
    }
    Ok(())
}

/// An entry as it lies in memory.
pub(super) const fn entry_bytes([low, high]: Entry) -> [u8; ENTRY_SIZE as usize] {
    ((high as u128) << 64 | low as u128).to_le_bytes()
}
