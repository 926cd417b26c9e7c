//! Checks of the three images, as they come from the disk. They only spare the user a launch that must fail:
//! the SLB stage and the MLE check everything again.

use core::fmt;

use hv::launch::{
    DMA_AREA_SIZE, MLE_MAGIC, MLE_REGION_ALIGN, MLE_REGION_MAX, MLE_REGION_MIN, MLE_VERSION, MleHeader,
    SLB_IMAGE_MAX, SLB_MAGIC, SlbHeader,
};
use zerocopy::FromBytes;

/// What a value would have to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Must {
    /// Exactly this.
    Be(u64),
    /// This or more.
    AtLeast(u64),
    /// This or less.
    AtMost(u64),
    /// Less than this.
    Below(u64),
    /// A multiple of this.
    BeMultipleOf(u64),
    /// Have these bits set.
    HaveBits(u64),
}

impl Must {
    fn holds(self, value: u64) -> bool {
        match self {
            Self::Be(limit) => value == limit,
            Self::AtLeast(limit) => value >= limit,
            Self::AtMost(limit) => value <= limit,
            Self::Below(limit) => value < limit,
            Self::BeMultipleOf(limit) => value.is_multiple_of(limit),
            Self::HaveBits(bits) => value & bits == bits,
        }
    }
}

/// Why an image was refused: what in it, its value and what the value must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageError {
    /// The file does not begin as its kind does.
    Magic(&'static str),
    /// A value out of bounds.
    Value {
        /// What.
        what: &'static str,
        /// Its value.
        value: u64,
        /// The bound.
        must: Must,
    },
}

impl fmt::Display for ImageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Magic(kind) => write!(f, "not {kind}"),
            Self::Value { what, value, must } => {
                write!(f, "{what} is {value:#x}, must ")?;
                match must {
                    Must::Be(limit) => write!(f, "be {limit:#x}"),
                    Must::AtLeast(limit) => write!(f, "be at least {limit:#x}"),
                    Must::AtMost(limit) => write!(f, "be at most {limit:#x}"),
                    Must::Below(limit) => write!(f, "be below {limit:#x}"),
                    Must::BeMultipleOf(limit) => write!(f, "be a multiple of {limit:#x}"),
                    Must::HaveBits(bits) => write!(f, "have bits {bits:#x} set"),
                }
            }
        }
    }
}

impl core::error::Error for ImageError {}

/// Fails unless `value` is what it `must` be.
fn check(what: &'static str, value: impl Into<u64>, must: Must) -> Result<(), ImageError> {
    let value = value.into();
    if must.holds(value) { Ok(()) } else { Err(ImageError::Value { what, value, must }) }
}

/// Bytes of a header, for bounds.
const fn size<T>() -> u64 {
    size_of::<T>() as u64
}

/// Reads and checks the SLB's header. `file_size` in bytes; `start` is the file's beginning.
pub fn check_slb(start: &[u8], file_size: u64) -> Result<SlbHeader, ImageError> {
    const WHAT: &str = "a Cordon SLB";
    let (header, _) = SlbHeader::read_from_prefix(start).map_err(|_| ImageError::Magic(WHAT))?;
    if header.magic != SLB_MAGIC {
        return Err(ImageError::Magic(WHAT));
    }
    let length = u64::from(header.length.get());
    check("SLB length", length, Must::AtMost(SLB_IMAGE_MAX))?;
    check("SLB file size", file_size, Must::Be(length))?;
    check("SLB entry", header.entry.get(), Must::AtLeast(size::<SlbHeader>()))?;
    check("SLB entry", header.entry.get(), Must::Below(length))?;
    Ok(header)
}

/// Reads and checks the MLE's header. `file_size` in bytes; `start` is the file's beginning.
pub fn check_mle(start: &[u8], file_size: u64) -> Result<MleHeader, ImageError> {
    const WHAT: &str = "a Cordon MLE";
    let (header, _) = MleHeader::read_from_prefix(start).map_err(|_| ImageError::Magic(WHAT))?;
    if header.magic != MLE_MAGIC {
        return Err(ImageError::Magic(WHAT));
    }
    let (image, region) = (header.image_size.get(), header.region_size.get());
    check("MLE version", header.version.get(), Must::Be(MLE_VERSION.into()))?;
    check("MLE file size", file_size, Must::Be(image))?;
    check("MLE region size", region, Must::AtLeast(MLE_REGION_MIN))?;
    check("MLE region size", region, Must::AtMost(MLE_REGION_MAX))?;
    check("MLE region size", region, Must::BeMultipleOf(MLE_REGION_ALIGN))?;
    check("MLE image size", image, Must::AtMost(region.saturating_sub(DMA_AREA_SIZE)))?;
    check("MLE entry", header.entry.get(), Must::AtLeast(size::<MleHeader>()))?;
    check("MLE entry", header.entry.get(), Must::Below(image))?;
    Ok(header)
}

/// Oldest boot protocol with `xloadflags`.
const PROTOCOL_MIN: u64 = 0x20c;
/// `xloadflags` bit 0: the kernel has a 64-bit entry point.
const XLF_KERNEL_64: u64 = 1;
/// Bytes of a sector, the unit of `setup_sects`.
const SECTOR: u64 = 512;

/// Checks a kernel file, and that it takes a command line of `cmdline_size` bytes.
///
/// Spec: \[LINUX-BOOT\] "The Real-Mode Kernel Header".
pub fn check_kernel(file: &[u8], cmdline_size: u64) -> Result<(), ImageError> {
    const WHAT: &str = "a Linux bzImage";
    fn field<const N: usize>(file: &[u8], at: usize) -> Result<[u8; N], ImageError> {
        let bytes = file.get(at..).and_then(|b| b.first_chunk());
        bytes.copied().ok_or(ImageError::Magic(WHAT))
    }
    if field(file, 0x1fe)? != [0x55, 0xaa] || field(file, 0x202)? != *b"HdrS" {
        return Err(ImageError::Magic(WHAT));
    }
    let u16_at = |at| field(file, at).map(|b| u64::from(u16::from_le_bytes(b)));
    check("kernel boot protocol version", u16_at(0x206)?, Must::AtLeast(PROTOCOL_MIN))?;
    check("kernel xloadflags", u16_at(0x236)?, Must::HaveBits(XLF_KERNEL_64))?;
    let [sectors] = field(file, 0x1f1)?;
    // 0 means 4, from the time before the field.
    let sectors = if sectors == 0 { 4 } else { u64::from(sectors) };
    let setup = sectors.saturating_add(1).saturating_mul(SECTOR);
    check("kernel set-up part", setup, Must::Below(file.len() as u64))?;
    let most = u32::from_le_bytes(field(file, 0x238)?);
    check("command line length", cmdline_size, Must::AtMost(most.into()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::string::ToString;
    use proptest::prelude::*;
    use zerocopy::IntoBytes;

    fn slb(entry: u16, length: u16) -> SlbHeader {
        SlbHeader { entry: entry.into(), length: length.into(), magic: SLB_MAGIC, reserved: 0.into() }
    }

    fn mle() -> MleHeader {
        MleHeader {
            magic: MLE_MAGIC,
            version: MLE_VERSION.into(),
            entry: 0x1000.into(),
            image_size: 0x3000.into(),
            region_size: (16 << 20).into(),
            txt_header: 0.into(),
        }
    }

    /// The smallest file that passes as a kernel.
    fn kernel() -> Vec<u8> {
        let mut k = vec![0; 0x4000];
        k[0x1f1] = 3;
        k[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
        k[0x202..0x206].copy_from_slice(b"HdrS");
        k[0x206..0x208].copy_from_slice(&0x20fu16.to_le_bytes());
        k[0x236..0x238].copy_from_slice(&0x3fu16.to_le_bytes());
        k[0x238..0x23c].copy_from_slice(&2047u32.to_le_bytes());
        k
    }

    #[test]
    fn slb_bounds() {
        let ok = |entry, length, size| check_slb(slb(entry, length).as_bytes(), size);
        assert!(ok(16, 0x8000, 0x8000).is_ok());
        assert_eq!(
            ok(16, 0x8001, 0x8001).unwrap_err().to_string(),
            "SLB length is 0x8001, must be at most 0x8000"
        );
        assert_eq!(ok(16, 0x100, 0xff).unwrap_err().to_string(), "SLB file size is 0xff, must be 0x100");
        assert!(ok(15, 0x100, 0x100).is_err());
        assert!(ok(0x100, 0x100, 0x100).is_err());
        assert!(ok(0xff, 0x100, 0x100).is_ok());
        let mut wrong = slb(16, 0x100);
        wrong.magic[7] ^= 1;
        assert_eq!(check_slb(wrong.as_bytes(), 0x100).unwrap_err().to_string(), "not a Cordon SLB");
        assert!(check_slb(&slb(16, 0x100).as_bytes()[..15], 0x100).is_err());
    }

    #[test]
    fn mle_bounds() {
        let with = |change: fn(&mut MleHeader)| {
            let mut header = mle();
            change(&mut header);
            check_mle(header.as_bytes(), 0x3000).map_err(|e| e.to_string())
        };
        assert!(with(|_| ()).is_ok());
        assert_eq!(with(|h| h.magic[0] = 0).unwrap_err(), "not a Cordon MLE");
        assert_eq!(with(|h| h.version.set(1)).unwrap_err(), "MLE version is 0x1, must be 0x3");
        assert!(with(|h| h.image_size.set(0x3001)).is_err());
        assert!(with(|h| h.region_size.set(6 << 20)).is_err());
        assert!(with(|h| h.region_size.set((16 << 20) + 0x1000)).is_err());
        assert!(with(|h| h.region_size.set(258 << 20)).is_err());
        assert!(with(|h| h.entry.set(0x3000)).is_err());
        assert!(with(|h| h.entry.set(31)).is_err());
        let mut header = mle();
        header.image_size.set((12 << 20) + 1);
        let error = check_mle(header.as_bytes(), (12 << 20) + 1).unwrap_err();
        assert_eq!(error.to_string(), "MLE image size is 0xc00001, must be at most 0xc00000");
    }

    #[test]
    fn kernel_bounds() {
        assert_eq!(check_kernel(&kernel(), 2047), Ok(()));
        let with = |at: usize, byte: u8| {
            let mut k = kernel();
            k[at] = byte;
            check_kernel(&k, 5).map_err(|e| e.to_string())
        };
        assert_eq!(with(0x1fe, 0).unwrap_err(), "not a Linux bzImage");
        assert_eq!(with(0x202, 0).unwrap_err(), "not a Linux bzImage");
        assert_eq!(
            with(0x206, 0x0b).unwrap_err(),
            "kernel boot protocol version is 0x20b, must be at least 0x20c"
        );
        assert_eq!(with(0x236, 0x3e).unwrap_err(), "kernel xloadflags is 0x3e, must have bits 0x1 set");
        assert_eq!(with(0x1f1, 31).unwrap_err(), "kernel set-up part is 0x4000, must be below 0x4000");
        assert!(with(0x1f1, 0).is_ok());
        let long = check_kernel(&kernel(), 2048).unwrap_err();
        assert_eq!(long.to_string(), "command line length is 0x800, must be at most 0x7ff");
    }

    #[test]
    fn a_kernel_cut_anywhere_is_refused_or_taken_never_a_panic() {
        let k = kernel();
        for n in 0..0x23c {
            assert!(check_kernel(&k[..n], 0).is_err(), "{n}");
        }
    }

    proptest! {
        #[test]
        fn no_header_makes_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..0x300), size: u64) {
            let _ = check_kernel(&bytes, size);
            let _ = check_slb(&bytes, size);
            let mut bytes = bytes;
            for magic in [SLB_MAGIC.as_slice(), MLE_MAGIC.as_slice()] {
                let at = if magic == SLB_MAGIC { 4 } else { 0 };
                if let Some(to) = bytes.get_mut(at..at + 8) {
                    to.copy_from_slice(magic);
                }
                let _ = check_slb(&bytes, size);
                let _ = check_mle(&bytes, size);
            }
        }
    }
}
