//! Every function on every small bitmap, against its definition: 14 bits within a word, at its end, and over the border
//! of two words, with nothing but set or nothing but clear bits around them.

use super::*;
use std::vec::Vec;

const BITS: u32 = 14;

/// Where the bits lie in two words: over the border, at an end, in the middle.
const PLACES: [u32; 4] = [0, 29, WORD - 7, 2 * WORD - BITS];

/// Bits around the pattern that may tell: where a function looks too far.
const MARGIN: u32 = 3;

fn for_all(mut test: impl FnMut([u64; 2], u32)) {
    for pattern in 0..1_u64 << BITS {
        for at in PLACES {
            for around in [0, u128::MAX] {
                let window = ((1_u128 << BITS) - 1) << at;
                let bits = around & !window | u128::from(pattern) << at;
                test([bits as u64, (bits >> WORD) as u64], at);
            }
        }
    }
}

/// The maximal runs of clear bits.
fn runs(words: &[u64]) -> Vec<Range<u32>> {
    let mut runs: Vec<Range<u32>> = Vec::new();
    for at in (0..words.len() as u32 * WORD).filter(|&at| !get(words, at)) {
        match runs.last_mut() {
            Some(run) if run.end == at => run.end += 1,
            _ => runs.push(at..at + 1),
        }
    }
    runs
}

#[test]
fn find() {
    for_all(|words, _| {
        let runs = runs(&words);
        for len in [
            1, 2, 3, 4, 5, 6, 7, 8, 11, 13, 14, 33, 64, 65, 100, 128, 129,
        ] {
            for align in [1, 2, 4, 8, 64] {
                let fits = runs.iter().find_map(|run| {
                    let start = run.start.next_multiple_of(align);
                    (start + len <= run.end).then_some(start)
                });
                assert_eq!(
                    super::find(&words, len, align),
                    fits,
                    "{words:x?} {len} {align}"
                );
            }
        }
    });
}

#[test]
fn searches() {
    for_all(|words, at| {
        let window = at.saturating_sub(MARGIN)..(at + BITS + MARGIN).min(2 * WORD);
        let (low, high) = (window.start, window.end);
        let (mut next_set_at, mut next_clear_at) = (high, high);
        for from in (low..=high).rev() {
            if from < high {
                match get(&words, from) {
                    true => next_set_at = from,
                    false => next_clear_at = from,
                }
            }
            assert_eq!(next_set(&words, from..high), next_set_at, "{words:x?}");
            assert_eq!(next_clear(&words, from..high), next_clear_at, "{words:x?}");
        }
        let mut start = low;
        for end in low..=high {
            if end > low && get(&words, end - 1) {
                start = end;
            }
            assert_eq!(
                run_start(&words, low..end),
                start,
                "{words:x?} {low}..{end}"
            );
        }
    });
}

#[test]
fn changes() {
    for_all(|words, at| {
        let end = (at + BITS).min(2 * WORD);
        for range in [at..end, at + 1..end, at..end - 1, at + 6..at + 8, at..at] {
            let inside = |bit| range.contains(&bit);
            let mut changed = words;
            set(&mut changed, range.clone());
            assert!(
                (0..2 * WORD).all(|bit| get(&changed, bit) == (inside(bit) || get(&words, bit)))
            );
            let mut changed = words;
            clear(&mut changed, range.clone());
            assert!(
                (0..2 * WORD).all(|bit| get(&changed, bit) == (!inside(bit) && get(&words, bit)))
            );
        }
    });
}

#[test]
fn enclosing_runs() {
    for_all(|[word, _], at| {
        if at + BITS > WORD {
            return;
        }
        for start in at..at + BITS {
            for end in start + 1..=at + BITS {
                let below = (0..start)
                    .rev()
                    .take_while(|&bit| !get(&[word], bit))
                    .count() as u32;
                let above = (end..WORD).take_while(|&bit| !get(&[word], bit)).count() as u32;
                let is_shown = below < start && end + above < WORD;
                let mut bits = [0];
                set(&mut bits, start..end);
                assert_eq!(
                    enclosed(word, start, end - start),
                    is_shown.then_some((bits[0], (below, above))),
                    "{word:x} {start}..{end}"
                );
            }
        }
    });
}
