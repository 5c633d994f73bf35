//! The ledger of a hardened instance: which areas were handed out, and which were freed and wait in quarantine.
//!
//! A hash table by address with linear probing, and a ring of the addresses in quarantine, both in metadata memory.
//!
//! Invariants: every address in the ring has a freed record, and every freed record is in the ring; at least one record is
//! vacant, so that every search ends.

use core::alloc::{Layout, LayoutError};
use core::ptr::NonNull;

use crate::hardened::{Fate, Record};
use crate::metadata::{BlockLayout, MetaSlice};
use crate::stats::EventHook;
use crate::unit::GRANULE_BYTES;

/// Records of a new ledger.
const FIRST_LEN: usize = 256;

/// How full the table may be, in eighths.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Fill {
    /// Callers that may sleep make more room then.
    Half = 4,
    /// Atomic callers do.
    ThreeQuarters = 6,
    /// Nobody goes beyond.
    Most = 7,
}

/// A block of metadata, as the backing gave it.
pub(super) type Block = (NonNull<u8>, Layout);

pub(super) struct Ledger {
    records: MetaSlice<Record>,
    records_block: Block,
    used: usize,
    /// Records for areas that are about to be handed out.
    pub(super) promised: usize,
    ring: MetaSlice<usize>,
    ring_block: Block,
    ring_first: usize,
    quarantined: usize,
    pub(super) hook: Option<&'static dyn EventHook>,
}

/// The layout of a table of so many records.
pub(super) fn records_layout(len: usize) -> Result<Layout, LayoutError> {
    let mut block = BlockLayout::new();
    block.array::<Record>(len)?;
    Ok(block.finish())
}

/// The layouts of a new ledger: its records, its ring.
pub(super) fn first_layouts(quarantine_areas: u32) -> Result<(Layout, Layout), LayoutError> {
    let mut ring = BlockLayout::new();
    ring.array::<usize>(quarantine_areas as usize)?;
    Ok((records_layout(FIRST_LEN)?, ring.finish()))
}

impl Ledger {
    /// An empty ledger.
    ///
    /// # Safety
    /// The blocks were allocated with the [`first_layouts`] for so many areas, and are the ledger's from now on.
    pub(super) unsafe fn new(records: Block, ring: Block, quarantine_areas: u32) -> Self {
        // SAFETY: the promise of the caller; each block holds one array, at its start.
        unsafe {
            Self {
                records: MetaSlice::new(records.0, 0, FIRST_LEN, Record::VACANT),
                records_block: records,
                used: 0,
                promised: 0,
                ring: MetaSlice::new(ring.0, 0, quarantine_areas as usize, 0),
                ring_block: ring,
                ring_first: 0,
                quarantined: 0,
                hook: None,
            }
        }
    }

    /// The blocks to give back at the end.
    pub(super) fn blocks(&self) -> [Block; 2] {
        [self.records_block, self.ring_block]
    }

    /// How many records there is memory for.
    pub(super) fn len(&self) -> usize {
        self.records.len()
    }

    /// Whether one more area would fill the table further than that.
    pub(super) fn is_filled(&self, to: Fill) -> bool {
        (self.used + self.promised + 1) * 8 > self.records.len() * to as usize
    }

    /// Moves the records to a larger block; returns the old one.
    ///
    /// # Safety
    /// `block` was allocated with the [`records_layout`] for `len` records, more than there are now, and is the ledger's from now on.
    pub(super) unsafe fn move_to(&mut self, block: Block, len: usize) -> Block {
        // SAFETY: the promise of the caller.
        let records = unsafe { MetaSlice::new(block.0, 0, len, Record::VACANT) };
        let old = core::mem::replace(&mut self.records, records);
        self.used = 0;
        old.iter()
            .filter(|record| !record.is_vacant())
            .for_each(|record| self.insert(*record));
        core::mem::replace(&mut self.records_block, block)
    }

    /// Where the search for an address begins.
    fn home(&self, address: usize) -> usize {
        let hash = (address / GRANULE_BYTES) as u64;
        let hash = hash.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
        hash as usize & (self.records.len() - 1)
    }

    fn next(&self, at: usize) -> usize {
        (at + 1) & (self.records.len() - 1)
    }

    /// Where the record of an address is, or should go.
    fn slot(&self, address: usize) -> usize {
        let mut at = self.home(address);
        while !self.records[at].is_vacant() && self.records[at].area.address != address {
            at = self.next(at);
        }
        at
    }

    /// The record of an area.
    pub(super) fn find(&self, address: usize) -> Option<Record> {
        let record = self.records[self.slot(address)];
        (!record.is_vacant()).then_some(record)
    }

    /// Enters a record; there is none of this address.
    pub(super) fn insert(&mut self, record: Record) {
        let at = self.slot(record.area.address);
        debug_assert!(self.records[at].is_vacant(), "two areas at one address");
        self.records[at] = record;
        self.used += 1;
    }

    /// Takes a record out that is not in quarantine, or leaves it next.
    pub(super) fn remove(&mut self, address: usize) {
        let mut hole = self.slot(address);
        if self.records[hole].is_vacant() {
            return;
        }
        self.used -= 1;
        // Whatever was put further because this place was taken moves up.
        let mut at = self.next(hole);
        while !self.records[at].is_vacant() {
            let home = self.home(self.records[at].area.address);
            let mask = self.records.len() - 1;
            let from_home = at.wrapping_sub(home) & mask;
            let from_hole = at.wrapping_sub(hole) & mask;
            if from_home >= from_hole {
                self.records[hole] = self.records[at];
                hole = at;
            }
            at = self.next(at);
        }
        self.records[hole] = Record::VACANT;
    }

    /// Puts a live area into quarantine, which is not [full](Self::is_quarantine_full).
    pub(super) fn quarantine(&mut self, address: usize) {
        let at = self.slot(address);
        self.records[at].fate = Fate::Freed;
        let end = (self.ring_first + self.quarantined) % self.ring.len();
        self.ring[end] = address;
        self.quarantined += 1;
    }

    pub(super) fn is_quarantine_full(&self) -> bool {
        self.quarantined == self.ring.len()
    }

    /// The area that was freed first of those in quarantine.
    pub(super) fn oldest(&self) -> Option<Record> {
        match self.quarantined {
            0 => None,
            _ => self.find(self.ring[self.ring_first]),
        }
    }

    /// All areas in quarantine, in the order in which they were freed.
    pub(super) fn in_quarantine(&self) -> impl Iterator<Item = Record> + '_ {
        let places = (0..self.quarantined).map(|nth| (self.ring_first + nth) % self.ring.len());
        places.filter_map(|at| self.find(self.ring[at]))
    }

    /// Takes the [oldest](Self::oldest) out.
    pub(super) fn forget_oldest(&mut self) {
        if self.quarantined > 0 {
            self.remove(self.ring[self.ring_first]);
            self.ring_first = (self.ring_first + 1) % self.ring.len();
            self.quarantined -= 1;
        }
    }

    /// All areas, live and freed.
    pub(super) fn records(&self) -> impl Iterator<Item = Record> + '_ {
        let records = self.records.iter().copied();
        records.filter(|record| !record.is_vacant())
    }

    /// The live areas in the order of their sizes. The ledger is of no use any more.
    pub(super) fn sort(&mut self) -> &[Record] {
        let is_live = |record: &Record| !record.is_vacant() && record.fate == Fate::Live;
        self.records.sort_unstable_by_key(|record| {
            (!is_live(record), record.area.bytes, record.area.address)
        });
        let live = self.records.partition_point(is_live);
        &self.records[..live]
    }
}
