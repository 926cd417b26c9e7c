//! `cordon`: predict, verify and show what a launch measured.
fn main() {}
