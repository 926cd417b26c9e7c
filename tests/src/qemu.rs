//! QEMU as the emulator of a machine: its command line, and its two control connections.

use std::fs;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use serde_json::{Value, json};

use crate::channel::Channel;
use crate::child::{self, Guarded};
use crate::emulator::Emulator;
use crate::gdb::Gdb;
use crate::machine::{Boot, Console, Firmware, Spec, Tpm};
use crate::paths;
use crate::qmp::Qmp;
use crate::run_dir::RunDir;

/// How long an instruction takes on a machine that counts them, a power of two. In a time of 1 ns software that polls gives up
/// before any device is done.
pub const NS_PER_INSTRUCTION: u32 = 4;

/// The command line of a machine.
pub fn arguments(spec: &Spec) -> Vec<String> {
    let (smm, code) = match spec.firmware {
        Firmware::Smm => ("on", "OVMF_CODE_4M.secboot.fd"),
        Firmware::Plain => ("off", "OVMF_CODE_4M.fd"),
    };
    let model = match spec.tpm {
        Tpm::Tis => "tpm-tis",
        Tpm::Crb => "tpm-crb",
    };
    let (memory, cpus) = (spec.memory, spec.cpus);
    // QEMU's order takes the place of the firmware's own, which variables that are kept are there for.
    let order = if spec.variables.is_none() { ",bootindex=1" } else { "" };
    let threads = match (spec.counts, spec.turns) {
        (true, _) => format!("single -icount shift={},sleep=off", NS_PER_INSTRUCTION.ilog2()),
        (false, true) => "single".to_owned(),
        (false, false) => "multi".to_owned(),
    };
    let remap = if spec.remaps_interrupts { "on" } else { "off" };
    // No interrupt remapping as a rule: QEMU 7.2 gives an interrupt that a device table entry lets pass as it is (IntCtl 01) the
    // vector 0. Without it the IVRS lists no I/O APIC, and Cordon leaves the interrupt fields alone.
    let mut text = format!(
        "-name cordon-bench -nodefaults -display none
         -machine q35,smm={smm} -accel tcg,thread={threads} -cpu EPYC,+svm,+npt -smp {cpus} -m {memory}
         -drive if=pflash,unit=0,format=raw,readonly=on,file=/usr/share/OVMF/{code}
         -drive if=pflash,unit=1,format=raw,file=vars.fd
         -global driver=cfi.pflash01,property=secure,value={smm}
         -chardev socket,id=tpm,path=tpm.sock -tpmdev emulator,id=tpm0,chardev=tpm
         -device {model},tpmdev=tpm0
         -device amd-iommu,intremap={remap}
         -drive if=none,id=esp,format=raw,file=esp.img -device ide-hd,drive=esp,bus=ide.0{order}
         -serial chardev:console
         -chardev socket,id=channel,path=channel.sock,server=on,wait=off -serial chardev:channel
         -qmp unix:qmp.sock,server=on,wait=off
         -d cpu_reset -D cpu.log
         -S -gdb unix:gdb.sock,server=on,wait=off "
    );
    text.push_str(match spec.console {
        Console::Log => "-chardev file,id=console,path=console.log ",
        Console::Terminal => {
            "-chardev stdio,id=console,mux=on,signal=off,logfile=console.log -mon chardev=console "
        }
    });
    if !spec.reboot {
        text.push_str("-action reboot=shutdown ");
    }
    let mut arguments: Vec<_> = text.split_whitespace().map(str::to_owned).collect();
    if spec.boot == Boot::Native && !spec.hostile && !spec.prm {
        arguments.push("-kernel".to_owned());
        arguments.push(paths::absolute(&spec.kernel));
        arguments.push("-initrd".to_owned());
        arguments.push(paths::absolute(&spec.initrd));
        arguments.push("-append".to_owned());
        arguments.push(spec.full_cmdline());
    }
    arguments.extend(spec.qemu_args.iter().cloned());
    arguments
}

/// A QEMU process. It stands still until its gdb stub or [`Qemu::go`] lets it run.
pub struct Qemu {
    process: Guarded,
    qmp: Qmp,
    dir: Arc<RunDir>,
}

impl Qemu {
    /// Starts a machine whose disk image, variables and TPM are in `dir`. Gives also the command channel.
    pub fn start(dir: Arc<RunDir>, spec: &Spec) -> Result<(Self, Channel)> {
        let mut command = child::command("qemu-system-x86_64");
        command.current_dir(dir.path()).args(arguments(spec));
        if spec.console == Console::Log {
            command.stdin(Stdio::null()).stdout(Stdio::null());
        }
        Self::spawn(dir, command)
    }

    /// Starts `command`, a QEMU in `dir` that has a command channel and QMP at `channel.sock` and `qmp.sock`.
    pub fn spawn(dir: Arc<RunDir>, command: Command) -> Result<(Self, Channel)> {
        let mut process = Guarded::spawn("qemu-system-x86_64", command, &dir.file("qemu.log"))?;
        let mut connect = |name: &str| {
            dir.connect(name).map_err(|e| match process.ended() {
                Ok(Some(status)) => e.context(format!(
                    "QEMU did not start ({status}): {}",
                    fs::read_to_string(dir.file("qemu.log")).unwrap_or_default().trim()
                )),
                _ => e,
            })
        };
        let link = connect("channel.sock")?;
        let channel = Channel::new(link.try_clone()?, link);
        let qmp = Qmp::new(connect("qmp.sock")?)?;
        Ok((Self { process, qmp, dir }, channel))
    }

    /// Lets the machine run.
    pub fn go(&mut self) -> Result<()> {
        self.qmp.execute("cont")
    }
}

impl Emulator for Qemu {
    fn ended(&mut self) -> Result<Option<ExitStatus>> {
        self.process.ended()
    }

    fn wait(&mut self, time: Duration) -> Result<Option<ExitStatus>> {
        self.process.wait(time)
    }

    fn last_end(&self) -> Option<String> {
        self.qmp.last_end()
    }

    fn triple_fault(&self) -> bool {
        fs::read_to_string(self.dir.file("cpu.log")).unwrap_or_default().contains("Triple fault")
    }

    fn memory(&mut self, at: u64, length: usize) -> Result<Vec<u8>> {
        let file = self.dir.file("memory");
        // Not the file of an earlier call.
        let _ = fs::remove_file(&file);
        let arguments = json!({ "val": at, "size": length, "filename": "memory" });
        self.qmp.execute_with("pmemsave", &arguments)?;
        let end = Instant::now() + Duration::from_secs(10);
        loop {
            match fs::read(&file) {
                Ok(bytes) if bytes.len() == length => return Ok(bytes),
                _ if self.ended()?.is_some() => bail!("the machine ended before the memory's content"),
                _ if Instant::now() > end => bail!("no sign of the memory's content within 10 s"),
                _ => std::thread::sleep(Duration::from_millis(10)),
            }
        }
    }

    fn write_memory(&mut self, at: u64, bytes: &[u8]) -> Result<()> {
        let mut gdb = Gdb::new(self.dir.connect("gdb.sock")?)?;
        gdb.write_physical(at, bytes)?;
        gdb.detach()
    }

    fn cpu_time(&self) -> Result<Duration> {
        self.process.cpu_time()
    }

    fn plug(&mut self, device: &Value) -> Result<()> {
        self.qmp.execute_with("device_add", device)
    }

    fn unplug(&mut self, id: &str) -> Result<()> {
        self.qmp.execute_with("device_del", &json!({ "id": id }))
    }

    fn quit(&mut self) {
        // QEMU gives the terminal back as it was only when it may end itself.
        if self.qmp.execute("quit").is_ok() {
            let _ = self.process.wait(Duration::from_secs(2));
        }
    }
}
