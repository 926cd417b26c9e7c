//! Calls against memory of firmware's, of the guest's and of its copies.

use super::*;
use crate::prm::tests::{handler, module, parse, table};
use crate::testmem::Ram;
use proptest::prelude::*;

/// Firmware's data: the list of device memory at 2000h, a buffer of parameters over the end of its first page.
const FIRMWARE: u64 = 0x7f00_0000;
const BUFFER: u64 = FIRMWARE + 0xff0;
const STATIC: u64 = FIRMWARE + 0x3000;
/// The guest's copies of the buffer's two pages.
const COPIES: u64 = 0x7f00_8000;
const GUEST: u64 = 0x1_0000;
const SEEN_AT: u64 = 0x6000_0000;

struct Bench {
    mem: Ram,
    guest: Ram,
    buffer: std::boxed::Box<CallBuffer>,
    handlers: Handlers,
}

fn bench() -> Bench {
    let mem = Ram::new(FIRMWARE, 0xa000);
    let ranges = [2u64.to_le_bytes().to_vec(), mmio(0xfed0_0000, 0x999, 0x1000), mmio(0xfee0_0000, 0, 0x20)];
    put(&mem, FIRMWARE + 0x2000, &ranges.concat());
    put(&mem, BUFFER - 4, b"not parameters, parameters of firmware");
    put(&mem, COPIES, &[0x55; 0x2000]);
    let with = handler(1, 0x7e00_0000, STATIC, BUFFER);
    let prmt = parse(&table(&[module(0xaa, &[with, handler(2, 0x7e00_0010, 0, 0)])])).unwrap();
    let lengths = [Length { handler: Guid::from_bytes([2; 16]), bytes: 12 }];
    let handlers = Handlers::new(prmt, PhysRange::new(COPIES, 0x2000), &lengths, &mem).unwrap();
    Bench {
        mem,
        guest: Ram::new(GUEST, 0x1000),
        buffer: std::boxed::Box::new(CallBuffer::new_zeroed()),
        handlers,
    }
}

fn put(ram: &Ram, at: u64, bytes: &[u8]) {
    assert!(PhysMem::write(ram, at, bytes));
}

fn mmio(physical: u64, own: u64, length: u32) -> std::vec::Vec<u8> {
    [&physical.to_le_bytes()[..], &own.to_le_bytes(), &length.to_le_bytes()].concat()
}

fn get(ram: &Ram, at: u64, len: usize) -> std::vec::Vec<u8> {
    let mut bytes = std::vec![0; len];
    assert!(PhysMem::read(ram, at, &mut bytes));
    bytes
}

impl Bench {
    fn stage(&mut self, n: u8, pointer: u64) -> Result<Staged, CallError> {
        self.handlers.stage(n, pointer, (&self.guest, &self.mem), (&mut self.buffer, SEEN_AT))
    }

    fn finish(&mut self, staged: &Staged) -> Result<(), CallError> {
        self.handlers.finish(staged, (&self.guest, &self.mem), &mut self.buffer)
    }

    /// Bytes of the call buffer, by the sandbox's address.
    fn seen(&mut self, at: u64, len: usize) -> &mut [u8] {
        let at = usize::try_from(at - SEEN_AT).unwrap();
        assert!(Staged::used().into_iter().any(|piece| piece.start <= at && at + len <= piece.end));
        &mut self.buffer.as_mut_bytes()[at..at + len]
    }
}

#[test]
fn the_guest_finds_what_firmware_left_in_its_buffers_and_nothing_else() {
    let b = bench();
    assert!(b.handlers.pages().eq([(FIRMWARE, COPIES), (FIRMWARE + 0x1000, COPIES + 0x1000)]));
    let copies = get(&b.mem, COPIES, 0x2000);
    assert!(copies[..0xff0].iter().all(|b| *b == 0), "what is before the buffer is firmware's");
    assert_eq!(&copies[0xff0..][..34], b"parameters, parameters of firmware");
    // The buffer's end is not known; 1024 bytes from its start on.
    assert!(copies[0xff0 + 1024..].iter().all(|b| *b == 0));
}

#[test]
fn parameters_of_acpi_code_go_through_the_guests_pages() {
    let mut b = bench();
    put(&b.mem, COPIES + 0xff0, b"spans the end of a page");
    let before = get(&b.mem, FIRMWARE, 0x8000);
    let staged = b.stage(0, 0).unwrap();
    let call = staged.call(SEEN_AT);
    assert_eq!(call.target, Target::Handler(0));
    assert_eq!(b.seen(call.rcx, 23), b"spans the end of a page");
    b.seen(call.rcx, 23).copy_from_slice(b"SPANS THE END OF A PAGE");
    b.finish(&staged).unwrap();
    assert_eq!(get(&b.mem, COPIES + 0xff0, 23), b"SPANS THE END OF A PAGE");
    assert_eq!(get(&b.mem, FIRMWARE, 0x8000), before, "firmware's own buffer is not touched");
}

#[test]
fn a_handler_gets_its_context() {
    let mut b = bench();
    let call = b.stage(0, 0).unwrap().call(SEEN_AT);
    let context = b.seen(call.rdx, 40).to_vec();
    assert_eq!(&context[..8], b"PRMC\0\0\0\0");
    assert_eq!(context[8..24], [1; 16]);
    assert_eq!(context[24..32], STATIC.to_le_bytes());
    let list = u64::from_le_bytes(context[32..].try_into().unwrap());
    // The sandbox has device memory where it is, whatever firmware made of it for an operating system.
    let expected = [mmio(0xfed0_0000, 0xfed0_0000, 0x1000), mmio(0xfee0_0000, 0xfee0_0000, 0x20)].concat();
    assert_eq!(b.seen(list, 8), 2u64.to_le_bytes());
    assert_eq!(b.seen(list + 8, 40), expected);
    let call = b.stage(1, 0).unwrap().call(SEEN_AT);
    assert_eq!((call.rcx, b.seen(call.rdx + 24, 8)), (0, &mut [0u8; 8][..]), "no parameters, no data");
}

#[test]
fn parameters_of_drivers_are_as_long_as_the_configuration_says() {
    let mut b = bench();
    put(&b.guest, GUEST, b"of a driver, and of its stack");
    let staged = b.stage(1, GUEST).unwrap();
    let call = staged.call(SEEN_AT);
    assert_eq!(b.seen(call.rcx, 16), b"of a driver,\0\0\0\0");
    b.seen(call.rcx, 16).fill(b'x');
    b.finish(&staged).unwrap();
    assert_eq!(get(&b.guest, GUEST, 29), b"xxxxxxxxxxxx and of its stack");
}

#[test]
fn what_cannot_be_called_is_an_error_by_name() {
    let mut b = bench();
    let mut refused = |n, pointer| b.stage(n, pointer).unwrap_err();
    assert_eq!(refused(2, 0).to_string(), "PRM: no handler has thunk 2");
    assert_eq!(refused(2, 0).status(), Status::NOT_FOUND);
    assert_eq!(refused(0, GUEST).to_string(), "PRM: no prm.parameters.01010101-0101-0101-0101-010101010101");
    let end = GUEST + 0x1000 - 11;
    assert_eq!(refused(1, end).to_string(), "PRM: no 12 bytes of parameters at 0x10ff5");
    assert_eq!(refused(1, end).status(), Status::INVALID_PARAMETER);
    for (count, text) in [
        (33u64, "PRM: 33 MMIO ranges, limit 32"),
        (u64::MAX, "PRM: 18446744073709551615 MMIO ranges, limit 32"),
    ] {
        let mut b = bench();
        put(&b.mem, FIRMWARE + 0x2000, &count.to_le_bytes());
        let error = b.stage(0, 0).unwrap_err();
        assert_eq!((error.to_string().as_str(), error.status()), (text, Status::DEVICE_ERROR));
    }
}

proptest! {
    #[test]
    fn nothing_but_the_buffers_of_a_call_is_written(
        n in 0u8..4,
        pointer in prop_oneof![Just(0u64), Just(GUEST), GUEST - 16..GUEST + 0x1010, any::<u64>()],
        results in proptest::collection::vec(any::<u8>(), 64),
    ) {
        let mut b = bench();
        let firmware = get(&b.mem, FIRMWARE, 0x8000);
        if let Ok(staged) = b.stage(n, pointer) {
            let call = staged.call(SEEN_AT);
            if call.rcx != 0 {
                b.seen(call.rcx, 64).copy_from_slice(&results);
            }
            let _ = b.finish(&staged);
        }
        prop_assert_eq!(get(&b.mem, FIRMWARE, 0x8000), firmware);
        let guest = get(&b.guest, GUEST, 0x1000);
        let written = guest.iter().enumerate().filter(|(_, byte)| **byte != 0);
        for (at, _) in written {
            prop_assert!((GUEST + at as u64).wrapping_sub(pointer) < 12);
        }
    }
}
