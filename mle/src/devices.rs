//! Devices that firmware's memory map would give to the sandbox.
//!
//! The map is firmware's word, and a device with registers there is the sandbox's to program: what it does by DMA reaches all of
//! the guest. So no runtime region is the sandbox's that a PCI function decodes, unless the configuration says so of the function.

use core::fmt;

use firmware::exposure::{Decision, Kind, Record, Text};
use firmware::memmap::MemoryMap;
use heapless::Vec;
use hv::addr::PhysRange;
use hv::io::PortIo;
use iommu::pci;

/// Most runtime regions that PCI functions may decode.
pub const CLAIMS_MAX: usize = 16;

/// A runtime region that a PCI function decodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Claim {
    /// The region.
    pub region: PhysRange,
    /// Bus in bits 15:8, device in 7:3, function in 2:0; of segment 0.
    pub function: u16,
    /// Whether the configuration leaves it to firmware.
    pub allowed: bool,
}

impl fmt::Display for Claim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (bus, device, function) = (self.function >> 8, self.function >> 3 & 0x1f, self.function & 7);
        write!(f, "PCI {bus:02x}:{device:02x}.{function} in the map at {:#x}", self.region.start())
    }
}

impl Claim {
    /// For the exposure log.
    pub fn on_record(&self, cpu: u32, now_us: u64) -> Record {
        let (kind, decision) = match self.allowed {
            true => (Kind::LEFT_OPEN, Decision::PASSED),
            false => (Kind::REFUSED, Decision::DENIED),
        };
        Record { decision, text: Some(Text::new(self)), ..Record::new(kind, cpu, now_us) }
    }
}

/// More than [`CLAIMS_MAX`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooMany;

impl fmt::Display for TooMany {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PCI: more than {CLAIMS_MAX} functions in runtime regions of the memory map")
    }
}

/// Finds them; `allowed` are functions that the configuration leaves to firmware. No device may be in use by anybody else: see
/// [`pci::Function::decodes`].
///
/// # Errors
/// [`TooMany`].
pub fn find(
    ports: &impl PortIo,
    map: &MemoryMap,
    allowed: &[u16],
) -> Result<Vec<Claim, CLAIMS_MAX>, TooMany> {
    let mut claims = Vec::new();
    for function in pci::functions(ports) {
        let regions = map.runtime().map(|r| r.range);
        for region in regions.filter(|region| function.decodes(region).is_some()) {
            let allowed = allowed.contains(&function.id);
            claims.push(Claim { region, function: function.id, allowed }).map_err(|_| TooMany)?;
        }
    }
    Ok(claims)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_names_the_function_and_all_of_the_address() {
        let region = PhysRange::from_last(u64::MAX - 0xfff, u64::MAX).unwrap();
        let text = |allowed| Claim { region, function: 0x00fd, allowed }.on_record(0, 0).text;
        let expected = "PCI 00:1f.5 in the map at 0xfffffffffffff000";
        assert_eq!(text(true), Some(Text::new(expected)));
        assert_ne!(text(true), Some(Text::new(&expected[..expected.len() - 1])));
        assert_eq!(Claim { region, function: 0, allowed: false }.on_record(0, 0).decision, Decision::DENIED);
    }
}
