//! Policy `relaunch`: firmware carries a call out between two launches, and the guest goes on as if nothing had been.

use std::io::Write;

use tests::machine::{Firmware, Machine, Spec};

use super::{boot, pcr_22, reads_back, write};

const POLICY: &str = "service.SetVariable.*:Boot00E? = relaunch\n";

const COMPUTE: &str =
    "BEGIN { do { s = 0; for (i = 1; i <= 1000; i++) s += 1 / i } while (s > 7.48547086 && s < 7.48547087) }";

/// Values of PCR 17 and 18: code, configuration, kernel, RAM disk, command line.
fn identity(machine: &mut Machine) -> String {
    machine.check("cat /sys/class/tpm/tpm0/pcr-sha256/17 /sys/class/tpm/tpm0/pcr-sha256/18").unwrap()
}

/// Has the guest write a boot option under the policy, and compares what a guest and a verifier see before and after.
fn round_trip(machine: &mut Machine, number: usize) {
    let (before, exposure) = (identity(machine), pcr_22(machine));
    let name = format!("Boot00E{number}");
    if let Err(error) = write(machine, &name) {
        let why = machine
            .run("cordon log | grep -v SMI | tail -n 4")
            .map_or_else(|e| e.to_string(), |output| output.text());
        panic!("{number}: {error}\n{why}\n{}", machine.diagnosis());
    }
    let launches = machine.player().unwrap().launches();
    assert_eq!(launches.len(), number + 1);
    for launch in &launches {
        assert_eq!((&launch.image, &launch.refused, launch.intact), (&launches[0].image, &None, Some(true)));
    }
    assert!(reads_back(machine, &name));
    // The same program on the same guest, and another exposure log.
    assert_eq!(identity(machine), before);
    assert_ne!(pcr_22(machine), exposure);
    let verified = machine.run("cordon verify").unwrap();
    assert_eq!(verified.status, 0, "{number}: {}", verified.text());
    let log = machine.check("cordon log").unwrap();
    let has = |words: &[&str]| log.lines().any(|line| words.iter().all(|word| line.contains(word)));
    assert!(has(&["SetVariable", "relaunch", &name]) && has(&["relaunched"]), "{log}");
}

fn calls_come_back(spec: &Spec) {
    let mut config = tempfile::NamedTempFile::new().unwrap();
    config.write_all(POLICY.as_bytes()).unwrap();
    let spec = Spec { config: Some(config.path().to_owned()), relaunch: true, ..spec.clone() };
    let mut machine = boot(&spec);
    // Work that goes on over the rounds: memory in use, a timer, a disk.
    machine.check("head -c 8000000 /dev/urandom >/tmp/some && sha256sum /tmp/some >/tmp/sum").unwrap();
    machine
        .check("(i=0; while sleep 0.1; do i=$((i+1)); echo $i >/tmp/ticks; done) >/dev/null 2>&1 &")
        .unwrap();
    for number in 1..=2 {
        // A program on each CPU that ends when what it computes with floating-point registers is wrong.
        let compute = format!(
            "for cpu in $(seq 0 {}); do taskset -c $cpu awk '{COMPUTE}' >/dev/null 2>&1 & echo $!; done",
            spec.cpus - 1
        );
        let programs = machine.check(&compute).unwrap().split_whitespace().collect::<Vec<_>>().join(" ");
        round_trip(&mut machine, number);
        machine.check(&format!("kill {programs}")).unwrap();
        machine.check("sha256sum -c /tmp/sum").unwrap();
        machine.check("a=$(cat /tmp/ticks); sleep 1; test $(cat /tmp/ticks) -gt $a").unwrap();
        machine.check(&format!("test $(nproc) = {}", spec.cpus)).unwrap();
        let each_cpu = "for cpu in $(seq 0 $(($(nproc) - 1))); do taskset -c $cpu sleep 0.1 || exit; done";
        machine.check(each_cpu).unwrap();
        machine
            .check(
                "mount -t vfat /dev/sda1 /mnt && cmp /mnt/cordon/mle.bin /mnt/cordon/mle.bin && umount /mnt",
            )
            .unwrap();
        // Other calls go to the sandbox as before.
        write(&mut machine, &format!("Boot00F{number}")).unwrap();
    }
    machine.power_off().unwrap();
}

#[test]
fn a_call_between_two_launches_comes_back() {
    calls_come_back(&Spec { cpus: 1, memory: 1024, ..Spec::default() });
}

/// Calls come from any CPU; the others wait, and come back with what they were doing.
#[test]
fn a_call_on_a_machine_with_more_cpus_comes_back() {
    calls_come_back(&Spec { cpus: 2, ..Spec::default() });
}

#[test]
#[ignore = "the same with the other firmware"]
fn calls_of_firmware_without_smm_come_back() {
    calls_come_back(&Spec { cpus: 1, memory: 1024, firmware: Firmware::Plain, ..Spec::default() });
}

#[test]
#[ignore = "the same with yet more CPUs"]
fn a_call_on_a_machine_with_four_cpus_comes_back() {
    calls_come_back(&Spec { cpus: 4, memory: 1024, ..Spec::default() });
}
