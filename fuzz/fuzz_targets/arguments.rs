//! See `pcpu_fuzzed::layout_arguments`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| pcpu_fuzzed::layout_arguments(data));
