//! See `pcpu_fuzzed::unit_plan`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| pcpu_fuzzed::unit_plan(data));
