//! The MLE from the state that SENTER leaves, on a machine with QEMU's VT-d: no loader, no SINIT, but memory, TXT's registers and
//! processors as those leave them. The one change to the image: GETSEC, which the emulated CPU does not know, does nothing.

mod dma;
mod interrupts;
mod memory;
mod stub;

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use hv::failure::{Record, SenterError, Stage};
use memory::Wrong;
use serde_json::Value;
use tests::attacks::seen;
use tests::channel::{Channel, Wait};
use tests::child;
use tests::devices::{self, Sockets};
use tests::edu::{self, Guest};
use tests::emulator::Emulator;
use tests::qemu::Qemu;
use tests::run_dir::RunDir;
use tests::storm::{self, Storm};
use tests::swtpm::Swtpm;
use tests::tally::{self, Tally};
use tests::{images, paths};
use vmx::txt::regs;

/// Both pages.
const REGISTERS: usize = 0x2_0000;
const GETSEC: [u8; 2] = [0x0f, 0x37];

struct Machine {
    qemu: Qemu,
    channel: Channel,
    _tpm: Swtpm,
    dir: Arc<RunDir>,
}

impl Machine {
    /// Starts it in the state that SENTER leaves, with devices besides those that it always has.
    fn start(cpus: u32, wrong: Wrong, devices: Option<&devices::Set>) -> Self {
        let initrd = devices.map_or_else(paths::initrd, devices::Set::initrd);
        let arguments = devices.map(devices::Set::arguments).unwrap_or_default();
        Self::launch(cpus, wrong, ("", ""), &initrd, &arguments)
    }

    /// The same, with words for the guest's kernel, a configuration, and arguments for QEMU.
    fn launch(
        cpus: u32,
        wrong: Wrong,
        (words, config): (&str, &str),
        initrd: &Path,
        more: &[String],
    ) -> Self {
        let mut mle = fs::read(paths::mle()).unwrap();
        let at = mle.windows(2).position(|bytes| bytes == GETSEC).unwrap();
        assert!(at < 4096);
        mle[at..at + 2].fill(0x90);
        let read = |path: &Path| fs::read(path).unwrap();
        let mut initrd = read(initrd);
        initrd.resize(initrd.len().next_multiple_of(4), 0);
        let cmdline = format!("console=ttyS0 {words}");
        let pieces = memory::pieces(&mle, read(&paths::kernel()), initrd, (&cmdline, config), cpus, wrong);

        let mut arguments = more.to_vec();
        let dir = Arc::new(RunDir::create(&paths::build()).unwrap());
        for (index, (address, bytes)) in pieces.into_iter().enumerate() {
            let name = format!("piece{index}");
            fs::write(dir.file(&name), bytes).unwrap();
            arguments.extend(match index {
                0 => ["-kernel".to_owned(), name],
                _ => ["-device".to_owned(), format!("loader,file={name},addr={address:#x},force-raw=on")],
            });
        }
        Self::run(dir, cpus, &arguments)
    }

    /// Starts the same machine with the kernel alone.
    fn native(cpus: u32, words: &str, more: &[String]) -> Self {
        let file = |path: &Path| paths::absolute(path);
        let cmdline = format!("console=ttyS0 intel_iommu=off {words}");
        let (kernel, initrd) = (file(&paths::kernel()), file(&paths::initrd()));
        let boot = ["-kernel", &kernel, "-initrd", &initrd, "-append", &cmdline].map(str::to_owned);
        Self::run(Arc::new(RunDir::create(&paths::build()).unwrap()), cpus, &[&boot, more].concat())
    }

    fn run(dir: Arc<RunDir>, cpus: u32, more: &[String]) -> Self {
        let mut page = vec![0; REGISTERS / 2];
        for (register, value) in [
            (regs::STS, regs::STS_SENTER_DONE | regs::STS_PRIVATE_OPEN),
            (regs::ERRORCODE, regs::ERRORCODE_SUCCESS),
            (regs::SINIT_BASE, memory::SINIT),
            (regs::SINIT_SIZE, 0x1_0000),
            (regs::HEAP_BASE, memory::HEAP),
            (regs::HEAP_SIZE, memory::HEAP_SIZE),
        ] {
            page[register as usize..][..8].copy_from_slice(&value.to_le_bytes());
        }
        fs::write(dir.file("txt"), [page.as_slice(), &page].concat()).unwrap();

        let tpm = Swtpm::start(&dir, "sha256").unwrap();
        let mut command = child::command("qemu-system-x86_64");
        let arguments = format!(
            "-machine q35,smm=off -cpu EPYC,+svm,+npt,-x2apic -smp {cpus} -m {}M -nodefaults -display none
             -no-reboot -serial file:console.log -chardev socket,id=channel,path=channel.sock,server=on,wait=off
             -serial chardev:channel -device intel-iommu -device ivshmem-plain,memdev=txt
             -object memory-backend-file,id=txt,mem-path=txt,share=on,size={REGISTERS}
             -qmp unix:qmp.sock,server=on,wait=off
             -chardev socket,id=tpm,path=tpm.sock -tpmdev emulator,id=tpm,chardev=tpm -device tpm-tis,tpmdev=tpm",
            memory::SIZE >> 20
        );
        command.current_dir(dir.path()).args(arguments.split_whitespace());
        command.args(more);
        let (qemu, channel) = Qemu::spawn(Arc::clone(&dir), command).unwrap();
        Self { qemu, channel, _tpm: tpm, dir }
    }

    fn console(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.dir.file("console.log")).unwrap_or_default()).into_owned()
    }

    fn register(&self, register: u32) -> u64 {
        let bytes = fs::read(self.dir.file("txt")).unwrap();
        u64::from_le_bytes(bytes[register as usize..][..8].try_into().unwrap())
    }

    /// Waits until the guest takes commands.
    fn ready(&mut self) {
        let end = Instant::now() + Duration::from_secs(240);
        while self.channel.ready(Duration::from_millis(100)) != Wait::Done(()) {
            assert!(self.qemu.ended().unwrap().is_none() && Instant::now() < end, "{}", self.console());
        }
    }

    /// Waits until `done`, or the machine's end.
    fn wait(&mut self, time: Duration, mut done: impl FnMut(&mut Self) -> bool) {
        let end = Instant::now() + time;
        while !done(self) {
            let ended = self.qemu.ended().unwrap();
            let qemu = || fs::read_to_string(self.dir.file("qemu.log")).unwrap_or_default();
            assert!(ended.is_none() && Instant::now() < end, "{ended:?}\n{}\n{}", self.console(), qemu());
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}

impl Sockets for Machine {
    fn plug(&mut self, device: &Value) -> Result<()> {
        self.qemu.plug(device)
    }

    fn unplug(&mut self, id: &str) -> Result<()> {
        self.qemu.unplug(id)
    }
}

impl Guest for Machine {
    fn check(&mut self, script: &str) -> Result<String> {
        let mark = self.channel.send_script(script)?;
        let end = Instant::now() + Duration::from_secs(120);
        loop {
            match self.channel.output(&mark, Duration::from_millis(100))? {
                Wait::Done(output) => {
                    ensure!(output.status == 0, "`{script}` ended with {}: {}", output.status, output.text());
                    return Ok(output.text());
                }
                Wait::Pending if Instant::now() < end => {}
                _ => bail!("no end of `{script}`\n{}", self.console()),
            }
        }
    }

    fn memory(&mut self, at: u64, length: usize) -> Result<Vec<u8>> {
        self.qemu.memory(at, length)
    }
}

#[test]
fn linux_starts_behind_vt_d() {
    images::build().unwrap();
    images::build_initrd().unwrap();
    let set = devices::Set::create().unwrap();
    let mut machine = Machine::start(2, Wrong::Nothing, Some(&set));
    machine.ready();
    let console = machine.console();
    for line in ["1 IOMMU(s) deny all DMA", "DMA open to it alone", "smp: Brought up 1 node, 2 CPUs", "AHCI"]
    {
        assert!(console.contains(line), "{line}\n{console}");
    }
    // Of IOMMUs the guest is shown one that remaps interrupts, and nothing else.
    for line in
        ["No supported address widths. Not attempting DMA translation", "Enabled IRQ remapping in xapic mode"]
    {
        assert!(console.contains(line), "{line}\n{console}");
    }
    assert_eq!(machine.register(regs::ERRORCODE), 0);
    assert_eq!(machine.register(regs::CMD_SECRETS) & 1, 1);
    assert_eq!(machine.register(regs::CMD_OPEN_LOCALITY1) & 1, 1);
    let done = devices::exercise(&set, |script| machine.check(script)).unwrap();
    devices::reset_and_find_again(&mut machine).unwrap();
    let plugged = devices::plug_and_take_out(&mut machine, &set).unwrap();
    let log = machine.dir.file("qemu.log");
    devices::check_walked(&done, &log).unwrap();
    assert!(devices::walked(&log).unwrap().contains(&plugged), "{plugged:#x}");
    devices::print("intel-iommu", &done);
    let log = fs::read_to_string(machine.dir.file("qemu.log")).unwrap();
    assert!(!log.contains("vtd_dmar_fault"), "{log}");
    let reserved = format!("reserved memory {:#x}, 4096 bytes", memory::KEPT);
    let records = machine.check("cordon log").unwrap();
    let told = |line: &str| line.contains(&reserved) && line.contains("refused") && line.contains("denied");
    assert!(records.lines().any(told), "{records}");
}

#[test]
#[ignore = "boots two machines; `make test-all` and `make attacks` run it"]
fn an_attack_by_devices_does_not_pass_vt_d() {
    images::build().unwrap();
    images::build_initrd().unwrap();
    let (words, devices) = (dma::words(), edu::arguments());
    let mut machine = Machine::launch(2, Wrong::Nothing, (&words, ""), &paths::initrd(), &devices);
    machine.ready();
    let prey = dma::prey(&mut machine);
    dma::attack(&mut machine, prey.clone(), true);
    drop(machine);

    let mut machine = Machine::native(2, &words, &devices);
    machine.ready();
    dma::attack(&mut machine, prey, false);
}

#[test]
#[ignore = "the control of one attack; `make test-all` runs it"]
fn reserved_memory_is_devices_if_the_configuration_says_so() {
    images::build().unwrap();
    images::build_initrd().unwrap();
    let (words, devices) = (dma::words(), edu::arguments());
    let config = "dma.reserved = allow";
    let mut machine = Machine::launch(2, Wrong::Nothing, (&words, config), &paths::initrd(), &devices);
    machine.ready();
    dma::reach_reserved(&mut machine);
    let records = machine.check("cordon log").unwrap();
    let told = |line: &str| line.contains("left open") && line.contains("reserved memory");
    assert!(records.lines().any(told), "{records}");
}

#[test]
fn what_sinit_did_not_vouch_for_ends_in_a_reset_with_the_reason() {
    images::build().unwrap();
    images::build_initrd().unwrap();
    for (wrong, error, silent) in [
        (Wrong::PageTables, SenterError::PageTables, true),
        (Wrong::Protected, SenterError::Region, true),
        (Wrong::HeapSize, SenterError::Heap, true),
        (Wrong::Ranges, SenterError::Memory, false),
        (Wrong::Silent, SenterError::Missing, false),
    ] {
        let mut machine = Machine::start(2, wrong, None);
        machine.wait(Duration::from_secs(60), |m| m.register(regs::CMD_RESET) & 1 == 1);
        let record = Record::from_errorcode(machine.register(regs::ERRORCODE) as u32).unwrap();
        assert_eq!((record.stage, record.code), (Stage::Senter, error as u16), "{wrong:?}");
        assert_eq!(machine.register(regs::CMD_SECRETS) & 1, 0);
        // Up to the check of page tables and ranges there is no stack, so no message.
        assert_eq!(machine.console().contains("cordon: FATAL: after SENTER"), !silent, "{wrong:?}");
    }
}

#[test]
fn an_attack_that_storms_vt_d_is_counted_and_told_in_part() {
    images::build().unwrap();
    images::build_initrd().unwrap();
    let mut machine =
        Machine::launch(2, Wrong::Nothing, (&dma::words(), ""), &paths::initrd(), &storm::arguments());
    machine.ready();
    let log = machine.dir.file("qemu.log");
    assert_eq!(storm::stopped(&log, memory::REGION).unwrap(), 0);
    let storm = Storm::begin(&mut machine, memory::REGION).unwrap();
    let exits = storm::work(&mut machine).unwrap();
    storm.end(&mut machine).unwrap();
    let stopped = storm::stopped(&log, memory::REGION).unwrap();
    let [faults, overflows] = tally::dma(&mut machine).unwrap();
    println!(
        "{stopped} accesses stopped, {} taken from the unit, {} records; {} overflows, {} records; {exits} exits",
        faults.counted,
        faults.records(),
        overflows.counted,
        overflows.records()
    );
    // The unit has room for one fault: all others are overflows.
    let beyond = |tally: &Tally| tally.counted > tally.records() as u64;
    assert!(stopped > 1000 && beyond(&faults) && beyond(&overflows), "{faults:?} {overflows:?}");
    assert!(exits < stopped / 100, "{exits} exits");
    seen("guest, VT-d: drown the log in accesses that are stopped", true);
}
