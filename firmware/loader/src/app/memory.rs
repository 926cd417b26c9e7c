//! Memory from the firmware, given back when a launch is refused.
//!
//! UNSAFETY: the firmware's allocator hands out addresses; here they become slices.
#![expect(unsafe_code, reason = "memory of the firmware's page allocator")]

use core::fmt;
use core::ptr::NonNull;

use hv::addr::PAGE_SIZE;
use hv::launch::Blob;
use uefi::Status;
use uefi::boot::{self, AllocateType, MemoryType};

/// The firmware has not got the memory.
#[derive(Debug)]
pub struct NoMemory {
    /// How much was asked for, bytes.
    size: u64,
    /// Below which address.
    limit: u64,
    /// The firmware's word on it.
    status: Status,
}

impl fmt::Display for NoMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { size, limit, status } = self;
        write!(f, "no {size} bytes of memory below {limit:#x}: {status:?}")
    }
}

/// Pages of our own, zeroed, mapped one to one.
pub struct Pages {
    start: NonNull<u8>,
    /// Pages.
    count: usize,
    /// Bytes that were asked for; the rest of the last page stays zero.
    len: usize,
}

impl Pages {
    /// `size` bytes, aligned to `align` (a power of two), that end at or below `limit`.
    pub fn new(kind: MemoryType, size: u64, align: u64, limit: u64) -> Result<Self, NoMemory> {
        let error = |status| NoMemory { size, limit, status };
        let too_much = || error(Status::OUT_OF_RESOURCES);
        let pages = |bytes: u64| usize::try_from(bytes.div_ceil(PAGE_SIZE)).ok();
        let (len, count) = usize::try_from(size).ok().zip(pages(size)).ok_or_else(too_much)?;
        // Room to align in; what is left over before and after goes back.
        let slack = pages(align.saturating_sub(PAGE_SIZE)).ok_or_else(too_much)?;
        let total = count.checked_add(slack).ok_or_else(too_much)?;
        let got = boot::allocate_pages(AllocateType::MaxAddress(limit.saturating_sub(1)), kind, total);
        let got = got.map_err(|e| error(e.status()))?;
        let before =
            got.as_ptr().align_offset(usize::try_from(align).unwrap_or(1)).div_ceil(PAGE_SIZE as usize);
        let before = before.min(slack);
        let start = page(got, before);
        let spare = [(got, before), (page(start, count), slack.saturating_sub(before))];
        for (first, pages) in spare.into_iter().filter(|(_, pages)| *pages > 0) {
            // SAFETY: part of the allocation just made, and outside what is kept. A firmware that can't split an
            // allocation keeps it: nothing is lost but the memory.
            let _ = unsafe { boot::free_pages(first, pages) };
        }
        // SAFETY: `count` pages from `start` are inside the allocation, which is ours alone.
        unsafe { start.write_bytes(0, count.saturating_mul(PAGE_SIZE as usize)) };
        Ok(Self { start, count, len })
    }

    /// Physical address.
    pub fn base(&self) -> u64 {
        self.start.as_ptr() as u64
    }

    /// Address and size, for the table.
    pub fn blob(&self) -> Blob {
        Blob { base: self.base().into(), size: (self.len as u64).into() }
    }

    /// The bytes asked for.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: `new`: `len` bytes from `start` are ours and initialised; the borrow of `self` keeps writers away.
        unsafe { core::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }

    /// The bytes asked for.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as for `bytes`, and the borrow is exclusive.
        unsafe { core::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }

    /// Copies `data` to `offset`; false, and nothing is written, when it does not fit.
    #[must_use]
    pub fn write(&mut self, offset: u64, data: &[u8]) -> bool {
        let to =
            usize::try_from(offset).ok().and_then(|at| self.bytes_mut().get_mut(at..)?.get_mut(..data.len()));
        to.map(|to| to.copy_from_slice(data)).is_some()
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this count, and no borrow of it is left. The firmware is still there: what
        // outlives it is given to `launch`, which never drops anything.
        let _ = unsafe { boot::free_pages(self.start, self.count) };
    }
}

/// The page `count` pages after `start`.
fn page(start: NonNull<u8>, count: usize) -> NonNull<u8> {
    // Addresses of an allocation below 4 GiB: neither wraps nor gets to zero.
    start.map_addr(|addr| addr.saturating_add(count.saturating_mul(PAGE_SIZE as usize)))
}
