//! Programs that use EFI variables find what they find without Cordon.

use tests::machine::{Boot, Firmware, Spec};
use tests::{calls, images, initrd, paths};

use super::{boot, file, write};

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

/// A certificate that was made for this; its key is nobody's.
const KEY_EXCHANGE: &[u8] = include_bytes!("kek.der");
/// EFI_CERT_X509_GUID, EFI_CERT_SHA256_GUID, EFI_CERT_TYPE_PKCS7_GUID, and the owner whose entries fwupd counts: Microsoft.
const X509: &str = "a159c0a5e494a74a87b5ab155c2bf072";
const SHA256: &str = "2616c4c14c509240aca941f936934328";
const PKCS7: &str = "9dd2af4adf68ee498aa9347d375665a7";
const OWNER: &str = "bd9afa775903324dbd6028f4e78f784b";

/// What efivarfs is given for an authenticated variable: its attributes, a descriptor without a signature (firmware in setup mode
/// wants none), one list of signatures of a type. In hexadecimal.
///
/// Spec: \[UEFI\] "Using the EFI_VARIABLE_AUTHENTICATION_2 descriptor", "EFI_SIGNATURE_DATA".
fn unsigned(list_type: &str, signatures: &[&[u8]]) -> String {
    const ATTRIBUTES: u32 = 0x27;
    const TIME: &str = "ea070102030405000000000000000000";
    /// Sizes: of the certificate without data, of a list's head, of an owner.
    const CERTIFICATE: u32 = 24;
    const HEAD: u32 = 28;
    const OWNER_SIZE: u32 = 16;
    let word = |value: u32| hex::encode(value.to_le_bytes());
    let each = OWNER_SIZE + signatures[0].len() as u32;
    let mut text = word(ATTRIBUTES) + TIME + &word(CERTIFICATE) + "0002f10e" + PKCS7;
    text += list_type;
    text += &[HEAD + each * signatures.len() as u32, 0, each].map(word).concat();
    for signature in signatures {
        text += &(OWNER.to_owned() + &hex::encode(signature));
    }
    text
}

/// What fwupd finds: keys, revoked images, the boot order, which it changes. Without progress, times, and what was booted: natively
/// that is no option of the firmware's.
fn fwupd(boot_by: Boot) -> String {
    const FILES: [&str; 2] = ["usr/bin/fwupdtool", "usr/share/fwupd/quirks.d/builtin.quirk.gz"];
    const DBX: &str = "d719b2cb-3d3a-4596-a3bc-dad00e67656f";
    let folder = tempfile::tempdir().unwrap();
    let initrd_with = folder.path().join("initrd.img");
    images::build_initrd().expect("RAM disk");
    images::set_up("fwupd").expect("fwupd");
    initrd::add_unpacked(&paths::initrd(), &paths::fwupd(), &FILES, &initrd_with).expect("fwupd");
    let mut machine = boot(&Spec { boot: boot_by, initrd: initrd_with, ..Spec::default() });
    let revoked = [1, 2, 3].map(|n| [n; 32]);
    let lists = [
        (file("KEK"), unsigned(X509, &[KEY_EXCHANGE])),
        (
            format!("/sys/firmware/efi/efivars/dbx-{DBX}"),
            unsigned(SHA256, &revoked.each_ref().map(|r| &r[..])),
        ),
    ];
    for (file, content) in lists {
        machine.check(&format!("echo {content} | xxd -r -p | dd of={file} bs=8192 status=none")).unwrap();
    }
    write(&mut machine, "Boot00F1").unwrap();
    let (order, next, option) = (file("BootOrder"), file("BootNext"), file("Boot00F1"));
    let text = machine
        .check(&format!(
            "export HOME=/root; mkdir -p /var/lib/fwupd /var/cache/fwupd
             tool() {{
                 echo \"== $*\"; /usr/bin/fwupdtool \"$@\" 2>/tmp/errors >/tmp/output || {{ cat /tmp/errors /tmp/output; exit 1; }}
                 tr '\\r' '\\n' </tmp/output | grep -v ': *[0-9]*%\\|\"Created\"\\|\"BootCurrent\"' | sort
             }}
             tool get-devices --json --plugins uefi_dbx
             tool get-devices --json --plugins uefi_kek
             tool efivar-list {DBX}
             tool efiboot-order 00F1 && xxd {order}
             tool efiboot-next 00F1 && xxd {next}
             tool efiboot-info --json
             tool efiboot-delete 00F1; [ -e {option} ] || echo gone"
        ))
        .unwrap();
    if boot_by == Boot::Cordon {
        let log = machine.check("cordon verify >/dev/null && cordon log").unwrap();
        for name in ["KEK", "dbx", "BootNext"] {
            let written = |line: &str| line.contains("SetVariable") && line.contains(name);
            assert!(log.lines().any(written), "no SetVariable of {name} in\n{log}");
        }
    }
    machine.power_off().unwrap();
    text
}

#[test]
#[ignore = "takes three minutes"]
fn fwupd_finds_what_it_finds_without_cordon() {
    let (with, without) = (fwupd(Boot::Cordon), fwupd(Boot::Native));
    assert_eq!(with, without);
    for expected in [
        "UEFI revocation database 03030303",
        "UEFI\\\\VENDOR_Test&NAME_Test-KEK",
        "name: dbx",
        "gone",
        "\"Boot00F1\"",
    ] {
        assert!(with.contains(expected), "no {expected:?} in\n{with}");
    }
}
