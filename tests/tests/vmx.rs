//! VMX on a machine: the MLE's own back end runs a guest that tries what exits. In Bochs, which has VMX.

use std::fs;
use std::process::Stdio;
use std::time::{Duration, Instant};

use tests::child::{self, Guarded};
use tests::machine::Board;
use tests::run_dir::RunDir;
use tests::{images, paths};

const BOCHS_BIOS: &str = "$BXSHARE/BIOS-bochs-latest";
/// Leaves IA32_FEATURE_CONTROL unlocked.
const SEABIOS: &str = "/usr/share/seabios/bios-256k.bin";
/// Cylinders of 16 heads and 63 sectors.
const CYLINDER: usize = 16 * 63 * 512;
/// Where in the boot sector the number of CPUs goes, and the lengths of kernel and RAM disk.
const CPUS_AT: usize = 2;
const FILES_AT: usize = 4;
/// Where on the disk they are.
const KERNEL_AT: usize = 0x1000 * 512;
const INITRD_AT: usize = 0x1_0000 * 512;

/// The program's disk, with a kernel and its RAM disk to run as guest.
fn disk(cpus: u8, files: Option<(Vec<u8>, Vec<u8>)>) -> Vec<u8> {
    images::build_bare().expect("the program");
    let mut disk = fs::read(paths::bare()).expect("the program");
    disk[CPUS_AT] = cpus;
    if let Some((kernel, initrd)) = files {
        for (at, from, file) in [(FILES_AT, KERNEL_AT, kernel), (FILES_AT + 4, INITRD_AT, initrd)] {
            disk[at..at + 4].copy_from_slice(&(file.len() as u32).to_le_bytes());
            disk.resize(from, 0);
            disk.extend(file);
        }
    }
    disk.resize(disk.len().next_multiple_of(CYLINDER).max(20 * CYLINDER), 0);
    disk
}

/// Starts a machine with a CPU of this model.
fn start(model: &str, cpus: u8, bios: &str, disk: &[u8]) -> (Guarded, RunDir) {
    let dir = RunDir::create(&paths::build()).expect("run folder");
    fs::write(dir.file("disk.img"), disk).unwrap();
    let configuration = format!(
        "memory: guest=512, host=512
cpu: model={model}, count={cpus}, ips=50000000, reset_on_triple_fault=0
romimage: file={bios}
vgaromimage: file=$BXSHARE/VGABIOS-lgpl-latest
display_library: sdl2
ata0: enabled=1, ioaddr1=0x1f0, ioaddr2=0x3f0, irq=14
ata0-master: type=disk, path=disk.img, mode=flat
boot: disk
log: bochs.log
panic: action=report
error: action=report
info: action=report
debug: action=ignore
port_e9_hack: enabled=1
com1: enabled=1, mode=file, dev=serial.txt
sound: waveoutdrv=dummy, waveindrv=dummy, midioutdrv=dummy
"
    );
    fs::write(dir.file("bochs.txt"), configuration).unwrap();
    // Its debugger waits for a command.
    fs::write(dir.file("go"), "c\n").unwrap();
    let mut command = child::command("bochs-bin");
    command.current_dir(dir.path()).args(["-q", "-f", "bochs.txt", "-rc", "go"]);
    command.env("SDL_VIDEODRIVER", "dummy").env("SDL_AUDIODRIVER", "dummy");
    command.stdin(Stdio::null()).stdout(fs::File::create(dir.file("said")).unwrap());
    (Guarded::spawn("bochs-bin", command, &dir.file("bochs.err")).expect("start"), dir)
}

/// Runs the program on a CPU of this model; gives what it says.
fn run(model: &str, cpus: u8, bios: &str) -> String {
    let (mut bochs, dir) = start(model, cpus, bios, &disk(cpus, None));
    let ended = bochs.wait(Duration::from_secs(120)).unwrap();
    bochs.kill();
    let said = String::from_utf8_lossy(&fs::read(dir.file("said")).unwrap()).into_owned();
    let text: Vec<_> =
        said.lines().skip_while(|l| !l.starts_with("root") && !l.starts_with("refused")).collect();
    assert!(ended.is_some(), "the machine does not end: {said}");
    text.join("\n")
}

/// The exits of a guest that has seen what it should, in order.
fn check(said: &str, xsave: bool) {
    let mut expected = vec![
        "exit: Cpuid",
        "exit: MsrRead { index: 58 }",
        "exit: MsrRead { index: 1152 }",
        "exit: Absorbed", // CR4.VMXE
        "exit: VirtualizationInstruction",
        "exit: VirtualizationInstruction",
        "exit: Absorbed", // CR0.NE
        "exit: Absorbed",
        "exit: Port { port: 178, size: 1, input: false, string: false, next_rip: ",
        "exit: Write of 0x200000",
        "exit: Hypercall",
    ];
    if xsave {
        expected.extend(["exit: SetXcr { index: 0, value: 3 }", "exit: SetXcr { index: 0, value: 4 }"]);
    }
    expected.extend(["exit: Nmi", "exit: Hypercall"]);
    let exits: Vec<_> = said.lines().filter(|line| line.starts_with("exit")).collect();
    assert_eq!(exits.len(), expected.len(), "{said}");
    for (exit, expected) in exits.iter().zip(expected) {
        assert!(exit.starts_with(expected), "{exit} is not {expected}: {said}");
    }
    let value = |name: &str| {
        let (_, rest) = said.split_once(&format!("{name}: ")).expect(name);
        let digits: String = rest.chars().take_while(char::is_ascii_hexdigit).collect();
        u32::from_str_radix(&digits, 16).expect(name)
    };
    let cpuid = value("cpuid");
    assert_eq!((cpuid >> 5 & 3, cpuid >> 31), (0, 1), "no VMX, no SMX, a hypervisor: {said}");
    assert_eq!(value("feature_control"), 1, "locked, with nothing allowed");
    assert_eq!(value("undefined"), 3, "VMXON, VMPTRST, GETSEC");
    assert_eq!(value("protection"), if xsave { 4 } else { 3 }, "MSR, CR4.VMXE, memory of the MLE");
    assert_eq!(value("nmis"), 1);
    assert_eq!((value("cr0") & 0x20, value("cr4") & 0x6000), (0, 0), "NE as written, VMXE not there");
    assert_eq!(value("answer"), 0x4242);
    assert_eq!(value("xcr0"), if xsave { 3 } else { 0 });
    let mut ends = said.lines().filter_map(|line| line.strip_prefix("sandbox: "));
    for expected in SANDBOX {
        let end = ends.next().unwrap_or("none");
        assert!(end.starts_with(expected), "the sandbox ends by {end}, not {expected}: {said}");
    }
    assert_eq!(ends.next(), None);
    assert!(said.contains("\nchanged code: [Write, Fetch], Cpuid"), "{said}");
    // The timer's interrupt by the old controller, whose vector the BIOS left at that of a double fault.
    assert!(said.contains("\nlost: Some(8)"), "{said}");
    // And with it that the guest's CR2 and KERNEL_GS_BASE are as they were.
    assert!(said.contains("\ndone"), "{said}");
}

/// How each piece of the sandbox's code ends: exits of CR and DR accesses and MONITOR are for what nobody asked for.
const SANDBOX: [&str; 15] = [
    "Cpuid",
    "Halt",
    "Port { port: 112, size: 1, input: true, string: false, next_rip: ",
    "MsrRead",
    "Exception { vector: 6, error: 0 }",
    "unexpected exit 0x1c",
    "unexpected exit 0x1c",
    "unexpected exit 0x1d",
    "unexpected exit 0x1c",
    "Hypercall",
    "Write of 0x1100000",
    "unexpected exit 0x27",
    "Halt",
    "Interrupt",
    "Cpuid",
];

#[test]
fn a_guest_on_the_oldest_cpu_that_will_do() {
    let said = run("corei5_arrandale_m520", 1, BOCHS_BIOS);
    assert!(said.contains("nested pages of Size2M"), "{said}");
    check(&said, false);
}

#[test]
fn a_guest_on_a_cpu_with_large_pages_and_xsave() {
    let said = run("corei7_skylake_x", 1, BOCHS_BIOS);
    assert!(said.contains("nested pages of Size1G"), "{said}");
    check(&said, true);
}

#[test]
fn vmx_that_firmware_left_unlocked_is_locked_by_us() {
    check(&run("corei7_skylake_x", 1, SEABIOS), true);
}

#[test]
fn another_cpu_starts_by_a_startup_ipi_and_stops_by_init() {
    let said = run("corei5_arrandale_m520", 2, BOCHS_BIOS);
    assert!(said.contains("1 other CPU(s) wait"), "{said}");
    check(&said, false);
    assert!(said.contains("the other CPU started 1 times"), "{said}");
    let exits = said.lines().find(|line| line.starts_with("cpu1:")).expect("its exits");
    assert!(exits.contains("absorbed 1") && exits.contains("init") && exits.contains("startup 2"), "{said}");
}

#[test]
fn a_cpu_without_what_is_needed_is_refused_by_name() {
    let said = run("corei5_lynnfield_750", 1, BOCHS_BIOS);
    assert!(said.contains("refused: VMX lacks bit 7 of MSR 0x48b (unrestricted guest)"), "{said}");
    let said = run("core2_penryn_t9600", 1, BOCHS_BIOS);
    assert!(said.contains("refused: VMX lacks bit"), "{said}");
}

/// A minute or two.
#[test]
#[ignore = "make test-all"]
fn a_stock_kernel_reaches_its_first_process() {
    images::build_for(Board::Intel).expect("the RAM disk");
    let file = |path| fs::read(path).expect("a file of the bench");
    let disk = disk(1, Some((file(paths::cloud_kernel()), file(paths::cloud_initrd()))));
    let (mut bochs, dir) = start("corei5_arrandale_m520", 1, BOCHS_BIOS, &disk);
    let end = Instant::now() + Duration::from_secs(600);
    let console = loop {
        let console = fs::read(dir.file("serial.txt")).unwrap_or_default();
        let console = String::from_utf8_lossy(&console).into_owned();
        // Without the bench at the other end of its second serial port.
        if console.contains("init: a shell on the console") {
            break console;
        }
        assert!(Instant::now() < end && bochs.ended().unwrap().is_none(), "no first process: {console}");
        std::thread::sleep(Duration::from_millis(200));
    };
    assert!(!console.contains("Oops") && !console.contains("BUG:"), "{console}");
}
