//! One emulated machine: its parts, its start, its commands, its end.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;
use serde_json::Value;

use crate::board::Board as Records;
use crate::bochs::player::Watch;
use crate::bochs::{self, Bochs};
use crate::channel::{Channel, Output, Wait};
use crate::devices::Sockets;
use crate::emulator::Emulator;
use crate::esp::{self, Item, Launch, Source};
use crate::paths;
use crate::prm;
use crate::qemu::Qemu;
use crate::run_dir::RunDir;
use crate::senter;
use crate::skinit::{Fault, Player};
use crate::stage::{self, Stage};
use crate::swtpm::Swtpm;

/// The board, with its CPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Board {
    /// QEMU: SVM, AMD-Vi, SKINIT.
    Amd,
    /// Bochs: VMX.
    Intel,
}

impl Board {
    /// Refuses what cannot be measured on the Intel machine, and says why.
    ///
    /// # Errors
    /// It is the Intel machine.
    pub fn must_be_amd(self, what: &str, because: &str) -> Result<()> {
        ensure!(self == Self::Amd, "MACHINE=intel: {what} can be measured with MACHINE=amd alone: {because}");
        Ok(())
    }
}

/// The Intel machine's CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Cpu {
    /// VMX as the MLE needs it at least, with SMX.
    Arrandale,
    /// SHA instructions, pages of 1 GiB and what else VMX has got since; SMX is not shown.
    Cannonlake,
}

impl Cpu {
    /// What Bochs calls it.
    pub fn model(self) -> &'static str {
        match self {
            Self::Arrandale => "corei5_arrandale_m520",
            Self::Cannonlake => "corei3_cnl",
        }
    }

    /// Whether CPUID offers SMX, so that CR4.SMXE can be set.
    pub fn shows_smx(self) -> bool {
        self == Self::Arrandale
    }
}

/// How the firmware keeps its variables.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Firmware {
    /// In SMM, behind SMRAM lock and secure flash.
    Smm,
    /// In the runtime driver itself.
    Plain,
}

/// The TPM's interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Tpm {
    /// FIFO, with localities 0 to 4.
    Tis,
    /// Command buffer, locality 0 only.
    Crb,
}

/// What boots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Boot {
    /// Loader, SKINIT, SLB stage, MLE, Linux.
    Cordon,
    /// The firmware starts the kernel's own EFI stub.
    Native,
    /// A loader that executes SENTER at once, and an MLE that reports how it was entered.
    SenterProbe,
}

/// Where the first serial port, Linux's console, leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Console {
    /// To the run's `console.log`.
    Log,
    /// To this terminal, and to the log.
    Terminal,
}

/// All that distinguishes one machine from another.
#[derive(Clone, Debug)]
pub struct Spec {
    /// The board.
    pub board: Board,
    /// The Intel board's CPU.
    pub cpu: Cpu,
    /// What boots.
    pub boot: Boot,
    /// RAM in MiB.
    pub memory: u32,
    /// CPUs.
    pub cpus: u32,
    /// Firmware build.
    pub firmware: Firmware,
    /// Whether the firmware has an implant: `tests/hostile`.
    pub hostile: bool,
    /// What that leaves devices to do: `tests/hostile/src/dma.rs`.
    pub devices_at_work: Option<String>,
    /// Whether the firmware has PRM handlers: [`prm`]. Not together with an implant.
    pub prm: bool,
    /// Whether the IOMMU can tell interrupts apart. Linux then gets none from devices: see `qemu::arguments`.
    pub remaps_interrupts: bool,
    /// TPM interface.
    pub tpm: Tpm,
    /// The TPM's active PCR banks, separated by commas. SHA-256 alone is how machines are sold; each more is one more
    /// hash of all that is measured.
    pub banks: String,
    /// Secure loader block.
    pub slb: PathBuf,
    /// MLE image.
    pub mle: PathBuf,
    /// Kernel, a bzImage.
    pub kernel: PathBuf,
    /// Initial RAM disk.
    pub initrd: PathBuf,
    /// Words after the bench's own on the kernel command line.
    pub cmdline: String,
    /// Cordon's configuration file.
    pub config: Option<PathBuf>,
    /// The firmware's variables as an earlier machine left them, instead of fresh ones.
    pub variables: Option<PathBuf>,
    /// Where the console leads.
    pub console: Console,
    /// Whether memory is kept for policy `relaunch`, and the bench ready to play more than one SKINIT.
    pub relaunch: bool,
    /// What the machine's CPU does wrong at SKINIT.
    pub fault: Option<Fault>,
    /// What goes wrong around SENTER.
    pub senter_fault: Option<senter::Fault>,
    /// Whether a guest's reset restarts the machine instead of ending it.
    pub reboot: bool,
    /// Items of QEMU's log that are on from SKINIT.
    pub logged: Option<String>,
    /// Whether QEMU's clocks count instructions, [`NS_PER_INSTRUCTION`](crate::qemu::NS_PER_INSTRUCTION) each, in place of the
    /// host's time. CPUs then take turns.
    pub counts: bool,
    /// Whether QEMU's CPUs take turns in one thread. Firmware's CPUs wait for each other in loops: where machines share
    /// the host's cores, one that takes turns costs a quarter less of their time. Nothing in it happens at the same time.
    pub turns: bool,
    /// More arguments for QEMU.
    pub qemu_args: Vec<String>,
    /// Longest time to the guest's init, and longest time of one command.
    pub timeout: Duration,
    /// Whether to report each stage of the boot on standard error.
    pub progress: bool,
}

impl Default for Spec {
    fn default() -> Self {
        Self {
            board: Board::Amd,
            cpu: Cpu::Arrandale,
            boot: Boot::Cordon,
            memory: 2048,
            cpus: 2,
            firmware: Firmware::Smm,
            hostile: false,
            devices_at_work: None,
            prm: false,
            remaps_interrupts: false,
            tpm: Tpm::Tis,
            banks: "sha256".to_owned(),
            slb: paths::slb(),
            mle: paths::mle(),
            kernel: paths::kernel(),
            initrd: paths::initrd(),
            cmdline: String::new(),
            variables: None,
            config: None,
            console: Console::Log,
            relaunch: false,
            fault: None,
            senter_fault: None,
            reboot: false,
            logged: None,
            counts: false,
            turns: false,
            qemu_args: Vec::new(),
            timeout: Duration::from_secs(240),
            progress: false,
        }
    }
}

impl Spec {
    /// The machine of one board, with the kernel and the RAM disk that fit it.
    pub fn on(board: Board) -> Self {
        let (kernel, initrd) = paths::kernel_of(board);
        let fitting = Self { board, kernel, initrd, ..Self::default() };
        match board {
            Board::Amd => fitting,
            Board::Intel => Self { cpus: 1, timeout: Duration::from_secs(1800), ..fitting },
        }
    }

    /// The whole kernel command line.
    pub fn full_cmdline(&self) -> String {
        // What Bochs emulates is slow: the kernel's tests of its ciphers would take half a minute, and the 10 microseconds
        // between two Startup IPIs are 100 instructions, less than a CPU needs to leave its guest and enter it again.
        let slow = if self.board == Board::Intel {
            " cryptomgr.notests no_timer_check intel_iommu=off cpu_init_udelay=10000"
        } else {
            ""
        };
        // Newer models say in CPUID that their time-stamp counter counts at some GHz; Bochs has it count instructions.
        let newer = match (self.board, self.cpu) {
            (Board::Intel, Cpu::Cannonlake) => {
                format!(" tsc_early_khz={} mitigations=off", bochs::SECOND / 1000)
            }
            _ => String::new(),
        };
        format!("console=ttyS0{slow}{newer} {}", self.cmdline).trim_end().to_owned()
    }

    fn disk(&self) -> Vec<Item> {
        let file = |path, source| Item { path, source: Source::File(source) };
        let text = |path, text| Item { path, source: Source::Bytes(String::into_bytes(text)) };
        let mut items = vec![file("vmlinuz", self.kernel.clone()), file("initrd.img", self.initrd.clone())];
        let mut first = "EFI/BOOT/BOOTX64.EFI";
        let before = match self.board {
            Board::Intel => Some(paths::platform()),
            Board::Amd if self.hostile => Some(paths::hostile()),
            Board::Amd => self.prm.then(paths::platform),
        };
        if let Some(before) = before {
            items.push(file(first, before));
            first = "next.efi";
            let options = match self.boot {
                Boot::Cordon => String::new(),
                Boot::Native => {
                    items.push(file(first, self.kernel.clone()));
                    format!("initrd=\\initrd.img {}", self.full_cmdline())
                }
                Boot::SenterProbe => {
                    items.push(file(first, paths::senter()));
                    format!("{} {}", senter::layout::SINIT_BASE, senter::acm::module().len())
                }
            };
            items.push(text("next.txt", options));
            items.extend(self.devices_at_work.iter().map(|orders| text("dma.txt", orders.clone())));
        }
        let mut records = Records::default();
        if self.prm {
            prm::firmware(&mut records);
        }
        if self.board == Board::Intel {
            records.acpi(&bochs::acpi::tables(self.cpus));
            senter::firmware(&mut records, self.cpus, self.senter_fault);
            if self.boot == Boot::SenterProbe {
                let bios_data = senter::bios_data(self.cpus).len() as u64;
                senter::probe::prepare(&mut records, bios_data);
            }
        }
        items.push(Item { path: "board.bin", source: Source::Bytes(records.bytes()) });
        if self.boot == Boot::Cordon {
            let (launch, locality0) = match self.board {
                Board::Amd => (Launch::Skinit, self.tpm == Tpm::Crb),
                Board::Intel => (Launch::Senter, false),
            };
            let entry = esp::Entry {
                cmdline: &self.full_cmdline(),
                config: self.config.is_some(),
                launch,
                locality0,
                relaunch: self.relaunch,
                insist_txt: !self.cpu.shows_smx(),
            };
            let entry = entry.text();
            items.push(text("loader/entries/cordon.conf", entry));
            items.push(file(first, paths::loader()));
            items.push(match launch {
                Launch::Skinit => file("cordon/slb.bin", self.slb.clone()),
                Launch::Senter => file("cordon/sinit.bin", paths::sinit()),
            });
            items.push(file("cordon/mle.bin", self.mle.clone()));
            items.extend(self.config.iter().map(|path| file("cordon/cordon.conf", path.clone())));
        }
        items
    }
}

/// A machine that runs. Dropping it ends it.
pub struct Machine {
    emulator: Box<dyn Emulator>,
    _tpm: Swtpm,
    channel: Channel,
    player: Option<Player>,
    senter: Option<Watch>,
    dir: Arc<RunDir>,
    started: Instant,
    timeout: Duration,
    progress: bool,
    /// When each stage was first seen.
    stages: Vec<(Stage, Duration)>,
}

impl Machine {
    /// Puts the machine together and turns it on.
    pub fn start(spec: &Spec) -> Result<Self> {
        // Where Bochs forgets a breakpoint, GETSEC changes nothing on a CPU with SMX, and the bench sees to it behind it.
        let cpus = spec.cpus;
        ensure!(
            spec.board == Board::Amd || cpus == 1 || spec.cpu.shows_smx(),
            "SMP={cpus}: CPU=cannonlake is for one CPU"
        );
        let dir = Arc::new(RunDir::create(&paths::build())?);
        let fresh = Path::new("/usr/share/OVMF/OVMF_VARS_4M.fd");
        let variables = spec.variables.as_deref().unwrap_or(fresh);
        fs::copy(variables, dir.file("vars.fd"))
            .with_context(|| format!("{}: is ovmf installed?", variables.display()))?;
        esp::build(&dir.file("esp.img"), &spec.disk())?;
        let tpm = Swtpm::start(&dir, &spec.banks)?;
        let (mut player, mut senter) = (None, None);
        let (emulator, channel): (Box<dyn Emulator>, _) = match spec.board {
            Board::Amd => {
                let (mut qemu, channel) = Qemu::start(Arc::clone(&dir), spec)?;
                match spec.boot {
                    Boot::Cordon => {
                        let (gdb, log) = (dir.connect("gdb.sock")?, dir.file("drtm.log"));
                        player = Some(Player::start(
                            gdb,
                            tpm.control(),
                            spec.fault,
                            log,
                            spec.relaunch,
                            spec.logged.clone(),
                        )?);
                    }
                    Boot::Native => qemu.go()?,
                    Boot::SenterProbe => bail!("no SENTER on a machine with SVM"),
                }
                (Box::new(qemu), channel)
            }
            Board::Intel => {
                let part = bochs::player::Part {
                    control: tpm.control(),
                    chip: tpm.control().link()?,
                    banks: spec.banks.clone(),
                    memory: senter::sinit::Memory { low_end: bochs::LOW_END, dmar: bochs::acpi::dmar() },
                    cpus: spec.cpus,
                    smx: spec.cpu.shows_smx(),
                    launches: spec.boot != Boot::Native,
                    fault: spec.senter_fault,
                    log: File::create(dir.file("drtm.log"))?,
                };
                let (bochs, channel) = Bochs::start(&dir, spec, part)?;
                senter = Some(bochs.watch());
                (Box::new(bochs), channel)
            }
        };
        let (timeout, progress) = (spec.timeout, spec.progress);
        let (started, stages) = (Instant::now(), vec![(Stage::Off, Duration::ZERO)]);
        Ok(Self { emulator, _tpm: tpm, channel, player, senter, dir, started, timeout, progress, stages })
    }

    /// The run's folder.
    pub fn dir(&self) -> &RunDir {
        &self.dir
    }

    /// The stages the boot has come through, with the time since power-on at which each was first seen.
    pub fn stages(&self) -> &[(Stage, Duration)] {
        &self.stages
    }

    /// The player of the DRTM event, on a machine that boots Cordon.
    pub fn player(&self) -> Option<&Player> {
        self.player.as_ref()
    }

    /// What the player of SENTER has seen, on a machine with TXT.
    pub fn senter(&self) -> Option<bochs::player::State> {
        self.senter.as_ref().map(Watch::state)
    }

    /// How far the machine has come.
    pub fn stage(&self) -> Stage {
        self.stages.last().map_or(Stage::Off, |&(stage, _)| stage)
    }

    fn reached(&mut self, stage: Stage) {
        if stage > self.stage() {
            let time = self.started.elapsed();
            self.stages.push((stage, time));
            if self.progress {
                eprintln!("bench: {:6.1} s  {stage}", time.as_secs_f64());
            }
        }
    }

    /// Looks how far the boot is; fails when it is at an end.
    fn look(&mut self) -> Result<()> {
        if self.stage() < Stage::Linux {
            let console = self.console();
            let played = match (&self.player, self.senter()) {
                (Some(player), _) => player.stage(),
                (None, Some(senter)) => senter.stage.unwrap_or(Stage::Off),
                (None, None) => Stage::Off,
            };
            self.reached(stage::from_console(&console).max(played));
            ensure!(!stage::nothing_booted(&console), "the firmware found nothing that would boot");
        }
        let failure = self.player.as_ref().and_then(Player::failure);
        if let Some(failure) = failure.or_else(|| self.senter()?.failure) {
            bail!("the DRTM event could not be played: {failure}");
        }
        Ok(())
    }

    /// Waits until `find` finds something on the console.
    pub fn wait_console<T>(&mut self, find: impl Fn(&str) -> Option<T>) -> Result<T> {
        self.wait_for("its console output", |machine| find(&machine.console()))
    }

    /// Waits until the MLE has left by SEXIT, on a machine with TXT. Gives whether it did so with secrets.
    pub fn wait_sexit(&mut self) -> Result<bool> {
        self.wait_for("SEXIT", |machine| machine.senter()?.exited)
    }

    fn wait_for<T>(&mut self, what: &str, find: impl Fn(&Self) -> Option<T>) -> Result<T> {
        let end = Instant::now() + self.timeout;
        loop {
            if let Some(found) = find(self) {
                return Ok(found);
            }
            if let Err(ended) = self.check_alive::<()>(what, &Wait::Pending, end) {
                // It may have been the last thing that it did.
                return find(self).ok_or(ended);
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Waits until the boot has come to `stage`.
    pub fn wait_stage(&mut self, stage: Stage) -> Result<()> {
        let end = Instant::now() + self.timeout;
        while self.stage() < stage {
            self.check_alive::<()>(&format!("{stage}"), &Wait::Pending, end)?;
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }

    /// The console's text so far.
    pub fn console(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.dir.file("console.log")).unwrap_or_default()).into_owned()
    }

    /// Waits until the guest's init takes commands.
    pub fn wait_ready(&mut self) -> Result<()> {
        if self.stage() != Stage::Init {
            self.wait_init()?;
            self.reached(Stage::Init);
        }
        Ok(())
    }

    fn wait_init(&mut self) -> Result<()> {
        let end = Instant::now() + self.timeout;
        loop {
            match self.channel.ready(Duration::from_millis(100)) {
                Wait::Done(()) => return Ok(()),
                wait => self.check_alive("the guest's init", &wait, end)?,
            }
        }
    }

    /// Has the guest begin to run a shell script.
    pub fn begin(&mut self, script: &str) -> Result<()> {
        self.wait_ready()?;
        self.channel.send_script(script)?;
        Ok(())
    }

    /// Has the guest run a shell script that starts another kernel in its own's place, and waits for that one's init.
    pub fn restart_guest(&mut self, script: &str) -> Result<()> {
        self.begin(script)?;
        self.wait_init()
    }

    /// Runs a shell script as root in the guest.
    pub fn run(&mut self, script: &str) -> Result<Output> {
        self.wait_ready()?;
        let mark = self.channel.send_script(script)?;
        let end = Instant::now() + self.timeout;
        loop {
            match self.channel.output(&mark, Duration::from_millis(100))? {
                Wait::Done(output) => return Ok(output),
                wait => self.check_alive("the command's end", &wait, end)?,
            }
        }
    }

    /// Runs a shell script that must succeed, and gives its output as text.
    pub fn check(&mut self, script: &str) -> Result<String> {
        let output = self.run(script)?;
        ensure!(output.status == 0, "`{script}` ended with {}: {}", output.status, output.text());
        Ok(output.text())
    }

    /// Physical memory as the machine itself has it, past all its protections.
    pub fn memory(&mut self, at: u64, length: usize) -> Result<Vec<u8>> {
        self.emulator.memory(at, length)
    }

    /// Changes physical memory past all protections, as SMM can. The machine stands still meanwhile.
    pub fn write_memory(&mut self, at: u64, bytes: &[u8]) -> Result<()> {
        self.emulator.write_memory(at, bytes)
    }

    /// Time since power-on: the machine's own where that counts instructions, else the host's.
    pub fn time(&mut self) -> Result<Duration> {
        Ok(self.emulator.emulated_time()?.unwrap_or_else(|| self.started.elapsed()))
    }

    /// CPU time of the host that the emulator has used.
    pub fn cpu_time(&self) -> Result<Duration> {
        self.emulator.cpu_time()
    }

    /// Output of a command that has not ended.
    pub fn partial_output(&self) -> &[u8] {
        if self.stage() == Stage::Init { self.channel.pending() } else { &[] }
    }

    fn check_alive<T>(&mut self, what: &str, wait: &Wait<T>, end: Instant) -> Result<()> {
        self.look()?;
        if matches!(wait, Wait::Closed) || self.emulator.ended()?.is_some() {
            let status = self.emulator.wait(Duration::from_secs(5))?;
            let status = status.map_or_else(|| "still running".to_owned(), |s| s.to_string());
            let reason = self.emulator.last_end().unwrap_or_else(|| format!("emulator: {status}"));
            let fault = if self.emulator.triple_fault() { ", triple fault" } else { "" };
            bail!("the machine ended ({reason}{fault}) before {what}");
        }
        if Instant::now() > end {
            bail!("no sign of {what} within {} s", self.timeout.as_secs());
        }
        Ok(())
    }

    /// Leaves the console to the user until the machine ends. A RAM disk without the bench's init is fine too.
    pub fn interact(&mut self) -> Result<()> {
        while self.emulator.ended()?.is_none() {
            // Where nothing boots the user has the firmware's shell.
            let _ = self.look();
            if self.stage() == Stage::Init {
                std::thread::sleep(Duration::from_millis(100));
            } else if self.channel.ready(Duration::from_millis(100)) == Wait::Done(()) {
                self.reached(Stage::Init);
                self.channel.shell()?;
            }
        }
        self.look()?;
        let reason = self.emulator.last_end().unwrap_or_default();
        ensure!(reason != "guest-reset", "the machine was reset");
        Ok(())
    }

    /// Has the guest turn the machine off, and waits for that.
    pub fn power_off(mut self) -> Result<()> {
        self.channel.off()?;
        self.ends_by("guest-shutdown")
    }

    /// Runs a shell script that resets the machine, and waits for that.
    pub fn reset_by(mut self, script: &str) -> Result<()> {
        self.begin(script)?;
        self.ends_by("guest-reset")
    }

    /// Waits for the machine's end, which must have QEMU's `expected` reason.
    pub fn ends_by(mut self, expected: &str) -> Result<()> {
        let ended = self.emulator.wait(Duration::from_secs(60))?;
        ensure!(ended.is_some(), "the machine did not end ({expected}) within 60 s");
        let reason = self.emulator.last_end().unwrap_or_default();
        ensure!(reason == expected, "the machine ended by {reason:?} instead of {expected:?}");
        // Large, and easy to make again.
        fs::remove_file(self.dir.file("esp.img"))?;
        Ok(())
    }

    /// Says what the run reached and shows the console's end: for the report of a failure.
    pub fn diagnosis(&self) -> String {
        stage::diagnosis(self.stage(), &self.dir)
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.emulator.quit();
    }
}
impl Sockets for Machine {
    fn plug(&mut self, device: &Value) -> Result<()> {
        self.emulator.plug(device)
    }

    fn unplug(&mut self, id: &str) -> Result<()> {
        self.emulator.unplug(id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_intel_machine_lacks_is_refused_by_name() {
        assert!(Board::Amd.must_be_amd("this", "of that").is_ok());
        let refusal = Board::Intel.must_be_amd("this", "of that").unwrap_err().to_string();
        assert_eq!(refusal, "MACHINE=intel: this can be measured with MACHINE=amd alone: of that");
    }
}
