//! What GETSEC\[SENTER\] and SINIT do: check what the loader left, measure, log, and tell the MLE.
//!
//! Spec: \[TXT\] "Measured Launch", "TXT Heap Memory", "TPM 2.0 PCR Usage"; offsets of heap tables count from behind their size word.

use anyhow::{Result, bail, ensure};
use sha1::Sha1;
use sha2::{Digest, Sha256, Sha384, Sha512};

use super::crb::Chip;
use super::layout as at;
use super::{Fault, Target, acm, vt_d};
use crate::swtpm::Control;

/// Classes of errors in TXT.ERRORCODE.
mod class {
    pub const ENTRY: u32 = 1;
    pub const HEAP: u32 = 9;
    pub const PMR: u32 = 0xe;
    pub const MLE_HEADER: u32 = 0xf;
    pub const MLE_PAGES: u32 = 0x10;
    pub const LOG: u32 = 0x14;
}

/// TXT.ERRORCODE of a launch that succeeded.
const SUCCESS: u64 = 0xc000_0001;
const PAGE: u64 = 0x1000;
const UUID: [u32; 4] = [0x9082_ac5a, 0x74a7_476f, 0xa255_5c0f, 0x42b6_51cb];
/// PMRs come in pieces of 2 MiB.
const PMR_UNIT: u64 = 0x20_0000;
/// Where the extended elements of OsSinitData begin.
const ELEMENTS: u64 = 92;

/// Registers of the CPU that executes GETSEC\[SENTER\].
#[derive(Clone, Copy, Debug)]
pub struct Senter {
    /// Base of the module.
    pub ebx: u64,
    /// Its size.
    pub ecx: u64,
    /// Parameters.
    pub edx: u64,
}

/// The machine's memory as its board knows it.
pub struct Memory {
    /// End of RAM below 4 GiB.
    pub low_end: u64,
    /// The DMAR as the firmware has it, if the board has an IOMMU.
    pub dmar: Vec<u8>,
}

/// A launch that SINIT allows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Launch {
    /// Physical address of the MLE's first instruction.
    pub entry: u64,
    /// Physical address of its page tables.
    pub page_tables: u64,
    /// Physical address of its first page.
    pub base: u64,
    /// The measured pages.
    pub image: Vec<u8>,
    /// What PCR 17 and 18 hold afterwards, for each bank by its name.
    pub pcrs: Vec<(&'static str, [Vec<u8>; 2])>,
    /// Protected memory: base and size, low and high.
    pub protected: [(u64, u64); 2],
}

/// SINIT's answer.
pub type Verdict = std::result::Result<Launch, Refusal>;

/// A platform reset with this in TXT.ERRORCODE.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// TXT.ERRORCODE.
    pub code: u32,
    /// In words.
    pub why: String,
}

fn refuse<T>(class: u32, major: u32, why: impl Into<String>) -> Result<std::result::Result<T, Refusal>> {
    let code = 0xc000_0001 | class << 4 | major << 10;
    Ok(Err(Refusal { code, why: why.into() }))
}

/// Takes the value of a step, or ends with its refusal.
macro_rules! step {
    ($verdict:expr) => {
        match $verdict? {
            Ok(value) => value,
            Err(refusal) => return Ok(Err(refusal)),
        }
    };
}

/// A hash algorithm with a PCR bank.
#[derive(Clone, Copy)]
struct Bank {
    name: &'static str,
    id: u16,
    hash: fn(&[u8]) -> Vec<u8>,
}

const BANKS: [Bank; 4] = [
    Bank { name: "sha1", id: 0x04, hash: |data| Sha1::digest(data).to_vec() },
    Bank { name: "sha256", id: 0x0b, hash: |data| Sha256::digest(data).to_vec() },
    Bank { name: "sha384", id: 0x0c, hash: |data| Sha384::digest(data).to_vec() },
    Bank { name: "sha512", id: 0x0d, hash: |data| Sha512::digest(data).to_vec() },
];

/// The banks that the machine's TPM has, from their names with commas in between.
fn banks(names: &str) -> Vec<Bank> {
    names.split(',').filter_map(|name| BANKS.into_iter().find(|bank| bank.name == name)).collect()
}

/// The loader's tables, as far as they are used.
struct Heap {
    os_sinit: u64,
    os_sinit_size: u64,
}

impl Heap {
    fn find(machine: &mut impl Target) -> Result<std::result::Result<Self, Refusal>> {
        let end = at::HEAP_BASE + at::HEAP_SIZE;
        let mut table = at::HEAP_BASE;
        for (major, name) in [(1, "BiosData"), (2, "OsMleData"), (3, "OsSinitData")] {
            let size = machine.read64(table)?;
            if size < 8 || !size.is_multiple_of(8) || size > end - table {
                let room = end - table;
                return refuse(
                    class::HEAP,
                    major,
                    format!("{name}: size {size:#x}, not a multiple of 8 from 8 to {room:#x}"),
                );
            }
            if name == "OsSinitData" {
                return Ok(Ok(Self { os_sinit: table + 8, os_sinit_size: size - 8 }));
            }
            table += size;
        }
        unreachable!("three tables")
    }
}

/// Plays the event up to the MLE's first instruction, but for the state of the CPUs.
pub fn launch(
    machine: &mut impl Target,
    control: &Control,
    chip: &mut impl Chip,
    memory: &Memory,
    active: &str,
    senter: Senter,
) -> Result<Verdict> {
    let module = step!(check_module(machine, senter));
    let heap = step!(Heap::find(machine));
    if heap.os_sinit_size < ELEMENTS + 8 {
        return refuse(class::HEAP, 3, format!("OsSinitData: {} bytes", heap.os_sinit_size));
    }
    let version = machine.read32(heap.os_sinit)?;
    if version != 7 {
        return refuse(class::HEAP, 4, format!("OsSinitData: version {version} with TPM 2.0"));
    }
    let capabilities = machine.read32(heap.os_sinit + 80)?;
    if capabilities & !acm::CAPABILITIES != 0 || capabilities & 0x30 != 0 {
        return refuse(class::HEAP, 5, format!("OsSinitData: capabilities {capabilities:#x}"));
    }
    let mut protected = [(0, 0); 2];
    for (index, range) in protected.iter_mut().enumerate() {
        let field = heap.os_sinit + 32 + 16 * index as u64;
        *range = (machine.read64(field)?, machine.read64(field + 8)?);
        if !range.0.is_multiple_of(PMR_UNIT) || !range.1.is_multiple_of(PMR_UNIT) {
            return refuse(class::PMR, 1, format!("PMR of {:#x} bytes at {:#x}", range.1, range.0));
        }
    }
    let mle = step!(Mle::check(machine, &heap, memory, protected[0]));

    // The CPU's part for the TPM, at locality 4: digest of the module, then SENTER's parameters.
    let start = [acm::digest(&module), (senter.edx as u32).to_le_bytes().to_vec()].concat();
    control.drtm_hash(&start)?;
    let banks = banks(active);
    let mut record = Record { banks: &banks, log: Vec::new(), pcrs: Vec::new() };
    record.begin();
    record.started(&start);
    let word = |value: u32| value.to_le_bytes().to_vec();
    let key = Sha256::digest(&module[128..128 + 256]).to_vec();
    // BIOSAC_REG, SCRTM, LCP_CONTROL, STM, OSSINIT_CAP, SINIT_PUBKEY: what each says is what is hashed.
    let events = [
        (17, 0x40a, vec![0; 20]),
        (17, 0x40b, word(0)),
        (17, 0x40c, word(0)),
        (17, 0x40e, vec![0]),
        (17, 0x40f, word(capabilities)),
        (17, 0x404, mle.image.clone()),
        (18, 0x410, key),
        (18, 0x40b, word(0)),
        (18, 0x40f, word(capabilities)),
        (18, 0x40c, word(0)),
    ];
    for (pcr, kind, data) in events {
        let digests: Vec<_> = banks.iter().map(|bank| (bank.hash)(&data)).collect();
        // The image is not repeated in the log.
        let event = if kind == 0x404 { Vec::new() } else { data };
        extend(chip, pcr, &banks, &digests)?;
        record.event(pcr, kind, &digests, &event);
    }
    step!(write_log(machine, &heap, &record.log));
    let pcrs = record.pcrs;
    if !memory.dmar.is_empty() {
        vt_d::protect(machine, protected)?;
    }
    write_sinit_mle_data(machine, &heap, memory)?;
    machine.set_register(at::ERRORCODE, SUCCESS)?;
    let status = at::STS_SENTER_DONE | at::STS_PRIVATE_OPEN | at::STS_LOCALITY2_OPEN;
    machine.set_register(at::STS, status.into())?;
    let Mle { entry, page_tables, base, image } = mle;
    Ok(Ok(Launch { entry, page_tables, base, image, pcrs, protected }))
}

fn check_module(machine: &mut impl Target, senter: Senter) -> Result<std::result::Result<Vec<u8>, Refusal>> {
    let Senter { ebx, ecx, .. } = senter;
    if machine.read32(at::PUBLIC + at::STS)? & at::STS_SENTER_DONE != 0 {
        return refuse(class::ENTRY, 1, "SENTER after SENTER");
    }
    if machine.read32(at::PUBLIC + at::ESTS)? & 1 != 0 {
        return refuse(class::ENTRY, 2, "TXT_RESET.STS is set");
    }
    if ebx != at::SINIT_BASE || !(0x400..=at::SINIT_SIZE).contains(&ecx) || !ecx.is_multiple_of(64) {
        return refuse(class::ENTRY, 3, format!("module of {ecx:#x} bytes at {ebx:#x}"));
    }
    let module = machine.read(ebx, ecx as usize)?;
    if module != acm::module() {
        return refuse(class::ENTRY, 4, "the module's signature does not fit it");
    }
    Ok(Ok(module))
}

/// The MLE as its page tables describe it.
struct Mle {
    entry: u64,
    page_tables: u64,
    base: u64,
    image: Vec<u8>,
}

impl Mle {
    /// Spec: \[TXT\] "MLE Page Table Format": PDPT, directories, tables and pages each in rising order, no gaps in linear memory.
    fn check(
        machine: &mut impl Target,
        heap: &Heap,
        memory: &Memory,
        protected: (u64, u64),
    ) -> Result<std::result::Result<Self, Refusal>> {
        let page_tables = machine.read64(heap.os_sinit + 8)?;
        let size = machine.read64(heap.os_sinit + 16)?;
        let header = machine.read64(heap.os_sinit + 24)?;
        if size == 0 || size > 1 << 24 || !size.is_multiple_of(PAGE) {
            return refuse(class::MLE_PAGES, 1, format!("MLE size {size:#x}"));
        }
        let usable = |page: u64| {
            let isa = (0xa_0000..0x10_0000).contains(&page);
            let dpr = (at::DPR_BASE..at::DPR_BASE + at::DPR_SIZE).contains(&page);
            page.is_multiple_of(PAGE) && page != 0 && page + PAGE <= memory.low_end && !isa && !dpr
        };
        let covered = |page: u64| page >= protected.0 && page + PAGE <= protected.0 + protected.1;
        let mut last = 0;
        let mut next = |what: &str, page: u64, must_rise: bool| {
            if !usable(page) {
                let end = memory.low_end;
                return refuse(
                    class::MLE_PAGES,
                    2,
                    format!(
                        "{what} at {page:#x}: not in usable memory, 0x1000 to 0xa0000 and 0x100000 to {end:#x}"
                    ),
                );
            }
            if must_rise && page <= last {
                return refuse(
                    class::MLE_PAGES,
                    3,
                    format!("{what} at {page:#x}: not above the one before, at {last:#x}"),
                );
            }
            if !covered(page) {
                let (base, size) = protected;
                return refuse(
                    class::PMR,
                    2,
                    format!("{what} at {page:#x}: not in the protected range, {size:#x} bytes at {base:#x}"),
                );
            }
            last = page;
            Ok(Ok(()))
        };
        step!(next("page tables", page_tables, true));
        let entry_of = |value: u64| (value & 1 == 1).then_some(value & 0xffff_ffff_f000);
        let (mut directory, mut table) = (0, 0);
        let mut pages = Vec::new();
        for index in 0..size / PAGE {
            if index.is_multiple_of(512 * 512) {
                let entry = machine.read64(page_tables + 8 * (index / (512 * 512)))?;
                let Some(at) = entry_of(entry) else {
                    return refuse(class::MLE_PAGES, 4, format!("PDPT entry {entry:#x}"));
                };
                step!(next("directory", at, true));
                directory = at;
            }
            if index.is_multiple_of(512) {
                let entry = machine.read64(directory + 8 * (index / 512 % 512))?;
                let Some(at) = entry_of(entry).filter(|_| entry & 0x80 == 0) else {
                    return refuse(class::MLE_PAGES, 5, format!("directory entry {entry:#x}"));
                };
                step!(next("table", at, true));
                table = at;
            }
            let entry = machine.read64(table + 8 * (index % 512))?;
            let Some(at) = entry_of(entry) else {
                return refuse(class::MLE_PAGES, 6, format!("entry of page {index}: {entry:#x}"));
            };
            step!(next("page", at, true));
            pages.push(at);
        }
        let mut image = Vec::new();
        for &page in &pages {
            image.extend(machine.read(page, PAGE as usize)?);
        }
        let word = |offset: u64| {
            let at = offset as usize;
            image.get(at..at + 4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
        };
        let field = |index: u64| header.checked_add(4 * index).and_then(word);
        if (0..4).any(|i| field(i) != Some(UUID[i as usize])) || field(4) != Some(52) {
            return refuse(class::MLE_HEADER, 1, format!("no MLE header at {header:#x}"));
        }
        let first = u64::from(field(7).unwrap_or(u32::MAX));
        let entry = u64::from(field(6).unwrap_or(u32::MAX));
        let start = pages.get((entry / PAGE) as usize).map(|page| page + entry % PAGE);
        let (Some(start), true) = (start, first.is_multiple_of(PAGE)) else {
            return refuse(class::MLE_HEADER, 2, format!("entry point {entry:#x}, first page {first:#x}"));
        };
        Ok(Ok(Self { entry: start, page_tables, base: pages[0], image }))
    }
}

/// One TPM2_PCR_Extend at locality 3.
fn extend(chip: &mut impl Chip, pcr: u32, banks: &[Bank], digests: &[Vec<u8>]) -> Result<()> {
    const SESSIONS: u16 = 0x8002;
    const PCR_EXTEND: u32 = 0x182;
    const PASSWORD: u32 = 0x4000_0009;
    let mut body = PCR_EXTEND.to_be_bytes().to_vec();
    body.extend(pcr.to_be_bytes());
    body.extend(9u32.to_be_bytes());
    body.extend(PASSWORD.to_be_bytes());
    body.extend([0; 5]);
    body.extend((banks.len() as u32).to_be_bytes());
    for (bank, digest) in banks.iter().zip(digests) {
        body.extend(bank.id.to_be_bytes());
        body.extend(digest);
    }
    let mut command = SESSIONS.to_be_bytes().to_vec();
    command.extend((body.len() as u32 + 6).to_be_bytes());
    command.extend(body);
    let response = chip.command(3, &command)?;
    ensure!(response[6..10] == [0; 4], "SINIT's extend of PCR {pcr}: {}", hex::encode(&response));
    Ok(())
}

/// SINIT's log, and what the PCRs should be by it.
///
/// Spec: \[PFP\] "TCG_EfiSpecIDEvent", "TCG_PCR_EVENT2".
struct Record<'a> {
    banks: &'a [Bank],
    log: Vec<u8>,
    pcrs: Vec<(&'static str, [Vec<u8>; 2])>,
}

impl Record<'_> {
    fn begin(&mut self) {
        const NO_ACTION: u32 = 3;
        let mut event = b"Spec ID Event03\0".to_vec();
        event.extend([0, 0, 0, 0, 0, 2, 0, 2]);
        event.extend((self.banks.len() as u32).to_le_bytes());
        for bank in self.banks {
            let size = (bank.hash)(&[]).len();
            event.extend(bank.id.to_le_bytes());
            event.extend((size as u16).to_le_bytes());
            self.pcrs.push((bank.name, [vec![0; size], vec![0; size]]));
        }
        event.push(0);
        self.log.extend(0u32.to_le_bytes());
        self.log.extend(NO_ACTION.to_le_bytes());
        self.log.extend([0; 20]);
        self.log.extend((event.len() as u32).to_le_bytes());
        self.log.extend(event);
    }

    /// What the CPU did: the TPM itself hashed `data` into PCR 17.
    fn started(&mut self, data: &[u8]) {
        const HASH_START: u32 = 0x402;
        let digests: Vec<_> = self.banks.iter().map(|bank| (bank.hash)(data)).collect();
        self.event(17, HASH_START, &digests, data);
    }

    fn event(&mut self, pcr: u32, kind: u32, digests: &[Vec<u8>], data: &[u8]) {
        self.log.extend(pcr.to_le_bytes());
        self.log.extend(kind.to_le_bytes());
        self.log.extend((digests.len() as u32).to_le_bytes());
        for ((bank, digest), (_, pcrs)) in self.banks.iter().zip(digests).zip(&mut self.pcrs) {
            self.log.extend(bank.id.to_le_bytes());
            self.log.extend(digest);
            let value = &mut pcrs[pcr as usize - 17];
            *value = (bank.hash)(&[value.as_slice(), digest].concat());
        }
        self.log.extend((data.len() as u32).to_le_bytes());
        self.log.extend(data);
    }
}

/// Puts the log where the loader's element says. Spec: \[TXT\] "HEAP_EVENT_LOG_POINTER_ELEMENT2_1".
fn write_log(machine: &mut impl Target, heap: &Heap, log: &[u8]) -> Result<std::result::Result<(), Refusal>> {
    const LOG_ELEMENT: u32 = 8;
    let mut offset = ELEMENTS;
    while offset + 8 <= heap.os_sinit_size {
        let element = heap.os_sinit + offset;
        let (kind, size) = (machine.read32(element)?, machine.read32(element + 4)?);
        if kind == LOG_ELEMENT {
            let (area, room) = (machine.read64(element + 8)?, machine.read32(element + 16)?);
            if size != 28 || (room as usize) < log.len() {
                return refuse(class::LOG, 1, format!("element of {size} bytes, area of {room}"));
            }
            machine.write(area, log)?;
            machine.write32(element + 20, 0)?;
            machine.write32(element + 24, log.len() as u32)?;
            return Ok(Ok(()));
        }
        if kind == 0 || size < 8 {
            break;
        }
        offset += u64::from(size);
    }
    refuse(class::LOG, 2, "OsSinitData has no event log element")
}

/// Spec: \[TXT\] "SINIT to MLE Data Format", version 9.
fn write_sinit_mle_data(machine: &mut impl Target, heap: &Heap, memory: &Memory) -> Result<()> {
    const FIXED: usize = 148;
    const RANGES: [u8; 2] = [0, 3];
    let mut data = vec![0; FIXED];
    // The end of the extended elements.
    data.extend([0, 0, 0, 0, 8, 0, 0, 0]);
    data.resize(data.len().next_multiple_of(8), 0);
    // Offsets count from the size word.
    let ranges = data.len() + 8;
    let all = [
        (0x1000, 0x9_f000),
        (0x10_0000, at::DPR_BASE - 0x10_0000),
        (at::DPR_BASE + at::DPR_SIZE, memory.low_end - at::DPR_BASE - at::DPR_SIZE),
    ];
    for (base, size) in all {
        data.extend(u64::to_le_bytes(base));
        data.extend(u64::to_le_bytes(size));
        data.extend([RANGES[0], 0, 0, 0, 0, 0, 0, 0]);
    }
    let dmar = data.len() + 8;
    data.extend(&memory.dmar);
    data.resize(data.len().next_multiple_of(8), 0);
    let mut put = |offset: usize, value: u32| {
        data[offset..offset + 4].copy_from_slice(&value.to_le_bytes());
    };
    put(0, 9);
    put(120, (at::SINIT_BASE + acm::WAKEUP) as u32);
    put(128, all.len() as u32);
    put(132, ranges as u32);
    put(136, memory.dmar.len() as u32);
    put(140, if memory.dmar.is_empty() { 0 } else { dmar as u32 });
    let table = heap.os_sinit + heap.os_sinit_size;
    machine.write(table, &(data.len() as u64 + 8).to_le_bytes())?;
    machine.write(table + 8, &data)
}

/// Spoils what the loader left, or what the board has, as the fault says: before SINIT looks at it.
pub fn spoil(machine: &mut impl Target, fault: Fault) -> Result<()> {
    let Ok(heap) = Heap::find(machine)? else { return Ok(()) };
    let leaf = |machine: &mut dyn FnMut(u64) -> Result<u64>| -> Result<u64> {
        let mut at = machine(heap.os_sinit + 8)?;
        for _ in 0..2 {
            at = machine(at)? & 0xffff_ffff_f000;
        }
        Ok(at)
    };
    match fault {
        Fault::MleTables => {
            let table = leaf(&mut |at| machine.read64(at))?;
            let first = machine.read(table, 16)?;
            machine.write(table, &[&first[8..], &first[..8]].concat())
        }
        Fault::MleHole => {
            let table = leaf(&mut |at| machine.read64(at))?;
            machine.write(table + 8, &0xa_0001u64.to_le_bytes())
        }
        Fault::HeapSize => {
            let bios = machine.read64(at::HEAP_BASE)?;
            machine.write(at::HEAP_BASE + bios, &(at::HEAP_SIZE + 8).to_le_bytes())
        }
        Fault::PmrUncovering => machine.write(heap.os_sinit + 40, &PMR_UNIT.to_le_bytes()),
        Fault::StaleError | Fault::DmarChanged | Fault::RlpMissing => Ok(()),
    }
}

/// Changes the DMAR in ACPI's memory, as a device could: its unit's registers seem to be elsewhere, a page on. Gives where.
/// SINIT has its copy by then.
pub fn change_dmar(machine: &mut impl Target) -> Result<u64> {
    /// Where the entries of an XSDT begin, and the structures of a DMAR.
    const ENTRIES: u64 = 36;
    const STRUCTURES: u64 = 48;
    /// Where a unit's structure has the base of its registers.
    const REGISTERS: u64 = 8;
    let Ok(heap) = Heap::find(machine)? else { bail!("no heap") };
    let rsdp = machine.read64(heap.os_sinit + 84)?;
    let xsdt = machine.read64(rsdp + 24)?;
    let length = u64::from(machine.read32(xsdt + 4)?);
    for entry in (ENTRIES..length).step_by(8) {
        let table = machine.read64(xsdt + entry)?;
        if machine.read(table, 4)? == b"DMAR" {
            let base = table + STRUCTURES + REGISTERS;
            let elsewhere = machine.read64(base)? + PAGE;
            machine.write(base, &elsewhere.to_le_bytes())?;
            // The sum over the table stays.
            let sum = machine.read(table + 9, 1)?[0];
            machine.write(table + 9, &[sum.wrapping_sub((PAGE >> 8) as u8)])?;
            return Ok(elsewhere);
        }
    }
    bail!("no DMAR")
}

#[cfg(test)]
mod tests {
    use super::super::fake::Memory as Fake;
    use super::super::{firmware, probe};
    use super::*;
    use crate::board::Board as Records;
    use crate::swtpm::fake_tpm;

    /// A TPM that remembers which PCRs were extended, at which locality.
    #[derive(Default)]
    struct Extended(Vec<(u8, u32)>);
    impl Chip for Extended {
        fn command(&mut self, locality: u8, command: &[u8]) -> Result<Vec<u8>> {
            assert_eq!(command[2..6], (command.len() as u32).to_be_bytes());
            self.0.push((locality, u32::from_be_bytes(command[10..14].try_into()?)));
            Ok(vec![0x80, 2, 0, 0, 0, 10, 0, 0, 0, 0])
        }
    }

    fn board() -> Fake {
        let mut records = Records::default();
        firmware(&mut records, 2, None);
        probe::prepare(&mut records, super::super::bios_data(2).len() as u64);
        let mut memory = Fake::default();
        records.apply(&mut memory).unwrap();
        memory
    }

    fn play(memory: &mut Fake, fault: Option<Fault>, banks: &str) -> (Verdict, Extended) {
        if let Some(fault) = fault {
            spoil(memory, fault).unwrap();
        }
        let (control, _) = fake_tpm(0);
        let mut chip = Extended::default();
        let senter = Senter { ebx: at::SINIT_BASE, ecx: acm::module().len() as u64, edx: 0 };
        let board = Memory { low_end: 0xc000_0000, dmar: vec![7; 64] };
        (launch(memory, &control, &mut chip, &board, banks, senter).unwrap(), chip)
    }

    #[test]
    fn a_launch_is_measured_logged_and_told_to_the_mle() {
        let mut memory = board();
        let (verdict, chip) = play(&mut memory, None, "sha1,sha256");
        let launch = verdict.unwrap();
        assert_eq!(
            (launch.entry, launch.base, launch.image.len()),
            (probe::BASE + 0x40, probe::BASE, 0x2000)
        );
        assert_eq!(chip.0, [[(3, 17); 6].as_slice(), &[(3, 18); 4]].concat());
        // The log, as another reader takes it, leads to the values that the player expects.
        let log = memory.read(0x2001_0000, 0x1000).unwrap();
        let os_sinit = Heap::find(&mut memory).unwrap().unwrap();
        let used = memory.read32(os_sinit.os_sinit + ELEMENTS + 24).unwrap();
        let log = tpm::Log::parse(&log[..used as usize]).unwrap();
        for (index, (_, pcrs)) in launch.pcrs.iter().enumerate() {
            let alg = tpm::HashAlg([4, 0xb][index]);
            for (pcr, value) in (17..).zip(pcrs) {
                assert_eq!(log.replay(alg, pcr).unwrap().as_bytes(), value);
            }
        }
        assert_eq!(memory.read32(at::PRIVATE + at::ERRORCODE).unwrap(), 0xc000_0001);
        // Protected memory ends below 3 GiB.
        assert_eq!(memory.read32(vt_d::BASE + 0x6c).unwrap(), 0xbfff_ffff);
        let table = os_sinit.os_sinit + os_sinit.os_sinit_size + 8;
        let dmar = memory.read32(table + 140).unwrap();
        assert_eq!(memory.read(table - 8 + u64::from(dmar), 64).unwrap(), [7; 64]);
    }

    #[test]
    fn what_the_loader_did_wrong_is_refused_by_its_class() {
        let cases = [
            (Fault::MleTables, class::MLE_PAGES),
            (Fault::MleHole, class::MLE_PAGES),
            (Fault::HeapSize, class::HEAP),
            (Fault::PmrUncovering, class::PMR),
        ];
        for (fault, class) in cases {
            let (verdict, chip) = play(&mut board(), Some(fault), "sha256");
            let refusal = verdict.unwrap_err();
            assert_eq!((refusal.code >> 4 & 0x3f, chip.0.len()), (class, 0), "{fault:?}: {}", refusal.why);
        }
    }

    #[test]
    fn a_changed_module_and_a_second_launch_are_refused() {
        let mut memory = board();
        memory.write(at::SINIT_BASE + 0x1800, &[1]).unwrap();
        assert!(play(&mut memory, None, "sha256").0.is_err());
        let mut memory = board();
        play(&mut memory, None, "sha256").0.unwrap();
        assert!(play(&mut memory, None, "sha256").0.unwrap_err().why.contains("SENTER after"));
    }
}
