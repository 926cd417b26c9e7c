//! Measurements in parts, with a model of the TPM.

use firmware::exposure::{Exposure, Kind};
use tpm::model::{FakeTpm, Fifo, FifoFault, Ticks};
use tpm::{Digest, HashAlg};

use super::*;

const CPU: u32 = 0;

/// A launched machine with one bank.
struct Bench {
    fifo: Fifo,
    link: Link<Fifo, Ticks>,
    log: Mutex<ExposureLog<DEFAULT_SIZE>>,
    now_us: u64,
}

impl Bench {
    fn new() -> Self {
        let mut chip = FakeTpm::with(&[HashAlg::SHA256]);
        chip.drtm(b"the block");
        let fifo = Fifo::new(chip);
        let mut tpm = Tpm::open(fifo.clone(), Ticks::default(), Locality::Two, Contention::LAUNCH).unwrap();
        tpm.release();
        let log = Mutex::new(ExposureLog::new());
        log.lock().begin(tpm.banks(), true).unwrap();
        Self { fifo, link: Link::new(tpm, false), log, now_us: 0 }
    }

    /// So many records that are to be measured at once.
    fn record(&self, count: u64) {
        for _ in 0..count {
            self.log.lock().record(&Record::new(Kind::LEFT_OPEN, CPU, self.now_us));
        }
    }

    /// A CPU does a part for the first `through` records.
    fn step(&mut self, through: u64) -> Settled {
        let settled = self.link.step(&self.log, through, self.now_us);
        self.now_us += 1000;
        settled
    }

    fn finish(&mut self, through: u64) -> Settled {
        let mut parts = (0..100).map(|_| self.step(through));
        parts.find(|settled| *settled != Settled::Working).expect("an end")
    }

    fn pcr(&self) -> Digest {
        self.fifo.state().tpm.pcr(HashAlg::SHA256, PCR_EXPOSURE as usize)
    }

    fn break_by(&self, fault: FifoFault) {
        self.fifo.state().fault = fault;
    }

    /// What the log leads to is in the PCR, and the guest can have the TPM.
    fn check(&self) {
        let mut bytes = vec![0; ExposureLog::<DEFAULT_SIZE>::SIZE];
        self.log.lock().write_to(&mut bytes, 0);
        let replayed = Exposure::parse(&bytes).unwrap().replay().unwrap();
        assert_eq!(replayed.get(HashAlg::SHA256), Some(&self.pcr()));
        assert_eq!(self.fifo.state().active, None);
    }
}

#[test]
fn the_result_waits_while_the_tpm_works() {
    let mut bench = Bench::new();
    bench.record(1);
    bench.break_by(FifoFault::NeverAnswers);
    let before = bench.pcr();
    for _ in 0..1000 {
        assert_eq!(bench.step(1), Settled::Working);
    }
    assert_eq!(bench.pcr(), before);
    assert_eq!(bench.log.lock().counters().pending, 1);
    bench.break_by(FifoFault::None);
    assert_eq!(bench.finish(1), Settled::Measured);
    assert_ne!(bench.pcr(), before);
    bench.check();
}

#[test]
fn a_large_batch_is_hashed_in_parts() {
    let mut bench = Bench::new();
    bench.record(100);
    let size = {
        let mut log = bench.log.lock();
        log.seal(0).unwrap().len()
    };
    assert!(size > 4 * PART);
    for _ in 0..size / PART {
        assert_eq!(bench.step(100), Settled::Working);
        assert_eq!(bench.fifo.state().active, None, "the guest can have the TPM meanwhile");
    }
    assert_eq!(bench.finish(100), Settled::Measured);
    bench.check();
}

#[test]
fn a_record_that_another_cpu_adds_meanwhile_has_a_batch_of_its_own() {
    let mut bench = Bench::new();
    bench.record(1);
    // It is sealed, hashed, and goes to the TPM.
    for active in [None, None, Some(2)] {
        assert_eq!(bench.step(1), Settled::Working);
        assert_eq!(bench.fifo.state().active, active);
    }
    bench.record(1);
    // The first CPU and the other take turns: the first has what it needs before the other has.
    let mut first = Settled::Working;
    let mut other = Settled::Working;
    while other == Settled::Working {
        if first == Settled::Working {
            first = bench.step(1);
        }
        other = bench.step(2);
        assert!(other == Settled::Working || first == Settled::Measured);
    }
    assert_eq!(other, Settled::Measured);
    assert_eq!(bench.log.lock().counters().batches, 2);
    bench.check();
}

#[test]
fn a_tpm_that_the_guest_keeps_is_late_for_all_who_wait() {
    let mut bench = Bench::new();
    bench.record(100);
    bench.fifo.state().active = Some(0);
    assert_eq!(bench.finish(100), Settled::Wait);
    while bench.step(100) == Settled::Wait {}
    assert!(bench.now_us > BOUND_US);
    assert_eq!(bench.fifo.state().active, Some(0), "its command is not broken");
    // Of two CPUs that wait for the same, both hear of it.
    assert_eq!([bench.step(100), bench.step(100)], [Settled::Late; 2]);
    bench.fifo.state().active = None;
    bench.now_us += LATE_US;
    assert_eq!(bench.finish(100), Settled::Measured);
    assert_eq!(bench.log.lock().counters().late, 1);
    bench.check();
}

#[test]
fn a_command_without_end_is_given_up() {
    let mut bench = Bench::new();
    bench.record(1);
    bench.break_by(FifoFault::NeverAnswers);
    let settled = (0..40_000).map(|_| bench.step(1)).find(|settled| *settled != Settled::Working);
    assert_eq!(settled, Some(Settled::Late));
    assert_eq!(bench.fifo.state().active, None);
    bench.break_by(FifoFault::None);
    bench.now_us += LATE_US;
    assert_eq!(bench.finish(1), Settled::Measured);
    bench.check();
}

#[test]
fn nothing_else_is_sent_while_the_tpm_works() {
    let mut bench = Bench::new();
    bench.record(1);
    assert!(!bench.link.is_at_work());
    assert_eq!(bench.step(1), Settled::Working);
    assert!(bench.link.is_at_work());
    assert_eq!(bench.finish(1), Settled::Measured);
    assert!(!bench.link.is_at_work());
    assert_eq!(bench.step(1), Settled::Measured, "once more is no more");
    assert_eq!(bench.log.lock().counters().batches, 1);
}

#[test]
fn a_full_log_drops_its_oldest_batches_in_parts() {
    let mut bench = Bench::new();
    while bench.log.lock().counters().spilled == 0 {
        bench.record(1);
        let through = bench.log.lock().counters().records;
        assert_eq!(bench.finish(through), Settled::Measured);
    }
    bench.record(100);
    let all = *bench.log.lock().counters();
    let mut parts = 0;
    let dropped = |bench: &Bench| bench.log.lock().counters().spilled_batches;
    while !bench.link.is_at_work() {
        let before = dropped(&bench);
        assert_eq!(bench.step(all.records), Settled::Working);
        assert!(dropped(&bench) - before <= 4);
        bench.check();
        parts += 1;
    }
    assert!(parts > 4, "{parts}");
    assert_eq!(bench.finish(all.records), Settled::Measured);
    assert_eq!(bench.log.lock().counters().batches, all.batches + 1);
    bench.check();
}
