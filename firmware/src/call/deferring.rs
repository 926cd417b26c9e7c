//! What deferred writes make of calls: answers that the overlay gives in firmware's place, and calls that the MLE makes for
//! its own sake.

use uefi_raw::Status;
use zerocopy::{FromZeros, IntoBytes};

use super::buffer::{CallBuffer, DATA_MAX, NAME_MAX, Slots};
use super::{Pending, Results};
use crate::deferred::{Base, Key, Wanted};
use crate::service::Service;

/// Firmware's RAX for a status.
fn raw(status: Status) -> u64 {
    status.0 as u64
}

impl CallBuffer {
    /// The variable that the buffer names, of a call or of an answer of GetNextVariableName.
    pub fn key(&self) -> Option<Key<'_>> {
        Key::new((&self.slots.guid, &self.name))
    }

    /// Forgets all that it holds.
    pub fn zero(&mut self) {
        self.as_mut_bytes().fill(0);
    }

    /// Takes vendor and name from another buffer.
    pub fn copy_name_of(&mut self, other: &Self) {
        (self.slots.guid, self.name) = (other.slots.guid, other.name);
    }

    fn set_key(&mut self, key: Key<'_>) {
        self.slots.guid = *key.guid;
        self.name = [0; NAME_MAX];
        for (to, from) in self.name.iter_mut().zip(key.name) {
            *to = *from;
        }
    }
}

impl Pending {
    /// Answers a GetVariable in firmware's place: what firmware would return in RAX.
    pub fn answer_variable(&self, wanted: Wanted<'_>, buffer: &mut CallBuffer) -> u64 {
        let Results::Variable { size, .. } = self.results else { return raw(Status::DEVICE_ERROR) };
        let Wanted::Content(data) = wanted else { return raw(Status::NOT_FOUND) };
        buffer.slots.size = data.len() as u64;
        buffer.slots.attributes = Wanted::ATTRIBUTES;
        match buffer.data.get_mut(..data.len()) {
            Some(to) if data.len() <= size => {
                to.copy_from_slice(data);
                raw(Status::SUCCESS)
            }
            _ => raw(Status::BUFFER_TOO_SMALL),
        }
    }

    /// Answers a GetNextVariableName with `key` in firmware's place: what firmware would return in RAX.
    pub fn answer_name(&self, key: Key<'_>, buffer: &mut CallBuffer) -> u64 {
        let Results::NextName { size, .. } = self.results else { return raw(Status::DEVICE_ERROR) };
        buffer.slots.size = key.name.len() as u64;
        if key.name.len() > size {
            return raw(Status::BUFFER_TOO_SMALL);
        }
        buffer.set_key(key);
        raw(Status::SUCCESS)
    }

    /// Makes the answer of a GetNextVariableName the question for the one after it.
    pub fn ask_on(&self, buffer: &mut CallBuffer) {
        if let Results::NextName { size, .. } = self.results {
            buffer.slots.size = size as u64;
        }
    }

    /// The question what firmware has of the variable that this call writes. Its answer is [`Pending::base`]'s.
    pub fn lookup(buffer: &mut CallBuffer) -> Self {
        buffer.slots.size = DATA_MAX as u64;
        // No guest address: the answer is the MLE's own.
        let results = Results::Variable { attributes: 0, size_at: 0, data: 1, size: DATA_MAX };
        Self { service: Service::GetVariable, results }
    }

    /// What firmware has, by its answer to a lookup: `rax` and what it left in `buffer`.
    ///
    /// # Errors
    /// The status for the guest when firmware cannot tell.
    pub fn base(rax: u64, buffer: &CallBuffer) -> Result<Base<'_>, Status> {
        match super::status(rax) {
            Ok(Status::SUCCESS) => {
                let data = usize::try_from(buffer.slots.size).ok().and_then(|n| buffer.data.get(..n));
                let data = data.ok_or(Status::DEVICE_ERROR)?;
                Ok(Base::Present { attributes: buffer.slots.attributes, data })
            }
            Ok(Status::NOT_FOUND) => Ok(Base::Absent),
            Ok(_) | Err(_) => Err(Status::DEVICE_ERROR),
        }
    }

    /// Attributes and content that a SetVariable wants to write; `None` of other calls.
    pub fn write<'a>(&self, buffer: &'a CallBuffer) -> Option<(u32, &'a [u8])> {
        match self.results {
            Results::SetVariable { attributes, size } => Some((attributes, buffer.data.get(..size)?)),
            _ => None,
        }
    }

    /// The call that makes firmware write what waited.
    pub fn commit(key: Key<'_>, wanted: Wanted<'_>, buffer: &mut CallBuffer) -> Self {
        let data = match wanted {
            Wanted::Deleted => &[],
            Wanted::Content(data) => data,
        };
        buffer.slots = Slots::new_zeroed();
        buffer.set_key(key);
        for (to, from) in buffer.data.iter_mut().zip(data) {
            *to = *from;
        }
        let results = Results::SetVariable { attributes: Wanted::ATTRIBUTES, size: data.len() };
        Self { service: Service::SetVariable, results }
    }
}
