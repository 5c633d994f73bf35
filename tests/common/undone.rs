//! What a request changes that the backing could not serve: no area.

use crate::audit::{Picture, Section};

/// Panics unless a request that the backing failed left all areas alone. What it may leave behind is what the upkeep
/// would have done as well: a spare chunk more, empty pages given back.
pub fn assert_undone(before: &Picture, after: &Picture, page_bytes: usize) {
    assert_eq!(before.areas, after.areas);
    let counters = |picture: &Picture| {
        let stats = picture.stats;
        (
            (stats.allocs, stats.frees, stats.live, stats.live_bytes),
            (stats.live_peak, stats.live_peak_bytes),
            (stats.smallest_bytes, stats.largest_bytes),
            (stats.sizes, stats.live_sizes, stats.spare_target),
        )
    };
    assert_eq!(counters(before), counters(after));
    let key = |section: &Section| (section.place, section.region.start);
    for old in &before.sections {
        let new = after
            .sections
            .iter()
            .find(|section| key(section) == key(old))
            .unwrap_or_else(|| panic!("the chunk at {} is gone", old.place));
        assert_eq!(old.free, new.free);
        assert!(new.pages.is_subset(&old.pages), "{old:?} {new:?}");
        assert!(old.used_pages(page_bytes).is_subset(&new.pages));
    }
    let is_new = |new: &&Section| !before.sections.iter().any(|old| key(old) == key(new));
    let new: Vec<_> = after.sections.iter().filter(is_new).collect();
    assert!(
        new.len() <= 1 && new.iter().all(|section| section.is_spare()),
        "chunks more: {new:?}"
    );
}
