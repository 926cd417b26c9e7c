//! Tests on whole machines.

use tests::images;
use tests::machine::{Boot, Firmware, Machine, Spec, Tpm};

fn boot(spec: Spec) -> Machine {
    images::build_initrd().expect("RAM disk");
    let mut machine = Machine::start(&spec).expect("start");
    if let Err(error) = machine.wait_ready() {
        panic!("{error:#}\n{}", machine.diagnosis());
    }
    machine
}

mod native {
    use super::*;

    const NATIVE: Boot = Boot::Native;

    #[test]
    fn commands_give_exact_output_and_status() {
        let mut machine = boot(Spec { boot: NATIVE, ..Spec::default() });
        let output = machine.run("printf 'a\\0b'; echo c >&2; exit 7").unwrap();
        assert_eq!((output.status, output.bytes.as_slice()), (7, b"a\0bc\n".as_slice()));
        // More than the port's buffers hold, and bytes a terminal would change.
        let output =
            machine.run("head -c 200000 /dev/urandom | tee /tmp/r; sha256sum </tmp/r >/tmp/sum").unwrap();
        assert_eq!(output.bytes.len(), 200_000);
        let sum = machine.check("cat /tmp/sum").unwrap();
        let ours = hex::encode(<sha2::Sha256 as sha2::Digest>::digest(&output.bytes));
        assert!(sum.starts_with(&ours), "{sum} {ours}");
        // A machine that no DRTM event touched shows it.
        assert_eq!(machine.check("cat /sys/class/tpm/tpm0/pcr-sha256/17").unwrap(), "F".repeat(64));
        machine.power_off().unwrap();
    }

    #[test]
    fn other_machine_has_two_cpus_crb_and_plain_firmware() {
        let spec =
            Spec { boot: NATIVE, cpus: 2, tpm: Tpm::Crb, firmware: Firmware::Plain, ..Spec::default() };
        let mut machine = boot(spec);
        assert_eq!(machine.check("nproc").unwrap(), "2");
        machine.check("ls /sys/firmware/efi/efivars/BootOrder-*").unwrap();
        machine.check("dmesg | grep -q MSFT0101 || ls /dev/tpm0").unwrap();
        machine.power_off().unwrap();
    }
}
