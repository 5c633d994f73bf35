//! Every input of `fuzz/corpus/` once more, and each with some thousand changes.

use std::fs;
use std::path::{Path, PathBuf};

use pcpu_fuzzed::TARGETS;

/// Changes of each target's inputs, spread over these.
const CHANGES: usize = 4000;

/// A generator of numbers that always gives the same ones.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 20) as usize % end.max(1)
    }
}

fn inputs(target: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus");
    let folder = fs::read_dir(root.join(target)).expect("every target has inputs");
    let paths = folder.map(|entry| entry.expect("it is readable").path());
    let mut paths: Vec<PathBuf> = paths.collect();
    paths.sort();
    let read = |path: PathBuf| {
        let bytes = fs::read(&path).expect("it is readable");
        (path, bytes)
    };
    paths.into_iter().map(read).collect()
}

/// Changes a few bytes, or cuts bytes out, or doubles some, or takes some of another input.
fn change(bytes: &[u8], other: &[u8], numbers: &mut Numbers) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for _ in 0..=numbers.below(4) {
        let at = numbers.below(bytes.len());
        let end = (at + 1 + numbers.below(16)).min(bytes.len());
        match numbers.below(7) {
            0 => bytes.truncate(at),
            1 => drop(bytes.drain(at.min(end)..end)),
            2 => {
                let again = bytes[at.min(end)..end].to_vec();
                bytes.splice(at..at, again);
            }
            3 => {
                let from = numbers.below(other.len());
                let some = &other[from..(from + 32).min(other.len())];
                bytes.splice(at..at, some.iter().copied());
            }
            4 if !bytes.is_empty() => bytes[at] = [0, 1, 0x7f, 0x80, 0xff][numbers.below(5)],
            _ if !bytes.is_empty() => bytes[at] ^= 1 << numbers.below(8),
            _ => {}
        }
    }
    bytes
}

#[test]
fn every_input_is_answered() {
    for (target, run) in TARGETS {
        let inputs = inputs(target);
        assert!(!inputs.is_empty(), "{target}");
        for (path, bytes) in &inputs {
            println!("{}", path.display());
            run(bytes);
        }
    }
}

#[test]
fn every_change_of_an_input_is_answered() {
    for (target, run) in TARGETS {
        let inputs = inputs(target);
        let mut numbers = Numbers(0x9e37_79b9_7f4a_7c15);
        for nth in 0..CHANGES {
            let (path, bytes) = &inputs[nth % inputs.len()];
            let (_, other) = &inputs[numbers.below(inputs.len())];
            let changed = change(bytes, other, &mut numbers);
            println!("change {nth}, of {}", path.display());
            run(&changed);
        }
    }
}
