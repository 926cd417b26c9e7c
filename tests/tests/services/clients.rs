//! Programs that use EFI variables find what they find without Cordon.

use tests::machine::{Boot, Firmware, Spec};
use tests::{images, initrd, paths};

use super::boot;

/// See there.
const EFIVARFS: &str = include_str!("efivarfs.pl");

/// What the script says on a machine.
fn efivarfs(boot_by: Boot, firmware: Firmware) -> String {
    images::build_initrd().expect("RAM disk");
    let folder = tempfile::tempdir().unwrap();
    let with_perl = folder.path().join("perl.img");
    let initrd_with = folder.path().join("initrd.img");
    initrd::add_program(&paths::initrd(), "/usr/bin/perl".as_ref(), &with_perl).unwrap();
    initrd::add_program(&with_perl, "/usr/bin/efivar".as_ref(), &initrd_with).unwrap();
    let mut machine = boot(&Spec { boot: boot_by, firmware, initrd: initrd_with, ..Spec::default() });
    let script = format!("cat >/tmp/efivarfs.pl <<'END'\n{EFIVARFS}END\n/usr/bin/perl /tmp/efivarfs.pl");
    let text = machine.check(&script).unwrap();
    // The `efivar` program, through its library.
    let name = "3e0c7c1d-5a8b-4a57-9d0c-c21b6a0c1f77-Tool";
    let tool = machine
        .check(&format!(
            "printf tool >/tmp/data && /usr/bin/efivar --write --name={name} --attributes=7 --fromfile=/tmp/data && \
             /usr/bin/efivar --list | grep Tool && /usr/bin/efivar --print --name={name}"
        ))
        .unwrap();
    if boot_by == Boot::Cordon {
        machine.check("cordon verify").unwrap();
    }
    machine.power_off().unwrap();
    text + "\n" + &tool
}

fn same_as_without_cordon(firmware: Firmware) {
    let (with, without) = (efivarfs(Boot::Cordon, firmware), efivarfs(Boot::Native, firmware));
    assert_eq!(with, without);
    for expected in [
        "create: ok, 0700000061, size 5\n",
        "overwrite: ok, 07000000626364\n",
        "append: ok, 070000006263646566\n",
        "remove: ok, gone\n",
        "no data: ok, ok, gone\n",
        "after that: gone\n",
        "large: ok, the same\n",
        "bad name abc: Invalid argument\n",
        "all removed:\n",
        "|tool",
    ] {
        assert!(with.contains(expected), "no {expected:?} in\n{with}");
    }
}

#[test]
#[ignore = "takes two minutes"]
fn efivarfs_is_as_without_cordon() {
    same_as_without_cordon(Firmware::Smm);
}

#[test]
#[ignore = "the same with the other firmware"]
fn efivarfs_is_as_without_cordon_where_variables_are_not_in_smm() {
    same_as_without_cordon(Firmware::Plain);
}
