//! Static per-CPU variables of a kernel: [`define_per_cpu_in!`](crate::define_per_cpu_in).
//!
//! The linker gathers the initial values in the per-CPU section, the template. The address that it gives a variable there
//! is the variable's handle, and nothing else uses that address: the section may be freed once it has been copied.
//! Operations name the symbol, relative to the code, so that they are one instruction and link into a
//! position-independent kernel too.

use core::cell::UnsafeCell;
use core::mem::align_of;

use super::GsDomain;
use crate::alloc_api::{Domain, per_cpu_ptr};
use crate::request::CpuError;
use crate::this_cpu::Live;
use crate::unit::CpuId;

/// The alignment of a variable of `#[percpu(cache_aligned)]`.
#[doc(hidden)]
#[derive(Debug)]
#[repr(align(64))]
pub struct CacheLine;

/// The alignment of a variable of `#[percpu(page_aligned)]`.
#[doc(hidden)]
#[derive(Debug)]
#[repr(align(4096))]
pub struct Page;

/// The alignment of any other variable: its type's.
#[doc(hidden)]
#[derive(Debug)]
pub struct Plain;

/// The initial value of a static per-CPU variable in the per-CPU section, as aligned as an `A` at least, and as long as a
/// multiple of that.
///
/// It is never used as a `T`: its bytes are what the copies start from.
#[derive(Debug)]
#[repr(C)]
pub struct Template<T, A = Plain> {
    align: [A; 0],
    value: UnsafeCell<T>,
}

// SAFETY: nothing reads or writes the value through this type; the copies are shared, and need `T: Sync`.
unsafe impl<T: Sync, A> Sync for Template<T, A> {}

impl<T, A> Template<T, A> {
    /// An initial value.
    pub const fn new(value: T) -> Self {
        const {
            assert!(
                align_of::<T>() <= align_of::<Page>(),
                "a static per-CPU variable is aligned to a page at most"
            )
        };
        Self {
            align: [],
            value: UnsafeCell::new(value),
        }
    }
}

/// What names a static per-CPU variable of a kernel: every variable of [`define_per_cpu_in!`](crate::define_per_cpu_in).
///
/// # Safety
/// The handle is the address of a [`Template`] in the per-CPU section.
pub unsafe trait KernelStatic: Live<Domain: GsDomain> {
    /// `cpu`'s copy. A CPU that was never up is brought up for it, which may sleep: its copy could not be written
    /// otherwise, and a `T` may be changed through a shared reference.
    ///
    /// # Errors
    /// [`CpuError`] if `cpu` is not possible, or has no memory.
    fn get(&self, cpu: CpuId) -> Result<&'static Self::Target, CpuError>
    where
        Self::Target: Sync + 'static,
    {
        let allocator = <Self::Domain as Domain>::allocator();
        if !allocator.units().materialised().contains(cpu) {
            allocator.bring_up(cpu)?;
        }
        let copy = per_cpu_ptr(self.handle(), cpu)?;
        // SAFETY: the copy starts as the initial value of the type, is only ever shared (it is `Sync`), and stays as long
        // as the kernel.
        Ok(unsafe { copy.as_ref() })
    }
}

/// Defines static per-CPU variables of a kernel, with the value that every CPU's copy starts from.
///
/// `in` names the kernel's [domain](crate::this_cpu::gs::GsDomain). The type must be `Sync`, for copies can be read from any
/// CPU, and the value constant. A variable is named like a static, `pub` ones from other crates too; it is a
/// [`Handle`](crate::Handle), has [`KernelStatic::get`](crate::this_cpu::gs::KernelStatic::get), and as a
/// [`CpuCell`](crate::CpuCell) the operations of [`LocalCell`](crate::LocalCell), one instruction each.
///
/// ```
/// use pcpu::{CpuCell, LocalCell, define_per_cpu_in};
/// # use pcpu::backing::sim::Sim;
/// # use pcpu::this_cpu::gs::{Gs, GsDomain};
/// # use pcpu::unit::CpuId;
/// # use pcpu::{Domain, Instance, PerCpuAllocator};
/// # pub enum Kernel {}
/// # static INSTANCE: Instance<Sim, parking_lot::RawMutex> = Instance::new();
/// # // SAFETY: `allocator` is always the same instance.
/// # unsafe impl Domain for Kernel {
/// #     type Ops = Gs<Self>;
/// #     type Backing = Sim;
/// #     type Lock = parking_lot::RawMutex;
/// #     fn allocator() -> &'static PerCpuAllocator<Sim, parking_lot::RawMutex> {
/// #         INSTANCE.get().expect("set up at boot")
/// #     }
/// #     fn current_cpu() -> CpuId {
/// #         CpuId::new(0)
/// #     }
/// # }
/// # // SAFETY: nothing here runs an operation.
/// # unsafe impl GsDomain for Kernel {}
///
/// define_per_cpu_in! {
///     in Kernel;
///
///     /// Interrupts taken.
///     pub static INTERRUPTS: CpuCell<u64> = CpuCell::new(0);
///
///     /// Where a trap saves what it needs a register for: known to the assembly by its place.
///     #[percpu(first)]
///     static SCRATCH: CpuCell<u64> = CpuCell::new(0);
///
///     #[percpu(read_mostly)]
///     static NODE: CpuCell<u32> = CpuCell::new(0);
/// }
///
/// fn on_interrupt() {
///     INTERRUPTS.inc(); // inc qword ptr gs:[rip + INTERRUPTS]
/// }
/// # let _ = on_interrupt;
/// ```
///
/// # The linker script
/// The section is the template of the static region. Its parts in this order, each where it is aligned as said:
///
/// | part | of variables with | begins at |
/// |---|---|---|
/// | `.data..percpu..first` | `#[percpu(first)]` | a page |
/// | `.data..percpu..page_aligned` | `#[percpu(page_aligned)]` | a page |
/// | `.data..percpu..read_mostly` | `#[percpu(read_mostly)]` | a cache line |
/// | `.data..percpu` | no attribute | a cache line |
/// | `.data..percpu..shared_aligned` | `#[percpu(cache_aligned)]` | a cache line |
///
/// ```text
/// .data..percpu : ALIGN(4096) {
///     __per_cpu_start = .;
///     *(.data..percpu..first)
///     . = ALIGN(4096); *(.data..percpu..page_aligned)
///     . = ALIGN(64);   *(.data..percpu..read_mostly)
///     . = ALIGN(64);   *(.data..percpu)
///     . = ALIGN(64);   *(.data..percpu..shared_aligned)
///     . = ALIGN(4096);
///     __per_cpu_end = .;
/// }
/// ```
/// What lies between the two symbols are the bytes of the [`Template`](crate::unit::Template), and `__per_cpu_start` is its
/// base. A plain `*(.data.*)` elsewhere in the script would swallow all of it: write `*(.data .data.[_a-zA-Z0-9]*)`.
#[macro_export]
macro_rules! define_per_cpu_in {
    (in $domain:ty; $($(#[$($attribute:tt)*])* $vis:vis static $name:ident: $type:ty = $value:expr;)*) => {$(
        $crate::kernel_static! {
            [$domain] [] [".data..percpu", Plain]
            $(#[$($attribute)*])* $vis static $name: $type = $value;
        }
    )*};
}

/// One variable of [`define_per_cpu_in!`](crate::define_per_cpu_in): its attributes are looked at one by one.
#[doc(hidden)]
#[macro_export]
macro_rules! kernel_static {
    ([$domain:ty] [$($meta:tt)*] [$($place:tt)*] #[percpu(first)] $($rest:tt)*) => {
        $crate::kernel_static! { [$domain] [$($meta)*] [".data..percpu..first", Plain] $($rest)* }
    };
    ([$domain:ty] [$($meta:tt)*] [$($place:tt)*] #[percpu(page_aligned)] $($rest:tt)*) => {
        $crate::kernel_static! { [$domain] [$($meta)*] [".data..percpu..page_aligned", Page] $($rest)* }
    };
    ([$domain:ty] [$($meta:tt)*] [$($place:tt)*] #[percpu(read_mostly)] $($rest:tt)*) => {
        $crate::kernel_static! { [$domain] [$($meta)*] [".data..percpu..read_mostly", Plain] $($rest)* }
    };
    ([$domain:ty] [$($meta:tt)*] [$($place:tt)*] #[percpu(cache_aligned)] $($rest:tt)*) => {
        $crate::kernel_static! { [$domain] [$($meta)*] [".data..percpu..shared_aligned", CacheLine] $($rest)* }
    };
    ([$domain:ty] [$($meta:tt)*] [$($place:tt)*] #[percpu($($unknown:tt)*)] $($rest:tt)*) => {
        ::core::compile_error!(::core::concat!(
            "percpu(", ::core::stringify!($($unknown)*),
            "): it is one of first, page_aligned, read_mostly, cache_aligned"
        ));
    };
    ([$domain:ty] [$($meta:tt)*] [$($place:tt)*] #[$next:meta] $($rest:tt)*) => {
        $crate::kernel_static! { [$domain] [$($meta)* #[$next]] [$($place)*] $($rest)* }
    };
    ([$domain:ty] [$($meta:tt)*] [$section:literal, $align:ident]
        $vis:vis static $name:ident: $type:ty = $value:expr;) => {
        // A type of its own for every variable, without fields: operations know the symbol from the type. Its name is the
        // variable's, as a reader expects of a static.
        $($meta)*
        #[allow(non_camel_case_types)]
        #[derive(Debug, Clone, Copy)]
        $vis struct $name;

        // The attributes again, for a variable may be there under a condition only.
        $($meta)*
        const _: () = {
            #[unsafe(link_section = $section)]
            static TEMPLATE: $crate::this_cpu::gs::Template<$type, $crate::this_cpu::gs::$align> =
                $crate::this_cpu::gs::Template::new($value);

            // SAFETY: each method is the instruction that it is named after, on the copy of `TEMPLATE`.
            unsafe impl $crate::this_cpu::gs::Place for $name {
                $crate::gs_place!("gs:[rip + {place}]", |this| sym TEMPLATE);
            }

            // SAFETY: static variables live as long as the kernel, and start as the initial value on every CPU. The domain
            // has the operations of `Gs` (`GsDomain`), which are those of `Place`.
            unsafe impl $crate::this_cpu::Live for $name {
                #[inline(always)]
                unsafe fn read_word<W: $crate::this_cpu::Word>(&self) -> W {
                    // SAFETY: the promise of the caller.
                    unsafe { $crate::this_cpu::gs::Place::load(*self) }
                }

                #[inline(always)]
                unsafe fn change_word<W: $crate::this_cpu::Word>(&self, change: $crate::this_cpu::Change<W>) {
                    // SAFETY: the promise of the caller.
                    unsafe { $crate::this_cpu::gs::Place::change(*self, change) }
                }

                #[inline(always)]
                unsafe fn fetch_word<W: $crate::this_cpu::Word>(&self, change: $crate::this_cpu::Change<W>) -> W {
                    // SAFETY: the promise of the caller.
                    unsafe { $crate::this_cpu::gs::Place::fetch(*self, change) }
                }

                #[inline(always)]
                unsafe fn inc_word<W: $crate::this_cpu::Word>(&self) {
                    // SAFETY: the promise of the caller.
                    unsafe { $crate::this_cpu::gs::Place::inc::<W>(*self) }
                }

                #[inline(always)]
                unsafe fn dec_word<W: $crate::this_cpu::Word>(&self) {
                    // SAFETY: the promise of the caller.
                    unsafe { $crate::this_cpu::gs::Place::dec::<W>(*self) }
                }
            }

            impl $crate::Handle for $name {
                type Target = $type;
                type Domain = $domain;

                #[inline(always)]
                fn handle(&self) -> $crate::PerCpuPtr<$type, $domain> {
                    let address: usize;
                    // SAFETY: computes an address and touches nothing. Relative to the code: a static of another crate
                    // would be looked up in the global offset table otherwise.
                    unsafe {
                        ::core::arch::asm!("lea {address}, [rip + {symbol}]", address = out(reg) address,
                            symbol = sym TEMPLATE, options(pure, nomem, nostack, preserves_flags));
                    }
                    // SAFETY: nothing is linked at address 0.
                    unsafe { $crate::PerCpuPtr::from_neutral_unchecked(address) }
                }
            }

            // SAFETY: `TEMPLATE` lies in the per-CPU section, and its address is the handle.
            unsafe impl $crate::this_cpu::gs::KernelStatic for $name {}
        };
    };
}
