//! The per-CPU caches: what they must refuse, what they must count, and that they never hand out an area twice.

#[path = "../common/cached.rs"]
mod cached;
#[path = "../common/child.rs"]
mod child;
#[path = "../common/copies.rs"]
mod copies;
#[cfg(target_os = "linux")]
#[path = "../common/crew.rs"]
mod crew;
#[path = "../common/free.rs"]
mod free;
#[path = "../common/roomy.rs"]
mod roomy;
#[path = "../common/small.rs"]
mod small;
#[path = "../common/told.rs"]
mod told;

mod counters;
mod events;
mod growth;
mod late_cpus;
mod limits;
mod machine;
mod races;
mod sharing;
mod stashes;
mod storm;
mod sweeps;
#[cfg(target_os = "linux")]
mod threads;
mod wrong_frees;
