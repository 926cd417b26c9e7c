//! Log lines: on the serial port, one a line, with the time since launch. The guest has the port once it runs:
//! then only failures are printed.

use core::fmt::Write;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use hv::io::Clock;
use log::{LevelFilter, Log, Metadata, Record};

use crate::metal::{Ports, Serial, TscClock};

struct SerialLog;

static START_US: AtomicU64 = AtomicU64::new(0);
/// Of [`clock`]; 0 before [`init`].
static KHZ: AtomicU64 = AtomicU64::new(0);
static QUIET: AtomicBool = AtomicBool::new(false);
static LOG: SerialLog = SerialLog;

impl Log for SerialLog {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }
    #[expect(unsafe_code, reason = "the serial port has one user at a time: the MLE until the guest runs")]
    fn log(&self, record: &Record<'_>) {
        if QUIET.load(Ordering::Relaxed) {
            return;
        }
        let now = clock().now_us();
        let since = now.saturating_sub(START_US.load(Ordering::Relaxed));
        // SAFETY: installed by the image alone (`init`), which runs at CPL 0.
        let mut serial = Serial(unsafe { Ports::new() });
        let level = match record.level() {
            log::Level::Error => "error: ",
            log::Level::Warn => "warning: ",
            _ => "",
        };
        let (ms, us) = (since.wrapping_div(1000), since.wrapping_rem(1000));
        let _ = writeln!(serial, "cordon: [{ms:5}.{us:03} ms] {level}{}", record.args());
    }
    fn flush(&self) {}
}

/// Starts the log; times count from now.
pub fn init(clock: TscClock) {
    KHZ.store(clock.khz, Ordering::Relaxed);
    START_US.store(clock.now_us(), Ordering::Relaxed);
    // A second logger cannot be there: this image has one entry.
    let _ = log::set_logger(&LOG);
    log::set_max_level(LevelFilter::Info);
}

/// The launch's clock, for code that is called from anywhere.
pub fn clock() -> TscClock {
    TscClock { khz: KHZ.load(Ordering::Relaxed).max(1) }
}

/// The guest has the serial port from now on.
pub fn guest_has_the_port() {
    QUIET.store(true, Ordering::Relaxed);
}
