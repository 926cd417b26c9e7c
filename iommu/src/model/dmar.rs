//! Builds a DMAR.

/// A DMAR in the making.
pub struct Table(Vec<u8>);

impl Table {
    /// A table for a machine with this many physical address bits.
    pub fn new(width: u8) -> Self {
        let mut bytes = vec![0; 48];
        bytes[36] = width - 1;
        Self(bytes)
    }

    pub fn flags(mut self, flags: u8) -> Self {
        self.0[37] = flags;
        self
    }

    /// A structure of any type: its four bytes of header, then `body`.
    pub fn structure(mut self, kind: u16, body: &[u8]) -> Self {
        self.0.extend(kind.to_le_bytes());
        self.0.extend((body.len() as u16 + 4).to_le_bytes());
        self.0.extend(body);
        self
    }

    pub fn unit(self, flags: u8, segment: u16, base: u64, scopes: &[u8]) -> Self {
        let mut body = vec![flags, 0];
        body.extend(segment.to_le_bytes());
        body.extend(base.to_le_bytes());
        body.extend(scopes);
        self.structure(0, &body)
    }

    pub fn region(self, segment: u16, start: u64, last: u64, scopes: &[u8]) -> Self {
        let mut body = vec![0, 0];
        body.extend(segment.to_le_bytes());
        body.extend(start.to_le_bytes());
        body.extend(last.to_le_bytes());
        body.extend(scopes);
        self.structure(1, &body)
    }

    /// Any bytes, as they are.
    pub fn raw(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }

    /// The table, with length and checksum.
    pub fn finish(mut self) -> Vec<u8> {
        self.0[..4].copy_from_slice(b"DMAR");
        let length = self.0.len() as u32;
        self.0[4..8].copy_from_slice(&length.to_le_bytes());
        self.0[9] = 0;
        self.0[9] = self.0.iter().fold(0u8, |sum, byte| sum.wrapping_sub(*byte));
        self.0
    }
}

/// A device scope.
pub fn scope(kind: u8, enumeration: u8, bus: u8, path: &[(u8, u8)]) -> Vec<u8> {
    let mut bytes = vec![kind, 6 + 2 * path.len() as u8, 0, 0, enumeration, bus];
    bytes.extend(path.iter().flat_map(|(device, function)| [*device, *function]));
    bytes
}
