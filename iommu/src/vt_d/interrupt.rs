//! Interrupts that a device may be allowed to send, and the entries that say so.
//!
//! Spec: \[VTD\] "Interrupt Remapping Table Entry (IRTE) for Remapped Interrupts".

use core::fmt;

use super::Error;
use super::defs::{Entry, irte};

/// Who may send an interrupt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sender {
    /// One device.
    Device {
        /// Its id.
        source: u16,
        /// Which of its functions: 0 that of `source`; 1 to 3 also those that differ in bit 2, bits 2 and 1, or any.
        functions: u8,
    },
    /// All devices of these buses: what is behind a bridge that speaks for them.
    Buses {
        /// First bus.
        first: u8,
        /// Last bus.
        last: u8,
    },
}

/// An interrupt that a device may send: fixed, or to the CPU of lowest priority; xAPIC addressing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interrupt {
    /// The only sender.
    pub sender: Sender,
    /// Vector, 16 to 254.
    pub vector: u8,
    /// APIC id, or set of logical ids.
    pub destination: u8,
    /// Whether the destination is logical.
    pub logical: bool,
    /// Whether one of the CPUs meant gets it, the unit choosing.
    pub one_of: bool,
    /// Whether it goes to the CPU of lowest priority.
    pub lowest_priority: bool,
    /// Whether it is level triggered.
    pub level: bool,
}

/// Why a guest's entry is no [`Interrupt`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// Vector below 16 or 255.
    Vector(u8),
    /// Delivery mode other than fixed and lowest priority: SMI, NMI, INIT, ExtINT, or none.
    Mode(u8),
    /// It does not say who may send it.
    Sender,
    /// Reserved bits, a posted interrupt or a destination of 32 bits: the bits that should be zero.
    Reserved(Entry),
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vector(vector) => write!(f, "vector {vector}, not 16 to 254"),
            Self::Mode(mode) => write!(f, "delivery mode {mode}, not 0 or 1"),
            Self::Sender => f.write_str("no check of the sender"),
            Self::Reserved([low, high]) => write!(f, "bits {high:x}:{low:016x}, not 0"),
        }
    }
}

impl Interrupt {
    /// Vectors that an entry may have: APICs take none below, and 255 is what they say when there was none.
    const VECTORS: core::ops::RangeInclusive<u8> = 16..=254;

    /// The table entry.
    pub(super) fn entry(&self) -> Result<Entry, Error> {
        if !Self::VECTORS.contains(&self.vector) {
            return Err(Error::Vector { vector: self.vector });
        }
        let bit = |set: bool, bit: u64| if set { bit } else { 0 };
        let low = irte::PRESENT
            | bit(self.logical, irte::LOGICAL)
            | bit(self.one_of || self.lowest_priority, irte::ONE_OF)
            | bit(self.lowest_priority, irte::LOWEST_PRIORITY)
            | bit(self.level, irte::LEVEL)
            | u64::from(self.vector) << 16
            | u64::from(self.destination) << 40;
        let high = match self.sender {
            Sender::Device { source, functions } => {
                irte::SENDER_DEVICE | u64::from(functions & 3) << 16 | u64::from(source)
            }
            Sender::Buses { first, last } => irte::SENDER_BUSES | u64::from(first) << 8 | u64::from(last),
        };
        Ok([low, high])
    }

    /// What an entry that somebody else wrote lets a device send: `None` when it is absent.
    ///
    /// # Errors
    /// [`Refused`]: something that no device may send.
    pub(super) fn of_entry([low, high]: Entry) -> Result<Option<Self>, Refused> {
        if low & irte::PRESENT == 0 {
            return Ok(None);
        }
        let reserved = [low & irte::REFUSED, high & irte::REFUSED_HIGH];
        if reserved != [0; 2] {
            return Err(Refused::Reserved(reserved));
        }
        if low & irte::MODE & !irte::LOWEST_PRIORITY != 0 {
            return Err(Refused::Mode(((low & irte::MODE) >> 5) as u8));
        }
        let vector = (low >> 16) as u8;
        if !Self::VECTORS.contains(&vector) {
            return Err(Refused::Vector(vector));
        }
        let sender = match high & irte::SENDER {
            irte::SENDER_DEVICE => Sender::Device { source: high as u16, functions: (high >> 16 & 3) as u8 },
            irte::SENDER_BUSES => Sender::Buses { first: (high >> 8) as u8, last: high as u8 },
            _ => return Err(Refused::Sender),
        };
        Ok(Some(Self {
            sender,
            vector,
            destination: (low >> 40) as u8,
            logical: low & irte::LOGICAL != 0,
            one_of: low & irte::ONE_OF != 0,
            lowest_priority: low & irte::LOWEST_PRIORITY != 0,
            level: low & irte::LEVEL != 0,
        }))
    }
}

/// Whether an entry of ours is absent, or one that [`Interrupt::entry`] makes.
pub(super) fn is_harmless(entry: Entry) -> bool {
    Interrupt::of_entry(entry).is_ok() && entry[0] & irte::IGNORED == 0
}
