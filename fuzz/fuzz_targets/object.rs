//! See `pcpu_fuzzed::load_object`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| pcpu_fuzzed::load_object(data));
