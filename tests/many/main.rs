//! Several areas at one go: what a batch hands out is what single requests would, and one that fails leaves nothing behind.

#[path = "../common/audit.rs"]
mod audit;
#[path = "../common/cached.rs"]
mod cached;
#[path = "../common/copies.rs"]
mod copies;
#[path = "../common/small.rs"]
mod small;
#[path = "../common/told.rs"]
mod told;

mod batch;
mod failures;
mod hooks;
mod process;
mod serving;
