//! Memory for tests.

use core::cell::RefCell;

use hv::io::PhysMem;

/// One piece of RAM; everything else is not there.
pub struct Ram {
    base: u64,
    bytes: RefCell<Vec<u8>>,
}

impl Ram {
    pub fn new(base: u64, len: usize) -> Self {
        Self { base, bytes: RefCell::new(vec![0; len]) }
    }

    fn start(&self, addr: u64, len: usize) -> Option<usize> {
        let start = usize::try_from(addr.checked_sub(self.base)?).ok()?;
        (start.checked_add(len)? <= self.bytes.borrow().len()).then_some(start)
    }
}

impl PhysMem for Ram {
    fn read(&self, addr: u64, out: &mut [u8]) -> bool {
        let Some(start) = self.start(addr, out.len()) else { return false };
        out.copy_from_slice(&self.bytes.borrow()[start..start + out.len()]);
        true
    }

    fn write(&self, addr: u64, data: &[u8]) -> bool {
        let Some(start) = self.start(addr, data.len()) else { return false };
        self.bytes.borrow_mut()[start..start + data.len()].copy_from_slice(data);
        true
    }
}
