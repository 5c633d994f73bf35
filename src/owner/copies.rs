//! How the copies of an owner are made, and how they are dropped: all of them at its end, or those made so far when
//! making one fails or panics.
//!
//! A copy is a row of items, one for a type with a size. Copies are made in order of the CPUs and dropped the other way
//! round.

use core::convert::Infallible;
use core::error::Error;
use core::fmt;
use core::mem::{self, ManuallyDrop, MaybeUninit, align_of, size_of};
use core::ops::Range;
use core::ptr;

use zerocopy::FromZeros;

use crate::alloc_api::{Domain, PerCpuPtr, alloc_percpu_bytes, free_percpu, per_cpu_ptr};
use crate::backing::BackingError;
use crate::request::{AllocError, AllocFlags, CpuError, Request};
use crate::unit::CpuId;

/// Why an owner could not be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum InitError<E> {
    /// There is no memory for it, or it is of a size that is not served.
    Alloc(AllocError),
    /// The copy of a CPU could not be made.
    Init {
        /// The CPU.
        cpu: CpuId,
        /// What was returned for it.
        error: E,
    },
}

impl<E> From<AllocError> for InitError<E> {
    fn from(error: AllocError) -> Self {
        Self::Alloc(error)
    }
}

impl<E: fmt::Display> fmt::Display for InitError<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Alloc(error) => error.fmt(f),
            Self::Init { cpu, error } => write!(f, "the copy of CPU {cpu}: {error}"),
        }
    }
}

impl<E: Error + 'static> Error for InitError<E> {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            Self::Alloc(error) => Some(error),
            Self::Init { error, .. } => Some(error),
        }
    }
}

/// Allocates copies of `len` items that are zero.
pub(super) fn zeroed<T: FromZeros, D: Domain>(len: usize) -> Result<PerCpuPtr<T, D>, AllocError> {
    allocate(len, AllocFlags::empty())
}

/// Allocates copies of `len` items and makes each item by `init`, given the CPU and the place in its copy.
pub(super) fn made_by<T, D: Domain>(
    len: usize,
    mut init: impl FnMut(CpuId, usize) -> T,
) -> Result<PerCpuPtr<T, D>, AllocError> {
    try_made_by(len, |cpu, index| Ok::<T, Infallible>(init(cpu, index))).map_err(
        |error| match error {
            InitError::Alloc(error) => error,
            InitError::Init { error, .. } => match error {},
        },
    )
}

/// [`made_by`], where `init` may fail.
pub(super) fn try_made_by<T, D: Domain, E>(
    len: usize,
    mut init: impl FnMut(CpuId, usize) -> Result<T, E>,
) -> Result<PerCpuPtr<T, D>, InitError<E>> {
    let units = D::units();
    let mut copies = Copies {
        area: allocate::<T, D>(len, AllocFlags::NO_ZERO)?,
        len,
        whole: 0..0,
        partial: None,
    };
    // All of them before the first copy is made: memory is what is likeliest to lack.
    for cpu in units.possible().iter() {
        if !units.materialised().contains(cpu) {
            D::bring_up(cpu).map_err(no_memory)?;
        }
    }
    for cpu in units.possible().iter() {
        let first = per_cpu_ptr(copies.area, cpu).map_err(no_memory)?;
        for index in 0..len {
            copies.partial = Some((cpu, index));
            match init(cpu, index) {
                // SAFETY: the area has `len` items on every CPU; this CPU is materialised and may be written.
                Ok(value) => unsafe { first.add(index).write(value) },
                Err(error) => {
                    copies.finish();
                    return Err(InitError::Init { cpu, error });
                }
            }
        }
        copies.whole.end = cpu.get() + 1;
        copies.partial = None;
    }
    Ok(ManuallyDrop::new(copies).area)
}

fn allocate<T, D: Domain>(len: usize, flags: AllocFlags) -> Result<PerCpuPtr<T, D>, AllocError> {
    // More than can be counted is more than is served, and refused with the limit.
    let bytes = size_of::<T>().saturating_mul(len);
    let request = Request::new(bytes, align_of::<T>()).with_flags(flags);
    Ok(alloc_percpu_bytes::<D>(&request)?.cast())
}

fn no_memory(error: CpuError) -> AllocError {
    AllocError::Backing(match error {
        CpuError::NoMemory { error, .. } => error,
        // Only possible CPUs are asked for; one that is not would have no address.
        CpuError::NotPossible { .. } => BackingError::OutOfAddressSpace,
    })
}

/// Copies that are to be dropped, and the area to be freed after them, also when `init` or a drop panics.
///
/// Every item of the CPUs `whole` is valid, and so are the first ones of the partial copy; none is used any more.
pub(super) struct Copies<T, D: Domain> {
    area: PerCpuPtr<T, D>,
    /// Items of a copy.
    len: usize,
    /// Numbers of the CPUs whose copies are whole; ids that are not possible may be among them.
    whole: Range<u32>,
    /// The copy that is being made, and how many of its items are.
    partial: Option<(CpuId, usize)>,
}

impl<T, D: Domain> Copies<T, D> {
    /// The copies of `len` items of all possible CPUs.
    ///
    /// # Safety
    /// The area was allocated in `D` for them and is freed by nobody else, every item is valid, is zero bytes where its
    /// CPU is not materialised, and is not used any more.
    pub(super) unsafe fn whole(area: PerCpuPtr<T, D>, len: usize) -> Self {
        let cpus = match mem::needs_drop::<T>() {
            true => D::units().nr_cpu_ids(),
            false => 0,
        };
        Self {
            area,
            len,
            whole: 0..cpus,
            partial: None,
        }
    }

    /// Drops and frees. If a drop panics the others follow while it unwinds, as those of a `Vec` do.
    pub(super) fn finish(mut self) {
        self.drop_items();
    }

    fn drop_items(&mut self) {
        while let Some((cpu, items)) = self.pop() {
            self.drop_copy(cpu, items);
        }
    }

    /// Takes the last copy, and how many items of it are valid.
    fn pop(&mut self) -> Option<(CpuId, usize)> {
        let whole = |id| (CpuId::new(id), self.len);
        self.partial
            .take()
            .or_else(|| self.whole.next_back().map(whole))
    }

    /// Drops the first `items` of `cpu`'s copy; or one of them, and puts the others back.
    fn drop_copy(&mut self, cpu: CpuId, items: usize) {
        let (Ok(first), Some(others)) = (per_cpu_ptr(self.area, cpu), items.checked_sub(1)) else {
            return;
        };
        if D::units().materialised().contains(cpu) {
            let items = ptr::slice_from_raw_parts_mut(first.as_ptr(), items);
            // SAFETY: these items are valid, and `pop` names none of them twice.
            unsafe { items.drop_in_place() };
        } else {
            self.partial = Some((cpu, others));
            // SAFETY: the item is zero bytes and valid. A drop may write, which this copy does not allow; it has never been
            // lent, so that nothing tells it from a value that was moved here.
            drop(unsafe { MaybeUninit::<T>::zeroed().assume_init() });
        }
    }
}

impl<T, D: Domain> Drop for Copies<T, D> {
    fn drop(&mut self) {
        self.drop_items();
        // SAFETY: the copies are dropped, and the area is nobody else's.
        let freed = unsafe { free_percpu(self.area) };
        debug_assert_eq!(freed, Ok(()), "an owner's area was freed by somebody else");
    }
}
