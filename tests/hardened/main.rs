//! The hardened mode: it finds what is written where nobody may write, catches racing frees at once, tells of leaks; and is an
//! allocator like any other besides.

mod batches;
#[path = "../common/copies.rs"]
mod copies;
#[path = "../common/free.rs"]
mod free;
#[path = "../common/small.rs"]
mod small;

mod frees;
mod guards;
mod machine;
mod memory;
mod poison;
#[cfg(target_os = "linux")]
mod process;
mod setup;
