//! Child processes that do not outlive the bench.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

/// A process that is ended when this is dropped, or when the thread that started it dies.
pub struct Guarded {
    child: Child,
    name: &'static str,
}

/// The start of a command line for [`Guarded::spawn`]: `setpriv` makes the kernel end the program with us.
pub fn command(program: &str) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", program]);
    command
}

impl Guarded {
    /// Starts `command` with its errors in the file `log`.
    pub fn spawn(name: &'static str, mut command: Command, log: &Path) -> Result<Self> {
        let errors = File::create(log).with_context(|| log.display().to_string())?;
        let child =
            command.stderr(Stdio::from(errors)).spawn().with_context(|| format!("starting {name}"))?;
        Ok(Self { child, name })
    }

    /// The process's number.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// CPU time that its threads have used, to ten milliseconds.
    ///
    /// Spec: proc(5), `/proc/pid/stat`, fields 14 and 15.
    pub fn cpu_time(&self) -> Result<Duration> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.id()))?;
        // The second field is a name in parentheses.
        let (_, rest) = stat.rsplit_once(')').context("/proc/pid/stat")?;
        let ticks: u64 = rest.split_whitespace().skip(11).take(2).filter_map(|n| n.parse::<u64>().ok()).sum();
        Ok(Duration::from_millis(ticks.saturating_mul(10)))
    }

    /// Its standard input and output, when it was given pipes and they were not asked for before.
    pub fn pipes(&mut self) -> Option<(ChildStdin, ChildStdout)> {
        Some((self.child.stdin.take()?, self.child.stdout.take()?))
    }

    /// How it ended, if it has.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        self.child.try_wait().with_context(|| format!("waiting for {}", self.name))
    }

    /// Waits up to `time` for its end.
    pub fn wait(&mut self, time: Duration) -> Result<Option<ExitStatus>> {
        let end = Instant::now() + time;
        loop {
            let ended = self.ended()?;
            if ended.is_some() || Instant::now() > end {
                return Ok(ended);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Ends it now.
    pub fn kill(&mut self) {
        // Both fail only when it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        self.kill();
    }
}
