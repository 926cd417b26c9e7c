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
const DISKS: [&str; 2] = ["NVMe", "virtio-blk"];
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

/// What a transfer took.
#[derive(Clone, Copy, Default)]
struct Cost {
    /// Of the clock.
    time: Duration,
    /// Of the host's CPUs: what else they do has less of a say in it.
    cpu: Duration,
}

/// Prints medians of `runs` boots of each machine, which take turns.
pub fn compare(spec: &Spec, runs: usize) -> Result<()> {
    let mut costs = BTreeMap::<_, [Vec<Cost>; 3]>::new();
    for _ in 0..runs.max(1) {
        for (way, (boot, cmdline)) in WAYS.iter().enumerate() {
            let spec = Spec { boot: *boot, cmdline: (*cmdline).to_owned(), ..spec.clone() };
            for (work, cost) in measure(&spec)? {
                if let Some(all) = costs.entry(work).or_default().get_mut(way) {
                    all.push(cost);
                }
            }
        }
    }
    println!("\nthroughput with Cordon, as a ratio to the kernel's own where the IOMMU");
    println!("{:<34}{:>20}{:>20}", "", "translates", "lets all pass");
    println!(
        "{:<34}{:>10}{:>10}{:>10}{:>10}   Cordon's seconds",
        "", "by clock", "by CPU", "by clock", "by CPU"
    );
    for ((disk, work), ways) in costs {
        let [cordon, translated, passed] = ways.map(|costs| {
            let of = |part: fn(&Cost) -> Duration| median(costs.iter().map(part).collect()).as_secs_f64();
            (of(|cost| cost.time), of(|cost| cost.cpu))
        });
        let name = format!("{disk}: {work}");
        let ratios = [translated, passed].map(|native| [native.0 / cordon.0, native.1 / cordon.1]);
        let [[a, b], [c, d]] = ratios;
        println!("{name:<34}{a:>10.2}{b:>10.2}{c:>10.2}{d:>10.2}{:>10.2}", cordon.0);
    }
    Ok(())
}

/// Disk and work.
type Work = (&'static str, &'static str);

fn measure(spec: &Spec) -> Result<Vec<(Work, Cost)>> {
    let set = Set::quiet()?;
    let mut machine =
        Machine::start(&Spec { initrd: set.initrd(), qemu_args: set.arguments(), ..spec.clone() })?;
    if let Err(error) = machine.wait_ready() {
        return Err(error.context(machine.diagnosis()));
    }
    devices::load(|script| machine.check(script))?;
    let mut costs = Vec::new();
    for device in DEVICES.iter().filter(|d| matches!(d.role, Use::Disk(_)) && DISKS.contains(&d.name)) {
        machine.check(&format!("{LOAD}; wait_for disk disk_of {}", device.address()))?;
        for (work, script) in [WORK; ROUNDS].into_iter().flatten() {
            let (start, used) = (Instant::now(), machine.cpu_time()?);
            machine.check(&format!("{LOAD}; disk=$(disk_of {}); {script}", device.address()))?;
            let cpu = machine.cpu_time()?.saturating_sub(used);
            costs.push(((device.name, work), Cost { time: start.elapsed(), cpu }));
        }
    }
    machine.power_off()?;
    Ok(costs)
}
