//! What the `pcpu` program does with what it is given from outside: traces and layouts. A library, so that it can be
//! tested by inputs that nobody thought of (`fuzz/`).

pub mod error;
pub mod layout;
pub mod output;
pub mod script;
pub mod trace;
