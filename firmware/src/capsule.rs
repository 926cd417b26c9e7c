//! Arguments of UpdateCapsule and QueryCapsuleCapabilities: the guest's capsules, copied into memory that the
//! sandbox has, with a new list of their blocks. Firmware never gets a pointer to the guest's pages.
//!
//! The guest names a capsule twice: by a virtual pointer to its header, and by a list of physical blocks that
//! hold the capsules one after the other. The header's copy is what was checked, so it is what firmware sees, over
//! whatever the blocks hold in its place. Nothing that was checked is read again.
//!
//! Capsules that wait for a reset stay in the staging memory, which a warm reset leaves alone; firmware keeps the
//! address of the new list.
//!
//! Spec: \[UEFI\] "UpdateCapsule()", "QueryCapsuleCapabilities()", `EFI_CAPSULE_HEADER`,
//! `EFI_CAPSULE_BLOCK_DESCRIPTOR`.

use core::fmt;

use heapless::Vec;
use hv::addr::{PAGE_SIZE, PhysRange};
use hv::io::PhysMem;
use uefi_raw::{Guid, Status};
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::call::{Args, FirmwareCall, GuestMem};
use crate::service::{Service, Target};

/// Most capsules in a call.
pub const CAPSULES_MAX: usize = 16;
/// Most block descriptors of a call, those that only lead to others included.
pub const DESCRIPTORS_MAX: usize = 8192;
/// Least staging memory, in bytes.
pub const STAGING_MIN: u64 = 1 << 20;

/// CAPSULE_FLAGS_PERSIST_ACROSS_RESET.
const PERSIST: u32 = 1 << 16;
/// CAPSULE_FLAGS_POPULATE_SYSTEM_TABLE.
const POPULATE: u32 = 1 << 17;
/// CAPSULE_FLAGS_INITIATE_RESET.
const INITIATE_RESET: u32 = 1 << 18;

/// Where things lie in the staging memory: pointers to the capsules, results, block list, capsules.
const RESULTS_AT: u64 = 0x100;
const LIST_AT: u64 = 0x200;
const CAPSULES_AT: u64 = PAGE_SIZE;
/// Each capsule starts at a multiple of this.
const ALIGN: u64 = 16;
const _: () = assert!(CAPSULES_MAX * size_of::<U64>() <= RESULTS_AT as usize);
const _: () = assert!(LIST_AT as usize + (CAPSULES_MAX + 1) * size_of::<Block>() <= CAPSULES_AT as usize);

/// The guest's memory by guest-physical address.
pub trait GuestRam {
    /// Copies from RAM that is the guest's; false when any byte is not. `out` is unspecified then.
    fn read_ram(&self, gpa: u64, out: &mut [u8]) -> bool;
}

/// EFI_CAPSULE_HEADER.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Header {
    guid: [u8; 16],
    header_size: U32,
    flags: U32,
    image_size: U32,
}

const HEADER_LEN: u64 = size_of::<Header>() as u64;
const _: () = assert!(HEADER_LEN == 28);

/// EFI_CAPSULE_BLOCK_DESCRIPTOR. A length of zero leads to another list, or ends all with an address of zero.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Block {
    length: U64,
    address: U64,
}

/// A capsule's header as the guest gave it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capsule {
    /// What kind of capsule it is.
    pub guid: Guid,
    /// The flags.
    pub flags: u32,
    /// Bytes of the whole capsule.
    pub size: u32,
}

/// A call whose arguments lie in staging memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StagedCall {
    /// For the firmware.
    pub call: FirmwareCall,
    /// What the guest hands over.
    pub capsules: Vec<Capsule, CAPSULES_MAX>,
    /// The guest wants the machine reset at once if firmware takes the capsules. Firmware is not told so: it would
    /// try that itself, and the sandbox cannot.
    pub initiate_reset: bool,
}

/// A query whose arguments lie in staging memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StagedQuery {
    /// For the firmware.
    pub call: FirmwareCall,
    size_to: u64,
    reset_to: u64,
}

/// Why a call does not reach firmware, or its answer not the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CapsuleError {
    /// No capsule.
    None,
    /// More than [`CAPSULES_MAX`]; how many.
    TooMany(u64),
    /// A pointer of the guest that is NULL, or that does not lead to memory.
    Pointer {
        /// To what.
        to: &'static str,
        /// Its value.
        value: u64,
    },
    /// A size in a header that cannot be.
    Size {
        /// Which.
        field: &'static str,
        /// Its value.
        value: u32,
        /// Least value accepted.
        min: u32,
        /// Largest value accepted.
        max: u32,
    },
    /// Flags that only go together with others; the flags.
    Flags(u32),
    /// More bytes than staging memory has room for.
    TooLarge {
        /// Bytes of all capsules.
        size: u64,
        /// Bytes of room.
        room: u64,
    },
    /// A capsule is to wait for a reset, and there is no block list.
    NoList,
    /// A block descriptor that is not aligned, or not in the guest's RAM.
    Descriptor {
        /// Its address.
        at: u64,
    },
    /// A block that is not in the guest's RAM.
    Block {
        /// Its address.
        at: u64,
        /// Its length.
        length: u64,
    },
    /// More than [`DESCRIPTORS_MAX`] block descriptors.
    ListTooLong,
    /// The blocks hold fewer bytes than the capsules have by their headers; how many those are.
    ListShort(u64),
    /// The blocks hold more.
    ListLong(u64),
    /// Staging memory is too small, not whole pages, or cannot be accessed. Not the guest's fault.
    Staging(PhysRange),
    /// Firmware answered with a type of reset that does not exist.
    ResetType(u32),
}

impl CapsuleError {
    /// What the guest gets.
    pub fn status(&self) -> Status {
        match self {
            Self::TooMany(_) | Self::TooLarge { .. } => Status::OUT_OF_RESOURCES,
            Self::Staging(_) | Self::ResetType(_) => Status::DEVICE_ERROR,
            _ => Status::INVALID_PARAMETER,
        }
    }
}

impl fmt::Display for CapsuleError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("capsule: ")?;
        match *self {
            Self::None => f.write_str("none given"),
            Self::TooMany(count) => write!(f, "{count} given, limit {CAPSULES_MAX}"),
            Self::Pointer { to, value } => write!(f, "pointer to {to} {value:#x} leads nowhere"),
            Self::Size { field, value, min, max } => write!(f, "{field} {value}, limit {min} to {max}"),
            Self::Flags(flags) => write!(f, "flags {flags:#x} lack the one for a reset"),
            Self::TooLarge { size, room } => write!(f, "{size} bytes, room for {room}"),
            Self::NoList => f.write_str("to wait for a reset, without a block list"),
            Self::Descriptor { at } => write!(f, "no block descriptor at {at:#x}"),
            Self::Block { at, length } => {
                write!(f, "block of {length:#x} bytes at {at:#x} is not the guest's")
            }
            Self::ListTooLong => write!(f, "more than {DESCRIPTORS_MAX} block descriptors"),
            Self::ListShort(size) => write!(f, "blocks hold less than {size} bytes"),
            Self::ListLong(size) => write!(f, "blocks hold more than {size} bytes"),
            Self::Staging(range) => write!(f, "staging memory {range} is not usable"),
            Self::ResetType(raw) => write!(f, "firmware returned type of reset {raw}"),
        }
    }
}

/// Memory of the sandbox, mapped there one to one, that the MLE fills while the sandbox is stopped.
pub struct Staging<'a, M> {
    mem: &'a M,
    range: PhysRange,
}

impl<'a, M: PhysMem> Staging<'a, M> {
    /// `range`: whole pages, at least [`STAGING_MIN`].
    pub fn new(mem: &'a M, range: PhysRange) -> Result<Self, CapsuleError> {
        let good = range.len() >= STAGING_MIN && range.page_outward() == range;
        if good { Ok(Self { mem, range }) } else { Err(CapsuleError::Staging(range)) }
    }

    /// Most bytes of capsules.
    pub fn room(&self) -> u64 {
        self.range.len().saturating_sub(CAPSULES_AT)
    }

    fn at(&self, offset: u64) -> u64 {
        self.range.start().saturating_add(offset)
    }

    fn write(&self, at: u64, data: &[u8]) -> Result<(), CapsuleError> {
        let inside = PhysRange::new(at, data.len() as u64).is_some_and(|r| self.range.contains(&r));
        if inside && self.mem.write(at, data) { Ok(()) } else { Err(CapsuleError::Staging(self.range)) }
    }

    /// Fills `length` bytes at `at`, piece by piece: `source` gets how many bytes are done and the piece.
    fn fill(
        &self,
        at: u64,
        length: u64,
        mut source: impl FnMut(u64, &mut [u8]) -> Result<(), CapsuleError>,
    ) -> Result<(), CapsuleError> {
        let mut piece = [0; PAGE_SIZE as usize];
        let mut done = 0u64;
        while done < length {
            let take = length.saturating_sub(done).min(PAGE_SIZE);
            let piece = piece.get_mut(..take as usize).unwrap_or_default();
            source(done, piece)?;
            self.write(at.saturating_add(done), piece)?;
            done = done.saturating_add(take);
        }
        Ok(())
    }
}

/// A capsule and its place in staging memory.
#[derive(Clone, Copy)]
struct Placed {
    header: Header,
    /// The guest's pointer.
    from: u64,
    to: u64,
}

impl Placed {
    fn size(&self) -> u64 {
        self.header.image_size.get().into()
    }

    /// Writes the checked header, without the wish for a reset, and the pointer to it.
    fn finish(&self, index: u64, staging: &Staging<'_, impl PhysMem>) -> Result<(), CapsuleError> {
        let mut header = self.header;
        header.flags.set(header.flags.get() & !INITIATE_RESET);
        staging.write(self.to, header.as_bytes())?;
        let slot = staging.at(index.saturating_mul(size_of::<U64>() as u64));
        staging.write(slot, &self.to.to_le_bytes())
    }

    /// Copies `length` bytes of the guest's virtual memory behind the header; zeros up to the capsule's end.
    fn copy_virtual(
        &self,
        length: u64,
        mem: &impl GuestMem,
        staging: &Staging<'_, impl PhysMem>,
    ) -> Result<(), CapsuleError> {
        let from = self.from.wrapping_add(HEADER_LEN);
        let to = self.to.saturating_add(HEADER_LEN);
        let copied = length.saturating_sub(HEADER_LEN);
        staging
            .fill(to, copied, |done, piece| guest_read(mem, from.wrapping_add(done), piece, "a capsule"))?;
        staging.fill(to.saturating_add(copied), self.size().saturating_sub(length), |_, piece| {
            piece.fill(0);
            Ok(())
        })
    }
}

type PlacedAll = Vec<Placed, CAPSULES_MAX>;

fn guest_read(mem: &impl GuestMem, at: u64, out: &mut [u8], to: &'static str) -> Result<(), CapsuleError> {
    if at != 0 && mem.read(at, out) { Ok(()) } else { Err(CapsuleError::Pointer { to, value: at }) }
}

/// Reads and checks all headers and gives each capsule a place.
fn place(
    args: &Args,
    mem: &impl GuestMem,
    staging: &Staging<'_, impl PhysMem>,
) -> Result<PlacedAll, CapsuleError> {
    let count = usize::try_from(args.rdx).ok().filter(|c| *c <= CAPSULES_MAX);
    let count = count.ok_or(CapsuleError::TooMany(args.rdx))?;
    let mut pointers = [U64::ZERO; CAPSULES_MAX];
    let pointers = pointers.get_mut(..count).filter(|p| !p.is_empty()).ok_or(CapsuleError::None)?;
    guest_read(mem, args.rcx, pointers.as_mut_bytes(), "capsules")?;
    let mut placed = PlacedAll::new();
    let mut end = CAPSULES_AT;
    for pointer in pointers {
        let mut header = Header::new_zeroed();
        guest_read(mem, pointer.get(), header.as_mut_bytes(), "a capsule")?;
        check(&header)?;
        let one = Placed { header, from: pointer.get(), to: staging.at(end) };
        end = end.saturating_add(one.size().next_multiple_of(ALIGN));
        let _ = placed.push(one); // `count` fits
    }
    let size = end.saturating_sub(CAPSULES_AT);
    let room = staging.room();
    if size <= room { Ok(placed) } else { Err(CapsuleError::TooLarge { size, room }) }
}

fn check(header: &Header) -> Result<(), CapsuleError> {
    let (size, image) = (header.header_size.get(), header.image_size.get());
    let min = HEADER_LEN as u32;
    if image < min {
        return Err(CapsuleError::Size { field: "CapsuleImageSize", value: image, min, max: u32::MAX });
    }
    if !(min..=image).contains(&size) {
        return Err(CapsuleError::Size { field: "HeaderSize", value: size, min, max: image });
    }
    let flags = header.flags.get();
    if flags & (POPULATE | INITIATE_RESET) != 0 && flags & PERSIST == 0 {
        return Err(CapsuleError::Flags(flags));
    }
    Ok(())
}

/// Copies the capsules of an UpdateCapsule call: from the block list, where there is one, else by their pointers.
pub fn stage_update(
    args: &Args,
    mem: &impl GuestMem,
    ram: &impl GuestRam,
    staging: &Staging<'_, impl PhysMem>,
) -> Result<StagedCall, CapsuleError> {
    let placed = place(args, mem, staging)?;
    let any = |flag: u32| placed.iter().any(|p| p.header.flags.get() & flag != 0);
    let mut list = 0;
    if args.r8 != 0 {
        let mut blocks = Blocks { ram, next: args.r8, block: (0, 0), read: 0 };
        let size = placed.iter().fold(0u64, |sum, p| sum.saturating_add(p.size()));
        for one in &placed {
            staging.fill(one.to, one.size(), |_, piece| blocks.read(piece, size))?;
        }
        blocks.finish(size)?;
        list = staging.at(LIST_AT);
        write_list(&placed, list, staging)?;
    } else if any(PERSIST) {
        return Err(CapsuleError::NoList);
    } else {
        for one in &placed {
            one.copy_virtual(one.size(), mem, staging)?;
        }
    }
    for (index, one) in (0..).zip(&placed) {
        one.finish(index, staging)?;
    }
    let capsules = placed.iter().map(|p| Capsule {
        guid: Guid::from_bytes(p.header.guid),
        flags: p.header.flags.get(),
        size: p.header.image_size.get(),
    });
    Ok(StagedCall {
        call: FirmwareCall {
            target: Target::Service(Service::UpdateCapsule),
            rcx: staging.at(0),
            rdx: args.rdx,
            r8: list,
            r9: 0,
            fifth: 0,
        },
        capsules: capsules.collect(),
        initiate_reset: any(INITIATE_RESET),
    })
}

/// Copies the headers of a QueryCapsuleCapabilities call. Only headers are the guest's to give here; what firmware
/// may look at behind them is zeros.
pub fn stage_query(
    args: &Args,
    mem: &impl GuestMem,
    staging: &Staging<'_, impl PhysMem>,
) -> Result<StagedQuery, CapsuleError> {
    for (to, value) in [("MaximumCapsuleSize", args.r8), ("ResetType", args.r9)] {
        if value == 0 {
            return Err(CapsuleError::Pointer { to, value });
        }
    }
    let placed = place(args, mem, staging)?;
    for (index, one) in (0..).zip(&placed) {
        one.copy_virtual(one.header.header_size.get().into(), mem, staging)?;
        one.finish(index, staging)?;
    }
    let results = staging.at(RESULTS_AT);
    staging.write(results, &[0; 16])?;
    Ok(StagedQuery {
        call: FirmwareCall {
            target: Target::Service(Service::QueryCapsuleCapabilities),
            rcx: staging.at(0),
            rdx: args.rdx,
            r8: results,
            r9: results.saturating_add(8),
            fifth: 0,
        },
        size_to: args.r8,
        reset_to: args.r9,
    })
}

impl StagedQuery {
    /// Copies the answer of a query that firmware ended with success to the guest. The size is at most what there is
    /// room for here.
    pub fn finish(
        &self,
        mem: &impl GuestMem,
        staging: &Staging<'_, impl PhysMem>,
    ) -> Result<(), CapsuleError> {
        let mut answer = (U64::ZERO, U32::ZERO);
        let results = staging.at(RESULTS_AT);
        if !staging.mem.read(results, answer.0.as_mut_bytes())
            || !staging.mem.read(results.saturating_add(8), answer.1.as_mut_bytes())
        {
            return Err(CapsuleError::Staging(staging.range));
        }
        let (size, reset) = (answer.0.get().min(staging.room()), answer.1.get());
        if reset > 3 {
            return Err(CapsuleError::ResetType(reset));
        }
        for (to, at, data) in [
            ("MaximumCapsuleSize", self.size_to, &size.to_le_bytes()[..]),
            ("ResetType", self.reset_to, &reset.to_le_bytes()),
        ] {
            if !mem.write(at, data) {
                return Err(CapsuleError::Pointer { to, value: at });
            }
        }
        Ok(())
    }
}

/// One block for each capsule, and the end.
fn write_list(
    placed: &PlacedAll,
    mut at: u64,
    staging: &Staging<'_, impl PhysMem>,
) -> Result<(), CapsuleError> {
    let end = Block { length: U64::ZERO, address: U64::ZERO };
    let blocks = placed.iter().map(|p| Block { length: p.size().into(), address: p.to.into() });
    for block in blocks.chain([end]) {
        staging.write(at, block.as_bytes())?;
        at = at.saturating_add(size_of::<Block>() as u64);
    }
    Ok(())
}

/// The guest's block list, read as one stream.
struct Blocks<'a, R> {
    ram: &'a R,
    /// The next descriptor; 0 when the list has ended.
    next: u64,
    /// What is left of the present block: address and length.
    block: (u64, u64),
    /// Descriptors read.
    read: usize,
}

impl<R: GuestRam> Blocks<'_, R> {
    /// Fills `out`; `size` is what the whole list must hold.
    fn read(&mut self, mut out: &mut [u8], size: u64) -> Result<(), CapsuleError> {
        while !out.is_empty() {
            if !self.advance()? {
                return Err(CapsuleError::ListShort(size));
            }
            let (at, length) = self.block;
            let take = usize::try_from(length).unwrap_or(usize::MAX).min(out.len());
            let (piece, rest) = core::mem::take(&mut out).split_at_mut(take);
            if !self.ram.read_ram(at, piece) {
                return Err(CapsuleError::Block { at, length });
            }
            self.block = (at.saturating_add(take as u64), length.saturating_sub(take as u64));
            out = rest;
        }
        Ok(())
    }

    /// The list must have ended.
    fn finish(&mut self, size: u64) -> Result<(), CapsuleError> {
        if self.advance()? { Err(CapsuleError::ListLong(size)) } else { Ok(()) }
    }

    /// Goes to a block with something left; false at the end of the list.
    fn advance(&mut self) -> Result<bool, CapsuleError> {
        while self.block.1 == 0 {
            let at = self.next;
            if at == 0 {
                return Ok(false);
            }
            self.read = self.read.saturating_add(1);
            if self.read > DESCRIPTORS_MAX {
                return Err(CapsuleError::ListTooLong);
            }
            let mut descriptor = Block::new_zeroed();
            if !at.is_multiple_of(8) || !self.ram.read_ram(at, descriptor.as_mut_bytes()) {
                return Err(CapsuleError::Descriptor { at });
            }
            let (length, address) = (descriptor.length.get(), descriptor.address.get());
            if length == 0 {
                self.next = address;
                continue;
            }
            self.block = (address, length);
            self.next = at.saturating_add(size_of::<Block>() as u64);
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests;
