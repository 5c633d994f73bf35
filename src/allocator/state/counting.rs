//! How the counters are told of what was taken and freed, and what is put off until so many requests have passed.

use super::State;
use crate::stats::Stats;

impl State {
    pub(in crate::allocator) fn count_first_chunk(&mut self, populated_pages: u64) {
        self.stats.populated_pages = populated_pages;
        self.stats.populated_peak_pages = populated_pages;
    }

    pub(in crate::allocator) fn count_chunk_created(&mut self) {
        self.stats.chunks_created += 1;
    }

    pub(in crate::allocator) fn metadata_grew(&mut self, bytes: usize) {
        self.stats.metadata_bytes += bytes;
        self.stats.metadata_peak_bytes = self
            .stats
            .metadata_peak_bytes
            .max(self.stats.metadata_bytes);
    }

    /// Counts an area of `bytes` as asked for, `rounded_bytes` as taken.
    #[inline]
    pub(in crate::allocator) fn count_alloc(&mut self, bytes: usize, rounded_bytes: usize) {
        self.retry_in = self.retry_in.saturating_sub(1);
        let stats = &mut self.stats;
        stats.live += 1;
        stats.live_peak = stats.live_peak.max(stats.live);
        stats.live_bytes += rounded_bytes as u64;
        stats.live_peak_bytes = stats.live_peak_bytes.max(stats.live_bytes);
        stats.note_size(bytes);
        stats.count_allocs(1, rounded_bytes);
        stats.live_sizes[Stats::size_class(rounded_bytes)] += 1;
    }

    /// Counts the areas of a run, of `len_bytes` each, as live, one of which is handed out for a request of `bytes`.
    pub(in crate::allocator) fn count_run(&mut self, areas: u32, len_bytes: usize, bytes: usize) {
        self.retry_in = self.retry_in.saturating_sub(1);
        let areas = u64::from(areas);
        let stats = &mut self.stats;
        stats.live += areas;
        stats.live_peak = stats.live_peak.max(stats.live);
        stats.live_bytes += areas * len_bytes as u64;
        stats.live_peak_bytes = stats.live_peak_bytes.max(stats.live_bytes);
        stats.live_sizes[Stats::size_class(len_bytes)] += areas;
        stats.note_size(bytes);
    }

    /// Counts areas of a run out of the live ones that nobody has.
    pub(in crate::allocator) fn count_unused(&mut self, areas: u32, len_bytes: usize) {
        self.stats.leave_out(areas.into(), len_bytes);
    }

    /// Counts what a run that is closed has handed out: the first word of its pair says how much.
    pub(in crate::allocator) fn count_taken(&mut self, slots: u64, len_bytes: usize) {
        self.stats.count_taken(slots, len_bytes);
    }

    #[inline]
    pub(in crate::allocator) fn count_free(&mut self, rounded_bytes: usize) {
        self.frees_since = self.frees_since.saturating_add(1);
        self.retry_in = self.retry_in.saturating_sub(1);
        let stats = &mut self.stats;
        stats.frees += 1;
        stats.live -= 1;
        stats.live_bytes -= rounded_bytes as u64;
        stats.live_sizes[Stats::size_class(rounded_bytes)] -= 1;
    }
}
