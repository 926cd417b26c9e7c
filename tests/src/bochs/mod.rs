//! Bochs: the emulator that has VMX.
//!
//! It is driven through its debugger: `debugger.rs`. Serial ports lead to a file and to pseudo-terminals.

pub mod acpi;
pub mod debugger;
pub mod player;

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use hv::failure::Record;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::channel::Channel;
use crate::child::{self, Guarded};
use crate::emulator::Emulator;
use crate::machine::{Console, Spec};
use crate::pty::{self, Pty, RawTerminal};
use crate::run_dir::RunDir;
use debugger::{Debugger, Stop};
use player::{Part, Player, Watch};

/// OVMF with its variable store, which Bochs keeps for one run only.
const FIRMWARE: &str = "/usr/share/ovmf/OVMF.fd";
/// Guest memory that is there whatever the board has: the windows of TXT and TPM below 4 GiB are RAM only when all below
/// 4 GiB is. The firmware finds 3 GiB of it.
const MEMORY: u32 = 4096;
/// Where the memory ends that the firmware finds.
pub const LOW_END: u64 = 0xc000_0000;
/// Instructions in an emulated second. The fewer, the shorter all that waits for time to pass.
pub const SECOND: u32 = 10_000_000;
/// How long a request may take.
const REQUEST_TIME: Duration = Duration::from_secs(60);
/// How long the machine may go on after it was interrupted, before it is interrupted again.
const INTERRUPT_TIME: Duration = Duration::from_secs(2);

/// A machine's configuration.
fn configuration(spec: &Spec, console: &str, channel: &str) -> String {
    let Spec { memory, cpus, .. } = spec;
    let model = spec.cpu.model();
    format!(
        "memory: guest={MEMORY}, host={memory}
cpu: model={model}, count={cpus}, ips={SECOND}, reset_on_triple_fault=0
romimage: file={FIRMWARE}
vgaromimage: file=$BXSHARE/VGABIOS-lgpl-latest
display_library: sdl2
ata0: enabled=1, ioaddr1=0x1f0, ioaddr2=0x3f0, irq=14
ata0-master: type=disk, path=esp.img, mode=flat
boot: disk
log: bochs.log
panic: action=report
error: action=report
info: action=report, cpu0=ignore, cpu1=ignore
debug: action=ignore
com1: enabled=1, {console}
com2: enabled=1, mode=term, dev={channel}
sound: waveoutdrv=dummy, waveindrv=dummy, midioutdrv=dummy
"
    )
}

enum Request {
    Read { at: u64, length: usize, reply: Sender<Result<Vec<u8>>> },
    Write { at: u64, bytes: Vec<u8>, reply: Sender<Result<()>> },
    Ticks { reply: Sender<Result<u64>> },
}

/// Whether the machine runs: only then it may be interrupted, as an interrupt in the middle of a command spoils its answer.
#[derive(Clone, Default)]
struct Running(Arc<Mutex<bool>>);

impl Running {
    /// It neither begins to run nor comes to rest, as far as anyone knows, before this is dropped.
    fn lock(&self) -> MutexGuard<'_, bool> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A Bochs process and the thread that talks to its debugger.
pub struct Bochs {
    process: Guarded,
    requests: Sender<Request>,
    running: Running,
    log: PathBuf,
    watch: Watch,
    _terminal: Option<RawTerminal>,
}

impl Bochs {
    /// Starts a machine whose disk image is in `dir`. Gives also the command channel.
    pub fn start(dir: &RunDir, spec: &Spec, part: Part) -> Result<(Self, Channel)> {
        let link = Pty::open()?;
        let (console, terminal) = match spec.console {
            Console::Log => ("mode=file, dev=console.log".to_owned(), None),
            Console::Terminal => {
                let pty = Pty::open()?;
                let device = format!("mode=term, dev={}", pty.path.display());
                (device, Some(pty))
            }
        };
        let configuration = configuration(spec, &console, &link.path.to_string_lossy());
        fs::write(dir.file("bochs.txt"), configuration)?;
        player::write_states(dir.path(), spec.cpus)?;
        let mut command = child::command("bochs-bin");
        command.current_dir(dir.path()).args(["-q", "-f", "bochs.txt"]);
        command.env("SDL_VIDEODRIVER", "dummy").env("SDL_AUDIODRIVER", "dummy");
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut process = Guarded::spawn("bochs-bin", command, &dir.file("bochs.err"))?;
        let (input, output) = process.pipes().context("Bochs without pipes")?;
        let debugger = Debugger::new(input, output, File::create(dir.file("debugger.log"))?);
        let mut debugger = debugger.with_context(|| {
            let said = fs::read_to_string(dir.file("bochs.err")).unwrap_or_default();
            format!("starting Bochs: {}", said.trim())
        })?;
        let (requests, receiver) = channel();
        let pid = process.id();
        let watch = Watch::default();
        let player = Player::new(&mut debugger, part, watch.clone())?;
        let failures = watch.clone();
        let running = Running::default();
        let runs = running.clone();
        thread::spawn(move || {
            if let Err(error) = drive(debugger, player, &receiver, &runs) {
                failures.fail(format!("{error:#}"));
            }
        });
        let channel = Channel::new(link.host.try_clone()?, link);
        let _terminal = terminal.map(|pty| attach(pty, dir.file("console.log"), pid)).transpose()?.flatten();
        Ok((Self { process, requests, running, log: dir.file("bochs.log"), watch, _terminal }, channel))
    }

    /// What the player of the board's TPM and of SENTER has seen.
    pub fn watch(&self) -> Watch {
        self.watch.clone()
    }

    fn request<T>(&mut self, make: impl FnOnce(Sender<Result<T>>) -> Request) -> Result<T> {
        let (sender, receiver) = channel();
        let end = Instant::now() + REQUEST_TIME;
        let mut running = self.running.lock();
        // At rest it serves this before it runs again.
        self.requests.send(make(sender)).ok().context("Bochs' debugger is gone")?;
        loop {
            if *running {
                interrupt(self.process.id())?;
            }
            drop(running);
            let answer = receiver.recv_timeout(INTERRUPT_TIME);
            running = self.running.lock();
            match answer {
                // An interrupt that came before the debugger had taken its command to run is forgotten.
                Err(RecvTimeoutError::Timeout) if Instant::now() < end => {}
                answer => return answer.context("Bochs' debugger does not answer")?,
            }
        }
    }
}

fn interrupt(pid: u32) -> Result<()> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).context("Bochs' process")?;
    kill_process(pid, Signal::INT).context("interrupting Bochs")
}

/// Has the user's terminal and the console's log lead to the port.
fn attach(pty: Pty, log: PathBuf, pid: u32) -> Result<Option<RawTerminal>> {
    let terminal = RawTerminal::enter();
    let mut output = pty.host.try_clone()?;
    let keys = pty.host.try_clone()?;
    let mut log = File::create(log)?;
    thread::spawn(move || {
        // Held until the end: closed, the other end would be too.
        let _pty = pty;
        let mut chunk = [0; 4096];
        while let Ok(n @ 1..) = output.read(&mut chunk) {
            let mut screen = std::io::stdout().lock();
            let _ = screen.write_all(&chunk[..n]).and_then(|()| screen.flush());
            let _ = log.write_all(&chunk[..n]);
        }
    });
    thread::spawn(move || {
        pty::forward_keys(std::io::stdin(), keys);
        let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
        let _ = pid.map(|pid| kill_process(pid, Signal::TERM));
    });
    Ok(terminal)
}

/// Lets the machine run and serves requests, until it ends.
fn drive(
    mut debugger: Debugger,
    mut player: Player,
    requests: &Receiver<Request>,
    running: &Running,
) -> Result<()> {
    loop {
        let mut runs = running.lock();
        while let Ok(request) = requests.try_recv() {
            // Who asked may have given up.
            match request {
                Request::Read { at, length, reply } => drop(reply.send(debugger.read(at, length))),
                Request::Write { at, bytes, reply } => drop(reply.send(debugger.write(at, &bytes))),
                Request::Ticks { reply } => drop(reply.send(debugger.ticks())),
            }
        }
        *runs = true;
        drop(runs);
        let stop = debugger.run();
        *running.lock() = false;
        let stop = stop?;
        if stop == Stop::Exited {
            return Ok(());
        }
        if !player.stopped(&mut debugger, &stop)? {
            // Bochs says nothing more.
            let _ = debugger.ask("q");
            return Ok(());
        }
    }
}

impl Emulator for Bochs {
    fn ended(&mut self) -> Result<Option<ExitStatus>> {
        self.process.ended()
    }

    fn wait(&mut self, time: Duration) -> Result<Option<ExitStatus>> {
        self.process.wait(time)
    }

    fn last_end(&self) -> Option<String> {
        let state = self.watch.state();
        if let Some(code) = state.reset {
            let why = match (state.refusal, Record::from_errorcode(code)) {
                (Some(refusal), _) => format!(", SINIT: {}", refusal.why),
                (None, Some(record)) => format!(", {record}"),
                (None, None) => String::new(),
            };
            return Some(format!("TXT reset, TXT.ERRORCODE {code:#x}{why}"));
        }
        let log = fs::read(&self.log).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        log.contains("soft power off").then(|| "guest-shutdown".to_owned())
    }

    fn triple_fault(&self) -> bool {
        let log = fs::read(&self.log).unwrap_or_default();
        String::from_utf8_lossy(&log).contains("exception with no resolution")
    }

    fn memory(&mut self, at: u64, length: usize) -> Result<Vec<u8>> {
        self.request(|reply| Request::Read { at, length, reply })
    }

    fn write_memory(&mut self, at: u64, bytes: &[u8]) -> Result<()> {
        self.request(|reply| Request::Write { at, bytes: bytes.to_vec(), reply })
    }

    fn emulated_time(&mut self) -> Result<Option<Duration>> {
        let ticks = self.request(|reply| Request::Ticks { reply })?;
        Ok(Some(Duration::from_secs(ticks) / SECOND))
    }

    fn cpu_time(&self) -> Result<Duration> {
        self.process.cpu_time()
    }

    fn plug(&mut self, _device: &Value) -> Result<()> {
        bail!("Bochs' devices are there from the start")
    }

    fn unplug(&mut self, _id: &str) -> Result<()> {
        bail!("Bochs' devices are there to the end")
    }

    fn quit(&mut self) {
        self.process.kill();
    }
}
