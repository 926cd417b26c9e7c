//! Whole Intel machines, in Bochs: natively, and the bench's own player of SENTER.

use std::fs;
use std::time::Duration;

use hv::failure::{self, Record, SenterError};
use tests::machine::{Board, Boot, Cpu, Machine, Spec};
use tests::senter::{self, Fault, STALE_ERROR, layout as at, probe, vt_d};
use tests::small_kernel::Course;
use tests::stage::Stage;
use tests::{images, predict, small_kernel};

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
    linux_starts(Cpu::Arrandale);
}

#[test]
fn linux_starts_after_senter_on_a_cpu_with_sha_instructions_and_large_pages() {
    linux_starts(Cpu::Cannonlake);
}

fn linux_starts(cpu: Cpu) {
    let spec = Spec { cpus: 1, cpu, ..cordon_spec() };
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
    machine.begin("poweroff -f").expect("a command");
    let secrets = machine.wait_sexit();
    assert!(!expect(&machine, secrets));
    machine.ends_by("guest-shutdown").expect("power off");
}

#[test]
#[ignore = "takes eight minutes"]
fn linux_with_two_cpus_is_left_by_sexit_when_it_reboots() {
    // By its own choice Linux uses a port.
    let mut machine = start(&Spec { cmdline: "reboot=efi".to_owned(), ..cordon_spec() });
    let asked = machine.begin("test `nproc` = 2 && reboot -f");
    expect(&machine, asked);
    let secrets = machine.wait_sexit();
    assert!(!expect(&machine, secrets));
    let console = machine.console();
    assert!(console.contains("cordon: guest ends: ResetSystem"), "{console}");
}

fn fault(fault: Fault) -> Spec {
    Spec { senter_fault: Some(fault), ..cordon_spec() }
}

/// Why SINIT refuses a launch with `wrong`, by an error of `class`, as the bench tells it: text with `#` in place of each
/// number, and the numbers.
fn refused(wrong: Fault, class: u32) -> (String, Vec<u64>) {
    let mut machine = start(&fault(wrong));
    let ended = machine.wait_stage(Stage::Mle).unwrap_err().to_string();
    let refusal = machine.senter().and_then(|state| state.refusal).unwrap_or_else(|| panic!("{ended}"));
    assert_eq!(refusal.code >> 4 & 0x3f, class, "{}", refusal.why);
    let told = format!("(TXT reset, TXT.ERRORCODE {:#x}, SINIT: {})", refusal.code, refusal.why);
    assert!(ended.contains(&told), "{ended}");
    let mut parts = refusal.why.split("0x");
    let mut text = parts.next().unwrap_or_default().to_owned();
    let mut numbers = Vec::new();
    for part in parts {
        let end = part.find(|c: char| !c.is_ascii_hexdigit()).unwrap_or(part.len());
        numbers.push(u64::from_str_radix(&part[..end], 16).expect("a number"));
        text = text + "#" + &part[end..];
    }
    (text, numbers)
}

#[test]
#[ignore = "takes a minute"]
fn page_tables_out_of_order_are_refused() {
    let (text, numbers) = refused(Fault::MleTables, 0x10);
    assert_eq!(text, "page at #: not above the one before, at #");
    assert_eq!(numbers[0] + 0x1000, numbers[1]);
}

#[test]
#[ignore = "takes a minute"]
fn a_page_of_the_mle_outside_of_memory_is_refused() {
    let (text, numbers) = refused(Fault::MleHole, 0x10);
    assert_eq!(text, "page at #: not in usable memory, # to # and # to #");
    assert_eq!(numbers, [0xa_0000, 0x1000, 0xa_0000, 0x10_0000, 0xc000_0000]);
}

#[test]
#[ignore = "takes a minute"]
fn a_heap_table_beyond_the_heap_is_refused() {
    let (text, numbers) = refused(Fault::HeapSize, 9);
    assert_eq!(text, "OsMleData: size #, not a multiple of 8 from 8 to #");
    let before = senter::bios_data(2).len() as u64;
    assert_eq!(numbers, [at::HEAP_SIZE + 8, at::HEAP_SIZE - before]);
}

#[test]
#[ignore = "takes a minute"]
fn an_mle_outside_of_the_protected_range_is_refused() {
    let (text, numbers) = refused(Fault::PmrUncovering, 0xe);
    assert_eq!(text, "page tables at #: not in the protected range, # bytes at #");
    assert!(numbers[0] >= numbers[1], "{numbers:x?}");
    assert_eq!(numbers[1..], [0x20_0000, 0]);
}

#[test]
fn a_processor_that_does_not_join_ends_the_launch() {
    let mut machine = start(&fault(Fault::RlpMissing));
    let ended = machine.wait_stage(Stage::Linux).unwrap_err().to_string();
    let why = "cordon: FATAL: after SENTER: 0 of 1 processors joined the MLE";
    let console = machine.console();
    assert!(console.contains(why), "{ended}\n{console}");
    let record = Record { stage: failure::Stage::Senter, code: SenterError::Missing as u16, detail: 0 };
    let told = format!("(TXT reset, TXT.ERRORCODE {:#x}, {record})", record.errorcode());
    assert!(ended.contains(&told), "{ended}");
}

#[test]
#[ignore = "takes a minute"]
fn an_earlier_error_is_told_and_does_not_hinder_the_launch() {
    let mut machine = start(&fault(Fault::StaleError));
    let told = format!(
        "an earlier launch failed: TXT.ERRORCODE {STALE_ERROR:#x}, by SINIT, class heap, major 0x2, minor 0x0"
    );
    let found = machine.wait_console(|console| console.contains(&told).then_some(()));
    expect(&machine, found);
    let closed = machine.wait_console(is_closed);
    expect(&machine, closed);
}

#[test]
#[ignore = "takes a minute"]
fn a_dmar_that_changes_after_senter_is_not_used() {
    let mut machine = start(&fault(Fault::DmarChanged));
    let closed = machine.wait_console(is_closed);
    expect(&machine, closed);
    let elsewhere = vt_d::BASE + 0x1000;
    let log = fs::read_to_string(machine.dir().file("drtm.log")).expect("log");
    assert!(log.contains(&format!("ACPI's DMAR has the unit at {elsewhere:#x} now")), "{log}");
    // The unit by SINIT's copy translates; where ACPI's table has it, nobody wrote.
    let mut registers = |base| machine.memory(base, 0x100).expect("memory");
    assert_eq!(registers(vt_d::BASE)[0x1f] >> 7, 1, "translation enabled, in the status register");
    assert_eq!(registers(elsewhere), [0; 0x100]);
}

/// Has a guest end by what its CPU `who` does, and the MLE end the launch in order: by SEXIT, which wants all CPUs outside of VMX operation
/// and in no wait for a Startup IPI, without secrets.
fn leaves(course: Course, why: &str) -> Machine {
    let folder = tempfile::tempdir().expect("a folder");
    let file = |name, bytes: &[u8]| {
        let path = folder.path().join(name);
        fs::write(&path, bytes).expect("a file");
        path
    };
    let kernel = file("kernel", &small_kernel::image(course));
    let mut machine = start(&Spec { kernel, initrd: file("initrd", &[0; 512]), ..cordon_spec() });
    let secrets = machine.wait_sexit();
    assert!(!expect(&machine, secrets));
    let why = format!("cordon: guest ends: {why}");
    assert!(machine.console().contains(&why), "{}", machine.console());
    machine
}

/// The same where that turns the machine off.
fn leaves_off(course: Course) {
    leaves(course, "OUT to port 0xb004").ends_by("guest-shutdown").expect("power off");
}

#[test]
#[ignore = "takes two minutes"]
fn the_launch_ends_in_order_with_a_cpu_that_was_never_started() {
    leaves(Course::FirstAlone, "triple fault on CPU 0");
}

#[test]
#[ignore = "takes two minutes"]
fn the_launch_ends_in_order_with_two_cpus_in_the_guest() {
    leaves(Course::First, "triple fault on CPU 0");
}

#[test]
#[ignore = "takes two minutes"]
fn a_launch_that_ends_on_another_cpu_is_left_by_the_first() {
    leaves(Course::Other, "triple fault on CPU 1");
}

#[test]
#[ignore = "takes two minutes"]
fn a_machine_that_is_turned_off_is_left_in_order() {
    leaves_off(Course::FirstOff);
}

#[test]
#[ignore = "takes two minutes"]
fn a_machine_that_another_cpu_turns_off_is_left_by_the_first() {
    leaves_off(Course::OtherOff);
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
    // `ls` sorts.
    let [cpus, tpm, variable] = said.lines().collect::<Vec<_>>()[..] else { panic!("{said}") };
    assert_eq!((cpus, tpm), ("2", "/sys/class/tpm/tpm0"));
    assert!(variable.starts_with("/sys/firmware/efi/efivars/BootOrder-"), "{said}");
    machine.power_off().expect("power off");
}
