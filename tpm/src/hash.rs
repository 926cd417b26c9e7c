//! Hashing one stream for several banks at once.
//!
//! Blocks and padding are done here, once for all algorithms: the `sha2` crate's own wrappers do them once for each and have no
//! place for the SHA instructions of the CPU. Its compression function of SHA-384 and SHA-512 is used; that of SHA-256 is the
//! crate `sha256`'s. SHA-1 is ours: that of the `sha1` crate takes a ninth of an SLB. Tests compare all of it with both crates.

use heapless::Vec;
use sha2::block_api::compress512;
use sha256::Sha256Blocks;

use crate::bank::{Bank, Banks, Digest, Digests, HashAlg, MAX_BANKS, MAX_DIGEST};

/// Longest block, bytes.
const MAX_BLOCK: usize = 128;

/// An algorithm's chaining value.
trait Chain {
    /// Bytes of a block; the length that ends the last one takes an eighth of it.
    fn block(&self) -> usize;

    /// Takes whole blocks; what is left of `data` after the last one is ignored.
    fn compress(&mut self, data: &[u8]);

    /// The chaining value, big-endian.
    fn bytes(&self) -> [u8; MAX_DIGEST];
}

/// SHA-256's chaining value, and the compression function in use.
#[derive(Clone)]
struct Sha256State([u32; 8], Sha256Blocks);

impl Sha256State {
    /// Spec: \[FIPS180\] "Setting the Initial Hash Value".
    #[rustfmt::skip]
    const fn new(blocks: Sha256Blocks) -> Self {
        Self(
            [
                0x6a09_e667, 0xbb67_ae85, 0x3c6e_f372, 0xa54f_f53a, 0x510e_527f, 0x9b05_688c, 0x1f83_d9ab, 0x5be0_cd19,
            ],
            blocks,
        )
    }
}

impl Chain for Sha256State {
    fn block(&self) -> usize {
        64
    }

    fn compress(&mut self, data: &[u8]) {
        self.1(&mut self.0, data.as_chunks().0);
    }

    fn bytes(&self) -> [u8; MAX_DIGEST] {
        big_endian(&self.0)
    }
}

/// The chaining value of whatever algorithm.
#[derive(Clone)]
enum State {
    Sha1([u32; 5]),
    Sha256(Sha256State),
    /// SHA-384 too: it starts elsewhere and is cut at the end.
    Sha512([u64; 8]),
}

impl State {
    /// Spec: \[FIPS180\] "Setting the Initial Hash Value".
    fn new(alg: HashAlg, sha256: Sha256Blocks) -> Option<Self> {
        Some(match alg {
            HashAlg::SHA1 => Self::Sha1([0x6745_2301, 0xefcd_ab89, 0x98ba_dcfe, 0x1032_5476, 0xc3d2_e1f0]),
            HashAlg::SHA256 => Self::Sha256(Sha256State::new(sha256)),
            HashAlg::SHA384 => Self::Sha512([
                0xcbbb_9d5d_c105_9ed8,
                0x629a_292a_367c_d507,
                0x9159_015a_3070_dd17,
                0x152f_ecd8_f70e_5939,
                0x6733_2667_ffc0_0b31,
                0x8eb4_4a87_6858_1511,
                0xdb0c_2e0d_64f9_8fa7,
                0x47b5_481d_befa_4fa4,
            ]),
            HashAlg::SHA512 => Self::Sha512([
                0x6a09_e667_f3bc_c908,
                0xbb67_ae85_84ca_a73b,
                0x3c6e_f372_fe94_f82b,
                0xa54f_f53a_5f1d_36f1,
                0x510e_527f_ade6_82d1,
                0x9b05_688c_2b3e_6c1f,
                0x1f83_d9ab_fb41_bd6b,
                0x5be0_cd19_137e_2179,
            ]),
            _ => return None,
        })
    }
}

impl Chain for State {
    fn block(&self) -> usize {
        if matches!(self, Self::Sha512(_)) { 128 } else { 64 }
    }

    fn compress(&mut self, data: &[u8]) {
        match self {
            Self::Sha1(state) => data.as_chunks().0.iter().for_each(|block| compress_sha1(state, block)),
            Self::Sha256(state) => state.compress(data),
            Self::Sha512(state) => compress512(state, data.as_chunks().0),
        }
    }

    fn bytes(&self) -> [u8; MAX_DIGEST] {
        match self {
            Self::Sha1(state) => big_endian(state),
            Self::Sha256(state) => state.bytes(),
            Self::Sha512(state) => {
                let mut bytes = [0; MAX_DIGEST];
                for (to, word) in bytes.as_chunks_mut().0.iter_mut().zip(state) {
                    *to = word.to_be_bytes();
                }
                bytes
            }
        }
    }
}

/// The words of a chaining value as bytes.
fn big_endian(words: &[u32]) -> [u8; MAX_DIGEST] {
    let mut bytes = [0; MAX_DIGEST];
    for (to, word) in bytes.as_chunks_mut().0.iter_mut().zip(words) {
        *to = word.to_be_bytes();
    }
    bytes
}

/// Spec: \[FIPS180\] "SHA-1 Hash Computation", the method that keeps sixteen words.
fn compress_sha1(state: &mut [u32; 5], block: &[u8; 64]) {
    let mut w = [0; 16];
    for (word, bytes) in w.iter_mut().zip(block.as_chunks().0) {
        *word = u32::from_be_bytes(*bytes);
    }
    let [mut a, mut b, mut c, mut d, mut e] = *state;
    for t in 0..80_u32 {
        let (f, k) = match t {
            0..20 => (b & c | !b & d, 0x5a82_7999),
            20..40 => (b ^ c ^ d, 0x6ed9_eba1),
            40..60 => (b & c | b & d | c & d, 0x8f1b_bcdc),
            _ => (b ^ c ^ d, 0xca62_c1d6_u32),
        };
        // The word for this round is always the first; the one for sixteen rounds later replaces it.
        let [word, _, w2, _, _, _, _, _, w8, _, _, _, _, w13, _, _] = w;
        w.rotate_left(1);
        w[15] = (w13 ^ w8 ^ w2 ^ word).rotate_left(1);
        let next = a.rotate_left(5).wrapping_add(f).wrapping_add(e).wrapping_add(k).wrapping_add(word);
        (e, d, c, b, a) = (d, c, b.rotate_left(30), a, next);
    }
    for (to, word) in state.iter_mut().zip([a, b, c, d, e]) {
        *to = to.wrapping_add(word);
    }
}

/// A hash in progress.
#[derive(Clone)]
struct Stream<S: ?Sized> {
    partial: [u8; MAX_BLOCK],
    // Bytes so far: modulo the block size it says how much of `partial` is in use.
    length: u64,
    state: S,
}

impl<S> Stream<S> {
    const fn new(state: S) -> Self {
        Self { partial: [0; MAX_BLOCK], length: 0, state }
    }
}

/// An image has this once, whatever it hashes.
impl Stream<dyn Chain> {
    fn used(&self) -> usize {
        // Both block sizes are powers of two.
        self.length as usize & self.state.block().saturating_sub(1)
    }

    fn update(&mut self, mut data: &[u8]) {
        let (used, block) = (self.used(), self.state.block());
        self.length = self.length.wrapping_add(data.len() as u64);
        if used != 0 {
            let space = self.partial.get_mut(used..block).unwrap_or_default();
            let (now, later) = data.split_at(data.len().min(space.len()));
            copy(space, now);
            if now.len() < block.saturating_sub(used) {
                return;
            }
            self.state.compress(self.partial.get(..block).unwrap_or_default());
            data = later;
        }
        let (whole, rest) = data.split_at(data.len() & !block.saturating_sub(1));
        self.state.compress(whole);
        copy(&mut self.partial, rest);
    }

    /// Spec: \[FIPS180\] "Padding the Message".
    fn finish(&mut self) -> [u8; MAX_DIGEST] {
        let (used, block) = (self.used(), self.state.block());
        let bits = (u128::from(self.length) << 3).to_be_bytes();
        // 80h, zeros, and the length in bits so that it ends a block.
        let length_size = block >> 3;
        let end = if used < block.saturating_sub(length_size) { block } else { block << 1 };
        let mut padding = [0; MAX_BLOCK];
        padding[0] = 0x80;
        let zeros = end.saturating_sub(length_size).saturating_sub(used);
        self.update(padding.get(..zeros).unwrap_or_default());
        self.update(bits.get(bits.len().saturating_sub(length_size)..).unwrap_or_default());
        self.state.bytes()
    }
}

/// Copies as much of `from` as fits.
fn copy(to: &mut [u8], from: &[u8]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to = *from;
    }
}

/// Hashes one stream by SHA-256 alone.
pub struct Sha256(Stream<Sha256State>);

impl Sha256 {
    /// With the compression function `blocks`.
    pub const fn new(blocks: Sha256Blocks) -> Self {
        Self(Stream::new(Sha256State::new(blocks)))
    }

    /// Takes the next bytes.
    pub fn update(&mut self, data: &[u8]) {
        let stream: &mut Stream<dyn Chain> = &mut self.0;
        stream.update(data);
    }

    /// The digest.
    pub fn finish(mut self) -> [u8; 32] {
        let stream: &mut Stream<dyn Chain> = &mut self.0;
        stream.finish().first_chunk().copied().unwrap_or_default()
    }

    /// The digest of `parts`, one after the other.
    pub fn digest(blocks: Sha256Blocks, parts: &[&[u8]]) -> [u8; 32] {
        let mut hasher = Self::new(blocks);
        parts.iter().for_each(|part| hasher.update(part));
        hasher.finish()
    }
}

/// Hashes one stream for all active banks; only active ones cost time.
#[derive(Clone)]
pub struct BankHasher(Vec<(Bank, Option<Stream<State>>), MAX_BANKS>);

impl BankHasher {
    /// For `banks`, with SHA-256 in software.
    pub fn new(banks: &Banks) -> Self {
        Self::with_sha256(banks, sha256::software)
    }

    /// For `banks`, with a SHA-256 compression function of the caller's.
    pub fn with_sha256(banks: &Banks, sha256: Sha256Blocks) -> Self {
        Self(banks.iter().map(|bank| (*bank, State::new(bank.alg, sha256).map(Stream::new))).collect())
    }

    /// Takes the next bytes.
    pub fn update(&mut self, data: &[u8]) {
        for stream in self.0.iter_mut().filter_map(|(_, stream)| stream.as_mut()) {
            let stream: &mut Stream<dyn Chain> = stream;
            stream.update(data);
        }
    }

    /// The digests; a bank whose algorithm this crate cannot compute gets [`Digest::cap`].
    pub fn finish(mut self) -> Digests {
        let mut digests = Digests::default();
        for (bank, stream) in &mut self.0 {
            let bytes = stream.as_mut().map(|stream| (stream as &mut Stream<dyn Chain>).finish());
            let digest = bytes.and_then(|bytes| Digest::new(bank.alg, bytes.get(..bank.size.into())?));
            let _ = digests.0.push(digest.unwrap_or_else(|| Digest::cap(*bank)));
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

    /// Ours against the crates' own hashers, fed with the same chunks.
    fn compare<D: sha2::Digest>(alg: HashAlg, chunks: &[std::vec::Vec<u8>]) -> Result<(), TestCaseError> {
        let banks = [Bank::computed(alg).unwrap()].into_iter().collect();
        let (mut ours, mut theirs) = (BankHasher::new(&banks), D::new());
        for chunk in chunks {
            ours.update(chunk);
            theirs.update(chunk);
        }
        let ours = ours.finish();
        prop_assert_eq!(ours.get(alg).unwrap().as_bytes(), &theirs.finalize()[..]);
        Ok(())
    }

    proptest! {
        #[test]
        fn blocks_and_padding_agree_with_the_crates(
            chunks in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..300), 0..8)
        ) {
            compare::<sha1::Sha1>(HashAlg::SHA1, &chunks)?;
            compare::<sha2::Sha256>(HashAlg::SHA256, &chunks)?;
            let parts: std::vec::Vec<_> = chunks.iter().map(|chunk| &chunk[..]).collect();
            let wanted: [u8; 32] = <sha2::Sha256 as sha2::Digest>::digest(chunks.concat()).into();
            prop_assert_eq!(Sha256::digest(sha256::software, &parts), wanted);
            compare::<sha2::Sha384>(HashAlg::SHA384, &chunks)?;
            compare::<sha2::Sha512>(HashAlg::SHA512, &chunks)?;
        }
    }
}
