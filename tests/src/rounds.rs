//! What a firmware call between two launches costs, step by step.

use std::io::Write;
use std::time::Instant;

use anyhow::{Context, Result};

use crate::machine::{Boot, Machine, Spec};

const POLICY: &str = "service.SetVariable.*:Boot00CA = relaunch\n";
/// A boot entry whose description, two characters of two bytes, changes with the round.
const WRITE: &str = "printf '\\7\\0\\0\\0\\1\\0\\0\\0\\4\\0xROUNDx\\0\\0\\177\\377\\4\\0' \
     >/sys/firmware/efi/efivars/Boot00CA-8be4df61-93ca-11d2-aa0d-00e098032b8c";
const ROUNDS: u32 = 3;

/// Boots a machine with memory for policy `relaunch`, has it write a variable under that policy, and prints how long that took.
pub fn measure(spec: &Spec) -> Result<()> {
    let mut config = tempfile::NamedTempFile::new().context("a configuration file")?;
    config.write_all(POLICY.as_bytes()).context("the configuration file")?;
    let spec =
        Spec { boot: Boot::Cordon, config: Some(config.path().to_owned()), relaunch: true, ..spec.clone() };
    let mut machine = Machine::start(&spec)?;
    if let Err(error) = machine.wait_ready() {
        return Err(error.context(machine.diagnosis()));
    }
    println!("\na call under policy relaunch, guest of {} MiB, {} CPU(s)", spec.memory, spec.cpus);
    for round in 0..ROUNDS {
        let start = Instant::now();
        machine.check(&WRITE.replace("ROUND", &(10 + round).to_string()))?;
        let took = start.elapsed().as_millis();
        let status = machine.check("cordon status")?;
        let steps = status.lines().find(|line| line.starts_with("relaunches: "));
        println!("  {took:>6} ms for the caller; {}", steps.context("no relaunch in the guest's status")?);
    }
    machine.power_off()
}
