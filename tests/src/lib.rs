//! The bench: emulated machines, the DRTM events they lack, attacks and benchmarks.

pub mod acpi;
pub mod attacks;
pub mod board;
pub mod bochs;
pub mod calls;
pub mod channel;
pub mod child;
pub mod compare;
pub mod denial;
pub mod devices;
pub mod disks;
pub mod edu;
pub mod emulator;
pub mod esp;
#[cfg(test)]
mod fake_gdb;
pub mod gdb;
pub mod images;
pub mod initrd;
pub mod machine;
pub mod microcode;
pub mod paths;
pub mod predict;
pub mod prm;
pub mod probe;
pub mod pty;
pub mod qemu;
pub mod qmp;
pub mod region;
pub mod rounds;
pub mod run_dir;
pub mod senter;
pub mod skinit;
pub mod small_kernel;
pub mod stage;
pub mod storm;
pub mod swtpm;
