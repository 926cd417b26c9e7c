//! Firmware's results: checked, then copied to where the guest's pointers lead.

use uefi_raw::Status;
use zerocopy::IntoBytes;

use super::arguments::terminated;
use super::buffer::{CallBuffer, DATA_MAX, NAME_MAX};
use super::own::{OwnVariable, VENDOR};
use super::{Anomaly, Fault, GuestMem, Outcome, Pending, Results};

/// What firmware returned in RAX: success or one of the specification's errors; no runtime service returns a warning.
///
/// # Errors
/// [`Anomaly::Status`] for anything else.
///
/// Spec: \[UEFI\] "Status Codes".
pub fn status(rax: u64) -> Result<Status, Anomaly> {
    const ERROR: u64 = 1 << 63;
    let code = rax & !ERROR;
    let defined = rax == 0 || (rax & ERROR != 0 && (1..=35).contains(&code));
    if defined { Ok(Status(rax as usize)) } else { Err(Anomaly::Status(rax)) }
}

pub(super) fn copy_out(mem: &impl GuestMem, to: u64, data: &[u8]) -> Result<(), Fault> {
    if mem.write(to, data) { Ok(()) } else { Err(Fault::Guest) }
}

/// Checks the results in `buffer` that go with `status` and copies them to the guest.
pub(super) fn give(
    pending: &Pending,
    status: Status,
    mem: &impl GuestMem,
    buffer: &mut CallBuffer,
) -> Result<Outcome, Fault> {
    match pending.results {
        Results::Variable { attributes, size_at, data, size } => {
            return give_variable(status, attributes, size_at, data, size, mem, buffer);
        }
        Results::NextName { size_at, name, guid, size } => {
            return give_next_name(status, [size_at, name, guid], size, mem, buffer);
        }
        _ if status != Status::SUCCESS => {}
        Results::SetTime | Results::SetWakeup { .. } | Results::SetVariable { .. } => {}
        Results::Time { time, capabilities } => {
            give_time(time, mem, buffer)?;
            if capabilities != 0 {
                let [resolution, accuracy, sets_to_zero] = buffer.slots.capabilities;
                let flag = u32::from(sets_to_zero & 0xff != 0);
                copy_out(mem, capabilities, [resolution, accuracy, flag].as_bytes())?;
            }
        }
        Results::Wakeup { enabled, pending, time } => {
            give_time(time, mem, buffer)?;
            copy_out(mem, enabled, &[u8::from(buffer.slots.enabled != 0)])?;
            copy_out(mem, pending, &[u8::from(buffer.slots.pending != 0)])?;
        }
        Results::Count(to) => copy_out(mem, to, buffer.slots.count.as_bytes())?,
        Results::Storage { to, .. } => {
            for (to, value) in to.into_iter().zip(&buffer.slots.storage) {
                copy_out(mem, to, value.as_bytes())?;
            }
        }
    }
    Ok(Outcome::of(status))
}

pub(super) fn give_time(to: u64, mem: &impl GuestMem, buffer: &CallBuffer) -> Result<(), Fault> {
    let time = buffer.slots.time.checked().ok_or(Fault::Firmware(Anomaly::Time))?;
    copy_out(mem, to, time.as_bytes())
}

pub(super) fn give_variable(
    status: Status,
    attributes: u64,
    size_at: u64,
    data: u64,
    size: usize,
    mem: &impl GuestMem,
    buffer: &CallBuffer,
) -> Result<Outcome, Fault> {
    let said = buffer.slots.size;
    let lie = Fault::Firmware(Anomaly::Size { said, buffer: size });
    let found = usize::try_from(said).ok().filter(|n| *n <= DATA_MAX);
    match status {
        Status::SUCCESS => {
            let content = found.filter(|n| *n <= size).and_then(|n| buffer.data.get(..n)).ok_or(lie)?;
            if data == 0 && !content.is_empty() {
                return Ok(Outcome::of(Status::INVALID_PARAMETER));
            }
            if !content.is_empty() {
                copy_out(mem, data, content)?;
            }
        }
        // A size that would not help the guest would make it ask for ever.
        Status::BUFFER_TOO_SMALL if found.is_none_or(|n| n <= size) => return Err(lie),
        Status::BUFFER_TOO_SMALL => {}
        _ => return Ok(Outcome::of(status)),
    }
    copy_out(mem, size_at, said.as_bytes())?;
    if attributes != 0 {
        copy_out(mem, attributes, buffer.slots.attributes.as_bytes())?;
    }
    Ok(Outcome::of(status))
}

pub(super) fn give_next_name(
    status: Status,
    [size_at, name, guid]: [u64; 3],
    size: usize,
    mem: &impl GuestMem,
    buffer: &CallBuffer,
) -> Result<Outcome, Fault> {
    let said = buffer.slots.size;
    let lie = Fault::Firmware(Anomaly::Size { said, buffer: size });
    match status {
        Status::SUCCESS => {
            if usize::try_from(said).is_ok_and(|n| n > size) {
                return Err(lie);
            }
            if buffer.slots.guid == VENDOR.to_bytes() {
                return Err(Fault::Firmware(Anomaly::OwnGuid));
            }
            // The name's own end counts, not the size: firmware is known to leave the size as it was.
            let used = buffer.name.get(..size).and_then(terminated).ok_or(Fault::Firmware(Anomaly::Name))?;
            copy_out(mem, name, buffer.name.get(..used).unwrap_or_default())?;
            copy_out(mem, guid, &buffer.slots.guid)?;
            copy_out(mem, size_at, (used as u64).as_bytes())?;
        }
        Status::BUFFER_TOO_SMALL => {
            if said <= size as u64 || said > NAME_MAX as u64 {
                return Err(lie);
            }
            copy_out(mem, size_at, said.as_bytes())?;
        }
        _ => {}
    }
    Ok(Outcome::of(status))
}

pub(super) fn give_own_name(
    which: OwnVariable,
    results: &Results,
    mem: &impl GuestMem,
    buffer: &mut CallBuffer,
) -> Result<Outcome, Fault> {
    let Results::NextName { size_at, name, guid, size } = *results else {
        return Ok(Outcome::of(Status::INVALID_PARAMETER));
    };
    let mut used = 0usize;
    for (to, from) in buffer.name.iter_mut().zip(which.wide_name()) {
        *to = from;
        used = used.saturating_add(1);
    }
    let fits = used <= size;
    if fits {
        copy_out(mem, name, buffer.name.get(..used).unwrap_or_default())?;
        copy_out(mem, guid, &VENDOR.to_bytes())?;
    }
    copy_out(mem, size_at, (used as u64).as_bytes())?;
    Ok(Outcome::of(if fits { Status::SUCCESS } else { Status::BUFFER_TOO_SMALL }))
}
