//! Device models for tests: a TPM with PCRs behind a FIFO or a CRB interface, that can be told to fail.
//! They panic when the driver does what the specifications forbid.
#![allow(
    clippy::arithmetic_side_effects,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    reason = "a model stops its test by a panic"
)]

mod chip;
mod crb;
mod fifo;

use std::cell::Cell;
use std::rc::Rc;

use hv::io::Clock;

pub use chip::FakeTpm;
pub use crb::{Crb, CrbFault, CrbState};
pub use fifo::{Fifo, FifoFault, FifoState};

/// A clock that goes on by a millisecond with each look at it.
#[derive(Clone, Default)]
pub struct Ticks(Rc<Cell<u64>>);

impl Clock for Ticks {
    fn now_us(&self) -> u64 {
        self.0.set(self.0.get() + 1000);
        self.0.get()
    }
}
