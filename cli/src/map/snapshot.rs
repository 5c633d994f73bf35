//! The state of all chunks at one moment.

use std::collections::BTreeMap;
use std::ops::Range;

use pcpu::stats::MapItem;
use pcpu::unit::UnitSizes;

/// What lies in the chunks of an instance. Offsets are bytes from the start of the unit.
#[derive(Debug)]
pub struct Snapshot {
    /// What it shows.
    pub title: String,
    /// How many CPUs have a unit.
    pub cpus: u32,
    /// Length of a page.
    pub page_bytes: usize,
    /// Pages of a unit.
    pub pages: usize,
    /// The static region of the first chunk.
    pub static_vars: Range<usize>,
    /// The reserved region of the first chunk.
    pub reserved: Range<usize>,
    /// The chunks by their places.
    pub chunks: BTreeMap<u32, ChunkMap>,
}

/// What lies in a chunk.
#[derive(Debug, Default)]
pub struct ChunkMap {
    /// Live areas, in order.
    pub areas: Vec<Range<usize>>,
    /// Areas that wait in caches, in order.
    pub idle: Vec<Range<usize>>,
    /// Pages with memory, as ranges of bytes. Those of the static region are not among them.
    populated: Vec<Range<usize>>,
}

/// What a page is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PageKind {
    /// It holds static variables.
    Static,
    /// It belongs to the reserved region.
    Reserved,
    /// It has memory for dynamic variables.
    Populated,
    /// It has no memory.
    Unpopulated,
}

impl Snapshot {
    /// Takes the state from an instance's `visit_map`.
    pub fn take(
        title: String,
        cpus: u32,
        sizes: &UnitSizes,
        visit_map: impl FnOnce(&mut dyn FnMut(u32, MapItem)),
    ) -> Self {
        let mut chunks: BTreeMap<u32, ChunkMap> = BTreeMap::new();
        visit_map(&mut |place, item| {
            let chunk = chunks.entry(place).or_default();
            match item {
                MapItem::Area(area) => chunk.areas.push(area),
                MapItem::Idle(area) => chunk.idle.push(area),
                MapItem::Populated(pages) => chunk.populated.push(pages),
                _ => {}
            }
        });
        let regions = sizes.regions();
        Self {
            title,
            cpus,
            page_bytes: sizes.page_bytes(),
            pages: sizes.unit_pages(),
            static_vars: regions.static_vars,
            reserved: regions.reserved,
            chunks,
        }
    }

    /// What it shows, and the figures.
    pub fn figures(&self) -> (&str, String) {
        let populated = self.chunks.keys().map(|&place| self.nr_populated(place));
        let pages: usize = populated.sum();
        let live: usize = self.chunks.values().map(ChunkMap::live_bytes).sum();
        let idle: usize = self.chunks.values().map(ChunkMap::idle_bytes).sum();
        let populated_bytes = pages * self.page_bytes - self.static_vars.len();
        let figures = format!(
            "{} CPUs; each has {} chunks with {pages} pages, {live} bytes are live: {:.1} % of what is populated for them; {idle} idle in caches",
            self.cpus,
            self.chunks.len(),
            100.0 * live as f64 / populated_bytes as f64
        );
        (&self.title, figures)
    }

    /// The bytes of a page.
    pub fn page(&self, page: usize) -> Range<usize> {
        page * self.page_bytes..(page + 1) * self.page_bytes
    }

    /// What a page is.
    pub fn kind(&self, place: u32, page: usize) -> PageKind {
        let bytes = self.page(page);
        if place == 0 && overlap(&self.static_vars, &bytes) > 0 {
            PageKind::Static
        } else if place == 0 && overlap(&self.reserved, &bytes) > 0 {
            PageKind::Reserved
        } else if self.chunks[&place]
            .populated
            .iter()
            .any(|pages| overlap(pages, &bytes) > 0)
        {
            PageKind::Populated
        } else {
            PageKind::Unpopulated
        }
    }

    /// The pages of a chunk that have memory.
    pub fn nr_populated(&self, place: u32) -> usize {
        (0..self.pages)
            .filter(|&page| self.kind(place, page) != PageKind::Unpopulated)
            .count()
    }
}

impl ChunkMap {
    /// Bytes of live areas.
    pub fn live_bytes(&self) -> usize {
        self.areas.iter().map(Range::len).sum()
    }

    /// Bytes of areas that wait in caches.
    pub fn idle_bytes(&self) -> usize {
        self.idle.iter().map(Range::len).sum()
    }

    /// How many of `bytes` are live.
    pub fn used_bytes(&self, bytes: Range<usize>) -> usize {
        bytes_within(&self.areas, &bytes)
    }

    /// How many of `bytes` idle in caches.
    pub fn idle_bytes_within(&self, bytes: Range<usize>) -> usize {
        bytes_within(&self.idle, &bytes)
    }
}

/// How many of `bytes` are in some areas, which are in order.
fn bytes_within(areas: &[Range<usize>], bytes: &Range<usize>) -> usize {
    let first = areas.partition_point(|area| area.end <= bytes.start);
    let areas = areas[first..]
        .iter()
        .take_while(|area| area.start < bytes.end);
    areas.map(|area| overlap(area, bytes)).sum()
}

fn overlap(a: &Range<usize>, b: &Range<usize>) -> usize {
    a.end.min(b.end).saturating_sub(a.start.max(b.start))
}
