//! AMD back end: SKINIT, VMCB, nested paging, world switch.
#![cfg_attr(not(test), no_std)]
// Tests may overflow: that is how they fail.
#![cfg_attr(test, allow(clippy::arithmetic_side_effects))]
