//! What a machine needs of the program that it runs in.

use std::process::ExitStatus;
use std::time::Duration;

use anyhow::Result;
use serde_json::Value;

/// A running emulator. Dropping it ends it.
pub trait Emulator {
    /// How it ended, if it has.
    fn ended(&mut self) -> Result<Option<ExitStatus>>;

    /// Waits up to `time` for its end.
    fn wait(&mut self, time: Duration) -> Result<Option<ExitStatus>>;

    /// Why the machine was last reset or turned off, in QEMU's words.
    fn last_end(&self) -> Option<String>;

    /// Whether a CPU gave up.
    fn triple_fault(&self) -> bool;

    /// Physical memory, past all that protects it.
    fn memory(&mut self, at: u64, length: usize) -> Result<Vec<u8>>;

    /// Changes physical memory past all that protects it, while the machine stands still.
    fn write_memory(&mut self, at: u64, bytes: &[u8]) -> Result<()>;

    /// The machine's own time since power-on, where it is one of instructions and not the host's.
    fn emulated_time(&mut self) -> Result<Option<Duration>> {
        Ok(None)
    }

    /// CPU time of the host that it has used.
    fn cpu_time(&self) -> Result<Duration>;

    /// Plugs a device in; `device` is what QEMU's `device_add` takes.
    fn plug(&mut self, device: &Value) -> Result<()>;

    /// Has the guest give back the device `id`, and takes it out.
    fn unplug(&mut self, id: &str) -> Result<()>;

    /// Ends it, in order if that can be had.
    fn quit(&mut self);
}
