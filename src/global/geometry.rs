//! How far apart the units of this program lie: as its variables need it.

use crate::backing::mmap::Geometry;
use crate::static_var::Template;

/// The geometry that this program has asked for, by [`page_geometry!`](crate::page_geometry) or by static variables that
/// need it.
pub(super) fn of_this_program(window_bytes: usize) -> Geometry {
    let lines = Geometry::lines(window_bytes);
    let needs_pages = Template::of_this_object().align_bytes > lines.max_align_bytes();
    match needs_pages || wants_pages() {
        true => Geometry::pages(window_bytes),
        false => lines,
    }
}

fn wants_pages() -> bool {
    unsafe extern "C" {
        // The linker defines these two for a section whose name is an identifier.
        #[link_name = "__start_pcpu_page_geometry"]
        static START: [u8; 0];
        #[link_name = "__stop_pcpu_page_geometry"]
        static STOP: [u8; 0];
    }
    /// Nothing, so that the section exists where `page_geometry!` put nothing into it.
    #[used]
    #[unsafe(link_section = "pcpu_page_geometry")]
    static ANCHOR: [u8; 0] = [];
    core::hint::black_box(&ANCHOR);
    (&raw const START).addr() != (&raw const STOP).addr()
}

/// Has the process serve alignments up to a page, once in the program, anywhere at the level of items.
///
/// Without it a per-CPU variable is aligned to 128 bytes at most. Units then lie a page and 128 bytes more than a power of
/// two apart, so that the copies of a variable lie in different sets of the CPUs' caches, which is what a sum over many
/// CPUs wants. With it they lie a whole number of pages apart. A program with static variables that are
/// `#[percpu(page_aligned)]` has that anyway; one that loads [modules](mod@crate::module) with such variables, or allocates
/// types with such an alignment, says so by this.
///
/// It stands in the program: in a library that the program does not use otherwise the linker may leave it out, and in a
/// module it means nothing.
///
/// ```standalone_crate
/// pcpu::page_geometry!();
///
/// # fn main() -> Result<(), pcpu::AllocError> {
/// #[derive(pcpu::FromZeros)]
/// #[zerocopy(crate = "pcpu::zerocopy")]
/// #[repr(align(4096))]
/// struct Page([u8; 4096]);
///
/// assert_eq!(pcpu::global().max_align_bytes(), 4096);
/// let page = pcpu::PerCpu::<Page>::new()?;
/// # drop(page);
/// # Ok(())
/// # }
/// ```
/// ```standalone_crate
/// # fn main() {
/// # #[derive(pcpu::FromZeros)]
/// # #[zerocopy(crate = "pcpu::zerocopy")]
/// # #[repr(align(4096))]
/// # struct Page([u8; 4096]);
/// // Without the macro:
/// let error = pcpu::PerCpu::<Page>::new().unwrap_err();
/// assert_eq!(error, pcpu::AllocError::AlignTooLarge { align: 4096, limit: 128 });
/// # }
/// ```
#[macro_export]
macro_rules! page_geometry {
    () => {
        const _: () = {
            #[used]
            #[unsafe(link_section = "pcpu_page_geometry")]
            static MARK: u8 = 1;
        };
    };
}
