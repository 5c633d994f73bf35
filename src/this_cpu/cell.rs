//! Cells of one scalar, and the operations on the current CPU's copy of one.

use core::cell::UnsafeCell;
use core::fmt;

use zerocopy::FromZeros;

use super::{Change, Live, LocalOps, Scalar, Word};
use crate::alloc_api::{Domain, PerCpuPtr};

/// A scalar of which each CPU changes its own copy by the operations of this module, and nobody another's.
///
/// It gives no `&T`: a shared reference would promise that the value does not change, and an atomic operation through
/// one would lose updates against the CPU's own operations.
///
/// ```
/// use pcpu::{CpuCell, LocalCell, StaticVar, define_per_cpu, global};
///
/// define_per_cpu! {
///     static REQUESTS: CpuCell<u64> = CpuCell::new(0);
/// }
/// REQUESTS.add(2);
/// REQUESTS.inc();
/// let cpus = global().units().possible();
/// let sum: u64 = cpus.iter().map(|cpu| REQUESTS.get(cpu).unwrap().read_remote()).sum();
/// assert_eq!(sum, 3);
/// ```
#[derive(FromZeros)]
#[repr(transparent)]
pub struct CpuCell<T>(UnsafeCell<T>);

// SAFETY: all access is by steps that are indivisible (reads) or by the CPU that has the copy (changes).
unsafe impl<T: Scalar> Sync for CpuCell<T> {}

impl<T: Scalar> CpuCell<T> {
    /// A cell with an initial value.
    pub const fn new(value: T) -> Self {
        Self(UnsafeCell::new(value))
    }

    /// The value of this copy, whichever CPU it belongs to. It may be changing; it is never torn.
    #[inline]
    pub fn read_remote(&self) -> T {
        // SAFETY: the reference says that the word is live and aligned.
        T::from_word(unsafe { T::Word::load(self.0.get().cast()) })
    }
}

impl<T: Scalar + fmt::Debug> fmt::Debug for CpuCell<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("CpuCell").field(&self.read_remote()).finish()
    }
}

/// The operations on the current CPU's copy of a [`CpuCell`], for static variables and owners.
///
/// They are safe wherever they are called from. Which CPU is current is found inside the operation.
pub trait LocalCell<T: Scalar>: Live<Target = CpuCell<T>> + Sized {
    /// The value on the current CPU.
    #[inline]
    fn read(&self) -> T {
        // SAFETY: a `CpuCell<T>` is a word of this width.
        T::from_word(unsafe { self.read_word() })
    }

    /// Sets the value on the current CPU.
    #[inline]
    fn write(&self, value: T) {
        // SAFETY: as in `read`; a `CpuCell` is changed by these operations only.
        unsafe { self.change_word(Change::Set(value.to_word())) }
    }

    /// Adds, wrapping.
    #[inline]
    fn add(&self, value: T) {
        // SAFETY: as in `write`.
        unsafe { self.change_word(Change::Add(value.to_word())) }
    }

    /// Subtracts, wrapping.
    #[inline]
    fn sub(&self, value: T) {
        // SAFETY: as in `write`.
        unsafe { self.change_word(Change::Add(value.to_word().wrapping_neg())) }
    }

    /// Adds 1, wrapping.
    #[inline]
    fn inc(&self)
    where
        T: From<bool>,
    {
        // SAFETY: as in `write`.
        unsafe { self.inc_word::<T::Word>() }
    }

    /// Subtracts 1, wrapping.
    #[inline]
    fn dec(&self)
    where
        T: From<bool>,
    {
        // SAFETY: as in `write`.
        unsafe { self.dec_word::<T::Word>() }
    }

    /// Keeps the bits of `value` only.
    #[inline]
    fn and(&self, value: T) {
        // SAFETY: as in `write`.
        unsafe { self.change_word(Change::And(value.to_word())) }
    }

    /// Sets the bits of `value`.
    #[inline]
    fn or(&self, value: T) {
        // SAFETY: as in `write`.
        unsafe { self.change_word(Change::Or(value.to_word())) }
    }

    /// Flips the bits of `value`.
    #[inline]
    fn xor(&self, value: T) {
        // SAFETY: as in `write`.
        unsafe { self.change_word(Change::Xor(value.to_word())) }
    }

    /// Adds, wrapping; returns the sum.
    #[inline]
    fn add_return(&self, value: T) -> T {
        let value = value.to_word();
        // SAFETY: as in `write`.
        let before = unsafe { self.fetch_word(Change::Add(value)) };
        T::from_word(before.wrapping_add(value))
    }

    /// Sets the value; returns the one before.
    #[inline]
    fn xchg(&self, value: T) -> T {
        // SAFETY: as in `write`.
        T::from_word(unsafe { self.fetch_word(Change::Set(value.to_word())) })
    }

    /// Sets the value to `new` if it is `old`.
    ///
    /// # Errors
    /// The value, if it is another.
    #[inline]
    fn cmpxchg(&self, old: T, new: T) -> Result<T, T> {
        let (old_word, new_word) = (old.to_word(), new.to_word());
        // SAFETY: as in `write`.
        let found = unsafe { self.fetch_word(Change::Replace(old_word, new_word)) };
        if found == old_word {
            Ok(old)
        } else {
            Err(T::from_word(found))
        }
    }

    /// Sets the value to what `change` makes of it; returns the one before. `change` is called again if the CPU's copy has
    /// become another meanwhile, or the caller has come to another CPU.
    ///
    /// ```
    /// use pcpu::{CpuCell, LocalCell, define_per_cpu};
    ///
    /// define_per_cpu! {
    ///     static LONGEST_NANOSECONDS: CpuCell<u64> = CpuCell::new(0);
    /// }
    /// LONGEST_NANOSECONDS.update(|longest| longest.max(350));
    /// ```
    #[inline]
    fn update(&self, mut change: impl FnMut(T) -> T) -> T {
        let mut old = self.read();
        loop {
            match self.cmpxchg(old, change(old)) {
                Ok(before) => return before,
                Err(found) => old = found,
            }
        }
    }
}

impl<T: Scalar, H: Live<Target = CpuCell<T>>> LocalCell<T> for H {}

/// The current CPU's copy of a scalar.
///
/// # Safety
/// The variable is live.
#[inline]
pub unsafe fn read<T: Scalar, D: Domain>(variable: PerCpuPtr<CpuCell<T>, D>) -> T {
    // SAFETY: live and aligned by its type (promise of the caller).
    T::from_word(unsafe { D::Ops::read(variable.neutral()) })
}

macro_rules! changes {
    ($($(#[$meta:meta])* $name:ident => |$value:ident| $change:expr;)+) => {$(
        $(#[$meta])*
        ///
        /// # Safety
        /// The variable is live.
        #[inline]
        pub unsafe fn $name<T: Scalar, D: Domain>(variable: PerCpuPtr<CpuCell<T>, D>, value: T) {
            let $value = value.to_word();
            // SAFETY: live and aligned by its type (promise of the caller); a `CpuCell` is changed by these operations
            // only.
            unsafe { D::Ops::change(variable.neutral(), $change) }
        }
    )+};
}

changes! {
    /// Sets the current CPU's copy.
    write => |value| Change::Set(value);
    /// Adds to the current CPU's copy, wrapping.
    add => |value| Change::Add(value);
    /// Subtracts from the current CPU's copy, wrapping.
    sub => |value| Change::Add(value.wrapping_neg());
    /// Keeps the bits of `value` only in the current CPU's copy.
    and => |value| Change::And(value);
    /// Sets the bits of `value` in the current CPU's copy.
    or => |value| Change::Or(value);
    /// Flips the bits of `value` in the current CPU's copy.
    xor => |value| Change::Xor(value);
}

/// Adds 1 to the current CPU's copy, wrapping.
///
/// # Safety
/// The variable is live.
#[inline]
pub unsafe fn inc<T: Scalar, D: Domain>(variable: PerCpuPtr<CpuCell<T>, D>) {
    // SAFETY: live and aligned by its type (promise of the caller); a `CpuCell` is changed by these operations only.
    unsafe { D::Ops::inc::<T::Word>(variable.neutral()) }
}

/// Subtracts 1 from the current CPU's copy, wrapping.
///
/// # Safety
/// The variable is live.
#[inline]
pub unsafe fn dec<T: Scalar, D: Domain>(variable: PerCpuPtr<CpuCell<T>, D>) {
    // SAFETY: as in `inc`.
    unsafe { D::Ops::dec::<T::Word>(variable.neutral()) }
}

/// Adds to the current CPU's copy, wrapping; returns the sum.
///
/// # Safety
/// The variable is live.
#[inline]
pub unsafe fn add_return<T: Scalar, D: Domain>(variable: PerCpuPtr<CpuCell<T>, D>, value: T) -> T {
    let value = value.to_word();
    // SAFETY: live and aligned by its type (promise of the caller); a `CpuCell` is changed by these operations only.
    let before = unsafe { D::Ops::fetch(variable.neutral(), Change::Add(value)) };
    T::from_word(before.wrapping_add(value))
}

/// Sets the current CPU's copy; returns the value before.
///
/// # Safety
/// The variable is live.
#[inline]
pub unsafe fn xchg<T: Scalar, D: Domain>(variable: PerCpuPtr<CpuCell<T>, D>, value: T) -> T {
    // SAFETY: as in `add_return`.
    T::from_word(unsafe { D::Ops::fetch(variable.neutral(), Change::Set(value.to_word())) })
}

/// Sets the current CPU's copy to `new` if it is `old`.
///
/// # Errors
/// The value, if it is another.
///
/// # Safety
/// The variable is live.
#[inline]
pub unsafe fn cmpxchg<T: Scalar, D: Domain>(
    variable: PerCpuPtr<CpuCell<T>, D>,
    old: T,
    new: T,
) -> Result<T, T> {
    let (old_word, new_word) = (old.to_word(), new.to_word());
    // SAFETY: as in `add_return`.
    let found = unsafe { D::Ops::fetch(variable.neutral(), Change::Replace(old_word, new_word)) };
    if found == old_word {
        Ok(old)
    } else {
        Err(T::from_word(found))
    }
}
