//! The two 8259 interrupt controllers, silenced while the MLE takes interrupts for the guest.
//!
//! What they send by ExtINT asks no priority, and its vector is whatever the guest or the firmware set: in the MLE it would mean
//! nothing. Masked, it waits there for the guest. Where their inputs are masked already, as on all machines once they use the
//! I/O APIC, nothing is touched.
//!
//! Spec: Intel 8259A, "Operation Command Words": OCW1.

use hv::io::PortIo;

/// Mask registers of the first and the second.
const MASKS: [u16; 2] = [0x21, 0xa1];
const ALL: u8 = 0xff;

/// What was open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Silenced([u8; 2]);

impl Silenced {
    /// Masks all inputs.
    pub fn begin(ports: &impl PortIo) -> Self {
        Self(MASKS.map(|port| {
            let mask = ports.in8(port);
            if mask != ALL {
                ports.out8(port, ALL);
            }
            mask
        }))
    }

    /// Opens what was open, unless another CPU of the guest's has set a mask meanwhile.
    pub fn end(self, ports: &impl PortIo) {
        for (port, mask) in MASKS.into_iter().zip(self.0) {
            if mask != ALL && ports.in8(port) == ALL {
                ports.out8(port, mask);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    /// Two mask registers, and what was written.
    #[derive(Default)]
    struct Pics(RefCell<[u8; 2]>, RefCell<Vec<(u16, u8)>>);

    impl PortIo for Pics {
        fn in8(&self, port: u16) -> u8 {
            self.0.borrow()[usize::from(port == MASKS[1])]
        }
        fn out8(&self, port: u16, value: u8) {
            self.0.borrow_mut()[usize::from(port == MASKS[1])] = value;
            self.1.borrow_mut().push((port, value));
        }
        fn in16(&self, _: u16) -> u16 {
            unreachable!("a register of one byte")
        }
        fn out16(&self, _: u16, _: u16) {
            unreachable!("a register of one byte")
        }
        fn in32(&self, _: u16) -> u32 {
            unreachable!("a register of one byte")
        }
        fn out32(&self, _: u16, _: u32) {
            unreachable!("a register of one byte")
        }
    }

    #[test]
    fn masks_come_back_as_they_were() {
        let pics = Pics(RefCell::new([0xb8, ALL]), RefCell::default());
        let silenced = Silenced::begin(&pics);
        assert_eq!(*pics.0.borrow(), [ALL; 2]);
        silenced.end(&pics);
        assert_eq!(*pics.0.borrow(), [0xb8, ALL]);
        // The second was not touched.
        assert_eq!(*pics.1.borrow(), [(0x21, ALL), (0x21, 0xb8)]);
    }

    #[test]
    fn a_mask_that_another_cpu_set_meanwhile_stays() {
        let pics = Pics(RefCell::new([0, 0]), RefCell::default());
        let silenced = Silenced::begin(&pics);
        pics.out8(0x21, 0xfe);
        silenced.end(&pics);
        assert_eq!(*pics.0.borrow(), [0xfe, 0]);
    }
}
