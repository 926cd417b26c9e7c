use super::*;
use core::cell::RefCell;
use proptest::prelude::*;
use std::collections::BTreeMap;

/// A machine whose absent registers fault, as hardware's do.
#[derive(Clone, Default)]
struct Machine {
    msrs: BTreeMap<u32, u64>,
    pci: BTreeMap<(u16, u8), u32>,
    ports: BTreeMap<u16, u32>,
    cpuid: BTreeMap<u32, [u32; 4]>,
    read: RefCell<std::vec::Vec<u32>>,
}

impl Msr for Machine {
    fn rdmsr(&self, index: u32) -> u64 {
        self.read.borrow_mut().push(index);
        *self.msrs.get(&index).unwrap_or_else(|| panic!("#GP: MSR {index:#x}"))
    }
    fn wrmsr(&self, index: u32, _: u64) {
        panic!("write of MSR {index:#x}");
    }
}

impl PortIo for Machine {
    fn in8(&self, port: u16) -> u8 {
        panic!("in8 {port:#x}");
    }
    fn in16(&self, port: u16) -> u16 {
        panic!("in16 {port:#x}");
    }
    fn in32(&self, port: u16) -> u32 {
        self.ports[&port]
    }
    fn out8(&self, port: u16, _: u8) {
        panic!("out8 {port:#x}");
    }
    fn out16(&self, port: u16, _: u16) {
        panic!("out16 {port:#x}");
    }
    fn out32(&self, port: u16, _: u32) {
        panic!("out32 {port:#x}");
    }
}

fn leaf(name: &[u8; 12], order: [usize; 3]) -> [u32; 4] {
    let word = |i: usize| u32::from_le_bytes(name[4 * i..4 * i + 4].try_into().unwrap());
    let mut out = [0; 4];
    for (i, place) in order.into_iter().enumerate() {
        out[place] = word(i);
    }
    out
}

impl Machine {
    fn cpu(&self) -> Cpu {
        Cpu::identify(|l, _| self.cpuid.get(&l).copied().unwrap_or_default())
    }

    fn facts(&self, wsmt: Option<&[u8]>) -> Facts {
        let pci = |id, offset: u8| self.pci.get(&(id, offset)).copied().unwrap_or(u32::MAX);
        Facts::read(&self.cpu(), self, self, pci, wsmt)
    }

    fn vendor(mut self, name: &[u8; 12], ecx: u32) -> Self {
        self.cpuid.insert(0, leaf(name, [1, 3, 2]));
        self.cpuid.insert(1, [0x0080_0f12, 0, ecx, 1 << 12]);
        self.cpuid.insert(0x8000_0000, [0x8000_001f, 0, 0, 0]);
        self.msrs.insert(0xfe, 0x508);
        self
    }

    /// Q35 as QEMU 7.2 and OVMF (202211, SMM) leave it, with the EPYC of QEMU: no AMD SMM registers, SMIs counted.
    fn qemu() -> Self {
        let mut m = Self::default().vendor(b"AuthenticAMD", 1 << 31);
        m.cpuid.insert(0x4000_0000, leaf(b"TCGTCGTCGTCG", [1, 2, 3]));
        m.msrs.extend([(0x34, 0x123), (0xc001_0015, 0), (0xc001_0112, 0), (0xc001_0113, 0)]);
        m.pci.extend([
            ((0, 0), 0x29c0_8086),
            ((0, 0x9c), 0x003f_1a02),
            ((0, 0x50), 0x0002_0010),
            ((0xf8, 0), 0x2918_8086),
            ((0xf8, 0x40), 0x0601),
            ((0xf8, 0x44), 0x80),
            ((0xf8, 0xa0), 0x0010),
            ((0xf8, 0xdc), 0),
        ]);
        m.ports.insert(0x630, 0x21);
        m
    }

    fn amd() -> Self {
        let mut m = Self::default().vendor(b"AuthenticAMD", 0);
        m.msrs.extend([
            (0xc001_0015, 0x8900_0011),
            (0xc001_0112, 0xac00_0000),
            (0xc001_0113, 0xffff_fe00_6602),
        ]);
        m.pci.insert((0, 0), 0x1480_1022);
        m
    }

    fn intel() -> Self {
        let mut m = Self::default().vendor(b"GenuineIntel", 1 << 5);
        m.cpuid.insert(1, [0x000a_0655, 0, 1 << 5, 1 << 12]);
        m.cpuid.insert(0x8000_0007, [0, 0, 0, 1 << 8]);
        m.msrs.extend([
            (0x34, 77),
            (0xfe, 0xd0a),
            (0x1f2, 0x8b00_0006),
            (0x1f3, 0xff80_0800),
            (0x480, 1 << 49 | 4),
            (0x9b, 0x8b70_0001),
        ]);
        m
    }
}

const WSMT: [u8; 40] = {
    let mut t = [0; 40];
    (t[0], t[1], t[2], t[3], t[4], t[36]) = (b'W', b'S', b'M', b'T', 40, 7);
    t
};

fn lines(facts: &Facts) -> std::vec::Vec<String> {
    facts.to_string().lines().map(String::from).collect()
}

#[test]
fn an_emulated_q35_says_what_it_knows() {
    let facts = Machine::qemu().facts(None);
    assert_eq!(
        lines(&facts),
        [
            "SMM SmmLock: unknown",
            "SMM TSEG (CPU): unknown",
            "SMM SMI intercept: in force",
            "SMM SMRAM lock: protected, SMRAMC 0x1a",
            "SMM TSEG: protected, ESMRAMC 0x3f, 16 MiB",
            "SMM SMI enables: protected, SMI_EN 0x21",
            "SMM SMI lock: protected, GEN_PMCON_1 0x10",
            "SMM flash lock: not protected, BIOS_CNTL 0x0",
            "SMM WSMT claim: not protected, flags 0x0",
        ]
    );
    assert_eq!(smi_count(&Machine::qemu().cpu(), &Machine::qemu()), Some(0x123));
}

#[test]
fn a_locked_amd_machine_ignores_the_intercept() {
    let mut machine = Machine::amd();
    let facts = machine.facts(Some(&WSMT));
    assert_eq!(
        lines(&facts),
        [
            "SMM SmmLock: protected, HWCR 0x1",
            "SMM TSEG (CPU): protected, SMM_ADDR 0xac000000, SMM_MASK 0xfffffe006602",
            "SMM SMI intercept: not in force, SMIs run in guest context",
            "SMM SMRAM lock: unknown",
            "SMM TSEG: unknown",
            "SMM SMI enables: unknown",
            "SMM SMI lock: unknown",
            "SMM flash lock: unknown",
            "SMM WSMT claim: protected, flags 0x7",
        ]
    );
    assert_eq!(smi_count(&machine.cpu(), &machine), None);
    machine.msrs.insert(0xc001_0015, 0x8900_0010);
    let open = machine.facts(None);
    assert_eq!(open.state(Kind::SmmLock), State::Open);
    assert_eq!(open.state(Kind::AmdTseg), State::Open);
    assert_eq!(open.state(Kind::SmiIntercept), State::Protected);
    assert_eq!(open.state(Kind::Smrr), State::Unknown);
}

#[test]
fn an_intel_machine_has_smrr_and_perhaps_a_monitor() {
    let mut machine = Machine::intel();
    let facts = machine.facts(None);
    assert_eq!(
        lines(&facts)[..3],
        [
            "SMM SMI intercept: not in force, SMIs run in guest context",
            "SMM SMRR: protected, base 0x8b000006, mask 0xff800800",
            "SMM transfer monitor: protected, SMM_MONITOR_CTL 0x8b700001",
        ]
    );
    assert_eq!(smi_count(&machine.cpu(), &machine), Some(77));
    // A CPU without dual-monitor treatment, SMRR or the counter has no such registers to read.
    machine.msrs.insert(0xfe, 0x50a);
    machine.msrs.insert(0x480, 4);
    machine.cpuid.remove(&0x8000_0007);
    for absent in [0x34, 0x9b, 0x1f2, 0x1f3] {
        machine.msrs.remove(&absent);
    }
    let facts = machine.facts(None);
    assert_eq!((facts.state(Kind::Smrr), facts.state(Kind::Stm)), (State::Open, State::Open));
    assert_eq!(smi_count(&machine.cpu(), &machine), None);
}

#[test]
fn an_unknown_cpu_is_not_asked() {
    let mut machine = Machine::default().vendor(b"Another one!", 1 << 5);
    machine.msrs.clear();
    machine.cpuid.insert(1, [0x600, 0, 1 << 5, 0]);
    machine.cpuid.insert(0x8000_0007, [0, 0, 0, 1 << 8]);
    let facts = machine.facts(None);
    assert_eq!(facts.state(Kind::SmiIntercept), State::Unknown);
    assert_eq!(smi_count(&machine.cpu(), &machine), None);
    assert!(machine.read.borrow().is_empty());
}

#[test]
fn each_protection_is_seen_to_be_missing() {
    type Break = fn(&mut Machine);
    let cases: [(Kind, State, Break); 11] = [
        (Kind::SmramLock, State::Open, |m| *m.pci.get_mut(&(0, 0x9c)).unwrap() = 0x003f_0a02),
        (Kind::SmramLock, State::Open, |m| *m.pci.get_mut(&(0, 0x9c)).unwrap() = 0x003f_5a02),
        (Kind::Tseg, State::Open, |m| *m.pci.get_mut(&(0, 0x9c)).unwrap() = 0x003e_1a02),
        (Kind::Tseg, State::Open, |m| *m.pci.get_mut(&(0, 0x9c)).unwrap() = 0x003f_0a02),
        (Kind::SmiEnable, State::Open, |m| *m.ports.get_mut(&0x630).unwrap() = 0x22),
        (Kind::SmiEnable, State::Unknown, |m| *m.pci.get_mut(&(0xf8, 0x44)).unwrap() = 0),
        (Kind::SmiEnable, State::Unknown, |m| *m.pci.get_mut(&(0xf8, 0x40)).unwrap() = 1),
        (Kind::SmiLock, State::Open, |m| *m.pci.get_mut(&(0xf8, 0xa0)).unwrap() = 0),
        (Kind::FlashLock, State::Protected, |m| *m.pci.get_mut(&(0xf8, 0xdc)).unwrap() = 0x2a),
        (Kind::FlashLock, State::Open, |m| *m.pci.get_mut(&(0xf8, 0xdc)).unwrap() = 0x2b),
        (Kind::SmramLock, State::Unknown, |m| *m.pci.get_mut(&(0, 0)).unwrap() = 0x29c1_8086),
    ];
    let whole = Machine::qemu().facts(None);
    for (index, (kind, state, change)) in cases.into_iter().enumerate() {
        let mut machine = Machine::qemu();
        change(&mut machine);
        let facts = machine.facts(None);
        assert_eq!(facts.state(kind), state, "case {index}");
        assert_ne!(facts.measured(), whole.measured(), "case {index}");
    }
}

#[test]
fn what_changes_at_run_time_is_not_measured() {
    let mut machine = Machine::qemu();
    let before = machine.facts(None).measured();
    machine.msrs.insert(0x34, 0x999);
    machine.ports.insert(0x630, 0xe1);
    machine.pci.insert((0xf8, 0xa0), 0x0210);
    assert_eq!(machine.facts(None).measured(), before);
    let mut amd = Machine::amd();
    let before = amd.facts(None).measured();
    amd.msrs.insert(0xc001_0015, 0x8b00_0011);
    assert_eq!(amd.facts(None).measured(), before);
}

#[test]
fn the_measured_form_is_fixed() {
    let mut expected = vec![1];
    for (kind, state, raw) in [
        (6, 1, [1u64, 0]),
        (7, 1, [0xac00_0000, 0xffff_fe00_6602]),
        (11, 2, [0, 0]),
        (1, 0, [0, 0]),
        (2, 0, [0, 0]),
        (3, 0, [0, 0]),
        (4, 0, [0, 0]),
        (5, 0, [0, 0]),
        (10, 1, [7, 0]),
    ] {
        expected.extend([kind, state]);
        raw.iter().for_each(|r| expected.extend(r.to_le_bytes()));
    }
    assert_eq!(Machine::amd().facts(Some(&WSMT)).measured().as_slice(), expected);
    // The most facts a machine can have fit: Intel's CPU in QEMU's chipset.
    let mut most = Machine::intel();
    most.pci = Machine::qemu().pci;
    most.ports = Machine::qemu().ports;
    assert_eq!(most.facts(None).measured().len(), 1 + 18 * 9);
}

#[test]
fn a_cpu_that_firmware_forgot_is_found() {
    let boot = Machine::amd();
    let facts = boot.facts(None);
    assert_eq!(facts.contradiction(&boot.cpu(), &boot), None);
    let mut other = Machine::amd();
    other.msrs.insert(0xc001_0015, 0x8900_0010);
    let fact = facts.contradiction(&other.cpu(), &other).unwrap();
    assert_eq!((fact.kind, fact.state), (Kind::SmmLock, State::Open));
    let mut moved = Machine::amd();
    moved.msrs.insert(0xc001_0112, 0x1000);
    assert_eq!(facts.contradiction(&moved.cpu(), &moved).unwrap().kind, Kind::AmdTseg);
    let qemu = Machine::qemu();
    assert_eq!(qemu.facts(None).contradiction(&qemu.cpu(), &qemu), None);
}

#[test]
fn a_table_that_is_cut_claims_nothing() {
    for change in [(0, b'X'), (4, 39), (4, 41)] {
        let mut table = WSMT;
        table[change.0] = change.1;
        assert_eq!(Machine::amd().facts(Some(&table)).state(Kind::Wsmt), State::Unknown);
    }
    assert_eq!(Machine::amd().facts(Some(&[])).state(Kind::Wsmt), State::Unknown);
    let mut part = WSMT;
    part[36] = 3;
    assert_eq!(Machine::amd().facts(Some(&part)).state(Kind::Wsmt), State::Open);
}

proptest! {
    #[test]
    fn no_register_value_panics(values: [u64; 12], pci: [u32; 7], wsmt: std::vec::Vec<u8>) {
        for mut machine in [Machine::qemu(), Machine::amd(), Machine::intel()] {
            machine.msrs.values_mut().zip(values).for_each(|(v, n)| *v = n);
            // Every register that a value may lead to.
            for index in [0x9b, 0x1f2, 0x1f3] {
                machine.msrs.entry(index).or_insert(0);
            }
            for (key, value) in [(0, 0x9c), (0, 0x50), (0xf8, 0x44), (0xf8, 0xa0), (0xf8, 0xdc)].into_iter().zip(pci) {
                machine.pci.insert(key, value);
            }
            let facts = machine.facts(Some(&wsmt));
            prop_assert_eq!(facts.measured().len(), 1 + 18 * facts.all().len());
            prop_assert!(facts.to_string().lines().all(|l| l.starts_with("SMM ") && l.len() < 100));
        }
    }
}
