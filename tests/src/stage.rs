//! How far a boot came, and the report of one that stopped.

use std::fmt;
use std::fs;

use crate::paths;
use crate::run_dir::RunDir;

/// The stages of a boot, in their order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// No sign of life.
    Off,
    /// The firmware wrote to the console.
    Firmware,
    /// Our loader wrote to the console.
    Loader,
    /// SKINIT was executed.
    Skinit,
    /// The CPU was sent into the secure loader block.
    Slb,
    /// The MLE's first instruction.
    Mle,
    /// The kernel wrote to the console.
    Linux,
    /// The guest's init takes commands.
    Init,
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Off => "power on",
            Self::Firmware => "firmware",
            Self::Loader => "loader",
            Self::Skinit => "SKINIT",
            Self::Slb => "SLB",
            Self::Mle => "MLE",
            Self::Linux => "Linux",
            Self::Init => "init",
        })
    }
}

/// The latest stage that left its mark on the console.
pub fn from_console(console: &str) -> Stage {
    let has = |mark: &str| console.contains(mark);
    // The kernel's first line; with "quiet" init's is the first.
    if has("Linux version ") || has("init: ") {
        Stage::Linux
    } else if has("cordon") {
        Stage::Loader
    } else if console.is_empty() {
        Stage::Off
    } else {
        Stage::Firmware
    }
}

/// Whether the firmware has run out of things to boot: it tries the next one when the loader refuses, and
/// ends in its shell or in its menu.
pub fn nothing_booted(console: &str) -> bool {
    ["UEFI Interactive Shell", "BdsDxe: No bootable option"].iter().any(|mark| console.contains(mark))
}

/// Lines of the console in a report.
const TAIL: usize = 25;

/// A report of a boot that stopped.
pub fn diagnosis(reached: Stage, dir: &RunDir) -> String {
    let log = dir.file("console.log");
    let console = fs::read(&log).unwrap_or_default();
    let text: String =
        String::from_utf8_lossy(&console).chars().filter(|&c| c == '\n' || !c.is_control()).collect();
    let lines: Vec<_> = text.lines().filter(|l| !l.trim().is_empty()).collect();
    let mut report = format!("last stage reached: {reached}\n");
    if let Ok(drtm) = fs::read_to_string(dir.file("drtm.log")) {
        report.push_str(&format!("DRTM event:\n{}", indent(drtm.lines())));
    }
    let name = log.strip_prefix(paths::root()).unwrap_or(&log);
    report.push_str(&format!("end of {}:\n", name.display()));
    report.push_str(&indent(lines.iter().copied().skip(lines.len().saturating_sub(TAIL))));
    report
}

fn indent<'a>(lines: impl Iterator<Item = &'a str>) -> String {
    lines.map(|line| format!("  | {line}\n")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stages_come_in_their_order() {
        assert_eq!(from_console(""), Stage::Off);
        assert_eq!(from_console("\x1b[2J"), Stage::Firmware);
        assert_eq!(from_console("BdsDxe\r\ncordon: loader"), Stage::Loader);
        assert!(
            nothing_booted("\x1b[01;01HUEFI Interactive Shell v2.2") && !nothing_booted("BdsDxe: starting")
        );
        assert_eq!(from_console("cordon: x\r\n[    0.0] Linux version 6"), Stage::Linux);
    }

    #[test]
    fn a_report_holds_the_end_of_the_console() {
        let parent = tempfile::tempdir().unwrap();
        let dir = RunDir::create(parent.path()).unwrap();
        let console: String = (0..100).map(|i| format!("line {i}\r\n")).collect();
        fs::write(dir.file("console.log"), console).unwrap();
        let report = diagnosis(Stage::Loader, &dir);
        assert!(report.contains("reached: loader") && report.contains("| line 99\n"));
        assert!(!report.contains("| line 74\n") && report.contains("| line 75\n"));
    }
}
