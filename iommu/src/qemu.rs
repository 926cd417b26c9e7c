//! QEMU, its IOMMUs and its `edu` device, driven through QEMU's test protocol. The machine's own CPU halts at its first
//! instruction; a test takes some seconds.

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

use hv::io::{Clock, Mmio, PhysMem, PortIo};

use crate::{Platform, pci};

/// Where QEMU puts the registers of `amd-iommu` and `intel-iommu`.
pub const AMD_BASE: u64 = 0xfed8_0000;
pub const INTEL_BASE: u64 = 0xfed9_0000;
const RAM: u64 = 256 << 20;
const EDU_BAR: u32 = 0xfe00_0000;

struct Qemu {
    process: Child,
    pipes: RefCell<(ChildStdin, BufReader<ChildStdout>)>,
    start: Instant,
    config_address: Cell<u32>,
}

/// A handle that models can share.
#[derive(Clone)]
pub struct Handle(Rc<Qemu>);

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Handle {
    /// q35 with an IOMMU, with `edu` (bus master, registers at [`EDU_BAR`]), and `more` arguments.
    pub fn start(iommu: &str, more: &[&str]) -> Self {
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
    pub fn ask(&self, line: &str) -> String {
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

    pub fn number(&self, line: &str) -> u64 {
        let answer = self.ask(line);
        u64::from_str_radix(answer.trim_start_matches("0x"), 16).expect(line)
    }

    /// Has `edu` write 8 bytes to `address`; whether they arrived.
    pub fn dma(&self, address: u64) -> bool {
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

    /// The ACPI table of this name that QEMU made, out of its firmware configuration device.
    pub fn table(&self, name: [u8; 4]) -> Vec<u8> {
        const DIRECTORY: u16 = 0x19;
        let directory = self.firmware_file(DIRECTORY, 4 + 64 * 64);
        let file =
            directory[4..].chunks(64).find(|file| file[8..].starts_with(b"etc/acpi/tables\0")).unwrap();
        let size = u32::from_be_bytes(file[..4].try_into().unwrap());
        let tables = self.firmware_file(u16::from_be_bytes([file[4], file[5]]), size as usize);
        let at = tables.windows(4).position(|at| at == name).unwrap();
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
}

/// Bits of a configuration address that are zero for buses 0 and 1.
const HIGH_BUSES: u32 = 0xfe_0000;
/// The device that does DMA.
pub const EDU: u16 = 4 << 3;
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

/// The register window at a base.
pub struct Window(Handle, u64);

impl Mmio for Window {
    fn read8(&self, _: u32) -> u8 {
        panic!("not used")
    }
    fn read32(&self, offset: u32) -> u32 {
        self.0.number(&format!("readl {:#x}", self.1 + u64::from(offset))) as u32
    }
    fn read64(&self, offset: u32) -> u64 {
        self.0.number(&format!("readq {:#x}", self.1 + u64::from(offset)))
    }
    fn write8(&self, _: u32, _: u8) {
        panic!("not used")
    }
    fn write32(&self, offset: u32, value: u32) {
        self.0.ask(&format!("writel {:#x} {value:#x}", self.1 + u64::from(offset)));
    }
    fn write64(&self, offset: u32, value: u64) {
        self.0.ask(&format!("writeq {:#x} {value:#x}", self.1 + u64::from(offset)));
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

/// TCG's memory has no caches.
impl crate::vt_d::WriteBack for Handle {
    fn write_back(&self, _: hv::addr::PhysRange) {}
}

impl Platform for Handle {
    type Window = Window;

    fn map(&self, base: u64, _: u32) -> Option<Window> {
        [AMD_BASE, INTEL_BASE].contains(&base).then(|| Window(self.clone(), base))
    }

    fn random(&self) -> u64 {
        RandomState::new().hash_one(0)
    }
}
