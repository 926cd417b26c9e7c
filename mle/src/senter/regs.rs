//! TXT's registers as the MLE uses them.

use hv::io::Mmio;

use crate::inputs::TXT_REGISTERS;
use crate::metal::PhysWindow;

/// TXT.STS.
pub const STS: u32 = 0x000;
/// TXT.ESTS.
pub const ESTS: u32 = 0x008;
/// TXT.ERRORCODE.
pub const ERRORCODE: u32 = 0x030;
/// TXT.CMD.RESET.
pub const CMD_RESET: u32 = 0x038;
/// TXT.CMD.CLOSE-PRIVATE.
pub const CMD_CLOSE_PRIVATE: u32 = 0x048;
/// TXT.CMD.UNLOCK-MEM-CONFIG.
pub const CMD_UNLOCK_MEM_CONFIG: u32 = 0x218;
/// TXT.SINIT.BASE.
pub const SINIT_BASE: u32 = 0x270;
/// TXT.SINIT.SIZE.
pub const SINIT_SIZE: u32 = 0x278;
/// TXT.MLE.JOIN.
pub const MLE_JOIN: u32 = 0x290;
/// TXT.HEAP.BASE.
pub const HEAP_BASE: u32 = 0x300;
/// TXT.HEAP.SIZE.
pub const HEAP_SIZE: u32 = 0x308;
/// TXT.CMD.OPEN.LOCALITY1.
pub const CMD_OPEN_LOCALITY1: u32 = 0x380;
/// TXT.CMD.CLOSE.LOCALITY1.
pub const CMD_CLOSE_LOCALITY1: u32 = 0x388;
/// TXT.CMD.SECRETS.
pub const CMD_SECRETS: u32 = 0x8e0;
/// TXT.CMD.NO-SECRETS.
pub const CMD_NO_SECRETS: u32 = 0x8e8;
/// TXT.E2STS.
pub const E2STS: u32 = 0x8f0;
/// SENTER.DONE.STS and PRIVATE-OPEN.STS of TXT.STS.
pub const STS_LAUNCHED: u32 = 1 << 0 | 1 << 7;
/// What SINIT leaves in TXT.ERRORCODE.
pub const ERRORCODE_SUCCESS: u32 = 0xc000_0001;

/// The private and the public page.
pub struct Registers<M> {
    private: M,
    public: M,
}

impl Registers<PhysWindow> {
    /// # Safety
    /// Both pages are mapped uncached for as long as the value lives.
    #[expect(unsafe_code, reason = "makes register windows")]
    pub unsafe fn of_cpu() -> Self {
        const PAGE: u32 = 0x1_0000;
        let base = TXT_REGISTERS.start();
        // SAFETY: the caller's promise; there is no object at these addresses.
        unsafe {
            let window = |base| PhysWindow::new(base, PAGE);
            Self::new(window(base), window(base.wrapping_add(PAGE.into())))
        }
    }
}

impl<M: Mmio> Registers<M> {
    /// From windows of both pages.
    pub const fn new(private: M, public: M) -> Self {
        Self { private, public }
    }

    /// Reads a register.
    pub fn read(&self, register: u32) -> u64 {
        self.private.read64(register)
    }

    /// Writes a register, and sees to it that the write is done.
    pub fn write(&self, register: u32, value: u64) {
        self.private.write64(register, value);
        let _ = self.private.read64(E2STS);
    }

    /// Gives a command.
    pub fn command(&self, register: u32) {
        self.private.write8(register, 1);
        let _ = self.private.read64(E2STS);
    }

    /// Sets TXT.ERRORCODE.
    pub fn set_errorcode(&self, value: u32) {
        self.write(ERRORCODE, value.into());
    }

    /// Closes the private page, and with it localities 2 and 3 of the TPM: what follows goes by the public one.
    pub fn close_private(&self) {
        self.private.write8(CMD_CLOSE_PRIVATE, 1);
        let _ = self.public.read64(E2STS);
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::cell::RefCell;
    use std::collections::HashMap;
    use std::rc::Rc;

    use super::*;

    pub const PRIVATE: u32 = 0;
    pub const PUBLIC: u32 = 0x1_0000;

    /// Registers that remember, and what was done to them.
    #[derive(Clone, Default)]
    pub struct Chipset(Rc<RefCell<State>>);

    #[derive(Default)]
    struct State {
        registers: HashMap<u32, u64>,
        writes: Vec<(u32, u64)>,
        fences: Vec<u32>,
    }

    pub struct Page(Chipset, u32);

    impl Chipset {
        pub fn new() -> Self {
            Self::default()
        }
        pub fn set(&self, register: u32, value: u64) {
            self.0.borrow_mut().registers.insert(register, value);
        }
        pub fn registers(&self) -> Registers<Page> {
            Registers::new(Page(self.clone(), PRIVATE), Page(self.clone(), PUBLIC))
        }
        pub fn writes(&self) -> Vec<(u32, u64)> {
            self.0.borrow().writes.clone()
        }
        pub fn fences(&self) -> Vec<u32> {
            self.0.borrow().fences.clone()
        }
    }

    impl Mmio for Page {
        fn read8(&self, _: u32) -> u8 {
            panic!()
        }
        fn read32(&self, _: u32) -> u32 {
            panic!()
        }
        fn read64(&self, offset: u32) -> u64 {
            let state = &mut *self.0.0.borrow_mut();
            if offset == E2STS {
                state.fences.push(self.1 + offset);
            }
            state.registers.get(&offset).copied().unwrap_or(0)
        }
        fn write8(&self, offset: u32, value: u8) {
            self.write64(offset, value.into());
        }
        fn write32(&self, _: u32, _: u32) {
            panic!()
        }
        fn write64(&self, offset: u32, value: u64) {
            let state = &mut *self.0.0.borrow_mut();
            state.registers.insert(offset, value);
            state.writes.push((self.1 + offset, value));
        }
    }
}
