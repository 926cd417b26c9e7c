//! Attacks of firmware: an implant among the runtime services (`tests/hostile`) runs code that the guest gives it. With
//! Cordon it runs in the sandbox, without Cordon beside Linux, at CPL 0.

mod lies;

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};

use firmware::config::OnDeath;
use firmware::sandbox::Reason;
use hv::launch::{LAUNCH_PAGE_SIZE, SLB_SIZE};
use hv::vcpu::Access;
use tests::edu::Edu;
use tests::images;
use tests::machine::{Boot, Firmware, Machine, Spec};

use super::{Places, SCRATCH, boot, guest, last_record, pcrs, recorded, seen, spec, write};

pub const VARIABLES: &str = "/sys/firmware/efi/efivars";
pub const VENDOR: &str = "0badf00d-5eed-4bad-8bad-c0de0badc0de";
/// What a page of the guest holds.
pub const SECRET: u64 = 0x5ec2_e700_5ec2_e700;
pub const OTHER: u64 = 0x0bad_0bad_0bad_0bad;
const RET: u8 = 0xc3;

/// What came of code that the implant was given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It ran, and left this in RAX.
    Ran(u64),
    /// The variable could not be written or read: the shell's message.
    Failed(String),
}

impl Outcome {
    fn failed_with(&self, text: &str) -> bool {
        matches!(self, Self::Failed(message) if message.contains(text))
    }
}

/// Statuses as Linux gives them to a program: EFI_DEVICE_ERROR, and any that it does not know.
const EIO: &str = "Input/output error";
const EINVAL: &str = "Invalid argument";

/// A shell command that gives code to the implant, and the file in which its result is found. Linux lets nobody write a
/// variable of unknown kind twice, so each has a name of its own.
fn order(code: &[u8]) -> (String, String) {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let file = format!("{VARIABLES}/Attack{number}-{VENDOR}");
    let bytes: String = [7, 0, 0, 0].iter().chain(code).map(|b| format!("\\x{b:02x}")).collect();
    (format!("printf '{bytes}' | dd of={file} bs=8192 status=none"), file)
}

/// Has the implant run code.
pub fn run(machine: &mut Machine, code: &[u8]) -> anyhow::Result<Outcome> {
    let (order, file) = order(code);
    let output = machine.run(&format!("{{ {order} && tail -c +5 {file} | xxd -p; }} 2>&1"))?;
    let text = output.text().trim().to_owned();
    let result = hex::decode(&text).ok().and_then(|bytes| bytes.try_into().ok());
    Ok(result.map_or(Outcome::Failed(text), |bytes| Outcome::Ran(u64::from_le_bytes(bytes))))
}

// Code for the implant.

pub fn code(parts: &[&[u8]]) -> Vec<u8> {
    [parts.concat().as_slice(), &[RET]].concat()
}

fn read64(at: u64) -> Vec<u8> {
    code(&[&guest::rax(at), &[0x48, 0x8b, 0x00]]) // mov rax, [rax]
}

fn read32(at: u64) -> Vec<u8> {
    code(&[&guest::rax(at), &[0x8b, 0x00]]) // mov eax, [rax]
}

fn read8(at: u64) -> Vec<u8> {
    code(&[&guest::rax(at), &[0x0f, 0xb6, 0x00]]) // movzx eax, byte [rax]
}

pub fn write64(at: u64, value: u64) -> Vec<u8> {
    // mov rdx, value; mov [rax], rdx
    code(&[&guest::rax(at), &[0x48, 0xba], &value.to_le_bytes(), &[0x48, 0x89, 0x10]])
}

pub fn write32(at: u64, value: u32) -> Vec<u8> {
    // mov dword [rax], value
    code(&[&guest::rax(at), &[0xc7, 0x00], &value.to_le_bytes()])
}

/// Leaves the low half in EAX, to go on from there.
fn rdmsr_low(index: u32) -> Vec<u8> {
    // mov ecx, index; rdmsr
    [&[0xb9][..], &index.to_le_bytes(), &[0x0f, 0x32]].concat()
}

fn rdmsr(index: u32) -> Vec<u8> {
    // shl rdx, 32; or rax, rdx
    code(&[&rdmsr_low(index), &[0x48, 0xc1, 0xe2, 0x20, 0x48, 0x09, 0xd0]])
}

fn wrmsr(index: u32, value: u32) -> Vec<u8> {
    // mov ecx, index; mov eax, value; xor edx, edx; wrmsr
    code(&[&[0xb9], &index.to_le_bytes(), &[0xb8], &value.to_le_bytes(), &[0x31, 0xd2, 0x0f, 0x30]])
}

/// Has QEMU's `edu`, whose registers are at `edu`, copy eight bytes.
pub fn dma(edu: u64, from: u64, to: u64) -> Vec<u8> {
    let mut parts = guest::rax(edu);
    let steps = [(from, Edu::BUFFER, Edu::TAKE), (Edu::BUFFER, to, Edu::GIVE)];
    for (from, to, command) in steps {
        for (register, value) in [(0x80_u32, from), (0x88, to), (0x90, 8), (0x98, command)] {
            parts.extend([0x48, 0xba]); // mov rdx, value
            parts.extend(value.to_le_bytes());
            parts.extend([0x48, 0x89, 0x90]); // mov [rax + register], rdx
            parts.extend(register.to_le_bytes());
        }
        // While it is busy: mov rdx, [rax + 98h]; test dl, 1; jnz
        parts.extend([0x48, 0x8b, 0x90, 0x98, 0, 0, 0, 0xf6, 0xc2, 0x01, 0x75, 0xf4]);
    }
    code(&[&parts])
}

/// OUT or IN of EAX or AL.
fn ports(steps: &[(u16, Port)]) -> Vec<u8> {
    let mut parts = Vec::new();
    for (port, access) in steps {
        parts.extend([0x66, 0xba]); // mov dx, port
        parts.extend(port.to_le_bytes());
        match *access {
            Port::Out8(value) => parts.extend([0xb0, value, 0xee]),
            Port::Out32(value) => {
                parts.push(0xb8);
                parts.extend(value.to_le_bytes());
                parts.push(0xef);
            }
            Port::In8 => parts.push(0xec),
            Port::In32 => parts.push(0xed),
        }
    }
    code(&[&parts])
}

#[derive(Clone, Copy)]
enum Port {
    Out8(u8),
    Out32(u32),
    In8,
    In32,
}

/// Where things are on one machine.
struct Ground {
    places: Places,
    /// The registers of the device that does DMA.
    edu: u64,
}

/// What the implant's code does to a machine that nothing protects.
enum Alone {
    /// It gets through, which its result or the machine's memory show.
    Succeeds(fn(&mut Machine, &Ground, u64) -> bool),
    /// The machine ends.
    Ends,
    /// The call never comes back.
    Hangs,
}

/// What depends on where things are on the machine.
type On<T> = Box<dyn Fn(&Ground) -> T>;

/// An attack that costs the sandbox its life.
struct Fatal {
    name: &'static str,
    code: On<Vec<u8>>,
    reason: On<Reason>,
    alone: Alone,
}

fn fatal(
    name: &'static str,
    code: impl Fn(&Ground) -> Vec<u8> + 'static,
    reason: impl Fn(&Ground) -> Reason + 'static,
    alone: Alone,
) -> Fatal {
    Fatal { name, code: Box::new(code), reason: Box::new(reason), alone }
}

fn memory_reason(gpa: u64, access: Access) -> Reason {
    Reason::Memory { gpa, access }
}

/// An attack by an access to memory at `at`.
fn reads(
    name: &'static str,
    at: fn(&Ground) -> u64,
    read: fn(u64) -> Vec<u8>,
    success: fn(&mut Machine, &Ground, u64) -> bool,
) -> Fatal {
    fatal(name, move |p| read(at(p)), move |p| memory_reason(at(p), Access::Read), Alone::Succeeds(success))
}

fn writes(
    name: &'static str,
    at: fn(&Ground) -> u64,
    success: fn(&mut Machine, &Ground, u64) -> bool,
) -> Fatal {
    fatal(
        name,
        move |p| write64(at(p), OTHER),
        move |p| memory_reason(at(p), Access::Write),
        Alone::Succeeds(success),
    )
}

pub fn other_at(machine: &mut Machine, at: u64) -> bool {
    machine.memory(at, 8).unwrap() == OTHER.to_le_bytes()
}

const APIC: u64 = 0xfee0_0000;
const IOMMU: u64 = 0xfed8_0000;
const TPM_LOCALITY_2: u64 = 0xfed4_2000;
/// PCI configuration space, and what its first word is.
const PCI: u64 = 0xb000_0000;
const HOST_BRIDGE: u32 = 0x29c0_8086;
const VM_HSAVE_PA: u32 = 0xc001_0117;
const EFER: u32 = 0xc000_0080;
const APIC_BASE: u32 = 0x1b;

/// What firmware may try. The last ones have no control but the machine's end.
fn attacks() -> Vec<Fatal> {
    let msr = |index, write| move |_: &Ground| Reason::Msr { index, write };
    let cpu = |code| move |_: &Ground| Reason::Cpu { code };
    vec![
        reads("read the guest's memory", |_| SCRATCH, read64, |_, _, seen| seen == SECRET),
        writes("write the MLE", |g| g.places.mle + 0x2000, |m, g, _| other_at(m, g.places.mle + 0x2000)),
        writes("write the guest's memory", |_| SCRATCH + 8, |m, _, _| other_at(m, SCRATCH + 8)),
        reads("read the MLE", |g| g.places.mle, read64, |_, _, _| true),
        reads("read nested tables", |g| g.places.nested, read64, |_, _, _| true),
        writes("write nested tables", |g| g.places.nested, |m, g, _| other_at(m, g.places.nested)),
        writes("write the SLB", |g| g.places.slb, |m, g, _| other_at(m, g.places.slb)),
        writes(
            "write the launch page",
            |g| g.places.launch_page,
            |m, g, _| other_at(m, g.places.launch_page),
        ),
        reads("IOMMU registers", |_| IOMMU + 0x30, read64, |_, _, features| features != 0),
        reads("TPM locality 2", |_| TPM_LOCALITY_2, read8, |_, _, access| access & 0x80 != 0),
        reads(
            "PCI configuration by memory",
            |_| PCI,
            read32,
            |_, _, identity| identity == u64::from(HOST_BRIDGE),
        ),
        fatal(
            "DMA by a device",
            |g| dma(g.edu, SCRATCH, SCRATCH + 16),
            |g| memory_reason(g.edu + 0x80, Access::Write),
            Alone::Succeeds(|m, _, _| m.memory(SCRATCH + 16, 8).unwrap() == SECRET.to_le_bytes()),
        ),
        fatal(
            "DMA by a device to nested tables",
            |g| dma(g.edu, SCRATCH, g.places.nested),
            |g| memory_reason(g.edu + 0x80, Access::Write),
            Alone::Succeeds(|m, g, _| m.memory(g.places.nested, 8).unwrap() == SECRET.to_le_bytes()),
        ),
        fatal(
            "DMA by a device to the device table",
            |g| dma(g.edu, SCRATCH, g.places.device_table),
            |g| memory_reason(g.edu + 0x80, Access::Write),
            Alone::Succeeds(|m, g, _| m.memory(g.places.device_table, 8).unwrap() == SECRET.to_le_bytes()),
        ),
        reads("local APIC", |_| APIC + 0x30, read32, |_, _, version| version & 0xf0 == 0x10),
        fatal(
            "read EFER",
            |_| rdmsr(EFER),
            msr(EFER, false),
            Alone::Succeeds(|_, _, efer| efer & 0x500 == 0x500),
        ),
        // With the value that it has.
        fatal(
            "APIC base",
            |_| wrmsr(APIC_BASE, 0xfee0_0900),
            msr(APIC_BASE, true),
            Alone::Succeeds(|_, _, _| true),
        ),
        fatal(
            "VM_HSAVE_PA",
            |_| rdmsr(VM_HSAVE_PA),
            msr(VM_HSAVE_PA, false),
            Alone::Succeeds(|_, _, _| true),
        ),
        // mov rax, cr3; mov cr3, rax
        fatal(
            "page tables",
            |_| code(&[&[0x0f, 0x20, 0xd8, 0x0f, 0x22, 0xd8]]),
            cpu(0x13),
            Alone::Succeeds(|_, _, _| true),
        ),
        // mov dx, 71h; lea rdi, [rcx + 100h]; insb
        fatal(
            "string instruction on a port",
            |_| code(&[&[0x66, 0xba, 0x71, 0, 0x48, 0x8d, 0xb9, 0, 1, 0, 0, 0x6c]]),
            |_| Reason::StringPort(0x71),
            Alone::Succeeds(|_, _, _| true),
        ),
        fatal(
            "loop with interrupts off",
            |_| vec![0xeb, 0xfe],
            |_| Reason::Budget { used_us: 0, limit_us: 0 },
            Alone::Hangs,
        ),
        fatal(
            "triple fault",
            // Two words of zeros are the interrupt table: push 0; push 0; lidt [rsp]; ud2
            |_| vec![0x6a, 0, 0x6a, 0, 0x0f, 0x01, 0x1c, 0x24, 0x0f, 0x0b],
            |_| Reason::Exception { vector: 6, error: 0 },
            Alone::Ends,
        ),
        fatal(
            "loop",
            |_| vec![0xfb, 0xeb, 0xfe],
            |_| Reason::Budget { used_us: 0, limit_us: 0 },
            Alone::Ends,
        ),
        fatal("halt", |_| vec![0xf4, 0xeb, 0xfd], |_| Reason::Halt, Alone::Hangs),
        fatal("hypercall", |_| code(&[&guest::VMMCALL]), |_| Reason::Hypercall, Alone::Ends),
        // No page tables: mov rax, cr3; xor edx, edx; mov [rax], rdx; lea rax, [rip]; invlpg [rax]
        fatal(
            "no page tables",
            |_| {
                let clear = [0x0f, 0x20, 0xd8, 0x31, 0xd2, 0x48, 0x89, 0x10];
                code(&[&clear, &[0x48, 0x8d, 0x05, 0, 0, 0, 0, 0x0f, 0x01, 0x38]])
            },
            |_| Reason::Exception { vector: 14, error: 0x10 },
            Alone::Ends,
        ),
        fatal("CLGI", |_| code(&[&[0x0f, 0x01, 0xdd]]), |_| Reason::Instruction, Alone::Ends),
    ]
}

/// A firmware with the implant.
pub fn hostile(kind: Boot, reserved: &[(u64, u64)], config: Option<&Path>) -> Spec {
    images::build_hostile().expect("implant");
    let config = config.map(Path::to_owned);
    Spec { hostile: true, config, ..spec(kind, reserved) }
}

/// Calls may take long on a loaded bench, but a test need not wait ten seconds for an endless one.
pub fn config(text: &str) -> tempfile::TempPath {
    config_file(&format!("sandbox.budget-ms = 3000\n{text}"))
}

fn config_file(text: &str) -> tempfile::TempPath {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), format!("{text}\n")).unwrap();
    file.into_temp_path()
}

/// One of Cordon's own variables.
fn own(machine: &mut Machine, name: &str) -> String {
    machine.check(&format!("tail -c +5 {VARIABLES}/{name}-a720b6bf-*")).unwrap()
}

fn status(machine: &mut Machine) -> String {
    own(machine, "Status")
}

/// Both CPUs run programs, and Cordon answers.
fn lives(machine: &mut Machine, what: &str) {
    let check = "for cpu in 1 2; do taskset $cpu true || exit; done";
    machine.check(check).unwrap_or_else(|error| panic!("after {what}: {error:#}\n{}", machine.diagnosis()));
    for name in ["DrtmLog", "Exits"] {
        assert!(!own(machine, name).is_empty(), "{name} after {what}");
    }
}

/// The implant is there, and runs code.
fn in_place(machine: &mut Machine) {
    assert_eq!(run(machine, &code(&[&guest::rax(SECRET)])).unwrap(), Outcome::Ran(SECRET));
}

pub fn start(spec: &Spec) -> Machine {
    let mut machine = boot(spec);
    in_place(&mut machine);
    write(&mut machine, SCRATCH, SECRET);
    write(&mut machine, SCRATCH + 8, SECRET);
    machine
}

/// Whether the sandbox's state is that it died of `reason`.
fn names(status: &str, reason: &Reason) -> bool {
    let text = format!("{reason:?}");
    let text = if matches!(reason, Reason::Budget { .. }) { "Budget" } else { &text };
    status.contains(&format!("Dead({text}"))
}

/// Under Cordon an attack costs an EFI error, and the sandbox, of which the log tells.
fn costs_the_sandbox(machine: &mut Machine, ground: &Ground, attack: &Fatal) {
    const DEATH: [&str; 1] = ["sandbox died"];
    let what = attack.name;
    let places = &ground.places;
    let watched: Vec<_> =
        [SCRATCH, SCRATCH + 8, places.mle, places.mle + 0x2000, places.slb, places.launch_page]
            .into_iter()
            .map(|at| (at, machine.memory(at, 8).unwrap()))
            .collect();
    let before = pcrs(machine);
    let record = last_record(machine, &DEATH);
    let outcome = run(machine, &(attack.code)(ground))
        .unwrap_or_else(|e| panic!("{what}: {e:#}\n{}", machine.diagnosis()));
    assert!(outcome.failed_with(EIO), "{what}: {outcome:x?}");
    lives(machine, what);
    let reason = (attack.reason)(ground);
    let status = status(machine);
    assert!(names(&status, &reason), "{what}: no {reason:?} in {status}");
    assert_ne!(last_record(machine, &DEATH), record, "{what}");
    for (at, bytes) in watched {
        assert_eq!(machine.memory(at, 8).unwrap(), bytes, "{what}: {at:#x}");
    }
    assert_eq!(pcrs(machine), before, "{what}");
}

/// Says that [`costs_the_sandbox`] saw what `attacker` tried.
fn stopped(attacker: &str, attack: &Fatal) {
    let attack = format!("{attacker}: {}", attack.name);
    seen(&attack, true);
    recorded(&attack);
}

/// Without Cordon it gets through.
fn succeeds(machine: &mut Machine, ground: &Ground, attack: &Fatal) {
    let what = attack.name;
    let code = (attack.code)(ground);
    match &attack.alone {
        Alone::Succeeds(success) => {
            let outcome = run(machine, &code).unwrap();
            let Outcome::Ran(result) = outcome else { panic!("{what}: {outcome:x?}") };
            assert!(success(machine, ground, result), "{what}: {result:#x}");
        }
        Alone::Ends => {
            let error = run(machine, &code).expect_err(what).to_string();
            assert!(error.contains("the machine ended"), "{what}: {error}");
        }
        Alone::Hangs => {
            let (order, _) = order(&code);
            let script = format!("{order} & sleep 4; kill -0 $! && echo hangs");
            // If it does not take the whole machine along.
            let hangs = machine.run(&script).map_or(true, |output| output.text().contains("hangs"));
            assert!(hangs, "{what}");
        }
    }
}

/// Registers of the device that does DMA.
pub fn edu(machine: &mut Machine) -> u64 {
    Edu::all(machine).unwrap()[0].registers
}

/// How attacks by a kind of firmware are called.
fn attacker(firmware: Firmware) -> &'static str {
    match firmware {
        Firmware::Smm => "firmware",
        Firmware::Plain => "firmware without SMM",
    }
}

/// A machine of its own for attacks without Cordon.
fn alone(places: &Places, firmware: Firmware) -> (Machine, Ground) {
    let reserved =
        [(places.mle, places.mle_size), (places.slb, SLB_SIZE), (places.launch_page, LAUNCH_PAGE_SIZE)];
    let mut machine = start(&Spec { firmware, ..hostile(Boot::Native, &reserved, None) });
    let ground = Ground { places: places.clone(), edu: edu(&mut machine) };
    (machine, ground)
}

/// Has the attacks fail under Cordon. Says where things are.
fn all_fail(attacks: &[Fatal], on_death: OnDeath, firmware: Firmware) -> Places {
    let text = if on_death == OnDeath::Restart { "sandbox.on-death = restart" } else { "" };
    let config = config(text);
    let spec = Spec { firmware, ..hostile(Boot::Cordon, &[], Some(&config)) };
    let ground = |machine: &mut Machine| Ground { places: Places::find(machine), edu: edu(machine) };
    let mut machine = start(&spec);
    let mut on = ground(&mut machine);
    for (number, attack) in attacks.iter().enumerate() {
        costs_the_sandbox(&mut machine, &on, attack);
        if on_death == OnDeath::Restart {
            in_place(&mut machine);
            let status = status(&mut machine);
            assert!(status.contains(&format!("restarts: {},", number + 1)), "{}: {status}", attack.name);
        } else if number + 1 < attacks.len() {
            machine.power_off().unwrap();
            machine = start(&spec);
            on = ground(&mut machine);
        }
        stopped(attacker(firmware), attack);
    }
    machine.power_off().unwrap();
    on.places
}

/// Has the attacks succeed without Cordon, up to the first that takes the machine along.
fn all_succeed(attacks: &[Fatal], places: &Places, firmware: Firmware) {
    let (mut machine, ground) = alone(places, firmware);
    for attack in attacks {
        succeeds(&mut machine, &ground, attack);
        seen(&format!("{}: {}", attacker(firmware), attack.name), false);
        if !matches!(attack.alone, Alone::Succeeds(_)) {
            break;
        }
    }
}

/// The implant's memory map has a device's registers. They are firmware's only where the configuration says so, and then the
/// device reaches what the guest's devices reach.
#[test]
#[ignore = "the control of `DMA by a device`; `make test-all` runs it"]
fn a_device_in_the_memory_map_is_firmwares_if_the_configuration_says_so() {
    let mut machine = start(&hostile(Boot::Cordon, &[], None));
    let log = machine.check("cordon log").unwrap();
    let line = log.lines().find(|line| line.contains(" in the map at ")).expect(&log).to_owned();
    assert!(line.contains("denied"), "{line}");
    let function = line.split("PCI ").nth(1).unwrap().split(' ').next().unwrap().to_owned();
    machine.power_off().unwrap();

    let config = config(&format!("sandbox.pci.{function} = allow"));
    let mut machine = start(&hostile(Boot::Cordon, &[], Some(&config)));
    let edu = edu(&mut machine);
    let copied = run(&mut machine, &dma(edu, SCRATCH, SCRATCH + 16)).unwrap();
    assert!(matches!(copied, Outcome::Ran(_)), "{copied:?}");
    assert_eq!(machine.memory(SCRATCH + 16, 8).unwrap(), SECRET.to_le_bytes());
    let log = machine.check("cordon log").unwrap();
    assert!(log.lines().any(|line| line.contains(&function) && line.contains("passed")), "{log}");
    machine.power_off().unwrap();
}

/// One attack that is stopped when it happens, and one that is when its time is up.
#[test]
fn firmware_that_attacks_costs_the_sandbox_and_nothing_more() {
    const KINDS: [&str; 2] = ["write the MLE", "loop with interrupts off"];
    let mut attacks = attacks();
    attacks.retain(|attack| KINDS.contains(&attack.name));
    let places = all_fail(&attacks, OnDeath::Stay, Firmware::Smm);
    all_succeed(&attacks, &places, Firmware::Smm);
}

fn a_sandbox_that_is_made_anew_withstands_all_attacks_of(firmware: Firmware) {
    let attacks = attacks();
    let places = all_fail(&attacks, OnDeath::Restart, firmware);
    all_succeed(&attacks, &places, firmware);
}

#[test]
fn a_sandbox_that_is_made_anew_withstands_all_attacks() {
    a_sandbox_that_is_made_anew_withstands_all_attacks_of(Firmware::Smm);
}

#[test]
#[ignore = "the same with the other firmware; `make test-all` runs it"]
fn a_sandbox_withstands_all_attacks_of_firmware_without_smm() {
    a_sandbox_that_is_made_anew_withstands_all_attacks_of(Firmware::Plain);
}

/// All controls that take a machine each.
#[test]
#[ignore = "takes three minutes; `make test-all` runs it"]
fn firmware_ends_the_machine_without_cordon() {
    let places = Places::find(&mut start(&hostile(Boot::Cordon, &[], None)));
    for attack in attacks().iter().filter(|attack| !matches!(attack.alone, Alone::Succeeds(_))) {
        let (mut machine, ground) = alone(&places, Firmware::Smm);
        succeeds(&mut machine, &ground, attack);
        seen(&format!("firmware: {}", attack.name), false);
    }
}

/// Under `native` firmware is trusted with the guest, of which the exposure log and `Status` tell, and with nothing of the
/// MLE's. What it does to the guest here is what the sandbox stops.
#[test]
fn native_firmware_reaches_the_guest_and_nothing_of_cordons() {
    const CLOSED: [&str; 10] = [
        "write the MLE",
        "read the MLE",
        "read nested tables",
        "write nested tables",
        "write the SLB",
        "write the launch page",
        "IOMMU registers",
        "TPM locality 2",
        "local APIC",
        "CLGI",
    ];
    /// Registers of the host bridge that lead memory elsewhere: PAM.
    const PAM: u32 = 1 << 31 | 0x90;
    let text = format!("sandbox.on-death = restart\nservice.SetVariable.{VENDOR}:* = native");
    let config = config(&text);
    let mut machine = start(&hostile(Boot::Cordon, &[], Some(&config)));
    let ground = Ground { places: Places::find(&mut machine), edu: edu(&mut machine) };
    let before = pcrs(&mut machine);
    let done = |machine: &mut Machine, code: &[u8]| match run(machine, code).unwrap() {
        Outcome::Ran(result) => result,
        failed => panic!("{failed:x?}\n{}", status(machine)),
    };

    assert_eq!(done(&mut machine, &read64(SCRATCH)), SECRET);
    done(&mut machine, &write64(SCRATCH + 8, OTHER));
    assert!(other_at(&mut machine, SCRATCH + 8));
    let identity = done(&mut machine, &ports(&[(0xcf8, Port::Out32(1 << 31)), (0xcfc, Port::In32)]));
    assert_eq!(identity, u64::from(HOST_BRIDGE));
    assert_eq!(done(&mut machine, &read32(PCI)), u64::from(HOST_BRIDGE));
    done(&mut machine, &dma(ground.edu, SCRATCH, SCRATCH + 16));
    assert_eq!(machine.memory(SCRATCH + 16, 8).unwrap(), SECRET.to_le_bytes());
    assert_eq!(pcrs(&mut machine), before);
    let Places { mle, nested, device_table, slb, .. } = ground.places;
    for (what, at) in
        [("MLE", mle), ("nested tables of a CPU", nested), ("device table", device_table), ("SLB", slb)]
    {
        let bytes = machine.memory(at, 8).unwrap();
        done(&mut machine, &dma(ground.edu, SCRATCH, at));
        assert_eq!(machine.memory(at, 8).unwrap(), bytes, "{what}");
        seen(&format!("native firmware: a device writes the {what}"), true);
    }

    // What the guest's kernel has not is not firmware's.
    let pam = [(0xcf8, Port::Out32(PAM)), (0xcfc, Port::In32)];
    let value = done(&mut machine, &ports(&pam));
    let change = Port::Out32(value as u32 ^ 0x3030_3030);
    let changed = done(&mut machine, &ports(&[(0xcf8, Port::Out32(PAM)), (0xcfc, change), pam[1]]));
    assert_eq!(changed, value, "PAM");
    seen("native firmware: configuration register of the host bridge", true);
    for attack in attacks().iter().filter(|attack| CLOSED.contains(&attack.name)) {
        costs_the_sandbox(&mut machine, &ground, attack);
        in_place(&mut machine);
        stopped("native firmware", attack);
    }

    let log = machine.check("cordon log && cordon verify").unwrap();
    assert!(log.contains("firmware may reach the guest: policy native"), "{log}");
    let decided = |line: &&str, word| line.contains("Attack") && line.contains(word);
    assert!(log.lines().any(|line| decided(&line, "native") && line.contains("SetVariable")), "{log}");
    assert!(log.lines().any(|line| decided(&line, "sandbox") && line.contains("GetVariable")), "{log}");
    let status = status(&mut machine);
    assert!(status.contains(" of them native") && !status.contains(" 0 of them native"), "{status}");
    machine.power_off().unwrap();
}
