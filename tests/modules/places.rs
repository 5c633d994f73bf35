//! Where the variables of libraries lie: aligned, in the reserved region, or in the dynamic one if that is asked for.

use pcpu::allocator::Region;
use pcpu::global;
use pcpu::module::{AttachError, LoadError, Module, Placement};

use crate::alone::{Build, alone};
use crate::counting::{Counting, INITIAL, function, load};
use crate::lives::possible;

const PAGE_BYTES: usize = 4096;

fn attach_error(loaded: Result<Module, LoadError>) -> AttachError {
    match loaded {
        Err(LoadError::Attach { error, .. }) => error,
        other => panic!("{other:?}"),
    }
}

/// A page of a library's is a page on every CPU.
fn check_page(module: &Module) {
    // SAFETY: that is what the library defines.
    let (handle, sum): (extern "C" fn() -> usize, extern "C" fn() -> u64) =
        unsafe { (function(module, c"handle"), function(module, c"sum")) };
    assert_eq!(handle() % PAGE_BYTES, 0);
    for cpu in global().units().possible().iter() {
        let copy = global().per_cpu_address(handle(), cpu).expect("possible");
        assert_eq!(copy % PAGE_BYTES, 0, "{cpu}");
    }
    assert_eq!(sum(), 3 * 512 * possible());
}

#[test]
fn a_page_is_a_page_on_every_cpu() {
    alone("places::a_page_is_a_page_on_every_cpu", || {
        let page = |copy, placement| load("paging", Build::Unloadable, copy, placement);
        let reserved = page(1, Placement::Reserved).expect("there is one page in 8 KiB");
        assert_eq!(reserved.area().expect("a page").region, Region::Reserved);
        check_page(&reserved);
        // There is no second one: the region does not begin at a page, for the host has variables.
        assert_ne!(global().sizes().static_bytes() % PAGE_BYTES, 0);
        let free_bytes = global().sizes().reserved_bytes() - PAGE_BYTES;
        let error = attach_error(page(2, Placement::Reserved));
        assert_eq!(
            error,
            AttachError::ReservedExhausted {
                bytes: PAGE_BYTES,
                align_bytes: PAGE_BYTES,
                free_bytes
            }
        );
        let dynamic = page(2, Placement::DynamicIfFull).expect("there is always a page");
        assert_eq!(dynamic.area().expect("a page").region, Region::Dynamic);
        check_page(&dynamic);
    });
}

#[test]
fn a_full_region_is_an_error_or_a_detour() {
    alone("places::a_full_region_is_an_error_or_a_detour", || {
        let load = |copy, placement| load("counting", Build::Unloadable, copy, placement);
        let mut libraries = Vec::new();
        let error = loop {
            match load(libraries.len() as u32 + 1, Placement::Reserved) {
                Ok(library) => libraries.push(Counting(library)),
                refused => break attach_error(refused),
            }
        };
        assert!(libraries.len() > 2, "several go into 8 KiB");
        let area = libraries[0].0.area().expect("it has variables");
        let used_bytes = area.bytes * libraries.len();
        let free_bytes = global().sizes().reserved_bytes() - used_bytes;
        assert!(free_bytes < area.bytes + 128);
        assert_eq!(
            error,
            AttachError::ReservedExhausted {
                bytes: area.bytes,
                align_bytes: 128,
                free_bytes
            }
        );
        // The refused one has left nothing behind.
        let stats = global().stats();
        assert_eq!(stats.live, libraries.len() as u64);

        let dynamic = load(100, Placement::DynamicIfFull)
            .map(Counting)
            .expect("room");
        assert_eq!(dynamic.0.area().expect("an area").region, Region::Dynamic);
        assert_eq!(u64::from(dynamic.fresh_cpus()), possible());
        dynamic.add(7);
        assert_eq!(dynamic.sum(), INITIAL * possible() + 7);
        drop(dynamic);
        assert_eq!(global().stats().live, libraries.len() as u64);
        // What was there is not what the next one finds.
        let again = load(100, Placement::DynamicIfFull)
            .map(Counting)
            .expect("room");
        assert_eq!(u64::from(again.fresh_cpus()), possible());

        let last = libraries.pop().expect("there are some");
        let place = last.handle();
        drop(last);
        let next = load(101, Placement::Reserved).map(Counting).expect("room");
        assert_eq!(next.handle(), place);
        assert_eq!(u64::from(next.fresh_cpus()), possible());
    });
}
