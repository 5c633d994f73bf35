//! Tables of before / requests / after, and random operations against a recount.

use super::*;
use std::alloc::{alloc, handle_alloc_error};
use std::format;
use std::string::String;
use std::vec::Vec;

const PAGE: u32 = 1024;

pub(super) fn map_of(pages: u32, granules_per_page: u32, region: Range<u32>) -> AreaMap {
    let mut block = BlockLayout::new();
    let layout = AreaMapLayout::add(&mut block, pages, granules_per_page).unwrap();
    let memory = block.finish();
    // SAFETY: the layout is not empty; the block is leaked, so the map may live for ever.
    let block = core::ptr::NonNull::new(unsafe { alloc(memory) })
        .unwrap_or_else(|| handle_alloc_error(memory));
    // SAFETY: `block` has the layout that the map was added to and belongs to the map alone.
    unsafe { AreaMap::new(block, &layout, region, Visibility::Ready) }
}

impl AreaMap {
    fn is_free(&self, granule: u32) -> bool {
        !bitmap::get(&self.marks.occupied(), granule)
    }

    /// Granules whose visibility is among `seen`, as maximal runs of free ones.
    pub(super) fn runs_seen(&self, seen: impl Fn(u32) -> bool) -> Vec<Range<u32>> {
        let mut runs: Vec<Range<u32>> = Vec::new();
        for granule in 0..self.end() {
            if !self.is_free(granule) || !seen(self.page_len.page(granule)) {
                continue;
            }
            match runs.last_mut() {
                Some(run) if run.end == granule => run.end += 1,
                _ => runs.push(granule..granule + 1),
            }
        }
        runs
    }

    /// Compares what growing searches are told with a walk over all granules.
    fn check_growing(&self) {
        let runs = self.runs_seen(|page| self.is_ready(page) || self.is_vacant(page));
        let has_vacant =
            |run: &Range<u32>| self.pages_of(run.clone()).any(|page| self.is_vacant(page));
        let longest = runs.iter().filter(|run| has_vacant(run)).map(Range::len);
        // A search for more than there is tells what there is.
        let longest = longest.max().unwrap_or(0) as u32;
        assert_eq!(self.find_growing(self.end() + 1, 1), Err(longest));
        for ready in self.runs_seen(|page| self.is_ready(page)) {
            let is_longer = runs
                .iter()
                .any(|run| run.start <= ready.start && ready.end <= run.end && *run != ready);
            let is_vacant_beside = self.runs.neighbours(&ready) == Neighbours::SomeVacant;
            assert_eq!(is_vacant_beside, is_longer, "{ready:?}");
        }
        let mut stretch = 0;
        let stretches = (0..self.pages()).map(|page| {
            stretch = if self.is_vacant(page) { stretch + 1 } else { 0 };
            stretch
        });
        let longest = stretches.max().unwrap_or(0);
        assert_eq!(self.longest_vacant_pages(), longest);
    }
}

/// Frees an area; returns its granules.
fn give_back(map: &mut AreaMap, start: u32) -> Result<Range<u32>, NoArea> {
    map.release(start).map(|released| start..released.end)
}

fn whole_map(pages: u32) -> AreaMap {
    map_of(pages, PAGE, 0..pages * PAGE)
}

impl AreaMap {
    /// Compares every record with a recount.
    pub(crate) fn check(&self) {
        let free: u32 = self.free_runs().map(|run| run.end - run.start).sum();
        assert_eq!(free, self.free_granules);
        let runs = self.runs_seen(|page| self.is_ready(page));
        self.runs.check(&runs);
        for page in 0..self.pages() {
            let mut granules = self.page_len.granules(page..page + 1);
            let is_untouched = granules.all(|granule| self.is_free(granule));
            assert!(
                !(self.is_ready(page) && self.is_vacant(page)),
                "page {page}"
            );
            assert_eq!(
                self.is_open(page),
                self.is_ready(page) && is_untouched,
                "page {page}"
            );
        }
        self.check_growing();
        let longest = runs.iter().map(Range::len).max();
        assert!(self.longest() as usize >= longest.unwrap_or(0));
    }
}

/// Takes everything but `free`, so that a search sees exactly these runs.
fn with_free(pages: u32, free: &[(u32, u32)]) -> AreaMap {
    let mut map = whole_map(pages);
    let mut at = 0;
    for &(start, end) in free {
        if start > at {
            map.take(at, start - at);
        }
        at = end;
    }
    if at < pages * PAGE {
        map.take(at, pages * PAGE - at);
    }
    map.check();
    map
}

#[test]
fn searches() {
    // (what, pages, free runs, length, alignment, found)
    type Row = (
        &'static str,
        u32,
        &'static [(u32, u32)],
        u32,
        u32,
        Option<u32>,
    );
    let rows: &[Row] = &[
        ("empty map", 4, &[(0, 4096)], 1, 1, Some(0)),
        ("all of it", 4, &[(0, 4096)], 4096, 1024, Some(0)),
        ("one more than all", 4, &[(0, 4096)], 4097, 1, None),
        ("full map", 4, &[], 1, 1, None),
        (
            "only one full page between",
            3,
            &[(0, 1024), (2048, 3072)],
            1025,
            1,
            None,
        ),
        ("exact hole", 2, &[(100, 103), (500, 510)], 3, 1, Some(100)),
        (
            "hole too short",
            2,
            &[(100, 103), (500, 510)],
            4,
            1,
            Some(500),
        ),
        (
            "straddles a page border",
            2,
            &[(1020, 1030)],
            10,
            1,
            Some(1020),
        ),
        (
            "straddles, aligned up over the border",
            2,
            &[(1021, 1032)],
            8,
            8,
            Some(1024),
        ),
        (
            "straddles, does not fit once aligned",
            2,
            &[(1021, 1030)],
            8,
            8,
            None,
        ),
        (
            "straddles three pages",
            4,
            &[(1000, 3100)],
            2100,
            1,
            Some(1000),
        ),
        (
            "straddles a group of eight",
            16,
            &[(8190, 8195)],
            5,
            1,
            Some(8190),
        ),
        (
            "straddles a group, aligned",
            16,
            &[(8190, 8195)],
            2,
            4,
            Some(8192),
        ),
        (
            "straddles many groups",
            64,
            &[(8000, 40000)],
            32000,
            1,
            Some(8000),
        ),
        (
            "lowest of two",
            64,
            &[(2000, 2010), (60000, 60010)],
            10,
            1,
            Some(2000),
        ),
        ("page alignment", 4, &[(1, 4096)], 5, 1024, Some(1024)),
        (
            "page alignment, a hole that holds none",
            4,
            &[(1, 1024), (2050, 3071)],
            5,
            1024,
            None,
        ),
        (
            "alignment hole before a good one",
            4,
            &[(1, 8), (1026, 1039)],
            4,
            8,
            Some(1032),
        ),
        ("last granule", 4, &[(4095, 4096)], 1, 1, Some(4095)),
        (
            "longer than a word, over a page border",
            2,
            &[(900, 1100)],
            200,
            1,
            Some(900),
        ),
        (
            "longer than a word, aligned",
            2,
            &[(900, 1200)],
            128,
            64,
            Some(960),
        ),
    ];
    for (what, pages, free, len, align, found) in rows {
        let mut map = with_free(*pages, free);
        assert_eq!(map.find(*len, *align, Effort::Bounded), *found, "{what}");
        if let Some(start) = *found {
            map.take(start, *len);
            map.check();
            assert_eq!(give_back(&mut map, start), Ok(start..start + len), "{what}");
            map.check();
        }
    }
}

#[test]
fn alignment_that_no_hole_serves_is_settled_by_a_run_that_fits_anywhere() {
    // Every other granule of 60 pages free: 4-byte holes at odd places only, and one good run at the end.
    let mut map = whole_map(64);
    for granule in (0..61440).step_by(2) {
        map.take(granule, 1);
    }
    map.check();
    assert_eq!(map.find(1, 1, Effort::Bounded), Some(1));
    assert_eq!(map.find(1, 2, Effort::Bounded), Some(61440));
    assert_eq!(map.find(2, 2, Effort::Bounded), Some(61440));
}

#[test]
fn hidden_pages_are_not_found() {
    let mut map = whole_map(4);
    map.set_visibility(0..1, Visibility::Hidden);
    map.set_visibility(2..3, Visibility::Hidden);
    map.check();
    assert_eq!(map.find(1, 1, Effort::Bounded), Some(1024));
    assert_eq!(map.find(1025, 1, Effort::Bounded), None);
    map.set_visibility(0..4, Visibility::Ready);
    map.check();
    assert_eq!(map.find(4096, 1, Effort::Bounded), Some(0));
}

#[test]
fn areas_come_and_go_in_hidden_pages() {
    let mut map = whole_map(2);
    for start in [0, 10, 20, 30] {
        map.take(start, 10);
    }
    map.set_visibility(0..1, Visibility::Hidden);
    assert_eq!(give_back(&mut map, 10), Ok(10..20));
    map.check();
    map.take(12, 3);
    map.check();
    map.set_visibility(0..1, Visibility::Ready);
    map.check();
    assert_eq!(map.find(5, 1, Effort::Bounded), Some(15));
}

#[test]
fn a_page_may_not_know_where_its_longest_run_is() {
    // Two runs of 200 granules; one of them is cut, and an area ends where the number that says so would seem to.
    let mut map = whole_map(2);
    for area in [0..199, 199..300, 500..600, 800..2048] {
        map.take(area.start, area.end - area.start);
    }
    map.take(300, 10);
    map.check();
    let released = map.release(199).map(|released| released.end);
    assert_eq!(released, Ok(300));
    map.check();
    assert_eq!(map.find(101, 1, Effort::Bounded), Some(199));
}

#[test]
fn growing_takes_the_fewest_vacant_pages() {
    // (what, vacant pages, free runs, length, alignment, found)
    type Row = (
        &'static str,
        &'static [u32],
        &'static [(u32, u32)],
        u32,
        u32,
        Option<u32>,
    );
    let rows: &[Row] = &[
        ("all vacant", &[0, 1, 2, 3], &[(0, 4096)], 5, 1, Some(0)),
        (
            "starts in the tail of a page",
            &[2],
            &[(2000, 3072)],
            100,
            1,
            Some(2000),
        ),
        (
            "the tail does not suit the alignment",
            &[2],
            &[(2001, 3072)],
            1000,
            1024,
            Some(2048),
        ),
        (
            "ends in the head of a page",
            &[1],
            &[(1024, 2148)],
            1100,
            1,
            Some(1024),
        ),
        (
            "one vacant page rather than two",
            &[0, 1, 3],
            &[(0, 2048), (2500, 4096)],
            1500,
            1,
            Some(2500),
        ),
        (
            "lowest of two alike",
            &[1, 3],
            &[(1024, 2048), (3072, 4096)],
            7,
            1,
            Some(1024),
        ),
        ("too long", &[1, 2], &[(1024, 3080)], 2057, 1, None),
        ("nothing vacant, nothing free", &[], &[], 1, 1, None),
    ];
    for (what, vacant, free, len, align, found) in rows {
        let mut map = with_free(4, free);
        for &page in *vacant {
            map.set_visibility(page..page + 1, Visibility::Vacant);
        }
        map.check();
        assert_eq!(map.find_growing(*len, *align).ok(), *found, "{what}");
    }
    let mut map = with_free(4, &[(0, 4096)]);
    map.set_visibility(0..4, Visibility::Hidden);
    assert_eq!(
        map.find_growing(1, 1),
        Err(0),
        "hidden pages are not grown into"
    );
}

#[test]
fn a_region_need_not_fill_its_pages() {
    let mut map = map_of(3, PAGE, 10..3000);
    map.check();
    assert_eq!(map.find(1, 1, Effort::Bounded), Some(10));
    assert_eq!(map.find(2990, 1, Effort::Bounded), Some(10));
    assert_eq!(map.area_at(0), Err(NoArea::Free));
    assert_eq!(map.area_at(3071), Err(NoArea::Free));
    map.take(10, 2990);
    map.check();
    assert_eq!(map.longest(), 0);
    assert_eq!(map.area_at(11), Err(NoArea::Interior(10)));
    assert_eq!(give_back(&mut map, 10), Ok(10..3000));
    map.check();
}

#[test]
fn wrong_releases_change_nothing() {
    let mut map = whole_map(2);
    map.take(100, 10);
    map.take(110, 10);
    let before = format!("{map:?}");
    let tries: &[(u32, NoArea)] = &[
        (99, NoArea::Free),
        (101, NoArea::Interior(100)),
        (119, NoArea::Interior(110)),
        (120, NoArea::Free),
    ];
    for (start, why) in tries {
        assert_eq!(give_back(&mut map, *start), Err(*why));
    }
    assert_eq!(before, format!("{map:?}"));
    assert_eq!(give_back(&mut map, 100), Ok(100..110));
    assert_eq!(give_back(&mut map, 100), Err(NoArea::Free));
    assert_eq!(give_back(&mut map, 110), Ok(110..120));
    map.check();
}

#[test]
fn random_operations_keep_the_records_right() {
    for (pages, granules_per_page) in [
        (1, 1024),
        (5, 1024),
        (64, 1024),
        (70, 64),
        (600, 64),
        (3, 16384),
    ] {
        let mut state = 0x1234_5678_9abc_def1_u64 ^ u64::from(pages);
        let mut next = move |below: u32| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 33) as u32 % below
        };
        let mut map = map_of(pages, granules_per_page, 0..pages * granules_per_page);
        let mut live: Vec<Range<u32>> = Vec::new();
        for round in 0..3000_u32 {
            let grow = if round / 500 % 2 == 0 { 3 } else { 1 };
            if next(4) < grow {
                let len = [1, 2, 4, 16, 100, 500, granules_per_page][next(7) as usize]
                    .min(granules_per_page * pages);
                let align = (1 << next(7)).min(granules_per_page);
                match map.find(len, align, Effort::Bounded) {
                    Some(start) => {
                        assert_eq!(start % align, 0);
                        map.take(start, len);
                        live.push(start..start + len);
                    }
                    None => assert!(map.longest() < len + align - 1),
                }
            } else if !live.is_empty() {
                let area = live.swap_remove(next(live.len() as u32) as usize);
                assert_eq!(give_back(&mut map, area.start), Ok(area));
            }
            // Now and then a page is out of sight for a while.
            if round % 40 == 0 || round % 40 == 15 {
                let page = round / 40 % pages;
                map.set_visibility(
                    page..page + 1,
                    match round % 40 {
                        0 => Visibility::Hidden,
                        _ => Visibility::Ready,
                    },
                );
            }
            if round % 50 == 0 {
                map.check();
            }
        }
        map.check();
        live.sort_by_key(|area| area.start);
        assert!(map.areas().eq(live.iter().cloned()));
        let text: String = live.iter().map(|area| format!("{area:?} ")).collect();
        for area in live {
            assert_eq!(give_back(&mut map, area.start), Ok(area), "{text}");
        }
        map.check();
        assert_eq!(map.longest(), pages * granules_per_page);
    }
}

/// Areas of all lengths, some freed, some of these kept: their granules become free, page by page, and no others.
#[test]
fn a_sweep_frees_what_was_freed_and_is_not_kept() {
    for seed in 1..200_u64 {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut next = move |below: u32| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 33) as u32 % below
        };
        let mut map = map_of(4, 256, 0..1024);
        // Kept are those that start at odd granules.
        let keeps = next(2) == 1;
        let (mut left, mut gone) = (Vec::new(), 0);
        let mut at = 0;
        while at < 1024 {
            let len = [1, 3, 31, 32, 33, 64, 100, 300][next(8) as usize].min(1024 - at);
            map.take(at, len);
            let is_freed = next(3) > 0;
            if is_freed {
                assert!(map.marks.end(at));
                map.marks.note_page_of(at);
            }
            match is_freed && !(keeps && at % 2 == 1) {
                true => gone += len,
                false => left.push(at..at + len),
            }
            at += len + next(2) * next(5);
        }
        let mut swept = 0;
        while let Some(page) = map.next_freed_page(0..4) {
            let kept = |_, freed| if keeps { freed & 0xaaaa_aaaa } else { 0 };
            map.sweep_page(page, kept, |len| swept += len);
        }
        assert_eq!(swept, gone, "seed {seed}");
        map.check();
        for area in left {
            assert_eq!(map.marks.area_end(area.start), area.end, "seed {seed}");
        }
    }
}

/// Of areas one behind the other, those that are freed are found, and made live again, whatever words they lie in.
#[test]
fn freed_areas_are_made_live_again_all_at_once() {
    for len in [1, 2, 3, 7, 16, 31, 32, 33, 64, 100] {
        for (start, seed) in [
            (0, 0x5a5a_1234_u32),
            (13, 0x8000_0001),
            (31, u32::MAX),
            (5, 0),
        ] {
            let count = ((1024 - start) / len).min(32);
            let mut map = map_of(4, 256, 0..1024);
            let area = |slot: u32| start + slot * len;
            (0..count).for_each(|slot| _ = map.take(area(slot), len));
            let all = u32::MAX >> (32 - count);
            let freed = seed.rotate_left(len) & all;
            (0..count)
                .filter(|slot| freed >> slot & 1 != 0)
                .for_each(|slot| assert!(map.marks.end(area(slot))));
            let found = map.marks.freed_among(start, len, count);
            assert_eq!(found, freed, "{len} {start}");
            assert_eq!(map.marks.reuse_among(start, len, count), freed);
            assert_eq!(map.marks.freed_among(start, len, count), 0);
            assert_eq!(map.marks.reuse_among(start, len, count), 0);
            for slot in 0..count {
                assert!(
                    map.marks
                        .live_len(area(slot))
                        .is_some_and(|(found, _)| found == len)
                );
            }
            map.check();
        }
    }
    let map = map_of(4, 256, 0..1024);
    for beyond in [1023, 1024, u32::MAX] {
        assert_eq!(map.marks.freed_among(beyond, 64, 32), 0);
        assert_eq!(map.marks.reuse_among(beyond, 64, 32), 0);
    }
}
