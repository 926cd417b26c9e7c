//! Faults and contention on the FIFO interface.

use super::{launched, open};
use crate::model::{Fifo, FifoFault, Ticks};
use crate::{Contention, Error, Flow, Locality, Tpm, Wait};

/// The error of an open with `fault`, and how long it took, ms.
fn broken(fault: FifoFault) -> (Error, u64) {
    let fifo = Fifo::new(launched());
    fifo.state().fault = fault;
    let (tpm, time) = open(&fifo);
    let error = tpm.err().unwrap();
    if fault != FifoFault::Absent {
        assert_eq!(fifo.state().active, None, "a failed open holds no locality");
        assert_eq!(fifo.state().requests, [false; 5], "nor does it ask for one");
        assert!(fifo.is_idle());
    }
    (error, time)
}

#[test]
fn every_fault_is_its_error_in_bounded_time() {
    for (fault, error, ms) in [
        (FifoFault::Absent, Error::Absent, 0..10),
        (FifoFault::Closed(2), Error::LocalityUnavailable { locality: 2 }, 0..10),
        (FifoFault::NeverValid, Error::Timeout(Wait::Valid), 750..800),
        (FifoFault::NeverGrants, Error::LocalityBusy { locality: 2, holder: None }, 750..800),
        (FifoFault::NeverReady, Error::Timeout(Wait::Ready), 4000..4100),
        (FifoFault::NoBurst, Error::Timeout(Wait::Burst), 750..800),
        (FifoFault::NeverStatus, Error::Timeout(Wait::Status), 750..850),
        (FifoFault::ExpectsNothing, Error::Flow(Flow::ExpectsTooFew), 0..100),
        (FifoFault::ExpectsMore, Error::Flow(Flow::ExpectsTooMany), 0..100),
        (FifoFault::NeverAnswers, Error::Timeout(Wait::Response), 30_000..30_100),
        (FifoFault::StopsAfter(4), Error::Flow(Flow::ResponseShort), 0..100),
        (FifoFault::StopsAfter(12), Error::Flow(Flow::ResponseShort), 0..100),
        (FifoFault::GoesOn, Error::Flow(Flow::ResponseLong), 0..100),
    ] {
        let (found, time) = broken(fault);
        assert_eq!(found, error, "{fault:?}");
        assert!(ms.contains(&time), "{fault:?}: {time} ms");
    }
}

#[test]
fn an_unknown_interface_is_refused_and_an_old_one_accepted() {
    let fifo = Fifo::new(launched());
    fifo.state().interface_id = 0x2;
    assert_eq!(open(&fifo).0.err(), Some(Error::Interface { id: 2 }));
    fifo.state().interface_id = u32::MAX;
    assert!(open(&fifo).0.is_ok(), "TIS 1.3 has no INTERFACE_ID");
}

#[test]
fn an_unread_response_is_dropped() {
    let fifo = Fifo::new(launched());
    fifo.state().active = Some(2);
    fifo.leave_response();
    assert!(open(&fifo).0.is_ok());
}

#[test]
fn a_holder_that_leaves_is_waited_for() {
    let fifo = Fifo::new(launched());
    fifo.state().active = Some(0);
    fifo.state().holder_leaves_after = Some(300);
    let (tpm, time) = open(&fifo);
    assert!(tpm.is_ok());
    assert_eq!(fifo.state().seizes, 0);
    assert!(time > 250);
}

#[test]
fn at_launch_a_lower_holder_is_seized_from() {
    let fifo = Fifo::new(launched());
    fifo.state().active = Some(0);
    let (tpm, time) = open(&fifo);
    assert!(tpm.is_ok());
    assert_eq!(fifo.state().seizes, 1);
    assert!(time >= 750, "only after its time to leave");
}

#[test]
fn beside_a_guest_nothing_is_seized_and_the_request_is_withdrawn() {
    let fifo = Fifo::new(launched());
    fifo.state().active = Some(0);
    let tpm = Tpm::open(fifo.clone(), Ticks::default(), Locality::Two, Contention::SHARED);
    assert_eq!(tpm.err(), Some(Error::LocalityBusy { locality: 2, holder: Some(0) }));
    assert_eq!(fifo.state().seizes, 0);
    assert_eq!(fifo.state().active, Some(0));
    assert_eq!(fifo.state().requests, [false; 5]);
}

#[test]
fn a_higher_holder_is_never_seized_from() {
    let fifo = Fifo::new(launched());
    fifo.state().active = Some(3);
    assert_eq!(open(&fifo).0.err(), Some(Error::LocalityBusy { locality: 2, holder: Some(3) }));
    assert_eq!(fifo.state().seizes, 0);
}

#[test]
fn changing_the_locality_gives_the_old_one_back() {
    let fifo = Fifo::new(launched());
    let mut tpm = open(&fifo).0.unwrap();
    tpm.acquire(Locality::Zero, Contention::SHARED).unwrap();
    assert_eq!(fifo.state().active, Some(0));
    let refused = tpm.extend(17, &tpm.digests_of(b"x"));
    assert_eq!(refused, Err(Error::Refused { command: 0x182, rc: 0x907 }), "PCR 17 is not locality 0's");
    tpm.acquire(Locality::Two, Contention::SHARED).unwrap();
    assert_eq!(tpm.extend(17, &tpm.digests_of(b"x")), Ok(()));
}
