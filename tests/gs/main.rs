//! The operations of an x86_64 kernel, on the host: a thread of a Linux process may set its GS base as a CPU of a kernel
//! does, for nothing else uses it there. See [`kernel`].
//!
//! Against a plain model ([`model`]), under signals, which are to a thread what interrupts are to a CPU ([`signals`]), the
//! static variables ([`statics`]), slots ([`slots`]), and the guards ([`guards`]).

#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

mod guards;
mod kernel;
#[path = "../common/mix.rs"]
mod mix;
mod model;
#[path = "../common/slots.rs"]
mod model_of_slots;
#[path = "../common/operations.rs"]
mod operations;
mod signals;
mod slots;
mod statics;
