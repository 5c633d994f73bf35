//! See `pcpu_fuzzed::read_trace`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| pcpu_fuzzed::read_trace(data));
