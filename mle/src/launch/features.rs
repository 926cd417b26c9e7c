//! What of the CPU decides about tables.
//!
//! UNSAFETY: reads model specific registers.
#![expect(unsafe_code, reason = "the hardware edge")]

use hv::radix::PageSize;

use super::LaunchError;
use crate::backend::Vendor;
use crate::cpu::native_cpuid;
use crate::metal::Msrs;

/// What the first CPU offers; the others are taken to be like it.
pub struct Features {
    /// Its virtualization.
    pub vendor: Vendor,
    /// Its model specific registers.
    pub msrs: Msrs,
    /// It has SMEP.
    pub smep: bool,
    /// Largest page of its own tables.
    pub largest: PageSize,
    /// Of nested tables.
    pub largest_nested: PageSize,
    /// Physical address bits in use.
    pub bits: u32,
}

impl Features {
    /// Of this CPU; with `smx` in the measured environment that SENTER makes.
    ///
    /// # Errors
    /// Its virtualization lacks something.
    pub fn read(smx: bool) -> Result<Self, LaunchError<'static>> {
        let [_, b7, ..] = native_cpuid(7, 0);
        let [.., d_ext] = native_cpuid(0x8000_0001, 0);
        let [a_addr, ..] = native_cpuid(0x8000_0008, 0);
        // SAFETY: bare metal, CPL 0; read only.
        let msrs = unsafe { Msrs::new() };
        let vendor = Vendor::of_cpu(native_cpuid, &msrs, smx)?;
        let largest = if d_ext & 1 << 26 != 0 { PageSize::Size1G } else { PageSize::Size2M };
        // With 2 MiB pages, tables for more than 512 GiB would not fit the region.
        let largest_nested = vendor.largest_nested(largest);
        let bits = (a_addr & 0xff).min(if largest_nested.min(largest) == PageSize::Size1G { 48 } else { 39 });
        Ok(Self { vendor, msrs, smep: b7 & 1 << 7 != 0, largest, largest_nested, bits })
    }
}
