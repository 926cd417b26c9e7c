//! Tests on whole machines.

use hv::failure::SlbError;
use sha2::{Digest, Sha256};
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

fn sha256(bytes: &[u8]) -> String {
    hex::encode(Sha256::digest(bytes))
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
        assert!(sum.starts_with(&sha256(&output.bytes)), "{sum}");
        // A machine that no DRTM event touched shows it.
        assert_eq!(machine.check("cat /sys/class/tpm/tpm0/pcr-sha256/17").unwrap(), "F".repeat(64));
        machine.power_off().unwrap();
    }

    #[test]
    #[ignore = "one more machine; `make test-all` runs it"]
    fn other_machine_has_two_cpus_crb_and_plain_firmware() {
        let spec =
            Spec { boot: NATIVE, cpus: 2, tpm: Tpm::Crb, firmware: Firmware::Plain, ..Spec::default() };
        let mut machine = boot(spec);
        assert_eq!(machine.check("nproc").unwrap(), "2");
        machine.check("ls /sys/firmware/efi/efivars/BootOrder-*").unwrap();
        // The boot disk, read by DMA through the IOMMU.
        let sum = machine.check("mount -t vfat /dev/sda1 /mnt && sha256sum </mnt/vmlinuz").unwrap();
        let kernel = std::fs::read(tests::paths::kernel()).unwrap();
        assert!(sum.starts_with(&sha256(&kernel)), "{sum}");
        machine.check("dmesg | grep -q MSFT0101 || ls /dev/tpm0").unwrap();
        machine.power_off().unwrap();
    }
}

mod drtm {
    use super::*;
    use tests::probe;
    use tests::skinit::Fault;
    use tests::stage::Stage;

    /// A machine whose SLB reports how it was entered, and its report.
    fn probe(spec: Spec) -> (Machine, std::collections::BTreeMap<&'static str, u32>) {
        images::build_initrd().expect("RAM disk");
        let dir = tempfile::tempdir().unwrap();
        let (slb, mle) = (dir.path().join("slb"), dir.path().join("mle"));
        std::fs::write(&slb, probe::slb()).unwrap();
        std::fs::write(&mle, probe::mle()).unwrap();
        let mut machine = Machine::start(&Spec { slb, mle, ..spec }).expect("start");
        match machine.wait_console(probe::report) {
            Ok(report) => (machine, report),
            Err(error) => panic!("{error:#}\n{}", machine.diagnosis()),
        }
    }

    #[test]
    fn a_parked_processor_does_not_spoil_the_measurement() {
        let (machine, _) = probe(Spec { cpus: 2, ..Spec::default() });
        assert_eq!(machine.player().unwrap().launch().unwrap().refused, None);
    }

    fn start(fault: Option<Fault>) -> Machine {
        images::build_initrd().expect("RAM disk");
        Machine::start(&Spec { fault, ..Spec::default() }).expect("start")
    }

    #[test]
    fn the_mle_starts_with_the_slb_as_it_was_measured() {
        // An address inside the SLB is rounded down, so that fault is none.
        for fault in [None, Some(Fault::SlbUnaligned)] {
            let mut machine = start(fault);
            if let Err(error) = machine.wait_stage(Stage::Mle) {
                panic!("{error:#}\n{}", machine.diagnosis());
            }
            let launch = machine.player().unwrap().launch().unwrap();
            assert_eq!((launch.refused.clone(), launch.intact), (None, Some(true)));
            assert_eq!(launch.image, std::fs::read(tests::paths::slb()).unwrap());
        }
    }

    #[test]
    fn no_mle_starts_after_a_launch_that_pcr_17_does_not_show() {
        for fault in [Fault::SlbLength, Fault::SlbChanged, Fault::TpmError] {
            let mut machine = start(Some(fault));
            let error = machine.wait_stage(Stage::Mle).expect_err("the MLE started").to_string();
            let console = machine.console();
            assert!(
                error.contains("guest-reset") && !error.contains("triple"),
                "{fault:?}: {error}\n{console}"
            );
            let number = SlbError::NotLaunched as u8;
            assert!(console.contains(&format!("slb: error {number:05}")), "{fault:?}: {console}");
        }
    }

    #[test]
    fn the_next_boot_shows_why_a_launch_failed() {
        images::build_initrd().expect("RAM disk");
        let spec = Spec { fault: Some(Fault::TpmError), reboot: true, ..Spec::default() };
        let mut machine = Machine::start(&spec).expect("start");
        let number = SlbError::NotLaunched as u16;
        let shown = format!("an earlier launch failed: SLB stage, error {number}:");
        let found = machine.wait_console(|console| console.contains(&shown).then_some(()));
        found.unwrap_or_else(|error| panic!("{error:#}\n{}", machine.diagnosis()));
    }

    #[test]
    fn an_slb_is_entered_as_the_architecture_says() {
        let (machine, state) = probe(Spec { cpus: 1, ..Spec::default() });
        let launch = machine.player().unwrap().launch().unwrap();
        let base = u32::try_from(launch.base).unwrap();
        assert_eq!(launch.image, probe::slb());
        assert_eq!(launch.refused, None);
        assert_eq!(base % 0x1_0000, 0);
        for (name, want) in [
            ("eax", base),
            ("esp", base + 0x1_0000),
            ("eflags", 2),
            ("cr0", 0x11),
            ("cs", 8),
            ("ss", 0x10),
            ("dr7", 0x400),
            ("idt limit", 0xffff),
            ("gdt limit", 0xffff),
            // Vector 40h waits although IF was set: GIF is clear.
            ("pending", 1),
        ] {
            assert_eq!(state[name], want, "{name}: {state:x?}");
        }
        for zero in ["ebx", "ecx", "esi", "edi", "ebp", "cr3", "cr4", "efer", "idt base", "gdt base"] {
            assert_eq!(state[zero], 0, "{zero}: {state:x?}");
        }
        assert_ne!(state["edx"], 0, "family and model");
        assert_ne!(state["ds read"].to_le_bytes(), *b"CORD", "DS reaches the SLB");
        assert_ne!(state["tpm access"] & 0x20, 0, "locality 2 is not to be had");
    }
}

mod cordon {
    use super::*;
    use tests::predict;

    fn predicted(spec: &Spec) -> serde_json::Value {
        images::build_initrd().unwrap();
        predict::pcrs(spec).unwrap()
    }

    fn pcr(machine: &mut Machine, number: u32) -> String {
        machine.check(&format!("cat /sys/class/tpm/tpm0/pcr-sha256/{number}")).unwrap().to_lowercase()
    }

    /// What any guest needs: its CPUs, its disk by DMA, variables that it can write, a way to turn off.
    fn use_machine(spec: &Spec, machine: &mut Machine) {
        assert_eq!(machine.check("nproc").unwrap(), spec.cpus.to_string());
        let sum = machine.check("mount -t vfat /dev/sda1 /mnt && sha256sum </mnt/vmlinuz").unwrap();
        assert!(sum.starts_with(&sha256(&std::fs::read(&spec.kernel).unwrap())), "{sum}");
        // A boot entry: the kernel guards other names against removal. Attributes, then a load option with
        // the description "B" and an empty device path.
        let variable = "/sys/firmware/efi/efivars/Boot00C0-8be4df61-93ca-11d2-aa0d-00e098032b8c";
        let bytes = "\\007\\0\\0\\0\\001\\0\\0\\0\\004\\0B\\0\\0\\0\\177\\377\\004\\0";
        machine.check(&format!("printf '{bytes}' >{variable}; printf '{bytes}' | cmp - {variable}")).unwrap();
        machine.check(&format!("rm {variable} && ! cat {variable}")).unwrap();
    }

    #[test]
    fn a_guest_finds_the_predicted_measurements() {
        let spec = Spec { cmdline: "cordon.test=\"a b\"".to_owned(), ..Spec::default() };
        let expected = predicted(&spec);
        let mut machine = boot(spec.clone());
        assert_eq!(pcr(&mut machine, 17), expected["17"].as_str().unwrap());
        assert_eq!(pcr(&mut machine, 18), expected["18"].as_str().unwrap());
        use_machine(&spec, &mut machine);
        machine.power_off().unwrap();
    }

    /// Linux resets by the port that the FADT names, by the keyboard controller, or by ResetSystem, as it is told.
    #[test]
    #[ignore = "takes two minutes"]
    fn a_guest_resets_the_machine_in_each_way_it_knows() {
        for way in ["acpi", "kbd", "efi"] {
            let machine = boot(Spec { cmdline: format!("reboot={way}"), ..Spec::default() });
            machine.reset_by("reboot -f").unwrap_or_else(|error| panic!("{way}: {error:#}"));
        }
    }

    /// All machines there are; `make test-all` runs them.
    #[test]
    #[ignore = "takes ten minutes"]
    fn every_machine_boots() {
        for firmware in [Firmware::Smm, Firmware::Plain] {
            for tpm in [Tpm::Tis, Tpm::Crb] {
                for (cpus, memory) in [(1, 1024), (2, 2048), (4, 6144)] {
                    let spec = Spec { firmware, tpm, cpus, memory, ..Spec::default() };
                    println!("{firmware:?}, {tpm:?}, {cpus} CPUs, {memory} MiB");
                    let expected = predicted(&spec);
                    let mut machine = boot(spec.clone());
                    if tpm == Tpm::Tis {
                        assert_eq!(pcr(&mut machine, 18), expected["18"].as_str().unwrap());
                    }
                    use_machine(&spec, &mut machine);
                    machine.power_off().unwrap();
                }
            }
        }
    }
}
