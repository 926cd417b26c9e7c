//! Real devices: those of a machine that its guest is to use, what the guest does with each, and which of them the IOMMU's tables
//! were walked for.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tempfile::TempDir;

use crate::edu::Guest;
use crate::{initrd, paths};

/// Shell functions for the guest, and where they go in it.
const FUNCTIONS: &str = include_str!("../guest/devices.sh");
/// Words before a use of them.
pub const LOAD: &str = ". /run/devices.sh";
/// Their drivers.
const MODULES: [&str; 7] =
    ["virtio_pci", "virtio_blk", "virtio_net", "nvme", "e1000e", "xhci-pci", "usb-storage"];
/// Bytes of a disk: at 32 MiB busybox makes a FAT32 that mtools reads as a FAT16.
const DISK: u64 = 48 << 20;

/// What a device is good for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// Holds a disk: the name of its file.
    Disk(&'static str),
    /// Sits on the machine's one network.
    Network,
    /// A port that devices are plugged into.
    Port,
}

/// A device on bus 0, as function 0.
#[derive(Clone, Copy, Debug)]
pub struct Device {
    /// What it is called in tables.
    pub name: &'static str,
    /// Its device number.
    pub slot: u8,
    /// What it is good for.
    pub role: Use,
    /// Whether the machine sends its accesses through the IOMMU.
    pub translated: bool,
    /// QEMU's arguments, with `{slot}` and `{disk}` to be filled in.
    arguments: &'static str,
}

impl Device {
    /// PCI address without the segment.
    pub fn address(&self) -> String {
        format!("00:{:02x}.0", self.slot)
    }

    /// The identity that its requests bear.
    pub fn requester(&self) -> u16 {
        u16::from(self.slot) << 3
    }
}

const fn device(name: &'static str, slot: u8, role: Use, arguments: &'static str) -> Device {
    Device { name, slot, role, translated: true, arguments }
}

/// All of them. QEMU's virtio devices go past the IOMMU unless they are told otherwise, and then they offer it to the driver by
/// VIRTIO_F_ACCESS_PLATFORM; the last one is such a device.
pub const DEVICES: [Device; 8] = [
    device(
        "virtio-blk",
        0x10,
        Use::Disk("virtio"),
        "-device virtio-blk-pci,drive={disk},addr={slot},iommu_platform=on,disable-legacy=on",
    ),
    device("NVMe", 0x11, Use::Disk("nvme"), "-device nvme,serial=cordon,drive={disk},addr={slot}"),
    device(
        "AHCI",
        0x12,
        Use::Disk("ahci"),
        "-device ich9-ahci,id=ahci,addr={slot} -device ide-hd,bus=ahci.0,drive={disk}",
    ),
    device(
        "virtio-net",
        0x13,
        Use::Network,
        "-netdev hubport,id=net0,hubid=0
         -device virtio-net-pci,netdev=net0,addr={slot},iommu_platform=on,disable-legacy=on,romfile=",
    ),
    device(
        "e1000e",
        0x14,
        Use::Network,
        "-netdev hubport,id=net1,hubid=0 -device e1000e,netdev=net1,addr={slot},romfile=",
    ),
    device(
        "xHCI, USB storage",
        0x15,
        Use::Disk("usb"),
        "-device qemu-xhci,id=xhci,addr={slot} -device usb-storage,bus=xhci.0,drive={disk}",
    ),
    device("root port", 0x16, Use::Port, "-device pcie-root-port,id=hot,chassis=1,addr={slot}"),
    Device {
        translated: false,
        ..device(
            "virtio-blk without iommu_platform",
            0x17,
            Use::Disk("past"),
            "-device virtio-blk-pci,drive={disk},addr={slot}",
        )
    },
];

/// The devices' disks, and a RAM disk with their drivers.
pub struct Set {
    folder: TempDir,
    /// Whether the IOMMU's walks go to QEMU's log.
    traced: bool,
}

impl Set {
    /// Makes empty disks, and adds the drivers to the bench's RAM disk.
    pub fn create() -> Result<Self> {
        Self::make(true)
    }

    /// The same, for a machine that does not log what its IOMMU does.
    pub fn quiet() -> Result<Self> {
        Self::make(false)
    }

    fn make(traced: bool) -> Result<Self> {
        let set = Self { folder: tempfile::tempdir()?, traced };
        for name in DEVICES.iter().filter_map(disk).chain([PLUGGED]) {
            File::create(set.disk(name))?.set_len(DISK)?;
        }
        initrd::add_modules(&paths::initrd(), &paths::modules(), &MODULES, &set.initrd())?;
        Ok(set)
    }

    /// The RAM disk.
    pub fn initrd(&self) -> PathBuf {
        self.folder.path().join("initrd.img")
    }

    fn disk(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// QEMU's arguments.
    pub fn arguments(&self) -> Vec<String> {
        let drive = |name: &str| {
            let file = self.disk(name);
            ["-drive".to_owned(), format!("if=none,id={name},format=raw,file={}", file.display())]
        };
        let mut all: Vec<_> = drive(PLUGGED).to_vec();
        for device in &DEVICES {
            all.extend(disk(device).into_iter().flat_map(drive));
            let words = device.arguments.split_whitespace();
            let fill = |word: &str| {
                word.replace("{slot}", &format!("{:#x}", device.slot))
                    .replace("{disk}", disk(device).unwrap_or_default())
            };
            all.extend(words.map(fill));
        }
        // Says for which requester, and which page, an IOMMU walked its tables, and what it stopped.
        let events = ["amdvi_cache_update", "vtd_iotlb_page_update", "vtd_dmar_fault"];
        for event in events.into_iter().filter(|_| self.traced) {
            all.extend(["-trace", event].map(str::to_owned));
        }
        all
    }

    /// Checks that the file whose digest the guest printed is on the disk that it was written to.
    pub fn check_disk(&self, name: &str, digest: &str) -> Result<()> {
        let file = self.disk(name);
        let output = Command::new("mtype").arg("-i").arg(&file).arg("::data").output().context("mtype")?;
        ensure!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr).trim());
        let found = hex::encode(Sha256::digest(&output.stdout));
        ensure!(digest.contains(&found), "{name}: the disk holds {found}, the guest wrote {digest}");
        Ok(())
    }
}

/// The disk of a device that is plugged in while the machine runs.
const PLUGGED: &str = "plugged";

fn disk(device: &Device) -> Option<&'static str> {
    match device.role {
        Use::Disk(name) => Some(name),
        Use::Network | Use::Port => None,
    }
}

/// Gives the guest the functions that [`LOAD`] loads.
pub fn load(mut check: impl FnMut(&str) -> Result<String>) -> Result<()> {
    check(&format!("cat >/run/devices.sh <<'END'\n{FUNCTIONS}END")).map(drop)
}

/// Devices, and what each did.
pub type Table = Vec<(&'static Device, &'static str)>;

/// Has the guest, which runs a script by `check` and gives its output, use each device. Gives what each did, for a table.
pub fn exercise(set: &Set, mut check: impl FnMut(&str) -> Result<String>) -> Result<Table> {
    load(&mut check)?;
    let mut done = Vec::new();
    for device in &DEVICES {
        if let Some(name) = disk(device) {
            let digest = check(&format!("{LOAD}; use_disk {}", device.address()))
                .with_context(|| device.name.to_owned())?;
            set.check_disk(name, &digest)?;
            done.push((device, "file system written, read back, on the disk"));
        }
    }
    let on_network: Vec<_> = DEVICES.iter().filter(|device| device.role == Use::Network).collect();
    let &[one, other] = on_network.as_slice() else { bail!("the network has two ends") };
    check(&format!("{LOAD}; use_network {} {}", one.address(), other.address())).context("network")?;
    done.extend([one, other].map(|device| (device, "TCP, 4 MiB each way")));
    Ok(done)
}

/// Address of the device `name`.
pub fn address(name: &str) -> Result<String> {
    Ok(DEVICES.iter().find(|device| device.name == name).with_context(|| name.to_owned())?.address())
}

/// A guest on a machine that devices can be plugged into.
pub trait Sockets: Guest {
    /// Plugs a device in; `device` is what QEMU's `device_add` takes.
    fn plug(&mut self, device: &Value) -> Result<()>;
    /// Has the guest give back the device `id`, and takes it out.
    fn unplug(&mut self, id: &str) -> Result<()>;
}

/// A function is reset, and removed and found again, and works. After [`exercise`].
pub fn reset_and_find_again(guest: &mut impl Guest) -> Result<()> {
    let nvme = address("NVMe")?;
    let at = format!("/sys/bus/pci/devices/0000:{nvme}");
    guest.check(&format!("grep -q flr {at}/reset_method && echo 1 >{at}/reset"))?;
    guest.check(&format!("{LOAD}; use_disk {nvme}"))?;
    guest.check(&format!("echo 1 >{at}/remove && [ ! -e {at} ] && echo 1 >/sys/bus/pci/rescan"))?;
    guest.check(&format!("{LOAD}; use_disk {nvme}")).map(drop)
}

/// A disk is plugged into a port, used, taken out. Gives the identity that its requests bore, which no device had at launch. After
/// [`exercise`].
pub fn plug_and_take_out(machine: &mut impl Sockets, set: &Set) -> Result<u16> {
    let port = DEVICES.iter().find(|device| device.role == Use::Port).context("a port")?.address();
    let bus = machine.check(&format!("cat /sys/bus/pci/devices/0000:{port}/secondary_bus_number"))?;
    let bus: u8 = bus.trim().parse().with_context(|| format!("the port's bus: {bus}"))?;
    let at = format!("{bus:02x}:00.0");
    machine.plug(&json!({"driver": "nvme", "id": "new", "serial": "new", "bus": "hot", "drive": PLUGGED}))?;
    let digest = machine.check(&format!("{LOAD}; use_disk {at}"))?;
    set.check_disk(PLUGGED, &digest)?;
    machine.unplug("new")?;
    machine.check(&format!("{LOAD}; gone() {{ [ ! -e $pci/0000:{at} ]; }}; wait_for 'end of {at}' gone"))?;
    Ok(u16::from(bus) << 8)
}

/// Checks that, by QEMU's log, an IOMMU walked its tables for all devices in use but those that the machine lets go past it.
pub fn check_walked(done: &Table, log: &Path) -> Result<()> {
    let walked = walked(log)?;
    for (device, _) in done {
        let expected = device.translated;
        ensure!(
            walked.contains(&device.requester()) == expected,
            "{}: tables walked for {walked:x?}",
            device.name
        );
    }
    Ok(())
}

/// Prints a table.
pub fn print(iommu: &str, done: &Table) {
    for (device, what) in done {
        let way = if device.translated { "translated" } else { "goes past the IOMMU" };
        println!("{:<34} {iommu:<12} {what}; {way}", device.name);
    }
}

/// The requesters for which an IOMMU walked its tables, by QEMU's log.
pub fn walked(log: &Path) -> Result<BTreeSet<u16>> {
    let text =
        String::from_utf8_lossy(&fs::read(log).with_context(|| log.display().to_string())?).into_owned();
    Ok(text.lines().filter_map(requester).collect())
}

/// The requester of a line of the two trace events.
fn requester(line: &str) -> Option<u16> {
    let hex = |text: &str| u16::from_str_radix(text, 16).ok();
    if line.contains("amdvi_cache_update") {
        let (_, rest) = line.split_once("devid: ")?;
        let (bus, rest) = rest.split_once(':')?;
        let (slot, rest) = rest.split_once('.')?;
        Some(hex(bus)? << 8 | hex(slot)? << 3 | hex(rest.get(..1)?)?)
    } else {
        let (_, rest) = line.split_once("vtd_iotlb_page_update")?.1.split_once("sid 0x")?;
        hex(rest.split_whitespace().next()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requesters_are_read_from_both_traces() {
        let amd = "7@1.2:amdvi_cache_update  update iotlb domid 0x1 devid: 01:11.0 gpa 0x7e hpa 0x7e";
        let intel = "vtd_iotlb_page_update IOTLB page update sid 0x90 iova 0x3 slpte 0x3 domain 0x1";
        assert_eq!([amd, intel, "Triple fault"].map(requester), [Some(0x188), Some(0x90), None]);
    }
}
