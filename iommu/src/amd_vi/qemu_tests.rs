//! The same code against QEMU's `amd-iommu` and its `edu` device, driven through QEMU's test protocol. The machine's
//! own CPU halts at its first instruction; a test takes some seconds.

use std::cell::{Cell, RefCell};
use std::fmt::Write as _;
use std::hash::{BuildHasher, RandomState};
use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::rc::Rc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use hv::addr::PhysRange;
use hv::io::{Clock, Mmio, PhysMem, PortIo};

use super::defs::{Dte, control, dte, reg};
use super::{AmdVi, DmaArea, Error, Interrupts, Root, area, deny_all};
use crate::fault::Reason;
use crate::ivrs::{DeviceEntry, Ivrs};
use crate::model::Table;
use crate::{Platform, pci};

const BASE: u64 = 0xfed8_0000;
const RAM: u64 = 256 << 20;
const REGION: u64 = 128 << 20;
const CANARY: u64 = REGION + 0x1000;
const GAP_TABLE: u64 = 64 << 20;
const GUEST: u64 = 32 << 20;
const EDU_BAR: u32 = 0xfe00_0000;

struct Qemu {
    process: Child,
    pipes: RefCell<(ChildStdin, BufReader<ChildStdout>)>,
    start: Instant,
    config_address: Cell<u32>,
}

/// A handle that models can share.
#[derive(Clone)]
struct Handle(Rc<Qemu>);

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Handle {
    /// q35 with an IOMMU, with `edu` (bus master, registers at [`EDU_BAR`]), and `more` arguments.
    fn start(iommu: &str, more: &[&str]) -> Self {
        let firmware = halting_firmware();
        let mut process = Command::new("qemu-system-x86_64")
            .args(["-machine", "q35,accel=tcg", "-nodefaults", "-display", "none", "-m", "256M"])
            .args(["-qtest", "stdio", "-device", iommu, "-bios"])
            .arg(&firmware)
            .args(["-device", "edu,addr=4,dma_mask=0xffffffffffffffff"])
            .args(more)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("these tests need qemu-system-x86_64 (package qemu-system-x86)");
        let pipes = (process.stdin.take().unwrap(), BufReader::new(process.stdout.take().unwrap()));
        let pipes = RefCell::new(pipes);
        let qemu =
            Self(Rc::new(Qemu { process, pipes, start: Instant::now(), config_address: Cell::new(0) }));
        let edu = qemu.edu();
        assert_eq!(edu.read(0), 0x11e8_1234, "edu");
        // It answers, so it has read the file.
        std::fs::remove_file(firmware).unwrap();
        edu.write(0x10, EDU_BAR);
        edu.write(4, 6);
        qemu
    }

    fn edu(&self) -> pci::Function<'_, Self> {
        pci::Function::new(self, EDU)
    }

    /// Sends a line of the test protocol and returns the answer's value.
    fn ask(&self, line: &str) -> String {
        let mut pipes = self.0.pipes.borrow_mut();
        writeln!(pipes.0, "{line}").unwrap();
        let mut answer = String::new();
        loop {
            answer.clear();
            assert_ne!(pipes.1.read_line(&mut answer).unwrap(), 0, "QEMU ended at: {line}");
            // Lines of interrupt state come in between.
            if let Some(value) = answer.strip_prefix("OK") {
                return value.trim().to_owned();
            }
            assert!(answer.starts_with("IRQ"), "{line}: {answer}");
        }
    }

    fn number(&self, line: &str) -> u64 {
        let answer = self.ask(line);
        u64::from_str_radix(answer.trim_start_matches("0x"), 16).expect(line)
    }

    /// Has `edu` write 8 bytes to `address`; whether they arrived.
    fn dma(&self, address: u64) -> bool {
        const BUFFER: u64 = 0x40000;
        const RUN_TO_MEMORY: u64 = 0b11;
        let mut before = [0; 8];
        self.read(address, &mut before);
        self.write(address, &[0x55; 8]);
        let edu = u64::from(EDU_BAR);
        for (register, value) in [(0x80, BUFFER), (0x88, address), (0x90, 8), (0x98, RUN_TO_MEMORY)] {
            self.ask(&format!("writeq {:#x} {value:#x}", edu + register));
        }
        // It takes 100 ms of the machine's time.
        while self.number(&format!("readq {:#x}", edu + 0x98)) & 1 != 0 {
            sleep(Duration::from_millis(5));
        }
        let mut found = [0; 8];
        self.read(address, &mut found);
        self.write(address, &before);
        found != [0x55; 8]
    }

    /// The IVRS that QEMU made, out of its firmware configuration device.
    fn own_ivrs(&self) -> Vec<u8> {
        const DIRECTORY: u16 = 0x19;
        let directory = self.firmware_file(DIRECTORY, 4 + 64 * 64);
        let file =
            directory[4..].chunks(64).find(|file| file[8..].starts_with(b"etc/acpi/tables\0")).unwrap();
        let size = u32::from_be_bytes(file[..4].try_into().unwrap());
        let tables = self.firmware_file(u16::from_be_bytes([file[4], file[5]]), size as usize);
        let at = tables.windows(4).position(|name| name == b"IVRS").unwrap();
        let length = u32::from_le_bytes(tables[at + 4..at + 8].try_into().unwrap());
        tables[at..at + length as usize].to_vec()
    }

    fn firmware_file(&self, key: u16, size: usize) -> Vec<u8> {
        const REQUEST: u64 = 0x1000;
        const BUFFER: u64 = 0x10_0000;
        const SELECT_AND_READ: u32 = 0b1010;
        let mut request = ((u32::from(key) << 16) | SELECT_AND_READ).to_be_bytes().to_vec();
        request.extend((size as u32).to_be_bytes());
        request.extend(BUFFER.to_be_bytes());
        self.write(REQUEST, &request);
        self.out32(0x514, 0);
        self.out32(0x518, (REQUEST as u32).swap_bytes());
        let mut out = vec![0; size];
        for (at, part) in (BUFFER..).step_by(4096).zip(out.chunks_mut(4096)) {
            self.read(at, part);
        }
        out
    }

    fn entry(&self, table: u64, device: u16, entry: Dte) {
        self.write(table + 32 * u64::from(device), &super::dte_bytes(entry));
    }

    fn window(&self) -> Window {
        self.map(BASE, 0x4000).unwrap()
    }

    fn iommu(&self) -> u16 {
        pci::functions(self).find(|function| function.class() == 0x0806).unwrap().id
    }

    fn launch(&self) -> Result<AmdVi<Window>, Error> {
        deny_all(self, &self.own_ivrs(), dma_area(), &[region()])
    }

    /// The gap turned the IOMMU on, let `edu` through, and had it use that.
    fn gap_left_it_on(&self) {
        self.entry(GAP_TABLE, EDU, OPEN);
        self.window().write64(reg::DEVICE_TABLE, GAP_TABLE | 0x1ff);
        self.window().write64(reg::CONTROL, control::ENABLE);
        assert!(self.dma(CANARY));
    }
}

/// Bits of a configuration address that are zero for buses 0 and 1.
const HIGH_BUSES: u32 = 0xfe_0000;
const EDU: u16 = 4 << 3;
const OPEN: Dte = [dte::VALID | dte::TRANSLATION_VALID | dte::READ | dte::WRITE, 0, 0, 0];

fn region() -> PhysRange {
    PhysRange::new(REGION, 16 << 20).unwrap()
}

fn dma_area() -> DmaArea {
    DmaArea::at_top_of(&region()).unwrap()
}

/// Writes a ROM whose reset vector holds `cli; hlt; jmp` back: QEMU wants some firmware.
fn halting_firmware() -> PathBuf {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let mut rom = vec![0xf4; 0x1_0000];
    rom[0xfff0..0xfff4].copy_from_slice(&[0xfa, 0xf4, 0xeb, 0xfd]);
    let name = format!("cordon-halt-{}-{}.rom", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
    let path = std::env::temp_dir().join(name);
    std::fs::write(&path, rom).unwrap();
    path
}

struct Window(Handle);

impl Mmio for Window {
    fn read8(&self, _: u32) -> u8 {
        panic!("not used")
    }
    fn read32(&self, _: u32) -> u32 {
        panic!("not used")
    }
    fn read64(&self, offset: u32) -> u64 {
        self.0.number(&format!("readq {:#x}", BASE + u64::from(offset)))
    }
    fn write8(&self, _: u32, _: u8) {
        panic!("not used")
    }
    fn write32(&self, _: u32, _: u32) {
        panic!("not used")
    }
    fn write64(&self, offset: u32, value: u64) {
        self.0.ask(&format!("writeq {:#x} {value:#x}", BASE + u64::from(offset)));
    }
}

impl PortIo for Handle {
    fn in8(&self, _: u16) -> u8 {
        panic!("not used")
    }
    fn in16(&self, _: u16) -> u16 {
        panic!("not used")
    }
    fn in32(&self, port: u16) -> u32 {
        // These machines have no bus 2 and above: not to ask 65,000 times saves most of the test's time.
        if port == 0xcfc && self.0.config_address.get() & HIGH_BUSES != 0 {
            return u32::MAX;
        }
        self.number(&format!("inl {port:#x}")) as u32
    }
    fn out8(&self, _: u16, _: u8) {
        panic!("not used")
    }
    fn out16(&self, _: u16, _: u16) {
        panic!("not used")
    }
    fn out32(&self, port: u16, value: u32) {
        if port == 0xcf8 {
            self.0.config_address.set(value);
            if value & HIGH_BUSES != 0 {
                return;
            }
        }
        self.ask(&format!("outl {port:#x} {value:#x}"));
    }
}

impl Clock for Handle {
    fn now_us(&self) -> u64 {
        self.0.start.elapsed().as_micros() as u64
    }
}

impl PhysMem for Handle {
    fn read(&self, address: u64, out: &mut [u8]) -> bool {
        let answer = self.ask(&format!("read {address:#x} {:#x}", out.len()));
        for (byte, digits) in out.iter_mut().zip(answer.as_bytes()[2..].chunks(2)) {
            *byte = u8::from_str_radix(str::from_utf8(digits).unwrap(), 16).unwrap();
        }
        address + (out.len() as u64) <= RAM
    }
    fn write(&self, address: u64, data: &[u8]) -> bool {
        let mut line = format!("write {address:#x} {:#x} 0x", data.len());
        for byte in data {
            write!(line, "{byte:02x}").unwrap();
        }
        self.ask(&line);
        address + (data.len() as u64) <= RAM
    }
}

impl Platform for Handle {
    type Window = Window;

    fn map(&self, base: u64, _: u32) -> Option<Window> {
        (base == BASE).then(|| Window(self.clone()))
    }

    fn random(&self) -> u64 {
        RandomState::new().hash_one(0)
    }
}

#[test]
fn qemu_is_closed_whatever_the_gap_left() {
    let qemu = Handle::start("amd-iommu,intremap=on", &[]);
    assert!(qemu.dma(CANARY), "open after reset");
    qemu.gap_left_it_on();

    let all = qemu.launch().unwrap();
    assert_eq!(all.devices().collect::<Vec<_>>(), [qemu.iommu()]);
    for address in [CANARY, CANARY + 0x1000, GAP_TABLE, dma_area().entry(EDU.into())] {
        assert!(!qemu.dma(address), "{address:#x}");
    }

    let mut all = AmdVi::take_over(&qemu, &qemu.own_ivrs(), dma_area(), &[region()], 1).unwrap();
    let table = qemu.own_ivrs();
    let choice = Interrupts::for_machine(&Ivrs::new(&table).unwrap());
    assert_eq!(choice, Interrupts::Ordinary);
    // Two levels reach 1 GiB; one leaf of 2 MiB.
    let leaf = GUEST | 1 | dte::READ | dte::WRITE;
    qemu.write(REGION + 0x2000 + 8 * (GUEST >> 21), &leaf.to_le_bytes());
    all.open_guest(&qemu, Root { table: REGION + 0x2000, levels: 2 }, choice).unwrap();
    assert!(qemu.dma(GUEST) && qemu.dma(GUEST + 0x1f_fff8));
    assert!(!qemu.dma(GUEST - 8) && !qemu.dma(GUEST + 0x20_0000) && !qemu.dma(CANARY));

    // QEMU logs a level that is not present, but not an entry of all zeros; 7.2 takes its log for overflowed always,
    // and logs nothing.
    let absent = GUEST + 0x40_0000;
    qemu.write(REGION + 0x2000 + 8 * (absent >> 21), &u64::to_le_bytes(1 << 9));
    assert!(!qemu.dma(absent));
    let mut events = vec![];
    all.drain(&qemu, |fault| events.push((fault.reason, fault.source, fault.address))).unwrap();
    assert!(events.is_empty() || events == [(Reason::Denied, EDU.into(), absent)], "{events:x?}");

    all.close(&qemu).unwrap();
    assert!(!qemu.dma(GUEST) && !qemu.dma(GUEST + 0x1000));
}

#[test]
fn qemu_blocks_by_a_table_that_is_nowhere_and_remembers_what_it_cached() {
    let qemu = Handle::start("amd-iommu,intremap=off", &[]);
    qemu.gap_left_it_on();
    for random in [0, 1, 4095] {
        qemu.window().write64(reg::DEVICE_TABLE, area::nowhere(random));
        assert!(!qemu.dma(CANARY + 0x1000), "nothing is readable there, so nothing passes");
        assert!(qemu.dma(CANARY), "but for what is cached: step 2 is needed");
    }
    qemu.launch().unwrap();
    assert!(!qemu.dma(CANARY));
    // Without interrupt remapping QEMU lists no I/O APIC.
    let table = qemu.own_ivrs();
    assert_eq!(Interrupts::for_machine(&Ivrs::new(&table).unwrap()), Interrupts::Unchecked);
}

#[test]
fn qemu_lets_a_bar_answer_for_the_table_so_bars_are_checked() {
    let memory = "memory-backend-memfd,id=bar,size=8G,share=on";
    let qemu = Handle::start("amd-iommu", &["-object", memory, "-device", "ivshmem-plain,memdev=bar,addr=5"]);
    let shared = pci::Function::new(&qemu, 5 << 3);
    shared.write(0x18, 0);
    shared.write(0x1c, 0x000f_fffe);
    shared.write(4, 2);
    qemu.window().write64(reg::DEVICE_TABLE, area::nowhere(0));
    qemu.window().write64(reg::CONTROL, control::ENABLE);
    assert!(qemu.dma(CANARY), "the region holds zeros, and a zero entry lets pass");
    assert_eq!(qemu.launch().err(), Some(Error::Claimed { device: 5 << 3, register: 0x18 }));
    shared.write(0x1c, 0x0000_0010);
    assert!(qemu.launch().is_ok());
}

#[test]
fn qemu_says_the_same_by_ivrs_and_by_pci() {
    let qemu = Handle::start("amd-iommu,intremap=on", &["-device", "pcie-root-port,addr=6"]);
    let table = qemu.own_ivrs();
    let ivrs = Ivrs::new(&table).unwrap();
    let units: Vec<_> = ivrs.units().map(|unit| (unit.kind(), unit.device(), unit.base())).collect();
    assert_eq!(units, [(0x10, qemu.iommu(), BASE)]);
    let io_apic = DeviceEntry::Special { device: 0xa0, handle: 0, variety: 1, flags: 0 };
    assert!(ivrs.units().all(|unit| unit.entries().any(|entry| entry == io_apic)));

    let hidden = deny_all(&qemu, &Table::new().finish(), dma_area(), &[]);
    assert_eq!(hidden.err(), Some(Error::Unlisted { device: qemu.iommu() }));
    let moved = Table::new().unit(0x10, qemu.iommu(), GAP_TABLE, 0, &[]).finish();
    let error = deny_all(&qemu, &moved, dma_area(), &[]).err().unwrap();
    assert!(matches!(error, Error::BaseDiffers { capability: BASE, .. }), "{error}");
}
