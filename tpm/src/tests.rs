//! The driver against the device models.

mod crb;
mod fifo;
mod hostile;
mod swtpm;

use hv::io::{Clock, Mmio};
use hv::launch::EV_SLAUNCH;

use crate::log::extended;
use crate::model::{Crb, FakeTpm, Fifo, Ticks};
use crate::{Bank, Contention, Digest, Digests, Error, HashAlg, Locality, Log, LogWriter, Tpm};

const ALL: [HashAlg; 4] = [HashAlg::SHA1, HashAlg::SHA256, HashAlg::SHA384, HashAlg::SHA512];

/// Opens with locality 2, as at launch; the time it took in milliseconds comes along.
fn open<M: Mmio + Clone>(mmio: &M) -> (Result<Tpm<M, Ticks>, Error>, u64) {
    let clock = Ticks::default();
    let tpm = Tpm::open(mmio.clone(), clock.clone(), Locality::Two, Contention::LAUNCH);
    (tpm, clock.now_us() / 1000)
}

/// What SLB stage and MLE do after a DRTM event of `the block`, on any interface with [`ALL`] banks.
fn a_launch_on<M: Mmio + Clone>(mmio: M) -> Tpm<M, Ticks> {
    let mut tpm = open(&mmio).0.unwrap();
    assert_eq!(tpm.locality(), Some(Locality::Two));
    let mut buffer = [0; 2048];
    let mut log = LogWriter::create(&mut buffer, tpm.banks()).unwrap();
    log.append(17, EV_SLAUNCH, &tpm.digests_of(b"the block"), b"SKINIT").unwrap();
    tpm.measure(&mut log, 17, EV_SLAUNCH, b"MLE", &tpm.digests_of(b"the image")).unwrap();
    tpm.measure(&mut log, 18, EV_SLAUNCH, b"kernel", &tpm.digests_of(b"vmlinuz")).unwrap();
    let used = log.used();
    for alg in ALL {
        let replayed = Log::parse(&buffer[..used]).unwrap().replay(alg, 17).unwrap();
        assert_eq!(tpm.read_pcr(alg, 17).unwrap(), Some(replayed), "the log explains the PCR");
        let kernel = *tpm.digests_of(b"vmlinuz").get(alg).unwrap();
        let zero = Digest::zero(kernel.bank());
        assert_eq!(tpm.read_pcr(alg, 18).unwrap(), extended(&zero, &kernel));
    }
    tpm.release();
    assert_eq!(tpm.locality(), None);
    assert_eq!(tpm.extend(17, &tpm.digests_of(b"late")), Err(Error::LocalityNotHeld));
    tpm
}

#[test]
fn the_tpm_hashes_an_event_for_every_bank() {
    let fifo = Fifo::new(launched());
    let mut tpm = Tpm::attach(fifo.clone(), Ticks::default(), Locality::Two, Contention::LAUNCH).unwrap();
    tpm.event(18, b"the policy").unwrap();
    for alg in ALL {
        let digest = crate::digest_of(alg, &[b"the policy"]).unwrap();
        let value = extended(&Digest::zero(digest.bank()), &digest).unwrap();
        assert_eq!(fifo.state().tpm.pcr(alg, 18), value);
    }
    tpm.acquire(Locality::Zero, Contention::LAUNCH).unwrap();
    assert_eq!(tpm.event(18, b"late"), Err(Error::Refused { command: 0x13c, rc: 0x907 }));
    assert!(matches!(tpm.event(18, &[0; 1024]), Err(Error::CommandSize { .. })));
}

fn launched() -> FakeTpm {
    let mut tpm = FakeTpm::with(&ALL);
    tpm.drtm(b"the block");
    tpm
}

#[test]
fn a_launch_on_fifo() {
    let fifo = Fifo::new(launched());
    a_launch_on(fifo.clone());
    assert!(fifo.state().tpm.seen.iter().all(|(locality, _)| *locality == 2));
    assert_eq!(fifo.state().active, None);
    assert!(fifo.is_idle());
}

#[test]
fn a_launch_on_crb() {
    let crb = Crb::new(launched());
    a_launch_on(crb.clone());
    assert!(crb.state().tpm.seen.iter().all(|(locality, _)| *locality == 2));
    assert_eq!(crb.state().active, None);
    assert!(crb.state().idle);
}

#[test]
fn a_bank_that_cannot_be_computed_is_capped() {
    let unknown = Bank { alg: HashAlg(0x7777), size: 40 };
    let sha256 = Bank::computed(HashAlg::SHA256).unwrap();
    let fifo = Fifo::new(FakeTpm::new(&[unknown, sha256]));
    let mut tpm = open(&fifo).0.unwrap();
    assert_eq!(tpm.banks()[..], [unknown, sha256], "the size comes from a read of the bank");
    let digests = tpm.digests_of(b"x");
    assert_eq!(digests.get(unknown.alg), Some(&Digest::cap(unknown)));
    let before = fifo.state().tpm.pcr(unknown.alg, 18);
    tpm.extend(18, &digests).unwrap();
    assert_ne!(fifo.state().tpm.pcr(unknown.alg, 18), before);
}

#[test]
fn digests_of_other_banks_are_refused_before_the_tpm_sees_them() {
    let fifo = Fifo::new(launched());
    let mut tpm = open(&fifo).0.unwrap();
    let commands = fifo.state().tpm.seen.len();
    let one = Digests::cap(&tpm.banks()[..1]);
    assert_eq!(tpm.extend(17, &one), Err(Error::Digests));
    assert_eq!(fifo.state().tpm.seen.len(), commands);
}

#[test]
fn no_event_without_an_extend_and_no_extend_without_room() {
    let fifo = Fifo::new(launched());
    let mut tpm = open(&fifo).0.unwrap();
    let mut buffer = [0; 400];
    let mut log = LogWriter::create(&mut buffer, tpm.banks()).unwrap();
    let digests = tpm.digests_of(b"x");
    let start = log.used();
    // The TPM refuses: no event.
    fifo.state().tpm.refuse.push_back(0x907);
    let refused = tpm.measure(&mut log, 17, EV_SLAUNCH, b"x", &digests);
    assert_eq!(refused, Err(Error::Refused { command: 0x182, rc: 0x907 }));
    assert_eq!(log.used(), start);
    // The log has no room: no extend.
    tpm.measure(&mut log, 17, EV_SLAUNCH, b"x", &digests).unwrap();
    let before = fifo.state().tpm.pcr(HashAlg::SHA256, 17);
    let full = tpm.measure(&mut log, 17, EV_SLAUNCH, b"x", &digests);
    assert!(matches!(full, Err(Error::LogFull { .. })), "{full:?}");
    assert_eq!(fifo.state().tpm.pcr(HashAlg::SHA256, 17), before);
}

#[test]
fn capping_reaches_every_pcr_though_one_is_refused() {
    let fifo = Fifo::new(launched());
    let mut tpm = open(&fifo).0.unwrap();
    let before = [17, 18].map(|pcr| fifo.state().tpm.pcr(HashAlg::SHA256, pcr));
    assert_eq!(tpm.cap(&[24, 17, 18]), Err(Error::Refused { command: 0x182, rc: 0x84 }));
    for (pcr, before) in [17, 18].into_iter().zip(before) {
        let cap = Digest::new(HashAlg::SHA256, &[&[1][..], &[0; 31]].concat()).unwrap();
        assert_eq!(fifo.state().tpm.pcr(HashAlg::SHA256, pcr), extended(&before, &cap).unwrap());
    }
}

#[test]
fn a_chosen_sha256_function_is_used() {
    let fifo = Fifo::new(launched());
    let mut tpm = open(&fifo).0.unwrap();
    tpm.use_sha256(|state, _| state.fill(0x0101_0101));
    assert_eq!(tpm.digests_of(b"x").get(HashAlg::SHA256).unwrap().as_bytes(), [1; 32]);
    let sha1 = crate::digest_of(HashAlg::SHA1, &[b"x"]).unwrap();
    assert_eq!(tpm.digests_of(b"x").get(HashAlg::SHA1), Some(&sha1));
}
