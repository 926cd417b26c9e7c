use super::*;
use crate::model::Machine;

#[test]
fn finds_every_function_that_answers() {
    let machine = Machine::new();
    for id in [0x0000, 0x0007, 0x00ff, 0xffff] {
        machine.set_config(id, 0, 0x1234_1022);
    }
    // No function 0: hidden from who looks there first.
    machine.set_config(0x1203, 0, 0x1234_1022);
    let found: Vec<u16> = functions(&machine).map(|function| function.id).collect();
    assert_eq!(found, [0x0000, 0x0007, 0x00ff, 0x1203, 0xffff]);
}

#[test]
fn a_looping_capability_list_ends() {
    let machine = Machine::new();
    let function = Function::new(&machine, 8);
    machine.set_config(8, 4, 1 << 20);
    machine.set_config(8, 0x34, 0x50);
    machine.set_config(8, 0x50, 0x6005);
    machine.set_config(8, 0x60, 0x5010);
    assert_eq!(function.capability(|header| header & 0xff == 0x0f), None);
    assert_eq!(function.capability(|header| header & 0xff == 0x10), Some(0x60));
    machine.set_config(8, 4, 0);
    assert_eq!(function.capability(|_| true), None);
}

#[test]
fn a_bar_claims_what_it_may_decode() {
    let machine = Machine::new();
    let function = Function::new(&machine, 8);
    let bar = |offset: u8, value: u64| {
        machine.set_config(8, offset, value as u32 | 0b1100);
        machine.set_config(8, offset + 4, (value >> 32) as u32);
    };
    bar(0x10, 0);
    bar(0x18, 0x000f_fffe_4000_0000);
    assert_eq!(function.claims(0x000f_fffe_4000_0000), Some(0x18));
    assert_eq!(function.claims(0x000f_fffe_7fff_ffff), Some(0x18));
    assert_eq!(function.claims(0x000f_fffe_8000_0000), None);
    assert_eq!(function.claims(0x000f_fffe_3fff_ffff), None);
    // The largest region of all.
    bar(0x20, 1 << 51);
    assert_eq!(function.claims(0x000f_ffff_ffe0_0000), Some(0x20));
    // A bridge has two registers only; what is at 18h are its bus numbers.
    machine.set_config(8, 0x0c, 0x0001_0000);
    assert_eq!(function.claims(0x000f_fffe_4000_0000), None);
}
