//! SKINIT, played by the bench: no emulator implements it.
//!
//! The player learns where SKINIT will be from write breakpoints on all pages where the loader may put its
//! launch page (they cost nothing; execution breakpoints on all of them make the firmware five times
//! slower), and sets an execution breakpoint on the instruction itself. There it does what the CPU does. On a machine that
//! launches again and again it keeps the two on the launch page.
//!
//! Spec: \[APM2\] "Secure Startup with SKINIT".

use std::fs::File;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;
use hv::launch::{CordonEntry, FLAG_RESUME, SLB_SIZE, SLB_SLRT_POINTER_OFFSET};
use hv::slrt::{self, DlInfo, Slrt};
use sha2::{Digest, Sha256};
use zerocopy::{FromBytes, Immutable};

use crate::gdb::{Break, Gdb, Stop};
use crate::microcode;
use crate::stage::Stage;
use crate::swtpm::Control;

const SKINIT: [u8; 3] = [0x0f, 0x01, 0xde];
/// Where in its launch page the loader has SKINIT or GETSEC.
pub const SKINIT_OFFSET: u64 = 0xf0;
/// Where in the launch page the microcode is put, for as long as it runs.
const MICROCODE_OFFSET: u64 = 0x100;
/// Pages that a launch page may start on: below the extended BIOS data area, not page 0.
pub const CANDIDATES: std::ops::Range<u64> = 1..0x9f;
const PAGE: u64 = 0x1000;
/// What RIP, CS and CR0 hold on a CPU that INIT has reset and no SIPI has started.
const INIT_STATE: [(&str, u64); 3] = [("rip", 0xfff0), ("cs", 0xf000), ("cr0", 0x6000_0010)];
/// Where a relaunch has its ticket, past the two regions in its memory: `Answer` in `mle/src/relaunch/mod.rs`.
const RELAUNCH_TICKET: u64 = 0x1008;
/// How often, and how long each time, a CPU may run until it has carried out its INIT.
const INIT_WAITS: usize = 20;
const INIT_WAIT: Duration = Duration::from_millis(50);

/// A CPU, a TPM or a loader that does not do what it should.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Fault {
    /// The loader halved the length in the SLB's header: half of the image is not measured.
    SlbLength,
    /// The loader passes an address inside the SLB's 64 KiB; the CPU rounds it down.
    SlbUnaligned,
    /// A device changed a byte of the SLB after it was hashed.
    SlbChanged,
    /// The TPM took no part in the event.
    TpmError,
    /// Before a relaunch a bit of the ticket that it is handed was changed, by what ran last in the gap.
    Ticket,
}

/// A DRTM event that took place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Launch {
    /// Base of the secure loader block.
    pub base: u64,
    /// The measured bytes.
    pub image: Vec<u8>,
    /// Why the TPM did not measure them, if it did not.
    pub refused: Option<String>,
    /// At the MLE's first instruction: whether the measured bytes were still the same.
    pub intact: Option<bool>,
}

impl Launch {
    /// SHA-256 of the measured bytes.
    pub fn digest(&self) -> [u8; 32] {
        Sha256::digest(&self.image).into()
    }

    /// What the event leaves in PCR 17 of the SHA-256 bank: that digest extended into zero.
    pub fn pcr17(&self) -> [u8; 32] {
        Sha256::new().chain_update([0; 32]).chain_update(self.digest()).finalize().into()
    }
}

#[derive(Default)]
struct State {
    stage: Option<Stage>,
    launches: Vec<Launch>,
    failure: Option<String>,
}

/// Plays the CPU's part, in a thread of its own, until the MLE runs or, where it launches again, to the machine's end.
pub struct Player {
    state: Arc<Mutex<State>>,
    thread: JoinHandle<()>,
}

impl Player {
    /// Takes a gdb connection to a machine that has not started, starts it, and waits for SKINIT. `relaunches`: there will
    /// be more than one. From SKINIT on QEMU logs the items `logged`.
    pub fn start(
        stream: UnixStream,
        tpm: Control,
        fault: Option<Fault>,
        log: PathBuf,
        relaunches: bool,
        logged: Option<String>,
    ) -> Result<Self> {
        let state = Arc::new(Mutex::new(State::default()));
        let log = File::create(&log).with_context(|| log.display().to_string())?;
        let mut part = Part {
            gdb: Gdb::new(stream)?,
            tpm,
            fault,
            relaunches,
            logged,
            log,
            since: Instant::now(),
            state,
            watched: Vec::new(),
            armed: Vec::new(),
        };
        part.watch()?;
        let state = Arc::clone(&part.state);
        let thread = thread::spawn(move || {
            let shared = Arc::clone(&part.state);
            if let Err(error) = part.play() {
                lock(&shared).failure = Some(format!("{error:#}"));
            }
        });
        Ok(Self { state, thread })
    }

    /// How far the launch has come.
    pub fn stage(&self) -> Stage {
        lock(&self.state).stage.unwrap_or(Stage::Off)
    }

    /// Whether the player has left the machine, which then runs at full speed.
    pub fn finished(&self) -> bool {
        self.thread.is_finished()
    }

    /// The last event, once it took place.
    pub fn launch(&self) -> Option<Launch> {
        lock(&self.state).launches.last().cloned()
    }

    /// All events so far.
    pub fn launches(&self) -> Vec<Launch> {
        lock(&self.state).launches.clone()
    }

    /// Why the event could not be played.
    pub fn failure(&self) -> Option<String> {
        lock(&self.state).failure.clone()
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Part {
    gdb: Gdb,
    tpm: Control,
    fault: Option<Fault>,
    relaunches: bool,
    logged: Option<String>,
    log: File,
    since: Instant,
    state: Arc<Mutex<State>>,
    /// Where a write of SKINIT is waited for.
    watched: Vec<u64>,
    /// Where SKINIT was written, and its execution is waited for.
    armed: Vec<u64>,
}

impl Part {
    fn say(&mut self, text: &str) {
        // The log is a convenience; a full disk must not change the machine's course.
        let _ = writeln!(self.log, "{:7.2} s  {text}", self.since.elapsed().as_secs_f64());
    }

    fn watch(&mut self) -> Result<()> {
        self.watched.extend(CANDIDATES.map(|page| page * PAGE + SKINIT_OFFSET));
        self.watched.iter().try_for_each(|at| self.gdb.insert(Break::Write(*at)))
    }

    /// From the machine's start to the last MLE's.
    fn play(mut self) -> Result<()> {
        loop {
            let Some((cpu, at)) = self.wait_for_skinit()? else { return Ok(()) };
            let launch = self.measure(&cpu, at)?;
            if self.fault == Some(Fault::Ticket) {
                self.change_ticket(launch.base)?;
            }
            if let Some(items) = &self.logged {
                self.gdb.monitor(&format!("log {items}"))?;
            }
            self.enter(at, &launch)?;
            self.leave_pages_but(self.relaunches.then_some(at))?;
            let mle = self.mle_entry(launch.base);
            self.note(Stage::Slb, launch);
            match mle {
                Ok(entry) if !self.follow_to_mle(entry)? => return Ok(()),
                Ok(_) => {}
                Err(error) => self.say(&format!("not following to the MLE: {error:#}")),
            }
            if !self.relaunches {
                return self.gdb.detach();
            }
        }
    }

    /// Waits no longer for SKINIT but, if so, at `launch`.
    fn leave_pages_but(&mut self, launch: Option<u64>) -> Result<()> {
        for at in self.watched.extract_if(.., |at| Some(*at) != launch) {
            self.gdb.remove(Break::Write(at))?;
        }
        for at in self.armed.extract_if(.., |at| Some(*at) != launch) {
            self.gdb.remove(Break::Execute(at))?;
        }
        Ok(())
    }

    /// Runs the machine until a CPU is about to execute SKINIT; gives that CPU and the instruction's address.
    fn wait_for_skinit(&mut self) -> Result<Option<(String, u64)>> {
        loop {
            self.gdb.resume()?;
            let Stop::Thread { name, written } = self.gdb.wait()? else { return Ok(None) };
            self.gdb.select(&name)?;
            if let Some(at) = written {
                if !self.armed.contains(&at) && self.gdb.read(at, SKINIT.len())? == SKINIT {
                    self.armed.push(at);
                    self.say(&format!("SKINIT written to {at:#x}"));
                    self.gdb.insert(Break::Execute(at))?;
                }
                continue;
            }
            let at = self.gdb.register("rip")?;
            if self.gdb.read(at, SKINIT.len())? == SKINIT {
                return Ok(Some((name, at)));
            }
            // Other code runs where SKINIT was once written.
            self.gdb.step(&name)?;
        }
    }

    /// The event as the TPM sees it.
    fn measure(&mut self, cpu: &str, at: u64) -> Result<Launch> {
        ensure!(self.gdb.register("cr0")? & 1 == 1, "SKINIT at {at:#x} in real mode");
        ensure!(self.gdb.register("cs")? & 3 == 0, "SKINIT at {at:#x} in user mode: #GP");
        let mut rax = self.gdb.register("rax")?;
        if self.fault == Some(Fault::SlbUnaligned) {
            rax |= 0x1234;
        }
        let base = rax & 0xffff_0000;
        self.say(&format!("SKINIT at {at:#x} on CPU {cpu}, EAX {rax:#x}, SLB at {base:#x}"));
        if self.fault == Some(Fault::SlbLength) {
            let [_, length] = self.header(base)?;
            self.gdb.write(base + 2, &(length / 2).to_le_bytes())?;
        }
        let [_, length] = self.header(base)?;
        let image = self.gdb.read(base, length.into())?;
        let refused = match self.busy_cpu(cpu)? {
            Some(busy) => Some(format!("CPU {busy} is not in INIT state")),
            None if self.fault == Some(Fault::TpmError) => Some("the bench's TPM fault".to_owned()),
            None => {
                self.tpm.drtm_hash(&image)?;
                None
            }
        };
        if self.fault == Some(Fault::SlbChanged) {
            // The header's reserved word: the SLB runs as before, so only a look at the bytes tells.
            self.gdb.write(base + 12, &[0xff])?;
        }
        let launch = Launch { base, image, refused, intact: None };
        match &launch.refused {
            None => {
                let (digest, pcr) = (hex::encode(launch.digest()), hex::encode(launch.pcr17()));
                self.say(&format!("measured {length} bytes, SHA-256 {digest}; PCR 17 {pcr}"));
            }
            Some(why) => self.say(&format!("nothing measured: {why}")),
        }
        self.note(Stage::Skinit, launch.clone());
        Ok(launch)
    }

    fn header(&mut self, base: u64) -> Result<[u16; 2]> {
        let bytes = self.gdb.read(base, 4)?;
        Ok([u16::from_le_bytes([bytes[0], bytes[1]]), u16::from_le_bytes([bytes[2], bytes[3]])])
    }

    /// A CPU, other than the one that launches, that would not take part in the handshake; also when the
    /// one that launches is not the boot processor.
    fn busy_cpu(&mut self, launching: &str) -> Result<Option<String>> {
        let mut busy = None;
        for (index, other) in self.gdb.threads()?.into_iter().enumerate() {
            if other == launching {
                if index != 0 {
                    busy = Some(format!("{other}, which launches but is not the boot processor,"));
                }
                continue;
            }
            // On a busy host the emulator carries out an INIT later than any CPU does.
            let mut waits = 0..INIT_WAITS;
            while !self.in_init(&other)? {
                if waits.next().is_none() {
                    let state = INIT_STATE.map(|(register, _)| {
                        self.gdb
                            .register(register)
                            .map_or_else(|e| e.to_string(), |v| format!("{register} {v:#x}"))
                    });
                    self.say(&format!("CPU {other} is at {}", state.join(", ")));
                    busy = Some(other);
                    break;
                }
                self.gdb.run_alone(&other, INIT_WAIT)?;
            }
        }
        self.gdb.select(launching)?;
        Ok(busy)
    }

    fn in_init(&mut self, cpu: &str) -> Result<bool> {
        self.gdb.select(cpu)?;
        for (register, value) in INIT_STATE {
            if self.gdb.register(register)? != value {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Brings the CPU into the state of an SLB's first instruction.
    fn enter(&mut self, skinit: u64, launch: &Launch) -> Result<()> {
        let [entry, _] = self.header(launch.base)?;
        let place = skinit - SKINIT_OFFSET + MICROCODE_OFFSET;
        let (code, end) = microcode::assemble(place)?;
        let saved = self.gdb.read(place, code.len())?;
        self.gdb.write(place, &code)?;
        self.gdb.set_register("rsp", place)?;
        self.gdb.set_register("rip", place + microcode::ENTRY)?;
        self.gdb.insert(Break::Execute(place + end))?;
        self.gdb.resume()?;
        ensure!(self.gdb.wait()? != Stop::Exited, "the machine ended in the bench's microcode");
        let stopped = self.gdb.register("rip")?;
        ensure!(stopped == place + end, "the bench's microcode at {place:#x} stopped at {stopped:#x}");
        self.gdb.remove(Break::Execute(place + end))?;
        self.gdb.write(place, &saved)?;
        let signature = self.gdb.register("rsi")?;
        let registers = [
            ("rax", launch.base),
            ("rbx", 0),
            ("rcx", 0),
            ("rdx", signature),
            ("rsi", 0),
            ("rdi", 0),
            ("rbp", 0),
            ("rsp", launch.base + SLB_SIZE),
            ("eflags", 2),
            ("rip", launch.base + u64::from(entry)),
        ];
        for (name, value) in registers {
            self.gdb.set_register(name, value)?;
        }
        for (name, want) in [("cr0", 0x11), ("cr3", 0), ("cr4", 0), ("efer", 0), ("cs", 8), ("ss", 0x10)] {
            let is = self.gdb.register(name)?;
            ensure!(is == want, "SLB entry state: {name} is {is:#x}, must be {want:#x}");
        }
        self.say(&format!("entering the SLB at {:#x}", launch.base + u64::from(entry)));
        Ok(())
    }

    /// An entry of the table that the SLB at `base` is given.
    fn table_entry<T: FromBytes + Immutable>(&mut self, base: u64, tag: u32) -> Result<T> {
        let pointer = self.gdb.read(base + SLB_SLRT_POINTER_OFFSET, 8)?;
        let pointer = u64::from_le_bytes(pointer.as_slice().try_into()?);
        let table = self.gdb.read(pointer, slrt::MAX_SIZE)?;
        let slrt = Slrt::parse(&table).map_err(|e| anyhow::anyhow!("{e}"))?;
        slrt.entry(tag).map_err(|e| anyhow::anyhow!("{e}"))
    }

    /// Changes a bit of the ticket by which a guest that waits is to go on, if one does.
    fn change_ticket(&mut self, base: u64) -> Result<()> {
        let entry: CordonEntry = self.table_entry(base, slrt::TAG_CORDON)?;
        if entry.flags.get() & FLAG_RESUME != 0 {
            let at = entry.relaunch.base.get() + 2 * entry.mle_region.size.get() + RELAUNCH_TICKET;
            let bytes = self.gdb.read(at, 1)?;
            self.gdb.write(at, &[bytes[0] ^ 1])?;
            self.say(&format!("the ticket at {at:#x} is changed"));
        }
        Ok(())
    }

    /// Where the SLB stage will enter the MLE, if the loader's table is sound.
    fn mle_entry(&mut self, base: u64) -> Result<u64> {
        let info: DlInfo = self.table_entry(base, slrt::TAG_DL_INFO)?;
        info.dlme_base.get().checked_add(info.dlme_entry.get()).context("SLRT: MLE entry point wraps")
    }

    /// SL_DEV protects the SLB until then: nothing may have changed what was measured. False when the machine ends first.
    fn follow_to_mle(&mut self, entry: u64) -> Result<bool> {
        self.gdb.insert(Break::Execute(entry))?;
        self.gdb.resume()?;
        let Stop::Thread { name, .. } = self.gdb.wait()? else { return Ok(false) };
        self.gdb.select(&name)?;
        let at = self.gdb.register("rip")?;
        if at != entry {
            bail!("stopped at {at:#x} on the way to the MLE at {entry:#x}");
        }
        let Some(mut launch) = lock(&self.state).launches.last().cloned() else {
            bail!("no launch to follow")
        };
        let intact = self.gdb.read(launch.base, launch.image.len())? == launch.image;
        self.say(&format!("MLE entered at {entry:#x}, SLB {}", if intact { "unchanged" } else { "CHANGED" }));
        launch.intact = Some(intact);
        self.note(Stage::Mle, launch);
        self.gdb.remove(Break::Execute(entry))?;
        Ok(true)
    }

    fn note(&mut self, stage: Stage, launch: Launch) {
        let mut state = lock(&self.state);
        if stage != Stage::Skinit {
            state.launches.pop();
        }
        state.launches.push(launch);
        state.stage = Some(stage);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake_gdb::{FakeCpu, FakeMachine, FakeStub};
    use crate::swtpm::fake_tpm;
    use std::time::Duration;

    const LAUNCH: u64 = 0x9_d000;
    const AT: u64 = LAUNCH + SKINIT_OFFSET;
    const BASE: u64 = 0x7e72_0000;
    const LENGTH: u16 = 5000;
    const MLE: u64 = 0x100_0000;

    /// A machine on its way to SKINIT: the loader writes the instruction, then runs into it.
    fn machine(aps: Vec<FakeCpu>) -> FakeStub {
        let bsp = FakeCpu::from([("rip", AT), ("cs", 0x38), ("cr0", 0x8000_0033), ("rax", BASE), ("r8", 7)]);
        let stub = FakeStub::start([vec![bsp], aps].concat());
        let mut machine = stub.machine();
        let mut image: Vec<u8> = (0..LENGTH).map(|i| i as u8).collect();
        image[..4].copy_from_slice(&[0x10, 0, LENGTH.to_le_bytes()[0], LENGTH.to_le_bytes()[1]]);
        machine.load(BASE, &image);
        machine.load(LAUNCH + MICROCODE_OFFSET, b"of the loader");
        for _each_half_of_the_copy in 0..2 {
            machine.script.push_back(Box::new(|m| {
                m.load(AT, &SKINIT);
                format!("T05thread:01;watch:{AT:x};")
            }));
        }
        machine.script.push_back(Box::new(|_| "T05thread:01;".to_owned()));
        machine.script.push_back(Box::new(run_microcode));
        drop(machine);
        stub
    }

    /// What the microcode does, as far as registers show it.
    fn run_microcode(machine: &mut FakeMachine) -> String {
        let place = LAUNCH + MICROCODE_OFFSET;
        let (code, end) = microcode::assemble(place).unwrap();
        assert_eq!(machine.bytes(place, code.len() as u64), code);
        let bsp = &mut machine.cpus[0].0;
        assert_eq!((bsp["rip"], bsp["rsp"]), (place + microcode::ENTRY, place));
        bsp.extend([
            ("rip", place + end),
            ("cr0", 0x11),
            ("cs", 8),
            ("ss", 0x10),
            ("rsi", 0x80_0f12),
            ("rbx", 9),
        ]);
        "T05thread:01;".to_owned()
    }

    /// Plays to the script's end; gives the player and what the TPM was sent.
    fn play(stub: &FakeStub, fault: Option<Fault>) -> (Player, Vec<Vec<u8>>) {
        play_on(stub, fault, false)
    }

    fn play_on(stub: &FakeStub, fault: Option<Fault>, relaunches: bool) -> (Player, Vec<Vec<u8>>) {
        let (control, requests) = fake_tpm(0);
        let log = tempfile::NamedTempFile::new().unwrap();
        let player =
            Player::start(stub.connect(), control, fault, log.path().to_owned(), relaunches, None).unwrap();
        for _ in 0..500 {
            if player.finished() {
                break;
            }
            thread::sleep(Duration::from_millis(10));
        }
        assert_eq!(player.failure(), None);
        let requests = requests.lock().unwrap().clone();
        (player, requests)
    }

    #[test]
    fn a_launch_measures_enters_and_leaves_no_trace() {
        let stub = machine(vec![FakeCpu::in_init()]);
        let before = stub.machine().bytes(LAUNCH + MICROCODE_OFFSET, 0x200);
        let (player, requests) = play(&stub, None);
        let launch = player.launch().unwrap();
        let machine = stub.machine();
        // Start, two pieces, end.
        assert_eq!(requests.len(), 4);
        assert_eq!([&requests[1][8..], &requests[2][8..]].concat(), launch.image);
        assert_eq!((launch.image.len(), launch.refused), (usize::from(LENGTH), None));
        assert_eq!(machine.bytes(LAUNCH + MICROCODE_OFFSET, 0x200), before);
        let bsp = &machine.cpus[0].0;
        let state = ["rax", "rbx", "rdx", "rsi", "rsp", "eflags", "rip"].map(|name| bsp[name]);
        assert_eq!(state, [BASE, 0, 0x80_0f12, 0, BASE + 0x1_0000, 2, BASE + 0x10]);
        // There is no SLRT: the player leaves at once, with nothing behind.
        assert_eq!(player.stage(), Stage::Slb);
        assert!(machine.detached && machine.points.is_empty());
    }

    #[test]
    fn a_cpu_that_is_not_in_init_spoils_the_measurement() {
        let running = FakeCpu::from([("rip", 0xfff1), ("cs", 0xf000), ("cr0", 0x6000_0010)]);
        let (player, requests) = play(&machine(vec![FakeCpu::in_init(), running]), None);
        assert_eq!(player.launch().unwrap().refused.unwrap(), "CPU 03 is not in INIT state");
        assert_eq!(requests.len(), 0);
        // The SLB is entered all the same: the CPU does not wait for an answer.
        assert_eq!(player.stage(), Stage::Slb);
    }

    #[test]
    fn an_init_that_is_on_its_way_is_waited_for() {
        let running = FakeCpu::from([("rip", 0xfff1), ("cs", 0xf000), ("cr0", 0x6000_0010)]);
        let stub = machine(vec![running]);
        stub.machine().alone.extend([FakeCpu::default(), FakeCpu::in_init()]);
        let (player, _) = play(&stub, None);
        assert_eq!(player.launch().unwrap().refused, None);
    }

    #[test]
    fn only_the_boot_processor_launches() {
        let stub = machine(vec![]);
        let bsp = stub.machine().cpus[0].clone();
        stub.machine().cpus.push(bsp);
        stub.machine().cpus[0] = FakeCpu::in_init();
        stub.machine().script[2] = Box::new(|_| "T05thread:02;".to_owned());
        stub.machine().script[3] = Box::new(|m| {
            m.cpus.swap(0, 1);
            let stop = run_microcode(m);
            m.cpus.swap(0, 1);
            stop
        });
        let (player, requests) = play(&stub, None);
        assert!(player.launch().unwrap().refused.unwrap().contains("boot processor"));
        assert_eq!(requests.len(), 0);
    }

    #[test]
    fn other_code_at_the_same_place_is_stepped_over() {
        let stub = machine(vec![]);
        // The page is used for something else in between.
        stub.machine().script.insert(
            2,
            Box::new(|m| {
                m.load(AT, &[0x90, 0x90, 0x90]);
                "T05thread:01;".to_owned()
            }),
        );
        stub.machine().script.insert(
            3,
            Box::new(|m| {
                assert_eq!(m.steps, 1);
                m.load(AT, &SKINIT);
                "T05thread:01;".to_owned()
            }),
        );
        stub.machine().script.remove(4);
        let (player, _) = play(&stub, None);
        assert_eq!(player.stage(), Stage::Slb);
    }

    #[test]
    fn faults_do_what_they_say() {
        let (player, _) = play(&machine(vec![]), Some(Fault::SlbLength));
        assert_eq!(player.launch().unwrap().image.len(), usize::from(LENGTH) / 2);
        let (player, _) = play(&machine(vec![]), Some(Fault::SlbUnaligned));
        assert_eq!(player.launch().unwrap().base, BASE);
        let (player, requests) = play(&machine(vec![]), Some(Fault::TpmError));
        assert!(player.launch().unwrap().refused.is_some() && requests.is_empty());
    }

    /// Like [`machine`], with a table that leads to an MLE, which is reached.
    fn machine_with_mle() -> FakeStub {
        let stub = machine(vec![]);
        let mut table = slrt::Builder::new(slrt::ARCH_SKINIT);
        let mut info: DlInfo = zerocopy::FromZeros::new_zeroed();
        info.hdr = slrt::entry_header::<DlInfo>(slrt::TAG_DL_INFO);
        info.dlme_base.set(MLE);
        info.dlme_entry.set(0x40);
        table.entry(&info).unwrap();
        let (bytes, _) = table.finish().unwrap();
        let mut machine = stub.machine();
        machine.load(0x5000, &bytes);
        machine.load(BASE + SLB_SLRT_POINTER_OFFSET, &0x5000u64.to_le_bytes());
        machine.script.push_back(Box::new(|m| {
            assert_eq!(m.points.last(), Some(&format!("1,{:x},1", MLE + 0x40)));
            m.cpus[0].0.insert("rip", MLE + 0x40);
            "T05thread:01;".to_owned()
        }));
        drop(machine);
        stub
    }

    #[test]
    fn a_machine_that_launches_again_is_measured_again() {
        let stub = machine_with_mle();
        let mut machine = stub.machine();
        // Once by the SKINIT that is there, once by one that is written anew after other code at its place.
        for written in [false, true] {
            let mut script: Vec<crate::fake_gdb::Event> = Vec::new();
            if written {
                script.push(Box::new(|m| {
                    m.load(AT, &[0x90, 0x90, 0x90]);
                    format!("T05thread:01;watch:{AT:x};")
                }));
                script.push(Box::new(|m| {
                    m.load(AT, &SKINIT);
                    format!("T05thread:01;watch:{AT:x};")
                }));
            }
            script.push(Box::new(|m| {
                assert_eq!(m.points, [format!("2,{AT:x},4"), format!("1,{AT:x},1")]);
                m.load(BASE + 0x100, b"other");
                m.cpus[0].0.extend([("rip", AT), ("rax", BASE), ("cr0", 0x8000_0033), ("cs", 8)]);
                "T05thread:01;".to_owned()
            }));
            script.push(Box::new(run_microcode));
            script.push(Box::new(|m| {
                m.cpus[0].0.insert("rip", MLE + 0x40);
                "T05thread:01;".to_owned()
            }));
            machine.script.extend(script);
        }
        drop(machine);
        let (player, requests) = play_on(&stub, None, true);
        let launches = player.launches();
        assert_eq!((launches.len(), requests.len()), (3, 3 * 4));
        assert!(launches.iter().all(|launch| launch.refused.is_none() && launch.intact == Some(true)));
        assert_ne!(launches[0].image, launches[1].image);
        assert_eq!(launches[1].image, launches[2].image);
        // It stays to the machine's end.
        assert!(!stub.machine().detached && player.finished());
    }

    #[test]
    fn a_changed_slb_is_noticed_when_the_mle_starts() {
        for (fault, intact) in [(None, true), (Some(Fault::SlbChanged), false)] {
            let stub = machine_with_mle();
            let (player, _) = play(&stub, fault);
            assert_eq!((player.stage(), player.launch().unwrap().intact), (Stage::Mle, Some(intact)));
            assert!(stub.machine().detached);
        }
    }
}
