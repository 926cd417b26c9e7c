//! A VT-d unit as the guest sees it: one that remaps interrupts and nothing else.
//!
//! With it the guest's own driver puts its devices' messages into remappable format and says in a table which interrupt each
//! of them is. Nothing of this table is ever in force: what an invalidation names is copied, checked and, where it is an
//! [`Interrupt`], granted in the true units. So the shown unit is one with caching mode, whose cache is [`VtD::grant`]'s.
//! Why: `docs/adr/0012-intel-interrupts.md`.
//!
//! Spec: \[VTD\] "Register Descriptions", "Invalidation Descriptors"; what a driver does: Linux 6.1
//! `drivers/iommu/intel/irq_remapping.c`, `dmar.c`.

use hv::addr::PAGE_SIZE;
use hv::io::{Mmio, PhysMem};

use super::defs::{ENTRY_SIZE, Entry, entry_of, fsts, global, reg};
use super::{Error, INTERRUPTS, Interrupt, Machine, Refused, VtD};

/// Bytes of the register page.
pub const WINDOW: u64 = PAGE_SIZE;

/// Version: 1.0.
const VERSION: u64 = 0x10;
/// CM, caching mode; FRO: one fault record, at 200h, that stays empty. No SAGAW: it translates for nobody.
const CAP: u64 = 1 << 7 | 0x20 << 24;
/// C, QI, IR; IRO: invalidation registers at 100h, that do nothing; MHMV: up to 2^15 entries in one invalidation. No EIM:
/// destinations have 8 bits.
const ECAP: u64 = 1 | 1 << 1 | 1 << 3 | 0x10 << 8 | 0xf << 20;
/// Bits of IQA: the queue's page.
const QUEUE_PAGE: u64 = !(PAGE_SIZE - 1);
/// Bits of IRTA: the table's first page; log2 of its entries, less one.
const TABLE_PAGE: u64 = !(PAGE_SIZE - 1);
const TABLE_SIZE: u64 = 0xf;
/// Bits of a queue head or tail of one page.
const QUEUE_OFFSET: u64 = (PAGE_SIZE - 1) & !(ENTRY_SIZE - 1);
/// The 64 bits that hold FSTS, in their upper half.
const FAULT_WORD: u32 = 0x30;
/// The 64 bits that hold FEADDR and FEUADDR.
const MESSAGE_WORD: u32 = 0x40;
/// Entries that one write to a register may have looked at one by one; past that all are looked at, once.
const SINGLE_ENTRIES: u64 = INTERRUPTS;

/// Types of descriptors.
mod kind {
    pub const CONTEXT: u64 = 1;
    pub const TRANSLATIONS: u64 = 2;
    pub const DEVICE: u64 = 3;
    pub const INTERRUPTS: u64 = 4;
    pub const WAIT: u64 = 5;
}

/// Memory as the guest's devices reach it, for what the guest says lies there.
pub struct GuestRam<'a, M> {
    /// All memory.
    pub mem: &'a M,
    /// Whether devices of the guest reach so many bytes from here.
    pub reaches: &'a dyn Fn(u64, u64) -> bool,
}

impl<M: PhysMem> GuestRam<'_, M> {
    fn read(&self, at: u64, out: &mut [u8]) -> bool {
        (self.reaches)(at, out.len() as u64) && self.mem.read(at, out)
    }

    fn write(&self, at: u64, data: &[u8]) -> bool {
        (self.reaches)(at, data.len() as u64) && self.mem.write(at, data)
    }

    fn entry(&self, at: u64) -> Option<Entry> {
        let mut bytes = [0; ENTRY_SIZE as usize];
        self.read(at, &mut bytes).then(|| entry_of(bytes))
    }
}

/// What a write to a register came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Remapping is on from now on, where it was not.
    pub enabled: bool,
    /// Entries that were refused: how many, and the first, with its index.
    pub refused: u32,
    /// See [`Self::refused`].
    pub first: Option<(u16, Refused)>,
}

/// The registers.
#[derive(Debug, Default)]
pub struct Shown {
    /// Queue, remapping and table pointer, as in GSTS.
    status: u32,
    /// FSTS.
    faults: u32,
    /// FECTL and FEDATA, FEADDR and FEUADDR: kept, for no event is ever told.
    events: [u64; 2],
    queue: u64,
    head: u64,
    tail: u64,
    /// IRTA.
    pointer: u64,
    /// What the last set-pointer command took of it.
    table: u64,
}

impl Shown {
    /// The 64 bits that hold the register at `offset`.
    pub fn read(&self, offset: u32) -> u64 {
        let high = |value: u32| u64::from(value) << 32;
        let [event, message] = self.events;
        match offset & !7 {
            0 => VERSION,
            reg::CAP => CAP,
            reg::ECAP => ECAP,
            // The command register lies below the status: it reads as what changes nothing when it is written back.
            reg::GCMD => high(self.status) | u64::from(self.status & global::KEPT),
            FAULT_WORD => high(self.faults),
            reg::FECTL => event,
            MESSAGE_WORD => message,
            reg::IQH => self.head,
            reg::IQT => self.tail,
            reg::IQA => self.queue,
            reg::IRTA => self.pointer,
            _ => 0,
        }
    }

    /// The guest wrote to the register at `offset`, and `word` is what the 64 bits that hold it have become.
    ///
    /// # Errors
    /// [`Error`]: a true unit may still let pass what it should not.
    pub fn write<P: Machine<Window = W>, W: Mmio>(
        &mut self,
        (offset, word): (u32, u64),
        all: &mut VtD<W>,
        platform: &P,
        ram: &GuestRam<'_, impl PhysMem>,
    ) -> Result<Outcome, Error> {
        let mut work = Work { all, platform, ram, outcome: Outcome::default() };
        match offset & !7 {
            reg::GCMD => self.command(word as u32, &mut work)?,
            FAULT_WORD => {
                self.faults &= !((word >> 32) as u32 & fsts::QUEUE_ERRORS);
                self.run(&mut work)?;
            }
            reg::FECTL => self.events[0] = word,
            MESSAGE_WORD => self.events[1] = word,
            reg::IQT => {
                self.tail = word & QUEUE_OFFSET;
                self.run(&mut work)?;
            }
            // A queue in use stays where it is.
            reg::IQA if self.status & global::QUEUE == 0 => self.queue = word & QUEUE_PAGE,
            reg::IRTA => self.pointer = word & (TABLE_PAGE | TABLE_SIZE),
            _ => {}
        }
        Ok(work.outcome)
    }

    fn command<P: Machine<Window = W>, W: Mmio>(
        &mut self,
        command: u32,
        work: &mut Work<'_, P, W, impl PhysMem>,
    ) -> Result<(), Error> {
        const SWITCHES: u32 = global::QUEUE | global::INTERRUPTS;
        if command & global::INTERRUPT_POINTER != 0 {
            self.table = self.pointer;
            self.status |= global::INTERRUPT_POINTER;
        }
        let changes = (command ^ self.status) & SWITCHES;
        self.status ^= changes;
        if changes & global::QUEUE != 0 {
            self.head = 0;
        }
        if changes & global::INTERRUPTS != 0 {
            match self.status & global::INTERRUPTS {
                // What it does not name any more is not granted any more. Compatibility format stays blocked: a guest that
                // was taken over must not get back what its kernel gave away.
                0 => work.grant_all(None)?,
                _ => {
                    work.all.block_compatible(work.platform)?;
                    work.outcome.enabled = true;
                }
            }
        }
        self.run(work)
    }

    /// Carries out what is queued: at most a page of descriptors, and each entry once, or twice.
    fn run<P: Machine<Window = W>, W: Mmio>(
        &mut self,
        work: &mut Work<'_, P, W, impl PhysMem>,
    ) -> Result<(), Error> {
        let mut singles = SINGLE_ENTRIES;
        let mut all_done = false;
        while self.status & global::QUEUE != 0
            && self.faults & fsts::QUEUE_ERRORS == 0
            && self.head != self.tail
        {
            let descriptor = work.ram.entry(self.queue.wrapping_add(self.head)).unwrap_or_default();
            match descriptor[0] & 0xf {
                // It translates for nobody.
                kind::CONTEXT | kind::TRANSLATIONS | kind::DEVICE => {}
                // All entries were read after this descriptor was queued.
                kind::INTERRUPTS if all_done => {}
                kind::INTERRUPTS => {
                    let (first, count) = named(descriptor);
                    match singles.checked_sub(count).filter(|_| count < INTERRUPTS) {
                        Some(left) => {
                            singles = left;
                            for index in (0..=u16::MAX).skip(first.into()).take(count as usize) {
                                work.grant(index, self.guests_entry(index, work.ram))?;
                            }
                        }
                        None => {
                            work.grant_all(Some(self))?;
                            all_done = true;
                        }
                    }
                }
                kind::WAIT => {
                    const STORE: u64 = 1 << 5;
                    let [low, high] = descriptor;
                    let data = ((low >> 32) as u32).to_le_bytes();
                    if low & STORE != 0 && !work.ram.write(high & !3, &data) {
                        self.faults |= fsts::QUEUE_ERROR;
                        break;
                    }
                }
                _ => {
                    self.faults |= fsts::QUEUE_ERROR;
                    break;
                }
            }
            self.head = self.head.wrapping_add(ENTRY_SIZE) & QUEUE_OFFSET;
        }
        Ok(())
    }

    /// Entries of the guest's table.
    fn entries(&self) -> u64 {
        2u64.wrapping_shl((self.table & TABLE_SIZE) as u32)
    }

    /// An entry of the guest's table; absent where there is none, or no memory.
    fn guests_entry(&self, index: u16, ram: &GuestRam<'_, impl PhysMem>) -> Entry {
        let at = (self.table & TABLE_PAGE).wrapping_add(u64::from(index).wrapping_mul(ENTRY_SIZE));
        let there = self.status & global::INTERRUPT_POINTER != 0 && u64::from(index) < self.entries();
        there.then(|| ram.entry(at)).flatten().unwrap_or_default()
    }
}

/// Which entries a descriptor names: the first, and how many.
fn named([low, _]: Entry) -> (u16, u64) {
    const SELECTIVE: u64 = 1 << 4;
    if low & SELECTIVE == 0 {
        return (0, INTERRUPTS);
    }
    let count = 1u64.wrapping_shl((low >> 27 & 0x1f) as u32).min(INTERRUPTS);
    let first = low >> 32 & 0xffff & count.wrapping_neg();
    (first as u16, count)
}

/// What a register write works with.
struct Work<'a, P, W, M> {
    all: &'a mut VtD<W>,
    platform: &'a P,
    ram: &'a GuestRam<'a, M>,
    outcome: Outcome,
}

impl<P: Machine<Window = W>, W: Mmio, M: PhysMem> Work<'_, P, W, M> {
    /// Grants what a guest's entry asks for, or takes back what was granted.
    fn grant(&mut self, index: u16, entry: Entry) -> Result<(), Error> {
        let interrupt = Interrupt::of_entry(entry).unwrap_or_else(|why| {
            self.outcome.refused = self.outcome.refused.saturating_add(1);
            self.outcome.first.get_or_insert((index, why));
            None
        });
        self.all.grant(self.platform, index, interrupt.as_ref())
    }

    /// The same for all entries of `table`; without one all is taken back.
    fn grant_all(&mut self, table: Option<&Shown>) -> Result<(), Error> {
        for index in 0..=u16::MAX {
            let entry = table.map_or([0; 2], |shown| shown.guests_entry(index, self.ram));
            self.grant(index, entry)?;
        }
        Ok(())
    }
}
