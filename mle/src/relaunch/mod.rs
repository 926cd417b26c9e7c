//! Policy `relaunch`: a firmware call between two launches.

pub mod digest;
