//! Whole Intel machines, in Bochs: natively, and the bench's own player of SENTER.

use std::time::Duration;

use hv::failure::{self, Record, SenterError};
use tests::machine::{Board, Boot, Machine, Spec};
use tests::senter::{Fault, STALE_ERROR, layout as at, probe};
use tests::stage::Stage;
use tests::{images, predict};

fn start(spec: &Spec) -> Machine {
    images::build().expect("images");
    images::build_for(Board::Intel).expect("images");
    Machine::start(spec).expect("machine")
}

/// Takes what `result` holds, or stops with the machine's own report.
fn expect<T>(machine: &Machine, result: anyhow::Result<T>) -> T {
    result.unwrap_or_else(|error| panic!("{error:#}\n{}", machine.diagnosis()))
}

fn probe_spec() -> Spec {
    let timeout = Duration::from_secs(150);
    Spec { boot: Boot::SenterProbe, cpus: 2, memory: 512, timeout, ..Spec::on(Board::Intel) }
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

/// The chain from the loader on, with another CPU that joins the MLE.
fn cordon_spec() -> Spec {
    Spec { cpus: 2, memory: 1024, ..Spec::on(Board::Intel) }
}

/// Says that SENTER, SINIT's state, the other processors and VT-d were as the MLE wants them.
fn is_closed(console: &str) -> Option<()> {
    console.contains("1 IOMMU(s) deny all DMA").then_some(())
}

#[test]
fn the_loader_launches_the_mle_by_senter() {
    let spec = cordon_spec();
    let mut machine = start(&spec);
    let closed = machine.wait_console(is_closed);
    expect(&machine, closed);
    let launch = machine.senter().and_then(|state| state.launch).expect("a launch");
    let (bank, [code, _]) = &launch.pcrs[0];
    let expected = predict::pcrs(&spec).expect("prediction");
    assert_eq!((*bank, Some(hex::encode(code).as_str())), ("sha256", expected["17"].as_str()));
}

#[test]
#[ignore = "takes five minutes"]
fn linux_starts_after_senter() {
    let spec = Spec { cpus: 1, ..cordon_spec() };
    let mut machine = start(&spec);
    let said =
        machine.check("nproc; cat /sys/class/tpm/tpm0/pcr-sha256/17 /sys/class/tpm/tpm0/pcr-sha256/18");
    let said = expect(&machine, said).to_lowercase();
    let expected = predict::pcrs(&spec).expect("prediction");
    let expected = ["17", "18"].map(|pcr| expected[pcr].as_str().expect("a value").to_owned());
    assert_eq!(said.lines().collect::<Vec<_>>(), ["1", &expected[0], &expected[1]]);
    // Firmware's variables by the sandbox, each call on record; both logs lead to the TPM's values.
    let said = machine.check("ls /sys/firmware/efi/efivars/BootOrder-* && cordon verify && cordon status");
    let said = expect(&machine, said);
    for line in
        ["MLE_HASH", "the log explains all", "sandbox: Ready", "0 lost", "DMA: 1 IOMMUs, 0 accesses stopped"]
    {
        assert!(said.contains(line), "{line}\n{said}");
    }
    machine.power_off().expect("power off");
}

#[test]
#[ignore = "takes eight minutes"]
fn linux_starts_two_cpus_after_senter() {
    let mut machine = start(&cordon_spec());
    let said = machine.check("nproc; taskset 2 grep -c processor /proc/cpuinfo");
    assert_eq!(expect(&machine, said).trim(), "2\n2");
    machine.power_off().expect("power off");
}

#[test]
#[ignore = "takes three minutes"]
fn what_is_wrong_at_senter_has_its_name_in_the_errorcode() {
    let fault = |fault| Spec { senter_fault: Some(fault), ..cordon_spec() };
    // Classes of SINIT's errors.
    for (wrong, class) in
        [(Fault::MleTables, 0x10), (Fault::MleHole, 0x10), (Fault::HeapSize, 9), (Fault::PmrUncovering, 0xe)]
    {
        let mut machine = start(&fault(wrong));
        let ended = machine.wait_stage(Stage::Mle).unwrap_err().to_string();
        let state = machine.senter().expect("player");
        let refusal = state.refusal.unwrap_or_else(|| panic!("{wrong:?}: {ended}"));
        assert_eq!(refusal.code >> 4 & 0x3f, class, "{wrong:?}: {}", refusal.why);
    }
    let mut machine = start(&fault(Fault::RlpMissing));
    let ended = machine.wait_stage(Stage::Linux).unwrap_err().to_string();
    let code = machine.senter().and_then(|state| state.reset).unwrap_or_else(|| panic!("{ended}"));
    let record = Record::from_errorcode(code).expect("an error of the MLE's");
    assert_eq!((record.stage, record.code), (failure::Stage::Senter, SenterError::Missing as u16));
}

#[test]
#[ignore = "takes two minutes"]
fn an_earlier_error_is_told_and_a_changed_dmar_is_not_used() {
    let mut machine = start(&Spec { senter_fault: Some(Fault::StaleError), ..cordon_spec() });
    let told = format!("an earlier launch failed: TXT.ERRORCODE {STALE_ERROR:#x}, by SINIT, class heap");
    let found = machine.wait_console(|console| console.contains(&told).then_some(()));
    expect(&machine, found);
    let closed = machine.wait_console(is_closed);
    expect(&machine, closed);
    let mut machine = start(&Spec { senter_fault: Some(Fault::DmarChanged), ..cordon_spec() });
    let closed = machine.wait_console(is_closed);
    expect(&machine, closed);
}

#[test]
#[ignore = "takes two minutes"]
fn the_machine_boots_without_cordon() {
    let spec = Spec { boot: Boot::Native, cpus: 2, memory: 1024, ..Spec::on(Board::Intel) };
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
