//! Permission maps: which MSRs and ports make a virtual machine exit.

use svm::maps::{Iopm, Msrpm};
use vmx::maps::MsrBitmap;

use super::Vendor;
use crate::pool::PagePool;

pub use svm::maps::MsrIntercept;

/// Ports that exit. The first two pages are VMX's I/O bitmaps, too: one bit a port in both.
pub type PortMap = Iopm;

/// MSRs that exit.
pub enum MsrMap {
    /// Of SVM.
    Svm(&'static mut Msrpm),
    /// Of VMX.
    Vmx(&'static mut MsrBitmap),
}

impl MsrMap {
    /// A map under which no covered MSR exits.
    pub fn new(vendor: Vendor, pool: &mut PagePool) -> Option<Self> {
        Some(match vendor {
            Vendor::Svm => Self::Svm(pool.object()?),
            Vendor::Vmx(_) => Self::Vmx(pool.object()?),
        })
    }

    /// Where it is.
    pub fn address(&self) -> u64 {
        match self {
            Self::Svm(map) => &raw const **map as u64,
            Self::Vmx(map) => &raw const **map as u64,
        }
    }

    /// Makes all MSRs exit.
    pub fn close(&mut self) {
        match self {
            Self::Svm(map) => map.close(),
            Self::Vmx(map) => map.close(),
        }
    }

    /// Lets RDMSR of an MSR through. Those that the map does not cover exit all the same.
    pub fn allow_read(&mut self, index: u32) {
        match self {
            Self::Svm(map) => map.allow_read(index),
            Self::Vmx(map) => map.allow_read(index),
        }
    }

    /// Makes an MSR exit.
    pub fn intercept(&mut self, index: u32, what: MsrIntercept) {
        match self {
            Self::Svm(map) => map.intercept(index, what),
            Self::Vmx(map) => map.intercept(index, what == MsrIntercept::Both),
        }
    }
}
