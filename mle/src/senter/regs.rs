//! TXT's registers as the MLE uses them.

use hv::io::Mmio;
pub use vmx::txt::regs::*;

use crate::metal::PhysWindow;

/// What TXT.STS says after SENTER.
pub const STS_LAUNCHED: u64 = STS_SENTER_DONE | STS_PRIVATE_OPEN;

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
        // SAFETY: the caller's promise; there is no object at these addresses.
        unsafe { Self::new(PhysWindow::new(PRIVATE, SPACE), PhysWindow::new(PUBLIC, SPACE)) }
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
        self.private.write64(register, 1);
        let _ = self.private.read64(E2STS);
    }

    /// Sets TXT.ERRORCODE.
    pub fn set_errorcode(&self, value: u32) {
        self.write(ERRORCODE, value.into());
    }

    /// Closes the private page, and with it localities 2 and 3 of the TPM: what follows goes by the public one.
    pub fn close_private(&self) {
        self.private.write64(CMD_CLOSE_PRIVATE, 1);
        let _ = self.public.read64(E2STS);
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::cell::RefCell;
    use std::collections::HashMap;
    use std::rc::Rc;

    use super::*;

    pub const PRIVATE_PAGE: u32 = 0;
    pub const PUBLIC_PAGE: u32 = 0x1_0000;

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
            Registers::new(Page(self.clone(), PRIVATE_PAGE), Page(self.clone(), PUBLIC_PAGE))
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
