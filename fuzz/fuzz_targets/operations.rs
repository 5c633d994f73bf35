//! See `pcpu_fuzzed::operations`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| pcpu_fuzzed::operations(data));
