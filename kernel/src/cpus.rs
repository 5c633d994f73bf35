//! The CPUs: how they are started, and how work is given to all of them.

pub mod bring_up;
pub mod delay;
pub mod local_apic;
pub mod shootdown;
pub mod work;
