//! TPM 2.0: TIS and CRB transports, the commands Cordon sends, PCR banks, event log.
#![cfg_attr(not(test), no_std)]
// Tests may overflow: that is how they fail.
#![cfg_attr(test, allow(clippy::arithmetic_side_effects))]
