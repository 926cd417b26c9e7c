//! What a firmware call costs, with Cordon and without, by a module in the guest's kernel: `tests/guest/firmware-calls`.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};

use crate::machine::{Boot, Firmware, Machine, Spec};
use crate::qemu::NS_PER_INSTRUCTION;
use crate::{images, initrd, paths};

/// The module.
const MODULE: &str = "firmware_calls";
/// Services, how often each is called in one boot, and how much longer it may take with Cordon.
const CALLS: [(&str, u32, &str); 4] = [
    ("GetVariable", 500, "<= 1.5"),
    ("SetVariable", 100, "<= 1.2"),
    ("GetTime", 500, "<= 2"),
    ("nothing", 200, ""),
];

/// Nanoseconds, as the module gives them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Figures {
    median: u64,
    least: u64,
    /// For how long an interrupt waited at the longest.
    held_off: u64,
}

impl Figures {
    fn parse(text: &str) -> Result<Self> {
        let words: Vec<_> = text.split_whitespace().collect();
        let ["median", median, "least", least, "held-off", held_off] = words[..] else {
            bail!("the guest's module says: {text}");
        };
        Ok(Self { median: median.parse()?, least: least.parse()?, held_off: held_off.parse()? })
    }
}

/// Writes the bench's RAM disk with that module, for a kernel with the driver of the firmware's clock, to `to`.
pub fn build_initrd(to: &Path) -> Result<()> {
    images::set_up("module")?;
    initrd::add_modules(&paths::initrd(), &paths::modules(), &[MODULE], to)
}

/// Prints medians of `runs` boots of each machine, which take turns, if there are to be any; then what instructions alone say, of
/// one boot of each with one CPU, for firmware with variables in SMM and without SMM.
pub fn compare(spec: &Spec, runs: usize) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let initrd = folder.path().join("initrd.img");
    build_initrd(&initrd)?;
    let spec = Spec { initrd, ..spec.clone() };
    if runs > 0 {
        table("ms", 1e6, &Spec { variables: Some(left_variables(&spec)?), ..spec.clone() }, runs)?;
    }
    for firmware in [Firmware::Smm, Firmware::Plain] {
        let heading = format!("thousand instructions, one CPU, firmware {firmware:?}");
        let spec = Spec { firmware, cpus: 1, ..spec.clone() };
        let variables = Some(left_variables(&spec)?);
        let spec = Spec { counts: true, variables, ..spec };
        table(&heading, 1e3 * f64::from(NS_PER_INSTRUCTION), &spec, 1)?;
    }
    Ok(())
}

/// The variables that a first boot leaves. Firmware reads all that lie before the one that it looks for, and how often its boot order
/// was written anew by then depends on what it boots from, which is not the same with Cordon and without.
fn left_variables(spec: &Spec) -> Result<PathBuf> {
    let mut machine = Machine::start(&Spec { boot: Boot::Cordon, ..spec.clone() })?;
    if let Err(error) = machine.wait_ready() {
        return Err(error.context(machine.diagnosis()));
    }
    let variables = machine.dir().file("vars.fd");
    machine.power_off()?;
    Ok(variables)
}

/// Prints medians of `runs` boots, in units of so many nanoseconds.
fn table(heading: &str, unit: f64, spec: &Spec, runs: usize) -> Result<()> {
    let mut all: [[Vec<Figures>; CALLS.len()]; 2] = Default::default();
    for _ in 0..runs {
        for (boot, all) in [Boot::Native, Boot::Cordon].into_iter().zip(&mut all) {
            let figures = measure(&Spec { boot, ..spec.clone() })?;
            all.iter_mut().zip(figures).for_each(|(all, figures)| all.push(figures));
        }
    }
    println!("\n{heading}");
    println!(
        "{:<14}{:>30}{:>10}{:>8}{:>30}",
        "", "median (least), native", "Cordon", "ratio", "held off at most, native"
    );
    for (at, (name, _, wanted)) in CALLS.iter().enumerate() {
        let [native, cordon] = [&all[0][at], &all[1][at]].map(|runs| of_runs(runs));
        let units = |ns: u64| ns as f64 / unit;
        println!(
            "{name:<14}{:>20.3} ({:.3}){:>12.3} ({:.3}){:>8.2}{:>12.2}{:>10.2}  {wanted}",
            units(native.median),
            units(native.least),
            units(cordon.median),
            units(cordon.least),
            cordon.median as f64 / native.median as f64,
            units(native.held_off),
            units(cordon.held_off),
        );
    }
    Ok(())
}

/// The median of each figure.
fn of_runs(runs: &[Figures]) -> Figures {
    let of = |part: fn(&Figures) -> u64| {
        let mut all: Vec<_> = runs.iter().map(part).collect();
        all.sort_unstable();
        all.get(all.len() / 2).copied().unwrap_or_default()
    };
    Figures { median: of(|f| f.median), least: of(|f| f.least), held_off: of(|f| f.held_off) }
}

fn measure(spec: &Spec) -> Result<Vec<Figures>> {
    let mut machine = Machine::start(spec)?;
    if let Err(error) = machine.wait_ready() {
        return Err(error.context(machine.diagnosis()));
    }
    let mut figures = Vec::new();
    for (name, count, _) in CALLS {
        let text = machine
            .check(&format!("echo {name} {count} >/proc/firmware-calls && cat /proc/firmware-calls"))?;
        figures.push(Figures::parse(&text)?);
    }
    machine.power_off()?;
    Ok(figures)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_what_the_module_prints() {
        let figures = Figures::parse("median 1234 least 1000 held-off 77\n").unwrap();
        assert_eq!(figures, Figures { median: 1234, least: 1000, held_off: 77 });
        assert!(Figures::parse("median 1234").is_err());
    }

    #[test]
    fn each_figure_has_its_own_median() {
        let run = |median, least, held_off| Figures { median, least, held_off };
        let all = [run(1, 9, 5), run(3, 7, 4), run(2, 8, 6)];
        assert_eq!(of_runs(&all), run(2, 8, 5));
    }
}
