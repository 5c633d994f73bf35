//! A recount of an instance from what it shows of itself: what it counts must equal what its map holds, and its map
//! must agree with the memory behind it.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use pcpu::backing::Backing;
use pcpu::backing::sim::SimAllocator;
use pcpu::stats::{ChunkKind, ChunkStats, MapItem, SIZE_CLASSES, Stats};

/// One region that areas come from: the first chunk has two, every later chunk is one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Section {
    /// The chunk's place in the window.
    pub place: u32,
    /// The bytes of the unit that can be handed out.
    pub region: Range<usize>,
    /// The live areas, as bytes of the unit.
    pub areas: Vec<Range<usize>>,
    /// The free runs, as bytes of the unit.
    pub free: Vec<Range<usize>>,
    /// The pages with memory, as pages of the unit.
    pub pages: BTreeSet<u32>,
}

impl Section {
    /// Whether the chunk is ready to be used, and is not.
    pub fn is_spare(&self) -> bool {
        self.place != 0 && self.areas.is_empty() && self.pages.is_empty()
    }

    /// The pages that areas touch.
    pub fn used_pages(&self, page_bytes: usize) -> BTreeSet<u32> {
        let pages_of = |area: &Range<usize>| area.start / page_bytes..area.end.div_ceil(page_bytes);
        let pages = self.areas.iter().flat_map(pages_of);
        pages.map(|page| page as u32).collect()
    }

    fn check(&self, page_bytes: usize) {
        let mut pieces: Vec<_> = self.areas.iter().map(|area| (area, 'a')).collect();
        pieces.extend(self.free.iter().map(|run| (run, 'f')));
        pieces.sort_by_key(|(range, _)| range.start);
        let mut at = self.region.start;
        let mut last = 'a';
        for (range, kind) in pieces {
            assert_eq!(
                range.start, at,
                "areas and free runs fill the region: {self:?}"
            );
            assert!(range.end > at, "nothing is empty: {self:?}");
            assert!(
                last == 'a' || kind == 'a',
                "free neighbours are one run: {self:?}"
            );
            (at, last) = (range.end, kind);
        }
        assert_eq!(at, self.region.end, "the region is filled: {self:?}");
        let used = self.used_pages(page_bytes);
        assert!(
            used.is_subset(&self.pages),
            "areas have memory: {used:?} {self:?}"
        );
    }

    /// Compares the figures that the chunk gives of itself with a recount.
    fn check_figures(&self, figures: &ChunkStats, page_bytes: usize) {
        let len = |range: &Range<usize>| range.end - range.start;
        let last_area_end = self.areas.last().map_or(0, |area| area.end);
        let frags = || {
            self.free
                .iter()
                .filter(|run| run.end <= last_area_end)
                .map(len)
        };
        let mut sizes: Vec<_> = self.areas.iter().map(len).collect();
        sizes.sort_unstable();
        let median = sizes.get(sizes.len().saturating_sub(1) / 2);
        let empty = match self.place {
            0 => 0,
            _ => self.pages.len() - self.used_pages(page_bytes).len(),
        };
        let recount = [
            ("areas", figures.areas as usize, self.areas.len()),
            (
                "populated pages",
                figures.populated_pages as usize,
                self.pages.len(),
            ),
            ("empty pages", figures.empty_pages as usize, empty),
            (
                "first free byte",
                figures.first_free_bytes,
                self.free.first().map_or(self.region.end, |run| run.start),
            ),
            (
                "free bytes",
                figures.free_bytes,
                self.free.iter().map(len).sum(),
            ),
            (
                "longest free run",
                figures.contig_bytes,
                self.free.iter().map(len).max().unwrap_or(0),
            ),
            ("fragments", figures.sum_frag_bytes, frags().sum()),
            (
                "longest fragment",
                figures.max_frag_bytes,
                frags().max().unwrap_or(0),
            ),
            (
                "smallest area",
                figures.smallest_bytes,
                sizes.first().copied().unwrap_or(0),
            ),
            (
                "median area",
                figures.median_bytes,
                median.copied().unwrap_or(0),
            ),
            (
                "largest area",
                figures.largest_bytes,
                sizes.last().copied().unwrap_or(0),
            ),
        ];
        for (what, reported, counted) in recount {
            assert_eq!(reported, counted, "{what} of {self:?}");
        }
        assert!(figures.largest_ever_bytes >= figures.largest_bytes);
    }
}

/// What an instance holds at a quiet moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Picture {
    /// All sections, in order of their addresses.
    pub sections: Vec<Section>,
    /// The length of every live area, by its neutral address.
    pub areas: BTreeMap<usize, usize>,
    /// The counters.
    pub stats: Stats,
}

/// Recounts everything. The machine is a checked one, and nobody is changing anything.
pub fn audit(pcpu: &SimAllocator) -> Picture {
    let stats = pcpu.stats();
    let page_bytes = pcpu.sizes().page_bytes();
    let sections = sections(pcpu);
    let mut figures = Vec::new();
    pcpu.visit_chunks(|chunk| figures.push(*chunk));
    assert_eq!(figures.len(), sections.len());
    for (section, figures) in sections.iter().zip(&figures) {
        section.check(page_bytes);
        section.check_figures(figures, page_bytes);
        let regions = pcpu.sizes().regions();
        let kind = match section.place {
            0 if section.region == regions.reserved => ChunkKind::FirstReserved,
            0 => ChunkKind::FirstDynamic,
            _ => ChunkKind::Dynamic,
        };
        assert_eq!((figures.place, figures.kind), (section.place, kind));
    }
    check_backing(pcpu, &sections);
    check_counters(pcpu, &sections, &stats);

    let Window { base, pitch_bytes } = window(pcpu);
    let areas = sections.iter().flat_map(|section| {
        let chunk = base + section.place as usize * pitch_bytes;
        let len = move |area: &Range<usize>| (chunk + area.start, area.end - area.start);
        section.areas.iter().map(len)
    });
    let areas: BTreeMap<usize, usize> = areas.collect();
    for (&address, &bytes) in &areas {
        assert_eq!(pcpu.area_bytes(address), Some(bytes));
    }
    Picture {
        sections,
        areas,
        stats,
    }
}

struct Window {
    base: usize,
    pitch_bytes: usize,
}

fn window(pcpu: &SimAllocator) -> Window {
    let pcpu::backing::Window {
        base, pitch_bytes, ..
    } = pcpu.backing().window();
    Window { base, pitch_bytes }
}

fn sections(pcpu: &SimAllocator) -> Vec<Section> {
    let sizes = pcpu.sizes();
    let regions = sizes.regions();
    let page_bytes = sizes.page_bytes();
    let mut items = Vec::new();
    pcpu.visit_map(|place, item| items.push((place, item)));
    let mut found: BTreeMap<(u32, usize), Section> = BTreeMap::new();
    let mut enter = |place: u32, region: Range<usize>| {
        let section = Section {
            place,
            region: region.clone(),
            areas: Vec::new(),
            free: Vec::new(),
            pages: BTreeSet::new(),
        };
        found.insert((place, region.start), section);
    };
    if !regions.reserved.is_empty() {
        enter(0, regions.reserved.clone());
    }
    enter(0, regions.dynamic.clone());
    for &(place, _) in items.iter().filter(|(place, _)| *place != 0) {
        enter(place, 0..sizes.unit_bytes());
    }
    for (place, item) in items {
        let (MapItem::Area(range) | MapItem::Free(range) | MapItem::Populated(range)) = &item
        else {
            panic!("{item:?}, and there are no caches");
        };
        for (_, section) in found.range_mut((place, 0)..(place + 1, 0)) {
            let inside = range.start.max(section.region.start)..range.end.min(section.region.end);
            if inside.is_empty() {
                continue;
            }
            match item {
                MapItem::Area(_) => section.areas.push(range.clone()),
                MapItem::Free(_) => section.free.push(range.clone()),
                MapItem::Populated(_) => {
                    assert!(range.start.is_multiple_of(page_bytes));
                    assert!(range.end.is_multiple_of(page_bytes));
                    let pages = inside.start / page_bytes..inside.end.div_ceil(page_bytes);
                    section.pages.extend(pages.map(|page| page as u32));
                }
                _ => unreachable!("seen above"),
            }
        }
    }
    found.into_values().collect()
}

/// The backing has the same chunks, and the same pages on every CPU that has any.
fn check_backing(pcpu: &SimAllocator, sections: &[Section]) {
    let sim = pcpu.backing();
    let later = || sections.iter().filter(|section| section.place != 0);
    let places: Vec<_> = later().map(|section| section.place).collect();
    assert_eq!(sim.reserved_chunks(), places);
    for cpu in pcpu.units().possible().iter() {
        for section in later() {
            let pages: BTreeSet<_> = sim
                .populated_pages(section.place, cpu)
                .into_iter()
                .collect();
            if pcpu.units().materialised().contains(cpu) {
                assert_eq!(pages, section.pages, "chunk {}, CPU {cpu}", section.place);
            } else {
                assert!(
                    pages.is_empty(),
                    "chunk {}, CPU {cpu}: {pages:?}",
                    section.place
                );
            }
        }
    }
}

fn check_counters(pcpu: &SimAllocator, sections: &[Section], stats: &Stats) {
    let sizes = pcpu.sizes();
    let page_bytes = sizes.page_bytes();
    let later = || sections.iter().filter(|section| section.place != 0);
    let areas = || sections.iter().flat_map(|section| &section.areas);
    let live_bytes: usize = areas().map(|area| area.end - area.start).sum();
    let mut live_sizes = [0; SIZE_CLASSES];
    for area in areas() {
        live_sizes[Stats::size_class(area.end - area.start)] += 1;
    }
    let later_pages: usize = later().map(|section| section.pages.len()).sum();
    let used_pages: usize = later()
        .map(|section| section.used_pages(page_bytes).len())
        .sum();
    let chunks = later().count();
    let recount = [
        ("live", stats.live, areas().count()),
        (
            "allocs less frees",
            stats.allocs - stats.frees,
            areas().count(),
        ),
        ("live bytes", stats.live_bytes, live_bytes),
        (
            "populated pages",
            stats.populated_pages,
            sizes.populated_pages() + later_pages,
        ),
        ("empty pages", stats.empty_pages, later_pages - used_pages),
        (
            "pages populated less given back",
            stats.pages_populated - stats.pages_depopulated,
            later_pages,
        ),
        ("chunks", stats.chunks.into(), chunks + 1),
        (
            "chunks made less destroyed",
            stats.chunks_created - stats.chunks_destroyed,
            chunks,
        ),
        (
            "spare chunks",
            stats.spare_chunks.into(),
            later().filter(|section| section.is_spare()).count(),
        ),
        (
            "metadata bytes",
            stats.metadata_bytes as u64,
            pcpu.backing().metadata_bytes(),
        ),
        ("sizes", stats.sizes.iter().sum(), stats.allocs as usize),
    ];
    for (what, reported, counted) in recount {
        assert_eq!(reported, counted as u64, "{what}");
    }
    assert_eq!(stats.live_sizes, live_sizes);
    assert!(stats.live_peak >= stats.live && stats.live_peak_bytes >= stats.live_bytes);
    assert!(stats.chunks_peak >= stats.chunks);
    assert!(stats.populated_peak_pages >= stats.populated_pages);
    assert!(stats.metadata_peak_bytes >= stats.metadata_bytes);
    assert!(stats.atomic_failures <= stats.failures);
}
