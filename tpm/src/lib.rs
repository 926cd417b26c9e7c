//! TPM 2.0: FIFO (TIS) and CRB transports, the few commands Cordon sends, PCR banks, event log.
//!
//! [`Tpm`] is the whole of it for the SLB stage and the MLE: take a locality, hash with [`Tpm::hasher`],
//! [`Tpm::measure`]. Nothing allocates, nothing waits without a bound, and every byte that the TPM or a
//! log hands in is checked before it is used.
//!
//! Commands are built by hand and not with a general marshaller: the three that an image sends are
//! thirty lines, and a general one refuses the hash algorithms it does not know, which Cordon must cap.
#![cfg_attr(not(any(test, feature = "model")), no_std)]
// Tests may overflow: that is how they fail.
#![cfg_attr(test, allow(clippy::arithmetic_side_effects))]
#![forbid(unsafe_code)]

mod bank;
mod command;
mod crb;
mod creation;
mod error;
mod fifo;
mod hash;
pub mod log;
#[cfg(any(test, feature = "model"))]
pub mod model;
mod reader;
#[cfg(test)]
mod tests;
mod tpm;
mod transport;

pub use bank::{Bank, Banks, Digest, Digests, HashAlg, MAX_BANKS, MAX_DIGEST};
pub use creation::Ticket;
pub use error::{Error, Field, Flow, Wait};
pub use hash::{BankHasher, Sha256, digest_of};
pub use log::{Event, Log, LogError, LogWriter};
pub use tpm::{Extending, Tpm};
pub use transport::{BASE, Contention, Locality, WINDOW_SIZE};
