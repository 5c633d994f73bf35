//! What is tried with inputs that nobody thought of. Each function takes any bytes and panics only if something is wrong.
//!
//! The targets of `fuzz/` call them for hours, the test of this crate with every input of `fuzz/corpus/` and with changes of
//! these.

#[path = "../../common/audit.rs"]
mod audit;
mod audited;
#[path = "../../common/copies.rs"]
mod copies;
#[path = "../../common/free.rs"]
mod free;
mod input;
mod layouts;
#[path = "../../../proptests/model.rs"]
mod model;
#[path = "../../../kernel/src/modules/object.rs"]
pub mod object;
mod objects;
mod operations;
#[path = "../../common/roomy.rs"]
mod roomy;
#[path = "../../common/same.rs"]
mod same;
#[path = "../../../proptests/seats.rs"]
mod seats;
#[path = "../../common/small.rs"]
mod small;
mod traces;
#[path = "../../common/undone.rs"]
mod undone;

pub use audited::audited;
pub use layouts::{layout_arguments, unit_plan};
pub use objects::{Arena, load_object};
pub use operations::operations;
pub use traces::read_trace;

/// A function that takes any bytes.
pub type Target = fn(&[u8]);

/// All of them, by the names of the targets and of their folders of inputs.
pub const TARGETS: &[(&str, Target)] = &[
    ("operations", operations),
    ("audited", audited),
    ("trace", read_trace),
    ("arguments", layout_arguments),
    ("plan", unit_plan),
    ("object", load_object),
];
