//! Static per-CPU variables.
//!
//! [`define_per_cpu!`](crate::define_per_cpu) puts a variable's initial value into a section of its own. That section
//! is the template of the static region: the builder of the first chunk copies it into every unit, and from then on
//! only the copies are used. A variable's handle is its place in the template, counted from the neutral address of the
//! first chunk.

use core::cell::UnsafeCell;
use core::mem::align_of;
use core::ops::Range;
use core::sync::atomic::{AtomicUsize, Ordering};

use crate::alloc_api::{Global, Handle, PerCpuPtr, per_cpu_ptr};
use crate::request::CpuError;
use crate::unit::CpuId;

/// The initial value of a static per-CPU variable, in the template section.
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
                align_of::<T>() <= 4096,
                "a static per-CPU variable is aligned to a page at most"
            )
        };
        Self(UnsafeCell::new(value))
    }
}

/// What names a static per-CPU variable: every variable of [`define_per_cpu!`](crate::define_per_cpu).
///
/// # Safety
/// `initial` lies in the template section.
pub unsafe trait StaticVar: Handle<Domain = Global> {
    /// The variable's place in the template.
    fn initial(&self) -> *const Initial<Self::Target>;

    /// `cpu`'s copy.
    ///
    /// # Errors
    /// [`CpuError`] if `cpu` is not possible.
    fn get(&self, cpu: CpuId) -> Result<&'static Self::Target, CpuError>
    where
        Self::Target: Sync + 'static,
    {
        let copy = per_cpu_ptr(self.handle(), cpu)?;
        // SAFETY: the copy starts as the initial value of the type, is only ever shared (it is `Sync`), and lives as
        // long as the process.
        Ok(unsafe { copy.as_ref() })
    }
}

/// The handle of a static variable, for the code that `define_per_cpu!` makes.
#[doc(hidden)]
#[inline(always)]
pub fn handle_of<V: StaticVar>(variable: &V) -> PerCpuPtr<V::Target, Global> {
    let neutral = variable.initial().addr().wrapping_add(delta());
    // SAFETY: neither the window of a process nor the template begins at address 0, and the variable lies in one of them.
    unsafe { PerCpuPtr::from_neutral_unchecked(neutral) }
}

/// From the template to the neutral window; 0 until the instance is set up, which is before `main`.
static DELTA: AtomicUsize = AtomicUsize::new(0);

/// Notes where the neutral window begins.
pub(crate) fn set_neutral_base(base: usize) {
    DELTA.store(base.wrapping_sub(section().start), Ordering::Release);
}

/// Whether a neutral address is one that was computed before the instance was set up.
pub(crate) fn is_too_early(neutral: usize) -> bool {
    section().contains(&neutral)
}

#[inline(always)]
fn delta() -> usize {
    #[cfg(target_arch = "x86_64")]
    {
        let delta;
        // SAFETY: reads a static of ours that is written once, before `main`. PC relative: no entry of the GOT is read.
        unsafe {
            core::arch::asm!("mov {delta}, qword ptr [rip + {symbol}]", delta = out(reg) delta, symbol = sym DELTA,
                options(pure, nomem, nostack, preserves_flags));
        }
        delta
    }
    #[cfg(not(target_arch = "x86_64"))]
    DELTA.load(Ordering::Relaxed)
}

unsafe extern "C" {
    // The linker defines these two for a section whose name is an identifier.
    #[link_name = "__start_pcpu_template"]
    static SECTION_START: [u8; 0];
    #[link_name = "__stop_pcpu_template"]
    static SECTION_END: [u8; 0];
}

crate::define_per_cpu! {
    /// Keeps the template section from being empty, so that the linker defines its borders.
    static SECTION_ANCHOR: u8 = 0;
}

/// The addresses of the template section.
fn section() -> Range<usize> {
    // The anchor is referred to, or the linker may drop the section.
    core::hint::black_box(SECTION_ANCHOR.initial());
    (&raw const SECTION_START).addr()..(&raw const SECTION_END).addr()
}

/// The initial values of all static variables of the program.
pub(crate) fn template() -> &'static [u8] {
    let section = section();
    // SAFETY: the linker places all of the section between its two symbols; nothing writes to it.
    unsafe {
        core::slice::from_raw_parts(
            (&raw const SECTION_START).cast(),
            section.end - section.start,
        )
    }
}

/// Defines static per-CPU variables of a process, with the value that every CPU's copy starts from.
///
/// The type must be `Sync`, for copies can be read from any CPU, and the value constant. A variable is named like a
/// static; [`StaticVar::get`](crate::StaticVar::get) gives a CPU's copy, and
/// [`per_cpu_ptr`](crate::per_cpu_ptr) takes it like any handle.
///
/// ```
/// use pcpu::{StaticVar, define_per_cpu, per_cpu_ptr};
/// use pcpu::unit::CpuId;
/// use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
///
/// define_per_cpu! {
///     /// Requests served.
///     pub static REQUESTS: AtomicU64 = AtomicU64::new(100);
///     static ERRORS: AtomicU64 = AtomicU64::new(0);
/// }
///
/// let cpu = CpuId::new(0);
/// REQUESTS.get(cpu)?.fetch_add(1, Relaxed);
/// assert_eq!(REQUESTS.get(cpu)?.load(Relaxed), 101);
/// assert_eq!(ERRORS.get(cpu)?.load(Relaxed), 0);
/// let same: *const AtomicU64 = REQUESTS.get(cpu)?;
/// assert_eq!(per_cpu_ptr(&REQUESTS, cpu)?.as_ptr().cast_const(), same);
/// # Ok::<(), pcpu::CpuError>(())
/// ```
#[macro_export]
macro_rules! define_per_cpu {
    ($($(#[$meta:meta])* $vis:vis static $name:ident: $type:ty = $value:expr;)*) => {$(
        // A type of its own for every variable, without fields: the variable's address is known from the type, so
        // that no access has to load it. Its name is the variable's, as a reader expects of a static.
        $(#[$meta])*
        #[allow(non_camel_case_types)]
        #[derive(Debug, Clone, Copy)]
        $vis struct $name;

        // The attributes again, for a variable may be there under a condition only.
        $(#[$meta])*
        const _: () = {
            #[unsafe(link_section = "pcpu_template")]
            static INITIAL: $crate::Initial<$type> = $crate::Initial::new($value);

            // SAFETY: static variables live as long as the process, and start as the initial value on every CPU.
            unsafe impl $crate::this_cpu::Live for $name {}

            // SAFETY: `INITIAL` lies in the template section.
            unsafe impl $crate::StaticVar for $name {
                #[inline]
                fn initial(&self) -> *const $crate::Initial<$type> {
                    $crate::address_of_symbol!(INITIAL)
                }
            }

            impl $crate::Handle for $name {
                type Target = $type;
                type Domain = $crate::Global;

                #[inline]
                fn handle(&self) -> $crate::PerCpuPtr<$type> {
                    $crate::handle_of(self)
                }
            }
        };
    )*};
}

/// The address of a static, relative to the code: a plain `&raw const` of a static of another crate would load it from the
/// GOT.
#[doc(hidden)]
#[macro_export]
macro_rules! address_of_symbol {
    ($symbol:ident) => {{
        #[cfg(target_arch = "x86_64")]
        {
            let address: usize;
            // SAFETY: computes an address and touches nothing.
            unsafe {
                core::arch::asm!("lea {address}, [rip + {symbol}]", address = out(reg) address, symbol = sym $symbol,
                    options(pure, nomem, nostack, preserves_flags));
            }
            core::ptr::without_provenance(address)
        }
        #[cfg(not(target_arch = "x86_64"))]
        {
            &raw const $symbol
        }
    }};
}
