//! Attacks of a guest's root user on the measured machine: `docs/attacks.md`.
//!
//! Each attack runs twice, by the same commands at the same addresses: under Cordon, where it must fail, and on the same
//! machine without Cordon, where it must succeed. `make attacks` counts what they say by `seen`.

mod chipset;
mod dma;
mod firmware;
mod gap;
mod guest;
mod hypercalls;
mod interrupts;
mod relaunch;
mod smis;
mod smm;
mod tamper;

use std::collections::BTreeMap;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};

use guest::Ring0;
use hv::launch::{LAUNCH_PAGE_SIZE, MleHeader, SLB_SIZE};
use tests::attacks::{recorded, seen, seen_of_long};
use tests::edu::{self, Prey};
use tests::machine::{Boot, Machine, Spec};
use tests::region::Region;
use tests::{images, paths, tally};
use zerocopy::FromBytes;

/// RAM that Linux leaves alone, for devices to write and /dev/mem to show.
const SCRATCH: u64 = 0x1000_0000;
/// On these boards devices' registers are from here on, configuration space first.
const REGISTERS: u64 = 0xb000_0000;
const SCRATCH_SIZE: u64 = 128 << 20;
/// Status of a process that a signal ended: SIGILL, SIGSEGV.
const SIGILL: i32 = 128 + 4;
const SIGSEGV: i32 = 128 + 11;
/// Exceptions.
const UD: Ring0 = Ring0::Exception(6);
const GP: Ring0 = Ring0::Exception(13);

/// One of the two machines under attack, and where things are on the one with Cordon.
struct Target {
    machine: Machine,
    places: Places,
    /// What a device is to reach. Found under Cordon.
    prey: Vec<Prey>,
    protected: bool,
}

/// Addresses of what Cordon protects.
#[derive(Clone, Debug)]
struct Places {
    mle: u64,
    mle_size: u64,
    slb: u64,
    launch_page: u64,
    /// First and last byte of each piece of EFI runtime code and data.
    runtime: Vec<(u64, u64)>,
    /// Root of a CPU's nested tables.
    nested: u64,
    /// The device table.
    device_table: u64,
}

fn boot(spec: &Spec) -> Machine {
    images::build_initrd().expect("RAM disk");
    let mut machine = Machine::start(spec).expect("start");
    if let Err(error) = machine.wait_ready() {
        panic!("{error:#}\n{}", machine.diagnosis());
    }
    machine
}

/// A machine whose kernel lets root use the registers of devices that have drivers, and with devices that do DMA on
/// command. Its CPUs take turns. `reserved` is memory that Linux is to leave alone, so that /dev/mem shows it.
fn spec(boot: Boot, reserved: &[(u64, u64)]) -> Spec {
    // Natively Linux' own IOMMU driver would stop the device.
    let mut cmdline = "iomem=relaxed msr.allow_writes=on amd_iommu=off".to_owned();
    for (base, size) in [(SCRATCH, SCRATCH_SIZE)].iter().chain(reserved) {
        cmdline.push_str(&format!(" memmap={size:#x}${base:#x}"));
    }
    Spec { boot, cmdline, qemu_args: edu::arguments(), turns: true, ..Spec::default() }
}

/// The number in hexadecimal that follows the first `before` in `text`.
fn number_after(text: &str, before: &str) -> u64 {
    let (_, rest) = text.split_once(before).unwrap_or_else(|| panic!("no {before:?} in {text}"));
    let digits: String = rest.chars().take_while(char::is_ascii_hexdigit).collect();
    u64::from_str_radix(&digits, 16).unwrap_or_else(|_| panic!("no number after {before:?}"))
}

impl Places {
    /// From what the loader says on the console; not what only the launch knows.
    fn on_console(machine: &Machine) -> Self {
        let console = machine.console();
        let at = |line: &str| {
            let (_, rest) = console.split_once(line).unwrap_or_else(|| panic!("no {line:?} on the console"));
            number_after(rest, "at 0x")
        };
        let image = fs::read(paths::mle()).unwrap();
        let (header, _) = MleHeader::read_from_prefix(&image).unwrap();
        Self {
            mle: at("cordon-mle "),
            mle_size: header.region_size.get(),
            slb: at("cordon-slb "),
            launch_page: at("cordon: SKINIT ") & !0xfff,
            runtime: vec![],
            nested: 0,
            device_table: 0,
        }
    }

    /// Also from the event log and the MLE's memory.
    fn find(machine: &mut Machine) -> Self {
        let log = machine.run("cat /sys/firmware/efi/efivars/DrtmLog-*").unwrap().bytes;
        let log = String::from_utf8_lossy(&log).into_owned();
        let runtime = log
            .split("runtime ")
            .skip(1)
            .map(|name| (number_after(name, "0x"), number_after(name.split_once('-').unwrap().1, "0x")))
            .collect::<Vec<_>>();
        assert!(!runtime.is_empty(), "the log names no runtime regions");
        let places = Self { runtime, ..Self::on_console(machine) };
        let region = Region::of(machine, places.mle, places.mle_size).unwrap();
        let device_table = dma::device_entry(machine, 0);
        Self { nested: region.nested(1).unwrap(), device_table, ..places }
    }

    /// What nobody but Cordon may reach: memory of each kind, at its ends and inside.
    fn closed(&self) -> Vec<(&'static str, u64)> {
        // devmem maps two pages for an access to the last 31 bytes of one.
        let end = |base: u64, size: u64| base + size - 0x20;
        let (mle, size) = (self.mle, self.mle_size);
        let image = fs::metadata(paths::mle()).unwrap().len();
        let mle = [mle, mle + (image & !0xfff), mle + size / 2, mle + size - (4 << 20), end(mle, size)];
        let slb = [self.slb, self.slb + SLB_SIZE / 2, end(self.slb, SLB_SIZE)];
        let launch_page = [self.launch_page, end(self.launch_page, LAUNCH_PAGE_SIZE)];
        let runtime = self.runtime.iter().flat_map(|&(first, last)| [first, end(first, last - first + 1)]);
        let mut places = mle.map(|at| ("MLE region", at)).to_vec();
        places.extend(slb.map(|at| ("SLB", at)));
        places.extend(launch_page.map(|at| ("launch page", at)));
        places.extend(runtime.map(|at| ("EFI runtime code and data", at)));
        places
    }
}

/// An access to physical memory through /dev/mem.
#[derive(Clone, Copy, Debug)]
struct Access {
    at: u64,
    bits: u32,
    write: Option<u64>,
    cpu: u32,
}

impl Access {
    fn read(at: u64) -> Self {
        Self { at, bits: 32, write: None, cpu: 0 }
    }

    fn write(at: u64, value: u64) -> Self {
        Self { write: Some(value), ..Self::read(at) }
    }

    fn bits(self, bits: u32) -> Self {
        Self { bits, ..self }
    }
}

/// Does `accesses`; for each the value read (0 for a write), or the status with which the process ended.
fn access(machine: &mut Machine, accesses: &[Access]) -> Vec<Result<u64, i32>> {
    let mut script = "exec 2>/dev/null\n".to_owned();
    for a in accesses {
        let value = a.write.map(|v| format!(" {v:#x}")).unwrap_or_default();
        let mask = 1 << a.cpu;
        script.push_str(&format!(
            "value=$(taskset {mask:x} devmem {:#x} {}{value}); echo \"$? $value\"\n",
            a.at, a.bits
        ));
    }
    let output = machine.check(&script).unwrap();
    let results: Vec<_> = output
        .lines()
        .map(|line| {
            let (status, value) = line.split_once(' ').unwrap_or((line, ""));
            match status {
                "0" if value.is_empty() => Ok(0),
                "0" => Ok(u64::from_str_radix(value.trim_start_matches("0x"), 16).unwrap()),
                _ => Err(status.parse().unwrap()),
            }
        })
        .collect();
    assert_eq!(results.len(), accesses.len(), "{output}");
    results
}

fn read(machine: &mut Machine, at: u64) -> u64 {
    access(machine, &[Access::read(at).bits(64)])[0].unwrap_or_else(|s| panic!("read of {at:#x}: status {s}"))
}

fn write(machine: &mut Machine, at: u64, value: u64) {
    let result = access(machine, &[Access::write(at, value).bits(64)])[0];
    assert_eq!(result, Ok(0), "write of {at:#x}");
}

/// How many accesses Cordon has refused, and its record of the last ones.
fn refused(machine: &mut Machine) -> (u64, String) {
    let status = machine.check("tail -c +5 /sys/firmware/efi/efivars/Status-*").unwrap();
    let (_, report) = status.split_once("refused accesses: ").expect("a count");
    let (count, last) = report.split_once(", ").expect("how many are on record");
    (count.parse().unwrap(), last.to_owned())
}

/// The last record of the exposure log whose line has all of `words`; nothing if there is none.
fn last_record(machine: &mut Machine, words: &[&str]) -> String {
    let log = machine.check("cordon log").unwrap();
    let has_all = |line: &&str| words.iter().all(|word| line.contains(word));
    log.lines().rev().find(has_all).unwrap_or_default().to_owned()
}

/// Tries to reach what must not be reached: each access ends its process, and is in `Status`.
fn all_refused(machine: &mut Machine, accesses: &[Access]) {
    // As many as the record holds in full.
    for some in accesses.chunks(8) {
        let (before, _) = refused(machine);
        let results = access(machine, some);
        let (after, last) = refused(machine);
        for (access, result) in some.iter().zip(results) {
            let what = if access.write.is_some() { "Write" } else { "Read" };
            assert_eq!(result, Err(SIGSEGV), "{access:x?}");
            let record = format!("cpu{} {what} of {:#x} at", access.cpu, access.at);
            assert!(last.contains(&record), "no {record:?} in {last}");
        }
        assert_eq!(after - before, some.len() as u64, "{last}");
    }
}

fn reach(what: &str) -> String {
    format!("guest: read and write the {what}")
}

/// Reads and writes what must not be reached. Where nothing protects it, what is written is there.
fn memory(target: &mut Target) {
    let Target { machine, places, protected, .. } = target;
    let closed = places.closed();
    if !*protected {
        for (what, at) in closed {
            let old = access(machine, &[Access::read(at)])[0].unwrap_or_else(|s| panic!("{at:#x}: {s}"));
            // Put back at once: some of it is in use.
            let other = old ^ 0xffff_ffff;
            let results =
                access(machine, &[Access::write(at, other), Access::read(at), Access::write(at, old)]);
            assert_eq!(results[1], Ok(other), "{at:#x}: {results:x?}");
            seen(&reach(what), false);
        }
        return;
    }
    // The addresses are right: the MLE is there.
    let image = fs::read(paths::mle()).unwrap();
    assert_eq!(machine.memory(places.mle, 32).unwrap(), image[..32]);
    let before: Vec<_> = closed.iter().map(|&(_, at)| machine.memory(at, 4).unwrap()).collect();
    let mut accesses = Vec::new();
    for cpu in 0..2 {
        for &(_, at) in &closed {
            accesses.push(Access { cpu, ..Access::read(at) });
            accesses.push(Access { cpu, ..Access::write(at, 0x5a5a_a5a5) });
        }
    }
    all_refused(machine, &accesses);
    for ((what, at), before) in closed.into_iter().zip(before) {
        let now = machine.memory(at, 4).unwrap();
        // The MLE works in its own memory, but none of it becomes what was to be written.
        assert_ne!(now, 0x5a5a_a5a5_u32.to_le_bytes(), "{at:#x}, {before:x?} before");
        seen(&reach(what), true);
        recorded(&reach(what));
    }
    assert_eq!(machine.memory(places.mle, 32).unwrap(), image[..32]);
    // All are counted, and some on record.
    let told = tally::of(machine, "refused accesses", |record| record["kind"] == "denied memory").unwrap();
    assert!(told.counted > 2 * told.records() as u64, "{told:?}");
    // The page after the launch page is the guest's.
    read(machine, places.launch_page + LAUNCH_PAGE_SIZE);
}

/// Takes locality 2 of the TPM, from which PCR 17 to 22 can be extended and reset.
fn tpm_locality(target: &mut Target) {
    const ACCESS: u64 = 0xfed4_0000;
    const REQUEST: u64 = 0x02;
    const ACTIVE: u64 = 0x20;
    const VALID: u64 = 0x80;
    let machine = &mut target.machine;
    // Localities 0 and 1 are anybody's.
    for locality in 0..2 {
        let value = access(machine, &[Access::read(ACCESS + locality * 0x1000).bits(8)])[0].unwrap();
        assert_ne!(value & VALID, 0, "locality {locality}: {value:x}");
    }
    let page = |locality: u64| ACCESS + locality * 0x1000;
    if target.protected {
        let tries: Vec<_> = (2..5)
            .flat_map(|l| [Access::read(page(l)).bits(8), Access::write(page(l), REQUEST).bits(8)])
            .collect();
        all_refused(machine, &tries);
        recorded("guest: take locality 2 of the TPM");
    } else {
        let tries = [Access::write(page(2), REQUEST), Access::read(page(2)), Access::write(page(2), ACTIVE)];
        let results = access(machine, &tries.map(|a| a.bits(8)));
        assert!(results[1].is_ok_and(|v| v & (VALID | ACTIVE) == VALID | ACTIVE), "{results:x?}");
    }
    seen("guest: take locality 2 of the TPM", target.protected);
}

/// Reads and writes registers of the IOMMU: device table base, control, command queue, last register.
fn iommu_registers(target: &mut Target) {
    let machine = &mut target.machine;
    for register in [0xfed8_0000, 0xfed8_0018, 0xfed8_2008, 0xfed8_3ff8] {
        if target.protected {
            all_refused(machine, &[Access::read(register), Access::write(register, 0)]);
        } else {
            let value = access(machine, &[Access::read(register)])[0].unwrap();
            assert_eq!(access(machine, &[Access::write(register, value)])[0], Ok(0));
        }
    }
    seen("guest: read and write the IOMMU's registers", target.protected);
}

const EFER: u32 = 0xc000_0080;
const SVME: u64 = 1 << 12;

/// An access to an MSR: its index, and the value to write.
type MsrAccess = (u32, Option<u64>);

/// Does `accesses` on a CPU, in order; for each the value read (0 for a write), `None` when it faults.
fn access_msrs(machine: &mut Machine, cpu: u32, accesses: &[MsrAccess]) -> Vec<Option<u64>> {
    let mut script = format!("f=/dev/cpu/{cpu}/msr\n");
    for (index, write) in accesses {
        let command = match write {
            None => format!("dd if=$f iflag=skip_bytes skip={index} bs=8 count=1 status=none"),
            Some(value) => {
                let bytes: String = value.to_le_bytes().iter().map(|b| format!("\\x{b:02x}")).collect();
                format!(
                    "printf '{bytes}' | dd of=$f oflag=seek_bytes seek={index} bs=8 conv=notrunc status=none"
                )
            }
        };
        script.push_str(&format!("echo $({command} 2>&1 | xxd -p -c 256)\n"));
    }
    let output = machine.run(&script).unwrap();
    let output = String::from_utf8(output.bytes).unwrap();
    assert_eq!(output.lines().count(), accesses.len(), "{output}");
    let value = |line: &str| {
        let bytes = hex::decode(line).unwrap();
        match bytes.len() {
            0 => Some(0),
            8 => Some(u64::from_le_bytes(bytes.try_into().unwrap())),
            _ => {
                let error = String::from_utf8_lossy(&bytes);
                assert!(error.contains("Input/output error"), "{error}");
                None
            }
        }
    };
    output.lines().map(value).collect()
}

/// Uses the registers that would end Cordon's control of the CPU.
fn msrs(target: &mut Target) {
    /// Name, number, bits to change, and whether the guest has no such register at all.
    const MSRS: [(&str, u32, u64, bool); 21] = [
        ("EFER.SVME", EFER, SVME, false),
        ("APIC_BASE, address", 0x1b, 1 << 20, false),
        ("APIC_BASE, x2APIC mode", 0x1b, 1 << 10, false),
        ("TSC ratio", 0xc000_0104, 1 << 32, true),
        ("SYSCFG.TOM2", 0xc001_0010, 1 << 21, false),
        ("SYSCFG, memory encryption", 0xc001_0010, 1 << 23, false),
        ("HWCR.SmmLock", 0xc001_0015, 1, false),
        ("IORR", 0xc001_0016, 1 << 20, false),
        ("TOP_MEM", 0xc001_001a, 1 << 24, false),
        ("TOM2", 0xc001_001d, 1 << 24, false),
        ("PATCH_LOADER", 0xc001_0020, 1 << 12, true),
        ("SMI on I/O", 0xc001_0050, 0xb2, false),
        ("MMIO configuration base", 0xc001_0058, 1 << 28, false),
        ("SMM_BASE", 0xc001_0111, 1 << 16, false),
        ("SMM_ADDR", 0xc001_0112, 1 << 17, false),
        ("SMM_MASK", 0xc001_0113, 1, false),
        ("VM_CR", 0xc001_0114, 2, true),
        ("VM_HSAVE_PA", 0xc001_0117, SCRATCH, true),
        ("SMM_KEY", 0xc001_0119, 1, true),
        ("SEV_STATUS", 0xc001_0131, 1, true),
        ("CPUID override", 0xc001_1004, 1, false),
    ];
    let Target { machine, protected, .. } = target;
    for cpu in 0..2 {
        let old = access_msrs(machine, cpu, &MSRS.map(|(_, index, ..)| (index, None)));
        // Changed, read, and put back at once.
        let steps: Vec<_> = MSRS
            .iter()
            .zip(&old)
            .flat_map(|(&(_, index, bits, _), old)| {
                let old = old.unwrap_or(0);
                [(index, Some(old ^ bits)), (index, None), (index, Some(old))]
            })
            .collect();
        let results = access_msrs(machine, cpu, &steps);
        for (((name, _, _, absent), old), result) in MSRS.into_iter().zip(old).zip(results.chunks(3)) {
            if *protected {
                assert_eq!(old.is_none(), absent, "RDMSR of {name} on CPU {cpu}: {old:x?}");
                assert_eq!(result[..2], [None, old], "WRMSR of {name} on CPU {cpu}");
            } else {
                assert!(old.is_some() && result[0].is_some(), "{name} on CPU {cpu}: {old:x?}, {result:x?}");
            }
            seen(&format!("guest: MSR, {name}"), *protected);
        }
        // SVME does not show. A register of the guest's can be read and written: the way there is not what fails.
        let sysenter = access_msrs(machine, cpu, &[(EFER, None), (0x174, None)]);
        assert_eq!(sysenter[0].unwrap() & SVME, 0);
        assert_eq!(access_msrs(machine, cpu, &[(0x174, sysenter[1])]), [Some(0)]);
    }
}

/// Puts a file into the guest.
fn send(machine: &mut Machine, path: &str, bytes: &[u8]) {
    let text = hex::encode(bytes);
    machine.check(&format!("xxd -r -p >{path} <<'END'\n{text}\nEND\nchmod +x {path}")).unwrap();
}

fn run_program(machine: &mut Machine, program: &[u8]) -> (i32, Vec<u8>) {
    send(machine, "/tmp/program", program);
    let output = machine.run("/tmp/program 2>/dev/null").unwrap();
    (output.status, output.bytes)
}

/// Looks for SVM, and for who is in control.
fn cpuid(target: &mut Target) {
    let machine = &mut target.machine;
    let (status, signature) = run_program(machine, &guest::signature());
    assert_eq!(status, 0);
    let svm = machine.run("grep -qw svm /proc/cpuinfo").unwrap().status == 0;
    assert_eq!((signature == b"CordonMLE   ", svm), (target.protected, !target.protected));
    seen("guest: find SVM", target.protected);
}

/// Runs instructions at CPL 0 of the first CPU, with the page at `page` mapped for them.
fn ring0(machine: &mut Machine, page: u64, code: &[u8]) -> Ring0 {
    let base = fs::read(paths::modules().join("nls_ascii.ko")).unwrap();
    let (module, at) = guest::module(&base);
    // The files take longer to send than to use: once is enough.
    if machine.run("[ -e /tmp/attack.ko ]").unwrap().status != 0 {
        send(machine, "/tmp/attack.ko", &module);
    }
    let loader = format!("/tmp/load-{page:x}");
    if machine.run(&format!("[ -e {loader} ]")).unwrap().status != 0 {
        send(machine, &loader, &guest::loader(page));
    }
    let code = hex::encode(guest::slot(code));
    let output = machine.run(&format!(
        "echo {code} | xxd -r -p | dd of=/tmp/attack.ko bs=1 seek={at} conv=notrunc status=none && taskset 1 {loader}"
    ));
    Ring0::from_output(&output.unwrap().bytes)
}

/// Uses SVM from the guest's kernel.
fn svm_instructions(target: &mut Target) {
    let Target { machine, places, protected, .. } = target;
    // The way in: instructions run, and exceptions are seen.
    assert_eq!(ring0(machine, SCRATCH, &[0xb0, 7]), Ring0::Ran(7));
    assert_eq!(ring0(machine, SCRATCH, &[0x0f, 0x0b]), UD);
    // RDMSR; OR AH, 10h; WRMSR and its opposite, of EFER.
    let [a, b, c, d] = EFER.to_le_bytes();
    let enable = [0xb9, a, b, c, d, 0x0f, 0x32, 0x80, 0xcc, 0x10, 0x0f, 0x30];
    let disable = [0xb9, a, b, c, d, 0x0f, 0x32, 0x80, 0xe4, 0xef, 0x0f, 0x30];
    let in_scratch = |insn: &[u8]| [guest::rax(SCRATCH).as_slice(), insn].concat();
    let attacks: [(&str, Vec<u8>); 3] = [
        ("CLGI, STGI", vec![0x0f, 0x01, 0xdd, 0x0f, 0x01, 0xdc]),
        ("VMSAVE, VMLOAD", in_scratch(&[0x0f, 0x01, 0xdb, 0x0f, 0x01, 0xda])),
        ("INVLPGA", in_scratch(&[0x31, 0xc9, 0x0f, 0x01, 0xdf])),
    ];
    for (name, attack) in attacks {
        let with_svme = [enable.as_slice(), &attack, &disable].concat();
        let result = ring0(machine, SCRATCH, &with_svme);
        if *protected {
            assert_eq!(result, GP, "EFER.SVME, {name}");
            assert_eq!(ring0(machine, SCRATCH, &attack), UD, "{name}");
        } else {
            assert!(matches!(result, Ring0::Ran(_)), "{name}: {result:?}");
        }
        seen(&format!("guest: {name}"), *protected);
    }
    if *protected {
        // VMSAVE and VMRUN use physical addresses, past all page tables. They and SKINIT have no control natively: one
        // would hang, the other is not in QEMU.
        let in_mle = |insn: [u8; 3]| [guest::rax(places.mle + 0x1000).as_slice(), &insn].concat();
        for (name, opcode) in [("VMRUN", 0xd8), ("VMLOAD", 0xda), ("VMSAVE", 0xdb), ("SKINIT", 0xde)] {
            assert_eq!(ring0(machine, SCRATCH, &in_mle([0x0f, 0x01, opcode])), UD, "{name}");
            seen(&format!("guest: {name} with the MLE's memory"), true);
        }
    }
}

fn write_code(machine: &mut Machine, at: u64, code: &[u8]) {
    for (at, word) in (at..).step_by(8).zip(code.chunks(8)) {
        let mut bytes = [0; 8];
        bytes[..word.len()].copy_from_slice(word);
        write(machine, at, u64::from_le_bytes(bytes));
    }
}

/// Page tables for code at [`SCRATCH`], from the page above it on: the first GiB one to one.
fn one_to_one(machine: &mut Machine) {
    write(machine, SCRATCH + 0x1000, (SCRATCH + 0x2000) | 3);
    write(machine, SCRATCH + 0x2000, 0x83);
}

/// Reads the launch page through its neighbour a MiB above, with address line 20 masked: SKINIT sets VM_CR.DIS_A20M,
/// which makes the CPU ignore the mask.
fn a20(target: &mut Target) {
    let Target { machine, places, protected, .. } = target;
    let closed = places.launch_page;
    let neighbour = closed | 1 << 20;
    write_code(machine, SCRATCH, &guest::a20(SCRATCH, neighbour));
    // Address 0 to 1 GiB one to one, where the code, and nothing that it needs, has bit 20 set.
    one_to_one(machine);
    let content = |machine: &mut Machine, at| machine.memory(at, 8).unwrap();
    let (at_closed, at_neighbour) = (content(machine, closed), content(machine, neighbour));
    assert_ne!(at_closed, at_neighbour);
    assert!(matches!(ring0(machine, SCRATCH, &guest::call_mapped()), Ring0::Ran(_)));
    let found = content(machine, SCRATCH + guest::SEEN);
    let expected = if *protected { &at_neighbour } else { &at_closed };
    assert_eq!(&found, expected, "{closed:#x} holds {at_closed:x?}");
    seen("guest: reach the launch page by masking address line 20", *protected);
}

fn pcrs(machine: &mut Machine) -> [String; 3] {
    [17, 18, 19].map(|n| machine.check(&format!("cat /sys/class/tpm/tpm0/pcr-sha256/{n}")).unwrap())
}

/// An attack, which fails by a panic.
type Attack = fn(&mut Target);

/// Runs all attacks, and says which did not come to what they should.
fn attack(target: &mut Target) -> BTreeMap<&'static str, String> {
    let attacks: [(&str, Attack); 15] = [
        ("memory", memory),
        ("tpm_locality", tpm_locality),
        ("iommu_registers", iommu_registers),
        ("chipset_registers", chipset::registers),
        ("chipset_register_block", chipset::register_block),
        ("configuration_window", chipset::configuration_window),
        ("decoders", chipset::decoders),
        ("msrs", msrs),
        ("cpuid", cpuid),
        ("hypercalls::of_programs", hypercalls::of_programs),
        ("svm_instructions", svm_instructions),
        ("hypercalls::of_kernels", hypercalls::of_kernels),
        ("hypercalls::races", hypercalls::races),
        ("smis", smis::of_guest),
        ("dma", dma::devices),
    ];
    let mut failures = BTreeMap::new();
    for (name, attack) in attacks {
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| attack(target))) {
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned()));
            failures.insert(name, text.unwrap_or_default());
        }
    }
    failures
}

#[test]
fn no_attack_of_a_guests_root_succeeds_and_all_do_without_cordon() {
    let mut machine = boot(&Spec { turns: false, ..spec(Boot::Cordon, &[]) });
    let places = Places::find(&mut machine);
    let before = pcrs(&mut machine);
    let prey = dma::prey(&mut machine, &places);
    let mut target = Target { machine, places: places.clone(), prey: prey.clone(), protected: true };
    let failures = attack(&mut target);
    assert!(failures.is_empty(), "under Cordon: {failures:#?}\n{}", target.machine.diagnosis());
    // The guest lives on, the launch too.
    assert_eq!(pcrs(&mut target.machine), before);
    let status = target.machine.check("tail -c +5 /sys/firmware/efi/efivars/Status-*").unwrap();
    assert!(status.contains("sandbox: Ready"), "{status}");
    target.machine.power_off().unwrap();

    let reserved =
        [(places.mle, places.mle_size), (places.slb, SLB_SIZE), (places.launch_page, LAUNCH_PAGE_SIZE)];
    let machine = boot(&Spec { turns: false, ..spec(Boot::Native, &reserved) });
    let mut target = Target { machine, places, prey, protected: false };
    let failures = attack(&mut target);
    assert!(failures.is_empty(), "without Cordon: {failures:#?}\n{}", target.machine.diagnosis());
    target.machine.power_off().unwrap();
}

/// In machines of its own: the control wants the launch page as the firmware's boot leaves it.
#[test]
fn address_line_20_masks_nothing() {
    let mut machine = boot(&spec(Boot::Cordon, &[]));
    let places = Places::find(&mut machine);
    let native = boot(&spec(Boot::Native, &[]));
    a20(&mut Target { machine: native, places: places.clone(), prey: vec![], protected: false });
    a20(&mut Target { machine, places, prey: vec![], protected: true });
}
