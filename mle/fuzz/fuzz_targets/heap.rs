//! What loader and SINIT leave for the MLE's stage after SENTER. An input is a u16, as many bytes of SLRT, and the TXT heap.
#![no_main]

use hv::addr::PhysRange;
use hv::io::{Mmio, PhysMem};
use mle::senter::regs::{self, Registers};
use mle::senter::stage::{Buffers, DMAR_MAX, LOG_MAX, check};

const MIB: u64 = 1 << 20;
const HEAP: u64 = 0x3000_0000;
const HEAP_SIZE: u64 = 0x2_0000;
const SINIT: u64 = 0x2ff0_0000;
const SLRT: u64 = 0x1f00_0000;
const REGION: u64 = 0x2000_0000;

/// Memory of 1 GiB: zeros but for two places.
struct Memory<'a> {
    slrt: &'a [u8],
    heap: &'a [u8],
}

impl PhysMem for Memory<'_> {
    fn read(&self, addr: u64, out: &mut [u8]) -> bool {
        if addr < 0x1000 || addr.checked_add(out.len() as u64).is_none_or(|end| end > 1 << 30) {
            return false;
        }
        for (at, byte) in (addr..).zip(out) {
            let place = |base: u64, bytes: &[u8]| bytes.get(at.checked_sub(base)? as usize).copied();
            *byte = place(HEAP, self.heap).or(place(SLRT, self.slrt)).unwrap_or(0);
        }
        true
    }
    fn write(&self, _: u64, _: &[u8]) -> bool {
        panic!("the stage writes nothing")
    }
}

/// TXT's registers.
struct Page;

impl Mmio for Page {
    fn read64(&self, register: u32) -> u64 {
        match register {
            regs::ERRORCODE => regs::ERRORCODE_SUCCESS,
            regs::HEAP_BASE => HEAP,
            regs::HEAP_SIZE => HEAP_SIZE,
            regs::SINIT_BASE => SINIT,
            regs::SINIT_SIZE => 0x1_0000,
            _ => 0,
        }
    }
    fn read8(&self, _: u32) -> u8 {
        0
    }
    fn read32(&self, _: u32) -> u32 {
        0
    }
    fn write8(&self, _: u32, _: u8) {}
    fn write32(&self, _: u32, _: u32) {}
    fn write64(&self, _: u32, _: u64) {}
}

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    let Some((length, rest)) = input.split_first_chunk() else { return };
    let Some((slrt, heap)) = rest.split_at_checked(u16::from_le_bytes(*length).into()) else { return };
    let Some(image) = PhysRange::new(REGION, 2 * MIB) else { return };
    let (dmar, log) = (Box::into_raw(Box::new([0; DMAR_MAX])), Box::into_raw(Box::new([0; LOG_MAX])));
    // SAFETY: both were made just now, and are freed below, when nothing of what was found is left.
    unsafe {
        let buffers = Buffers { dmar: &mut *dmar, log: &mut *log };
        let _ = check(&Registers::new(Page, Page), &Memory { slrt, heap }, image, 32 * MIB, buffers);
        drop((Box::from_raw(dmar), Box::from_raw(log)));
    }
});
