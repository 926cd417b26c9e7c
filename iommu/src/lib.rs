//! DMA remapping: AMD-Vi and VT-d, and the ACPI tables that describe them.
#![cfg_attr(not(test), no_std)]
// Tests may overflow: that is how they fail.
#![cfg_attr(test, allow(clippy::arithmetic_side_effects))]
