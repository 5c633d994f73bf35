//! What is refused: libraries that are no modules, tables of other versions, uses of a module without its host.

use std::ffi::{CString, c_void};
use std::os::unix::ffi::OsStrExt;
use std::ptr;

use pcpu::global;
use pcpu::module::{ABI_VERSION, AttachError, LoadError, ModuleTable, Placement, SYMBOL, attach};

use crate::alone::{Build, alone, alone_and_panic, library};
use crate::counting::{INITIAL, counting, load_file};
use crate::lives::possible;

/// A library that nobody attaches, as `libloading` would open it.
fn open(copy: u32) -> *mut c_void {
    let library = library("counting", Build::Unloadable, copy);
    let path = CString::new(library.path().as_os_str().as_bytes()).expect("a path");
    // SAFETY: the library runs nothing that does harm.
    let handle = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW) };
    assert!(!handle.is_null());
    handle
}

fn close(handle: *mut c_void) {
    // SAFETY: opened above.
    assert_eq!(unsafe { libc::dlclose(handle) }, 0);
}

fn table(handle: *mut c_void) -> *const ModuleTable {
    // SAFETY: the library is open.
    let table = unsafe { libc::dlsym(handle, SYMBOL.as_ptr()) };
    assert!(!table.is_null());
    table.cast()
}

fn add(handle: *mut c_void) {
    // SAFETY: the library is open.
    let add = unsafe { libc::dlsym(handle, c"add".as_ptr()) };
    // SAFETY: that is what the library defines.
    let add: extern "C" fn(u64) = unsafe { std::mem::transmute(add) };
    add(1);
}

const UNATTACHED: &str = "no host has attached it";

#[test]
fn libraries_that_are_no_modules() {
    alone("refusals::libraries_that_are_no_modules", || {
        let missing = load_file("/nowhere/libmissing.so".as_ref(), Placement::Reserved);
        assert!(matches!(&missing, Err(LoadError::Open { path, reason })
            if path.as_os_str() == "/nowhere/libmissing.so" && reason.contains("No such file")));
        let with_zero = load_file("a\0b".as_ref(), Placement::Reserved);
        assert!(matches!(with_zero, Err(LoadError::Open { .. })));
        let libm = load_file("libm.so.6".as_ref(), Placement::Reserved);
        let error = libm.expect_err("it is no module");
        assert_eq!(
            error,
            LoadError::NotAModule {
                path: "libm.so.6".into()
            }
        );
        assert_eq!(error.to_string(), "libm.so.6: no symbol \"pcpu_module\"");
    });
}

/// The first words of any version of a table.
#[repr(C)]
struct Prefix {
    abi: u32,
    bytes: u32,
}

#[test]
fn tables_of_other_versions() {
    alone("refusals::tables_of_other_versions", || {
        let bytes = size_of::<ModuleTable>() as u32;
        for (abi, bytes) in [(ABI_VERSION + 1, bytes), (ABI_VERSION, bytes + 8), (0, 0)] {
            let of_another = Prefix { abi, bytes };
            // SAFETY: more than the first words is not looked at.
            let attached =
                unsafe { attach(ptr::from_ref(&of_another).cast(), Placement::Reserved) };
            let error = AttachError::Abi {
                theirs: abi,
                ours: ABI_VERSION,
            };
            assert_eq!(attached.expect_err("another version"), error);
        }
        // The module looks, too. Its function comes behind the two words and two other functions.
        let handle = open(0);
        type Attach = unsafe extern "C" fn(*const Prefix, usize) -> [usize; 3];
        // SAFETY: so this version of the table lies in memory.
        let attach_module: Attach = unsafe { *table(handle).byte_add(24).cast() };
        let of_another = Prefix { abi: 99, bytes: 8 };
        // SAFETY: more than the first words is not looked at; an answer is three words.
        let [code, theirs, ours] = unsafe { attach_module(&of_another, 4096) };
        assert_eq!((code as u32, theirs, ours), (1, 99, ABI_VERSION as usize));
        close(handle);
    });
}

#[test]
fn a_module_is_no_host() {
    alone("refusals::a_module_is_no_host", || {
        let library = counting(Build::Unloadable, 0);
        let other = open(1);
        assert!(library.is_no_host(table(other).cast()));
        close(other);
    });
}

#[test]
fn a_module_has_no_allocator() {
    alone_and_panic(
        "refusals::a_module_has_no_allocator",
        "allocator is the host's",
        || {
            counting(Build::Unloadable, 0).use_the_allocator();
        },
    );
}

#[test]
fn use_before_attach() {
    alone_and_panic("refusals::use_before_attach", UNATTACHED, || add(open(0)));
}

#[test]
fn use_after_detach() {
    alone_and_panic("refusals::use_after_detach", UNATTACHED, || {
        let handle = open(0);
        // SAFETY: the library is open, and stays so.
        let attached = unsafe { attach(table(handle), Placement::Reserved) };
        let attached = attached.expect("it can be attached");
        add(handle);
        drop(attached);
        println!("detached");
        add(handle);
    });
}

/// A library that is loaded does not set up an instance of its own: that would take an address range of its own.
#[test]
fn a_module_makes_no_instance() {
    alone("refusals::a_module_makes_no_instance", || {
        let reserved_bytes = || {
            let status = std::fs::read_to_string("/proc/self/status").expect("the system tells");
            let line = status.lines().find(|line| line.starts_with("VmSize:"));
            let number = line.and_then(|line| line.split_whitespace().nth(1));
            let kib: usize = number
                .and_then(|number| number.parse().ok())
                .expect("a number");
            kib << 10
        };
        global();
        let before = reserved_bytes();
        let handle = open(0);
        let more = reserved_bytes() - before;
        assert!(more < 1 << 30, "{more} bytes more");
        close(handle);
    });
}

/// A library that goes without being detached takes its area along; the next one is another.
#[test]
fn a_forgotten_detach() {
    alone("refusals::a_forgotten_detach", || {
        let mut places = Vec::new();
        for _ in 0..3 {
            let handle = open(0);
            // SAFETY: the library is open, and idle when it is closed.
            let attached = unsafe { attach(table(handle), Placement::Reserved) };
            let attached = attached.expect("there is room");
            add(handle);
            places.push(attached.area().expect("it has variables").neutral);
            std::mem::forget(attached);
            close(handle);
        }
        assert!(places[0] != places[1] && places[1] != places[2] && places[0] != places[2]);
        assert_eq!(global().stats().live, 3, "areas that nobody frees");
        let library = counting(Build::Unloadable, 0);
        assert!(!places.contains(&library.0.area().expect("it has variables").neutral));
        assert_eq!(library.sum(), INITIAL * possible());
    });
}
