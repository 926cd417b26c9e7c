//! PCI functions that may begin transfers of their own: stopped for a while, and let go again.
//!
//! Spec: \[PCI\] "Command Register", bit 2.

use heapless::Vec;
use hv::io::PortIo;
use iommu::pci::{self, Function};

const COMMAND: u8 = 4;
/// The upper half is the status register, whose bits are cleared by ones.
const COMMAND_BITS: u32 = 0xffff;
const BUS_MASTER: u32 = 1 << 2;
/// Classes that are left alone: what is behind a bridge goes through it, and an IOMMU reads its tables.
const BRIDGE: u16 = 0x06;
const IOMMU: u16 = 0x0806;

/// Clears Bus Master Enable of all PCI functions but bridges and IOMMUs.
///
/// Gives the ids of those where it was set; of more than there is room for it stays cleared.
pub fn stop(ports: &impl PortIo) -> Vec<u16, 64> {
    let mut stopped = Vec::new();
    for function in pci::functions(ports) {
        if function.class() >> 8 != BRIDGE && function.class() != IOMMU {
            let command = function.read(COMMAND) & COMMAND_BITS;
            function.write(COMMAND, command & !BUS_MASTER);
            if command & BUS_MASTER != 0 {
                let _ = stopped.push(function.id);
            }
        }
    }
    stopped
}

/// Sets Bus Master Enable of these again.
pub fn start(ports: &impl PortIo, stopped: &[u16]) {
    for id in stopped {
        let function = Function::new(ports, *id);
        let command = function.read(COMMAND) & COMMAND_BITS;
        function.write(COMMAND, command | BUS_MASTER);
    }
}
