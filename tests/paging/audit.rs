//! A walk through all page tables of a machine at a quiet moment, and what must hold of them.

use std::collections::{BTreeMap, BTreeSet};

use pcpu::backing::Backing;
use pcpu::stats::MapItem;
use pcpu::unit::CpuId;

use crate::machine::Machine;

const PAGE: usize = 4096;
const WINDOW: usize = 1 << 30;

/// A page of a window: where, and which frame.
type Pages = BTreeMap<usize, u64>;

/// An entry of a table: its number, where it leads to, whether that can be written to.
pub type Leaf = (usize, u64, bool);

impl Machine<'_, '_> {
    /// The first address of a CPU's window.
    pub fn window_of(&self, cpu: CpuId) -> usize {
        let unit = self.pcpu.per_cpu_address(self.pcpu.neutral_base(), cpu);
        unit.expect("a possible CPU")
    }

    /// Panics unless
    /// - every CPU that is up has memory of its own, writable, for the first chunk and for the pages that the maps report, and
    ///   for nothing else; from its node, but for as many frames as came from afar;
    /// - all others share one window, of which nothing is writable;
    /// - nothing is executable;
    /// - all frames that are out are reached once, those aside that no CPU needs to see.
    pub fn audit(&self) {
        let mmu = &self.host.mmu;
        let mut reached = BTreeSet::new();
        let mut far = 0;
        let mut once = |frame: u64| assert!(reached.insert(frame), "frame {frame:#x} twice");
        let mut uppers = BTreeSet::new();
        for window in mmu.window.clone().step_by(WINDOW) {
            let entry = mmu.entry(mmu.level_4(), window >> 39 & 511);
            uppers.extend(entry.map(|entry| entry.frame));
        }
        uppers.iter().copied().for_each(&mut once);
        // The host has addresses for more units than there may be.
        let any_upper = |window: usize| {
            let table = mmu.entry(mmu.level_4(), window >> 39 & 511)?;
            mmu.entry(table.frame, window >> 30 & 511)
        };
        let upper = |window| any_upper(window).expect("the window of a possible CPU");

        // Metadata.
        let metadata = upper(mmu.window.start);
        let mut tables = Vec::new();
        let pages = self.pages_in(metadata.frame, &mut tables);
        once(metadata.frame);
        tables.drain(..).for_each(&mut once);
        pages.values().copied().for_each(&mut once);

        // CPUs that are up.
        let (up, absent): (Vec<CpuId>, Vec<CpuId>) = self
            .pcpu
            .units()
            .possible()
            .iter()
            .partition(|&cpu| self.pcpu.units().materialised().contains(cpu));
        let expected = self.expected_pages();
        for &cpu in &up {
            let window = self.window_of(cpu);
            let directory = upper(window);
            assert!(directory.is_writable);
            let pages = self.pages_in(directory.frame, &mut tables);
            let found: BTreeSet<usize> = pages.keys().copied().collect();
            assert_eq!(found, expected, "the pages of CPU {cpu}");
            for &page in &found {
                let translation = mmu.translate(window + page).expect("it is mapped");
                assert!(translation.is_writable && !translation.is_executable);
            }
            let node = self.shape.node_of(cpu);
            tables.push(directory.frame);
            let all = pages.values().chain(&tables);
            far += all
                .filter(|&&frame| self.host.node_of(frame) != node)
                .count();
            pages.values().copied().for_each(&mut once);
            tables.drain(..).for_each(&mut once);
        }

        // The others, and units without a CPU.
        let own: BTreeSet<_> = up.iter().map(|&cpu| self.window_of(cpu)).collect();
        let others = mmu.window.clone().step_by(WINDOW).skip(1);
        let shared: BTreeSet<_> = others
            .filter(|window| !own.contains(window))
            .filter_map(|window| {
                let entry = any_upper(window)?;
                assert!(!entry.is_writable && !entry.is_executable);
                Some(entry.frame)
            })
            .collect();
        assert!(shared.len() <= 1, "one directory for all that never came");
        if let (Some(&directory), Some(&cpu)) = (shared.first(), absent.first()) {
            once(directory);
            let entry = |index| mmu.entry(directory, index).expect("all of it can be read");
            let tables: BTreeSet<u64> = (0..512).map(|index| entry(index).frame).collect();
            let page = |&table: &u64| (0..512).map(move |index| mmu.entry(table, index));
            let pages = tables.iter().flat_map(page);
            let frames = pages.map(|page| page.expect("all of it can be read").frame);
            let frames: BTreeSet<u64> = frames.collect();
            tables.into_iter().chain(frames).for_each(&mut once);
            let window = self.window_of(cpu);
            for page in (0..4 * self.shape.unit_bytes).step_by(PAGE) {
                let translation = mmu.translate(window + page).expect("it can be read");
                assert!(!translation.is_writable && !translation.is_executable);
            }
        }

        let out = self.host.out();
        assert!(reached.is_subset(&out), "frames in tables that are not out");
        // The tables of own directories, the map of metadata pages.
        let mut hidden = uppers.len() + 1;
        if absent.is_empty() {
            // And what CPUs that never came would share: a directory, zeroes with their table, initial values with theirs.
            let regions = self.pcpu.sizes().regions();
            hidden += 3 + regions.reserved.end.div_ceil(PAGE) + 1;
        }
        assert_eq!(
            out.len() - reached.len(),
            hidden,
            "frames that nobody reaches"
        );
        let stats = self.paging.stats();
        assert_eq!(stats.frames, self.host.out().len() as u64);
        assert!(
            far as u64 <= stats.frames_from_afar,
            "{far} frames from another node"
        );
        assert_eq!(
            self.host
                .mmu
                .stale_faults
                .load(std::sync::atomic::Ordering::Relaxed),
            0
        );
    }

    /// What stands in each table of the CPUs' windows, by the tables' frames: what a call that is undone leaves as it was.
    pub fn tables_of_cpus(&self) -> BTreeMap<u64, Vec<Leaf>> {
        let mmu = &self.host.mmu;
        let entries = |table: u64| -> Vec<Leaf> {
            let entry = |index| Some((index, mmu.entry(table, index)?));
            let entries = (0..512).filter_map(entry);
            entries
                .map(|(index, entry)| (index, entry.frame, entry.is_writable))
                .collect()
        };
        let mut tables = BTreeMap::new();
        for window in mmu.window.clone().step_by(WINDOW).skip(1) {
            let upper = mmu.entry(mmu.level_4(), window >> 39 & 511);
            let directory = upper.and_then(|upper| mmu.entry(upper.frame, window >> 30 & 511));
            let Some(directory) = directory else { continue };
            let directory = directory.frame;
            for (_, table, _) in entries(directory) {
                tables.entry(table).or_insert_with(|| entries(table));
            }
            tables.insert(directory, entries(directory));
        }
        tables
    }

    /// The pages of a CPU that is up, as bytes of its window.
    fn expected_pages(&self) -> BTreeSet<usize> {
        let pitch_bytes = self.paging.window().pitch_bytes;
        let mut pages: BTreeSet<usize> = (0..self.pcpu.sizes().sum_bytes()).step_by(PAGE).collect();
        self.pcpu.visit_map(|place, item| {
            if let (1.., MapItem::Populated(range)) = (place, item) {
                let chunk = place as usize * pitch_bytes;
                pages.extend((chunk + range.start..chunk + range.end).step_by(PAGE));
            }
        });
        pages
    }

    /// The pages below a directory, as bytes of the window; its tables are added to `tables`.
    fn pages_in(&self, directory: u64, tables: &mut Vec<u64>) -> Pages {
        let mmu = &self.host.mmu;
        let mut pages = Pages::new();
        for index in 0..512 {
            let Some(table) = mmu.entry(directory, index) else {
                continue;
            };
            tables.push(table.frame);
            for page in 0..512 {
                if let Some(leaf) = mmu.entry(table.frame, page) {
                    assert!(!leaf.is_executable, "nothing is executable");
                    pages.insert((index * 512 + page) * PAGE, leaf.frame);
                }
            }
        }
        pages
    }
}
