#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    iommu::model::walk_dmar(bytes);
});
