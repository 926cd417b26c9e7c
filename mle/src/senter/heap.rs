//! The TXT heap: four tables, copied field by field, each byte once. Devices cannot reach it (DPR), and no other CPU runs; what
//! lies in it is the loader's word in the first three tables and SINIT's in the last.
//!
//! Spec: \[TXT\] "TXT Heap Memory": each table begins with its size, which counts itself; offsets below count from behind it.

use hv::addr::PhysRange;
use hv::failure::SenterError;
use hv::io::PhysMem;
use vmx::txt::heap::SIZE_WORD;

use super::{Error, fail};

/// Which table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which {
    /// Written by the BIOS.
    Bios = 0,
    /// The loader's, for us.
    OsMle = 1,
    /// The loader's, for SINIT.
    OsSinit = 2,
    /// SINIT's, for us.
    SinitMle = 3,
}

/// One table.
#[derive(Clone, Copy, Debug)]
pub struct Table {
    which: Which,
    /// With its size word.
    range: PhysRange,
}

impl Table {
    /// Finds table `which` in `heap`.
    ///
    /// # Errors
    /// [`SenterError::Heap`]: it, or one before it, does not fit.
    pub fn find(mem: &impl PhysMem, heap: &PhysRange, which: Which) -> Result<Self, Error> {
        let mut at = heap.start();
        for index in 0..=which as u16 {
            let no = Error::Checked(SenterError::Heap, index.saturating_add(1));
            let mut size = [0; SIZE_WORD as usize];
            let word = PhysRange::new(at, SIZE_WORD).filter(|word| heap.contains(word)).ok_or(no)?;
            if !mem.read(word.start(), &mut size) {
                return Err(no);
            }
            let size = u64::from_le_bytes(size);
            let range =
                PhysRange::new(at, size).filter(|r| size >= SIZE_WORD && heap.contains(r)).ok_or(no)?;
            if index == which as u16 {
                return Ok(Self { which, range });
            }
            at = range.end().ok_or(no)?;
        }
        fail(SenterError::Heap, 0)
    }

    /// Copies `out.len()` bytes at `offset`, which counts from behind the size word.
    ///
    /// # Errors
    /// They lie outside, with the table's error.
    pub fn copy(&self, mem: &impl PhysMem, offset: u64, out: &mut [u8]) -> Result<(), Error> {
        let malformed = self.error(super::FIELD_SHAPE);
        let start = self.range.start().checked_add(SIZE_WORD).and_then(|at| at.checked_add(offset));
        let piece = start.and_then(|at| PhysRange::new(at, out.len() as u64)).ok_or(malformed)?;
        if self.range.contains(&piece) && mem.read(piece.start(), out) { Ok(()) } else { Err(malformed) }
    }

    /// The 32-bit field at `offset`.
    ///
    /// # Errors
    /// As [`Self::copy`].
    pub fn u32(&self, mem: &impl PhysMem, offset: u64) -> Result<u32, Error> {
        let mut bytes = [0; 4];
        self.copy(mem, offset, &mut bytes)?;
        Ok(u32::from_le_bytes(bytes))
    }

    /// The 64-bit field at `offset`.
    ///
    /// # Errors
    /// As [`Self::copy`].
    pub fn u64(&self, mem: &impl PhysMem, offset: u64) -> Result<u64, Error> {
        let mut bytes = [0; 8];
        self.copy(mem, offset, &mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// This table's error, with the number of the field.
    pub const fn error(&self, field: u16) -> Error {
        let error = match self.which {
            Which::Bios => SenterError::Heap,
            Which::OsMle => SenterError::OsMleData,
            Which::OsSinit => SenterError::OsSinitData,
            Which::SinitMle => SenterError::SinitMleData,
        };
        Error::Checked(error, field)
    }
}
