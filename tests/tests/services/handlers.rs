//! Handlers of the Platform Runtime Mechanism, called by ACPI code that Linux interprets.

use std::io::Write;

use tests::machine::{Boot, Machine, Spec};
use tests::{images, prm};

use super::boot;

/// What the guest's system answers in bits 31:16 where a handler was called and gave an EFI error.
const fn failed(error: u64) -> u64 {
    (error << 8 | 1) << 16
}

const DEVICE_ERROR: u64 = failed(7);
const SECURITY_VIOLATION: u64 = failed(26);

fn machine(boot_by: Boot, config: &str) -> Machine {
    images::build_platform().expect("the board's firmware");
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(config.as_bytes()).unwrap();
    boot(&Spec {
        boot: boot_by,
        prm: true,
        config: Some(file.path().to_owned()),
        cmdline: "iomem=relaxed".to_owned(),
        ..Spec::default()
    })
}

/// Has the ACPI code behind a file call its handler.
fn call(machine: &mut Machine, name: &str) -> u64 {
    let path = format!("/sys/bus/acpi/devices/CRDN0001:00/{name}");
    machine.check(&format!("cat {path}")).unwrap().trim().parse().unwrap()
}

/// What [`prm::ACCESS`] read at `address`, after the call's answer.
fn read(machine: &mut Machine, address: u64) -> (u64, u64) {
    let (at, parameters) = (prm::POKE / 8, [address, 0, 0].map(u64::to_le_bytes).concat());
    let set =
        format!("echo {} | xxd -r -p | dd of=/dev/mem bs=8 seek={at} 2>/dev/null", hex::encode(parameters));
    machine.check(&set).unwrap();
    let answer = call(machine, "hrv");
    let get = format!("dd if=/dev/mem bs=8 skip={} count=1 2>/dev/null", at + 1);
    let value = machine.run(&get).unwrap().bytes;
    (answer, u64::from_le_bytes(value.try_into().expect("eight bytes")))
}

/// Where the kernel's first instructions are, in the kernel's own addresses.
fn kernel(machine: &mut Machine) -> u64 {
    let line = machine.check("grep -m1 ' _text$' /proc/kallsyms").unwrap();
    u64::from_str_radix(line.split_whitespace().next().unwrap(), 16).unwrap()
}

#[test]
fn handlers_give_what_they_give_without_cordon_and_reach_no_further() {
    let mut native = machine(Boot::Native, "");
    assert_eq!(call(&mut native, "sun"), prm::TOTAL);
    let text = kernel(&mut native);
    let (answer, value) = read(&mut native, text);
    assert!(answer == 0 && value != 0, "without Cordon one reads the kernel: {answer:#x} {value:#x}");
    native.power_off().unwrap();

    let mut machine = machine(Boot::Cordon, "service.PrmHandler = locked\nsandbox.on-death = restart\n");
    assert_eq!(call(&mut machine, "sun"), SECURITY_VIOLATION);
    machine.check("cordon unlock PrmHandler").unwrap();
    assert_eq!(call(&mut machine, "sun"), prm::TOTAL);

    let text = kernel(&mut machine);
    let physical = machine.check("grep -m1 'Kernel code' /proc/iomem").unwrap();
    let physical = u64::from_str_radix(physical.trim().split('-').next().unwrap(), 16).unwrap();
    for address in [text, physical] {
        assert_eq!(read(&mut machine, address), (DEVICE_ERROR, 0), "{address:#x}");
    }
    // Its own memory it reads, other handlers go on, and the rest of firmware is as usable as before.
    assert_eq!(read(&mut machine, prm::POKE), (0, 0), "firmware's own buffer, which the guest never had");
    assert_eq!(call(&mut machine, "sun"), prm::TOTAL);
    machine.check("cat /sys/firmware/efi/efivars/BootOrder-* >/dev/null").unwrap();

    let log = machine.check("cordon verify >/dev/null && cordon log").unwrap();
    let count = |words: &[&str]| log.lines().filter(|line| words.iter().all(|w| line.contains(w))).count();
    let (sum, access) = (prm::SUM.to_string(), prm::ACCESS.to_string());
    assert_eq!(count(&["locked", "PrmHandler", &sum]), 1, "{log}");
    assert_eq!(count(&["sandbox", "PrmHandler", &sum]), 2, "{log}");
    assert_eq!(count(&["DEVICE_ERROR", "PrmHandler", &access]), 2, "{log}");
    assert_eq!(count(&["sandbox died (PrmHandler)"]), 2, "{log}");
    machine.power_off().unwrap();
}
