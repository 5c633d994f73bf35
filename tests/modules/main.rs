//! Libraries that are loaded and unloaded at run time: where their variables lie and start, what they can do with the
//! host's instance, what is refused, and what threads notice that sleep meanwhile.
//!
//! Each test is a process of its own, for what one library takes of the reserved region another lacks. The libraries are the
//! examples of `tests/fixtures`, built by cargo: once with the feature `unloadable`, once without.

#![cfg(target_os = "linux")]

// A library of the tests has a page-aligned variable.
pcpu::page_geometry!();

mod alone;
mod counting;
mod lives;
mod places;
mod refusals;
mod unloading;
