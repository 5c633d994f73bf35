//! See `pcpu_fuzzed::audited`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| pcpu_fuzzed::audited(data));
