//! Pairs of words that change together.
//!
//! The operations on the current CPU's copy see both words as one; a change of both is one store. Other CPUs read word by
//! word: each is whole, the two may be of different times.

use core::cell::UnsafeCell;
use core::fmt;

use zerocopy::FromZeros;

use super::{Live, LocalOps, Pair, Scalar, Word};
use crate::alloc_api::{Domain, PerCpuPtr};

/// Two scalars of 8 bytes of which each CPU changes its own copy together: a pointer and its generation, a count and a sum.
///
/// ```
/// use pcpu::{CpuPair, LocalPair, define_per_cpu};
///
/// define_per_cpu! {
///     /// How many requests, and how long they took.
///     static SERVED: CpuPair<u64> = CpuPair::new(0, 0);
/// }
/// SERVED.update(|(requests, nanoseconds)| (requests + 1, nanoseconds + 350));
/// let (requests, nanoseconds) = SERVED.read();
/// assert_eq!(nanoseconds, requests * 350);
/// ```
#[derive(FromZeros)]
#[repr(C, align(16))]
pub struct CpuPair<A, B = A> {
    first: UnsafeCell<A>,
    second: UnsafeCell<B>,
}

// SAFETY: all access is by steps that are indivisible (reads of a word) or by the CPU that has the copy (changes).
unsafe impl<A: Scalar, B: Scalar> Sync for CpuPair<A, B> {}

impl<A: Scalar<Word = u64>, B: Scalar<Word = u64>> CpuPair<A, B> {
    /// A pair with initial values.
    pub const fn new(first: A, second: B) -> Self {
        Self {
            first: UnsafeCell::new(first),
            second: UnsafeCell::new(second),
        }
    }

    /// The values of this copy, whichever CPU it belongs to. Each is whole; if the CPU changes the pair meanwhile, one may
    /// be from before the change and the other from after it.
    #[inline]
    pub fn read_remote(&self) -> (A, B) {
        // SAFETY: the reference says that both words are live and aligned.
        unsafe {
            (
                A::from_word(u64::load(self.first.get().cast())),
                B::from_word(u64::load(self.second.get().cast())),
            )
        }
    }
}

impl<A, B> fmt::Debug for CpuPair<A, B>
where
    A: Scalar<Word = u64> + fmt::Debug,
    B: Scalar<Word = u64> + fmt::Debug,
{
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (first, second) = self.read_remote();
        f.debug_tuple("CpuPair")
            .field(&first)
            .field(&second)
            .finish()
    }
}

/// The operations on the current CPU's copy of a [`CpuPair`], for static variables and owners.
pub trait LocalPair<A: Scalar<Word = u64>, B: Scalar<Word = u64>>:
    Live<Target = CpuPair<A, B>> + Sized
{
    /// The values on the current CPU, of one time.
    #[inline]
    fn read(&self) -> (A, B) {
        // SAFETY: the variable is live.
        unsafe { read_pair(self.handle()) }
    }

    /// Sets both values to `new` if they are `old`.
    ///
    /// # Errors
    /// The values, if they are others.
    #[inline]
    fn cmpxchg(&self, old: (A, B), new: (A, B)) -> Result<(A, B), (A, B)> {
        // SAFETY: the variable is live; a `CpuPair` is changed by these operations only.
        unsafe { cmpxchg_pair(self.handle(), old, new) }
    }

    /// Sets both values; returns those before.
    #[inline]
    fn xchg(&self, new: (A, B)) -> (A, B) {
        self.update(|_| new)
    }

    /// Sets both values to what `change` makes of them; returns those before. `change` is called again if the CPU's copy
    /// has become another meanwhile, or the caller has come to another CPU.
    #[inline]
    fn update(&self, mut change: impl FnMut((A, B)) -> (A, B)) -> (A, B) {
        let mut old = self.read();
        loop {
            match self.cmpxchg(old, change(old)) {
                Ok(before) => return before,
                Err(found) => old = found,
            }
        }
    }
}

impl<A, B, H> LocalPair<A, B> for H
where
    A: Scalar<Word = u64>,
    B: Scalar<Word = u64>,
    H: Live<Target = CpuPair<A, B>>,
{
}

/// The current CPU's copy of a pair, not torn.
///
/// # Safety
/// The variable is live.
#[inline]
pub unsafe fn read_pair<A, B, D>(variable: PerCpuPtr<CpuPair<A, B>, D>) -> (A, B)
where
    A: Scalar<Word = u64>,
    B: Scalar<Word = u64>,
    D: Domain,
{
    // SAFETY: live and aligned by its type (promise of the caller).
    from_words(unsafe { D::Ops::read_pair(variable.neutral()) })
}

/// Sets the current CPU's copy of a pair to `new` if it is `old`, by one store.
///
/// # Errors
/// The values, if they are others.
///
/// # Safety
/// The variable is live.
#[inline]
pub unsafe fn cmpxchg_pair<A, B, D>(
    variable: PerCpuPtr<CpuPair<A, B>, D>,
    old: (A, B),
    new: (A, B),
) -> Result<(A, B), (A, B)>
where
    A: Scalar<Word = u64>,
    B: Scalar<Word = u64>,
    D: Domain,
{
    let (old_words, new_words) = (to_words(old), to_words(new));
    // SAFETY: live and aligned by its type (promise of the caller); a `CpuPair` is changed by these operations only.
    let found = unsafe { D::Ops::replace_pair(variable.neutral(), old_words, new_words) };
    if found == old_words {
        Ok(old)
    } else {
        Err(from_words(found))
    }
}

#[inline]
fn to_words<A, B>((first, second): (A, B)) -> Pair
where
    A: Scalar<Word = u64>,
    B: Scalar<Word = u64>,
{
    [first.to_word(), second.to_word()]
}

#[inline]
fn from_words<A, B>([first, second]: Pair) -> (A, B)
where
    A: Scalar<Word = u64>,
    B: Scalar<Word = u64>,
{
    (A::from_word(first), B::from_word(second))
}
