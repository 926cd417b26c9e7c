//! The driver, through the FIFO model, against a TPM that others wrote. Not run where swtpm is not
//! installed: everything here is also tested against the model.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use super::{ALL, a_launch_on, open};
use crate::creation::Counts;
use crate::model::{FakeTpm, Fifo, Ticks};
use crate::{Contention, Digest, Error, HashAlg, Locality, Ticket, Tpm};

/// A running swtpm, ended and removed on drop.
struct Swtpm {
    child: Child,
    folder: PathBuf,
}

impl Drop for Swtpm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

impl Swtpm {
    /// A started TPM; none without swtpm.
    fn start() -> Option<Self> {
        static STARTED: AtomicU32 = AtomicU32::new(0);
        let name = format!("cordon-swtpm-{}-{}", std::process::id(), STARTED.fetch_add(1, Ordering::Relaxed));
        let folder = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&folder).unwrap();
        let path = |name: &str| folder.join(name).display().to_string();
        let child = Command::new("swtpm")
            .args(["socket", "--tpm2", "--flags", "not-need-init,startup-clear"])
            .arg("--tpmstate")
            .arg(format!("dir={}", folder.display()))
            .arg("--ctrl")
            .arg(format!("type=unixio,path={}", path("ctrl")))
            .arg("--server")
            .arg(format!("type=unixio,path={}", path("data")))
            .stdout(Stdio::null())
            .spawn();
        match child {
            Ok(child) => Some(Self { child, folder }),
            Err(error) if error.kind() == ErrorKind::NotFound => None,
            Err(error) => panic!("{error}"),
        }
    }

    fn connect(&self, name: &str) -> UnixStream {
        for _ in 0..200 {
            if let Ok(stream) = UnixStream::connect(self.folder.join(name)) {
                return stream;
            }
            std::thread::sleep(Duration::from_millis(25));
        }
        panic!("swtpm does not listen at {name}");
    }
}

/// A request on the control channel, answered by a result of four bytes.
fn control(ctrl: &mut UnixStream, command: u32, data: &[u8]) {
    ctrl.write_all(&[&command.to_be_bytes(), data].concat()).unwrap();
    let mut result = [0xff; 4];
    ctrl.read_exact(&mut result).unwrap();
    assert_eq!(result, [0; 4], "control command {command}");
}

/// A swtpm on which the DRTM event of `the block` has just happened, behind the FIFO model; none without swtpm.
fn launched_swtpm() -> Option<(Swtpm, Fifo)> {
    const SET_LOCALITY: u32 = 5;
    let Some(swtpm) = Swtpm::start() else {
        eprintln!("swtpm is not installed: not run");
        return None;
    };
    let mut ctrl = swtpm.connect("ctrl");
    let mut data = swtpm.connect("data");
    drtm(&mut ctrl, b"the block");
    let mut remote = FakeTpm::with(&[]);
    remote.remote = Some(Box::new(move |locality, command| {
        // What happens to a machine, in commands of no TPM.
        if let Some(block) = command.strip_prefix(DRTM_EVENT) {
            drtm(&mut ctrl, block);
            return Vec::new();
        }
        if command == RESET {
            const INIT: u32 = 2;
            control(&mut ctrl, INIT, &[0; 4]);
            return Vec::new();
        }
        control(&mut ctrl, SET_LOCALITY, &[locality]);
        data.write_all(command).unwrap();
        let mut response = vec![0; 10];
        data.read_exact(&mut response).unwrap();
        let size = u32::from_be_bytes(response[2..6].try_into().unwrap()) as usize;
        response.resize(size, 0);
        data.read_exact(&mut response[10..]).unwrap();
        response
    }));
    Some((swtpm, Fifo::new(remote)))
}

const DRTM_EVENT: &[u8] = b"DRTM event: ";
const RESET: &[u8] = b"reset";

/// What SKINIT makes the CPU do.
fn drtm(ctrl: &mut UnixStream, block: &[u8]) {
    const HASH_START: u32 = 6;
    const HASH_DATA: u32 = 7;
    const HASH_END: u32 = 8;
    control(ctrl, HASH_START, &[]);
    control(ctrl, HASH_DATA, &[&(block.len() as u32).to_be_bytes()[..], block].concat());
    control(ctrl, HASH_END, &[]);
}

fn drtm_again(fifo: &Fifo, block: &[u8]) {
    fifo.state().tpm.execute(4, &[DRTM_EVENT, block].concat());
}

/// The machine is reset after a TPM2_Shutdown of `kind`, 0 for CLEAR and 1 for STATE; firmware starts the TPM clear. Gives
/// what the launch afterwards has.
fn reset(tpm: Tpm<Fifo, Ticks>, fifo: &Fifo, kind: u8) -> Tpm<Fifo, Ticks> {
    drop(tpm);
    let start = |code, kind| [0x80, 1, 0, 0, 0, 12, 0, 0, 1, code, 0, kind];
    for command in [&start(0x45, kind)[..], RESET, &start(0x44, 0)] {
        let response = fifo.state().tpm.execute(0, command);
        assert!(response.is_empty() || response[6..] == [0; 4], "{response:x?}");
    }
    drtm_again(fifo, b"the block");
    let mut tpm = open(fifo).0.unwrap();
    launch(&mut tpm, b"image");
    tpm
}

/// TPM2_Clear with platform authorization.
fn clear(fifo: &Fifo) {
    const CLEAR: &str = "80020000001b000001264000000c00000009400000090000000000";
    let command = hex::decode(CLEAR).unwrap();
    let response = fifo.state().tpm.execute(0, &command);
    assert_eq!(response[6..10], [0; 4], "{response:x?}");
}

#[test]
fn a_launch_on_swtpm() {
    let Some((_swtpm, fifo)) = launched_swtpm() else { return };
    let mut tpm = a_launch_on(fifo);
    assert_eq!(tpm.banks().iter().map(|bank| bank.alg).collect::<Vec<_>>(), ALL);

    // Locality 0 can neither go on with the launch's PCRs nor cap them; locality 2 can cap them.
    tpm.acquire(Locality::Zero, Contention::LAUNCH).unwrap();
    assert_eq!(tpm.cap(&[17]), Err(Error::Refused { command: 0x182, rc: 0x907 }));
    tpm.acquire(Locality::Two, Contention::LAUNCH).unwrap();
    tpm.cap(&[17, 18, 19, 22]).unwrap();
    let cap = *crate::Digests::cap(tpm.banks()).get(HashAlg::SHA256).unwrap();
    let capped = crate::log::extended(&Digest::zero(cap.bank()), &cap);
    assert_eq!(tpm.read_pcr(HashAlg::SHA256, 22).unwrap(), capped);
}

/// F of `relaunch`: a PCR that no DRTM event resets.
const COUNT: u32 = 8;
const PCRS: [u32; 3] = [17, 18, COUNT];

/// The launch of a block, as far as the TPM sees it.
fn launch(tpm: &mut Tpm<Fifo, Ticks>, image: &[u8]) {
    tpm.acquire(Locality::Two, Contention::LAUNCH).unwrap();
    tpm.extend(17, &tpm.digests_of(image)).unwrap();
}

#[test]
fn a_ticket_is_good_for_what_was_said_by_the_launch_before_and_for_nothing_else() {
    let Some((_swtpm, fifo)) = launched_swtpm() else { return };
    let mut tpm = open(&fifo).0.unwrap();
    launch(&mut tpm, b"image");
    let (said, other) = ([7; 32], [8; 32]);
    let ticket = tpm.vouch(&PCRS, &said).unwrap();
    assert!(!tpm.vouched(&PCRS, &said, &ticket).unwrap(), "no DRTM event yet");

    // The gap: the PCRs are capped, and whatever it has the TPM vouch for is not what a launch said.
    tpm.cap(&[17, 18]).unwrap();
    let forged = tpm.vouch(&PCRS, &other).unwrap();
    // Another launch of the same code knows the one and not the other.
    drtm_again(&fifo, b"the block");
    launch(&mut tpm, b"image");
    assert!(tpm.vouched(&PCRS, &said, &ticket).unwrap());
    assert!(!tpm.vouched(&PCRS, &other, &forged).unwrap());
    assert!(!tpm.vouched(&PCRS, &other, &ticket).unwrap(), "something else was said");
    assert!(!tpm.vouched(&[17, 18], &said, &ticket).unwrap(), "of fewer PCRs");
    for bit in [0, 77, 255] {
        let mut bad = ticket;
        bad.digest[bit / 8] ^= 1 << (bit % 8);
        assert!(!tpm.vouched(&PCRS, &said, &bad).unwrap(), "bit {bit} of the ticket");
    }
    for size in [0, 1, 31] {
        let bad = Ticket { size, ..ticket };
        assert!(!tpm.vouched(&PCRS, &said, &bad).unwrap(), "{size} bytes of the ticket");
    }
    // The guest may have the TPM vouch while the PCRs have their values: at its own locality.
    tpm.acquire(Locality::Zero, Contention::LAUNCH).unwrap();
    let forged = tpm.vouch(&PCRS, &other).unwrap();
    drtm_again(&fifo, b"the block");
    launch(&mut tpm, b"image");
    assert!(!tpm.vouched(&PCRS, &other, &forged).unwrap());
    // Without looking at the locality it would have passed: it is a good ticket. So is the old one, but for the count.
    tpm.acquire(Locality::Zero, Contention::LAUNCH).unwrap();
    assert!(tpm.vouched(&PCRS, &other, &forged).unwrap());
    tpm.acquire(Locality::Two, Contention::LAUNCH).unwrap();
    assert!(!tpm.vouched(&PCRS, &said, &ticket).unwrap(), "of the launch before the one before");

    // The counting PCR is not reset by a DRTM event, so what was good for the last round is no more.
    tpm.extend(COUNT, &tpm.digests_of(b"round 2")).unwrap();
    let old = tpm.vouch(&PCRS, &said).unwrap();
    tpm.extend(COUNT, &tpm.digests_of(b"round 3")).unwrap();
    let next = tpm.vouch(&PCRS, &other).unwrap();
    drtm_again(&fifo, b"the block");
    launch(&mut tpm, b"image");
    assert!(!tpm.vouched(&PCRS, &said, &old).unwrap());
    assert!(tpm.vouched(&PCRS, &other, &next).unwrap());
    // Other code.
    let ticket = tpm.vouch(&PCRS, &said).unwrap();
    drtm_again(&fifo, b"the block");
    launch(&mut tpm, b"another image");
    assert!(!tpm.vouched(&PCRS, &said, &ticket).unwrap());
    // No object is left behind: there is room for three.
    for _ in 0..8 {
        tpm.vouch(&PCRS, &said).unwrap();
    }
}

/// A restart sets the counting PCR back, for anyone to extend it as before, and leaves the tickets' secret.
#[test]
fn a_ticket_of_before_a_restart_or_reset_is_none() {
    let Some((_swtpm, fifo)) = launched_swtpm() else { return };
    let mut tpm = open(&fifo).0.unwrap();
    launch(&mut tpm, b"image");
    let said = [7; 32];
    let round = |tpm: &mut Tpm<Fifo, Ticks>| tpm.extend(COUNT, &tpm.digests_of(b"round 1")).unwrap();
    for kind in [1, 0] {
        round(&mut tpm);
        let ticket = tpm.vouch(&PCRS, &said).unwrap();
        let counts = tpm.counts().unwrap();
        tpm = reset(tpm, &fifo, kind);
        round(&mut tpm);
        assert!(!tpm.vouched(&PCRS, &said, &ticket).unwrap());
        // Without the count a restart would have let it pass: it is good for the state of before in all else.
        let alone = tpm.vouched_at(&PCRS, &said, &ticket, counts).unwrap();
        assert_eq!(alone, kind == 1);
        // What is said now, the next launch knows again.
        let ticket = tpm.vouch(&PCRS, &said).unwrap();
        drtm_again(&fifo, b"the block");
        launch(&mut tpm, b"image");
        assert!(tpm.vouched(&PCRS, &said, &ticket).unwrap());
        tpm = reset(tpm, &fifo, 0);
    }
}

/// TPM2_Clear sets back what tells a restart from none, so what was vouched for before is none, and nothing is vouched for until a reset.
#[test]
fn a_ticket_of_before_a_clear_is_none() {
    let Some((_swtpm, fifo)) = launched_swtpm() else { return };
    let mut tpm = open(&fifo).0.unwrap();
    launch(&mut tpm, b"image");
    let said = [7; 32];
    let round = |tpm: &mut Tpm<Fifo, Ticks>| tpm.extend(COUNT, &tpm.digests_of(b"round 1")).unwrap();
    round(&mut tpm);
    let ticket = tpm.vouch(&PCRS, &said).unwrap();
    let counts = tpm.counts().unwrap();
    // By the platform's hierarchy, whose authorization is empty in a TPM that nobody gave one.
    clear(&fifo);
    assert_eq!(tpm.counts().unwrap(), Counts { resets: 0, restarts: 0 });
    assert_eq!(tpm.vouch(&PCRS, &said), Err(Error::Cleared));
    tpm = reset(tpm, &fifo, 1);
    clear(&fifo);
    round(&mut tpm);
    // As many restarts as a good ticket has behind it.
    while tpm.counts().unwrap().restarts <= counts.restarts {
        drtm_again(&fifo, b"the block");
        launch(&mut tpm, b"image");
    }
    assert_eq!(tpm.counts().unwrap(), Counts { resets: 0, restarts: counts.restarts + 1 });
    assert!(!tpm.vouched(&PCRS, &said, &ticket).unwrap());
    // Without the count of resets it would have passed.
    assert!(tpm.vouched_at(&PCRS, &said, &ticket, counts).unwrap());
    tpm = reset(tpm, &fifo, 0);
    let ticket = tpm.vouch(&PCRS, &said).unwrap();
    drtm_again(&fifo, b"the block");
    launch(&mut tpm, b"image");
    assert!(tpm.vouched(&PCRS, &said, &ticket).unwrap());
}
