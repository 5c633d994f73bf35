//! Modules whose code lies out of the reach of 32 bits: those that are made for it are loaded, others are refused by name. No
//! number in an object overflows.

use pcpu_fuzzed::Arena;
use pcpu_fuzzed::object::{At, Loaded, NAMELESS, ObjectError};

/// Made for 32 bits: it counts in MODULE_HITS, its own, and in SHARED_HITS.
static COUNTER: &[u8] = include_bytes!("../../../fuzz/corpus/object/counter.o");

/// Made for 32 bits: a handle as a constant of an instruction.
static READER: &[u8] = include_bytes!("../../../fuzz/corpus/object/reader.o");

/// Made for 64 bits: it counts in FAR_HITS, its own, and in SHARED_HITS.
static FAR: &[u8] = include_bytes!("../../../fuzz/corpus/object/far.o");

const SHARED_HITS: usize = 0x800;

const FAR_AWAY: usize = 1 << 40;

/// As far as 32 bits reach up.
const LIMIT: i64 = 0x7fff_ffff;

/// The object with one piece of it changed.
#[track_caller]
fn changed(object: &[u8], from: &[u8], to: &[u8]) -> Vec<u8> {
    assert_eq!(from.len(), to.len());
    let found: Vec<usize> = (0..object.len())
        .filter(|&at| object[at..].starts_with(from))
        .collect();
    let [at] = found[..] else {
        panic!("it is there {} times", found.len())
    };
    let mut object = object.to_vec();
    object[at..at + to.len()].copy_from_slice(to);
    object
}

#[test]
fn far_code_is_relocated_by_64_bits() {
    for code in [0x4000_0000, FAR_AWAY, usize::MAX - (1 << 20)] {
        let mut home = Arena::new(code, 0);
        let module = Loaded::load(FAR, &mut home).expect("it reaches everything");
        let own = module.symbol(&home, "FAR_HITS").unwrap();
        let hit = module.symbol(&home, "far_hit").unwrap();
        assert_eq!(hit, code);
        assert_eq!(home.word(own), Some(2000), "the initial value");
        // The second number of a table of the module, 8 bytes after its beginning.
        let step = home.word(hit + 2).unwrap() as usize;
        assert_eq!(home.word(step), Some(2));
        assert_eq!(home.word(hit + 0xf), Some(own as u64));
        assert_eq!(home.word(hit + 0x19), Some(SHARED_HITS as u64));
        drop(module);
        assert_eq!(home.sections().count(), 0);
    }
}

#[test]
fn what_is_out_of_reach_is_named() {
    let mut home = Arena::new(FAR_AWAY, 0);
    let error = Loaded::load(COUNTER, &mut home).unwrap_err();
    assert_eq!(home.sections().count(), 0, "something is left of it");
    let ObjectError::OutOfReach {
        symbol,
        at,
        place,
        value,
        limit,
    } = error
    else {
        panic!("{error}")
    };
    // Its code is section 3, its variable lies 26 bytes on: so long is the code.
    let here = FAR_AWAY + 4;
    let (section, offset) = (3, 4);
    assert_eq!((symbol, at), ("MODULE_HITS", At { section, offset }));
    assert_eq!((place, limit), (here, LIMIT));
    assert_eq!(value, 0x1000 + 26 - 4 - here as i64);
    let told = error.to_string();
    for text in ["section 3, offset 0x4", "MODULE_HITS", "0x10000000004"] {
        assert!(told.contains(text), "{text}: {told}");
    }
    assert!(told.contains("0x7fffffff"), "{told}");
}

/// The instruction that is farthest from what it uses counts in SHARED_HITS, from place 0xc, with an addend of -5.
#[test]
fn reach_ends_where_32_bits_do() {
    let last = (1 << 31) + SHARED_HITS - 5 - 0xc;
    let mut home = Arena::new(last, 0);
    let module = Loaded::load(COUNTER, &mut home).expect("it just reaches");
    let relative = home.word(last + 0xc).unwrap() as u32;
    assert_eq!(relative as i32, i32::MIN);
    drop(module);

    let mut home = Arena::new(last + 1, 0);
    let error = Loaded::load(COUNTER, &mut home).unwrap_err();
    let ObjectError::OutOfReach { symbol, value, .. } = error else {
        panic!("{error}")
    };
    let beyond = i64::from(i32::MIN) - 1;
    assert_eq!((symbol, value), ("SHARED_HITS", beyond));
}

#[test]
fn handles_out_of_reach_are_named() {
    // They are constants, so it does not matter where the code is.
    let load = |object: &[u8], code, handles| {
        let mut home = Arena::new(code, handles);
        let loaded = Loaded::load(object, &mut home);
        loaded.map(drop).map_err(|error| error.to_string())
    };
    assert_eq!(load(READER, FAR_AWAY, 0), Ok(()));
    let told = load(READER, 0, 1 << 31).unwrap_err();
    assert!(
        told.contains("MODULE_HITS") && told.contains("0x80000900"),
        "{told}"
    );

    // Symbol 2 is the section of the code, which has no name.
    let nameless = changed(
        READER,
        &0x4_0000_000b_u64.to_le_bytes(),
        &0x2_0000_000b_u64.to_le_bytes(),
    );
    assert_eq!(load(&nameless, 0x4000_0000, 0), Ok(()));
    let told = load(&nameless, FAR_AWAY, 0).unwrap_err();
    assert!(
        told.contains(NAMELESS) && told.contains("0x10000000000"),
        "{told}"
    );

    let two_lines = changed(COUNTER, b"MODULE_HITS\0", b"MODULE\nHITS\0");
    let told = load(&two_lines, FAR_AWAY, 0).unwrap_err();
    assert!(
        told.contains("MODULE\\nHITS") && !told.contains('\n'),
        "{told}"
    );
}

/// Sums of what an object says wrap around: they end out of reach, or somewhere in it.
#[test]
fn numbers_at_the_ends_are_answered() {
    let entry = |addend: i64| [0x5_0000_0002_u64.to_le_bytes(), addend.to_le_bytes()].concat();
    for addend in [i64::MIN, i64::MAX, i64::MAX - SHARED_HITS as i64] {
        let object = changed(COUNTER, &entry(-5), &entry(addend));
        for code in [0, usize::MAX - (1 << 20)] {
            let mut home = Arena::new(code, 0);
            let error = Loaded::load(&object, &mut home).unwrap_err();
            let ObjectError::OutOfReach { symbol, .. } = error else {
                panic!("{error}")
            };
            assert_eq!(symbol, "SHARED_HITS");
        }
    }
    // An object, for all to use, in section 5.
    let symbol = |value: u64| [[0x11, 0, 5, 0].as_slice(), &value.to_le_bytes()].concat();
    let object = changed(COUNTER, &symbol(0), &symbol(u64::MAX));
    let mut home = Arena::new(0, 0);
    let module = Loaded::load(&object, &mut home).expect("it lies a byte before its section");
    assert_eq!(module.symbol(&home, "MODULE_HITS"), Some(0x1000 + 26 - 1));
}
