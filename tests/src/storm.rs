//! A storm of accesses that an IOMMU stops: QEMU's EHCI controllers, which walk the ring of their asynchronous schedule each
//! millisecond, a hundred steps where it has no end, and need no CPU for it.
//!
//! Spec: \[EHCI\] "Host Controller Operational Registers", "Asynchronous Schedule"; \[QEMU\] `hcd-ehci.c`, MAX_QH.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use crate::compare::EXITS;
use crate::edu::{Guest, functions, requester};

/// How many controllers there are: a unit may take what one device does over again for one fault.
const CONTROLLERS: usize = 2;
/// Operational registers: command, and the address of the asynchronous schedule.
const COMMAND: u64 = 0x20;
const SCHEDULE: u64 = 0x38;
/// Commands: run, with that schedule; stand still.
const RUN: u64 = 0x8_0021;
const STOP: u64 = 0x8_0000;

/// QEMU's arguments for the controllers, and for a log of what either IOMMU makes of their accesses.
pub fn arguments() -> Vec<String> {
    let devices = (0..CONTROLLERS).flat_map(|_| ["-device", "usb-ehci"]);
    let traces = ["-trace", "vtd_dmar_fault", "-trace", "amdvi_translation_result"];
    devices.chain(traces).map(str::to_owned).collect()
}

/// Controllers at work.
pub struct Storm {
    /// Their places and registers.
    controllers: Vec<(String, u64)>,
}

impl Storm {
    /// Has all of them read at `address`, and at what they take for the next address in what they get.
    pub fn begin(guest: &mut impl Guest, address: u64) -> Result<Self> {
        let controllers = functions(guest, 0x24cd)?;
        ensure!(controllers.len() == CONTROLLERS, "controllers: {controllers:x?}");
        let storm = Self { controllers };
        storm.write(guest, SCHEDULE, address)?;
        storm.write(guest, COMMAND, RUN)?;
        Ok(storm)
    }

    /// The numbers by which they are known.
    pub fn devices(&self) -> Result<Vec<u16>> {
        self.controllers.iter().map(|(place, _)| requester(place)).collect()
    }

    /// Has them stand still.
    pub fn end(self, guest: &mut impl Guest) -> Result<()> {
        self.write(guest, COMMAND, STOP)
    }

    fn write(&self, guest: &mut impl Guest, register: u64, value: u64) -> Result<()> {
        let write = |(_, base): &(_, u64)| format!("devmem {:#x} 32 {value:#x} || exit\n", base + register);
        guest.check(&self.controllers.iter().map(write).collect::<String>()).map(drop)
    }
}

/// How many accesses to the page at `address` an IOMMU stopped, by QEMU's log. AMD's names the result of each translation, which is
/// nothing then.
pub fn stopped(log: &Path, address: u64) -> Result<u64> {
    let text = fs::read(log).with_context(|| log.display().to_string())?;
    let page = address >> 12;
    let (fault, walk) = (format!(" addr {page:#x}"), format!(" gpa {page:#x}"));
    let stopped = |line: &&str| {
        line.contains("vtd_dmar_fault") && line.contains(&fault)
            || line.contains("amdvi_translation_result") && line.contains(&walk) && line.ends_with(" hpa 0x0")
    };
    Ok(String::from_utf8_lossy(&text).lines().filter(stopped).count() as u64)
}

/// Has the guest work on both CPUs for some seconds. Gives the exits meanwhile, but for CPUID and hypercalls.
pub fn work(guest: &mut impl Guest) -> Result<u64> {
    let exits = guest.check(&format!(
        "{EXITS} exits && before=$total
        for cpu in 1 2; do
            ( for i in $(seq 40); do taskset $cpu head -c 300000 /dev/zero | sha256sum; usleep 50000; done >/tmp/sums$cpu ) &
        done
        wait && [ $(cat /tmp/sums* | sort -u | wc -l) = 1 ] && [ $(cat /tmp/sums* | wc -l) = 80 ] || exit
        exits && echo $((total - before))"
    ))?;
    exits.trim().parse().with_context(|| format!("exit counters: {exits}"))
}
