//! Hashing for several banks at once.

use sha1::Digest as _;
use sha1::Sha1;
use sha2::{Sha384, Sha512};

use crate::bank::{Bank, Banks, Digest, Digests, HashAlg};

/// The SHA-256 compression function over whole blocks. On bare-metal targets the hash crates never use
/// the CPU's SHA instructions; an image that has them brings its own function.
pub type Sha256Blocks = fn(&mut [u32; 8], &[[u8; 64]]);
/// The compression function of the `sha2` crate.
pub const SHA256_SOFTWARE: Sha256Blocks = sha2::block_api::compress256;

/// SHA-256 over a chosen compression function.
///
/// Spec: \[FIPS180\] "SHA-256".
#[derive(Clone)]
struct Sha256 {
    blocks: Sha256Blocks,
    state: [u32; 8],
    partial: [u8; 64],
    // Bytes so far; its low six bits say how much of `partial` is in use.
    length: u64,
}

impl Sha256 {
    fn new(blocks: Sha256Blocks) -> Self {
        let state = [
            0x6a09_e667,
            0xbb67_ae85,
            0x3c6e_f372,
            0xa54f_f53a, //
            0x510e_527f,
            0x9b05_688c,
            0x1f83_d9ab,
            0x5be0_cd19,
        ];
        Self { blocks, state, partial: [0; 64], length: 0 }
    }

    fn update(&mut self, mut data: &[u8]) {
        let used = (self.length % 64) as usize;
        self.length = self.length.wrapping_add(data.len() as u64);
        if used != 0 {
            let Some(space) = self.partial.get_mut(used..) else { return };
            let (now, later) = data.split_at(data.len().min(space.len()));
            let filled = now.len() == space.len();
            for (to, from) in space.iter_mut().zip(now) {
                *to = *from;
            }
            if !filled {
                return;
            }
            (self.blocks)(&mut self.state, core::slice::from_ref(&self.partial));
            data = later;
        }
        let (whole, rest) = data.as_chunks();
        if !whole.is_empty() {
            (self.blocks)(&mut self.state, whole);
        }
        for (to, from) in self.partial.iter_mut().zip(rest) {
            *to = *from;
        }
    }

    fn finish(mut self) -> [u8; 32] {
        let bits = self.length.wrapping_mul(8);
        let used = (self.length % 64) as usize;
        // 80h, zeros, and the length in bits so that it ends a block.
        let pad = if used < 56 { 56_usize } else { 120 }.saturating_sub(used);
        let mut padding = [0; 64];
        padding[0] = 0x80;
        self.update(padding.get(..pad).unwrap_or_default());
        self.update(&bits.to_be_bytes());
        let mut digest = [0; 32];
        for (to, word) in digest.as_chunks_mut().0.iter_mut().zip(self.state) {
            *to = word.to_be_bytes();
        }
        digest
    }
}

/// Hashes one stream for all active banks; only active ones cost time.
#[derive(Clone)]
pub struct BankHasher {
    banks: Banks,
    sha1: Option<Sha1>,
    sha256: Option<Sha256>,
    sha384: Option<Sha384>,
    sha512: Option<Sha512>,
}

impl BankHasher {
    /// For `banks`, with SHA-256 in software.
    pub fn new(banks: &Banks) -> Self {
        Self::with_sha256(banks, SHA256_SOFTWARE)
    }

    /// For `banks`, with a SHA-256 compression function of the caller's.
    pub fn with_sha256(banks: &Banks, blocks: Sha256Blocks) -> Self {
        let active = |alg| banks.iter().any(|bank| bank.alg == alg);
        Self {
            sha1: active(HashAlg::SHA1).then(Sha1::new),
            sha256: active(HashAlg::SHA256).then(|| Sha256::new(blocks)),
            sha384: active(HashAlg::SHA384).then(Sha384::new),
            sha512: active(HashAlg::SHA512).then(Sha512::new),
            banks: banks.clone(),
        }
    }

    /// Takes the next bytes.
    pub fn update(&mut self, data: &[u8]) {
        if let Some(hash) = &mut self.sha1 {
            hash.update(data);
        }
        if let Some(hash) = &mut self.sha256 {
            hash.update(data);
        }
        if let Some(hash) = &mut self.sha384 {
            hash.update(data);
        }
        if let Some(hash) = &mut self.sha512 {
            hash.update(data);
        }
    }

    /// The digests; a bank whose algorithm this crate cannot compute gets [`Digest::cap`].
    pub fn finish(self) -> Digests {
        let mut digests = Digests(self.banks.iter().copied().map(Digest::cap).collect());
        let mut set = |alg, bytes: &[u8]| {
            if let (Some(to), Some(digest)) =
                (digests.0.iter_mut().find(|d| d.alg() == alg), Digest::new(alg, bytes))
            {
                *to = digest;
            }
        };
        if let Some(hash) = self.sha1 {
            set(HashAlg::SHA1, &hash.finalize());
        }
        if let Some(hash) = self.sha256 {
            set(HashAlg::SHA256, &hash.finish());
        }
        if let Some(hash) = self.sha384 {
            set(HashAlg::SHA384, &hash.finalize());
        }
        if let Some(hash) = self.sha512 {
            set(HashAlg::SHA512, &hash.finalize());
        }
        digests
    }
}

/// The digest of `parts`, one after the other; none for an algorithm that this crate cannot compute.
pub fn digest_of(alg: HashAlg, parts: &[&[u8]]) -> Option<Digest> {
    let banks = [Bank::computed(alg)?].into_iter().collect();
    let mut hasher = BankHasher::new(&banks);
    for part in parts {
        hasher.update(part);
    }
    hasher.finish().get(alg).copied()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn hex_of(alg: HashAlg, data: &[u8]) -> String {
        digest_of(alg, &[data]).unwrap().to_string()
    }

    // [FIPS180] example "abc", typed from the standard's example values.
    #[test]
    fn the_standards_examples() {
        assert_eq!(hex_of(HashAlg::SHA1, b"abc"), "a9993e364706816aba3e25717850c26c9cd0d89d");
        assert_eq!(
            hex_of(HashAlg::SHA256, b"abc"),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
        assert_eq!(
            hex_of(HashAlg::SHA384, b"abc"),
            "cb00753f45a35e8bb5a03d699ac65007272c32ab0eded1631a8b605a43ff5bed\
             8086072ba1e7cc2358baeca134c825a7"
        );
        assert_eq!(
            hex_of(HashAlg::SHA512, b"abc"),
            "ddaf35a193617abacc417349ae20413112e6fa4e89a97ea20a9eeee64b55d39a\
             2192992a274fc1a836ba3c23a3feebbd454d4423643ce80e2a9ac94fa54ca49f"
        );
        assert_eq!(
            hex_of(HashAlg::SHA256, b""),
            "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
        );
    }

    #[test]
    fn an_unknown_bank_is_capped_and_the_rest_hashed() {
        let banks: Banks = [Bank { alg: HashAlg(0x12), size: 32 }, Bank { alg: HashAlg::SHA1, size: 20 }]
            .into_iter()
            .collect();
        let digests = BankHasher::new(&banks).finish();
        assert!(digests.are_of(&banks));
        assert_eq!(digests.get(HashAlg(0x12)), Some(&Digest::cap(banks[0])));
        assert_eq!(
            digests.get(HashAlg::SHA1).unwrap().to_string(),
            "da39a3ee5e6b4b0d3255bfef95601890afd80709"
        );
    }

    proptest! {
        // Our own block and padding logic against the crate's, for every split of a stream.
        #[test]
        fn sha256_agrees_with_the_crate(chunks in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..150), 0..8)) {
            let mut ours = Sha256::new(SHA256_SOFTWARE);
            let mut theirs = sha2::Sha256::new();
            for chunk in &chunks {
                ours.update(chunk);
                theirs.update(chunk);
            }
            prop_assert_eq!(ours.finish().as_slice(), theirs.finalize().as_slice());
        }
    }
}
