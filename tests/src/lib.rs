//! The bench: emulated machines, the DRTM events they lack, attacks and benchmarks.
