//! Interrupts that a guest's root would have a device send, by entries of the table that its kernel has given the unit.

use anyhow::Result;
use tests::attacks::seen;
use tests::edu::{self, Edu, Guest};
use tests::{images, paths};

use super::memory::Wrong;
use super::{Machine, dma};

/// The unit's registers: the one that the MLE shows, and QEMU's own.
const SHOWN: u64 = 0xfee0_1000;
const TRUE: u64 = 0xfed9_0000;
const QUEUE_TAIL: u64 = 0x88;
const QUEUE: u64 = 0x90;
const TABLE: u64 = 0xb8;
/// An entry that Linux does not use.
const INDEX: u64 = 0xfff0;
/// Where a device sends it.
const ADDRESS: u64 = 0xfee0_0010 | (INDEX & 0x7fff) << 5 | (INDEX >> 15) << 2;
/// RAM that Linux leaves alone; zeros are what the message says, which does not count.
const SCRATCH: u64 = 0x0c00_0000;
/// The thermal sensor's vector: Linux counts it whoever sends it.
const THERMAL: u64 = 0xfa;
const PRESENT: u64 = 1;
/// A descriptor.
const INVALIDATE_ALL: u64 = 4;
const NMI: u64 = 4 << 5;

/// A message about which the unit has its own opinion.
struct Attack<'a> {
    machine: &'a mut Machine,
    registers: u64,
    edu: Edu,
}

impl Attack<'_> {
    fn read(&mut self, at: u64) -> Result<u64> {
        let word = self.machine.check(&format!("devmem {at:#x} 64"))?;
        Ok(u64::from_str_radix(word.trim().trim_start_matches("0x"), 16)?)
    }

    /// As a kernel does it that was taken over: writes the entry, and has the unit read all entries anew.
    fn set(&mut self, low: u64) -> Result<()> {
        let [table, queue] =
            [TABLE, QUEUE].map(|register| self.read(self.registers + register).map(|value| value & !0xfff));
        let (entry, tail) = (table? + INDEX * 16, self.read(self.registers + QUEUE_TAIL)?);
        let descriptor = queue? + tail;
        let high = 1 << 18 | u64::from(self.edu.id()?);
        let end = (tail + 16) % 4096;
        let (from, next) = (SCRATCH + 0x10, SCRATCH + 0x20);
        let words = [(from, low), (from + 8, high), (next, INVALIDATE_ALL), (next + 8, 0)];
        let words: String = words.iter().map(|(at, word)| format!("devmem {at:#x} 64 {word:#x}\n")).collect();
        // The kernel's memory is not for programs to write, but for devices.
        let copies = [(from, entry), (next, descriptor)]
            .map(|(from, to)| [(from, Edu::BUFFER, 16, Edu::TAKE), (Edu::BUFFER, to, 16, Edu::GIVE)]);
        let copies = self.edu.script(copies.as_flattened());
        let invalidate = format!("devmem {:#x} 64 {end:#x}", self.registers + QUEUE_TAIL);
        self.machine.check(&format!("{words}{copies}{invalidate}"))?;
        Ok(())
    }

    /// How often the first CPU was interrupted in this way, before and after the device sends the message.
    fn send(&mut self, name: &str) -> Result<(u64, u64)> {
        let script =
            self.edu.script(&[(SCRATCH, Edu::BUFFER, 4, Edu::TAKE), (Edu::BUFFER, ADDRESS, 4, Edu::GIVE)]);
        let mut count = |script: &str| -> Result<u64> {
            let line = self.machine.check(&format!("{script}\ngrep {name}: /proc/interrupts"))?;
            Ok(line.split_whitespace().nth(1).unwrap_or_default().parse()?)
        };
        Ok((count("true")?, count(&script)?))
    }
}

#[test]
#[ignore = "boots two machines; `make test-all` and `make attacks` run it"]
fn a_device_sends_no_nmi_by_the_guests_own_table() {
    images::build().unwrap();
    images::build_initrd().unwrap();
    for protected in [true, false] {
        let (words, devices) = (dma::words(), edu::arguments());
        let mut machine = match protected {
            true => Machine::launch(2, Wrong::Nothing, (&words, ""), &paths::initrd(), &devices),
            false => Machine::native(2, &words, &devices),
        };
        machine.ready();
        machine.check(&format!("devmem {SCRATCH:#x} 64 0")).unwrap();
        let edu = Edu::all(&mut machine).unwrap().swap_remove(0);
        let registers = if protected { SHOWN } else { TRUE };
        let mut attack = Attack { machine: &mut machine, registers, edu };

        // What devices may send arrives.
        attack.set(PRESENT | THERMAL << 16).unwrap();
        let (before, after) = attack.send("TRM").unwrap();
        assert_eq!(after, before + 1);

        attack.set(PRESENT | NMI).unwrap();
        let (before, after) = attack.send("NMI").unwrap();
        assert_eq!(after, if protected { before } else { before + 1 });
        seen("guest, VT-d: a device sends an NMI by an entry of the guest's own table", protected);
        if protected {
            let log = machine.check("cordon log").unwrap();
            for told in ["left open", "closed", &format!("IRTE {INDEX}: delivery mode 4, not 0 or 1")] {
                assert!(log.contains(told), "{told}\n{log}");
            }
        }
    }
}
