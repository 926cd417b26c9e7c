//! Devices that the guest has read and write what VT-d keeps them from: QEMU's `edu`, on the first bus and behind a bridge.

use std::time::Duration;

use tests::edu::{Edu, Guest, Prey};
use tests::region::{Region, address_at, telling};

use super::Machine;
use super::memory::{HEAP, HEAP_SIZE, KEPT, REGION, REGION_SIZE};

/// Gives the TPM's locality back that a device took.
const RELINQUISH: u8 = 0x20;
/// RAM that Linux leaves alone.
const SCRATCH: u64 = 0x0c00_0000;
/// Registers of QEMU's `intel-iommu`.
const ROOT_TABLE: u64 = 0xfed9_0020;
const QUEUE: u64 = 0xfed9_0090;

/// These lie where a kernel without Cordon may have itself.
const SANDBOX: &str = "sandbox's own page tables";
const RESERVED: &str = "memory that firmware reserves for devices";

/// For the guest's kernel: memory that it is to leave alone without Cordon too.
pub fn words() -> String {
    let reserved = [(SCRATCH, 0x1_0000), (REGION, REGION_SIZE), (HEAP, HEAP_SIZE), (KEPT, 0x1000)];
    let reserved: String =
        reserved.iter().map(|(base, size)| format!(" memmap={size:#x}${base:#x}")).collect();
    format!("iomem=relaxed{reserved}")
}

/// What devices must not reach. Each word is one that a device which reads nothing would not have.
pub fn prey(machine: &mut Machine) -> Vec<Prey> {
    let edu = &Edu::all(machine).unwrap()[0];
    let root = address_at(machine, ROOT_TABLE).unwrap();
    let context = address_at(machine, root).unwrap();
    let entry = context + 16 * u64::from(edu.id().unwrap());
    let tables = address_at(machine, entry).unwrap();
    let queue = address_at(machine, QUEUE).unwrap();
    let region = Region::of(machine, REGION, REGION_SIZE).unwrap();
    let mut word = |page| telling(machine, page).unwrap();
    let words = [
        ("MLE's code", REGION),
        ("MLE's page tables", word(region.own_root().unwrap())),
        ("VMCB of a CPU", word(region.vmcb(1).unwrap())),
        ("nested tables of a CPU", word(region.nested(1).unwrap())),
        ("sandbox's nested tables", word(region.nested(2).unwrap())),
        (SANDBOX, word(region.tables(2).unwrap())),
        ("root table", root),
        ("device's context entry", entry),
        ("devices' page tables", word(tables)),
        ("invalidation queue", word(queue)),
        ("TXT heap", HEAP),
        (RESERVED, KEPT),
        ("unit's registers", ROOT_TABLE),
    ];
    words.map(|(what, at)| Prey::word(what, at)).into_iter().chain([Prey::LOCALITY_2]).collect()
}

/// Has a device read and write what firmware reserves for devices.
pub fn reach_reserved(machine: &mut Machine) {
    let [edu, _] = Edu::pair(machine).unwrap();
    edu.attack(machine, SCRATCH, &[Prey::word(RESERVED, KEPT)], "guest, VT-d: a device", false).unwrap();
}

/// How many accesses of devices the MLE has counted.
fn stopped(machine: &mut Machine) -> u64 {
    let status = machine.check("tail -c +5 /sys/firmware/efi/efivars/Status-*").unwrap();
    let line = status.lines().find(|line| line.starts_with("DMA: ")).expect("a line about DMA");
    line.split(", ").nth(1).and_then(|part| part.split(' ').next()).expect("a count").parse().unwrap()
}

/// Has the devices read and write it. What is stopped is counted, and on record with device and address.
pub fn attack(machine: &mut Machine, mut prey: Vec<Prey>, protected: bool) {
    /// What the device behind the bridge is to reach.
    const ENOUGH: [&str; 2] = ["MLE's code", "TPM's locality 2"];
    for prey in prey.iter_mut().filter(|prey| prey.what == SANDBOX && !protected) {
        prey.at = SCRATCH + 0x1000;
    }
    let [first, behind] = Edu::pair(machine).unwrap();
    let few: Vec<_> = prey.iter().filter(|p| ENOUGH.contains(&p.what)).cloned().collect();
    // A conventional device behind a bridge speaks under the bridge's bus and no device's number.
    let bus = format!("{}:00.0", behind.name.split(':').next().unwrap());
    let source = first.name.clone();
    let attackers = [
        (first, prey.as_slice(), "guest, VT-d: a device", source),
        (behind, few.as_slice(), "guest, VT-d: a device behind a bridge", bus),
    ];
    for (edu, prey, who, source) in attackers {
        let before = if protected { stopped(machine) } else { 0 };
        let outcomes = edu.attack(machine, SCRATCH, prey, who, protected).unwrap();
        // For the next device: the TPM's locality is given back, memory is as it was.
        for (prey, outcome) in
            prey.iter().zip(outcomes).filter(|(p, _)| !protected && ENOUGH.contains(&p.what))
        {
            let restore = match outcome.before.try_into() {
                Ok(bytes) => format!("devmem {:#x} 64 {:#x}", prey.at, u64::from_le_bytes(bytes)),
                Err(_) => format!("devmem {:#x} 8 {RELINQUISH:#x}", prey.at),
            };
            machine.check(&restore).unwrap();
        }
        if protected {
            // QEMU's unit has room for one fault, and leaves out what repeats until it is taken.
            std::thread::sleep(Duration::from_millis(200));
            let counted = stopped(machine) - before;
            let log = machine.check("cordon log").unwrap();
            let on_record = |how: &str| {
                let told =
                    |line: &&str| line.contains(&format!("0000:{source} {how} {:#x}", prey[0].at & !0xfff));
                log.lines().filter(told).count()
            };
            assert!(counted > 0 && on_record("write") > 0, "{counted} counted of {who}, {source}\n{log}");
            println!("{who}: {counted} of {} accesses counted", 2 * prey.len());
        }
    }
}
