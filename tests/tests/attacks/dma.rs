//! Attacks by devices that the guest programs: QEMU's `edu`, on the first bus and behind a bridge, whose requests go under the
//! bridge's name.

use tests::edu::{Edu, Prey};
use tests::machine::{Boot, Machine, Spec};
use tests::region::{Region, address_at, telling};
use tests::storm::{self, Storm};
use tests::tally;

use super::{
    Access, Places, SCRATCH, Target, access, boot, interrupts, recorded, seen, seen_of_long, spec, write,
};

/// Registers of QEMU's `amd-iommu`: device table, command buffer, event log.
const DEVICE_TABLE: u64 = 0xfed8_0000;
const COMMANDS: u64 = DEVICE_TABLE + 8;
const EVENTS: u64 = DEVICE_TABLE + 0x10;
/// Where the MLE has read the log to, and the unit has written it to.
const EVENT_HEAD: u64 = DEVICE_TABLE + 0x2010;
const EVENT_TAIL: u64 = DEVICE_TABLE + 0x2018;

/// Gives the TPM's locality back that a device took.
const RELINQUISH: u64 = 0x20;
/// What the bench puts where nothing is yet, so that it can be read.
const PLANTED: [u8; 8] = *b"planted!";

/// These lie where a kernel without Cordon may have itself.
const SANDBOX: &str = "sandbox's own page tables";

/// Address of a device's entry in the device table.
pub fn device_entry(machine: &mut Machine, id: u16) -> u64 {
    address_at(machine, DEVICE_TABLE).unwrap() + 32 * u64::from(id)
}

/// What devices must not reach, on a machine with Cordon. Each word is one that a device which reads nothing would not have.
pub fn prey(machine: &mut Machine, places: &Places) -> Vec<Prey> {
    let edu = &Edu::all(machine).unwrap()[0];
    let entry = device_entry(machine, edu.id().unwrap());
    let root = address_at(machine, entry).unwrap();
    // QEMU's IOMMU logs nothing: the last entry is the log's, and free.
    let event = address_at(machine, EVENTS).unwrap() + 0xff0;
    machine.write_memory(event, &PLANTED).unwrap();
    let commands = address_at(machine, COMMANDS).unwrap();
    let region = Region::of(machine, places.mle, places.mle_size).unwrap();
    let (runtime, _) = places.runtime[0];
    let mut word = |page| telling(machine, page).unwrap();
    let words = [
        ("MLE's code", places.mle),
        ("MLE's page tables", word(region.own_root().unwrap())),
        ("VMCB of a CPU", word(region.vmcb(1).unwrap())),
        ("nested tables of a CPU", word(places.nested)),
        ("sandbox's nested tables", word(region.nested(2).unwrap())),
        (SANDBOX, word(region.tables(2).unwrap())),
        ("device's entry of the device table", entry),
        ("devices' page tables", word(root)),
        ("IOMMU's command buffer", word(commands)),
        ("IOMMU's event log", event),
        ("SLB", places.slb),
        ("launch page", word(places.launch_page)),
        ("EFI runtime data", word(runtime)),
        // With another device table QEMU would lose all interrupts, even while it translates nothing.
        ("IOMMU's registers", COMMANDS),
    ];
    words.map(|(what, at)| Prey::word(what, at)).into_iter().chain([Prey::LOCALITY_2]).collect()
}

/// Has devices read and write what the CPU may not.
pub fn devices(target: &mut Target) {
    /// What the device behind the bridge is to reach.
    const ENOUGH: [&str; 3] = ["MLE's code", "device's entry of the device table", "TPM's locality 2"];
    let Target { machine, prey, protected, .. } = target;
    for prey in prey.iter_mut().filter(|prey| prey.what == SANDBOX && !*protected) {
        prey.at = SCRATCH + 0x1000;
    }
    let [first, behind] = Edu::pair(machine).unwrap();
    let few: Vec<_> = prey.iter().filter(|p| ENOUGH.contains(&p.what)).cloned().collect();
    let attackers = [(first, &*prey, "guest: a device"), (behind, &few, "guest: a device behind a bridge")];
    for (edu, prey, who) in attackers {
        let outcomes = edu.attack(machine, SCRATCH, prey, who, *protected).unwrap();
        if *protected {
            continue;
        }
        // Some of it is in use.
        for (prey, outcome) in prey.iter().zip(outcomes) {
            match prey.at {
                at if at == Prey::LOCALITY_2.at => {
                    let result = access(machine, &[Access::write(at, RELINQUISH).bits(8)]);
                    assert_eq!(result, [Ok(0)]);
                }
                at => write(machine, at, u64::from_le_bytes(outcome.before.try_into().unwrap())),
            }
        }
    }
    if *protected {
        // What was planted is gone, as the IOMMU's log should be.
        let event = prey.iter().find(|p| p.what == "IOMMU's event log").unwrap().at;
        assert_eq!(machine.memory(event, 8).unwrap(), PLANTED);
        machine.write_memory(event, &[0; 8]).unwrap();
        // This IOMMU does not tell interrupts apart, and the log says so: an SMI comes through, which is on record too.
        let smis = |machine: &mut Machine| machine.check("cordon log").unwrap().matches(" SMI ").count();
        let before = smis(machine);
        interrupts::send(machine, interrupts::SMI);
        assert!(smis(machine) > before);
        seen_of_long("guest: a device sends an SMI", false);
    }
}

/// QEMU's unit stops accesses and logs none of them: the bench fills its log, up to where the MLE has read, with faults of `devices`.
/// Gives how many.
fn fill_log(machine: &mut Machine, devices: &[u16], address: u64) -> u64 {
    const ENTRY: u64 = 16;
    const SIZE: u64 = 4096;
    /// A page fault, of a read.
    const CODE: u64 = 2 << 60;
    let base = address_at(machine, EVENTS).unwrap();
    let mut register = |at| u64::from_le_bytes(machine.memory(at, 8).unwrap().try_into().unwrap());
    let (head, tail) = (register(EVENT_HEAD), register(EVENT_TAIL));
    // A full ring lacks one, lest it look empty.
    let room = (head + SIZE - tail - ENTRY) % SIZE;
    let events: Vec<u8> = (devices.iter().cycle().take((room / ENTRY) as usize))
        .flat_map(|device| [CODE | u64::from(*device), address])
        .flat_map(u64::to_le_bytes)
        .collect();
    let (first, rest) = events.split_at(room.min(SIZE - tail) as usize);
    machine.write_memory(base + tail, first).unwrap();
    machine.write_memory(base, rest).unwrap();
    machine.write_memory(EVENT_TAIL, &((tail + room) % SIZE).to_le_bytes()).unwrap();
    room / ENTRY
}

/// Devices read the MLE's memory without end.
#[test]
fn a_storm_of_stopped_accesses_is_counted_and_told_in_part() {
    const ROUNDS: usize = 8;
    let mut machine = boot(&Spec { qemu_args: storm::arguments(), turns: false, ..spec(Boot::Cordon, &[]) });
    let mle = Places::find(&mut machine).mle;
    let log = machine.dir().file("cpu.log");
    assert_eq!(storm::stopped(&log, mle).unwrap(), 0);
    let storm = Storm::begin(&mut machine, mle).unwrap();
    let exits = storm::work(&mut machine).unwrap();
    let stopped = storm::stopped(&log, mle).unwrap();
    let (devices, mut logged) = (storm.devices().unwrap(), 0);
    for _ in 0..ROUNDS {
        logged += fill_log(&mut machine, &devices, mle);
        machine.check("usleep 200000; for i in $(seq 10); do true | cat; done").unwrap();
    }
    storm.end(&mut machine).unwrap();
    let [faults, _] = tally::dma(&mut machine).unwrap();
    println!(
        "{stopped} accesses stopped, {exits} exits; {logged} in the unit's log, {} records",
        faults.records()
    );
    assert!(stopped > 1000 && exits < stopped / 100, "{stopped}, {exits} exits");
    assert_eq!(faults.counted, logged);
    machine.check("cordon verify").unwrap();
    machine.power_off().unwrap();
    seen("guest: drown the log in accesses that are stopped", true);
    recorded("guest: drown the log in accesses that are stopped");
}
