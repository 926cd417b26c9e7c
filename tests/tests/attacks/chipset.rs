//! Attacks by configuration registers: those of the memory controller, the IOMMU, a bridge whose register block can be put over
//! memory, and the addresses of devices and bridges.

use super::{Access, SCRATCH, SIGSEGV, Target, access, number_after, read, seen, write};
use tests::edu::Edu;
use tests::machine::Machine;

/// Where no device is.
const FREE: u64 = 0xe000_0000;

/// A register of a PCI function of bus 0, a byte, and the bits to change.
struct Register {
    what: &'static str,
    /// What `/sys/bus/pci/devices` and configuration space in memory call it.
    device: u64,
    offset: u64,
    bits: u8,
}

/// Directory of a function.
fn folder(device: u64) -> String {
    format!("/sys/bus/pci/devices/0000:00:{:02x}.{}", device >> 3, device & 7)
}

/// Bytes of a file in the guest.
fn bytes<const N: usize>(machine: &mut Machine, file: &str, at: u64) -> [u8; N] {
    let text = machine.check(&format!("xxd -p -s {at} -l {N} {file}")).unwrap();
    hex::decode(text.trim()).unwrap().try_into().unwrap()
}

fn read_config<const N: usize>(machine: &mut Machine, device: u64, offset: u64) -> [u8; N] {
    bytes(machine, &format!("{}/config", folder(device)), offset)
}

fn config(machine: &mut Machine, register: &Register) -> u8 {
    read_config::<1>(machine, register.device, register.offset)[0]
}

fn write_config(machine: &mut Machine, device: u64, offset: u64, bytes: &[u8]) {
    let text: String = bytes.iter().map(|b| format!("\\x{b:02x}")).collect();
    let (file, size) = (folder(device), bytes.len());
    // One access of that size, or Linux takes it apart.
    let to = format!("dd of={file}/config bs={size} oflag=seek_bytes seek={offset} conv=notrunc status=none");
    machine.check(&format!("printf '{text}' | {to}")).unwrap();
}

/// Where configuration space is in memory.
pub fn ecam(machine: &mut Machine) -> u64 {
    u64::from_le_bytes(bytes(machine, "/sys/firmware/acpi/tables/MCFG", 44))
}

/// Writes registers that only the MLE may write, by ports and by memory; reading them is anybody's right.
pub fn registers(target: &mut Target) {
    let Target { machine, protected, .. } = target;
    let output = machine.check("cd /sys/bus/pci/devices && grep -l 0x080600 */class").unwrap();
    let iommu = number_after(&output, "0000:00:") << 3 | number_after(&output, ".");
    let ecam = ecam(machine);
    let registers = [
        Register { what: "PAM1: what is memory at C0000h", device: 0, offset: 0x91, bits: 0x11 },
        Register { what: "the IOMMU's own", device: iommu, offset: 0xfc, bits: 0xff },
    ];
    for register in registers {
        let what = register.what;
        let old = config(machine, &register);
        let changed = if *protected { old } else { old ^ register.bits };
        write_config(machine, register.device, register.offset, &[old ^ register.bits]);
        assert_eq!(config(machine, &register), changed, "{what}, by ports");
        write_config(machine, register.device, register.offset, &[old]);
        let at = ecam + (register.device << 12) + register.offset;
        let other = Access::write(at, (old ^ register.bits).into()).bits(8);
        assert_eq!(access(machine, &[other]), [Ok(0)]);
        assert_eq!(config(machine, &register), changed, "{what}, by memory");
        assert_eq!(access(machine, &[Access::write(at, old.into()).bits(8)]), [Ok(0)]);
        let identity = access(machine, &[Access::read(at - register.offset)])[0].unwrap();
        assert!(identity != 0 && identity as u32 != u32::MAX, "{what}: identity {identity:#x}");
        seen(&format!("guest: configuration register, {what}"), *protected);
    }
}

/// Puts the LPC bridge's register block over memory.
pub fn register_block(target: &mut Target) {
    const LPC: u64 = 0xf8;
    const RCBA: u64 = 0xf0;
    const VALUE: u64 = 0x1122_3344_5566_7788;
    const ENABLE: u64 = 1;
    let Target { machine, protected, .. } = target;
    let old: [u8; 4] = read_config(machine, LPC, RCBA);
    write(machine, SCRATCH, VALUE);
    write_config(machine, LPC, RCBA, &(SCRATCH as u32 | ENABLE as u32).to_le_bytes());
    let found = read(machine, SCRATCH);
    write_config(machine, LPC, RCBA, &old);
    assert_eq!(found == VALUE, *protected, "{found:#x}");
    assert_eq!(read(machine, SCRATCH), VALUE);
    // Another of its registers is the guest's.
    let route = Register { what: "PIRQA", device: LPC, offset: 0x60, bits: 1 };
    let old = config(machine, &route);
    write_config(machine, LPC, route.offset, &[old ^ route.bits]);
    assert_eq!(config(machine, &route), old ^ route.bits);
    write_config(machine, LPC, route.offset, &[old]);
    seen("guest: put a register block over memory", *protected);
}

/// Moves configuration space in memory: to where nothing is, and over memory, which the chipset lets win.
pub fn configuration_window(target: &mut Target) {
    const PCIEXBAR: u64 = 0x60;
    /// 64 MiB, on.
    const SMALL: u32 = 0b101;
    /// Linux leaves this alone too.
    const OVER: u64 = SCRATCH + (64 << 20);
    const VALUE: u64 = 0x1122_3344_5566_7788;
    let Target { machine, protected, .. } = target;
    let old: [u8; 4] = read_config(machine, 0, PCIEXBAR);
    let identity = u32::from_le_bytes(read_config(machine, 0, 0));
    let move_to = |machine: &mut Machine, base: u64| {
        write_config(machine, 0, PCIEXBAR, &(base as u32 | SMALL).to_le_bytes());
        let (found, register) = (read(machine, base), read_config::<4>(machine, 0, PCIEXBAR));
        write_config(machine, 0, PCIEXBAR, &old);
        (found, register == old)
    };
    write(machine, OVER, VALUE);
    assert_eq!(move_to(machine, OVER), (VALUE, *protected));
    let (found, stays) = move_to(machine, FREE);
    assert_eq!((found as u32 == identity, stays), (!*protected, *protected), "{found:#x}");
    seen("guest: move configuration space", *protected);
}

/// A function's address registers.
struct Decoder {
    config: String,
    /// A bridge's window, or a device's registers.
    bridge: bool,
}

impl Decoder {
    fn get(&self, machine: &mut Machine) -> String {
        let at = if self.bridge { 0x20 } else { 0x10 };
        machine.check(&format!("xxd -p -s {at} -l 4 {}", self.config)).unwrap().trim().to_owned()
    }

    fn set(&self, machine: &mut Machine, value: &str) {
        let (at, file) = (if self.bridge { 0x20 } else { 0x10 }, &self.config);
        let to = format!("dd of={file} bs=4 oflag=seek_bytes seek={at} conv=notrunc status=none");
        machine.check(&format!("echo {value} | xxd -r -p | {to}")).unwrap();
    }

    /// One MiB from `base` on.
    fn at(&self, machine: &mut Machine, base: u64) {
        let high = (base >> 16) as u32;
        let value = if self.bridge { high << 16 | high } else { base as u32 };
        self.set(machine, &hex::encode(value.to_le_bytes()));
    }
}

/// Puts a device's registers over what is Cordon's, on the first bus and behind bridges, whose windows follow. The chipset has
/// memory and its own registers win, with Cordon and without: the control is that the device answers elsewhere.
pub fn decoders(target: &mut Target) {
    /// Of `edu`.
    const IDENTITY: u64 = 0x0100_00ed;
    const MIB: u64 = 1 << 20;
    /// A MiB with the registers of TPM and IOMMU.
    const PLATFORM: u64 = 0xfed0_0000;
    const TPM: u64 = 0xfed4_0000;
    const IOMMU_FEATURES: u64 = 0xfed8_0030;
    const VALUE: u64 = 0x1122_3344_5566_7788;
    let Target { machine, places, protected, .. } = target;
    let readable = |machine: &mut Machine, at| access(machine, &[Access::read(at)])[0];
    for (edu, who) in Edu::all(machine).unwrap().iter().zip(["a device's registers", "a bridge's window"]) {
        let path = machine.check(&format!("realpath /sys/bus/pci/devices/0000:{}", edu.name)).unwrap();
        let mut decoders = vec![Decoder { config: format!("{}/config", path.trim()), bridge: false }];
        let mut above = path.trim();
        while let Some((parent, _)) =
            above.rsplit_once('/').filter(|(parent, _)| !parent.ends_with("/pci0000:00"))
        {
            decoders.push(Decoder { config: format!("{parent}/config"), bridge: true });
            above = parent;
        }
        assert_eq!(decoders.len() > 1, who == "a bridge's window", "{path}");
        let old: Vec<_> = decoders.iter().map(|decoder| decoder.get(machine)).collect();
        let move_to =
            |machine: &mut Machine, base| decoders.iter().for_each(|decoder| decoder.at(machine, base));

        move_to(machine, FREE);
        assert_eq!(readable(machine, FREE), Ok(IDENTITY), "{who}");
        write(machine, SCRATCH, VALUE);
        move_to(machine, SCRATCH);
        assert_eq!(read(machine, SCRATCH), VALUE, "{who}");
        for (what, at) in [("MLE", places.mle), ("SLB", places.slb)] {
            let before = machine.memory(at, 64).unwrap();
            move_to(machine, at & !(MIB - 1));
            assert_eq!(machine.memory(at, 64).unwrap(), before, "{who} over the {what}");
            if *protected {
                assert_eq!(readable(machine, at), Err(SIGSEGV), "{who} over the {what}");
                seen(&format!("guest: put {who} over the {what}"), true);
            }
        }
        let registers = |machine: &mut Machine| {
            (machine.memory(IOMMU_FEATURES, 8).unwrap(), machine.memory(TPM + 0xf00, 4).unwrap())
        };
        let before = registers(machine);
        move_to(machine, PLATFORM);
        assert_eq!(registers(machine), before, "{who} over IOMMU and TPM");
        for (decoder, old) in decoders.iter().zip(&old) {
            decoder.set(machine, old);
        }
        if *protected {
            seen(&format!("guest: put {who} over IOMMU and TPM"), true);
        }
        assert_eq!(readable(machine, edu.registers), Ok(IDENTITY), "{who}, put back");
    }
}
