//! Devices that the gap left at work: four of QEMU's `edu` write ten times a second each, before, during and after SKINIT, until
//! something stops them (`tests/hostile/src/dma.rs`). The gap also left the IOMMU on, with all that they want to reach cached.
//!
//! When a device strikes is chance. What must hold is not: what PCR 17 says is what runs, and after the launch nothing of it
//! changes any more.

use std::fs;

use hv::launch::{DMA_AREA_SIZE, LAUNCH_PAGE_SIZE, SLB_SIZE};
use sha2::{Digest, Sha256};
use tests::edu;
use tests::machine::{Boot, Machine, Spec};
use tests::stage::Stage;
use tests::{images, paths};

use super::{Places, SCRATCH, boot, seen, spec};

/// PCI addresses of two devices more on the first bus: the second and third in the order of all.
const MORE: [u64; 2] = [0x10, 0x11];
/// What they write. An entry of the device table that lets its device pass, where that is the target.
const VALUE: u64 = u64::from_le_bytes(*b"gotcha!!");
const OPEN: u64 = 0b11 | 0b11 << 61;

/// What a device is to write, and where.
#[derive(Clone, Copy)]
struct Order {
    what: &'static str,
    at: u64,
    value: u64,
}

fn hostile(kind: Boot, reserved: &[(u64, u64)], orders: &[Order]) -> Spec {
    images::build_hostile().expect("implant");
    let more = MORE.map(|device| format!("{},addr={device:#x}", edu::DEVICE));
    let more = more.into_iter().flat_map(|device| ["-device".to_owned(), device]);
    let work: String = orders.iter().map(|o| format!("{:x} {:x}\n", o.at, o.value)).collect();
    let mut spec = spec(kind, reserved);
    // Or Linux would turn off all interrupts of devices that it finds.
    spec.cmdline.push_str(" pci=off");
    Spec {
        hostile: true,
        devices_at_work: Some(format!("iommu\n{work}")),
        qemu_args: spec.qemu_args.iter().cloned().chain(more).collect(),
        ..spec
    }
}

fn word(machine: &mut Machine, at: u64) -> u64 {
    u64::from_le_bytes(machine.memory(at, 8).unwrap().try_into().unwrap())
}

/// Changes what the devices write to, and gives them time to write again; whether they did.
fn written_again(machine: &mut Machine, order: &Order) -> bool {
    let old = word(machine, order.at);
    machine.write_memory(order.at, &(!order.value).to_le_bytes()).unwrap();
    machine.check("sleep 1").unwrap();
    let again = word(machine, order.at) == order.value;
    // The MLE looks at its memory after an SMI.
    machine.write_memory(order.at, &old.to_le_bytes()).unwrap();
    again
}

/// PCR 17 of a launch by that event, of that image.
fn pcr17(event: [u8; 32], image: &[u8]) -> String {
    let measured = Sha256::digest(Sha256::digest(image));
    hex::encode_upper(Sha256::new().chain_update(event).chain_update(measured).finalize())
}

/// A device that has orders of the gap's for the guest's memory and waits for something to happen, here a word from the guest,
/// may do nothing until the guest lets it.
fn waits(machine: &mut Machine, order: &Order) {
    const CONFIGURATION: u64 = 0xb000_0000 + ((MORE[1] << 3) << 12);
    let start = format!(
        "registers=$(($(devmem {:#x} 32) & ~15)); devmem $((registers + 0x98)) 64 3; sleep 1",
        CONFIGURATION + 0x10
    );
    machine.write_memory(order.at, &[0; 8]).unwrap();
    machine.check(&start).unwrap();
    assert_eq!(word(machine, order.at), 0);
    seen("gap: a device waits, and writes the guest's memory", true);
    machine.check(&format!("devmem {:#x} 16 6; {start}", CONFIGURATION + 4)).unwrap();
    assert_eq!(word(machine, order.at), order.value);
    seen("gap: a device waits, and writes the guest's memory", false);
}

#[test]
#[ignore = "boots three machines; `make test-all` and `make attacks` run it"]
fn devices_that_the_gap_left_at_work_change_nothing_unseen() {
    let image = fs::read(paths::mle()).unwrap();
    let offset = |text: &[u8]| image.windows(text.len()).position(|w| w == text).expect("a text") as u64;
    // Texts of the MLE, which it runs on without.
    let texts = [offset(b"deny all DMA"), offset(b"DMA open to it alone")];

    // Where things will be: the same machine, whose devices write to memory that nobody uses.
    let idle = |at| Order { what: "", at, value: VALUE };
    let harmless = [0u64, 8, 16, 24].map(|offset| idle(SCRATCH + offset));
    let mut machine = Machine::start(&hostile(Boot::Cordon, &[], &harmless)).unwrap();
    machine.wait_stage(Stage::Slb).unwrap();
    let places = Places::on_console(&machine);
    drop(machine);

    let table = places.mle + places.mle_size - DMA_AREA_SIZE;
    let orders = [
        Order { what: "a device writes the MLE", at: places.mle + texts[0], value: VALUE },
        Order {
            what: "a device writes its entry of the device table",
            at: table + (MORE[0] << 3) * 32,
            value: OPEN,
        },
        // The guest's, later on: how far the device came.
        Order { what: "", at: SCRATCH, value: VALUE },
        Order { what: "a device behind a bridge writes the MLE", at: places.mle + texts[1], value: VALUE },
    ];
    let mut machine = boot(&hostile(Boot::Cordon, &[], &orders));
    let launched = Places::on_console(&machine);
    assert_eq!((launched.mle, launched.slb), (places.mle, places.slb));
    // Up to the launch they were at work.
    assert_eq!(word(&mut machine, SCRATCH), VALUE);
    // What was measured is what is there.
    let mut ran = image.clone();
    for offset in texts {
        let found = machine.memory(places.mle + offset, 8).unwrap();
        ran[offset as usize..][..8].copy_from_slice(&found);
    }
    let event = machine.player().unwrap().launch().unwrap();
    let pcr = machine.check("cat /sys/class/tpm/tpm0/pcr-sha256/17").unwrap();
    let console = machine.console();
    assert_eq!(pcr.trim(), pcr17(event.pcr17(), &ran), "{console}");
    assert_eq!(pcr.trim() == pcr17(event.pcr17(), &image), ran == image);
    println!("the image was {}", if ran == image { "left alone" } else { "changed before it was measured" });
    // The table has been the MLE's since it was written, and nothing else is changed any more.
    let entry = word(&mut machine, orders[1].at);
    assert!(entry != OPEN && entry & 0b11 == 0b11, "{entry:#x}");
    for order in &orders {
        if order.value == OPEN {
            machine.check("sleep 1").unwrap();
            assert_eq!(word(&mut machine, order.at), entry);
        } else {
            assert!(!written_again(&mut machine, order), "{}", order.what);
        }
        if !order.what.is_empty() {
            seen(&format!("gap: {}, again and again", order.what), true);
        }
    }
    waits(&mut machine, &orders[2]);
    machine.power_off().unwrap();

    let reserved =
        [(places.mle, places.mle_size), (places.slb, SLB_SIZE), (places.launch_page, LAUNCH_PAGE_SIZE)];
    let mut machine = boot(&hostile(Boot::Native, &reserved, &orders));
    for order in &orders {
        assert!(written_again(&mut machine, order), "{}", order.what);
        if !order.what.is_empty() {
            seen(&format!("gap: {}, again and again", order.what), false);
        }
    }
    machine.power_off().unwrap();
}
