//! One IOMMU: its registers, and commands given to it.

use hv::addr::PhysRange;
use hv::io::{Mmio, poll_until};

use super::defs::{
    Command, DEVICES, ENTRY_SIZE, RING_SIZE, WINDOW_SIZE, capability, command, control, feature, reg, status,
};
use super::{Error, event};
use crate::Platform;
use crate::fault::{Drained, Fault};

/// Longest wait for an IOMMU. A full invalidation takes microseconds; a device that ignores its own takes longer.
const WAIT_US: u64 = 500_000;
/// The last entry of a command page is the completion word, the one before at most the completion wait.
const BATCH: u32 = 254;
const COMPLETION_OFFSET: u64 = 4096 - ENTRY_SIZE as u64;
/// Bits of a ring head or tail register.
const RING_OFFSET: u64 = 0x7fff0;

/// Commands of one full invalidation, by number: each device, each domain, each interrupt table.
struct Batch {
    /// Number of the first.
    first: u32,
    /// How many.
    count: u32,
}

impl Batch {
    /// The one command that does for all of them, where there is one.
    const ALL: u32 = DEVICES * 3;

    fn command(&self, index: u32) -> Command {
        let number = self.first.wrapping_add(index);
        let id = number as u16;
        match number >> 16 {
            0 => command::invalidate_device(id),
            1 => command::invalidate_domain(id),
            2 => command::invalidate_interrupts(id),
            _ => command::INVALIDATE_ALL,
        }
    }
}

/// One IOMMU.
pub(super) struct Unit<W> {
    /// Its device id.
    pub device: u16,
    base: u64,
    window: W,
    features: u64,
    /// The tunnel bit, when it has one.
    tunnel: u64,
}

impl<W: Mmio> Unit<W> {
    /// `header` is the first word of its PCI capability.
    pub fn map<P: Platform<Window = W>>(
        platform: &P,
        device: u16,
        base: u64,
        header: u32,
    ) -> Result<Self, Error> {
        let unusable = Error::Base { device, base };
        if base == 0 || !base.is_multiple_of(u64::from(WINDOW_SIZE)) {
            return Err(unusable);
        }
        let window = platform.map(base, WINDOW_SIZE).ok_or(unusable)?;
        if window.read64(reg::CONTROL) == u64::MAX {
            return Err(Error::Silent { device, base });
        }
        let features = if header & capability::FEATURES == 0 { 0 } else { window.read64(reg::FEATURES) };
        let tunnel = if header & capability::TUNNEL == 0 { 0 } else { control::TUNNEL };
        Ok(Self { device, base, window, features, tunnel })
    }

    pub fn window_range(&self) -> Option<PhysRange> {
        PhysRange::new(self.base, u64::from(WINDOW_SIZE))
    }

    pub fn levels(&self) -> u8 {
        feature::levels(self.features)
    }

    /// Translation on, by a table that can't be read; no rings, no exclusion range. Never off in between: the base
    /// goes first, and when translation was on it stays on.
    pub fn point_nowhere<P: Platform>(&self, platform: &P, nowhere: u64) -> Result<(), Error> {
        self.set(reg::DEVICE_TABLE, nowhere)?;
        self.set(reg::EXCLUSION_BASE, 0)?;
        self.set(reg::EXCLUSION_LIMIT, 0)?;
        self.set_control(platform, 0)
    }

    /// The device table of `register` in force, events logged at `events`. The caller flushes.
    pub fn switch<P: Platform>(&self, platform: &P, register: u64, events: u64) -> Result<(), Error> {
        self.set(reg::DEVICE_TABLE, register)?;
        self.set(reg::EVENT_BASE, events | RING_SIZE)?;
        self.window.write64(reg::EVENT_HEAD, 0);
        self.window.write64(reg::EVENT_TAIL, 0);
        self.set_control(platform, control::EVENT_LOG)
    }

    /// The registers on which it hangs whether DMA is blocked.
    pub fn verify(&self, table: u64) -> Result<(), Error> {
        self.expect(reg::DEVICE_TABLE, table, u64::MAX)?;
        self.expect(reg::EXCLUSION_BASE, 0, u64::MAX)?;
        let on = control::ENABLE | self.tunnel;
        self.expect(reg::CONTROL, on, (control::CHECKED | self.tunnel) & !control::EVENT_LOG)
    }

    /// The registers on which it hangs where events are written.
    pub fn verify_event_log(&self, events: u64) -> Result<(), Error> {
        self.expect(reg::EVENT_BASE, events | RING_SIZE, u64::MAX)?;
        self.expect(reg::CONTROL, control::EVENT_LOG, control::EVENT_LOG)
    }

    /// Drops all that it has cached: translations, device table entries, interrupt tables. `page` names a page for
    /// the commands, anew for each batch.
    pub fn flush<P: Platform>(&self, platform: &P, page: impl Fn() -> u64) -> Result<(), Error> {
        if self.features & feature::INVALIDATE_ALL != 0 {
            return self.run(platform, page(), Batch { first: Batch::ALL, count: 1 });
        }
        for first in (0..Batch::ALL).step_by(BATCH as usize) {
            let count = BATCH.min(Batch::ALL.saturating_sub(first));
            self.run(platform, page(), Batch { first, count })?;
        }
        Ok(())
    }

    /// Gives the commands of `batch`, waits until they are done, and checks that they still are what was written: a
    /// device that changed them before the IOMMU read them would have to change them back.
    #[inline(never)] // it is a tenth of the SLB, once
    fn run<P: Platform>(&self, platform: &P, page: u64, batch: Batch) -> Result<(), Error> {
        let logging = self.window.read64(reg::CONTROL) & control::EVENT_LOG;
        let store = page.wrapping_add(COMPLETION_OFFSET);
        let nonce = platform.random();
        let count = batch.count;
        let command = |index| {
            if index == count { command::completion_wait(store, nonce) } else { batch.command(index) }
        };
        let address = |index: u32| page.wrapping_add(u64::from(index).wrapping_mul(ENTRY_SIZE.into()));

        put(platform, store, [!nonce, 0])?;
        self.set_control(platform, logging)?;
        self.set(reg::COMMAND_BASE, page | RING_SIZE)?;
        self.window.write64(reg::COMMAND_HEAD, 0);
        self.window.write64(reg::COMMAND_TAIL, 0);
        self.set_control(platform, logging | control::COMMANDS)?;
        // As late as can be: the less time for a device that can still write here.
        for index in 0..=count {
            put(platform, address(index), command(index))?;
        }
        let tail = u64::from(count.wrapping_add(1).wrapping_mul(ENTRY_SIZE));
        self.window.write64(reg::COMMAND_TAIL, tail);

        let done = || matches!(get(platform, store), Ok([word, _]) if word == nonce);
        poll_until(platform, WAIT_US, done).map_err(|_| self.timeout(0, nonce))?;
        let taken = || self.window.read64(reg::COMMAND_HEAD) & RING_OFFSET == tail;
        poll_until(platform, WAIT_US, taken).map_err(|_| self.timeout(reg::COMMAND_HEAD, tail))?;
        self.set_control(platform, logging)?;
        for index in 0..=count {
            if get(platform, address(index))? != command(index) {
                return Err(Error::Tampered { address: address(index) });
            }
        }
        Ok(())
    }

    /// Takes up to `limit` events out of the log.
    pub fn drain<P: Platform>(
        &self,
        platform: &P,
        log: u64,
        limit: u32,
        sink: &mut impl FnMut(Fault),
    ) -> Result<Drained, Error> {
        const LOG_BYTES: u64 = 4096;
        let offset = |register| self.window.read64(register) & RING_OFFSET & (LOG_BYTES - 1);
        let mut drained = Drained::default();
        let mut head = offset(reg::EVENT_HEAD);
        let tail = offset(reg::EVENT_TAIL);
        while head != tail && drained.events < limit {
            let at = log.wrapping_add(head);
            let entry = get(platform, at)?;
            if entry == [0; 2] {
                // The tail may move before the entry is in memory: it is there next time.
                break;
            }
            put(platform, at, [0; 2])?;
            sink(event::decode(entry));
            drained.events = drained.events.saturating_add(1);
            head = head.wrapping_add(ENTRY_SIZE.into()) & (LOG_BYTES - 1);
            self.window.write64(reg::EVENT_HEAD, head);
        }
        drained.more = head != tail;
        if self.window.read64(reg::STATUS) & status::EVENT_OVERFLOW != 0 {
            drained.overflowed = true;
            // A log that ran over has stopped; it starts again when it is turned off and on.
            self.set_control(platform, 0)?;
            self.window.write64(reg::STATUS, status::EVENT_OVERFLOW);
            self.set_control(platform, control::EVENT_LOG)?;
        }
        Ok(drained)
    }

    /// Sets the control register to translation and `rings`, and waits until the rings run or stand as told.
    fn set_control<P: Platform>(&self, platform: &P, rings: u64) -> Result<(), Error> {
        let value = control::ENABLE | control::COHERENT | self.tunnel | rings;
        self.window.write64(reg::CONTROL, value);
        self.expect(reg::CONTROL, value & control::CHECKED, control::CHECKED)?;
        let mut running = 0;
        if rings & control::EVENT_LOG != 0 {
            running |= status::EVENT_RUN;
        }
        if rings & control::COMMANDS != 0 {
            running |= status::COMMAND_RUN;
        }
        let mask = status::COMMAND_RUN | status::EVENT_RUN;
        // A log that ran over is not running though told to.
        let done = || {
            let now = self.window.read64(reg::STATUS);
            let mask = if now & status::EVENT_OVERFLOW == 0 { mask } else { status::COMMAND_RUN };
            (now ^ running) & mask == 0
        };
        poll_until(platform, WAIT_US, done).map_err(|_| self.timeout(reg::STATUS, running))
    }

    fn set(&self, register: u32, value: u64) -> Result<(), Error> {
        self.window.write64(register, value);
        self.expect(register, value, u64::MAX)
    }

    fn expect(&self, register: u32, wanted: u64, mask: u64) -> Result<(), Error> {
        let found = self.window.read64(register);
        if (found ^ wanted) & mask == 0 {
            return Ok(());
        }
        Err(Error::Register { device: self.device, register, wanted, found })
    }

    fn timeout(&self, register: u32, wanted: u64) -> Error {
        Error::Timeout { device: self.device, register, wanted }
    }
}

/// Writes a ring entry.
fn put<P: Platform>(platform: &P, address: u64, [low, high]: [u64; 2]) -> Result<(), Error> {
    let value = u128::from(low) | u128::from(high) << 64;
    if platform.write(address, &value.to_le_bytes()) { Ok(()) } else { Err(Error::Memory { address }) }
}

/// Reads a ring entry.
fn get<P: Platform>(platform: &P, address: u64) -> Result<[u64; 2], Error> {
    let mut bytes = [0; 16];
    if !platform.read(address, &mut bytes) {
        return Err(Error::Memory { address });
    }
    let value = u128::from_le_bytes(bytes);
    Ok([value as u64, (value >> 64) as u64])
}
