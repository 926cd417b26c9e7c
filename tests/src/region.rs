//! What lies in the MLE region, found by what it looks like: the images tell nobody.

use anyhow::{Context, Result};

use crate::edu::Guest;

/// The address in a register or table entry.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
const PAGE: usize = 4096;

/// A part of the MLE region, to search.
pub struct Region {
    base: u64,
    bytes: Vec<u8>,
}

impl Region {
    /// As it is now.
    pub fn of(guest: &mut impl Guest, base: u64, size: u64) -> Result<Self> {
        Ok(Self { base, bytes: guest.memory(base, usize::try_from(size)?)? })
    }

    fn word(&self, at: u64) -> u64 {
        let at = (at - self.base) as usize;
        self.bytes[at..at + 8].iter().rev().fold(0, |word, &byte| word << 8 | u64::from(byte))
    }

    fn pages(&self) -> impl Iterator<Item = u64> {
        (self.base..self.base + self.bytes.len() as u64).step_by(PAGE)
    }

    /// The VMCB of a virtual CPU with this address space identifier: nested paging is on, and CPUID and SMI are intercepted.
    pub fn vmcb(&self, asid: u64) -> Result<u64> {
        let is_vmcb = |page: &u64| {
            let intercepts = self.word(page + 8) >> 32;
            self.word(page + 0x58) & 0xffff_ffff == asid
                && self.word(page + 0x90) == 1
                && intercepts & (1 << 18 | 1 << 2) == 1 << 18 | 1 << 2
        };
        self.pages().find(is_vmcb).context("no VMCB")
    }

    /// The root of a virtual CPU's nested tables.
    pub fn nested(&self, asid: u64) -> Result<u64> {
        Ok(self.word(self.vmcb(asid)? + 0xb0) & ADDRESS)
    }

    /// The root of the page tables that a virtual CPU has given itself.
    pub fn tables(&self, asid: u64) -> Result<u64> {
        const SAVED_CR3: u64 = 0x550;
        Ok(self.word(self.vmcb(asid)? + SAVED_CR3) & ADDRESS)
    }

    /// The root of the MLE's own tables: one entry, not for users, that leads into the region.
    pub fn own_root(&self) -> Result<u64> {
        let is_root = |page: &u64| {
            let first = self.word(*page);
            first & 7 == 3
                && self.pages().any(|to| to == first & ADDRESS)
                && (1..512).all(|index| self.word(page + index * 8) == 0)
        };
        self.pages().find(is_root).context("no page tables")
    }
}

/// The first word of a page that a device which reads nothing would not have.
pub fn telling(guest: &mut impl Guest, page: u64) -> Result<u64> {
    let bytes = guest.memory(page, PAGE)?;
    let index = bytes.chunks(8).position(|word| word != [0; 8] && word != [0xff; 8]);
    Ok(page + 8 * index.with_context(|| format!("nothing at {page:#x}"))? as u64)
}

/// The address in a table entry or register.
pub fn address_at(guest: &mut impl Guest, at: u64) -> Result<u64> {
    let bytes = guest.memory(at, 8)?;
    Ok(u64::from_le_bytes(bytes.as_slice().try_into()?) & ADDRESS)
}
