//! The operations on the current CPU's copy, in a Linux process: against a plain model ([`model`]), under a storm of
//! migrations and signals ([`storm`]; [`pair`], [`slots`], [`stack`], [`buffer`] and [`lock`] for more than one word), and
//! where there is less than usual: threads and processes without restartable sequences, a CPU that is used for the first
//! time, a forked child ([`homes`]).
//!
//! How long the storm is: the environment variable `PCPU_STORM_OPS` is the number of operations of all its threads
//! together; the storms of threads and processes without restartable sequences have a twentieth of it. A long one,
//! optimised:
//!
//! ```text
//! PCPU_STORM_OPS=10000000000 cargo test --release --test this_cpu storm:: -- --nocapture
//! ```

#![cfg(target_os = "linux")]

mod buffer;
#[path = "../common/child.rs"]
mod child;
mod crew;
mod homes;
mod lane;
mod lock;
#[path = "../common/mix.rs"]
mod mix;
mod model;
#[path = "../common/slots.rs"]
mod model_of_slots;
#[path = "../common/operations.rs"]
mod operations;
mod pair;
mod slots;
mod stack;
mod storm;
mod system;
mod whirl;
