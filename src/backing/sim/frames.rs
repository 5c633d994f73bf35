//! The frames of a simulated machine, node by node, where they are limited.
//!
//! What always holds: every populated page of every CPU has one frame, and no frame is lost: those that are out and
//! those that are left are as many as there were.

use std::collections::BTreeMap;
use std::vec;
use std::vec::Vec;

use crate::backing::PageSpan;
use crate::unit::NodeId;

/// A page of one CPU: chunk, CPU, page in the unit.
type Page = (u32, u32, u32);

/// A frame that is out.
#[derive(Debug, Clone, Copy)]
struct Frame {
    node: usize,
    /// The node of the CPU that has it.
    home: usize,
}

/// Which frames are left, and which page has which.
#[derive(Debug)]
pub(super) struct Frames {
    /// Frames left by node; `None` if they do not run out.
    left: Option<Vec<u64>>,
    out: BTreeMap<Page, Frame>,
}

impl Frames {
    /// So many frames on each of `nodes` nodes.
    pub(super) fn new(nodes: u32, frames: Option<u64>) -> Self {
        Self {
            left: frames.map(|frames| vec![frames; nodes as usize]),
            out: BTreeMap::new(),
        }
    }

    /// Takes a frame for every page of `span` on each of its CPUs, or none at all; whether there were enough. A page that
    /// has one keeps it.
    pub(super) fn take(&mut self, span: PageSpan<'_>) -> bool {
        let Some(before) = &self.left else {
            return true;
        };
        let mut left = before.clone();
        let mut new = Vec::new();
        for (page, home) in pages(span).filter(|(page, _)| !self.out.contains_key(page)) {
            let mut nodes = [home].into_iter().chain(0..left.len());
            let Some(node) = nodes.find(|&node| left[node] > 0) else {
                return false;
            };
            left[node] -= 1;
            new.push((page, Frame { node, home }));
        }
        self.left = Some(left);
        self.out.extend(new);
        true
    }

    /// Gives back the frames of the pages of `span`; a page without one is passed over.
    pub(super) fn give_back(&mut self, span: PageSpan<'_>) {
        let Some(left) = &mut self.left else { return };
        for (page, _) in pages(span) {
            if let Some(frame) = self.out.remove(&page) {
                left[frame.node] += 1;
            }
        }
    }

    /// Frames out that lie on another node than their CPU's.
    pub(super) fn borrowed(&self) -> usize {
        let is_afar = |frame: &&Frame| frame.node != frame.home;
        self.out.values().filter(is_afar).count()
    }

    /// Frames that `node` has left.
    pub(super) fn left(&self, node: NodeId) -> Option<u64> {
        self.left.as_ref()?.get(node.get() as usize).copied()
    }
}

/// The pages of a span, and the node of the CPU that each belongs to.
fn pages<'a>(span: PageSpan<'a>) -> impl Iterator<Item = (Page, usize)> + 'a {
    span.cpus().iter().flat_map(move |cpu| {
        let home = span.units().node(cpu).map_or(0, |node| node.get() as usize);
        let of_cpu = move |page| ((span.chunk(), cpu.get(), page), home);
        span.runs().flatten().map(of_cpu)
    })
}
