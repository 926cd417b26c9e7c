//! Calls of handlers: parameters copied in and out, and the context that a handler gets.
//!
//! Of what the guest passes only the pointer to the parameters counts; NULL stands for the handler's own ACPI parameter buffer. That buffer
//! lies in firmware's memory, which the guest does not have: it finds pages of the MLE's in its place, so that ACPI code
//! writes parameters and reads results there as it was made to. The context is the MLE's, made from the measured table.
//!
//! Spec: \[PRM\] "PRM Handler Context", "Parameter Buffer", "Runtime MMIO Ranges".

use core::fmt;
use core::mem::offset_of;

use heapless::Vec;
use hv::addr::{PAGE_SIZE, PhysRange};
use hv::io::PhysMem;
use uefi_raw::{Guid, Status};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{HANDLERS_MAX, Handler, Module, PARAMETERS_MAX, Prmt};
use crate::call::{CallBuffer, FirmwareCall, GuestMem, Pieces};
use crate::service::Target;

/// Most ranges of device memory of a module.
const RANGES_MAX: usize = 32;

/// What a handler's second argument points to.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Context {
    signature: [u8; 4],
    revision: U16,
    reserved: U16,
    handler: [u8; 16],
    static_data: U64,
    ranges: U64,
}

/// Device memory, by its physical address and by the handler's.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct MmioRange {
    physical: U64,
    own: U64,
    length: U32,
}

/// What handler and MLE share of the call buffer, at the start of its data.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Area {
    parameters: [u8; PARAMETERS_MAX],
    context: Context,
    range_count: U64,
    ranges: [MmioRange; RANGES_MAX],
}

/// Why a handler is not called, or its results do not reach the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CallError {
    /// No handler has this thunk.
    NoHandler(u8),
    /// The configuration does not say how long this handler's parameters are.
    NoLength(Guid),
    /// A pointer of the guest to parameters that does not lead to its memory.
    Parameters {
        /// Its value.
        value: u64,
        /// Bytes of parameters.
        length: u16,
    },
    /// Memory of firmware's, or the guest's copy of it, that cannot be accessed.
    Memory(u64),
    /// More ranges of device memory than [`RANGES_MAX`].
    Ranges(u64),
}

impl CallError {
    /// What the guest gets.
    pub fn status(&self) -> Status {
        match self {
            Self::NoHandler(_) => Status::NOT_FOUND,
            Self::NoLength(_) | Self::Parameters { .. } => Status::INVALID_PARAMETER,
            Self::Memory(_) | Self::Ranges(_) => Status::DEVICE_ERROR,
        }
    }
}

impl fmt::Display for CallError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PRM: ")?;
        match *self {
            Self::NoHandler(n) => write!(f, "no handler has thunk {n}"),
            Self::NoLength(guid) => write!(f, "no prm.parameters.{guid}"),
            Self::Parameters { value, length } => {
                write!(f, "no {length} bytes of parameters at {value:#x}")
            }
            Self::Memory(at) => write!(f, "no firmware memory at {at:#x}"),
            Self::Ranges(count) => write!(f, "{count} MMIO ranges, limit {RANGES_MAX}"),
        }
    }
}

/// How many bytes of parameters a handler has, for callers that pass some of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Length {
    /// The handler.
    pub handler: Guid,
    /// Bytes, at most [`PARAMETERS_MAX`].
    pub bytes: u16,
}

/// Where parameters come from, and results go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    /// There are none.
    Nothing,
    /// The guest's memory.
    Guest { at: u64, length: u16 },
    /// The guest's pages in place of firmware's; the address is firmware's.
    Acpi(PhysRange),
}

/// A call whose parameters are in the call buffer.
#[derive(Debug, PartialEq, Eq)]
pub struct Staged {
    n: u8,
    source: Source,
}

impl Staged {
    /// What of the call buffer the call makes use of.
    pub fn used() -> Pieces {
        Pieces::new(0, size_of::<Area>())
    }

    /// The call for a sandbox that sees the buffer at `buffer`.
    pub fn call(&self, buffer: u64) -> FirmwareCall {
        let at = |offset: usize| buffer.wrapping_add(CallBuffer::DATA_AT.saturating_add(offset) as u64);
        let parameters = if self.source == Source::Nothing { 0 } else { at(offset_of!(Area, parameters)) };
        let context = at(offset_of!(Area, context));
        FirmwareCall {
            target: Target::Handler(self.n),
            rcx: parameters,
            rdx: context,
            r8: 0,
            r9: 0,
            fifth: 0,
        }
    }
}

/// The handlers that the guest may call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Handlers {
    prmt: Prmt,
    /// The guest's pages in place of [`Prmt::pages`], one behind the other.
    copies: Option<PhysRange>,
    lengths: Vec<Length, HANDLERS_MAX>,
}

impl Handlers {
    /// Fills `copies`, a page for each of the table's, with what firmware left in its ACPI parameter buffers and zeros.
    ///
    /// # Errors
    /// [`CallError::Memory`].
    pub fn new(
        prmt: Prmt,
        copies: Option<PhysRange>,
        lengths: &[Length],
        mem: &impl PhysMem,
    ) -> Result<Self, CallError> {
        let lengths = Vec::from_slice(lengths).unwrap_or_default();
        let handlers = Self { prmt, copies, lengths };
        let mut bytes = [0; PARAMETERS_MAX];
        for (_, copy) in handlers.pages() {
            let mut parts = (copy..).step_by(PARAMETERS_MAX).take(PAGE_SIZE as usize / PARAMETERS_MAX);
            if !parts.all(|at| mem.write(at, &bytes)) {
                return Err(CallError::Memory(copy));
            }
        }
        for (_, handler) in handlers.prmt.handlers() {
            let Some(window) = handler.acpi_parameters else { continue };
            handlers.each_piece(window, &mut bytes, |piece, copy, bytes| {
                mem.read(piece, bytes) && mem.write(copy, bytes)
            })?;
        }
        Ok(handlers)
    }

    /// The table that names them.
    pub fn table(&self) -> &Prmt {
        &self.prmt
    }

    /// The handler at this place of the table.
    pub fn get(&self, n: u8) -> Option<&Handler> {
        self.prmt.handler(n).map(|(_, handler)| handler)
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.prmt.handlers().count()
    }

    /// Firmware's pages with ACPI parameter buffers, and what the guest has in place of each.
    pub fn pages(&self) -> impl Iterator<Item = (u64, u64)> {
        let copies = self.copies.into_iter().flat_map(|c| (c.start()..=c.last()).step_by(PAGE_SIZE as usize));
        self.prmt.pages().iter().copied().zip(copies)
    }

    /// Calls `f` with each piece of `window` that lies on one page: its address, that of the guest's copy, and its part of `bytes`.
    fn each_piece(
        &self,
        window: PhysRange,
        bytes: &mut [u8],
        mut f: impl FnMut(u64, u64, &mut [u8]) -> bool,
    ) -> Result<(), CallError> {
        let none = || CallError::Memory(window.start());
        for (page, copy) in self.pages() {
            let page = PhysRange::new(page, PAGE_SIZE).ok_or_else(none)?;
            let Some(piece) = page.intersection(&window) else { continue };
            let from = piece.start().saturating_sub(window.start()) as usize;
            let to = from.saturating_add(piece.len() as usize);
            let copy = copy.saturating_add(piece.start().saturating_sub(page.start()));
            if !bytes.get_mut(from..to).is_some_and(|bytes| f(piece.start(), copy, bytes)) {
                return Err(none());
            }
        }
        Ok(())
    }

    /// Prepares a call in `buffer`, which the sandbox will see at `buffer_at`. `pointer` is the guest's.
    ///
    /// # Errors
    /// See [`CallError`]; nothing but the buffer was changed.
    pub fn stage(
        &self,
        n: u8,
        pointer: u64,
        (guest, mem): (&impl GuestMem, &impl PhysMem),
        (buffer, buffer_at): (&mut CallBuffer, u64),
    ) -> Result<Staged, CallError> {
        let (module, handler) = self.prmt.handler(n).ok_or(CallError::NoHandler(n))?;
        let mut area = Area::new_zeroed();
        let source = match (pointer, handler.acpi_parameters) {
            (0, None) => Source::Nothing,
            (0, Some(window)) => Source::Acpi(window),
            (at, _) => {
                let length = self.lengths.iter().find(|l| l.handler == handler.guid);
                let length = length.ok_or(CallError::NoLength(handler.guid))?.bytes;
                Source::Guest { at, length }
            }
        };
        match source {
            Source::Nothing => {}
            Source::Guest { at, length } => {
                let room = area.parameters.get_mut(..length.into());
                if !room.is_some_and(|parameters| guest.read(at, parameters)) {
                    return Err(CallError::Parameters { value: at, length });
                }
            }
            Source::Acpi(window) => {
                self.each_piece(window, &mut area.parameters, |_, copy, bytes| mem.read(copy, bytes))?;
            }
        }
        area.fill_ranges(module, mem)?;
        let ranges =
            buffer_at.wrapping_add(CallBuffer::DATA_AT.saturating_add(offset_of!(Area, range_count)) as u64);
        area.context = Context {
            signature: *b"PRMC",
            revision: 0.into(),
            reserved: 0.into(),
            handler: handler.guid.to_bytes(),
            static_data: handler.static_data.unwrap_or(0).into(),
            ranges: ranges.into(),
        };
        // The data is longer: asserted below.
        let _ = area.write_to_prefix(buffer.data_mut());
        Ok(Staged { n, source })
    }

    /// Gives the guest what the handler left in its parameters, which are in `buffer`.
    ///
    /// # Errors
    /// See [`CallError`].
    pub fn finish(
        &self,
        staged: &Staged,
        (guest, mem): (&impl GuestMem, &impl PhysMem),
        buffer: &mut CallBuffer,
    ) -> Result<(), CallError> {
        let parameters = buffer.data_mut();
        match staged.source {
            Source::Nothing => Ok(()),
            Source::Guest { at, length } => {
                let written = parameters.get(..length.into()).is_some_and(|bytes| guest.write(at, bytes));
                if written { Ok(()) } else { Err(CallError::Parameters { value: at, length }) }
            }
            Source::Acpi(window) => {
                self.each_piece(window, parameters, |_, copy, bytes| mem.write(copy, bytes))
            }
        }
    }
}

impl Area {
    /// Copies the module's list of device memory: the sandbox has it where it is.
    fn fill_ranges(&mut self, module: &Module, mem: &impl PhysMem) -> Result<(), CallError> {
        let Some(at) = module.mmio_list else { return Ok(()) };
        let mut count = U64::ZERO;
        let first = at.wrapping_add(size_of::<U64>() as u64);
        if !mem.read(at, count.as_mut_bytes()) {
            return Err(CallError::Memory(at));
        }
        let ranges = usize::try_from(count.get()).ok().and_then(|count| self.ranges.get_mut(..count));
        let ranges = ranges.ok_or(CallError::Ranges(count.get()))?;
        if !ranges.is_empty() && !mem.read(first, ranges.as_mut_bytes()) {
            return Err(CallError::Memory(first));
        }
        ranges.iter_mut().for_each(|range| range.own = range.physical);
        self.range_count = count;
        Ok(())
    }
}

const _: () = assert!(size_of::<Context>() == 40);
const _: () = assert!(size_of::<MmioRange>() == 20);
const _: () = assert!(size_of::<Area>() <= crate::call::DATA_MAX);

#[cfg(test)]
mod tests;
