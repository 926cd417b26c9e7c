//! Digests of memory: a list of chunks, and one root over the list and the header.

use hv::addr::{PAGE_SIZE, PhysRange};
use hv::io::PhysMem;
use sha256::Sha256Blocks;
use tpm::Sha256;
use zerocopy::IntoBytes;

use super::{Block, CHUNKS_MAX, Error, Header, at};

pub type Digest = [u8; 32];
/// Bytes of a chunk.
const CHUNK: u64 = 2 << 20;
const PAGES: usize = (CHUNK / PAGE_SIZE) as usize;

/// SHA-256 by the CPU's own instructions, where it has them.
#[derive(Clone, Copy)]
pub struct Hash {
    blocks: Sha256Blocks,
}

impl Hash {
    pub fn new(blocks: Option<Sha256Blocks>) -> Self {
        Self { blocks: blocks.unwrap_or(sha256::software) }
    }

    /// The digest of a chunk: which of its pages are all zeros, a bit each, then the bytes of the others. Guests have much memory
    /// that they never used, and to find zeros is many times faster than to hash them.
    fn chunk(self, range: &PhysRange, mem: &impl PhysMem) -> Result<Digest, Error> {
        let mut zeros = [0u64; PAGES / 64];
        let mut page = [0; PAGE_SIZE as usize];
        let mut hasher = Sha256::new(self.blocks);
        let pages = (range.start()..=range.last()).step_by(PAGE_SIZE as usize);
        for (index, address) in pages.enumerate() {
            if mem.is_zero_page(address).ok_or(Error::Unreadable { address })? {
                if let Some(word) = zeros.get_mut(index >> 6) {
                    *word |= 1 << (index & 63);
                }
            } else {
                mem.read(address, &mut page);
                hasher.update(&page);
            }
        }
        hasher.update(zeros.as_bytes());
        Ok(hasher.finish())
    }

    /// Makes the digests of all memory of `header` and writes them into the block.
    pub fn write(self, header: &Header, block: &Block, mem: &impl PhysMem) -> Result<(), Error> {
        for (index, chunk) in chunks(header, block).enumerate() {
            let address = digest_at(block, index)?;
            if !mem.write(address, &self.chunk(&chunk, mem)?) {
                return Err(Error::Unreadable { address });
            }
        }
        Ok(())
    }

    /// The root: over the header and the digests in the block.
    pub fn root(self, header: &Header, block: &Block, mem: &impl PhysMem) -> Result<Digest, Error> {
        let mut hasher = Sha256::new(self.blocks);
        hasher.update(header.as_bytes());
        for (index, _) in chunks(header, block).enumerate() {
            hasher.update(&read(block, index, mem)?);
        }
        Ok(hasher.finish())
    }

    /// Compares all memory of `header` with the digests in the block.
    pub fn verify(self, header: &Header, block: &Block, mem: &impl PhysMem) -> Result<(), Error> {
        for (index, range) in chunks(header, block).enumerate() {
            if self.chunk(&range, mem)? != read(block, index, mem)? {
                return Err(Error::Changed { range });
            }
        }
        Ok(())
    }
}

fn digest_at(block: &Block, index: usize) -> Result<u64, Error> {
    let offset = (index as u64).saturating_mul(size_of::<Digest>() as u64);
    if index < CHUNKS_MAX { Ok(block.at(at::DIGESTS.saturating_add(offset))) } else { Err(Error::TooMuch) }
}

fn read(block: &Block, index: usize, mem: &impl PhysMem) -> Result<Digest, Error> {
    let mut digest = Digest::default();
    let address = digest_at(block, index)?;
    if mem.read(address, &mut digest) { Ok(digest) } else { Err(Error::Unreadable { address }) }
}

/// The pieces of a header, cut at multiples of a chunk's size. Pieces are of whole pages.
fn chunks(header: &Header, block: &Block) -> impl Iterator<Item = PhysRange> + use<> {
    header.pieces(block).flat_map(|piece| {
        let mut next = Some(piece.start());
        core::iter::from_fn(move || {
            let start = next.filter(|at| *at <= piece.last())?;
            let last = (start | CHUNK.wrapping_sub(1)).min(piece.last());
            next = last.checked_add(1);
            PhysRange::from_last(start, last)
        })
    })
}
