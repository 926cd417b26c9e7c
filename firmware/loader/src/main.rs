//! Cordon's loader: a UEFI application, in the gap.
#![cfg_attr(target_os = "uefi", no_std, no_main)]
fn main() {}
