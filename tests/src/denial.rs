//! Instructions from SKINIT until all DMA is denied, and what part of the launch that is. QEMU logs each block of code that
//! the SLB stage runs, and how many instructions a block has. The MLE, whose log would fill a disk, says itself when it starts the
//! guest, by a clock that counts instructions.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{BufRead, BufReader};

use anyhow::{Context, Result, bail, ensure};
use hv::launch::SLB_SIZE;

use crate::machine::{Boot, Machine, Spec};
use crate::qemu::NS_PER_INSTRUCTION;
use crate::stage::Stage;

/// How often an IOMMU is told to forget what it knew, before the table that denies all is made (ADR 0001).
const ROUNDS: usize = 16;

/// The SLB's address, as the loader says.
fn slb(console: &str) -> Option<u64> {
    let (_, rest) = console.split_once("cordon-slb ")?;
    let (address, _) = rest.split_once(" at 0x")?.1.split_once(')')?;
    u64::from_str_radix(address, 16).ok()
}

/// Seconds from the SLB's first instruction to the MLE's, by the player's log, and from there to the guest's.
fn times(drtm: &str, console: &str) -> Option<(f64, f64)> {
    let at =
        |what| drtm.lines().find(|line| line.contains(what))?.trim().split(' ').next()?.parse::<f64>().ok();
    let (before, _) = console.split_once(" ms] starting the guest")?;
    let guest: f64 = before.rsplit('[').next()?.trim().parse().ok()?;
    Some((at("MLE entered")? - at("entering the SLB")?, guest / 1000.0))
}

/// Instructions since SKINIT.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Counts {
    /// When no table can be read and all that was known before is forgotten.
    closed: u64,
    /// When the table that denies all is in force.
    table: u64,
    /// At the MLE's first instruction.
    all: u64,
}

/// Boots until the guest starts: the SLB's address, and [`times`].
fn boot(spec: &Spec) -> Result<(u64, (f64, f64))> {
    let mut machine = Machine::start(spec)?;
    let drtm = machine.dir().file("drtm.log");
    let found = machine.wait_console(|console| {
        let drtm = fs::read_to_string(&drtm).ok()?;
        Some((slb(console)?, times(&drtm, console)?))
    });
    found.map_err(|error| error.context(machine.diagnosis()))
}

/// Boots three times: to learn where the SLB goes and for the times, to count in the MLE, and to count in the SLB stage. Prints what it
/// found.
pub fn measure(spec: &Spec) -> Result<()> {
    let spec = Spec { boot: Boot::Cordon, cpus: 1, ..spec.clone() };
    let (base, (stage, rest)) = boot(&spec)?;
    let (_, (_, counted)) = boot(&Spec { counts: true, ..spec.clone() })?;
    let mle = (counted * 1e9 / f64::from(NS_PER_INSTRUCTION)) as u64;
    let filter = ["-dfilter".to_owned(), format!("{base:#x}+{SLB_SIZE:#x}")];
    let qemu_args = [spec.qemu_args.as_slice(), &filter].concat();
    // From SKINIT only: with it firmware would take minutes.
    let logged = Some("exec,nochain,in_asm,trace:amdvi_completion_wait".to_owned());
    let mut machine = Machine::start(&Spec { qemu_args, logged, ..spec })?;
    machine.wait_stage(Stage::Mle).map_err(|error| error.context(machine.diagnosis()))?;
    ensure!(slb(&machine.console()) == Some(base), "the SLB went elsewhere the second time");
    let file = machine.dir().file("cpu.log");
    drop(machine);
    let counts = count(BufReader::new(File::open(&file)?))?;
    // A gigabyte, and easy to make again.
    fs::remove_file(file)?;
    let Counts { closed, table, all } = counts;
    let launch = all + mle;
    println!("\nInstructions from SKINIT until     part of the launch (of the SLB stage)");
    for (count, what) in [
        (closed, "all DMA is denied: no table can be read, nothing is cached"),
        (table, "the table that denies all 65536 identities is in force"),
        (all, "the MLE starts"),
    ] {
        let part = |of: u64| count as f64 * 100.0 / of as f64;
        println!("{count:>12} {:>6.2} % ({:.0} %)  {what}", part(launch), part(all));
    }
    println!("{launch:>12}  the guest starts");
    println!("{stage:.2} s of the {:.2} s from SKINIT to the guest are the SLB stage's", stage + rest);
    Ok(())
}

/// Reads QEMU's log.
fn count(log: impl BufRead) -> Result<Counts> {
    let hex = |text: &str| u64::from_str_radix(text, 16).ok();
    // Instructions of each block, by its first one's address.
    let mut blocks = HashMap::<u64, u64>::new();
    let mut block = None;
    let mut waits = Vec::new();
    let mut all = 0;
    for line in log.split(b'\n') {
        let line = line?;
        let line = String::from_utf8_lossy(&line);
        if line.starts_with("IN:") {
            block = None;
        } else if let Some((address, _)) = line.strip_prefix("0x").and_then(|rest| rest.split_once(':')) {
            let address = hex(address).context("an address")?;
            let first = *block.get_or_insert(address);
            let length = blocks.entry(first).or_default();
            *length = if first == address { 1 } else { *length + 1 };
        } else if line.starts_with("Trace ") {
            let pc = line.split('/').nth(1).and_then(hex).with_context(|| format!("log: {line}"))?;
            let Some(length) = blocks.get(&pc) else { bail!("no block at {pc:#x}") };
            all += length;
        } else if line.contains("amdvi_completion_wait") {
            waits.push(all);
        }
    }
    let (Some(&closed), Some(&table)) = (waits.get(ROUNDS - 1), waits.get(ROUNDS)) else {
        bail!("{} completion waits of one IOMMU in the log", waits.len());
    };
    Ok(Counts { closed, table, all })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instructions_are_those_of_the_blocks_that_ran() {
        let block = "\
IN:
0x7e710000:  fa                       cli
0x7e710001:  fb                       sti

";
        let ran = "Trace 0: 0x7f00 [0000000000000000/000000007e710000/00000040/ff020000]\n";
        let wait = "7@1.2:amdvi_completion_wait completion wait requested with address 0x1\n";
        let log = ["CPU Reset (CPU 0)\n", block, ran, &wait.repeat(16), ran, block, ran, wait, ran].concat();
        assert_eq!(count(log.as_bytes()).unwrap(), Counts { closed: 2, table: 6, all: 8 });
        assert!(count(ran.as_bytes()).is_err() && count(wait.as_bytes()).is_err());
    }

    #[test]
    fn place_and_times_are_read_from_the_logs() {
        let console =
            "  cordon-slb    /x (2 bytes, at 0x7e710000)\ncordon: [ 1067.836 ms] starting the guest at 0x1\n";
        assert_eq!(slb(console), Some(0x7e71_0000));
        let drtm = "  16.50 s  entering the SLB at 0x7e710010\n  17.25 s  MLE entered at 0x7ae002f4, SLB unchanged\n";
        assert_eq!(times(drtm, console), Some((0.75, 1.067836)));
    }
}
