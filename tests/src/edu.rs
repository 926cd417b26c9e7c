//! QEMU's `edu`, a buffer with a DMA engine, at the orders of a guest's root: what a device can reach.
//!
//! Spec: QEMU "EDU device".

use anyhow::{Context, Result, ensure};

use crate::attacks::seen;
use crate::machine::Machine;

/// A guest that runs scripts, on a machine whose memory can be looked at.
pub trait Guest {
    /// Runs a shell script that must succeed, and gives its output as text.
    fn check(&mut self, script: &str) -> Result<String>;
    /// Physical memory, past all protections.
    fn memory(&mut self, at: u64, length: usize) -> Result<Vec<u8>>;
}

impl Guest for Machine {
    fn check(&mut self, script: &str) -> Result<String> {
        Machine::check(self, script)
    }

    fn memory(&mut self, at: u64, length: usize) -> Result<Vec<u8>> {
        Machine::memory(self, at, length)
    }
}

/// Something that a device is to read and write.
#[derive(Clone, Debug)]
pub struct Prey {
    /// Its name.
    pub what: &'static str,
    /// Its address.
    pub at: u64,
    /// How many of its bytes, at most eight.
    pub length: usize,
    /// Bits of the first one that change by themselves.
    pub moving: u8,
}

impl Prey {
    /// The TPM's access register of locality 2. The lowest byte of [`MARK`] asks for the locality; whether anybody else waits
    /// for it is in a bit of its own.
    pub const LOCALITY_2: Self = Self { what: "TPM's locality 2", at: 0xfed4_2000, length: 1, moving: 4 };

    /// A word of memory.
    pub const fn word(what: &'static str, at: u64) -> Self {
        Self { what, at, length: 8, moving: 0 }
    }

    fn still(&self, mut bytes: Vec<u8>) -> Vec<u8> {
        bytes.truncate(self.length);
        if let Some(first) = bytes.first_mut() {
            *first &= !self.moving;
        }
        bytes
    }
}

/// What came of an attempt to read and write it.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Its bytes before.
    pub before: Vec<u8>,
    /// Its bytes after the device was told to write [`MARK`] there.
    pub after: Vec<u8>,
    /// What the device had after it was told to read it.
    pub found: Vec<u8>,
}

impl Outcome {
    /// It was not changed, and the device has something else: what was in its buffer, or what a read gives that nobody answers.
    pub fn blocked(&self) -> bool {
        self.after == self.before && self.found != self.before
    }

    /// It was changed, and the device got what it holds.
    pub fn reached(&self) -> bool {
        self.after != self.before && self.found == self.after
    }
}

/// What devices write.
pub const MARK: [u8; 8] = [0x02, 0x32, 0x54, 0x76, 0x98, 0xba, 0xdc, 0xfe];

/// QEMU's name for a device that reaches all addresses below 4 GiB.
pub const DEVICE: &str = "edu,dma_mask=0xffffffff";

/// QEMU's arguments for one device on the first bus, and one behind a bridge.
pub fn arguments() -> Vec<String> {
    [
        "pcie-root-port,id=root-port,chassis=7",
        "pcie-pci-bridge,id=pci-bridge,bus=root-port",
        &format!("{DEVICE},bus=pci-bridge,addr=1"),
        DEVICE,
    ]
    .into_iter()
    .flat_map(|device| ["-device".to_owned(), device.to_owned()])
    .collect()
}

/// Places and addresses of the registers of all PCI functions with this device identifier, in the order of their buses, with memory
/// and bus master on, as on the bridges before them.
pub fn functions(guest: &mut impl Guest, device: u16) -> Result<Vec<(String, u64)>> {
    let found = guest.check(&format!(
        "cd /sys/bus/pci/devices
        for device in $(grep -l {device:#06x} */device | cut -d/ -f1); do
            at=$(realpath $device)
            while [ -e $at/config ]; do
                printf '\\x07' | dd of=$at/config bs=1 seek=4 conv=notrunc status=none || exit
                at=${{at%/*}}
            done
            echo $device $(head -n1 $device/resource)
        done"
    ))?;
    found
        .lines()
        .map(|line| {
            let mut words = line.split_whitespace();
            let (name, base) = (words.next().context("a device")?, words.next().context("its registers")?);
            let registers = u64::from_str_radix(base.trim_start_matches("0x"), 16)?;
            Ok((name.strip_prefix("0000:").unwrap_or(name).to_owned(), registers))
        })
        .collect()
}

/// The number by which the device at a place is known: bus, device, function.
pub fn requester(place: &str) -> Result<u16> {
    let parts = place.split([':', '.']).map(|part| u16::from_str_radix(part, 16));
    let parts = parts.collect::<Result<Vec<_>, _>>()?;
    ensure!(parts.len() == 3, "{place} is no place of a device");
    Ok(parts[0] << 8 | parts[1] << 3 | parts[2])
}

/// One device.
#[derive(Clone, Debug)]
pub struct Edu {
    /// Address of its registers.
    pub registers: u64,
    /// Its place as Linux names it: bus, device, function.
    pub name: String,
}

impl Edu {
    /// Where its buffer begins, for itself.
    pub const BUFFER: u64 = 0x4_0000;
    /// Commands: to the device, from the device.
    pub const TAKE: u64 = 1;
    /// See [`Self::TAKE`].
    pub const GIVE: u64 = 3;
    /// Where in the buffer the mark is.
    const MARKED: u64 = Self::BUFFER + 0x800;

    /// All of the machine, see [`functions`].
    pub fn all(guest: &mut impl Guest) -> Result<Vec<Self>> {
        let found = functions(guest, 0x11e8)?;
        Ok(found.into_iter().map(|(name, registers)| Self { registers, name }).collect())
    }

    /// The two of [`arguments`].
    pub fn pair(guest: &mut impl Guest) -> Result<[Self; 2]> {
        let all = Self::all(guest)?;
        let right = all.len() == 2 && all[0].name.starts_with("00:") && !all[1].name.starts_with("00:");
        ensure!(right, "{all:?}");
        all.try_into().map_err(|all| anyhow::anyhow!("{all:?}"))
    }

    /// See [`requester`].
    pub fn id(&self) -> Result<u16> {
        requester(&self.name)
    }

    /// A script by which it copies, for each of `(from, to, length, command)`.
    pub fn script(&self, copies: &[(u64, u64, usize, u64)]) -> String {
        let register = |offset| format!("{:#x}", self.registers + offset);
        let (from, to, length, command) = (register(0x80), register(0x88), register(0x90), register(0x98));
        let mut script = format!(
            "copy() {{
                devmem {from} 64 $1 && devmem {to} 64 $2 && devmem {command} 64 $3 || exit
                usleep 90000
                while [ $(($(devmem {command} 64) & 1)) = 1 ]; do usleep 10000; done
            }}\n"
        );
        let mut last = 0;
        for (start, end, bytes, how) in copies {
            if std::mem::replace(&mut last, *bytes) != *bytes {
                script.push_str(&format!("devmem {length} 64 {bytes} || exit\n"));
            }
            script.push_str(&format!("copy {start:#x} {end:#x} {how}\n"));
        }
        script
    }

    /// [`Self::reach`], as an attack of `who`, which fails where the machine is protected and succeeds where it is not.
    ///
    /// # Errors
    /// It came to something else, or the device does not work.
    pub fn attack(
        &self,
        guest: &mut impl Guest,
        scratch: u64,
        prey: &[Prey],
        who: &str,
        protected: bool,
    ) -> Result<Vec<Outcome>> {
        let outcomes = self.reach(guest, scratch, prey)?;
        for (prey, outcome) in prey.iter().zip(&outcomes) {
            let right = if protected { outcome.blocked() } else { outcome.reached() };
            ensure!(right, "{who}: {prey:x?}: {outcome:x?}");
            seen(&format!("{who} reads and writes the {}", prey.what), protected);
        }
        Ok(outcomes)
    }

    /// Tells the device to write [`MARK`] to each prey, and then to read it. `scratch` is a page of the guest's memory that
    /// Linux leaves alone, by which the device gets the mark and gives away what it read.
    ///
    /// # Errors
    /// The device does not work: what it gets and gives in the guest's own memory is not there.
    pub fn reach(&self, guest: &mut impl Guest, scratch: u64, prey: &[Prey]) -> Result<Vec<Outcome>> {
        let results = scratch + 0x100;
        let slot = |index: usize| results + 8 * index as u64;
        let mark = u64::from_le_bytes(MARK);
        guest.check(&format!("devmem {scratch:#x} 64 {mark:#x} && devmem {results:#x} 64 0"))?;
        // By way of the guest's memory: there the device does as it is told.
        // Where it will read to is the mark too: a read that brings nothing leaves that, or what the last one left.
        let there = [
            (scratch, Self::MARKED, 8, Self::TAKE),
            (scratch, Self::BUFFER, 8, Self::TAKE),
            (Self::MARKED, results, 8, Self::GIVE),
        ];
        guest.check(&self.script(&there))?;
        ensure!(guest.memory(results, 8)? == MARK, "edu at {} does not copy", self.name);

        let look = |guest: &mut dyn FnMut(u64, usize) -> Result<Vec<u8>>| {
            prey.iter().map(|p| Ok(p.still(guest(p.at, p.length)?))).collect::<Result<Vec<_>>>()
        };
        let before = look(&mut |at, length| guest.memory(at, length))?;
        let writes: Vec<_> = prey.iter().map(|p| (Self::MARKED, p.at, p.length, Self::GIVE)).collect();
        guest.check(&self.script(&writes))?;
        let after = look(&mut |at, length| guest.memory(at, length))?;
        let reads: Vec<_> = (0..)
            .zip(prey)
            .flat_map(|(index, p)| {
                let give = (Self::BUFFER, slot(index), p.length, Self::GIVE);
                [(p.at, Self::BUFFER, p.length, Self::TAKE), give]
            })
            .collect();
        guest.check(&self.script(&reads))?;
        let found = guest.memory(results, 8 * prey.len())?;
        let all = prey.iter().zip(before).zip(after).zip(found.chunks(8));
        Ok(all
            .map(|(((p, before), after), found)| Outcome { before, after, found: p.still(found.to_vec()) })
            .collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_outcome_is_one_thing_or_the_other() {
        let outcome = |before: u8, after: u8, found: u8| Outcome {
            before: vec![before],
            after: vec![after],
            found: vec![found],
        };
        let says = |o: Outcome| (o.blocked(), o.reached());
        assert_eq!(says(outcome(5, 5, 0)), (true, false));
        assert_eq!(says(outcome(5, 2, 2)), (false, true));
        // Read or written is not blocked, but has not come to its aim either.
        assert_eq!(says(outcome(5, 5, 5)), (false, false));
        assert_eq!(says(outcome(5, 2, 0)), (false, false));
    }

    #[test]
    fn a_place_is_a_number() {
        assert_eq!(requester("02:01.3").unwrap(), 0x020b);
        assert!(requester("02:01").is_err());
    }
}
