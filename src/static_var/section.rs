//! The sections that static per-CPU variables lie in, and the template that is made of them.
//!
//! ```text
//! linked object:   .. pcpu_page_aligned .. pcpu_template .. pcpu_read_mostly ..     wherever the linker puts them
//!                           |                     |                |
//! template:       | first | page aligned | plain | read mostly | cache aligned |   one behind the other
//! ```
//! No linker script is needed: a section whose name is an identifier has borders that the linker defines, whatever lies
//! between one section and the next. The order is made when the template is copied, so that each section has its own
//! distance (*delta*) from where the linker put it to its place in neutral address space.
//!
//! What always holds:
//! - every section begins in the template at a multiple of [`SECTION_ALIGN_BYTES`], the page aligned one of a page, and no
//!   variable in it has a greater alignment; in the linked object it begins at a multiple of its greatest alignment;
//! - no two sections share a cache line, nor does the last one with what comes behind the template;
//! - a section that no variable is in takes no room.

use core::cell::UnsafeCell;
use core::mem::align_of;
use core::ops::Range;
use core::ptr;
use core::sync::atomic::{AtomicUsize, Ordering};

/// Where in the template a variable lies: the argument of `#[percpu(..)]` in
/// [`define_per_cpu!`](crate::define_per_cpu).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Section {
    /// `#[percpu(first)]`: at the very start of the template.
    First,
    /// `#[percpu(page_aligned)]`: on pages of its own.
    PageAligned,
    /// Nothing asked for.
    Plain,
    /// `#[percpu(read_mostly)]`: on cache lines where nothing is that is written often.
    ReadMostly,
    /// `#[percpu(cache_aligned)]`: on cache lines of its own.
    CacheAligned,
}

/// All sections, in their order in the template. `PageAligned` comes early, for nothing has to be left free before it
/// as long as nobody wants to be first.
const ORDER: [Section; 5] = [
    Section::First,
    Section::PageAligned,
    Section::Plain,
    Section::ReadMostly,
    Section::CacheAligned,
];

/// What a variable that is on cache lines of its own is aligned to, in bytes: the line of the processor.
pub const CACHE_LINE_BYTES: usize = align_of::<OnOwnLines<()>>();

/// What a variable that is on pages of its own is aligned to, in bytes.
const PAGE_BYTES: usize = align_of::<OnOwnPages<()>>();

/// Sections begin at its multiples. Twice the line of x86-64: the alignment of types that are padded against the
/// processor's fetching lines in pairs.
const SECTION_ALIGN_BYTES: usize = 128;

/// The initial value of a static per-CPU variable, in its section.
///
/// It is never used as a `T`: its bytes are what the copies start from.
#[derive(Debug)]
#[repr(transparent)]
pub struct Initial<T>(UnsafeCell<T>);

// SAFETY: nothing reads or writes the value through this type; the copies are shared, and need `T: Sync`.
unsafe impl<T: Sync> Sync for Initial<T> {}

impl<T> Initial<T> {
    /// An initial value.
    pub const fn new(value: T) -> Self {
        const {
            assert!(
                align_of::<T>() <= SECTION_ALIGN_BYTES,
                "a static per-CPU variable is aligned to 128 bytes at most, but for #[percpu(page_aligned)]"
            )
        };
        Self(UnsafeCell::new(value))
    }
}

/// An initial value that has its cache lines for itself.
#[doc(hidden)]
#[derive(Debug)]
#[cfg_attr(
    not(any(target_arch = "aarch64", target_arch = "powerpc64")),
    repr(C, align(64))
)]
#[cfg_attr(
    any(target_arch = "aarch64", target_arch = "powerpc64"),
    repr(C, align(128))
)]
pub struct OnOwnLines<T>(Initial<T>);

impl<T> OnOwnLines<T> {
    /// An initial value.
    pub const fn new(value: T) -> Self {
        Self(Initial::new(value))
    }
}

/// An initial value that has its pages for itself.
#[doc(hidden)]
#[derive(Debug)]
#[repr(C, align(4096))]
pub struct OnOwnPages<T>(Initial<T>);

impl<T> OnOwnPages<T> {
    /// An initial value.
    pub const fn new(value: T) -> Self {
        const {
            assert!(
                align_of::<T>() <= PAGE_BYTES,
                "a static per-CPU variable is aligned to a page at most"
            )
        };
        Self(Initial(UnsafeCell::new(value)))
    }
}

/// From where the linker put each section to its place in neutral address space, in the order of [`ORDER`]; 0 until the
/// variables have a place.
pub(super) static DELTAS: [AtomicUsize; ORDER.len()] = [const { AtomicUsize::new(0) }; ORDER.len()];

macro_rules! sections {
    ($($section:ident: $name:literal;)+) => {
        /// The addresses of a section.
        fn addresses(section: Section) -> Range<usize> {
            match section {$(
                Section::$section => {
                    unsafe extern "C" {
                        #[link_name = concat!("__start_", $name)]
                        static START: [u8; 0];
                        #[link_name = concat!("__stop_", $name)]
                        static STOP: [u8; 0];
                    }
                    /// Nothing, so that the linker defines the borders of a section that no variable is in.
                    #[used]
                    #[unsafe(link_section = $name)]
                    static ANCHOR: Initial<[u8; 0]> = Initial::new([]);
                    // It is referred to, or the linker may drop it and with it the section.
                    core::hint::black_box(&ANCHOR);
                    (&raw const START).expose_provenance()..(&raw const STOP).addr()
                }
            )+}
        }
    };
}

sections! {
    First: "pcpu_first";
    PageAligned: "pcpu_page_aligned";
    Plain: "pcpu_template";
    ReadMostly: "pcpu_read_mostly";
    CacheAligned: "pcpu_cache_aligned";
}

/// The template of a linked object: which bytes of it go where.
#[derive(Debug)]
pub(crate) struct Template {
    /// Where the linker put each section, and where it begins in the template.
    sections: [(Range<usize>, usize); ORDER.len()],
    /// The length.
    pub(crate) bytes: usize,
    /// What it must be aligned to for all of its variables to be aligned.
    pub(crate) align_bytes: usize,
}

impl Template {
    /// The template of the object that this copy of the crate is linked into.
    pub(crate) fn of_this_object() -> Self {
        Self::of(ORDER.map(addresses))
    }

    fn of(addresses: [Range<usize>; ORDER.len()]) -> Self {
        let mut template = Self {
            sections: addresses.map(|range| (range, 0)),
            bytes: 0,
            align_bytes: SECTION_ALIGN_BYTES,
        };
        for (section, (range, start)) in ORDER.into_iter().zip(&mut template.sections) {
            if range.start == range.end {
                continue;
            }
            let align_bytes = match section {
                Section::PageAligned => PAGE_BYTES,
                _ => SECTION_ALIGN_BYTES,
            };
            *start = template.bytes.next_multiple_of(align_bytes);
            template.bytes = (*start + range.len()).next_multiple_of(SECTION_ALIGN_BYTES);
            template.align_bytes = template.align_bytes.max(align_bytes);
        }
        template
    }

    /// Writes the initial values of all variables to a copy.
    ///
    /// # Safety
    /// `bytes` bytes from `copy` on are writable and nobody else's.
    pub(crate) unsafe fn write_to(&self, copy: *mut u8) {
        for (range, start) in &self.sections {
            let section = ptr::with_exposed_provenance::<u8>(range.start);
            // SAFETY: the linker places all of a section between its borders, where nothing is ever written; it fits in
            // the copy at its start.
            unsafe { ptr::copy_nonoverlapping(section, copy.add(*start), range.len()) };
        }
    }

    /// Gives all variables their place: from now on their handles count from `base`, the neutral address of the first
    /// byte of the template.
    pub(crate) fn place_at(&self, base: usize) {
        for (delta, (range, start)) in DELTAS.iter().zip(&self.sections) {
            let place = base.wrapping_add(*start);
            delta.store(place.wrapping_sub(range.start), Ordering::Release);
        }
    }

    /// Takes their place from all variables.
    pub(crate) fn displace() {
        DELTAS
            .iter()
            .for_each(|delta| delta.store(0, Ordering::Release));
    }
}

/// Whether a neutral address is one that was computed while the variables had no place: where the linker put one.
pub(crate) fn is_without_place(neutral: usize) -> bool {
    ORDER
        .into_iter()
        .any(|section| addresses(section).contains(&neutral))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The starts of sections of these lengths in the template, its length and its alignment.
    fn lay_out(lengths: [usize; ORDER.len()]) -> ([usize; ORDER.len()], usize, usize) {
        let template = Template::of(lengths.map(|length| 4096..4096 + length));
        let starts = template.sections.map(|(_, start)| start);
        (starts, template.bytes, template.align_bytes)
    }

    #[test]
    fn sections_follow_each_other_on_lines_of_their_own() {
        assert_eq!(lay_out([0; 5]), ([0; 5], 0, 128));
        assert_eq!(
            lay_out([0, 0, 1, 0, 0]),
            ([0; 5], 128, 128),
            "what comes behind has other lines"
        );
        assert_eq!(
            lay_out([8, 0, 200, 4, 64]),
            ([0, 0, 128, 384, 512], 640, 128)
        );
        assert_eq!(
            lay_out([0, 8192, 1, 0, 64]),
            ([0, 0, 8192, 0, 8320], 8448, 4096),
            "pages come first"
        );
        assert_eq!(
            lay_out([4, 4096, 0, 1, 0]),
            ([0, 4096, 0, 8192, 0], 8320, 4096)
        );
    }
}
