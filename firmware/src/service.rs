//! The EFI runtime services, by their place in the runtime services table.

/// A runtime service. The number is its place in the runtime services table and in the thunk page.
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
}

/// EAX of a hypercall from the thunk page is this plus the service's index: a stray VMMCALL of guest
/// software written for another hypervisor is not taken for a firmware call.
pub const HYPERCALL_BASE: u32 = 0x4352_0000;

/// How many services there are.
pub const COUNT: usize = 14;

impl Service {
    /// All of them, in table order.
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
    ];

    /// Place in the runtime services table.
    pub const fn index(self) -> usize {
        self as usize
    }

    /// EAX of the service's thunk.
    pub const fn hypercall(self) -> u32 {
        HYPERCALL_BASE | self as u32
    }

    /// The service whose thunk sets EAX to `eax`; `None` for any other hypercall.
    pub fn from_hypercall(eax: u32) -> Option<Self> {
        let index = eax.checked_sub(HYPERCALL_BASE)?;
        Self::ALL.get(usize::try_from(index).ok()?).copied()
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
        }
    }

    /// The service's bit in EFI_RT_PROPERTIES_TABLE: an order of its own, variables before
    /// SetVirtualAddressMap.
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
            assert_eq!(Service::ALL[i], service);
            assert_eq!(service.index(), place(offset), "{}", service.name());
            assert_eq!(Service::from_hypercall(service.hypercall()), Some(service));
        }
    }

    #[test]
    fn the_bits_are_fourteen_different_ones() {
        assert_eq!(Service::ALL.iter().fold(0, |m, s| m | s.rt_properties_bit()), 0x3fff);
    }

    #[test]
    fn other_hypercalls_are_nobodys() {
        for eax in [0, 1, 13, HYPERCALL_BASE - 1, HYPERCALL_BASE + 14, u32::MAX] {
            assert_eq!(Service::from_hypercall(eax), None);
        }
    }
}
