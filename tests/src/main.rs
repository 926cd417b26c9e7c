//! `bench`: what the Makefile's targets call.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Args, Parser, Subcommand, ValueEnum};
use tests::machine::{Board, Boot, Console, Cpu, Firmware, Machine, Spec, Tpm};
use tests::{attacks, calls, compare, denial, disks, images, rounds, senter, skinit};

#[derive(Parser)]
#[command(about = "Builds Cordon's images and runs them in emulated machines")]
struct Cli {
    #[command(subcommand)]
    command: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Build the images.
    Build,
    /// Print what a launch measures.
    Measure,
    /// Compare the machine with Cordon to the same one without.
    Bench(Box<Bench>),
    /// Compare the machine's disks with Cordon to the same ones without, and count the instructions until DMA is denied.
    Dma(Box<Bench>),
    /// Time the steps of a firmware call between two launches.
    Rounds(Box<Run>),
    /// Compare firmware calls with Cordon to the same ones without.
    Calls(Box<Bench>),
    /// Run the attacks with Cordon and without, and count.
    Attacks {
        /// Also those that take a machine each.
        #[arg(long)]
        all: bool,
    },
    /// Run a machine: a command in its guest, or a shell on its console.
    Run(Box<Run>),
}

#[derive(Args)]
struct Bench {
    /// Boots of each machine.
    #[arg(long, env = "RUNS", default_value_t = 3)]
    runs: usize,
    #[command(flatten)]
    machine: Run,
}

#[derive(Args)]
struct Run {
    /// Shell script to run as root in the guest; its output and exit status become the bench's.
    #[arg(long, env = "GUEST_CMD", hide_env_values = true)]
    guest_cmd: Option<String>,
    /// The board.
    #[arg(long, env = "MACHINE", value_enum, default_value_t = Board::Amd)]
    machine: Board,
    /// The Intel machine's CPU; arrandale, and for `bench` one after the other.
    #[arg(long, env = "CPU", value_enum)]
    cpu: Option<Cpu>,
    /// RAM, MiB.
    #[arg(long, env = "MEM", default_value_t = 2048)]
    memory: u32,
    /// CPUs; 2, or 1 on the Intel machine, where each takes the emulator's time from the others.
    #[arg(long, env = "SMP")]
    cpus: Option<u32>,
    /// TPM interface.
    #[arg(long, env = "TPM", value_enum, default_value_t = Tpm::Tis)]
    tpm: Tpm,
    /// Active PCR banks of the TPM.
    #[arg(long, env = "BANKS", default_value = "sha256")]
    banks: String,
    /// Firmware build.
    #[arg(long, env = "FIRMWARE", value_enum, default_value_t = Firmware::Smm)]
    firmware: Firmware,
    /// Another kernel than Debian's.
    #[arg(long, env = "KERNEL")]
    kernel: Option<PathBuf>,
    /// Another initial RAM disk than the bench's.
    #[arg(long, env = "INITRD")]
    initrd: Option<PathBuf>,
    /// Words to add to the kernel command line.
    #[arg(long, env = "CMDLINE", default_value = "", allow_hyphen_values = true)]
    cmdline: String,
    /// Configuration file of Cordon.
    #[arg(long, env = "CONFIG")]
    config: Option<PathBuf>,
    /// Boot the same machine without Cordon (1) or with it (0).
    #[arg(long, env = "NATIVE", value_parser = clap::value_parser!(u8).range(0..=1), default_value_t = 0)]
    native: u8,
    /// Keep memory for policy `relaunch` (1), and play as many SKINITs as there are.
    #[arg(long, env = "RELAUNCH", value_parser = clap::value_parser!(u8).range(0..=1), default_value_t = 0)]
    relaunch: u8,
    /// A CPU, TPM, board or loader that misbehaves at SKINIT or SENTER.
    #[arg(long, env = "FAULT", value_parser = parse_fault)]
    fault: Option<AnyFault>,
    /// More arguments for QEMU, separated by spaces.
    #[arg(long, env = "QEMU_ARGS", default_value = "", allow_hyphen_values = true)]
    qemu_args: String,
    /// Seconds until the guest must take commands, and that a command may take; 240, or 1800 on the Intel machine.
    #[arg(long, env = "TIMEOUT")]
    timeout: Option<u64>,
    /// What to report on standard error.
    #[arg(long, env = "LOG", value_enum, default_value_t = Log::Warn)]
    log: Log,
}

/// A fault of one of the two launches; which, its name says.
#[derive(Clone, Copy)]
struct AnyFault {
    skinit: Option<skinit::Fault>,
    senter: Option<senter::Fault>,
}

fn parse_fault(name: &str) -> Result<AnyFault, String> {
    let (skinit, senter) = (skinit::Fault::from_str(name, false), senter::Fault::from_str(name, false));
    let fault = AnyFault { skinit: skinit.ok(), senter: senter.ok() };
    if fault.skinit.is_some() || fault.senter.is_some() {
        return Ok(fault);
    }
    let all = skinit::Fault::value_variants().iter().filter_map(ValueEnum::to_possible_value);
    let all = all.chain(senter::Fault::value_variants().iter().filter_map(ValueEnum::to_possible_value));
    let names: Vec<_> = all.map(|value| value.get_name().to_owned()).collect();
    Err(format!("must be one of {}", names.join(", ")))
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Log {
    /// Failures only.
    Warn,
    /// Also each stage of the boot and its time.
    Info,
}

impl Run {
    fn spec(&self) -> Spec {
        let command = self.command();
        let fitting = Spec::on(self.machine);
        Spec {
            board: self.machine,
            cpu: self.cpu.unwrap_or(fitting.cpu),
            boot: if self.native == 1 { Boot::Native } else { Boot::Cordon },
            memory: self.memory,
            cpus: self.cpus.unwrap_or(fitting.cpus),
            firmware: self.firmware,
            tpm: self.tpm,
            banks: self.banks.clone(),
            kernel: self.kernel.clone().unwrap_or(fitting.kernel),
            initrd: self.initrd.clone().unwrap_or(fitting.initrd),
            cmdline: self.cmdline.clone(),
            config: self.config.clone(),
            console: if command.is_some() { Console::Log } else { Console::Terminal },
            relaunch: self.relaunch == 1,
            fault: self.fault.and_then(|fault| fault.skinit),
            senter_fault: self.fault.and_then(|fault| fault.senter),
            variables: None,
            reboot: false,
            qemu_args: self.qemu_args.split_whitespace().map(str::to_owned).collect(),
            timeout: self.timeout.map_or(fitting.timeout, Duration::from_secs),
            progress: self.log == Log::Info && command.is_some(),
            ..Spec::default()
        }
    }

    /// An empty variable of the Makefile is no command.
    fn command(&self) -> Option<&str> {
        self.guest_cmd.as_deref().filter(|c| !c.is_empty())
    }

    fn run(&self) -> Result<ExitCode> {
        images::build_for(self.machine)?;
        let mut machine = Machine::start(&self.spec())?;
        let result = match self.command() {
            None => machine.interact().map(|()| None),
            Some(command) => machine.run(command).map(Some),
        };
        let output = match result {
            Ok(Some(output)) => output,
            Ok(None) => return Ok(ExitCode::SUCCESS),
            Err(error) => {
                std::io::stdout().write_all(machine.partial_output())?;
                return Err(error.context(machine.diagnosis()));
            }
        };
        let mut stdout = std::io::stdout().lock();
        stdout
            .write_all(&output.bytes)
            .and_then(|()| stdout.flush())
            .context("writing the guest's output")?;
        machine.power_off()?;
        Ok(ExitCode::from(u8::try_from(output.status).unwrap_or(u8::MAX)))
    }
}

/// The figures of the machine, of each CPU that it can have.
fn bench(Bench { runs, machine }: &Bench) -> Result<()> {
    images::build_for(machine.machine)?;
    let cpus = match machine.machine {
        Board::Intel => machine.cpu.as_ref().map_or(Cpu::value_variants(), std::slice::from_ref),
        Board::Amd => &[Cpu::Arrandale],
    };
    for &cpu in cpus {
        if machine.machine == Board::Intel {
            println!("CPU {}", cpu.model());
        }
        compare::compare(&Spec { cpu, console: Console::Log, ..machine.spec() }, *runs)?;
    }
    images::measure()
}

/// The machine of figures that are the AMD machine's alone: of `what`, `because` of what the other one lacks.
fn of_amd_alone(run: &Run, what: &str, because: &str) -> Result<Spec> {
    run.machine.must_be_amd(what, because)?;
    images::build_initrd()?;
    Ok(Spec { console: Console::Log, ..run.spec() })
}

/// Figures of the IOMMU's part.
fn dma(bench: &Bench) -> Result<()> {
    let because = "the bench's VT-d unit translates nothing, and Bochs has no NVMe and no virtio";
    let spec = of_amd_alone(&bench.machine, "DMA", because)?;
    denial::measure(&spec)?;
    disks::compare(&spec, bench.runs)
}

/// Figures of firmware calls.
fn calls(bench: &Bench) -> Result<()> {
    let because = "the module that times them is built for the kernel of that machine";
    calls::compare(&of_amd_alone(&bench.machine, "a firmware call", because)?, bench.runs)
}

/// Figures of policy `relaunch`.
fn rounds(run: &Run) -> Result<()> {
    let because = "after SENTER there is no policy `relaunch` (ADR 0016)";
    rounds::measure(&of_amd_alone(run, "a call between two launches", because)?)
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Action::Build => images::build().map(|()| ExitCode::SUCCESS),
        Action::Measure => images::measure().map(|()| ExitCode::SUCCESS),
        Action::Bench(options) => bench(&options).map(|()| ExitCode::SUCCESS),
        Action::Dma(bench) => dma(&bench).map(|()| ExitCode::SUCCESS),
        Action::Calls(bench) => calls(&bench).map(|()| ExitCode::SUCCESS),
        Action::Rounds(run) => rounds(&run).map(|()| ExitCode::SUCCESS),
        Action::Attacks { all } => attacks::run(all).map(|()| ExitCode::SUCCESS),
        Action::Run(run) => run.run(),
    };
    result.unwrap_or_else(|error| {
        eprintln!("bench: {:#}", error.root_cause());
        for context in error.chain().take(error.chain().count().saturating_sub(1)) {
            eprintln!("{context}");
        }
        ExitCode::from(125)
    })
}
