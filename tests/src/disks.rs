//! Throughput of the machine's disks: with Cordon, and without it where the kernel has the IOMMU translate and where it has it
//! let all pass.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::compare::median;
use crate::devices::{self, DEVICES, LOAD, Set, Use};
use crate::machine::{Boot, Machine, Spec};

/// Who is in charge, and how the kernel is told.
const WAYS: [(Boot, &str); 3] =
    [(Boot::Cordon, ""), (Boot::Native, "iommu=nopt"), (Boot::Native, "iommu=pt")];
/// Those that are compared.
const DISKS: [&str; 3] = ["NVMe", "virtio-blk", "AHCI"];
/// Transfers past the page cache.
const WORK: [(&str, &str); 3] = [
    (
        "read 384 MiB",
        "for i in 1 2 3 4 5 6 7 8; do dd if=$disk of=/dev/null bs=1M iflag=direct 2>/dev/null || exit 1; done",
    ),
    (
        "write 384 MiB",
        "for i in 1 2 3 4 5 6 7 8; do dd if=/dev/zero of=$disk bs=1M count=48 oflag=direct 2>/dev/null || exit 1; done",
    ),
    ("read 4000 times 4 KiB", "dd if=$disk of=/dev/null bs=4k count=4000 iflag=direct 2>/dev/null"),
];
/// How often each is done in one boot.
const ROUNDS: usize = 3;

/// Prints medians of `runs` boots of each machine, which take turns.
pub fn compare(spec: &Spec, runs: usize) -> Result<()> {
    let mut times = BTreeMap::<_, [Vec<Duration>; 3]>::new();
    for _ in 0..runs.max(1) {
        for (way, (boot, cmdline)) in WAYS.iter().enumerate() {
            for (work, time) in
                measure(&Spec { boot: *boot, cmdline: (*cmdline).to_owned(), ..spec.clone() })?
            {
                if let Some(all) = times.entry(work).or_default().get_mut(way) {
                    all.push(time);
                }
            }
        }
    }
    println!(
        "\nthroughput with Cordon, as a ratio to the kernel's own where the IOMMU\n{:<34}{:>10}{:>14}   Cordon's time, s",
        "", "translates", "lets all pass"
    );
    for ((disk, work), [cordon, translated, passed]) in times {
        let [cordon, translated, passed] =
            [cordon, translated, passed].map(|times| median(times).as_secs_f64());
        let name = format!("{disk}: {work}");
        println!("{name:<34}{:>10.2}{:>14.2}{cordon:>10.2}", translated / cordon, passed / cordon);
    }
    Ok(())
}

/// Disk and work.
type Work = (&'static str, &'static str);

fn measure(spec: &Spec) -> Result<Vec<(Work, Duration)>> {
    let set = Set::quiet()?;
    let mut machine =
        Machine::start(&Spec { initrd: set.initrd(), qemu_args: set.arguments(), ..spec.clone() })?;
    if let Err(error) = machine.wait_ready() {
        return Err(error.context(machine.diagnosis()));
    }
    devices::load(|script| machine.check(script))?;
    let mut times = Vec::new();
    for device in DEVICES.iter().filter(|d| matches!(d.role, Use::Disk(_)) && DISKS.contains(&d.name)) {
        machine.check(&format!("{LOAD}; wait_for disk disk_of {}", device.address()))?;
        for (work, script) in [WORK; ROUNDS].into_iter().flatten() {
            let start = Instant::now();
            machine.check(&format!("{LOAD}; disk=$(disk_of {}); {script}", device.address()))?;
            times.push(((device.name, work), start.elapsed()));
        }
    }
    machine.power_off()?;
    Ok(times)
}
