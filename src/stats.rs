//! What can be seen of an allocator: counters, a histogram of sizes, the map of each chunk, and the event hook.
//!
//! The fields are those of Linux's `percpu_stats` and some that Linux lacks. All of them are snapshots taken under the
//! allocator's lock.

use core::fmt;
use core::ops::Range;

use crate::chunk::Body;
use crate::request::{AllocError, AllocFlags};
use crate::this_cpu::slots::ONE_TAKEN;
use crate::unit::GRANULE_BYTES;

/// Size classes of the histogram: up to 4 bytes, up to 8, ... each twice the one before; the last takes the rest.
pub const SIZE_CLASSES: usize = 20;

/// Counters of an allocator.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Stats {
    /// Length of a unit, in bytes.
    pub unit_bytes: usize,
    /// Length of the static region, in bytes.
    pub static_bytes: usize,
    /// Length of the reserved region, in bytes.
    pub reserved_bytes: usize,
    /// Length of the first chunk's dynamic region, in bytes.
    pub dyn_bytes: usize,
    /// The atom that the first chunk was allocated in, in bytes.
    pub atom_bytes: usize,
    /// One allocation of the first chunk, in bytes.
    pub alloc_bytes: usize,
    /// Areas handed out so far.
    pub allocs: u64,
    /// Areas freed so far.
    pub frees: u64,
    /// Live areas.
    pub live: u64,
    /// The most live areas ever. Where there are caches, areas count that were idle in them at the time.
    pub live_peak: u64,
    /// Bytes of live areas, sizes rounded up to the grain; those out of caches up to their alignment.
    pub live_bytes: u64,
    /// The most of these bytes ever.
    pub live_peak_bytes: u64,
    /// Smallest size ever handed out, in bytes; 0 if none was.
    pub smallest_bytes: usize,
    /// Largest size ever handed out, in bytes.
    pub largest_bytes: usize,
    /// Requests that no cache served, of an instance that has caches: the lock was taken for them. Requests for several areas at one go
    /// are not among them.
    pub cache_misses: u64,
    /// Times that the caches of all CPUs were emptied.
    pub cache_drains: u64,
    /// Areas that two CPUs freed at the same moment, one of them the one whose cache they are of: that was found out when the
    /// second looked again, or later.
    pub late_errors: u64,
    /// Requests refused.
    pub failures: u64,
    /// Of these, atomic ones.
    pub atomic_failures: u64,
    /// Chunks, the first one and the spare ones included.
    pub chunks: u32,
    /// The most chunks ever.
    pub chunks_peak: u32,
    /// Chunks made so far, not counting the first.
    pub chunks_created: u64,
    /// Chunks destroyed so far.
    pub chunks_destroyed: u64,
    /// Spare chunks: address space and metadata ready, no memory.
    pub spare_chunks: u32,
    /// How many spare chunks the upkeep keeps ready now.
    pub spare_target: u32,
    /// How often an atomic request found neither room nor a spare chunk.
    pub spare_shortfalls: u64,
    /// Pages of a unit that have memory, over all chunks, the first included.
    pub populated_pages: u64,
    /// The most of these pages ever.
    pub populated_peak_pages: u64,
    /// Of the populated pages, those without an area that can be given back.
    pub empty_pages: u64,
    /// Times that pages were populated, counted in pages.
    pub pages_populated: u64,
    /// Times that pages were given back, counted in pages.
    pub pages_depopulated: u64,
    /// Bytes of metadata in use.
    pub metadata_bytes: usize,
    /// The most of these bytes ever.
    pub metadata_peak_bytes: usize,
    /// Areas handed out so far, by size class: class `i` holds sizes up to `4 << i` bytes.
    pub sizes: [u64; SIZE_CLASSES],
    /// Live areas by size class.
    pub live_sizes: [u64; SIZE_CLASSES],
}

impl Stats {
    /// The class of a size in the histograms.
    #[inline]
    pub fn size_class(bytes: usize) -> usize {
        let below_last_granule = bytes.saturating_sub(1) / GRANULE_BYTES;
        let class = usize::BITS - below_last_granule.leading_zeros();
        (class as usize).min(SIZE_CLASSES - 1)
    }

    /// Notes that an area of `bytes`, as asked for, is handed out.
    #[inline]
    pub(crate) fn note_size(&mut self, bytes: usize) {
        self.largest_bytes = self.largest_bytes.max(bytes);
        // 0 counts as more than any.
        self.smallest_bytes = self.smallest_bytes.wrapping_sub(1).min(bytes - 1) + 1;
    }

    /// Counts `areas` of `bytes` each out of the live ones: they are in a cache.
    pub(crate) fn leave_out(&mut self, areas: u64, bytes: usize) {
        self.live -= areas;
        self.live_bytes -= areas * bytes as u64;
        self.live_sizes[Self::size_class(bytes)] -= areas;
    }

    /// Counts the areas of `bytes` each that a run has handed out, given the first word of its pair.
    pub(crate) fn count_taken(&mut self, slots: u64, bytes: usize) {
        self.count_allocs(slots / ONE_TAKEN, bytes);
    }

    /// Counts areas of so many bytes as handed out. What caches hand out is added late and may have been
    /// [uncounted](Self::uncount_allocs) by then: sums wrap, and are right when all is added.
    #[inline]
    pub(crate) fn count_allocs(&mut self, areas: u64, bytes: usize) {
        let class = Self::size_class(bytes);
        self.allocs = self.allocs.wrapping_add(areas);
        self.sizes[class] = self.sizes[class].wrapping_add(areas);
    }

    /// Undoes [`count_allocs`](Self::count_allocs), for areas that nobody was given in the end.
    pub(crate) fn uncount_allocs(&mut self, areas: u64, bytes: usize) {
        let class = Self::size_class(bytes);
        self.allocs = self.allocs.wrapping_sub(areas);
        self.sizes[class] = self.sizes[class].wrapping_sub(areas);
    }
}

impl fmt::Display for Stats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rows: [(&str, u64); 33] = [
            ("unit_size", self.unit_bytes as u64),
            ("static_size", self.static_bytes as u64),
            ("reserved_size", self.reserved_bytes as u64),
            ("dyn_size", self.dyn_bytes as u64),
            ("atom_size", self.atom_bytes as u64),
            ("alloc_size", self.alloc_bytes as u64),
            ("nr_alloc", self.allocs),
            ("nr_dealloc", self.frees),
            ("nr_cur_alloc", self.live),
            ("nr_max_alloc", self.live_peak),
            ("live_bytes", self.live_bytes),
            ("live_peak_bytes", self.live_peak_bytes),
            ("min_alloc_size", self.smallest_bytes as u64),
            ("max_alloc_size", self.largest_bytes as u64),
            ("cache_misses", self.cache_misses),
            ("cache_drains", self.cache_drains),
            ("late_errors", self.late_errors),
            ("nr_fail", self.failures),
            ("nr_fail_atomic", self.atomic_failures),
            ("nr_chunks", self.chunks.into()),
            ("nr_max_chunks", self.chunks_peak.into()),
            ("chunks_created", self.chunks_created),
            ("chunks_destroyed", self.chunks_destroyed),
            ("spare_chunks", self.spare_chunks.into()),
            ("spare_target", self.spare_target.into()),
            ("spare_shortfalls", self.spare_shortfalls),
            ("pop_pages", self.populated_pages),
            ("max_pop_pages", self.populated_peak_pages),
            ("empty_pop_pages", self.empty_pages),
            ("pages_populated", self.pages_populated),
            ("pages_depopulated", self.pages_depopulated),
            ("metadata_bytes", self.metadata_bytes as u64),
            ("metadata_peak_bytes", self.metadata_peak_bytes as u64),
        ];
        for (name, value) in rows {
            writeln!(f, "  {name:<20}: {value:>12}")?;
        }
        Ok(())
    }
}

/// Which part of an instance a chunk report is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ChunkKind {
    /// The reserved region of the first chunk.
    FirstReserved,
    /// The dynamic region of the first chunk.
    FirstDynamic,
    /// A later chunk.
    Dynamic,
}

/// Figures of one chunk, those that Linux's `percpu_stats` prints per chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct ChunkStats {
    /// Place of the chunk in the window; 0 is the first chunk.
    pub place: u32,
    /// What the chunk is.
    pub kind: ChunkKind,
    /// Live areas. In [hardened mode](crate::hardened) those in quarantine are among them.
    pub areas: u32,
    /// Areas that nobody has: they wait in CPUs' caches, or the caches' own tables are in them. They take room as live ones do.
    pub idle_areas: u32,
    /// The largest area ever, in bytes.
    pub largest_ever_bytes: usize,
    /// Populated pages that no area touches.
    pub empty_pages: u32,
    /// Populated pages.
    pub populated_pages: u32,
    /// Offset of the first free byte in the unit, or of the region's end.
    pub first_free_bytes: usize,
    /// Free bytes.
    pub free_bytes: usize,
    /// The longest free run, in bytes.
    pub contig_bytes: usize,
    /// Bytes of the free runs before the last area: fragmentation.
    pub sum_frag_bytes: usize,
    /// The longest of these runs, in bytes.
    pub max_frag_bytes: usize,
    /// The smallest live area, in bytes; 0 if there is none.
    pub smallest_bytes: usize,
    /// The median live area, in bytes.
    pub median_bytes: usize,
    /// The largest live area, in bytes.
    pub largest_bytes: usize,
}

impl ChunkStats {
    /// The figures of a chunk, of whose areas those are idle of which `is_idle` says so.
    pub(crate) fn of(
        place: u32,
        kind: ChunkKind,
        body: &Body,
        is_idle: impl Fn(&Range<u32>) -> bool,
    ) -> Self {
        let bytes = |granules: u32| granules as usize * GRANULE_BYTES;
        let last_area_end = body.map.areas().map(|area| area.end).last().unwrap_or(0);
        let frags = || {
            body.map
                .free_runs()
                .filter(|run| run.end <= last_area_end)
                .map(|run| run.end - run.start)
        };
        let live = || body.map.areas().filter(|area| !is_idle(area));
        let (smallest, median, largest) = three_sizes(|| live().map(|area| area.end - area.start));
        let (mut areas, mut idle_areas) = (0, 0);
        walk_areas(body, &is_idle, |_, state| match state {
            AreaState::Live => areas += 1,
            AreaState::Idle => idle_areas += 1,
        });
        Self {
            place,
            kind,
            areas,
            idle_areas,
            largest_ever_bytes: bytes(body.largest),
            empty_pages: body.counts.empty,
            populated_pages: body.counts.populated,
            first_free_bytes: body.byte_offset(
                body.map
                    .free_runs()
                    .next()
                    .map_or(body.map.region().end, |run| run.start),
            ),
            free_bytes: bytes(body.map.free_granules()),
            contig_bytes: bytes(
                body.map
                    .free_runs()
                    .map(|run| run.end - run.start)
                    .max()
                    .unwrap_or(0),
            ),
            sum_frag_bytes: frags().map(bytes).sum(),
            max_frag_bytes: bytes(frags().max().unwrap_or(0)),
            smallest_bytes: bytes(smallest),
            median_bytes: bytes(median),
            largest_bytes: bytes(largest),
        }
    }
}

impl fmt::Display for ChunkStats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.kind {
            ChunkKind::FirstReserved => " (first chunk, reserved)",
            ChunkKind::FirstDynamic => " (first chunk, dynamic)",
            ChunkKind::Dynamic => "",
        };
        writeln!(f, "chunk {}{kind}:", self.place)?;
        let rows = [
            ("nr_alloc", self.areas as usize),
            ("nr_idle", self.idle_areas as usize),
            ("max_alloc_size", self.largest_ever_bytes),
            ("empty_pop_pages", self.empty_pages as usize),
            ("pop_pages", self.populated_pages as usize),
            ("first_free", self.first_free_bytes),
            ("free_bytes", self.free_bytes),
            ("contig_bytes", self.contig_bytes),
            ("sum_frag", self.sum_frag_bytes),
            ("max_frag", self.max_frag_bytes),
            ("cur_min_alloc", self.smallest_bytes),
            ("cur_med_alloc", self.median_bytes),
            ("cur_max_alloc", self.largest_bytes),
        ];
        for (name, value) in rows {
            writeln!(f, "  {name:<20}: {value:>12}")?;
        }
        Ok(())
    }
}

/// Smallest, median and largest of some sizes, in constant space: the median is found by bisection over the values.
fn three_sizes<I: Iterator<Item = u32>>(sizes: impl Fn() -> I) -> (u32, u32, u32) {
    let (Some(smallest), Some(largest)) = (sizes().min(), sizes().max()) else {
        return (0, 0, 0);
    };
    let half = sizes().count().div_ceil(2);
    let (mut low, mut high) = (smallest, largest);
    while low < high {
        let middle = low + (high - low) / 2;
        if sizes().filter(|&size| size <= middle).count() >= half {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    (smallest, low, largest)
}

/// One thing in a chunk's map, in order of addresses. Offsets are bytes from the start of the unit.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum MapItem {
    /// A live area.
    Area(Range<usize>),
    /// An area that nobody has: it waits in a CPU's cache, or the caches' own tables are in it.
    Idle(Range<usize>),
    /// A free run.
    Free(Range<usize>),
    /// Pages with memory.
    Populated(Range<usize>),
}

/// Reports what lies in a chunk: first its areas, of which those are idle of which `is_idle` says so, then its free runs, then its
/// populated pages.
pub(crate) fn visit_map(
    body: &Body,
    page_bytes: usize,
    is_idle: impl Fn(&Range<u32>) -> bool,
    visit: &mut dyn FnMut(MapItem),
) {
    let bytes =
        |granules: Range<u32>| body.byte_offset(granules.start)..body.byte_offset(granules.end);
    walk_areas(body, &is_idle, |area, state| {
        visit(match state {
            AreaState::Live => MapItem::Area(bytes(area)),
            AreaState::Idle => MapItem::Idle(bytes(area)),
        });
    });
    body.map
        .free_runs()
        .for_each(|run| visit(MapItem::Free(bytes(run))));
    let mut from = 0;
    while let Some(pages) = body.next_populated(from) {
        from = pages.end;
        let first = body.unit_page(pages.start) as usize * page_bytes;
        visit(MapItem::Populated(
            first..body.unit_page(pages.end) as usize * page_bytes,
        ));
    }
}

/// Whether somebody has an area.
enum AreaState {
    Live,
    Idle,
}

/// Calls `visit` for every area, in order: for live ones, of which those are idle of which `is_idle` says so, and for those that
/// were freed and are not free: they wait for the run that they belong to.
fn walk_areas(
    body: &Body,
    is_idle: &impl Fn(&Range<u32>) -> bool,
    mut visit: impl FnMut(Range<u32>, AreaState),
) {
    let map = &body.map;
    let (mut areas, mut free) = (map.areas().peekable(), map.free_runs().peekable());
    let mut at = map.region().start;
    loop {
        let start_of = |next: Option<&Range<u32>>| next.map_or(map.region().end, |next| next.start);
        let (area_at, free_at) = (start_of(areas.peek()), start_of(free.peek()));
        let end = area_at.min(free_at);
        while at < end {
            let next = (at + 1..end).find(|&granule| map.is_freed(granule));
            let next = next.unwrap_or(end);
            visit(at..next, AreaState::Idle);
            at = next;
        }
        let next = match area_at < free_at {
            true => areas.next().inspect(|area| {
                let state = match is_idle(area) {
                    true => AreaState::Idle,
                    false => AreaState::Live,
                };
                visit(area.clone(), state);
            }),
            false => free.next(),
        };
        match next {
            Some(next) => at = next.end,
            None => break,
        }
    }
}

/// What an instance reports to its hook.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub enum Event {
    /// An area was handed out.
    Alloc {
        /// Its neutral address.
        address: usize,
        /// The size asked for, in bytes.
        bytes: usize,
        /// The alignment asked for, in bytes.
        align: usize,
        /// Whether the request was atomic and whether it was for the reserved region.
        flags: AllocFlags,
        /// The tag that the request carried.
        owner: usize,
        /// Place of the chunk and offset in its unit.
        at: (u32, usize),
    },
    /// A request was refused.
    Failure {
        /// The size asked for, in bytes.
        bytes: usize,
        /// The alignment asked for, in bytes.
        align: usize,
        /// The request's flags; with `NO_WARN` a hook should stay quiet.
        flags: AllocFlags,
        /// The tag that the request carried.
        owner: usize,
        /// Why.
        error: AllocError,
    },
    /// An area was freed.
    Free {
        /// How long it was, in bytes: its size, rounded up to the grain, or for one out of a cache to its alignment.
        bytes: usize,
        /// Its neutral address.
        address: usize,
        /// Place of the chunk and offset in its unit.
        at: (u32, usize),
    },
    /// A chunk was made.
    ChunkCreated {
        /// Its place.
        place: u32,
        /// Its neutral address.
        address: usize,
    },
    /// A chunk was destroyed.
    ChunkDestroyed {
        /// Its place.
        place: u32,
        /// Its neutral address.
        address: usize,
    },
}

/// Is told of every event of an instance.
///
/// An area's `Alloc` comes after it became the caller's, its `Free` before anyone else can get it, so that the events
/// of one address are in order whichever CPUs they come from. `Free` comes with the allocator's lock held: a hook must
/// be short and must not call the instance.
pub trait EventHook: Sync {
    /// Takes note of `event`.
    fn event(&self, event: &Event);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn size_classes() {
        for (bytes, class) in [
            (0, 0),
            (1, 0),
            (4, 0),
            (5, 1),
            (8, 1),
            (9, 2),
            (4096, 10),
            (32768, 13),
            (1 << 30, 19),
        ] {
            assert_eq!(Stats::size_class(bytes), class, "{bytes} bytes");
        }
    }

    #[test]
    fn median_is_the_lower_middle() {
        let three = |sizes: &'static [u32]| three_sizes(|| sizes.iter().copied());
        assert_eq!(three(&[]), (0, 0, 0));
        assert_eq!(three(&[7]), (7, 7, 7));
        assert_eq!(three(&[9, 1, 5]), (1, 5, 9));
        assert_eq!(three(&[9, 1, 5, 2]), (1, 2, 9));
        assert_eq!(three(&[4, 4, 4, 100]), (4, 4, 100));
    }
}
