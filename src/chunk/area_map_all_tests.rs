//! Every small map: every set of used blocks, every area that can be taken, every one that can be freed, with every
//! visibility of the pages, against a recount of everything that the map knows.
//!
//! A page holds at least a word of granules, so that the maps are made of blocks of uneven lengths whose borders are
//! where words and pages begin and end, and beside them. A map is a set of blocks that are used, each an area.

use super::tests::map_of;
use super::*;
use std::vec::Vec;

const PAGE: u32 = 64;

/// The blocks of maps whose pages are cut at these granules.
fn blocks(pages: u32, cuts: &[u32]) -> Vec<Range<u32>> {
    let starts = (0..pages).flat_map(|page| cuts.iter().map(move |cut| page * PAGE + cut));
    let ends = starts.clone().skip(1).chain([pages * PAGE]);
    starts.zip(ends).map(|(start, end)| start..end).collect()
}

fn take(map: &mut AreaMap, area: &Range<u32>) {
    map.take(area.start, area.end - area.start);
}

/// Whether block `at` of a map is used.
fn is_used(used: u32, at: usize) -> bool {
    used >> at & 1 != 0
}

/// Takes and frees everything that can be, each time back to the map that it was.
fn check_changes(map: &mut AreaMap, blocks: &[Range<u32>], used: u32) {
    for first in 0..blocks.len() {
        if is_used(used, first) {
            let area = blocks[first].clone();
            assert_eq!(map.release(area.start).map(|it| it.end), Ok(area.end));
            map.check();
            take(map, &area);
            continue;
        }
        let free = (first..blocks.len()).take_while(|&last| !is_used(used, last));
        for last in free {
            let area = blocks[first].start..blocks[last].end;
            if map.pages_of(area.clone()).any(|page| map.is_vacant(page)) {
                // Pages are claimed, and hidden by that, before an area is taken in them.
                break;
            }
            take(map, &area);
            map.check();
            let interior = (area.len() > 1).then(|| map.area_at(area.end - 1));
            assert!(interior.is_none_or(|it| it == Err(NoArea::Interior(area.start))));
            assert_eq!(map.release(area.start).map(|it| it.end), Ok(area.end));
        }
    }
    map.check();
}

/// Searches find the lowest place, by the definition.
fn check_searches(map: &mut AreaMap) {
    let runs = map.runs_seen(|page| map.is_ready(page));
    for len in [1, 2, 3, 30, 31, 32, 33, 62, 63, 64, 65, 95, 128, 129, 192] {
        for align in [1, 2, 32, 64] {
            let fits = runs.iter().find_map(|run| {
                let start = run.start.next_multiple_of(align);
                (start + len <= run.end).then_some(start)
            });
            let found = map.find(len, align, Effort::Exhaustive);
            assert_eq!(found, fits, "{len} {align} {runs:?}");
        }
    }
}

/// Calls `test` with every map of these blocks, and with the set of its used ones.
fn for_all_maps(pages: u32, blocks: &[Range<u32>], mut test: impl FnMut(&mut AreaMap, u32)) {
    let mut map = map_of(pages, PAGE, 0..pages * PAGE);
    let mut used = 0_u32;
    for number in 0..1_u32 << blocks.len() {
        // By a Gray code, so that each map is one change from the last.
        let next = number ^ number >> 1;
        let change = (used ^ next).trailing_zeros() as usize;
        if number > 0 {
            let block = &blocks[change];
            match is_used(next, change) {
                true => take(&mut map, block),
                false => assert!(map.release(block.start).is_ok()),
            }
        }
        used = next;
        test(&mut map, used);
    }
}

#[test]
fn all_maps_of_three_pages() {
    let blocks = blocks(3, &[0, 1, 31, 33, 63]);
    assert_eq!(blocks.len(), 15);
    for_all_maps(3, &blocks, |map, used| {
        check_searches(map);
        check_changes(map, &blocks, used);
    });
}

#[test]
fn all_maps_of_five_pages() {
    let blocks = blocks(5, &[0, 1, 63]);
    assert_eq!(blocks.len(), 15);
    for_all_maps(5, &blocks, |map, used| {
        check_searches(map);
        // Halves of what three pages show already.
        if used.count_ones() % 2 == 0 {
            check_changes(map, &blocks, used);
        }
    });
}

/// Has searches see `pages` like that: an area that touches a page keeps it from being vacant.
fn set_visibility(map: &mut AreaMap, pages: Range<u32>, seen: Visibility) {
    for page in pages {
        let mut granules = map.granules_of(page);
        let is_touched = granules.any(|granule| bitmap::get(&map.marks.occupied(), granule));
        let seen = match seen {
            Visibility::Vacant if is_touched => Visibility::Hidden,
            seen => seen,
        };
        map.set_visibility(page..page + 1, seen);
    }
}

#[test]
fn all_visibilities_of_three_pages() {
    let blocks = blocks(3, &[0, 1, 63]);
    let all = [Visibility::Ready, Visibility::Vacant, Visibility::Hidden];
    for number in 0..27 {
        for_all_maps(3, &blocks, |map, used| {
            for page in 0..3 {
                let seen = all[number / 3_usize.pow(page) % 3];
                set_visibility(map, page..page + 1, seen);
            }
            check_searches(map);
            check_changes(map, &blocks, used);
            for pages in [0..1, 1..2, 2..3, 0..2, 1..3, 0..3] {
                for seen in all {
                    set_visibility(map, pages.clone(), seen);
                    map.check();
                }
            }
            // Hidden, so that the next map may be made of this one in every page.
            map.set_visibility(0..3, Visibility::Hidden);
        });
    }
}
