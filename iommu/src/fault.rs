//! What IOMMUs stopped, in words that both vendors share.

/// How a device tried to reach the address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Read.
    Read,
    /// Write.
    Write,
    /// The IOMMU does not say.
    Unknown,
}

/// Why a request was stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The tables give the device no such right there.
    Denied,
    /// It was an interrupt, of a kind that the device may not send.
    Interrupt,
    /// The IOMMU could not read, or does not accept, a table entry or command: a defect of ours or of the hardware.
    /// The value is the vendor's code.
    Broken(u8),
}

/// One request that an IOMMU stopped, or a failure of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Who: PCI segment in bits 31:16, bus in 15:8, device in 7:3, function in 2:0.
    pub source: u32,
    /// Where: the device's address; the IOMMU's own for some of [`Reason::Broken`].
    pub address: u64,
    /// How.
    pub access: Access,
    /// Why.
    pub reason: Reason,
}

/// What one look into the IOMMUs' logs found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Drained {
    /// Faults taken out.
    pub events: u32,
    /// Whether some log ran over: faults were lost, nobody knows how many.
    pub overflowed: bool,
    /// Whether some log holds more.
    pub more: bool,
}

impl Drained {
    pub(crate) fn add(&mut self, other: Self) {
        self.events = self.events.saturating_add(other.events);
        self.overflowed |= other.overflowed;
        self.more |= other.more;
    }
}
