//! A SINIT module's header and information table, as a file on the boot partition has them.
#![no_main]

use vmx::txt::acm::{Platform, Sinit};

const HERE: Platform = Platform { didvid: 0x1_b001_8086, fms: 0x2_0652, platform_id: 1 << 50, production: true };

libfuzzer_sys::fuzz_target!(|file: &[u8]| {
    if let Ok(sinit) = Sinit::parse(file) {
        let _ = (sinit.check(&HERE), sinit.key(), sinit.signed());
        let _ = (sinit.capabilities(), sinit.os_sinit_version(), sinit.min_mle_header());
    }
});
