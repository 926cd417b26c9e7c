//! The screen as the firmware left it, in Linux' words.
//!
//! Spec: Linux, `include/uapi/linux/screen_info.h`; \[UEFI\] "EFI_GRAPHICS_OUTPUT_PROTOCOL".

use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromZeros, Immutable, IntoBytes, Unaligned};

/// Linux' `struct screen_info`; the text-mode fields stay zero.
#[derive(FromZeros, IntoBytes, Immutable, Unaligned)]
#[repr(C)]
struct ScreenInfo {
    text_mode: [u8; 0x0f],
    video_type: u8,
    points: U16,
    width: U16,
    height: U16,
    depth: U16,
    base: U32,
    size: U32,
    cl: [U16; 2],
    line_length: U16,
    red: Channel,
    green: Channel,
    blue: Channel,
    reserved: Channel,
    vesapm: [U16; 2],
    pages: U16,
    vesa_attributes: U16,
    capabilities: U32,
    base_high: U32,
    unused: [u8; 2],
}

const _: () = {
    use core::mem::offset_of;
    assert!(size_of::<ScreenInfo>() == 64);
    assert!(offset_of!(ScreenInfo, video_type) == 0x0f);
    assert!(offset_of!(ScreenInfo, width) == 0x12);
    assert!(offset_of!(ScreenInfo, base) == 0x18);
    assert!(offset_of!(ScreenInfo, line_length) == 0x24);
    assert!(offset_of!(ScreenInfo, red) == 0x26);
    assert!(offset_of!(ScreenInfo, pages) == 0x32);
    assert!(offset_of!(ScreenInfo, capabilities) == 0x36);
    assert!(offset_of!(ScreenInfo, base_high) == 0x3a);
};

/// `VIDEO_TYPE_EFI`.
const TYPE_EFI: u8 = 0x70;
/// `VIDEO_CAPABILITY_SKIP_QUIRKS`: the values are right as they are.
const SKIP_QUIRKS: u32 = 1;
/// `VIDEO_CAPABILITY_64BIT_BASE`: `base_high` counts.
const BASE_64: u32 = 2;

/// Where one colour is in a pixel: bits and lowest bit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromZeros, IntoBytes, Immutable, Unaligned)]
#[repr(C)]
pub struct Channel {
    /// Bits.
    pub size: u8,
    /// Lowest bit.
    pub position: u8,
}

impl Channel {
    /// The channel of a mask of contiguous bits.
    pub fn of_mask(mask: u32) -> Self {
        // Both counts are at most 32.
        let position = if mask == 0 { 0 } else { mask.trailing_zeros() as u8 };
        Self { size: mask.count_ones() as u8, position }
    }
}

/// A graphics mode with a frame buffer in memory.
#[derive(Clone, Copy, Debug)]
pub struct Mode {
    /// Pixels in a line.
    pub width: u32,
    /// Lines.
    pub height: u32,
    /// Pixels from one line's start to the next.
    pub stride: u32,
    /// Physical address of the frame buffer.
    pub base: u64,
    /// Red, green, blue and unused bits of a pixel.
    pub channels: [Channel; 4],
}

/// The mode as Linux takes it; all zeros, no screen, when it does not fit Linux' fields.
pub fn screen_info(mode: &Mode) -> [u8; 64] {
    describe(mode).map_or([0; 64], |info| zerocopy::transmute!(info))
}

fn describe(mode: &Mode) -> Option<ScreenInfo> {
    let depth = mode.channels.iter().map(|c| u32::from(c.size)).fold(0, u32::saturating_add);
    let line_length = mode.stride.checked_mul(depth)?.checked_div(8)?;
    let size = line_length.checked_mul(mode.height)?;
    let base_high = (mode.base >> 32) as u32;
    let mut info = ScreenInfo::new_zeroed();
    info.video_type = TYPE_EFI;
    info.width.set(mode.width.try_into().ok()?);
    info.height.set(mode.height.try_into().ok()?);
    info.depth.set(depth.try_into().ok()?);
    info.base.set(mode.base as u32);
    info.size.set(size);
    info.line_length.set(line_length.try_into().ok()?);
    [info.red, info.green, info.blue, info.reserved] = mode.channels;
    info.pages.set(1);
    info.capabilities.set(if base_high == 0 { SKIP_QUIRKS } else { SKIP_QUIRKS | BASE_64 });
    info.base_high.set(base_high);
    Some(info)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bgrx() -> [Channel; 4] {
        [0xff_0000, 0xff00, 0xff, 0xff00_0000].map(Channel::of_mask)
    }

    #[test]
    fn a_mode_reads_as_linux_reads_it() {
        let mode = Mode { width: 1280, height: 800, stride: 1300, base: 0x1_8000_0000, channels: bgrx() };
        let info = screen_info(&mode);
        let u16_at = |at: usize| u16::from_le_bytes(info[at..at + 2].try_into().unwrap());
        let u32_at = |at: usize| u32::from_le_bytes(info[at..at + 4].try_into().unwrap());
        assert_eq!(info[0x0f], 0x70);
        assert_eq!((u16_at(0x12), u16_at(0x14), u16_at(0x16)), (1280, 800, 32));
        assert_eq!((u32_at(0x18), u32_at(0x3a)), (0x8000_0000, 1));
        assert_eq!((u16_at(0x24), u32_at(0x1c)), (5200, 5200 * 800));
        assert_eq!(info[0x26..0x2e], [8, 16, 8, 8, 8, 0, 8, 24]);
        assert_eq!(u32_at(0x36), 3);
    }

    #[test]
    fn a_mode_that_does_not_fit_is_no_screen() {
        let mode = Mode { width: 70_000, height: 800, stride: 70_000, base: 0x8000_0000, channels: bgrx() };
        assert_eq!(screen_info(&mode), [0; 64]);
        let mode = Mode { width: 10, height: u32::MAX, stride: 10, base: 0, channels: bgrx() };
        assert_eq!(screen_info(&mode), [0; 64]);
    }
}
