//! The call buffer: all memory that firmware and the MLE share.

use core::mem::offset_of;
use core::ops::Range;

use uefi_raw::time::{Daylight, Time};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use crate::service::Service;

/// Longest variable name, in bytes, its terminating zero character included. Linux's own limit is 1024.
pub const NAME_MAX: usize = 2048;
/// Largest variable content in bytes.
pub const DATA_MAX: usize = 64 * 1024;

/// EFI_TIME.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct EfiTime {
    year: u16,
    month: u8,
    day: u8,
    hour: u8,
    minute: u8,
    second: u8,
    pad1: u8,
    nanosecond: u32,
    time_zone: i16,
    pub(super) daylight: u8,
    pad2: u8,
}

impl EfiTime {
    /// The same time with unused bits zero; `None` when a field is out of its range.
    pub(super) fn checked(mut self) -> Option<Self> {
        let time = Time {
            year: self.year,
            month: self.month,
            day: self.day,
            hour: self.hour,
            minute: self.minute,
            second: self.second,
            nanosecond: self.nanosecond,
            time_zone: self.time_zone,
            ..Time::invalid()
        };
        self.pad1 = 0;
        self.pad2 = 0;
        self.daylight &= Daylight::all().bits();
        time.is_valid().then_some(self)
    }
}

/// The small arguments of a call.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct Slots {
    pub(super) guid: [u8; 16],
    pub(super) size: u64,
    pub(super) storage: [u64; 3],
    pub(super) time: EfiTime,
    /// EFI_TIME_CAPABILITIES: resolution, accuracy, and a boolean in the first byte of the last word.
    pub(super) capabilities: [u32; 3],
    pub(super) attributes: u32,
    pub(super) count: u32,
    pub(super) enabled: u8,
    pub(super) pending: u8,
    padding: [u8; 2],
}

/// The memory through which arguments and results pass; the only memory that the sandbox shares with
/// the MLE. Whole pages, so that nothing else lies on them.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, align(4096))]
pub struct CallBuffer {
    pub(super) slots: Slots,
    rest: [u8; CallBuffer::REST],
    pub(super) name: [u8; NAME_MAX],
    pub(super) data: [u8; DATA_MAX],
}

impl CallBuffer {
    /// Where content of variables, and what handlers get, begins.
    pub(crate) const DATA_AT: usize = offset_of!(Self, data);
    const REST: usize = 4096_usize.saturating_sub(NAME_MAX).saturating_sub(size_of::<Slots>());

    /// Vendor and terminated name of the variable that a call of `service` is about, if it is about one; of a handler its
    /// GUID and no name.
    pub fn variable(&self, service: Service) -> Option<(&[u8; 16], &[u8])> {
        service.has_guid().then_some((&self.slots.guid, self.name.as_slice()))
    }

    /// Forgets what an earlier call was about. The rest each call writes as far as it uses it.
    pub(super) fn clear_arguments(&mut self) {
        self.slots = Slots::new_zeroed();
        [self.name[0], self.name[1]] = [0; 2];
    }

    /// The part for content.
    pub(crate) fn data_mut(&mut self) -> &mut [u8; DATA_MAX] {
        &mut self.data
    }
}

/// What of a call buffer a call makes use of: small arguments, so much of the name, so much of the content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pieces([Range<usize>; 3]);

impl Pieces {
    pub(crate) fn new(name: usize, data: usize) -> Self {
        let piece = |at: usize, len: usize| at..at.saturating_add(len);
        let slots = piece(offset_of!(CallBuffer, slots), size_of::<Slots>());
        let name = piece(offset_of!(CallBuffer, name), name.min(NAME_MAX));
        Self([slots, name, piece(CallBuffer::DATA_AT, data.min(DATA_MAX))])
    }
}

impl IntoIterator for Pieces {
    type Item = Range<usize>;
    type IntoIter = core::array::IntoIter<Range<usize>, 3>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.into_iter()
    }
}

/// Bytes of the call buffer, whole pages.
pub const CALL_BUFFER_SIZE: usize = size_of::<CallBuffer>();
const _: () = assert!(CALL_BUFFER_SIZE == 4096 + DATA_MAX);
