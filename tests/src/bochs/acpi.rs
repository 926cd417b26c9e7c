//! The ACPI tables of the emulated board: OVMF takes its own from QEMU, and finds none on Bochs.
//!
//! The board is an i440FX with a PIIX3 and its power management, as OVMF sets it up.
//! Spec: \[ACPI\] "ACPI Software Programming Model".

use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Device, EISAName, IO, Memory32Fixed, Name, ONE, Package,
    PackageBuilder, Path, ResourceTemplate, Scope, ZERO,
};

use crate::acpi::{HEADER, finish, table};
use crate::senter::vt_d;

/// Where OVMF puts the power management block.
const PM_BASE: u32 = 0xb000;
const IO_APIC: u32 = 0xfec0_0000;
const TPM: u32 = 0xfed4_0000;
const LOCAL_APIC: u32 = 0xfee0_0000;

/// All tables, one behind the other.
pub fn tables(cpus: u32) -> Vec<u8> {
    // The firmware puts the address of the one into the other in whichever order they come.
    [dsdt(), fadt(), madt(cpus), tpm2(), dmar()].concat()
}

/// One PCI bus, whose interrupt pins lead to the I/O APIC's inputs 16 to 19, and how to turn the machine off.
fn dsdt() -> Vec<u8> {
    let mut routes = PackageBuilder::new();
    for device in 0..32u32 {
        for pin in 0..4u8 {
            let input = 16 + (device + u32::from(pin) + 3) % 4;
            let address = device << 16 | 0xffff;
            routes.add_element(&Package::new(vec![&address, &pin, &ZERO, &input]));
        }
    }
    let buses = AddressSpace::new_bus_number(0u16, 0xff);
    let configuration = IO::new(0xcf8, 0xcf8, 1, 8);
    let low = AddressSpace::new_io(0u16, 0xcf7, None);
    let high = AddressSpace::new_io(0xd00u16, 0xffff, None);
    let video = AddressSpace::new_memory(AddressSpaceCacheable::Cacheable, true, 0xa_0000u32, 0xb_ffff, None);
    let window = AddressSpace::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        0xc000_0000u32,
        0xfebf_ffff,
        None,
    );
    let resources = ResourceTemplate::new(vec![&buses, &configuration, &low, &high, &video, &window]);
    let names: [&dyn Aml; 4] = [
        &Name::new(Path::new("_HID"), &EISAName::new("PNP0A03")),
        &Name::new(Path::new("_UID"), &ONE),
        &Name::new(Path::new("_CRS"), &resources),
        &Name::new(Path::new("_PRT"), &routes),
    ];
    let bus = Device::new(Path::new("PCI0"), names.to_vec());
    let window = Memory32Fixed::new(true, TPM, 0x5000);
    let names: [&dyn Aml; 2] = [
        &Name::new(Path::new("_HID"), &"MSFT0101"),
        &Name::new(Path::new("_CRS"), &ResourceTemplate::new(vec![&window])),
    ];
    let tpm = Device::new(Path::new("TPM_"), names.to_vec());
    let scope = Scope::new(Path::new("\\_SB_"), vec![&bus, &tpm]);
    let off = Package::new(vec![&ZERO, &ZERO, &ZERO, &ZERO]);
    let mut table = table(*b"DSDT", HEADER, 2);
    scope.to_aml_bytes(&mut table);
    Name::new(Path::new("\\_S5_"), &off).to_aml_bytes(&mut table);
    finish(table)
}

/// Spec: \[ACPI\] "Fixed ACPI Description Table (FADT)", revision 3.
fn fadt() -> Vec<u8> {
    const WBINVD: u32 = 1;
    const NO_POWER_BUTTON: u32 = 1 << 4;
    const NO_SLEEP_BUTTON: u32 = 1 << 5;
    const RESET_REGISTER: u32 = 1 << 10;
    let mut table = table(*b"FACP", 244, 3);
    // Desktop; SCI at interrupt 9; no SMI command port: the machine is always in ACPI mode.
    table.write_u8(45, 1);
    table.write_u16(46, 9);
    table.write_u32(56, PM_BASE);
    table.write_u32(64, PM_BASE + 4);
    table.write_u32(76, PM_BASE + 8);
    // Lengths of event, control and timer registers.
    table.write_u8(88, 4);
    table.write_u8(89, 2);
    table.write_u8(91, 4);
    // No C2, no C3; the century's place in the CMOS memory.
    table.write_u16(96, 0xfff);
    table.write_u16(98, 0xfff);
    table.write_u8(108, 0x32);
    // 8042 and legacy devices are there.
    table.write_u16(109, 0b11);
    table.write_u32(112, WBINVD | NO_POWER_BUTTON | NO_SLEEP_BUTTON | RESET_REGISTER);
    // Port CF9h, 8 bits wide, value 6.
    table.write_bytes(116, &[1, 8, 0, 1]);
    table.write_u64(120, 0xcf9);
    table.write_u8(128, 6);
    finish(table)
}

/// Spec: \[ACPI\] "Multiple APIC Description Table (MADT)".
fn madt(cpus: u32) -> Vec<u8> {
    const PC_AT_COMPATIBLE: u32 = 1;
    /// Level-triggered, active high.
    const PCI_STYLE: u16 = 0b1101;
    let mut table = table(*b"APIC", HEADER, 1);
    table.append(LOCAL_APIC);
    table.append(PC_AT_COMPATIBLE);
    for cpu in 0..cpus as u8 {
        table.append_slice(&[0, 8, cpu, cpu, 1, 0, 0, 0]);
    }
    // Bochs gives its I/O APIC the number behind the last CPU's.
    table.append_slice(&[1, 12, cpus as u8, 0]);
    table.append(IO_APIC);
    table.append(0u32);
    for (from, to, flags) in [(0u8, 2u32, 0u16), (9, 9, PCI_STYLE)] {
        table.append_slice(&[2, 10, 0, from]);
        table.append(to);
        table.append(flags);
    }
    finish(table)
}

/// Spec: \[ACPI-TPM\] "TPM2 Table", revision 4: the command response buffer interface.
fn tpm2() -> Vec<u8> {
    const CRB: u32 = 7;
    let mut table = table(*b"TPM2", HEADER, 4);
    table.append(0u32);
    table.append(u64::from(TPM) + 0x40);
    table.append(CRB);
    finish(table)
}

/// The board's IOMMU.
pub fn dmar() -> Vec<u8> {
    let mut table = table(*b"DMAR", HEADER, 1);
    table.append_slice(&vt_d::structures());
    finish(table)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_follow_one_another_and_add_up_to_zero() {
        let all = tables(2);
        let mut rest = all.as_slice();
        let mut signatures = Vec::new();
        while !rest.is_empty() {
            let length = u32::from_le_bytes(rest[4..8].try_into().unwrap()) as usize;
            assert_eq!(rest[..length].iter().fold(0u8, |a, &b| a.wrapping_add(b)), 0);
            signatures.push(rest[..4].to_vec());
            rest = &rest[length..];
        }
        assert_eq!(signatures, [b"DSDT", b"FACP", b"APIC", b"TPM2", b"DMAR"]);
        let [a, b, c, d, ..] = madt(2)[44..] else { panic!() };
        assert_eq!([a, b, c, d], [0, 8, 0, 0]);
    }
}
