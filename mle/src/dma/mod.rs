//! DMA protection while the guest runs: what the IOMMUs stopped goes on record, and after an SMI they are compared with what
//! they were set to.

mod iommus;
pub mod reserved;
pub mod shown;

use core::fmt::{self, Write};
use core::sync::atomic::{AtomicU64, Ordering};

use firmware::exposure::{Access, Decision, Kind, Meter, Record, Text};
use iommu::fault::{self, Fault, Reason};
use spin::{Mutex, Once};

pub use self::iommus::{Error, Iommus, Left, Listed};
use crate::metal::{PhysWindow, TscClock};
use crate::platform::Machine;
use crate::{exposure, smi};

/// How often the IOMMUs' logs are looked at: three register reads for each IOMMU. There is no interrupt, so no device can
/// cause a storm of them; a guest that makes no exit leaves the log to fill, which the IOMMU reports.
const PERIOD_US: u64 = 100_000;

/// The device table is two megabytes: it is not compared more often than this.
const TABLE_PERIOD_US: u64 = 1_000_000;

/// What is left open where devices' interrupts are not checked.
pub const ALL_INTERRUPTS: &str = "devices may send SMI, NMI and INIT";

static DMA: Once<Mutex<Dma>> = Once::new();
/// When the logs are looked at next, since the MLE's start.
static NEXT_US: AtomicU64 = AtomicU64::new(0);

struct Dma {
    iommus: Iommus<PhysWindow>,
    machine: Machine,
    stopped: Stopped,
    /// A log could not be read: said once.
    broken: bool,
    /// When the device table may be compared next.
    next_table_us: u64,
    /// An SMI came, and it was not compared since.
    table_owed: bool,
    /// What the guest sees of it.
    shown: Option<shown::Unit>,
    /// Where a comparison that has begun goes on.
    table_at: Option<u32>,
}

/// What was stopped so far. Each kind of record has its own bound: devices choose how many there would be.
struct Stopped {
    faults: Meter,
    /// Times that a log ran over.
    overflows: Meter,
}

impl Stopped {
    const fn new() -> Self {
        Self { faults: Meter::new(), overflows: Meter::new() }
    }

    /// Counts a fault; what goes on record of it, if anything does.
    fn record(&mut self, fault: &Fault, cpu: u32, now_us: u64) -> Option<Record> {
        let untold = self.faults.admit(now_us)?;
        let how = match fault.access {
            fault::Access::Read => Access::READ,
            fault::Access::Write => Access::WRITE,
            fault::Access::Unknown => 0,
        };
        let access = Some(Access { source: fault.source, address: fault.address, how });
        let text = match (fault.reason, untold) {
            (Reason::Denied, 0) => None,
            (reason, 0) => Some(Text::new(Why(reason))),
            (reason, n) => Some(Text::new(format_args!("{}; {n} more before it", Why(reason)))),
        };
        let record = Record::new(Kind::IOMMU_FAULT, cpu, now_us);
        Some(Record { access, text, decision: Decision::DENIED, ..record })
    }

    /// Counts a log that ran over; what goes on record of it, if anything does.
    fn overflow(&mut self, now_us: u64) -> Option<Text> {
        Some(match self.overflows.admit(now_us)? {
            0 => Text::new("a log of the IOMMU ran over: more was stopped"),
            n => Text::new(format_args!("a log ran over; {n} times more before it")),
        })
    }
}

/// In words.
struct Why(Reason);

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Reason::Denied => f.write_str("not mapped"),
            Reason::Interrupt => f.write_str("interrupt"),
            Reason::Broken(code) => write!(f, "IOMMU event {code}"),
        }
    }
}

impl Dma {
    /// Whether the table is to be compared now.
    fn table_due(&self, now_us: u64) -> bool {
        self.table_owed && now_us >= self.next_table_us
    }
}

/// Takes charge of the IOMMUs, which are open to the guest's devices.
pub fn keep(iommus: Iommus<PhysWindow>, machine: Machine) {
    DMA.call_once(|| {
        Mutex::new(Dma {
            iommus,
            machine,
            stopped: Stopped::new(),
            broken: false,
            next_table_us: 0,
            table_owed: false,
            shown: None,
            table_at: None,
        })
    });
}

/// Takes charge of the IOMMUs after another launch had them.
pub fn keep_again(iommus: Iommus<PhysWindow>) {
    if let Some(dma) = DMA.get() {
        dma.lock().iommus = iommus;
    }
}

/// Puts on record what was stopped since the last look, if it is time for one. Cheap when not; called at each exit.
pub fn settle(id: impl FnOnce() -> u32, clock: &TscClock) {
    let now = exposure::now_us(clock);
    if now < NEXT_US.load(Ordering::Relaxed) {
        return;
    }
    // Another CPU looks already.
    let Some(mut dma) = DMA.get().and_then(Mutex::try_lock) else { return };
    let id = id();
    if dma.table_due(now) {
        smi::owe_look();
    }
    let Dma { iommus, machine, stopped, broken, .. } = &mut *dma;
    let drained = iommus.drain(machine, |fault| {
        if let Some(record) = stopped.record(&fault, id, now) {
            exposure::record(&record);
        }
    });
    let period = if drained.as_ref().is_ok_and(|d| d.more) { 0 } else { PERIOD_US };
    NEXT_US.store(now.saturating_add(period), Ordering::Relaxed);
    let text = match drained {
        Ok(drained) if drained.overflowed => stopped.overflow(now),
        Err(error) if !core::mem::replace(broken, true) => Some(Text::new(error)),
        _ => None,
    };
    if text.is_some() {
        exposure::record(&Record { text, ..Record::new(Kind::IOMMU_FAULT, id, now) });
    }
}

/// After an SMI: looks for a register or device table entry that is not what the MLE set. The table is compared if it was not lately,
/// and otherwise when [`settle`] finds that it is time; it is compared in parts. True while there are more.
///
/// # Errors
/// The first difference.
pub fn look(clock: &TscClock) -> Result<bool, Error> {
    let Some(mut dma) = DMA.get().map(Mutex::lock) else { return Ok(false) };
    let from = match dma.table_at {
        Some(from) => from,
        None => {
            dma.iommus.verify_registers()?;
            dma.table_owed = true;
            let now = exposure::now_us(clock);
            if !dma.table_due(now) {
                return Ok(false);
            }
            dma.table_owed = false;
            dma.next_table_us = now.saturating_add(TABLE_PERIOD_US);
            0
        }
    };
    dma.table_at = dma.iommus.verify_part(from, &dma.machine)?;
    Ok(dma.table_at.is_some())
}

/// Writes how much was stopped.
pub fn write_stopped(out: &mut impl Write) {
    let Some(dma) = DMA.get().map(Mutex::lock) else { return };
    let Stopped { faults, overflows } = &dma.stopped;
    // A full buffer ends the report early.
    let _ = writeln!(
        out,
        "DMA: {} IOMMUs, {} accesses stopped, {} of them since the last record of one, {} overflows, {} of them since",
        dma.iommus.count(),
        faults.seen(),
        faults.silent(),
        overflows.seen(),
        overflows.silent()
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_is_told_with_device_address_and_those_left_out_before_it() {
        let mut stopped = Stopped::new();
        let fault = Fault {
            source: 0x0010_0108,
            address: 0x7ae0_0000,
            access: fault::Access::Write,
            reason: Reason::Denied,
        };
        let first = stopped.record(&fault, 3, 7).unwrap();
        let access = Access { source: 0x0010_0108, address: 0x7ae0_0000, how: Access::WRITE };
        assert_eq!((first.access, first.text, first.cpu), (Some(access), None, 3));
        for _ in 0..99 {
            stopped.record(&fault, 3, 7);
        }
        assert_eq!((stopped.faults.seen(), stopped.faults.silent()), (100, 84));
        let broken = Fault { access: fault::Access::Unknown, reason: Reason::Broken(3), ..fault };
        let later = stopped.record(&broken, 3, 7 + Meter::PERIOD_US).unwrap();
        assert_eq!(later.text, Some(Text::new("IOMMU event 3; 84 more before it")));
        assert_eq!(later.access.unwrap().how, 0);
    }

    #[test]
    fn logs_that_run_over_at_each_look_leave_no_more_records_than_faults_do() {
        let mut stopped = Stopped::new();
        let told: Vec<_> = (0..100).filter_map(|look| stopped.overflow(look * PERIOD_US)).collect();
        assert_eq!(told.len(), 16 + 9);
        assert_eq!(told[0], Text::new("a log of the IOMMU ran over: more was stopped"));
        assert_eq!(told[24], Text::new("a log ran over; 9 times more before it"));
        assert_eq!((stopped.overflows.seen(), stopped.overflows.silent()), (100, 9));
    }
}
