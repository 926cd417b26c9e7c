//! Attacks of firmware between two launches (policy `relaunch`): there it has the bare machine, and all it can gain is that
//! the guest does not go on.

use std::fs;
use std::path::Path;

use hv::addr::PAGE_SIZE;
use hv::launch::{RELAUNCH_MLE, relaunch_size};
use sha2::{Digest, Sha256};
use tests::machine::{Boot, Machine, Spec};
use tests::paths;
use tests::skinit::Fault;

use super::firmware::{
    OTHER, SECRET, VARIABLES, VENDOR, code, config, dma, edu, hostile, run, start, write32,
};
use super::{Places, SCRATCH, boot, guest, number_after, seen, seen_of_long};

// Where in the rest of the block things are handed over: `mle/src/relaunch/mod.rs`.
const ROUND: u64 = 8;
const PAGE_0: u64 = 0x3000;
const LOG: u64 = 0x3_0000;
const SLB: u64 = 0x4_0000;
const DIGESTS: u64 = 0x20_0000;
/// A word of the SLB's header that nobody reads: the SLB runs as before.
const SLB_RESERVED: u64 = 12;

/// A machine whose firmware has its way between two launches, and where things are.
struct Ground {
    machine: Machine,
    /// The memory that the loader keeps for this policy.
    block: u64,
    region: u64,
}

/// The configuration under which each call of the implant takes place between two launches.
fn policy() -> tempfile::TempPath {
    config(&format!("log = info\nservice.SetVariable.{VENDOR}:* = relaunch"))
}

fn spec(policy: &Path) -> Spec {
    Spec { relaunch: true, cpus: 1, memory: 1024, ..hostile(Boot::Cordon, &[], Some(policy)) }
}

impl Ground {
    fn start() -> Self {
        let policy = policy();
        let mut machine = start(&spec(&policy));
        let region = Places::find(&mut machine).mle_size;
        // What the new launch of a first call said.
        let block = number_after(&machine.console(), "a guest waits in 0x");
        Self { machine, block, region }
    }

    /// The copy of the old MLE region.
    fn copy(&self) -> u64 {
        self.block + self.region
    }

    /// What is handed over, at `offset`.
    fn rest(&self, offset: u64) -> u64 {
        assert!(offset < relaunch_size(self.region) - 2 * self.region);
        self.block + 2 * self.region + offset
    }
}

/// What is written where, and what the new launch says about it.
struct Change {
    name: &'static str,
    at: fn(&mut Ground) -> u64,
    reason: &'static str,
}

const BETWEEN: &str = "firmware between launches:";
const BY_DEVICE: &str = "have a device write the guest's memory";
const UNKNOWN: &str = "the TPM does not know this hand-over";
const CHANGED: &str = "memory changed while the guest waited";

/// Bytes of the MLE's file.
fn mle_size() -> u64 {
    fs::metadata(paths::mle()).unwrap().len()
}

/// Where the old launch's event log has the kernel's digest.
fn kernel_digest(ground: &mut Ground) -> u64 {
    let digest = Sha256::digest(fs::read(paths::kernel()).unwrap());
    let log = ground.machine.run(&format!("tail -c +5 {VARIABLES}/DrtmLog-*")).unwrap().bytes;
    let at = log.windows(digest.len()).position(|bytes| bytes == digest.as_slice()).expect("kernel's digest");
    ground.rest(LOG + at as u64)
}

const CHANGES: [Change; 10] = [
    Change { name: "a page of the guest", at: |_| SCRATCH, reason: CHANGED },
    Change { name: "a page of the guest that was all zeros", at: |_| SCRATCH + 0x8000, reason: CHANGED },
    // It is off the MLE's own map, and verified as a copy.
    Change { name: "page 0 of the guest", at: |g| g.rest(PAGE_0), reason: CHANGED },
    Change { name: "the old MLE's code", at: |g| g.copy() + 0x2000, reason: CHANGED },
    Change { name: "the old MLE's data", at: |g| g.copy() + mle_size() + PAGE_SIZE, reason: CHANGED },
    Change { name: "the round's number", at: |g| g.rest(ROUND), reason: UNKNOWN },
    Change { name: "a digest of guest memory", at: |g| g.rest(DIGESTS), reason: UNKNOWN },
    Change { name: "the kernel's digest", at: kernel_digest, reason: UNKNOWN },
    Change { name: "the next SLB", at: |g| g.rest(SLB + SLB_RESERVED), reason: UNKNOWN },
    // The last word of the file fills its last page.
    Change { name: "the next MLE", at: |g| g.rest(RELAUNCH_MLE + mle_size() - 8), reason: UNKNOWN },
];

/// A guest whose machine is changed between two launches does not go on, and the serial line says why.
fn ends_by(machine: &mut Machine, implant: &[u8], what: &str, reason: &str) {
    let error = match run(machine, implant) {
        Err(error) => error.to_string(),
        Ok(outcome) => panic!("{what}: {outcome:x?}"),
    };
    let console = machine.console();
    assert!(error.contains("guest-reset") && !error.contains("triple"), "{what}: {error}\n{console}");
    let told = console.lines().any(|line| line.contains("FATAL") && line.contains(reason));
    assert!(told, "{what}: no {reason:?} in {console}");
    seen(&format!("{BETWEEN} change {what}"), true);
}

/// The same by firmware's hand.
fn ends(mut ground: Ground, change: &Change) {
    let at = (change.at)(&mut ground);
    // Four bytes: the word behind the SLB's reserved one is code.
    ends_by(&mut ground.machine, &write32(at, OTHER as u32), change.name, change.reason);
}

/// Firmware that changes nothing of the guest comes back, with what its code left; what ends the machine is a change.
#[test]
fn firmware_between_launches_changes_nothing_of_the_guest() {
    let mut ground = Ground::start();
    let machine = &mut ground.machine;
    // The guest's devices do not write meanwhile.
    let edu = edu(machine);
    run(machine, &dma(edu, SCRATCH, SCRATCH + 16)).unwrap();
    assert_ne!(machine.memory(SCRATCH + 16, 8).unwrap(), SECRET.to_le_bytes());
    seen(&format!("{BETWEEN} {BY_DEVICE}"), true);
    assert_eq!(machine.player().unwrap().launches().len(), 3);
    ends(ground, &CHANGES[0]);
}

/// Each piece that the guest's going on depends on, by whether what is noticed is that memory changed; the first change has a test of
/// its own.
fn each_ends(of_memory: bool) {
    let changes = CHANGES.iter().skip(1).filter(|change| (change.reason == CHANGED) == of_memory);
    changes.for_each(|change| ends(Ground::start(), change));
}

#[test]
#[ignore = "takes a machine each; `make test-all` runs it"]
fn each_change_of_memory_between_launches_ends_the_machine() {
    each_ends(true);
}

#[test]
#[ignore = "takes a machine each; `make test-all` runs it"]
fn each_change_of_the_hand_over_between_launches_ends_the_machine() {
    each_ends(false);
}

/// The ticket is written after firmware returned, so it is changed by what can come later: the bench. With the TPM's own the call comes
/// back, as that of [`Ground::start`] does.
#[test]
#[ignore = "takes a machine; `make test-all` runs it"]
fn a_forged_ticket_ends_the_machine() {
    let policy = policy();
    let mut machine = boot(&Spec { fault: Some(Fault::Ticket), ..spec(&policy) });
    let harmless = code(&[&guest::rax(SECRET)]);
    ends_by(&mut machine, &harmless, "the ticket of the TPM", UNKNOWN);
    let drtm = fs::read_to_string(machine.dir().file("drtm.log")).unwrap();
    assert!(drtm.contains("is changed"), "{drtm}");
}

/// What firmware does there works on a machine that nothing protects.
#[test]
fn firmware_that_nothing_watches_changes_the_guest() {
    let mut machine = start(&hostile(Boot::Native, &[], None));
    let edu = edu(&mut machine);
    run(&mut machine, &dma(edu, SCRATCH, SCRATCH + 16)).unwrap();
    assert_eq!(machine.memory(SCRATCH + 16, 8).unwrap(), SECRET.to_le_bytes());
    seen(&format!("{BETWEEN} {BY_DEVICE}"), false);
    // The second fails in a test that takes long.
    let changes = [(SCRATCH, seen as fn(&str, bool)), (SCRATCH + 0x8000, seen_of_long)];
    for (change, (at, seen)) in CHANGES.iter().zip(changes) {
        run(&mut machine, &write32(at, OTHER as u32)).unwrap();
        assert_eq!(machine.memory(at, 4).unwrap(), (OTHER as u32).to_le_bytes());
        seen(&format!("{BETWEEN} change {}", change.name), false);
    }
}
