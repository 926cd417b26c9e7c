//! What the guest has of firmware: policies by service and variable, writes that wait, SMIs, and the record of it all.

mod clients;
mod handlers;
mod kexec;
mod relaunch;

use std::io::Write;

use tests::machine::{Boot, Firmware, Machine, Spec};
use tests::{images, initrd, paths};

const GLOBAL: &str = "8be4df61-93ca-11d2-aa0d-00e098032b8c";
/// Attributes, then a load option with the description "B" and an empty device path.
const OPTION: &str = "\\007\\0\\0\\0\\001\\0\\0\\0\\004\\0B\\0\\0\\0\\177\\377\\004\\0";
const POLICIES: &str = "\
    service.SetVariable = locked\n\
    service.SetVariable.*:Boot00C1 = sandbox\n\
    service.SetVariable.*:Boot00D? = deferred\n\
    service.GetVariable.*:Boot00C2 = deny\n";

fn boot(spec: &Spec) -> Machine {
    images::build_initrd().expect("RAM disk");
    let mut machine = Machine::start(spec).expect("start");
    if let Err(error) = machine.wait_ready() {
        panic!("{error:#}\n{}", machine.diagnosis());
    }
    machine
}

fn file(name: &str) -> String {
    format!("/sys/firmware/efi/efivars/{name}-{GLOBAL}")
}

/// Writes a boot option by name; the shell's answer.
fn write(machine: &mut Machine, name: &str) -> Result<(), String> {
    let output =
        machine.run(&format!("printf '{OPTION}' >/tmp/option; cat /tmp/option >{}", file(name))).unwrap();
    if output.status == 0 { Ok(()) } else { Err(output.text()) }
}

/// Whether the guest reads back what [`write`] wrote.
fn reads_back(machine: &mut Machine, name: &str) -> bool {
    machine.run(&format!("printf '{OPTION}' | cmp - {}", file(name))).unwrap().status == 0
}

fn pcr_22(machine: &mut Machine) -> String {
    machine.check("cat /sys/class/tpm/tpm0/pcr-sha256/22").unwrap()
}

const POKE: &str = "printf '\\0' | dd of=/dev/port bs=1 seek=178 conv=notrunc 2>/dev/null";

/// Has the guest write the SMI command port, and gives how many SMIs that made on CPU 0, by the CPU's own count.
fn poke_smi(machine: &mut Machine) -> u64 {
    const COUNT: &str =
        "dd if=/dev/cpu/0/msr bs=8 count=1 skip=52 iflag=skip_bytes 2>/dev/null | od -An -t u8";
    let script = format!("taskset -p 1 $$ >/dev/null; {COUNT}; {POKE}; {COUNT}");
    let counts = machine.check(&script).unwrap();
    let counts: Vec<u64> = counts.split_whitespace().map(|n| n.parse().expect(&counts)).collect();
    let [before, after] = counts[..] else { panic!("{counts:?}") };
    after - before
}

/// A capsule for nobody: Linux asks firmware whether it takes that kind.
const CAPSULE: &str = "{ head -c 16 /dev/urandom; printf '\\034\\0\\0\\0\\0\\0\\001\\0\\0\\020\\0\\0'; head -c 4068 /dev/zero; } \
     >/tmp/capsule; cat /tmp/capsule >/dev/efi_capsule_loader";

fn policies_hold(firmware: Firmware) {
    let mut config = tempfile::NamedTempFile::new().unwrap();
    config.write_all(POLICIES.as_bytes()).unwrap();
    let spec = Spec { firmware, config: Some(config.path().to_owned()), ..Spec::default() };
    let mut machine = boot(&spec);

    let refused = write(&mut machine, "Boot00C0").unwrap_err();
    assert!(refused.contains("Permission denied"), "{refused}");
    write(&mut machine, "Boot00C1").unwrap();
    assert!(reads_back(&mut machine, "Boot00C1"));

    // Two that wait; the guest takes one back.
    for name in ["Boot00D0", "Boot00D1"] {
        write(&mut machine, name).unwrap();
        assert!(reads_back(&mut machine, name), "{name}");
    }
    machine.check(&format!("rm {0} && ! cat {0}", file("Boot00D0"))).unwrap();

    if firmware == Firmware::Smm {
        assert_eq!(poke_smi(&mut machine), 0, "the guest raised an SMI");
    }
    // An error is right, and the kernel's own matter; what counts is that it is one and that it is on record.
    assert_ne!(machine.run(CAPSULE).unwrap().status, 0);

    let locked = pcr_22(&mut machine);
    machine.check("cordon unlock SetVariable").unwrap();
    assert_ne!(pcr_22(&mut machine), locked, "opened without a trace");
    for name in ["Boot00C0", "Boot00C2"] {
        write(&mut machine, name).unwrap();
    }
    assert!(reads_back(&mut machine, "Boot00C0"));
    let denied = machine.run(&format!("cat {}", file("Boot00C2"))).unwrap();
    assert!(denied.status != 0 && denied.text().contains("Permission denied"), "{}", denied.text());

    let log = machine.check("cordon log").unwrap();
    for (what, decision, about) in [
        ("SetVariable", "locked", "Boot00C0"),
        ("SetVariable", "sandbox", "Boot00C1"),
        ("SetVariable", "deferred", "Boot00D0"),
        ("unlocked", "passed", "SetVariable"),
        ("GetVariable", "denied", "Boot00C2"),
        ("QueryCapsuleCapabilities", "", ""),
    ] {
        let found = log.lines().any(|l| l.contains(what) && l.contains(decision) && l.contains(about));
        assert!(found, "no record of {what} {decision} {about}:\n{log}");
    }
    if firmware == Firmware::Smm {
        assert!(log.lines().any(|l| l.contains("guest SMI") && l.contains("denied")), "{log}");
    }
    let verified = machine.run("cordon verify").unwrap();
    assert_eq!(verified.status, 0, "{}", verified.text());

    // What waited is carried out when the machine ends, and what was taken back is not.
    let variables = machine.dir().file("vars.fd");
    let stored = |name: &str| {
        let wide: Vec<u8> = name.encode_utf16().flat_map(u16::to_le_bytes).collect();
        let bytes = std::fs::read(&variables).unwrap();
        bytes.windows(wide.len()).any(|w| w == wide)
    };
    assert!(stored("Boot00C1") && !stored("Boot00D1"));
    machine.power_off().unwrap();
    assert!(stored("Boot00D1") && !stored("Boot00D0"));
}

#[test]
fn records_of_firmware_calls_are_in_pcr_22() {
    policies_hold(Firmware::Smm);
}

#[test]
#[ignore = "the same with the other firmware"]
fn policies_hold_for_firmware_without_smm() {
    policies_hold(Firmware::Plain);
}

#[test]
fn a_guest_raises_smis_without_cordon() {
    let mut machine = boot(&Spec { boot: Boot::Native, ..Spec::default() });
    assert_ne!(poke_smi(&mut machine), 0);
    machine.power_off().unwrap();
}

/// People change the boot order with efibootmgr, and the firmware follows it.
#[test]
#[ignore = "takes two minutes"]
fn efibootmgr_changes_what_the_firmware_boots() {
    images::build_initrd().expect("RAM disk");
    let folder = tempfile::tempdir().unwrap();
    let initrd_with = folder.path().join("initrd.img");
    initrd::add_program(&paths::initrd(), "/usr/bin/efibootmgr".as_ref(), &initrd_with).unwrap();
    for boot_by in [Boot::Native, Boot::Cordon] {
        let spec = Spec { boot: boot_by, initrd: initrd_with.clone(), ..Spec::default() };
        let mut machine = boot(&spec);
        let created = machine
            .check("/usr/bin/efibootmgr --create --disk /dev/sda --part 1 --label 'Cordon test' --loader '\\none.efi'")
            .unwrap();
        let entry = created.lines().find(|line| line.contains("Cordon test")).expect(&created);
        let number = entry.get(4..8).expect(entry).to_owned();
        let order = created.lines().find_map(|line| line.strip_prefix("BootOrder: ")).expect(&created);
        // The new entry is the first by itself; behind the others, gone, and back again.
        let (_, others) = order.split_once(',').expect(order);
        let listed = machine.check(&format!("/usr/bin/efibootmgr --bootorder {others},{number}")).unwrap();
        assert!(listed.contains(&format!("BootOrder: {others},{number}")), "{listed}");
        let listed =
            machine.check(&format!("/usr/bin/efibootmgr --bootnum {number} --delete-bootnum")).unwrap();
        assert!(!listed.contains("Cordon test"), "{listed}");
        machine
            .check("/usr/bin/efibootmgr --create --disk /dev/sda --part 1 --label 'Cordon test' --loader '\\none.efi'")
            .unwrap();
        let variables = machine.dir().file("vars.fd");
        machine.power_off().unwrap();
        // The firmware tries the entry first, finds no file, and goes on to what boots.
        let next = boot(&Spec { variables: Some(variables), boot: Boot::Cordon, ..Spec::default() });
        let tried = next
            .console()
            .lines()
            .any(|line| line.contains("failed to load") && line.contains("Cordon test"));
        assert!(tried, "{boot_by:?}: {}", next.console());
        next.power_off().unwrap();
    }
}
