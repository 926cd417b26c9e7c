//! The TPM's register page, as far as the loader touches it: is one there, and letting go of locality 0.
//!
//! Spec: \[PTP\] "TPM Register Space", "Interface Identifier".

use hv::io::Mmio;

use crate::machine::Refusal;

/// Physical address of locality 0.
pub const BASE: u64 = 0xfed4_0000;
/// Bytes of a locality.
pub const PAGE: u32 = 0x1000;

/// TPM_ACCESS (TIS) or TPM_LOC_STATE (CRB): both have [`VALID`] in the same place.
const FIRST: u32 = 0;
/// The other bits of the register mean something.
const VALID: u32 = 1 << 7;
/// TPM_INTERFACE_ID: the type in the low four bits. A TIS from before the register reads all ones.
const INTERFACE_ID: u32 = 0x30;
/// TPM_ACCESS: write 1 to give the locality up.
const ACCESS_ACTIVE: u8 = 1 << 5;
/// TPM_LOC_CTRL (CRB).
const LOC_CTRL: u32 = 8;
/// TPM_LOC_CTRL: give the locality up.
const RELINQUISH: u32 = 1 << 1;

/// How the TPM is talked to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interface {
    /// FIFO registers.
    Tis,
    /// Command/response buffer.
    Crb,
}

/// The interface of the TPM behind `regs`, the page of locality 0.
pub fn interface(regs: &impl Mmio) -> Result<Interface, Refusal> {
    let first = regs.read32(FIRST);
    if first == u32::MAX || first & VALID == 0 {
        return Err(Refusal::NoTpm(first));
    }
    let id = regs.read32(INTERFACE_ID);
    match id & 0xf {
        0 | 0xf => Ok(Interface::Tis),
        1 => Ok(Interface::Crb),
        _ => Err(Refusal::TpmInterface(id)),
    }
}

/// Gives up locality 0, which the firmware may hold: while it does, locality 4 of SKINIT would have to seize it.
pub fn relinquish(regs: &impl Mmio, interface: Interface) {
    match interface {
        Interface::Tis => regs.write8(FIRST, ACCESS_ACTIVE),
        Interface::Crb => regs.write32(LOC_CTRL, RELINQUISH),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use core::cell::Cell;

    /// Locality 0 of a TPM, held by the firmware.
    pub(crate) struct FakeTpm {
        first: u32,
        id: u32,
        held: Cell<bool>,
    }

    impl FakeTpm {
        pub(crate) fn tis() -> Self {
            Self { first: 0xa1, id: 0, held: Cell::new(true) }
        }
        pub(crate) fn crb() -> Self {
            Self { first: 0x82, id: 1, held: Cell::new(true) }
        }
        pub(crate) fn absent() -> Self {
            Self { first: u32::MAX, id: u32::MAX, held: Cell::new(false) }
        }
    }

    impl Mmio for FakeTpm {
        fn read8(&self, _: u32) -> u8 {
            panic!("no byte is read")
        }
        fn read32(&self, offset: u32) -> u32 {
            match offset {
                FIRST => self.first,
                INTERFACE_ID => self.id,
                _ => panic!("read at {offset:#x}"),
            }
        }
        fn read64(&self, _: u32) -> u64 {
            panic!("no quadword is read")
        }
        fn write8(&self, offset: u32, value: u8) {
            assert_eq!((self.id & 0xf, offset, value), (0, 0, 0x20));
            self.held.set(false);
        }
        fn write32(&self, offset: u32, value: u32) {
            assert_eq!((self.id & 0xf, offset, value), (1, 8, 2));
            self.held.set(false);
        }
        fn write64(&self, _: u32, _: u64) {
            panic!("no quadword is written")
        }
    }

    #[test]
    fn locality_0_is_given_up_in_the_interface_s_own_way() {
        for (tpm, wanted) in [(FakeTpm::tis(), Interface::Tis), (FakeTpm::crb(), Interface::Crb)] {
            assert_eq!(interface(&tpm), Ok(wanted));
            relinquish(&tpm, wanted);
            assert!(!tpm.held.get());
        }
    }

    #[test]
    fn a_page_that_is_no_tpm_is_none() {
        let with = |first, id| interface(&FakeTpm { first, id, held: Cell::new(false) });
        assert_eq!(with(0x21, 0), Err(Refusal::NoTpm(0x21)));
        assert_eq!(with(0x81, 2), Err(Refusal::TpmInterface(2)));
        assert_eq!(with(0x81, u32::MAX), Ok(Interface::Tis));
    }
}
