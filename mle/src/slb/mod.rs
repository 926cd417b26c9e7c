//! The secure loader block's logic: from the SKINIT state to a measured MLE, or to a machine reset.
//!
//! Trusts the CPU, the TPM and its own 64 KiB; takes every address, length and table as the gap's word. The image
//! in `src/bin/slb` adds the entry code and the hardware edge. Numbers of the errors: `docs/slb-errors.md`; the
//! order of the steps and the state at the MLE's entry: `docs/adr/0002-slb-stage.md`.

#[cfg(test)]
mod fake;
pub mod launch;
pub mod memmap;
pub mod paging;
pub mod request;
pub mod space;
pub mod stop;
pub mod timer;

use hv::failure::SlbError;

/// Why the launch ends here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Failure {
    /// What happened.
    pub error: SlbError,
    /// The detail that the error's text speaks of.
    pub detail: u16,
}

/// A failure; of `detail` the low 16 bits are kept.
fn fail<T>(error: SlbError, detail: impl Into<u64>) -> Result<T, Failure> {
    let [low, high, ..] = detail.into().to_le_bytes();
    Err(Failure { error, detail: u16::from_le_bytes([low, high]) })
}
