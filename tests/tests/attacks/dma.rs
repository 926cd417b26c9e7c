//! Attacks by devices that the guest programs: QEMU's `edu`, on the first bus and behind a bridge, whose requests go under the
//! bridge's name.

use tests::edu::{Edu, Prey};
use tests::machine::Machine;
use tests::region::{Region, address_at, telling};

use super::{Access, Places, SCRATCH, Target, access, interrupts, seen_of_long, write};

/// Registers of QEMU's `amd-iommu`: device table, command buffer, event log.
const DEVICE_TABLE: u64 = 0xfed8_0000;
const COMMANDS: u64 = DEVICE_TABLE + 8;
const EVENTS: u64 = DEVICE_TABLE + 0x10;

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
