//! Whole Intel machines, in Bochs: natively, and the bench's own player of SENTER.

use std::time::Duration;

use tests::images;
use tests::machine::{Board, Boot, Machine, Spec};
use tests::senter::{layout as at, probe};
use tests::stage::Stage;

fn start(spec: &Spec) -> Machine {
    images::build_for(Board::Intel).expect("images");
    Machine::start(spec).expect("machine")
}

/// Takes what `result` holds, or stops with the machine's own report.
fn expect<T>(machine: &Machine, result: anyhow::Result<T>) -> T {
    result.unwrap_or_else(|error| panic!("{error:#}\n{}", machine.diagnosis()))
}

fn probe_spec() -> Spec {
    let timeout = Duration::from_secs(150);
    Spec { boot: Boot::SenterProbe, memory: 512, timeout, ..Spec::on(Board::Intel) }
}

#[test]
fn senter_leaves_what_the_specification_says() {
    let mut machine = start(&probe_spec());
    let report = machine.wait_console(probe::report);
    let report = expect(&machine, report);
    let status = at::STS_SENTER_DONE | at::STS_PRIVATE_OPEN | at::STS_LOCALITY2_OPEN;
    let wanted = [
        ("ebx", probe::BASE as u32 + 0x40),
        ("ecx", probe::BASE as u32 - 0x3000),
        ("cr0", 0x31),
        ("cr3", 0),
        ("cr4", 1 << 14),
        ("efer", 0),
        ("cs", 8),
        ("dr7", 0x400),
        ("sts", status),
        ("errorcode", 0xc000_0001),
        ("locality 2", 1),
        ("sinit data", 9),
        ("joined", 1),
        ("rlp cr0", 0x31),
        ("rlp cs", 8),
        ("rlp ss", 0x10),
    ];
    for (name, value) in wanted {
        assert_eq!(report[name], value, "{name}");
    }
    // What the probe ends with.
    let ended = machine.wait_stage(Stage::Linux).unwrap_err().to_string();
    assert!(ended.contains("TXT reset, TXT.ERRORCODE 0xc0008123"), "{ended}");
    assert_eq!(machine.stage(), Stage::Mle);
    let state = machine.senter().expect("player");
    assert_eq!(state.launch.expect("launch").base, probe::BASE);
}

#[test]
#[ignore = "takes two minutes"]
fn the_machine_boots_without_cordon() {
    let spec = Spec { boot: Boot::Native, memory: 1024, ..Spec::on(Board::Intel) };
    let mut machine = start(&spec);
    // Both CPUs, the firmware's variables, the TPM, and no IOMMU that would have to translate.
    let said = machine.check(
        "grep -c processor /proc/cpuinfo; ls -d /sys/firmware/efi/efivars/BootOrder-* /sys/class/tpm/tpm0; ls /sys/class/iommu",
    );
    let said = expect(&machine, said);
    assert!(
        said.starts_with("2\n") && said.contains("BootOrder") && said.ends_with("/sys/class/tpm/tpm0"),
        "{said}"
    );
    machine.power_off().expect("power off");
}
