//! The seam between the virtual CPU's logic and VMREAD and VMWRITE.

use core::fmt;

use crate::defs::{Field, ReadWrite, Width};

/// The current VMCS does not take this field: our fault, or the CPU's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FieldError {
    /// The field's encoding.
    pub encoding: u32,
}

impl fmt::Display for FieldError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the CPU has no VMCS field {:#x}", self.encoding)
    }
}

/// The current VMCS.
pub trait Vmcs {
    /// VMREAD.
    fn read_raw(&self, encoding: u32) -> Result<u64, FieldError>;
    /// VMWRITE.
    fn write_raw(&mut self, encoding: u32, value: u64) -> Result<(), FieldError>;

    /// Reads a field.
    fn read<W: Width, A>(&self, field: Field<W, A>) -> Result<W::Value, FieldError>
    where
        Self: Sized,
    {
        self.read_raw(field.encoding()).map(W::of)
    }

    /// Writes a field.
    fn write<W: Width>(&mut self, field: Field<W, ReadWrite>, value: W::Value) -> Result<(), FieldError>
    where
        Self: Sized,
    {
        self.write_raw(field.encoding(), value.into())
    }
}

#[cfg(test)]
pub(crate) mod fake {
    use super::*;
    use std::collections::BTreeMap;
    use std::vec::Vec;

    /// A VMCS for tests: fields that were never written read 0.
    #[derive(Default)]
    pub struct FakeVmcs {
        pub fields: BTreeMap<u32, u64>,
        /// Fields that this CPU does not have.
        pub missing: Vec<u32>,
        pub writes: Vec<u32>,
    }

    impl FakeVmcs {
        /// Sets any field, also one that software cannot write.
        pub fn set<W: Width, A>(&mut self, field: Field<W, A>, value: u64) {
            self.fields.insert(field.encoding(), value);
        }
        pub fn get<W: Width, A>(&self, field: Field<W, A>) -> u64 {
            self.fields.get(&field.encoding()).copied().unwrap_or(0)
        }
    }

    impl Vmcs for FakeVmcs {
        fn read_raw(&self, encoding: u32) -> Result<u64, FieldError> {
            if self.missing.contains(&encoding) {
                return Err(FieldError { encoding });
            }
            Ok(self.fields.get(&encoding).copied().unwrap_or(0))
        }
        fn write_raw(&mut self, encoding: u32, value: u64) -> Result<(), FieldError> {
            assert_ne!(encoding >> 10 & 3, 1, "exit information is read-only");
            if self.missing.contains(&encoding) {
                return Err(FieldError { encoding });
            }
            self.writes.push(encoding);
            self.fields.insert(encoding, value);
            Ok(())
        }
    }
}
