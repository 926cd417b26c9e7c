//! The digest of the guest's memory, taken before firmware runs unconfined and compared by the launch afterwards.
//!
//! Memory is taken by chunks, so that the one that differs can be named. A page that is zero, as much of a guest's memory
//! is, costs a look and no hashing. Chunk digest = SHA-256 over
//! 1. the bytes of the pages that are not all zero, in order,
//! 2. a bit for each page of the chunk, bit 0 of the first byte for the first page: set where the page is among those, 64 bytes,
//! 3. the chunk's address and its length, 8 bytes each, little-endian.
//!
//! What is of fixed size comes last, so no two contents give the same bytes to hash.

use hv::addr::{PAGE_SIZE, PhysRange};
use hv::io::PhysMem;
use tpm::{Bank, BankHasher, HashAlg, Sha256Blocks};

/// Bytes of a chunk; the last one of a range may be shorter.
pub const CHUNK_SIZE: u64 = 2 << 20;
const PAGES: usize = (CHUNK_SIZE / PAGE_SIZE) as usize;

/// A SHA-256 digest.
pub type Sha256 = [u8; 32];

/// Why memory has no digest, or another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DigestError {
    /// There is no such memory.
    Unreadable(PhysRange),
    /// The first chunk that is not what it was.
    Differs(PhysRange),
    /// The list is for another number of chunks than the ranges have.
    Length {
        /// Digests in the list.
        list: usize,
        /// Chunks in the ranges.
        chunks: usize,
    },
}

impl core::fmt::Display for DigestError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::Unreadable(chunk) => write!(f, "cannot read the memory {chunk}"),
            Self::Differs(chunk) => write!(f, "the memory {chunk} is not what it was"),
            Self::Length { list, chunks } => write!(f, "{list} digests for {chunks} chunks of memory"),
        }
    }
}

/// The chunks of `ranges`, in order.
fn chunks<'a>(ranges: impl IntoIterator<Item = &'a PhysRange>) -> impl Iterator<Item = PhysRange> {
    ranges.into_iter().flat_map(|range| {
        let (start, last) = (range.start(), range.last());
        (start..=last).step_by(CHUNK_SIZE as usize).filter_map(move |at| {
            PhysRange::from_last(at, at.saturating_add(CHUNK_SIZE.saturating_sub(1)).min(last))
        })
    })
}

/// How many digests a list for `ranges` has.
pub fn count<'a>(ranges: impl IntoIterator<Item = &'a PhysRange>) -> usize {
    let chunks = |range: &PhysRange| range.len().div_ceil(CHUNK_SIZE) as usize;
    ranges.into_iter().map(chunks).fold(0, usize::saturating_add)
}

/// Writes the digests of the chunks of `ranges` to `list`, [`count`] of them.
///
/// # Errors
/// [`DigestError::Unreadable`], [`DigestError::Length`].
pub fn take(
    ranges: &[PhysRange],
    mem: &impl PhysMem,
    sha256: Sha256Blocks,
    list: &mut [Sha256],
) -> Result<(), DigestError> {
    check_length(ranges, list)?;
    for (digest, chunk) in list.iter_mut().zip(chunks(ranges)) {
        *digest = chunk_digest(chunk, mem, sha256)?;
    }
    Ok(())
}

/// Compares the memory of `ranges` with a `list` that [`take`] made, and that nobody changed since: see [`root`].
///
/// # Errors
/// [`DigestError::Differs`] with the first chunk that differs, [`DigestError::Unreadable`], [`DigestError::Length`].
pub fn verify(
    ranges: &[PhysRange],
    mem: &impl PhysMem,
    sha256: Sha256Blocks,
    list: &[Sha256],
) -> Result<(), DigestError> {
    check_length(ranges, list)?;
    for (digest, chunk) in list.iter().zip(chunks(ranges)) {
        if chunk_digest(chunk, mem, sha256)? != *digest {
            return Err(DigestError::Differs(chunk));
        }
    }
    Ok(())
}

/// One digest of several parts: SHA-256 over each part's length (8 bytes, little-endian) and bytes. Other parts, or the same
/// bytes parted otherwise, have another.
pub fn root(parts: &[&[u8]], sha256: Sha256Blocks) -> Sha256 {
    let mut hasher = hasher(sha256);
    for part in parts {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part);
    }
    finish(hasher)
}

fn check_length(ranges: &[PhysRange], list: &[Sha256]) -> Result<(), DigestError> {
    let (list, chunks) = (list.len(), count(ranges));
    if list == chunks { Ok(()) } else { Err(DigestError::Length { list, chunks }) }
}

fn chunk_digest(chunk: PhysRange, mem: &impl PhysMem, sha256: Sha256Blocks) -> Result<Sha256, DigestError> {
    let mut hasher = hasher(sha256);
    let mut hashed = [0_u8; PAGES / 8];
    let mut page = [0; PAGE_SIZE as usize];
    let pages = (chunk.start()..=chunk.last()).step_by(PAGE_SIZE as usize);
    for (index, at) in pages.enumerate() {
        let left = chunk.last().saturating_sub(at).saturating_add(1).min(PAGE_SIZE);
        let page = page.get_mut(..left as usize).unwrap_or_default();
        if !mem.read(at, page) {
            return Err(DigestError::Unreadable(chunk));
        }
        if is_zero(page) {
            continue;
        }
        hasher.update(page);
        if let Some(bits) = hashed.get_mut(index >> 3) {
            *bits |= 1 << (index & 7);
        }
    }
    hasher.update(&hashed);
    hasher.update(&chunk.start().to_le_bytes());
    hasher.update(&chunk.len().to_le_bytes());
    Ok(finish(hasher))
}

fn is_zero(page: &[u8]) -> bool {
    let (words, rest) = page.as_chunks();
    words.iter().all(|word| u64::from_ne_bytes(*word) == 0) && rest.iter().all(|byte| *byte == 0)
}

fn hasher(sha256: Sha256Blocks) -> BankHasher {
    let bank = Bank { alg: HashAlg::SHA256, size: size_of::<Sha256>() as u8 };
    BankHasher::with_sha256(&[bank].into_iter().collect(), sha256)
}

fn finish(hasher: BankHasher) -> Sha256 {
    let digests = hasher.finish();
    let digest = digests.get(HashAlg::SHA256).map(tpm::Digest::as_bytes);
    // The hasher is for SHA-256, so there always is a digest of 32 bytes.
    digest.and_then(|digest| digest.try_into().ok()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::Ram;
    use proptest::prelude::*;
    use sha2::Digest as _;
    use tpm::SHA256_SOFTWARE;

    fn range(start: u64, len: u64) -> PhysRange {
        PhysRange::new(start, len).unwrap()
    }

    fn list(ranges: &[PhysRange], mem: &Ram) -> Vec<Sha256> {
        let mut list = vec![[0xee; 32]; count(ranges)];
        take(ranges, mem, SHA256_SOFTWARE, &mut list).unwrap();
        list
    }

    fn check(ranges: &[PhysRange], mem: &Ram, list: &[Sha256]) -> Result<(), DigestError> {
        verify(ranges, mem, SHA256_SOFTWARE, list)
    }

    /// One range of two chunks and a bit, one of less than a page, with zero pages and others.
    fn memory() -> (Ram, [PhysRange; 2]) {
        let mem = Ram::new(6 << 20);
        for page in (0..6 << 20).step_by(0x1_f000) {
            mem.set(page + 8 * (page / 0x1_f000), !page);
        }
        (mem, [range(0x5000, 2 * CHUNK_SIZE + 0x2345), range(0x50_0000, 0x123)])
    }

    /// The format, written a second time.
    #[test]
    fn a_chunk_digest_is_as_described() {
        let mem = Ram::new(0x10_000);
        mem.set(0x2ff8, 0x1122_3344_5566_7788);
        mem.set(0x9000, 1);
        let digest = list(&[range(0x1000, 0x9003)], &mem);
        let mut hasher = sha2::Sha256::new();
        hasher.update([0; 0xff8]);
        hasher.update(0x1122_3344_5566_7788_u64.to_le_bytes());
        hasher.update([1]);
        hasher.update([0; 0xfff]);
        hasher.update([2, 1]);
        hasher.update([0; 62]);
        hasher.update(0x1000_u64.to_le_bytes());
        hasher.update(0x9003_u64.to_le_bytes());
        let expected: Sha256 = hasher.finalize().into();
        assert_eq!(digest, [expected]);
    }

    #[test]
    fn every_range_is_covered_by_chunks_of_its_own() {
        let (_, ranges) = memory();
        assert_eq!(count(&ranges), 4);
        let covered: Vec<_> = chunks(&ranges).map(|chunk| (chunk.start(), chunk.len())).collect();
        let end = 0x5000 + 2 * CHUNK_SIZE;
        assert_eq!(
            covered,
            [(0x5000, CHUNK_SIZE), (0x5000 + CHUNK_SIZE, CHUNK_SIZE), (end, 0x2345), (0x50_0000, 0x123)]
        );
        // Up to the last address there is.
        let top = [range(u64::MAX - CHUNK_SIZE, CHUNK_SIZE + 1)];
        assert_eq!((count(&top), chunks(&top).count()), (2, 2));
        assert_eq!(count(&[]), 0);
    }

    #[test]
    fn memory_that_is_not_there_and_lists_of_another_length_are_named() {
        let (mem, ranges) = memory();
        let mut list = list(&ranges, &mem);
        let outside = [range(0x5f_f000, 0x2000)];
        let unreadable = Err(DigestError::Unreadable(outside[0]));
        assert_eq!(take(&outside, &mem, SHA256_SOFTWARE, &mut [[0; 32]]), unreadable);
        assert_eq!(check(&outside, &mem, &[[0; 32]]), unreadable);
        assert_eq!(check(&ranges, &mem, &list[..3]), Err(DigestError::Length { list: 3, chunks: 4 }));
        list.push([0; 32]);
        assert_eq!(check(&ranges, &mem, &list), Err(DigestError::Length { list: 5, chunks: 4 }));
    }

    #[test]
    fn parts_cannot_be_parted_otherwise() {
        let of = |parts: &[&[u8]]| root(parts, SHA256_SOFTWARE);
        let all =
            [of(&[]), of(&[b""]), of(&[b"ab"]), of(&[b"a", b"b"]), of(&[b"", b"ab"]), of(&[b"b", b"a"])];
        for (index, one) in all.iter().enumerate() {
            assert!(!all[..index].contains(one), "{index}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        #[test]
        fn any_bit_that_changes_is_found_in_its_chunk(at in 0x4000_u64..0x51_0000, bit in 0_u32..8) {
            let (mem, ranges) = memory();
            let list = list(&ranges, &mem);
            prop_assert_eq!(check(&ranges, &mem, &list), Ok(()));
            let mut byte = [0];
            mem.read(at, &mut byte);
            mem.write(at, &[byte[0] ^ 1_u8 << bit]);
            let chunk = chunks(&ranges).find(|chunk| chunk.contains_addr(at));
            // What is outside of all ranges is nobody's concern.
            prop_assert_eq!(check(&ranges, &mem, &list).err(), chunk.map(DigestError::Differs));
            mem.write(at, &byte);
            prop_assert_eq!(check(&ranges, &mem, &list), Ok(()));
        }

        #[test]
        fn pages_that_change_places_are_found(a in 0_u64..16, b in 0_u64..16) {
            // Some are zero, the others all different.
            let mem = Ram::new(16 << 12);
            (0..16).filter(|page| page % 3 != 0).for_each(|page| mem.set(page << 12, page));
            let all = [range(0, 16 << 12)];
            let list = list(&all, &mem);
            let (mut first, mut second) = ([0; 8], [0; 8]);
            mem.read(a << 12, &mut first);
            mem.read(b << 12, &mut second);
            mem.write(a << 12, &second);
            mem.write(b << 12, &first);
            prop_assert_eq!(check(&all, &mem, &list).is_ok(), first == second);
        }

        #[test]
        fn any_bit_of_a_list_counts(chunk in 0_usize..4, byte in 0_usize..32, bit in 0_u32..8) {
            let (mem, ranges) = memory();
            let mut list = list(&ranges, &mem);
            let before = root(&[b"header", list.as_flattened()], SHA256_SOFTWARE);
            list[chunk][byte] ^= 1_u8 << bit;
            prop_assert!(check(&ranges, &mem, &list).is_err());
            prop_assert_ne!(root(&[b"header", list.as_flattened()], SHA256_SOFTWARE), before);
        }
    }
}
