//! Interrupts that a device sends by writing to the addresses of local APICs: of kinds that are not a device's.
//!
//! QEMU 7.2 gives a fixed interrupt that a device table entry lets pass as it is the vector 0. So this guest takes all its
//! interrupts from the old controller, which no IOMMU sees.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use tests::edu::Edu;
use tests::machine::{Boot, Machine, Spec};

use super::{SCRATCH, boot, seen, spec, write};

/// Address of the second CPU's local APIC, for devices.
const APIC: u64 = 0xfee0_1000;
/// Message data, by the delivery mode in bits 10:8.
pub const SMI: u64 = 0x200;
const NMI: u64 = 0x400;
const INIT: u64 = 0x500;

fn machine(kind: Boot) -> Machine {
    let mut spec = spec(kind, &[]);
    spec.cmdline.push_str(" noapic pci=nomsi");
    boot(&Spec { remaps_interrupts: true, ..spec })
}

/// By which the first device sends an interrupt to the second CPU.
fn script(machine: &mut Machine, data: u64) -> String {
    let edu = &Edu::all(machine).unwrap()[0];
    write(machine, SCRATCH, data);
    edu.script(&[(SCRATCH, Edu::BUFFER, 8, Edu::TAKE), (Edu::BUFFER, APIC, 4, Edu::GIVE)])
}

/// Has the first device send an interrupt to the second CPU.
pub fn send(machine: &mut Machine, data: u64) {
    let script = script(machine, data);
    machine.check(&script).unwrap();
}

/// How often the second CPU was reset or got an INIT, by QEMU's log.
fn inits(machine: &Machine) -> usize {
    fs::read_to_string(machine.dir().file("cpu.log")).unwrap().matches("CPU Reset (CPU 1)").count()
}

/// NMIs that the second CPU has had.
fn nmis(machine: &mut Machine) -> u64 {
    let line = machine.check("grep NMI: /proc/interrupts").unwrap();
    line.split_whitespace().nth(2).expect("a second CPU").parse().unwrap()
}

/// Whether the second CPU runs programs.
fn runs(machine: &mut Machine) -> bool {
    let script = "rm -f /tmp/runs; taskset 2 touch /tmp/runs & sleep 3; [ -e /tmp/runs ] && echo yes";
    machine.run(script).unwrap().text() == "yes"
}

#[test]
#[ignore = "boots two machines; `make test-all` and `make attacks` run it"]
fn devices_send_no_nmi_init_or_smi() {
    /// Most that a device takes on a busy host, five times over.
    const PATIENCE: Duration = Duration::from_secs(25);
    for protected in [true, false] {
        let mut machine = machine(if protected { Boot::Cordon } else { Boot::Native });
        let said = |what: &str| seen(&format!("guest: a device sends an {what}"), protected);
        assert!(runs(&mut machine));
        let before = nmis(&mut machine);
        send(&mut machine, NMI);
        assert_eq!(nmis(&mut machine) == before, protected);
        said("NMI");
        if protected {
            let exposures = machine.check("cordon exposure").unwrap();
            send(&mut machine, SMI);
            assert_eq!(machine.check("cordon exposure").unwrap(), exposures);
            said("SMI");
        }
        // A kernel that loses a CPU may stop altogether: nobody waits for it.
        let before = inits(&machine);
        let script = script(&mut machine, INIT);
        machine.check(&format!("( {script} ) >/dev/null 2>&1 &")).unwrap();
        let end = Instant::now() + if protected { PATIENCE / 5 } else { PATIENCE };
        while inits(&machine) == before && Instant::now() < end {
            thread::sleep(Duration::from_millis(100));
        }
        assert_eq!(inits(&machine) == before, protected);
        assert!(!protected || runs(&mut machine));
        said("INIT");
    }
}
