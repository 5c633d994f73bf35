//! Parts of per-CPU variables as per-CPU variables of their own: a field of a structure, an element of an array or slice.
//!
//! A structure of several cells is one area, so that what is counted together lies together; each field has all the
//! operations that a variable of its type has. The place of a part is a constant, or an index that was checked: an
//! operation on it takes the instructions that one on a plain cell takes, and one addition before them.
//!
//! What always holds: a [`Field`] is made of a field's own offset only, so that every valid `S` has a valid `F` there,
//! aligned; and a [`Part`] lies in a variable that is live for as long as the part is.

use core::fmt;
use core::marker::PhantomData;
use core::mem::size_of;

use crate::alloc_api::{Domain, Handle, PerCpuPtr};
use crate::this_cpu::Live;

/// The place of a field of type `F` in a structure `S`; made by [`field!`](crate::field!).
pub struct Field<S, F> {
    offset_bytes: usize,
    /// Neither owns anything nor depends on marker traits.
    marker: PhantomData<fn(S) -> F>,
}

impl<S, F> Field<S, F> {
    /// The field `offset_bytes` into `S`; for the code that [`field!`](crate::field!) makes.
    ///
    /// # Safety
    /// `offset_of!` gave the offset for a field of the structure `S`, which is an `F` and aligned: `_reference` refers to
    /// it.
    #[doc(hidden)]
    pub const unsafe fn at(offset_bytes: usize, _reference: fn(&S) -> &F) -> Self {
        Self {
            offset_bytes,
            marker: PhantomData,
        }
    }

    /// How far into the structure it lies, in bytes.
    pub const fn offset_bytes(self) -> usize {
        self.offset_bytes
    }
}

impl<S, F> Clone for Field<S, F> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<S, F> Copy for Field<S, F> {}

impl<S, F> fmt::Debug for Field<S, F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Field").field(&self.offset_bytes).finish()
    }
}

/// The place of a field in a structure, a constant [`Field`]: `field!(Structure, name)`, with dots between the names of
/// nested fields and numbers for those of tuples, as `core::mem::offset_of!` takes them.
///
/// ```
/// use pcpu::{CpuCell, Field, FromZeros, LocalCell, Parts, PerCpu, RemoteCell, define_per_cpu, field};
///
/// #[derive(FromZeros)]
/// #[zerocopy(crate = "pcpu::zerocopy")]
/// struct Stats {
///     hits: CpuCell<u64>,
///     misses: CpuCell<u64>,
///     by_size: [CpuCell<u32>; 8],
/// }
///
/// // One area holds all of it on every CPU.
/// let stats = PerCpu::<Stats>::new()?;
/// stats.field(field!(Stats, hits)).add(2);
/// stats.field(field!(Stats, by_size)).element(3).inc();
///
/// // A place is a value: it may have a name, or stand in a table.
/// const COLUMNS: [(&str, Field<Stats, CpuCell<u64>>); 2] =
///     [("hits", field!(Stats, hits)), ("misses", field!(Stats, misses))];
/// let row = COLUMNS.map(|(name, column)| (name, stats.field(column).sum()));
/// assert_eq!(row, [("hits", 2), ("misses", 0)]);
///
/// // Static variables have fields as well.
/// define_per_cpu! {
///     static LOOKUPS: (CpuCell<u64>, CpuCell<i32>) = (CpuCell::new(0), CpuCell::new(0));
/// }
/// LOOKUPS.field(field!((CpuCell<u64>, CpuCell<i32>), 1)).dec();
/// # Ok::<(), pcpu::AllocError>(())
/// ```
///
/// Only fields that lie in the structure itself are taken, none behind a pointer:
///
/// ```compile_fail,E0609
/// struct Pair { one: u32, other: u32 }
/// struct Behind { pair: Box<Pair> }
/// pcpu::field!(Behind, pair.other);
/// ```
/// ```
/// struct Pair { one: u32, other: u32 }
/// struct Inside { pair: Pair }
/// pcpu::field!(Inside, pair.other);
/// ```
///
/// and none of a union, nor one that is not aligned:
///
/// ```compile_fail,E0133
/// union Either { one: u64, other: u64 }
/// pcpu::field!(Either, one);
/// ```
/// ```
/// struct Both { one: u64, other: u64 }
/// pcpu::field!(Both, one);
/// ```
/// ```compile_fail,E0793
/// #[repr(packed)]
/// struct Packed(u8, u64);
/// pcpu::field!(Packed, 1);
/// ```
/// ```
/// #[repr(C)]
/// struct Loose(u8, u64);
/// pcpu::field!(Loose, 1);
/// ```
#[macro_export]
macro_rules! field {
    ($structure:ty, $($path:tt)+) => {
        const {
            let offset_bytes = ::core::mem::offset_of!($structure, $($path)+);
            // Safe code refers to fields that are there and aligned, to none of a union or a packed structure.
            let reference: fn(&$structure) -> &_ = |structure| &structure.$($path)+;
            // SAFETY: the offset and the reference are the same field's: what `offset_of!` takes is in the structure
            // itself, and so comes first in an expression.
            unsafe { $crate::Field::at(offset_bytes, reference) }
        }
    };
}

/// A part of a per-CPU variable, as a variable of its own: what [`Parts`] and [`PerCpu::at`](crate::PerCpu::at) lend.
pub struct Part<'a, T, D: Domain> {
    handle: PerCpuPtr<T, D>,
    whole: PhantomData<&'a T>,
}

impl<'a, T, D: Domain> Part<'a, T, D> {
    /// The part `offset_bytes` into a variable.
    ///
    /// # Safety
    /// The variable is live for `'a`, and all its copies have a valid `T` there.
    #[inline]
    pub(crate) unsafe fn of<W>(whole: PerCpuPtr<W, D>, offset_bytes: usize) -> Self {
        // SAFETY: the part lies in the variable, whose address is not 0 and does not wrap around.
        let handle = unsafe { PerCpuPtr::from_neutral_unchecked(whole.neutral() + offset_bytes) };
        Self {
            handle,
            whole: PhantomData,
        }
    }

    /// A field of this part. It stays as long as the whole variable.
    #[inline]
    pub fn field<F>(self, field: Field<T, F>) -> Part<'a, F, D> {
        // SAFETY: every valid `T` has a valid `F` there.
        unsafe { Part::of(self.handle, field.offset_bytes) }
    }
}

impl<'a, T, const N: usize, D: Domain> Part<'a, [T; N], D> {
    /// The element at `index` of this part. It stays as long as the whole variable.
    ///
    /// # Panics
    /// If `index` is not below `N`.
    #[inline]
    #[track_caller]
    pub fn element(self, index: usize) -> Part<'a, T, D> {
        if index >= N {
            out_of_bounds(index, N);
        }
        // SAFETY: the array has a valid element there.
        unsafe { Part::of(self.handle, index * size_of::<T>()) }
    }
}

#[cold]
#[track_caller]
pub(crate) fn out_of_bounds(index: usize, len: usize) -> ! {
    panic!("element {index} of a per-CPU slice of {len}")
}

impl<T, D: Domain> Clone for Part<'_, T, D> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T, D: Domain> Copy for Part<'_, T, D> {}

impl<T, D: Domain> Handle for Part<'_, T, D> {
    type Target = T;
    type Domain = D;

    #[inline]
    fn handle(&self) -> PerCpuPtr<T, D> {
        self.handle
    }
}

// SAFETY: the whole variable is live for as long as the part, so its copies are valid on every possible CPU, and the part
// in them.
unsafe impl<T, D: Domain> Live for Part<'_, T, D> {}

impl<T, D: Domain> fmt::Debug for Part<'_, T, D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Part").field(&self.handle).finish()
    }
}

/// The parts of static variables and owners; see [`field!`](crate::field!).
///
/// A part borrows its owner:
///
/// ```compile_fail,E0505
/// use pcpu::{CpuCell, LocalCell, Parts, PerCpu, field};
/// let pair = PerCpu::<[CpuCell<u64>; 2]>::new().unwrap();
/// let second = pair.element(1);
/// drop(pair);
/// second.inc();
/// ```
/// ```
/// use pcpu::{CpuCell, LocalCell, Parts, PerCpu, field};
/// let pair = PerCpu::<[CpuCell<u64>; 2]>::new().unwrap();
/// let second = pair.element(1);
/// second.inc();
/// drop(pair);
/// ```
///
/// and a field is that of the variable's own type:
///
/// ```compile_fail,E0308
/// use pcpu::{CpuCell, Parts, PerCpu, field};
/// struct Other(CpuCell<u64>, CpuCell<u64>);
/// let pair = PerCpu::<[CpuCell<u64>; 2]>::new().unwrap();
/// pair.field(field!(Other, 1));
/// ```
pub trait Parts: Live {
    /// A field of the variable.
    #[inline]
    fn field<F>(&self, field: Field<Self::Target, F>) -> Part<'_, F, Self::Domain> {
        // SAFETY: live while it is borrowed, and every valid structure has a valid `F` there.
        unsafe { Part::of(self.handle(), field.offset_bytes) }
    }

    /// The element at `index` of a variable that is an array.
    ///
    /// # Panics
    /// If `index` is not below `N`.
    #[inline]
    #[track_caller]
    fn element<T, const N: usize>(&self, index: usize) -> Part<'_, T, Self::Domain>
    where
        Self: Handle<Target = [T; N]>,
    {
        // SAFETY: live while it is borrowed.
        let whole: Part<'_, [T; N], _> = unsafe { Part::of(self.handle(), 0) };
        whole.element(index)
    }
}

impl<H: Live + ?Sized> Parts for H {}
