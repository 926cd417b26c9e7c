//! Faults and contention on the CRB interface.

use super::{launched, open};
use crate::model::{Crb, CrbFault, Ticks};
use crate::{BASE, Contention, Error, Locality, Tpm, Wait};

#[test]
fn every_fault_is_its_error_in_bounded_time() {
    let buffer = |address: u64, size| Error::Buffer { address: address.try_into().unwrap_or(u32::MAX), size };
    let page = BASE + 0x2080;
    for (fault, error, ms) in [
        (CrbFault::NeverValid, Error::LocalityUnavailable { locality: 2 }, 750..800),
        (CrbFault::NeverGrants, Error::LocalityBusy { locality: 2, holder: None }, 750..800),
        (CrbFault::NeverReady, Error::Timeout(Wait::Ready), 750..1600),
        (CrbFault::Fatal, Error::Fatal, 0..100),
        (CrbFault::NeverAnswers, Error::Timeout(Wait::Response), 32_000..32_100),
        (CrbFault::OnlyCancels, Error::Timeout(Wait::Response), 30_000..30_100),
        (CrbFault::CommandAt(0x1000), buffer(0x1000, 0xf80), 0..100),
        (CrbFault::CommandAt(BASE + 0x4081), buffer(BASE + 0x4081, 0xf80), 0..100),
        (CrbFault::CommandAt(1 << 32 | BASE), buffer(1 << 32 | BASE, 0xf80), 0..100),
        (CrbFault::CommandSize(u32::MAX), buffer(page, u32::MAX), 0..100),
        (CrbFault::CommandSize(8), Error::CommandSize { size: 22, limit: 8 }, 0..100),
        (CrbFault::ResponseAt(u64::MAX), buffer(u64::MAX, 0xf80), 0..100),
        (CrbFault::ResponseSize(9), buffer(page, 9), 0..100),
        (CrbFault::ResponseSize(12), Error::ResponseSize { size: 49, limit: 12 }, 0..100),
    ] {
        let crb = Crb::new(launched());
        crb.state().fault = fault;
        let (tpm, time) = open(&crb);
        assert_eq!(tpm.err(), Some(error), "{fault:?}");
        assert!(ms.contains(&time), "{fault:?}: {time} ms");
        assert_eq!(crb.state().active, None, "a failed open holds no locality");
    }
}

#[test]
fn a_command_that_hangs_is_cancelled() {
    let crb = Crb::new(launched());
    crb.state().fault = CrbFault::OnlyCancels;
    assert!(open(&crb).0.is_err());
    assert_eq!(crb.state().cancels, 1);
    crb.state().fault = CrbFault::None;
    assert!(open(&crb).0.is_ok());
}

// QEMU's model: the caller may choose to go on with locality 0.
#[test]
fn without_localities_two_is_unavailable_and_zero_works() {
    let crb = Crb::new(launched());
    crb.state().localities = false;
    let (tpm, time) = open(&crb);
    assert_eq!(tpm.err(), Some(Error::LocalityUnavailable { locality: 2 }));
    assert!(time < 10);
    let tpm = Tpm::open(crb.clone(), Ticks::default(), Locality::Zero, Contention::LAUNCH).unwrap();
    assert_eq!(tpm.banks().len(), 4);
}

#[test]
fn a_tpm_left_between_two_commands_is_brought_to_idle_first() {
    let crb = Crb::new(launched());
    crb.state().idle = false;
    assert!(open(&crb).0.is_ok());
}

#[test]
fn contention_follows_the_same_rules_as_fifo() {
    for (holder, how, seizes) in
        [(0, Contention::LAUNCH, Some(1)), (0, Contention::SHARED, None), (3, Contention::LAUNCH, None)]
    {
        let crb = Crb::new(launched());
        crb.state().active = Some(holder);
        let tpm = Tpm::open(crb.clone(), Ticks::default(), Locality::Two, how);
        assert_eq!(crb.state().seizes, seizes.unwrap_or(0));
        match seizes {
            Some(_) => assert!(tpm.is_ok()),
            None => assert_eq!(tpm.err(), Some(Error::LocalityBusy { locality: 2, holder: Some(holder) })),
        }
    }
}
