//! Why a launch failed.

use core::fmt;

use firmware::config::ConfigError;
use firmware::linux::LinuxError;
use firmware::memmap::MapError;
use firmware::tables::TablesError;
use hv::{radix, space};

use crate::backend::Refusal;
use crate::boot::BootError;
use crate::guest::pci;
use crate::inputs::InputError;
use crate::measure::MeasureError;
use crate::memory::MemoryError;
use crate::relaunch::{self, PlanError};
use crate::sandbox::SandboxError;
use crate::smp::SmpError;
use crate::{devices, dma};

/// Why the launch failed.
#[derive(Debug)]
pub enum LaunchError<'a> {
    /// What the loader handed over.
    Input(InputError),
    /// The EFI memory map.
    Map(MapError),
    /// The configuration.
    Config(ConfigError<'a>),
    /// The kernel.
    Linux(LinuxError),
    /// Guest set-up.
    Boot(BootError),
    /// Policy `relaunch` cannot be had.
    Plan(PlanError),
    /// The guest that waited does not go on.
    Relaunch(relaunch::Error),
    /// PCI functions that are to be guarded.
    Pci(pci::TooMany),
    /// More devices in firmware's memory map than Cordon keeps account of.
    Devices(devices::TooMany),
    /// A measurement.
    Measure(MeasureError),
    /// An ACPI table.
    Acpi(iommu::acpi::Error),
    /// DMA protection.
    Iommu(dma::Error),
    /// Page tables.
    Tables(radix::Error),
    /// Two owners of one page.
    Space(space::Error),
    /// The firmware's EFI tables.
    Efi(TablesError),
    /// The MLE region is used up.
    OutOfMemory(&'static str),
    /// Nested tables.
    Memory(MemoryError),
    /// The other CPUs.
    Smp(SmpError),
    /// The firmware's sandbox.
    Sandbox(SandboxError),
    /// The CPU's virtualization.
    Backend(Refusal),
    /// The CPU lacks something.
    Cpu(&'static str),
}

impl fmt::Display for LaunchError<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Input(e) => write!(f, "{e}"),
            Self::Map(e) => write!(f, "{e}"),
            Self::Config(e) => write!(f, "configuration: {e}"),
            Self::Linux(e) => write!(f, "{e}"),
            Self::Boot(e) => write!(f, "{e}"),
            Self::Plan(e) => write!(f, "{e}"),
            Self::Relaunch(e) => write!(f, "{e}"),
            Self::Pci(e) => write!(f, "{e}"),
            Self::Devices(e) => write!(f, "{e}"),
            Self::Measure(e) => write!(f, "{e}"),
            Self::Acpi(e) => write!(f, "{e}"),
            Self::Iommu(e) => write!(f, "IOMMU: {e}"),
            Self::Tables(e) => write!(f, "page tables: {e}"),
            Self::Space(e) => write!(f, "address space: {e}"),
            Self::Efi(e) => write!(f, "{e}"),
            Self::OutOfMemory(what) => write!(f, "the MLE region has no room left for {what}"),
            Self::Memory(e) => write!(f, "{e}"),
            Self::Smp(e) => write!(f, "{e}"),
            Self::Sandbox(e) => write!(f, "{e}"),
            Self::Backend(e) => write!(f, "{e}"),
            Self::Cpu(what) => write!(f, "this CPU {what}"),
        }
    }
}

macro_rules! from_error {
    ($($ty:ty => $variant:ident;)*) => {$(
        impl From<$ty> for LaunchError<'_> {
            fn from(e: $ty) -> Self {
                Self::$variant(e)
            }
        }
    )*};
}
from_error! {
    InputError => Input;
    MapError => Map;
    LinuxError => Linux;
    BootError => Boot;
    PlanError => Plan;
    relaunch::Error => Relaunch;
    pci::TooMany => Pci;
    devices::TooMany => Devices;
    MeasureError => Measure;
    iommu::acpi::Error => Acpi;
    dma::Error => Iommu;
    radix::Error => Tables;
    space::Error => Space;
    SmpError => Smp;
    Refusal => Backend;
    SandboxError => Sandbox;
    MemoryError => Memory;
    TablesError => Efi;
}
