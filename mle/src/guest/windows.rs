//! Pages of registers that the guest does not simply have, as one CPU sees them.
//!
//! Its APIC's is closed while APs are parked, so that INIT and Startup IPIs come to the MLE; open for good once all run, so
//! that an end-of-interrupt costs nothing. That of the VT-d unit which it is shown ([`iommu::vt_d::shown`]) has no device
//! behind it.
//!
//! A watched access is let through by a single step: a page is mapped for one instruction. That is the APIC; or memory, in
//! which the registers' values are, and from which what was written is read. No instruction is decoded.

use core::sync::atomic::{AtomicU64, Ordering};

use hv::addr::{PAGE_SIZE, PhysRange};
use hv::radix::ENTRIES;
use hv::vcpu::Access;
use iommu::vt_d::shown;

use crate::apic::{ICR_LOW, XAPIC_BASE};

/// Where the guest finds the shown unit's registers: behind its APIC's, where no device of the CPU's bus answers and no
/// firmware puts one, since addresses of messages begin there.
pub const UNIT_BASE: u64 = XAPIC_BASE + PAGE_SIZE;
const _: () = assert!(shown::WINDOW == PAGE_SIZE);

/// Both pages.
pub const RANGE: PhysRange = match PhysRange::new(XAPIC_BASE, 2 * PAGE_SIZE) {
    Some(range) => range,
    None => unreachable!(),
};

/// How the guest sees a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum View {
    /// Every access exits.
    Watched,
    /// The device.
    Device,
    /// Memory that has what is read, and collects a write.
    Shadow,
}

/// One CPU's page-table entry for a page of registers.
#[derive(Clone)]
pub struct Window {
    entry: &'static AtomicU64,
    device: u64,
    shadow: u64,
    /// The memory behind [`View::Shadow`].
    page: &'static [AtomicU64; ENTRIES],
    view: View,
}

impl Window {
    /// A watched page. `entry` is the page-table entry of this CPU's own nested tables, `device` and `shadow` are
    /// its values for the two mappings, `page` the shadow's memory.
    pub fn new(
        entry: &'static AtomicU64,
        device: u64,
        shadow: u64,
        page: &'static [AtomicU64; ENTRIES],
    ) -> Self {
        entry.store(0, Ordering::Release);
        Self { entry, device, shadow, page, view: View::Watched }
    }

    /// Changes what the guest sees; the caller flushes when it becomes less.
    pub fn set(&mut self, view: View) {
        let value = match view {
            View::Watched => 0,
            View::Device => self.device,
            View::Shadow => self.shadow,
        };
        self.entry.store(value, Ordering::Release);
        self.view = view;
    }

    /// What the guest sees.
    pub fn view(&self) -> View {
        self.view
    }

    /// The 64 bits of the shadow that hold the register at `offset`.
    fn word(&self, offset: u32) -> Option<&AtomicU64> {
        self.page.get(offset as usize / 8)
    }
}

/// Which page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Registers {
    /// Its APIC's.
    Apic,
    /// The shown unit's.
    Unit,
}

/// What an instruction wrote to memory in place of registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Collected {
    /// The low half of an interrupt command.
    Command(u32),
    /// To the shown unit's register at `offset`; `word` is what the 64 bits that hold it have become.
    Unit {
        /// In the page.
        offset: u32,
        /// Those bits.
        word: u64,
    },
}

/// What the running instruction is let through to.
#[derive(Clone, Copy)]
enum Lent {
    Apic,
    Command,
    Unit { offset: u32, access: Access },
}

/// One CPU's view of both pages.
#[derive(Clone)]
pub struct Windows {
    /// Its APIC's.
    pub apic: Window,
    /// The shown unit's, where one is shown.
    unit: Option<Window>,
    lent: Option<Lent>,
}

impl Windows {
    /// Both watched; without `unit` none is shown.
    pub fn new(apic: Window, unit: Option<Window>) -> Self {
        Self { apic, unit, lent: None }
    }

    /// The page-table entries that change: where the first is, and the end of the last.
    pub fn entries(&self) -> (u64, u64) {
        let at = |window: &Window| window.entry.as_ptr() as u64;
        let first = at(&self.apic);
        (first, self.unit.as_ref().map_or(first, at).saturating_add(8))
    }

    /// What is watched at this page of the guest's.
    pub fn watched(&self, page: u64) -> Option<Registers> {
        match page {
            XAPIC_BASE if self.apic.view == View::Watched => Some(Registers::Apic),
            UNIT_BASE if self.unit.is_some() => Some(Registers::Unit),
            _ => None,
        }
    }

    /// Lets one instruction through to an access of the APIC.
    pub fn lend_apic(&mut self, offset: u32, access: Access) {
        let is_command = offset & !0xf == ICR_LOW && access == Access::Write;
        let (view, lent) =
            if is_command { (View::Shadow, Lent::Command) } else { (View::Device, Lent::Apic) };
        self.apic.set(view);
        self.lent = Some(lent);
    }

    /// Lets one instruction through to an access of the shown unit's register at `offset`; the 64 bits that hold it are
    /// `word`.
    pub fn lend_unit(&mut self, offset: u32, access: Access, word: u64) {
        let Some(unit) = &mut self.unit else { return };
        if let Some(to) = unit.word(offset) {
            to.store(word, Ordering::Relaxed);
        }
        unit.set(View::Shadow);
        self.lent = Some(Lent::Unit { offset, access });
    }

    /// Ends that: what was lent is watched again, and the caller flushes. Gives what was written if the instruction was
    /// `executed`: where an event was delivered in its place, that is what was there before, which changes nothing.
    pub fn take_back(&mut self, executed: bool) -> Option<Collected> {
        let load = |word: Option<&AtomicU64>| word.map_or(0, |word| word.load(Ordering::Acquire));
        let collected = match self.lent.take()? {
            Lent::Apic => {
                self.apic.set(View::Watched);
                return None;
            }
            Lent::Command => {
                const { assert!(ICR_LOW.is_multiple_of(8)) };
                self.apic.set(View::Watched);
                Collected::Command(load(self.apic.word(ICR_LOW)) as u32)
            }
            Lent::Unit { offset, access } => {
                let unit = self.unit.as_mut()?;
                unit.set(View::Watched);
                if access != Access::Write {
                    return None;
                }
                Collected::Unit { offset, word: load(unit.word(offset)) }
            }
        };
        executed.then_some(collected)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Page([AtomicU64; ENTRIES]);

    impl Page {
        const fn new() -> Self {
            Self([const { AtomicU64::new(0) }; ENTRIES])
        }
        fn put(&self, offset: usize, word: u64) {
            self.0[offset / 8].store(word, Ordering::Relaxed);
        }
    }

    fn windows(entries: &'static [AtomicU64; 2], pages: &'static [Page; 2]) -> Windows {
        let apic = Window::new(&entries[0], 0xfee0_0007, 0x1_2007, &pages[0].0);
        let unit = Window::new(&entries[1], 0, 0x1_3007, &pages[1].0);
        Windows::new(apic, Some(unit))
    }

    #[test]
    fn the_entry_follows_the_view() {
        static ENTRIES: [AtomicU64; 2] = [const { AtomicU64::new(7) }; 2];
        static PAGES: [Page; 2] = [const { Page::new() }; 2];
        let seen = || ENTRIES.each_ref().map(|entry| entry.load(Ordering::Relaxed));
        let mut w = windows(&ENTRIES, &PAGES);
        assert_eq!((seen(), w.take_back(true)), ([0, 0], None));
        assert_eq!(w.entries(), (ENTRIES.as_ptr() as u64, ENTRIES.as_ptr() as u64 + 16));
        w.lend_apic(0x300, Access::Write);
        PAGES[0].put(0x300, 0xdead_0000_4611);
        assert_eq!(seen(), [0x1_2007, 0]);
        assert_eq!((w.take_back(true), seen()), (Some(Collected::Command(0x4611)), [0, 0]));
        w.lend_apic(0x300, Access::Read);
        assert_eq!(seen(), [0xfee0_0007, 0]);
        assert_eq!((w.take_back(true), seen()), (None, [0, 0]));
        w.lend_apic(0x300, Access::Write);
        assert_eq!((w.take_back(false), seen()), (None, [0, 0]), "it was interrupted");

        // An APIC that is open for good stays so.
        w.apic.set(View::Device);
        assert_eq!((w.watched(0xfee0_0000), w.watched(0xfee0_1000)), (None, Some(Registers::Unit)));
        w.lend_unit(0x8c, Access::Write, 0x10);
        assert_eq!((seen(), PAGES[1].0[0x11].load(Ordering::Relaxed)), ([0xfee0_0007, 0x1_3007], 0x10));
        PAGES[1].put(0x88, 0x20);
        let written = Collected::Unit { offset: 0x8c, word: 0x20 };
        assert_eq!((w.take_back(true), seen()), (Some(written), [0xfee0_0007, 0]));
        w.lend_unit(0x1c, Access::Read, 1 << 57);
        assert_eq!(w.take_back(true), None);
    }

    #[test]
    fn where_no_unit_is_shown_there_is_none() {
        static ENTRY: AtomicU64 = AtomicU64::new(7);
        static PAGE: Page = Page::new();
        let mut w = Windows::new(Window::new(&ENTRY, 0xfee0_0007, 0x1_2007, &PAGE.0), None);
        assert_eq!((w.watched(0xfee0_0000), w.watched(0xfee0_1000)), (Some(Registers::Apic), None));
        w.lend_unit(0x1c, Access::Read, 0);
        assert_eq!(w.take_back(true), None);
    }
}
