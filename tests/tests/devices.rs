//! Real devices in the guest, behind the IOMMU of Cordon's machine. Those of a machine with VT-d: `senter/`.

use tests::compare::EXITS;
use tests::devices::{self, LOAD, Set, address};
use tests::images;
use tests::machine::{Boot, Machine, Spec};

/// A machine with all of [`DEVICES`].
fn boot(spec: Spec) -> (Machine, Set) {
    images::build_initrd().expect("RAM disk");
    let set = Set::create().expect("devices");
    let spec = Spec { initrd: set.initrd(), qemu_args: set.arguments(), ..spec };
    let mut machine = Machine::start(&spec).expect("start");
    if let Err(error) = machine.wait_ready() {
        panic!("{error:#}\n{}", machine.diagnosis());
    }
    (machine, set)
}

/// The guest's accesses to devices, and theirs to memory, are none of the MLE's business.
fn transfers_without_exits(machine: &mut Machine) {
    let start =
        format!("{LOAD}; {EXITS} disk=$(disk_of {}) && exits && before=$total", address("NVMe").unwrap());
    let read = "dd if=$disk of=/dev/null bs=1M iflag=direct 2>/dev/null";
    let exits =
        machine.check(&format!("{start} && {read} && {read} && exits && echo $((total - before))")).unwrap();
    println!("exits for 96 MiB by NVMe, without those of the programs' start: {exits}");
    assert!(exits.parse::<u32>().unwrap() < 10, "{exits}");
}

#[test]
fn every_device_works_and_the_iommu_translates_for_it() {
    let (mut machine, set) = boot(Spec::default());
    let done = devices::exercise(&set, |script| machine.check(script)).unwrap();
    transfers_without_exits(&mut machine);
    devices::reset_and_find_again(&mut machine).unwrap();
    let plugged = devices::plug_and_take_out(&mut machine, &set).unwrap();
    let log = machine.dir().file("cpu.log");
    devices::check_walked(&done, &log).unwrap();
    assert!(devices::walked(&log).unwrap().contains(&plugged), "{plugged:#x}");
    devices::print("amd-iommu", &done);
    machine.power_off().unwrap();
}

/// The control: they work, and where the IOMMU is off the log shows no walk.
#[test]
#[ignore = "takes a minute"]
fn every_device_works_without_cordon_and_nothing_is_translated_where_the_iommu_is_off() {
    for (cmdline, translated) in [("amd_iommu=off", false), ("iommu=nopt", true)] {
        let (mut machine, set) =
            boot(Spec { boot: Boot::Native, cmdline: cmdline.to_owned(), ..Spec::default() });
        let done = devices::exercise(&set, |script| machine.check(script)).unwrap();
        let log = machine.dir().file("cpu.log");
        if translated {
            devices::check_walked(&done, &log).unwrap();
            devices::plug_and_take_out(&mut machine, &set).unwrap();
        } else {
            assert!(devices::walked(&log).unwrap().is_empty());
        }
        machine.power_off().unwrap();
    }
}
