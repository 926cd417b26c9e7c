//! What of firmware the guest calls: the EFI runtime services, by their place in the runtime services table, and handlers of the
//! Platform Runtime Mechanism.

use crate::prm::HANDLERS_MAX;

/// A runtime service. The number is its place in the runtime services table and in the thunk page. The handlers of the Platform
/// Runtime Mechanism are one more: one policy and one row in the log, told apart by their GUIDs as variables are.
///
/// Spec: \[UEFI\] "EFI Runtime Services Table".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Service {
    /// GetTime.
    GetTime = 0,
    /// SetTime.
    SetTime = 1,
    /// GetWakeupTime.
    GetWakeupTime = 2,
    /// SetWakeupTime.
    SetWakeupTime = 3,
    /// SetVirtualAddressMap.
    SetVirtualAddressMap = 4,
    /// ConvertPointer.
    ConvertPointer = 5,
    /// GetVariable.
    GetVariable = 6,
    /// GetNextVariableName.
    GetNextVariableName = 7,
    /// SetVariable.
    SetVariable = 8,
    /// GetNextHighMonotonicCount.
    GetNextHighMonotonicCount = 9,
    /// ResetSystem.
    ResetSystem = 10,
    /// UpdateCapsule.
    UpdateCapsule = 11,
    /// QueryCapsuleCapabilities.
    QueryCapsuleCapabilities = 12,
    /// QueryVariableInfo.
    QueryVariableInfo = 13,
    /// A handler that the PRMT names; see [`crate::prm`]. Not in the runtime services table.
    PrmHandler = 14,
}

/// EAX of a hypercall from the thunk page is this plus the thunk's index: a stray VMMCALL of guest
/// software written for another hypervisor is not taken for a firmware call.
pub const HYPERCALL_BASE: u32 = 0x4352_0000;

/// How many services there are.
pub const COUNT: usize = 15;
/// How many of them are in the runtime services table.
pub const TABLE_COUNT: usize = 14;

impl Service {
    /// All of them, those of the table first and in its order.
    pub const ALL: [Self; COUNT] = [
        Self::GetTime,
        Self::SetTime,
        Self::GetWakeupTime,
        Self::SetWakeupTime,
        Self::SetVirtualAddressMap,
        Self::ConvertPointer,
        Self::GetVariable,
        Self::GetNextVariableName,
        Self::SetVariable,
        Self::GetNextHighMonotonicCount,
        Self::ResetSystem,
        Self::UpdateCapsule,
        Self::QueryCapsuleCapabilities,
        Self::QueryVariableInfo,
        Self::PrmHandler,
    ];
    /// Those of the runtime services table, in its order.
    pub const TABLE: [Self; TABLE_COUNT] = match Self::ALL.first_chunk() {
        Some(table) => *table,
        None => unreachable!(),
    };

    /// Place in the runtime services table, and in what is kept by service.
    pub const fn index(self) -> usize {
        self as usize
    }

    /// The name in the specification and, after `service.`, in the configuration.
    pub const fn name(self) -> &'static str {
        match self {
            Self::GetTime => "GetTime",
            Self::SetTime => "SetTime",
            Self::GetWakeupTime => "GetWakeupTime",
            Self::SetWakeupTime => "SetWakeupTime",
            Self::SetVirtualAddressMap => "SetVirtualAddressMap",
            Self::ConvertPointer => "ConvertPointer",
            Self::GetVariable => "GetVariable",
            Self::GetNextVariableName => "GetNextVariableName",
            Self::SetVariable => "SetVariable",
            Self::GetNextHighMonotonicCount => "GetNextHighMonotonicCount",
            Self::ResetSystem => "ResetSystem",
            Self::UpdateCapsule => "UpdateCapsule",
            Self::QueryCapsuleCapabilities => "QueryCapsuleCapabilities",
            Self::QueryVariableInfo => "QueryVariableInfo",
            Self::PrmHandler => "PrmHandler",
        }
    }

    /// The service's bit in EFI_RT_PROPERTIES_TABLE: an order of its own, variables before
    /// SetVirtualAddressMap. None for what is not in the runtime services table.
    ///
    /// Spec: \[UEFI\] "EFI_RT_PROPERTIES_TABLE", `EFI_RT_SUPPORTED_`.
    pub const fn rt_properties_bit(self) -> u32 {
        match self {
            Self::GetTime => 0x1,
            Self::SetTime => 0x2,
            Self::GetWakeupTime => 0x4,
            Self::SetWakeupTime => 0x8,
            Self::GetVariable => 0x10,
            Self::GetNextVariableName => 0x20,
            Self::SetVariable => 0x40,
            Self::SetVirtualAddressMap => 0x80,
            Self::ConvertPointer => 0x100,
            Self::GetNextHighMonotonicCount => 0x200,
            Self::ResetSystem => 0x400,
            Self::UpdateCapsule => 0x800,
            Self::QueryCapsuleCapabilities => 0x1000,
            Self::QueryVariableInfo => 0x2000,
            Self::PrmHandler => 0,
        }
    }

    /// Whether a call can be carried out at all. ConvertPointer is for firmware's own drivers, inside SetVirtualAddressMap,
    /// which no firmware sees here.
    pub const fn supported(self) -> bool {
        !matches!(self, Self::ConvertPointer)
    }

    /// Whether firmware has a part in it. The MLE answers the others itself.
    pub const fn runs_firmware(self) -> bool {
        self.supported() && !matches!(self, Self::ResetSystem | Self::SetVirtualAddressMap)
    }

    /// Whether this is one of those that take capsules.
    pub const fn takes_capsules(self) -> bool {
        matches!(self, Self::UpdateCapsule | Self::QueryCapsuleCapabilities)
    }

    /// Whether its arguments are staged in ways of their own, that calls between two launches do not know.
    pub const fn is_staged(self) -> bool {
        self.takes_capsules() || matches!(self, Self::PrmHandler)
    }

    /// Whether policies may tell its calls apart by a GUID: of variables with their names, or of handlers.
    pub const fn has_guid(self) -> bool {
        matches!(self, Self::GetVariable | Self::SetVariable | Self::PrmHandler)
    }
}

/// Where a thunk of the guest's leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// A service of the runtime services table.
    Service(Service),
    /// A handler of the PRMT, by its place there.
    Handler(u8),
}

/// How many thunks there are.
pub const TARGETS: usize = TABLE_COUNT.saturating_add(HANDLERS_MAX);

impl Target {
    /// All of them, in the thunk page's order.
    pub fn all() -> impl Iterator<Item = Self> {
        let handlers = (0..HANDLERS_MAX).map(|n| Self::Handler(n as u8));
        Service::TABLE.into_iter().map(Self::Service).chain(handlers)
    }

    /// The service whose policy it is under.
    pub const fn service(self) -> Service {
        match self {
            Self::Service(service) => service,
            Self::Handler(_) => Service::PrmHandler,
        }
    }

    /// Place in the thunk page.
    pub const fn index(self) -> usize {
        match self {
            Self::Service(service) => service.index(),
            Self::Handler(n) => TABLE_COUNT.saturating_add(n as usize),
        }
    }

    /// EAX of the thunk.
    pub const fn hypercall(self) -> u32 {
        HYPERCALL_BASE | self.index() as u32
    }

    /// The one whose thunk sets EAX to `eax`; `None` for any other hypercall.
    pub fn from_hypercall(eax: u32) -> Option<Self> {
        let index = usize::try_from(eax.checked_sub(HYPERCALL_BASE)?).ok()?;
        match Service::TABLE.get(index) {
            Some(service) => Some(Self::Service(*service)),
            None => (index < TARGETS).then_some(Self::Handler(index.wrapping_sub(TABLE_COUNT) as u8)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::mem::offset_of;
    use uefi_raw::table::runtime::RuntimeServices as Rt;

    #[test]
    fn indices_are_places_in_the_table() {
        let place = |offset: usize| (offset - 24) / 8;
        let expected = [
            (Service::GetTime, offset_of!(Rt, get_time)),
            (Service::SetTime, offset_of!(Rt, set_time)),
            (Service::GetWakeupTime, offset_of!(Rt, get_wakeup_time)),
            (Service::SetWakeupTime, offset_of!(Rt, set_wakeup_time)),
            (Service::SetVirtualAddressMap, offset_of!(Rt, set_virtual_address_map)),
            (Service::ConvertPointer, offset_of!(Rt, convert_pointer)),
            (Service::GetVariable, offset_of!(Rt, get_variable)),
            (Service::GetNextVariableName, offset_of!(Rt, get_next_variable_name)),
            (Service::SetVariable, offset_of!(Rt, set_variable)),
            (Service::GetNextHighMonotonicCount, offset_of!(Rt, get_next_high_monotonic_count)),
            (Service::ResetSystem, offset_of!(Rt, reset_system)),
            (Service::UpdateCapsule, offset_of!(Rt, update_capsule)),
            (Service::QueryCapsuleCapabilities, offset_of!(Rt, query_capsule_capabilities)),
            (Service::QueryVariableInfo, offset_of!(Rt, query_variable_info)),
        ];
        for (i, (service, offset)) in expected.into_iter().enumerate() {
            assert_eq!(Service::TABLE[i], service);
            assert_eq!(service.index(), place(offset), "{}", service.name());
            let target = Target::Service(service);
            assert_eq!(Target::from_hypercall(target.hypercall()), Some(target));
        }
    }

    #[test]
    fn the_bits_are_fourteen_different_ones() {
        assert_eq!(Service::ALL.iter().fold(0, |m, s| m | s.rt_properties_bit()), 0x3fff);
    }

    #[test]
    fn other_hypercalls_are_nobodys() {
        for eax in [0, 1, 13, HYPERCALL_BASE - 1, HYPERCALL_BASE + TARGETS as u32, u32::MAX] {
            assert_eq!(Target::from_hypercall(eax), None);
        }
    }

    #[test]
    fn handlers_follow_the_services() {
        assert_eq!(Target::all().count(), TARGETS);
        for (i, target) in Target::all().enumerate() {
            assert_eq!(target.index(), i);
            assert_eq!(Target::from_hypercall(target.hypercall()), Some(target));
            assert_eq!(target.service() == Service::PrmHandler, i >= TABLE_COUNT);
        }
    }
}
