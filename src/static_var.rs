//! Static per-CPU variables.
//!
//! [`define_per_cpu!`](crate::define_per_cpu) puts a variable's initial value into one of the sections of [`section`].
//! Together they are the template of the static region: the builder of the first chunk copies it into every unit, and
//! from then on only the copies are used. A variable's handle is its place in the template, counted from the neutral
//! address of the first chunk. In a library that is loaded at run time the template is copied to an area that the host
//! gives it: [`crate::module`].

use crate::alloc_api::{Global, Handle, PerCpuPtr, per_cpu_ptr};
use crate::request::CpuError;
use crate::unit::CpuId;

mod section;

pub use section::{CACHE_LINE_BYTES, Initial, OnOwnLines, OnOwnPages, Section};
pub(crate) use section::{Template, is_without_place};

/// What names a static per-CPU variable: every variable of [`define_per_cpu!`](crate::define_per_cpu).
///
/// # Safety
/// `initial` lies in the section.
pub unsafe trait StaticVar: Handle<Domain = Global> {
    /// The section of the template that the variable lies in.
    const SECTION: Section;

    /// The variable's initial value.
    fn initial(&self) -> *const Initial<Self::Target>;

    /// `cpu`'s copy. In a [module](mod@crate::module) it is there until the module is detached.
    ///
    /// # Errors
    /// [`CpuError`] if `cpu` is not possible.
    fn get(&self, cpu: CpuId) -> Result<&'static Self::Target, CpuError>
    where
        Self::Target: Sync + 'static,
    {
        let copy = per_cpu_ptr(self, cpu)?;
        // SAFETY: the copy starts as the initial value of the type, is only ever shared (it is `Sync`), and lives as
        // long as the process.
        Ok(unsafe { copy.as_ref() })
    }
}

/// The handle of a static variable, for the code that `define_per_cpu!` makes.
#[doc(hidden)]
#[inline(always)]
pub fn handle_of<V: StaticVar>(variable: &V) -> PerCpuPtr<V::Target, Global> {
    let neutral = variable.initial().addr().wrapping_add(delta::<V>());
    // SAFETY: neither the window of a process nor the template begins at address 0, and the variable lies in one of them.
    unsafe { PerCpuPtr::from_neutral_unchecked(neutral) }
}

/// From where the linker put a variable to its place in neutral address space.
#[inline(always)]
fn delta<V: StaticVar>() -> usize {
    #[cfg(target_arch = "x86_64")]
    {
        let delta;
        // SAFETY: reads a static of ours that is written before any handle is used. PC relative: no entry of the GOT is
        // read.
        unsafe {
            core::arch::asm!("mov {delta}, qword ptr [rip + {deltas} + {at}]", delta = out(reg) delta,
                deltas = sym section::DELTAS, at = const size_of::<usize>() * V::SECTION as usize,
                options(pure, nomem, nostack, preserves_flags));
        }
        delta
    }
    #[cfg(not(target_arch = "x86_64"))]
    section::DELTAS[V::SECTION as usize].load(core::sync::atomic::Ordering::Relaxed)
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
///
/// # Sections
/// An attribute before `static` says where in the template a variable lies:
///
/// | attribute | what for |
/// |---|---|
/// | none | variables of the CPU's own; aligned to 128 bytes at most |
/// | `#[percpu(cache_aligned)]` | what other CPUs write to as well: cache lines of its own |
/// | `#[percpu(read_mostly)]` | what is hardly ever written: cache lines without anything that is written often |
/// | `#[percpu(page_aligned)]` | pages of its own; any alignment up to a page of 4096 bytes |
/// | `#[percpu(first)]` | the very start of the template: code that knows where its variable lies |
///
/// One variable of the program may be first; where there are several, the linker orders them. In a library that is
/// loaded at run time the first one is at the start of the library's area.
///
/// ```standalone_crate
/// use pcpu::{CpuCell, Handle, LocalCell, define_per_cpu, global};
/// use std::sync::atomic::AtomicU64;
///
/// define_per_cpu! {
///     /// Work that other CPUs hand over.
///     #[percpu(cache_aligned)]
///     static INBOX: AtomicU64 = AtomicU64::new(0);
///     #[percpu(read_mostly)]
///     static LIMIT: CpuCell<u32> = CpuCell::new(100);
///     #[percpu(page_aligned)]
///     static TABLE: [CpuCell<u64>; 512] = [const { CpuCell::new(0) }; 512];
///     #[percpu(first)]
///     static CANARY: CpuCell<u64> = CpuCell::new(0xbad);
/// }
///
/// assert_eq!(CANARY.handle().neutral(), global().neutral_base());
/// assert!(INBOX.handle().neutral().is_multiple_of(pcpu::CACHE_LINE_BYTES));
/// assert!(TABLE.handle().neutral().is_multiple_of(4096));
/// assert_eq!(LIMIT.read(), 100);
/// ```
///
/// A program with page-aligned variables has its units a whole number of pages apart; see
/// [`page_geometry!`](crate::page_geometry!) for what that costs and what else it is good for.
///
/// A greater alignment than a section has is refused by the compiler:
///
/// ```compile_fail,E0080
/// #[repr(align(256))]
/// struct Wide(u8);
/// pcpu::define_per_cpu! {
///     static WIDE: Wide = Wide(0);
/// }
/// # fn main() {}
/// ```
/// ```
/// #[repr(align(256))]
/// struct Wide(u8);
/// pcpu::define_per_cpu! {
///     #[percpu(page_aligned)]
///     static WIDE: Wide = Wide(0);
/// }
/// # fn main() {}
/// ```
///
/// So are two sections, and one that does not exist:
///
/// ```compile_fail
/// pcpu::define_per_cpu! {
///     #[percpu(read_mostly)]
///     #[percpu(page_aligned)]
///     static BOTH: u8 = 0;
/// }
/// # fn main() {}
/// ```
/// ```compile_fail
/// pcpu::define_per_cpu! {
///     #[percpu(page_alined)]
///     static MISSPELT: u8 = 0;
/// }
/// # fn main() {}
/// ```
#[macro_export]
macro_rules! define_per_cpu {
    ($($(#[$($attribute:tt)+])* $vis:vis static $name:ident: $type:ty = $value:expr;)*) => {$(
        $crate::define_one_per_cpu! {
            [] [] $(#[$($attribute)+])* $vis static $name: $type = $value;
        }
    )*};
}

/// One variable: finds `#[percpu(..)]` among its attributes, `[the section] [the attributes looked at] the rest`.
#[doc(hidden)]
#[macro_export]
macro_rules! define_one_per_cpu {
    ([] [$($seen:tt)*] #[percpu($section:ident)] $($rest:tt)*) => {
        $crate::define_one_per_cpu! { [$section] [$($seen)*] $($rest)* }
    };
    ([$section:ident] [$($seen:tt)*] #[percpu($other:ident)] $($rest:tt)*) => {
        compile_error!(concat!("a static per-CPU variable lies in one section, not in `", stringify!($section),
            "` and `", stringify!($other), "`"));
    };
    // Lines of documentation come by the dozen, and a step for each would reach the limit of recursion.
    ([$($section:ident)?] [$($seen:tt)*] #[doc = $a:literal] #[doc = $b:literal] #[doc = $c:literal]
        #[doc = $d:literal] #[doc = $e:literal] #[doc = $f:literal] #[doc = $g:literal] #[doc = $h:literal]
        $($rest:tt)*) => {
        $crate::define_one_per_cpu! {
            [$($section)?] [$($seen)* #[doc = $a] #[doc = $b] #[doc = $c] #[doc = $d] #[doc = $e] #[doc = $f]
            #[doc = $g] #[doc = $h]] $($rest)*
        }
    };
    ([$($section:ident)?] [$($seen:tt)*] #[$meta:meta] $($rest:tt)*) => {
        $crate::define_one_per_cpu! { [$($section)?] [$($seen)* #[$meta]] $($rest)* }
    };
    ([] $attributes:tt $($rest:tt)*) => {
        $crate::define_in_section! { "pcpu_template", Plain, Initial, $attributes $($rest)* }
    };
    ([first] $attributes:tt $($rest:tt)*) => {
        $crate::define_in_section! { "pcpu_first", First, Initial, $attributes $($rest)* }
    };
    ([page_aligned] $attributes:tt $($rest:tt)*) => {
        $crate::define_in_section! { "pcpu_page_aligned", PageAligned, OnOwnPages, $attributes $($rest)* }
    };
    ([read_mostly] $attributes:tt $($rest:tt)*) => {
        $crate::define_in_section! { "pcpu_read_mostly", ReadMostly, Initial, $attributes $($rest)* }
    };
    ([cache_aligned] $attributes:tt $($rest:tt)*) => {
        $crate::define_in_section! { "pcpu_cache_aligned", CacheAligned, OnOwnLines, $attributes $($rest)* }
    };
    ([$section:ident] $($rest:tt)*) => {
        compile_error!(concat!("there is no section `", stringify!($section),
            "` of static per-CPU variables; there are first, page_aligned, read_mostly, cache_aligned"));
    };
}

/// One variable, whose section is known.
#[doc(hidden)]
#[macro_export]
macro_rules! define_in_section {
    ($link:literal, $section:ident, $holder:ident,
        [$(#[$meta:meta])*] $vis:vis static $name:ident: $type:ty = $value:expr;) => {
        // A type of its own for every variable, without fields: the variable's address is known from the type, so
        // that no access has to load it. Its name is the variable's, as a reader expects of a static.
        $(#[$meta])*
        #[allow(non_camel_case_types)]
        #[derive(Debug, Clone, Copy)]
        $vis struct $name;

        // The attributes again, for a variable may be there under a condition only.
        $(#[$meta])*
        const _: () = {
            // A name that the value and its type will not want for something else.
            #[unsafe(link_section = $link)]
            static __PCPU_INITIAL: $crate::$holder<$type> = $crate::$holder::new($value);

            // SAFETY: static variables live as long as the process, or until their library is detached, after which nobody
            // uses them; and start as the initial value on every CPU.
            unsafe impl $crate::this_cpu::Live for $name {}

            // SAFETY: `__PCPU_INITIAL` lies in the section.
            unsafe impl $crate::StaticVar for $name {
                const SECTION: $crate::Section = $crate::Section::$section;

                #[inline]
                fn initial(&self) -> *const $crate::Initial<$type> {
                    // The initial value is where its holder begins.
                    $crate::address_of_symbol!(__PCPU_INITIAL)
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
    };
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
            (&raw const $symbol).cast()
        }
    }};
}
