//! What Cordon costs: the same machine with and without it, side by side.
//!
//! QEMU's times are the host's, so that a guest's clock has no say; TCG's figures compare with each other only. Bochs' are its own,
//! by instructions: what else the host does has no say there.

use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::machine::{Board, Boot, Machine, Spec};
use crate::stage::Stage;

const DISK: &str = "read the disk";
/// Names and scripts; `$part` makes them shorter on a machine that is slow.
const WORK: [(&str, &str); 6] = [
    ("500 processes", "i=0; while [ $i -lt $((500 / part)) ]; do /bin/busybox true; i=$((i+1)); done"),
    ("copy 2 GB in memory", "dd if=/dev/zero of=/dev/null bs=1M count=$((2000 / part)) 2>/dev/null"),
    ("hash 64 MB", "head -c $((67108864 / part)) /dev/zero | sha256sum"),
    (DISK, "echo 3 >/proc/sys/vm/drop_caches; cat /dev/sda >/dev/null"),
    // One process: what is compared is firmware calls.
    ("100 EFI variable reads", "cat $(yes /sys/firmware/efi/efivars/BootOrder-* | head -100) >/dev/null"),
    // A boot entry that the kernel does not guard, with content that changes.
    (
        "50 EFI variable writes",
        "i=10; while [ $i -lt 60 ]; do \
         printf \"\\7\\0\\0\\0\\1\\0\\0\\0\\4\\0x${i}x\\0\\0\\177\\377\\4\\0\" \
         >/sys/firmware/efi/efivars/Boot00C9-8be4df61-93ca-11d2-aa0d-00e098032b8c || exit 1; i=$((i+1)); done",
    ),
];

/// A shell function that counts exits.
pub const EXITS: &str = include_str!("../guest/exits.sh");

/// What part of such work the Intel machine is given, which interprets.
const PART_INTEL: u32 = 10;

/// What was timed, in order, and how long each took.
type Times = Vec<(&'static str, Duration)>;

/// Boots each machine `runs` times and prints medians.
pub fn compare(spec: &Spec, runs: usize) -> Result<()> {
    let (native, machine) = median_times(&Spec { boot: Boot::Native, ..spec.clone() }, runs)?;
    machine.power_off()?;
    let (cordon, mut machine) = median_times(&Spec { boot: Boot::Cordon, ..spec.clone() }, runs)?;
    let seconds = match spec.board {
        Board::Amd => "seconds".to_owned(),
        Board::Intel => format!("emulated seconds; processes, bytes: 1/{PART_INTEL} of what the name says"),
    };
    println!("{:<26}{:>10}{:>10}{:>8}   median of {runs}, {seconds}", "", "native", "Cordon", "ratio");
    for ((name, native), (_, cordon)) in native.iter().zip(&cordon) {
        let (native, cordon) = (native.as_secs_f64(), cordon.as_secs_f64());
        println!("{name:<26}{native:>10.2}{cordon:>10.2}{:>8.2}", cordon / native);
    }
    println!(
        "\nexits of an idle guest in 10 s, all CPUs, but for CPUID and hypercalls: {}",
        idle_exits(&mut machine)?
    );
    for (name, [sandbox, hypercalls, others]) in exits_of_calls(&mut machine)? {
        println!(
            "{name}, exits a call: {sandbox:.1} of the sandbox, {hypercalls:.1} hypercalls, {others:.1} others"
        );
    }
    machine.power_off()
}

/// Ten seconds in which the shell alone waits.
const IDLE: &str = "\
    mkfifo /run/wait; exec 4<>/run/wait
    read -r -t 5 nothing <&4
    exits; before=$total
    read -r -t 10 nothing <&4
    exits; echo $((total - before))";

/// A shell function that prints firmware calls so far, exits of the sandbox, hypercalls and other exits of the guest.
const CALLS: &str = "
    calls() {
        cat /sys/firmware/efi/efivars/Status-a720b6bf-f9e9-4210-b163-30211c7ddf1f >/run/status
        while read -r word made of a b c d run rest; do
            [ \"$word\" != calls: ] || { exits; echo ${made%,} ${run%,} $hypercalls $total; }
        done </run/status
    }";

/// Exits of all CPUs of an idle guest in ten seconds.
fn idle_exits(machine: &mut Machine) -> Result<u64> {
    let exits = machine.check(&format!("{EXITS}{IDLE}"))?;
    exits.trim().parse().with_context(|| format!("exit counters: {exits}"))
}

/// For each kind of work with variables, by firmware calls: exits of the sandbox, hypercalls and other exits of the guest.
fn exits_of_calls(machine: &mut Machine) -> Result<Vec<(&'static str, [f64; 3])>> {
    let mut rows = Vec::new();
    for (name, script) in WORK.into_iter().filter(|(name, _)| name.contains("EFI variable")) {
        let text = machine.check(&format!("{EXITS}{CALLS}\ncalls\n{script}\ncalls"))?;
        let numbers: Vec<f64> = text.split_whitespace().filter_map(|word| word.parse().ok()).collect();
        let ([before, after], []) = numbers.as_chunks::<4>() else { bail!("counters of calls: {text}") };
        rows.push((name, [1, 2, 3].map(|at| (after[at] - before[at]) / (after[0] - before[0]))));
    }
    Ok(rows)
}

/// Medians of `runs` boots, and the last machine, which still runs.
fn median_times(spec: &Spec, runs: usize) -> Result<(Times, Machine)> {
    let mut all = Vec::new();
    for _ in 1..runs {
        let (times, machine) = times(spec)?;
        machine.power_off()?;
        all.push(times);
    }
    let (times, machine) = times(spec)?;
    all.push(times);
    Ok((medians(&all), machine))
}

fn times(spec: &Spec) -> Result<(Times, Machine)> {
    let mut machine = Machine::start(spec)?;
    if let Err(error) = machine.wait_ready() {
        return Err(error.context(machine.diagnosis()));
    }
    let init = machine.time()?;
    let at = |stage| machine.stages().iter().find(|(s, _)| *s >= stage).map_or(Duration::ZERO, |&(_, t)| t);
    let (mut times, part) = match spec.board {
        Board::Amd => {
            let rows = [
                ("power on to Linux", at(Stage::Linux)),
                ("Linux to init", at(Stage::Init).saturating_sub(at(Stage::Linux))),
            ];
            (rows.to_vec(), 1)
        }
        // Stages are seen by the host's clock alone; what the kernel's own says of the way to its first process is exact.
        Board::Intel => (
            vec![("power on to init", init), ("Linux to init", kernel_time(&machine.console())?)],
            PART_INTEL,
        ),
    };
    // The RAM disk of the Intel machine has no driver for its disk.
    let has_disk = spec.board == Board::Amd;
    let mut start = init;
    for (name, script) in WORK.into_iter().filter(|(name, _)| has_disk || *name != DISK) {
        machine.check(&format!("part={part}\n{script}"))?;
        let end = machine.time()?;
        times.push((name, end.saturating_sub(start)));
        start = end;
    }
    Ok((times, machine))
}

/// When the kernel starts its first process, by its log.
fn kernel_time(console: &str) -> Result<Duration> {
    let (before, _) = console.split_once("] Run /init").context("no first process in the kernel's log")?;
    let stamp = before.rsplit('[').next().unwrap_or_default().trim();
    Ok(Duration::from_secs_f64(stamp.parse().with_context(|| format!("the kernel's time: {stamp}"))?))
}

fn medians(runs: &[Times]) -> Times {
    let Some(first) = runs.first() else { return Times::new() };
    let of = |index: usize| runs.iter().filter_map(|run| run.get(index)).map(|&(_, time)| time).collect();
    first.iter().enumerate().map(|(index, &(name, _))| (name, median(of(index)))).collect()
}

/// Of times, the one in the middle.
pub(crate) fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times.get(times.len() / 2).copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_says_when_its_first_process_starts() {
        let console = "[    0.000000] Linux\n[   66.240043] Run /init as init process\n";
        assert_eq!(kernel_time(console).unwrap(), Duration::from_micros(66_240_043));
        assert!(kernel_time("[ 1.0] Linux").is_err());
    }

    #[test]
    fn one_slow_run_does_not_move_the_median() {
        let run = |a, b| vec![("a", Duration::from_secs(a)), ("b", Duration::from_secs(b))];
        let medians = medians(&[run(1, 50), run(90, 40), run(2, 60)]);
        assert_eq!(medians, run(2, 50));
    }
}
