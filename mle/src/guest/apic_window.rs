//! The guest's APIC page as one CPU sees it: closed while APs are parked, so that INIT and Startup IPIs come to the
//! MLE; open for good once all run, so that an end-of-interrupt costs nothing.
//!
//! A watched access is let through by a single step: the page is mapped for one instruction, with interrupts held.
//! For a write of the interrupt command register a page of memory is mapped instead, and the command read from
//! there. No instruction is decoded.

use core::sync::atomic::{AtomicU64, Ordering};

use hv::radix::ENTRIES;

use crate::apic::ICR_LOW;

/// How the guest sees the page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum View {
    /// Every access exits.
    Watched,
    /// The APIC.
    Device,
    /// Memory that collects a write.
    Shadow,
}

/// One CPU's page-table entry for its APIC page.
#[derive(Clone)]
pub struct ApicWindow {
    entry: &'static AtomicU64,
    device: u64,
    shadow: u64,
    /// The memory behind [`View::Shadow`].
    page: &'static [AtomicU64; ENTRIES],
    view: View,
}

impl ApicWindow {
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

    /// Where the entry is that changes.
    pub fn entry(&self) -> u64 {
        self.entry.as_ptr() as u64
    }

    /// What the guest sees.
    pub fn view(&self) -> View {
        self.view
    }

    /// The 32-bit word that was written to the shadow's command register.
    pub fn written(&self) -> u32 {
        const AT: usize = ICR_LOW as usize / 8;
        const { assert!(ICR_LOW.is_multiple_of(8)) };
        self.page.get(AT).map_or(0, |word| word.load(Ordering::Acquire) as u32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_entry_follows_the_view() {
        static ENTRY: AtomicU64 = AtomicU64::new(7);
        static PAGE: [AtomicU64; ENTRIES] = [const { AtomicU64::new(0) }; ENTRIES];
        let mut w = ApicWindow::new(&ENTRY, 0xfee0_0007, 0x1_2007, &PAGE);
        assert_eq!(ENTRY.load(Ordering::Relaxed), 0);
        w.set(View::Shadow);
        PAGE[0x300 / 8].store(0xdead_0000_4611, Ordering::Relaxed);
        assert_eq!((ENTRY.load(Ordering::Relaxed), w.written()), (0x1_2007, 0x4611));
        w.set(View::Device);
        assert_eq!(ENTRY.load(Ordering::Relaxed), 0xfee0_0007);
    }
}
