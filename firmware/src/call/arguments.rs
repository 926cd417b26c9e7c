//! The guest's arguments: what its registers and pointers say, copied into the call buffer.

use hv::addr::PAGE_SIZE;
use uefi_raw::Status;
use zerocopy::IntoBytes;

use super::buffer::{CallBuffer, DATA_MAX, NAME_MAX};
use super::own::{OWN_ATTRIBUTES, OwnVariable, VENDOR, is_unlock};
use super::results::{give, give_own_name};
use super::{Args, GuestMem, OwnVariables, Pending, ResetKind, Results, Services};
use crate::service::Service;

/// A decoded call, before it has a service.
pub(super) enum Decoded {
    Done(Status),
    Run(Results),
    Reset(ResetKind),
    Unlock(Services),
    Capsules,
}

/// A pointer that the specification wants: NULL is EFI_INVALID_PARAMETER.
pub(super) fn pointer(value: u64) -> Result<u64, Status> {
    if value == 0 { Err(Status::INVALID_PARAMETER) } else { Ok(value) }
}

pub(super) fn copy_in(mem: &impl GuestMem, at: u64, out: &mut [u8]) -> Result<(), Status> {
    if mem.read(at, out) { Ok(()) } else { Err(Status::INVALID_PARAMETER) }
}

pub(super) fn read_u64(mem: &impl GuestMem, at: u64) -> Result<u64, Status> {
    let mut bytes = [0; 8];
    copy_in(mem, at, &mut bytes)?;
    Ok(u64::from_le_bytes(bytes))
}

/// Distance from RSP to the fifth argument: return address and 32 bytes of shadow space.
pub(super) const FIFTH_ARGUMENT: u64 = 0x28;

pub(super) fn fifth_argument(args: &Args, mem: &impl GuestMem) -> Result<u64, Status> {
    read_u64(mem, args.rsp.wrapping_add(FIFTH_ARGUMENT))
}

/// Most bytes of a name that are read at once: names are short.
const NAME_PART: u64 = 64;

/// Copies a name of at most `limit` bytes from the guest, reading no page past the one that holds its
/// end. Gives its bytes, the terminating zero included.
pub(super) fn copy_name(
    mem: &impl GuestMem,
    at: u64,
    limit: usize,
    name: &mut [u8; NAME_MAX],
) -> Result<usize, Status> {
    let limit = limit.min(NAME_MAX);
    let mut len = 0usize;
    while len < limit {
        let from = at.checked_add(len as u64).ok_or(Status::INVALID_PARAMETER)?;
        let page_left = PAGE_SIZE.wrapping_sub(from & PAGE_SIZE.wrapping_sub(1));
        let chunk = limit.wrapping_sub(len).min(page_left.min(NAME_PART) as usize);
        let end = len.saturating_add(chunk);
        copy_in(mem, from, name.get_mut(len..end).unwrap_or_default())?;
        // A character may lie in two parts.
        let begun = len & !1;
        if let Some(used) = terminated(name.get(begun..end).unwrap_or_default()) {
            return Ok(begun.saturating_add(used));
        }
        len = end;
    }
    Err(Status::INVALID_PARAMETER)
}

/// Bytes up to and with the first zero character.
pub(super) fn terminated(name: &[u8]) -> Option<usize> {
    let at = name.chunks_exact(2).position(|c| c == [0, 0])?;
    Some(at.saturating_add(1).saturating_mul(2))
}

pub(super) fn copy_time(mem: &impl GuestMem, at: u64, buffer: &mut CallBuffer) -> Result<(), Status> {
    copy_in(mem, at, buffer.slots.time.as_mut_bytes())?;
    buffer.slots.time = buffer.slots.time.checked().ok_or(Status::INVALID_PARAMETER)?;
    Ok(())
}

pub(super) fn get_time(args: &Args) -> Result<Decoded, Status> {
    Ok(Decoded::Run(Results::Time { time: pointer(args.rcx)?, capabilities: args.rdx }))
}

pub(super) fn set_time(args: &Args, mem: &impl GuestMem, buffer: &mut CallBuffer) -> Result<Decoded, Status> {
    copy_time(mem, pointer(args.rcx)?, buffer)?;
    Ok(Decoded::Run(Results::SetTime))
}

pub(super) fn get_wakeup_time(args: &Args) -> Result<Decoded, Status> {
    let (enabled, pending, time) = (pointer(args.rcx)?, pointer(args.rdx)?, pointer(args.r8)?);
    Ok(Decoded::Run(Results::Wakeup { enabled, pending, time }))
}

pub(super) fn set_wakeup_time(
    args: &Args,
    mem: &impl GuestMem,
    buffer: &mut CallBuffer,
) -> Result<Decoded, Status> {
    let enable = u8::from(args.rcx & 0xff != 0);
    // The time may be absent only when the alarm is switched off, and does not matter then.
    let with_time = enable != 0;
    if with_time {
        copy_time(mem, pointer(args.rdx)?, buffer)?;
    }
    Ok(Decoded::Run(Results::SetWakeup { enable, with_time }))
}

pub(super) fn get_variable(
    args: &Args,
    mem: &impl GuestMem,
    own: &impl OwnVariables,
    buffer: &mut CallBuffer,
) -> Result<Decoded, Status> {
    let (name, guid, size_at) = (pointer(args.rcx)?, pointer(args.rdx)?, pointer(args.r9)?);
    let attributes = args.r8;
    let data = fifth_argument(args, mem)?;
    let used = copy_name(mem, name, NAME_MAX, &mut buffer.name)?;
    copy_in(mem, guid, &mut buffer.slots.guid)?;
    let size = usize::try_from(read_u64(mem, size_at)?).unwrap_or(usize::MAX).min(DATA_MAX);
    if attributes != 0 {
        // Older firmware leaves them alone when the buffer is too small; so must what the guest gets back.
        copy_in(mem, attributes, buffer.slots.attributes.as_mut_bytes())?;
    }
    let results = Results::Variable { attributes, size_at, data, size };
    if buffer.slots.guid == VENDOR.to_bytes() {
        let which = buffer.name.get(..used).and_then(OwnVariable::by_name).ok_or(Status::NOT_FOUND)?;
        let length = own.fill(which, &mut buffer.data).min(DATA_MAX);
        buffer.slots.size = length as u64;
        buffer.slots.attributes = OWN_ATTRIBUTES;
        let status = if length <= size { Status::SUCCESS } else { Status::BUFFER_TOO_SMALL };
        let pending = Pending { service: Service::GetVariable, results };
        let outcome = give(&pending, status, mem, buffer);
        return outcome.map(|o| Decoded::Done(o.status)).map_err(|_| Status::INVALID_PARAMETER);
    }
    buffer.slots.size = size as u64;
    // Firmware that claims to have written what it has not gives the guest zeros.
    buffer.data.get_mut(..size).unwrap_or_default().fill(0);
    Ok(Decoded::Run(results))
}

pub(super) fn next_name(
    args: &Args,
    mem: &impl GuestMem,
    buffer: &mut CallBuffer,
) -> Result<Decoded, Status> {
    let (size_at, name, guid) = (pointer(args.rcx)?, pointer(args.rdx)?, pointer(args.r8)?);
    let size = usize::try_from(read_u64(mem, size_at)?).unwrap_or(usize::MAX).min(NAME_MAX);
    let used = copy_name(mem, name, size, &mut buffer.name)?;
    copy_in(mem, guid, &mut buffer.slots.guid)?;
    buffer.slots.size = size as u64;
    // What firmware does not write of the next name is none of an earlier call's.
    buffer.name.get_mut(used..size).unwrap_or_default().fill(0);
    let results = Results::NextName { size_at, name, guid, size };
    // Cordon's own come first: whatever firmware answers afterwards hides none of them.
    let next = match buffer.name.get(..used).unwrap_or_default() {
        [0, 0] => Some(OwnVariable::FIRST),
        name if buffer.slots.guid == VENDOR.to_bytes() => {
            OwnVariable::by_name(name).ok_or(Status::INVALID_PARAMETER)?.after()
        }
        _ => return Ok(Decoded::Run(results)),
    };
    match next {
        Some(next) => give_own_name(next, &results, mem, buffer)
            .map(|outcome| Decoded::Done(outcome.status))
            .map_err(|_| Status::INVALID_PARAMETER),
        None => {
            (buffer.name, buffer.slots.guid) = ([0; NAME_MAX], [0; 16]);
            Ok(Decoded::Run(results))
        }
    }
}

pub(super) fn set_variable(
    args: &Args,
    mem: &impl GuestMem,
    buffer: &mut CallBuffer,
) -> Result<Decoded, Status> {
    let (name, guid) = (pointer(args.rcx)?, pointer(args.rdx)?);
    let attributes = args.r8 as u32;
    let used = copy_name(mem, name, NAME_MAX, &mut buffer.name)?;
    copy_in(mem, guid, &mut buffer.slots.guid)?;
    let own = buffer.slots.guid == VENDOR.to_bytes();
    if own && !buffer.name.get(..used).is_some_and(is_unlock) {
        return Err(Status::WRITE_PROTECTED);
    }
    let size = usize::try_from(args.r9).ok().filter(|s| *s <= DATA_MAX).ok_or(Status::INVALID_PARAMETER)?;
    let content = buffer.data.get_mut(..size).unwrap_or_default();
    if size != 0 {
        copy_in(mem, pointer(fifth_argument(args, mem)?)?, content)?;
    }
    if own {
        return Services::named(content).map(Decoded::Unlock).ok_or(Status::INVALID_PARAMETER);
    }
    Ok(Decoded::Run(Results::SetVariable { attributes, size }))
}

pub(super) fn query_variable_info(args: &Args) -> Result<Decoded, Status> {
    let to = [pointer(args.rdx)?, pointer(args.r8)?, pointer(args.r9)?];
    Ok(Decoded::Run(Results::Storage { attributes: args.rcx as u32, to }))
}

pub(super) fn reset(args: &Args) -> Result<Decoded, Status> {
    Ok(Decoded::Reset(match args.rcx as u32 {
        0 => ResetKind::Cold,
        1 => ResetKind::Warm,
        2 => ResetKind::Shutdown,
        3 => ResetKind::Platform,
        _ => return Err(Status::INVALID_PARAMETER),
    }))
}
