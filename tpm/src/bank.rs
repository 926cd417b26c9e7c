//! PCR banks and the digests that go into them.

use heapless::Vec;

/// Most banks handled. TPMs in the field have up to four.
pub const MAX_BANKS: usize = 8;
/// Longest digest, bytes.
pub const MAX_DIGEST: usize = 64;

/// TPM_ALG_ID of a hash algorithm; any value, also ones this crate cannot compute.
///
/// Spec: \[TPM2\] "TPM_ALG_ID".
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct HashAlg(pub u16);

impl HashAlg {
    /// SHA-1.
    pub const SHA1: Self = Self(0x0004);
    /// SHA-256.
    pub const SHA256: Self = Self(0x000b);
    /// SHA-384.
    pub const SHA384: Self = Self(0x000c);
    /// SHA-512.
    pub const SHA512: Self = Self(0x000d);

    /// Digest bytes of an algorithm that this crate computes.
    pub const fn computed_size(self) -> Option<u8> {
        match self {
            Self::SHA1 => Some(20),
            Self::SHA256 => Some(32),
            Self::SHA384 => Some(48),
            Self::SHA512 => Some(64),
            _ => None,
        }
    }

    /// The name public tools use, for an algorithm that this crate computes.
    pub const fn name(self) -> Option<&'static str> {
        match self {
            Self::SHA1 => Some("sha1"),
            Self::SHA256 => Some("sha256"),
            Self::SHA384 => Some("sha384"),
            Self::SHA512 => Some("sha512"),
            _ => None,
        }
    }
}

/// A PCR bank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bank {
    /// Its hash algorithm.
    pub alg: HashAlg,
    /// Digest bytes, 1 to [`MAX_DIGEST`].
    pub size: u8,
}

impl Bank {
    /// The bank of an algorithm that this crate computes.
    pub const fn computed(alg: HashAlg) -> Option<Self> {
        match alg.computed_size() {
            Some(size) => Some(Self { alg, size }),
            None => None,
        }
    }
}

/// The active banks, in the TPM's order.
pub type Banks = Vec<Bank, MAX_BANKS>;

/// A digest of one bank.
#[derive(Clone, Copy)]
pub struct Digest {
    alg: HashAlg,
    size: u8,
    // Zero beyond `size`, so that equality is plain.
    bytes: [u8; MAX_DIGEST],
}

impl PartialEq for Digest {
    fn eq(&self, other: &Self) -> bool {
        self.alg == other.alg && self.as_bytes().iter().eq(other.as_bytes())
    }
}
impl Eq for Digest {}
impl Digest {
    /// A digest of 1 to [`MAX_DIGEST`] bytes; none for another length.
    pub fn new(alg: HashAlg, digest: &[u8]) -> Option<Self> {
        let mut bytes = [0; MAX_DIGEST];
        bytes.get_mut(..digest.len())?.copy_from_slice(digest);
        let size = u8::try_from(digest.len()).ok().filter(|size| *size != 0)?;
        Some(Self { alg, size, bytes })
    }

    /// All zeros: a dynamic PCR right after the DRTM event.
    pub const fn zero(bank: Bank) -> Self {
        let max = MAX_DIGEST as u8;
        let size = if bank.size > max { max } else { bank.size };
        Self { alg: bank.alg, size, bytes: [0; MAX_DIGEST] }
    }

    /// 01 00 … 00: what a bank is extended with when the digest cannot be computed, or to end its use.
    /// Linux's Secure Launch caps unknown banks with the same value.
    pub fn cap(bank: Bank) -> Self {
        let mut digest = Self::zero(bank);
        if let Some(first) = digest.bytes.first_mut() {
            *first = 1;
        }
        digest
    }

    /// The bank's algorithm.
    pub const fn alg(&self) -> HashAlg {
        self.alg
    }

    /// The digest.
    pub fn as_bytes(&self) -> &[u8] {
        // `size` never exceeds the array: every constructor checks it.
        self.bytes.get(..self.size.into()).unwrap_or_default()
    }

    /// The bank that this is a digest of.
    pub const fn bank(&self) -> Bank {
        Bank { alg: self.alg, size: self.size }
    }
}

impl core::fmt::Debug for Digest {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "{:#x}:{self}", self.alg.0)
    }
}

impl core::fmt::Display for Digest {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        self.as_bytes().iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// One digest for each active bank, in the banks' order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Digests(pub(crate) Vec<Digest, MAX_BANKS>);

impl Digests {
    /// None at all.
    pub const fn new() -> Self {
        Self(Vec::new())
    }

    /// [`Digest::zero`] in every bank: what the banks hold of a dynamic PCR right after the DRTM event.
    pub fn zero(banks: &[Bank]) -> Self {
        Self(banks.iter().copied().map(Digest::zero).take(MAX_BANKS).collect())
    }

    /// [`Digest::cap`] in every bank.
    pub fn cap(banks: &[Bank]) -> Self {
        Self(banks.iter().copied().map(Digest::cap).take(MAX_BANKS).collect())
    }

    /// The digest of one bank.
    pub fn get(&self, alg: HashAlg) -> Option<&Digest> {
        self.0.iter().find(|digest| digest.alg == alg)
    }

    /// All digests.
    pub fn as_slice(&self) -> &[Digest] {
        &self.0
    }

    /// Whether there is one digest for each of `banks`, in order, and no other.
    pub fn are_of(&self, banks: &[Bank]) -> bool {
        self.0.iter().map(Digest::bank).eq(banks.iter().copied())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_has_one_to_64_bytes() {
        assert!(Digest::new(HashAlg(0x99), &[]).is_none());
        assert!(Digest::new(HashAlg(0x99), &[7; 65]).is_none());
        assert_eq!(Digest::new(HashAlg(0x99), &[7; 64]).unwrap().as_bytes(), [7; 64]);
        assert_eq!(Digest::zero(Bank { alg: HashAlg(1), size: 255 }).as_bytes().len(), 64);
    }

    #[test]
    fn digests_belong_to_their_banks_in_order() {
        let one = Bank::computed(HashAlg::SHA1).unwrap();
        let two = Bank { alg: HashAlg(0x12), size: 32 };
        let digests = Digests::cap(&[one, two]);
        assert!(digests.are_of(&[one, two]));
        assert!(!digests.are_of(&[two, one]));
        assert!(!digests.are_of(&[one]));
        assert_eq!(digests.get(HashAlg(0x12)).unwrap().as_bytes()[..2], [1, 0]);
    }
}
