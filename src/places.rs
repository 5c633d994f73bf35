//! The chunk of each place of the window, and where areas have been freed: what can be looked at without the allocator's
//! lock.
//!
//! A chunk's metadata stays where it is for as long as the instance lives, also when the chunk itself is gone: whoever
//! frees an address that is wrong by now looks at marks that say so. Only the holder of the lock changes the table.

use core::marker::PhantomData;
use core::ptr::NonNull;

use crate::chunk::{Chunk, Seen, note};
use crate::metadata::{BlockLayout, MetaSlice};
use crate::sync::{AtomicPtr, AtomicU64, Ordering, full_fence};

/// What a place of the window holds.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Place {
    /// Nothing.
    Vacant,
    /// The metadata of a chunk that has been destroyed, for the next one.
    Parked(NonNull<Chunk>),
    /// A chunk that is being made or destroyed.
    Busy,
    /// A chunk.
    Chunk(NonNull<Chunk>),
}

/// In an entry: it is not that of a chunk in use, and the rest of it says what it is. So one look tells whether there is one.
const NO_CHUNK: usize = 1;
/// The rest of a busy place's entry; 0 is that of a vacant one, and the others are those of parked chunks.
const BUSY: usize = 2;

const _: () = assert!(align_of::<Chunk>() > BUSY);

impl Place {
    fn encode(self) -> *mut Chunk {
        match self {
            Self::Vacant => core::ptr::without_provenance_mut(NO_CHUNK),
            Self::Busy => core::ptr::without_provenance_mut(NO_CHUNK | BUSY),
            Self::Chunk(chunk) => chunk.as_ptr(),
            Self::Parked(chunk) => chunk.as_ptr().map_addr(|address| address | NO_CHUNK),
        }
    }

    fn decode(entry: *mut Chunk) -> Self {
        let is_chunk = entry.addr() & NO_CHUNK == 0;
        match NonNull::new(entry.map_addr(|address| address & !NO_CHUNK)) {
            None => Self::Vacant,
            Some(chunk) if is_chunk => Self::Chunk(chunk),
            Some(rest) if rest.addr().get() == BUSY => Self::Busy,
            Some(chunk) => Self::Parked(chunk),
        }
    }
}

/// Layout of [`Places`] in a metadata block.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PlacesLayout {
    places: u32,
    entries_at: usize,
    freed_at: usize,
    freed_words_at: usize,
}

impl PlacesLayout {
    pub(crate) fn add(
        block: &mut BlockLayout,
        places: u32,
    ) -> Result<Self, core::alloc::LayoutError> {
        Ok(Self {
            places,
            entries_at: block.array::<AtomicPtr<Chunk>>(places as usize)?,
            freed_at: block.array::<AtomicU64>(places.div_ceil(u64::BITS) as usize)?,
            freed_words_at: block.array::<AtomicU64>(1)?,
        })
    }
}

/// The table of places.
#[derive(Debug)]
pub(crate) struct Places {
    entries: MetaSlice<AtomicPtr<Chunk>>,
    /// Places whose chunk has areas that were freed and not swept.
    freed: MetaSlice<AtomicU64>,
    /// Which words of `freed` are not 0, every sixty-fourth by the same bit.
    freed_words: MetaSlice<AtomicU64>,
}

impl Places {
    /// A table of vacant places.
    ///
    /// # Safety
    /// `block` was allocated with the layout that `layout` was added to, and nothing else uses this part of it while
    /// the table lives.
    pub(crate) unsafe fn new(block: NonNull<u8>, layout: &PlacesLayout) -> Self {
        let places = layout.places as usize;
        let words = places.div_ceil(u64::BITS as usize);
        // SAFETY: the offsets come from laying these arrays out in this block (promise of the caller).
        unsafe {
            Self {
                entries: MetaSlice::filled(block, layout.entries_at, places, || {
                    AtomicPtr::new(Place::Vacant.encode())
                }),
                freed: MetaSlice::filled(block, layout.freed_at, words, AtomicU64::default),
                freed_words: MetaSlice::filled(block, layout.freed_words_at, 1, AtomicU64::default),
            }
        }
    }

    /// The same table once more.
    ///
    /// # Safety
    /// The memory of the table stays for as long as the result.
    pub(crate) unsafe fn view(&self) -> Self {
        // SAFETY: the arrays are there (promise of the caller), and consist of atomic values.
        unsafe {
            Self {
                entries: MetaSlice::view(self.entries.as_ptr(), self.entries.len()),
                freed: MetaSlice::view(self.freed.as_ptr(), self.freed.len()),
                freed_words: MetaSlice::view(self.freed_words.as_ptr(), 1),
            }
        }
    }

    /// How many there are.
    pub(crate) fn len(&self) -> u32 {
        self.entries.len() as u32
    }

    /// What place `at` holds.
    #[inline]
    pub(crate) fn get(&self, at: u32) -> Place {
        self.entries
            .get(at as usize)
            .map_or(Place::Vacant, |entry| {
                Place::decode(entry.load(Ordering::Acquire))
            })
    }

    /// The chunk at `at`, if there is one.
    #[inline]
    fn chunk(&self, at: u32) -> Option<Found<'_>> {
        let entry = self.entries.get(at as usize)?.load(Ordering::Acquire);
        (entry.addr() & NO_CHUNK == 0).then_some(Found {
            entry,
            places: PhantomData,
        })
    }

    /// Puts `place` at `at`. For the holder of the lock.
    pub(crate) fn put(&self, at: u32, place: Place) {
        self.entries[at as usize].store(place.encode(), Ordering::Release);
    }

    /// Frees the live area that starts at `granule` of the unit in the chunk at `at`, without the lock; `None` if there is
    /// none. Otherwise the chunk, and the granule of its map, if that should be swept there.
    #[inline]
    pub(crate) fn free(&self, at: u32, granule: u32) -> Option<Option<(NonNull<Chunk>, u32)>> {
        let chunk = self.chunk(at)?.chunk();
        let granule = chunk.free(granule)?;
        // While nobody sweeps it: who does counts anew.
        let is_ripe = chunk.ripen(granule);
        if chunk.note_granule(granule) {
            self.note_place(at);
        }
        Some(is_ripe.then(|| (NonNull::from(chunk), granule)))
    }

    /// The live area that starts at `granule` of the unit in the chunk at `at`, if there is one.
    #[inline]
    pub(crate) fn live_area(&self, at: u32, granule: u32) -> Option<LiveArea<'_>> {
        let chunk = self.chunk(at)?.chunk();
        let (granule, (len, seen)) = chunk.live_area(granule)?;
        Some(LiveArea {
            chunk,
            granule,
            len,
            seen,
        })
    }

    /// Makes the freed area of `len` granules live again that starts at `granule` of the unit in the chunk at `at`; false if
    /// there is none, and whoever asks says so by [`note_chunk`](Self::note_chunk) then.
    #[inline]
    pub(crate) fn reuse(&self, at: u32, granule: u32, len: u32) -> bool {
        self.chunk(at)
            .is_some_and(|found| found.chunk().reuse(granule, len))
    }

    /// Which of so many areas of `len` granules, one behind the other from `granule` of the unit in the chunk at `at` on, are freed:
    /// bit `i` is area `i`.
    pub(crate) fn freed_among(&self, at: u32, granule: u32, len: u32, count: u32) -> u32 {
        self.chunk(at)
            .map_or(0, |found| found.chunk().freed_among(granule, len, count))
    }

    /// Makes those of them live again; which they are.
    pub(crate) fn reuse_among(&self, at: u32, granule: u32, len: u32, count: u32) -> u32 {
        self.chunk(at)
            .map_or(0, |found| found.chunk().reuse_among(granule, len, count))
    }

    /// Has the chunk at `at`, if there is one, looked at by the next sweep.
    pub(crate) fn note_chunk(&self, at: u32) {
        if self.chunk(at).is_some() {
            self.note_place(at);
        }
    }

    /// Marks the live area that starts at `granule` of the unit in the chunk at `at` as freed, and has nobody sweep it; false
    /// if there is none.
    #[inline]
    pub(crate) fn mark(&self, at: u32, granule: u32) -> bool {
        self.chunk(at)
            .is_some_and(|found| found.chunk().mark(granule))
    }

    /// Has the page of `granule` of the unit in the chunk at `at` looked at by the next sweep.
    pub(crate) fn note(&self, at: u32, granule: u32) {
        if let Some(chunk) = self.chunk(at) {
            chunk.chunk().note(granule);
            self.note_place(at);
        }
    }

    /// Has every page of the chunk at `at` looked at by the next sweep.
    #[cfg(all(feature = "std", target_os = "linux"))]
    pub(crate) fn note_all(&self, at: u32) {
        if let Some(chunk) = self.chunk(at) {
            chunk.chunk().note_all();
            self.note_place(at);
        }
    }

    /// Has the chunk at `at` looked at by the next sweep.
    #[inline]
    pub(crate) fn note_place(&self, at: u32) {
        note(&self.freed, at);
        note(&self.freed_words, at / u64::BITS % u64::BITS);
    }

    /// The lowest place with areas that were freed and not swept, which it counts as swept from now on.
    pub(crate) fn take_freed(&self) -> Option<u32> {
        loop {
            let bits = self.freed_words[0].load(Ordering::Relaxed);
            if bits == 0 {
                return None;
            }
            let first = bits.trailing_zeros();
            for word in (first as usize..self.freed.len()).step_by(u64::BITS as usize) {
                let places = self.freed[word].load(Ordering::Relaxed);
                if places != 0 {
                    let bit = places & places.wrapping_neg();
                    self.freed[word].fetch_and(!bit, Ordering::AcqRel);
                    // Who finds the place noted still has noted the page before.
                    full_fence();
                    return Some(word as u32 * u64::BITS + bit.trailing_zeros());
                }
            }
            // Who notes a place from now on finds this bit clear; who did it before is found now.
            self.freed_words[0].fetch_and(!(1 << first), Ordering::AcqRel);
            full_fence();
            let mut again = (first as usize..self.freed.len()).step_by(u64::BITS as usize);
            if again.any(|word| self.freed[word].load(Ordering::Relaxed) != 0) {
                self.freed_words[0].fetch_or(1 << first, Ordering::AcqRel);
            }
        }
    }
}

/// The chunk of a place. An `Option` of a reference is compared with null again by whoever takes it apart.
#[derive(Debug, Clone, Copy)]
struct Found<'a> {
    /// Is a chunk's.
    entry: *mut Chunk,
    /// Whose table it is in.
    places: PhantomData<&'a Places>,
}

impl<'a> Found<'a> {
    #[inline(always)]
    fn chunk(self) -> &'a Chunk {
        // SAFETY: the metadata of a chunk stays until the end of the instance.
        unsafe { &*self.entry }
    }
}

/// A live area, as somebody has found it without the lock. It stays live for as long as nobody frees it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LiveArea<'a> {
    chunk: &'a Chunk,
    /// Of the chunk's map.
    granule: u32,
    len: u32,
    seen: Seen<'a>,
}

impl LiveArea<'_> {
    /// In granules.
    #[inline(always)]
    pub(crate) fn len(&self) -> u32 {
        self.len
    }

    /// Marks it as freed; false if somebody else was first. Whoever does says so by [`note`](Self::note) or
    /// [`Places::note`] then.
    #[inline(always)]
    pub(crate) fn end(&self) -> bool {
        self.chunk.end(self.granule, &self.seen)
    }

    /// Has it swept by whoever wants room.
    #[inline(always)]
    pub(crate) fn note(&self, places: &Places) {
        // Whoever noted the page before notes the place too; for a chunk that has come in the place of another, who entered it.
        if !self.chunk.is_noted(self.granule) {
            note_first(places, self.chunk, self.granule);
        }
    }
}

/// [`LiveArea::note`] for the first of its page.
#[inline(never)]
fn note_first(places: &Places, chunk: &Chunk, granule: u32) {
    if chunk.note_granule(granule) {
        places.note_place(chunk.place);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_read_as_it_was_written() {
        let chunk = NonNull::without_provenance(core::num::NonZero::new(4096).unwrap());
        for place in [
            Place::Vacant,
            Place::Busy,
            Place::Chunk(chunk),
            Place::Parked(chunk),
        ] {
            let entry = place.encode();
            let is_chunk = matches!(place, Place::Chunk(_));
            assert_eq!(entry.addr() & NO_CHUNK == 0, is_chunk);
            let read = Place::decode(entry);
            assert_eq!(std::format!("{read:?}"), std::format!("{place:?}"));
        }
    }
}
