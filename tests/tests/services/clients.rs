//! Programs that use EFI variables find what they find without Cordon.

use tests::machine::{Boot, Firmware, Spec};
use tests::{calls, images, initrd, paths};

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

/// What `hwclock` says of the clock that is the firmware's: it sets it, and reads back from it and from the chipset's own
/// registers what it set; an alarm is kept.
fn hwclock(boot_by: Boot) -> String {
    let folder = tempfile::tempdir().unwrap();
    let initrd = folder.path().join("initrd.img");
    images::build_initrd().expect("RAM disk");
    calls::build_initrd(&initrd).expect("module");
    let mut machine = boot(&Spec { boot: boot_by, initrd, ..Spec::default() });
    let text = machine
        .check(
            "for rtc in /sys/class/rtc/*; do case $(cat $rtc/name) in
                 firmware-clock*) firmware=${rtc##*/} ;;
                 rtc_cmos*) chipset=${rtc##*/} ;;
             esac; done
             read_clock() { hwclock -r -u -f /dev/$1 | sed 's/:[0-9][0-9] /:__ /; s/ *[0-9.]* seconds//'; }
             now=$(hwclock -r -u -f /dev/$chipset); test \"$now\" = \"$(hwclock -r -u -f /dev/$firmware)\" ||
                 test \"$(hwclock -r -u -f /dev/$chipset)\" = \"$(hwclock -r -u -f /dev/$firmware)\" || exit 1
             date -u -s '2031-02-28 23:59:05' >/dev/null
             hwclock -w -u -f /dev/$firmware || exit 2
             read_clock $firmware; read_clock $chipset
             alarm=$(date -u -d '2031-03-01 00:01:07' +%s)
             echo $alarm >/sys/class/rtc/$firmware/wakealarm || exit 3
             test $(cat /sys/class/rtc/$firmware/wakealarm) = $alarm || exit 4
             echo 0 >/sys/class/rtc/$firmware/wakealarm; echo alarm: $(cat /sys/class/rtc/$firmware/wakealarm)",
        )
        .unwrap();
    if boot_by == Boot::Cordon {
        let log = machine.check("cordon verify >/dev/null && cordon log").unwrap();
        for service in ["GetTime", "SetTime", "GetWakeupTime", "SetWakeupTime"] {
            assert!(log.contains(service), "no {service} in\n{log}");
        }
    }
    machine.power_off().unwrap();
    text
}

#[test]
fn hwclock_sets_the_clock_as_without_cordon() {
    let (with, without) = (hwclock(Boot::Cordon), hwclock(Boot::Native));
    assert_eq!(with, without);
    assert_eq!(with.matches("Fri Feb 28 23:59:__ 2031").count(), 2, "{with}");
}
