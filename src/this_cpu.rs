//! Operations on the current CPU's copy of a scalar, without a lock and without a LOCKed instruction.
//!
//! A scalar that is changed this way is a [`CpuCell`]. Each operation is one step as far as its CPU is concerned:
//! neither an interrupt (or a signal), nor a migration to another CPU, nor another thread there can come between its
//! parts. Towards other CPUs it is no atomic operation: they may read the copy ([`CpuCell::read_remote`], which does
//! not tear), but never write it. That is why a `CpuCell` lends nobody a `&T`, and why no safe operation writes to
//! another CPU's copy.
//!
//! How it is done depends on the home, which a [`Domain`] names by its [`LocalOps`]: [`process`] for a
//! Linux process. All operations are relaxed: they order no other memory access.

use core::cell::UnsafeCell;
use core::fmt;
use core::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

use zerocopy::FromZeros;

use crate::alloc_api::{Domain, Handle, PerCpuPtr};

pub mod portable;
#[cfg(all(feature = "std", target_os = "linux"))]
pub mod process;

/// An unsigned integer of a width that machines operate on: how scalars travel.
///
/// # Safety
/// Sealed: only this crate implements it, for `u8`, `u16`, `u32` and `u64`.
pub unsafe trait Word:
    Copy + Eq + fmt::Debug + Send + Sync + sealed::Sealed + 'static
{
    /// Reads one CPU's copy in one piece.
    ///
    /// # Safety
    /// `copy` points to a live, aligned word.
    unsafe fn load(copy: *const Self) -> Self;
    /// Writes one CPU's copy by a LOCKed or otherwise indivisible step.
    ///
    /// # Safety
    /// `copy` points to a live, aligned word that is only changed by such steps.
    unsafe fn locked(copy: *mut Self, change: Change<Self>) -> Self;
    /// `self + other`, wrapping.
    #[must_use]
    fn wrapping_add(self, other: Self) -> Self;
    /// `-self`, wrapping.
    #[must_use]
    fn wrapping_neg(self) -> Self;
    /// The same number, wider.
    fn widen(self) -> u64;
    /// The low bits of a number.
    fn narrow(wide: u64) -> Self;
}

/// A change of a word; the result is the word before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change<W> {
    /// Replace it.
    Set(W),
    /// Add to it, wrapping.
    Add(W),
    /// Keep the bits of the operand only.
    And(W),
    /// Set the bits of the operand.
    Or(W),
    /// Flip the bits of the operand.
    Xor(W),
    /// Replace the first by the second, if it is the first.
    Replace(W, W),
}

impl<W> Change<W> {
    /// The same change of another width.
    #[inline]
    pub fn map<V>(self, convert: impl Fn(W) -> V) -> Change<V> {
        match self {
            Self::Set(value) => Change::Set(convert(value)),
            Self::Add(value) => Change::Add(convert(value)),
            Self::And(value) => Change::And(convert(value)),
            Self::Or(value) => Change::Or(convert(value)),
            Self::Xor(value) => Change::Xor(convert(value)),
            Self::Replace(old, new) => Change::Replace(convert(old), convert(new)),
        }
    }
}

/// An integer that [`CpuCell`] can hold.
///
/// # Safety
/// Sealed: only this crate implements it, for the integers of 1, 2, 4 and 8 bytes.
pub unsafe trait Scalar: Copy + Send + Sync + FromZeros + sealed::Sealed + 'static {
    /// The unsigned integer of the same width.
    type Word: Word;
    /// The same bits.
    fn to_word(self) -> Self::Word;
    /// The same bits.
    fn from_word(word: Self::Word) -> Self;
}

mod sealed {
    pub trait Sealed {}
}

macro_rules! words {
    ($($word:ty: $atomic:ident for $($scalar:ty),+;)+) => {$(
        // SAFETY: an integer of a width that the machine has operations for.
        unsafe impl Word for $word {
            #[inline]
            unsafe fn load(copy: *const Self) -> Self {
                // SAFETY: live and aligned (promise of the caller); all other accesses are indivisible too.
                unsafe { $atomic::from_ptr(copy.cast_mut()) }.load(Ordering::Relaxed)
            }

            unsafe fn locked(copy: *mut Self, change: Change<Self>) -> Self {
                // SAFETY: live and aligned (promise of the caller); all other accesses are indivisible too.
                let copy = unsafe { $atomic::from_ptr(copy) };
                match change {
                    Change::Set(value) => copy.swap(value, Ordering::Relaxed),
                    Change::Add(value) => copy.fetch_add(value, Ordering::Relaxed),
                    Change::And(value) => copy.fetch_and(value, Ordering::Relaxed),
                    Change::Or(value) => copy.fetch_or(value, Ordering::Relaxed),
                    Change::Xor(value) => copy.fetch_xor(value, Ordering::Relaxed),
                    Change::Replace(old, new) => copy
                        .compare_exchange(old, new, Ordering::Relaxed, Ordering::Relaxed)
                        .unwrap_or_else(|found| found),
                }
            }

            #[inline]
            fn wrapping_add(self, other: Self) -> Self {
                self.wrapping_add(other)
            }

            #[inline]
            fn wrapping_neg(self) -> Self {
                self.wrapping_neg()
            }

            #[inline]
            fn widen(self) -> u64 {
                self.into()
            }

            #[inline]
            fn narrow(wide: u64) -> Self {
                wide as Self
            }
        }

        $(
            impl sealed::Sealed for $scalar {}

            // SAFETY: an integer of the width of the word.
            unsafe impl Scalar for $scalar {
                type Word = $word;

                #[inline]
                fn to_word(self) -> $word {
                    self as $word
                }

                #[inline]
                fn from_word(word: $word) -> Self {
                    word as Self
                }
            }
        )+
    )+};
}

words! {
    u8: AtomicU8 for u8, i8;
    u16: AtomicU16 for u16, i16;
    u32: AtomicU32 for u32, i32;
    u64: AtomicU64 for u64, i64, usize, isize;
}

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

/// How a home works on the current CPU's copy of a word, given its neutral address.
///
/// # Safety
/// Every operation finds the caller's CPU and changes that CPU's copy as one step, or changes a copy that no CPU
/// changes otherwise than by LOCKed steps.
pub unsafe trait LocalOps {
    /// The current CPU's copy.
    ///
    /// # Safety
    /// A word lives at the neutral address `at`, aligned, in the instance of the domain.
    unsafe fn read<W: Word>(at: usize) -> W;

    /// Changes the current CPU's copy, and forgets what it was.
    ///
    /// # Safety
    /// As [`read`](Self::read), and the word is changed by these operations only.
    unsafe fn change<W: Word>(at: usize, change: Change<W>);

    /// Changes the current CPU's copy; returns what it was.
    ///
    /// # Safety
    /// As [`change`](Self::change).
    unsafe fn fetch<W: Word>(at: usize, change: Change<W>) -> W;

    /// Adds to the current CPU's copy, a signed number, if that leaves it at `bound` or less from 0. False if not; then
    /// nothing has changed.
    ///
    /// # Safety
    /// As [`change`](Self::change).
    #[inline]
    unsafe fn add_within(at: usize, value: u64, bound: u64) -> bool {
        // SAFETY: the promise of the caller.
        unsafe { add_within_by_replacing::<Self>(at, value, bound) }
    }

    /// Whether this home has [`add_gated`](Self::add_gated), and the means to wait for it. The answer never changes; a home
    /// that has none need not say so, nor implement the other two.
    fn has_gates() -> bool {
        false
    }

    /// Adds to the current CPU's copy if `gate` is 0, which is tested inside the step. False if it is another number, or if
    /// there is no such step for the caller's thread; then nothing has changed.
    ///
    /// # Safety
    /// As [`change`](Self::change).
    #[inline]
    unsafe fn add_gated(_at: usize, _value: u64, _gate: &AtomicU32) -> bool {
        false
    }

    /// Waits for the gated adds that are in progress. What was stored before, to any gate, is seen by every add that takes
    /// place afterwards; what took place before, with all that its thread did earlier, is seen by the caller.
    ///
    /// # Errors
    /// [`FenceError`]: it is not known whether such adds are in progress.
    fn wait_for_gated() -> Result<(), FenceError> {
        Err(FenceError::Unsupported)
    }
}

/// [`LocalOps::add_within`] of two steps, a read and an exchange.
///
/// # Safety
/// As [`LocalOps::change`].
unsafe fn add_within_by_replacing<O: LocalOps + ?Sized>(at: usize, value: u64, bound: u64) -> bool {
    // SAFETY: the promise of the caller.
    let mut old = unsafe { O::read::<u64>(at) };
    loop {
        let new = old.wrapping_add(value);
        if new.wrapping_add(bound) > bound.wrapping_mul(2) {
            return false;
        }
        // SAFETY: the promise of the caller.
        let found = unsafe { O::fetch(at, Change::Replace(old, new)) };
        if found == old {
            return true;
        }
        old = found;
    }
}

/// Why [`LocalOps::wait_for_gated`] could not wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum FenceError {
    /// The home has no gated operations.
    Unsupported,
    /// The system granted it when asked first and refuses it now, to this thread at least: a filter of system calls was
    /// put in place meanwhile.
    Refused {
        /// The system's error number.
        errno: i32,
    },
}

impl fmt::Display for FenceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unsupported => f.write_str("gated operations do not exist here"),
            Self::Refused { errno } => write!(f, "membarrier is refused: error {errno}"),
        }
    }
}

impl core::error::Error for FenceError {}

/// A handle to a variable that is there for as long as the handle is borrowed: static variables and owners.
///
/// # Safety
/// While a reference to the value exists, the variable is live and initialised on every possible CPU.
pub unsafe trait Live: Handle {}

// SAFETY: a reference to a live handle keeps it borrowed.
unsafe impl<H: Live + ?Sized> Live for &H {}

/// The operations on the current CPU's copy of a [`CpuCell`], for static variables and owners.
///
/// They are safe wherever they are called from. Which CPU is current is found inside the operation.
pub trait LocalCell<T: Scalar>: Live<Target = CpuCell<T>> + Sized {
    /// The value on the current CPU.
    #[inline]
    fn read(&self) -> T {
        // SAFETY: the variable is live.
        unsafe { read(self.handle()) }
    }

    /// Sets the value on the current CPU.
    #[inline]
    fn write(&self, value: T) {
        // SAFETY: the variable is live; a `CpuCell` is changed by these operations only.
        unsafe { write(self.handle(), value) }
    }

    /// Adds, wrapping.
    #[inline]
    fn add(&self, value: T) {
        // SAFETY: as in `write`.
        unsafe { add(self.handle(), value) }
    }

    /// Subtracts, wrapping.
    #[inline]
    fn sub(&self, value: T) {
        // SAFETY: as in `write`.
        unsafe { sub(self.handle(), value) }
    }

    /// Adds 1, wrapping.
    #[inline]
    fn inc(&self)
    where
        T: From<bool>,
    {
        self.add(T::from(true));
    }

    /// Subtracts 1, wrapping.
    #[inline]
    fn dec(&self)
    where
        T: From<bool>,
    {
        self.sub(T::from(true));
    }

    /// Keeps the bits of `value` only.
    #[inline]
    fn and(&self, value: T) {
        // SAFETY: as in `write`.
        unsafe { and(self.handle(), value) }
    }

    /// Sets the bits of `value`.
    #[inline]
    fn or(&self, value: T) {
        // SAFETY: as in `write`.
        unsafe { or(self.handle(), value) }
    }

    /// Flips the bits of `value`.
    #[inline]
    fn xor(&self, value: T) {
        // SAFETY: as in `write`.
        unsafe { xor(self.handle(), value) }
    }

    /// Adds, wrapping; returns the sum.
    #[inline]
    fn add_return(&self, value: T) -> T {
        // SAFETY: as in `write`.
        unsafe { add_return(self.handle(), value) }
    }

    /// Sets the value; returns the one before.
    #[inline]
    fn xchg(&self, value: T) -> T {
        // SAFETY: as in `write`.
        unsafe { xchg(self.handle(), value) }
    }

    /// Sets the value to `new` if it is `old`.
    ///
    /// # Errors
    /// The value, if it is another.
    #[inline]
    fn cmpxchg(&self, old: T, new: T) -> Result<T, T> {
        // SAFETY: as in `write`.
        unsafe { cmpxchg(self.handle(), old, new) }
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
