//! The map as text: a line for a chunk, a character for a page.

use super::snapshot::{PageKind, Snapshot};

/// How full a page is, in eighths; a page with anything on it is never shown as empty.
const SHARES: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
const EMPTY: char = '·';
/// A page of which only caches have something.
const IDLE: char = '○';
const STATIC: char = 'S';
const RESERVED: char = 'R';
const UNPOPULATED: char = ' ';

/// The map, with a title and a legend.
pub fn text(snapshot: &Snapshot) -> String {
    let (what, figures) = snapshot.figures();
    let mut text = format!("{what}\n{figures}\n");
    for (&place, chunk) in &snapshot.chunks {
        let row: String = (0..snapshot.pages)
            .map(|page| character(snapshot, place, page))
            .collect();
        text += &format!(
            "{place:>5} │{row}│ {:>3} pages, {:>7} bytes live\n",
            snapshot.nr_populated(place),
            chunk.live_bytes()
        );
    }
    let shares: String = SHARES.iter().collect();
    text + &format!(
        "A line is a chunk, a character is a page of {} bytes: {STATIC} static variables, {RESERVED} reserved, not used,\n\
         {shares} share in use, {IDLE} idle in caches only, {EMPTY} populated and empty, blank: no memory.\n",
        snapshot.page_bytes
    )
}

fn character(snapshot: &Snapshot, place: u32, page: usize) -> char {
    let chunk = &snapshot.chunks[&place];
    let used_bytes = chunk.used_bytes(snapshot.page(page));
    let idle_bytes = chunk.idle_bytes_within(snapshot.page(page));
    match (snapshot.kind(place, page), used_bytes) {
        (PageKind::Static, _) => STATIC,
        (PageKind::Reserved, 0) => RESERVED,
        (PageKind::Unpopulated, _) => UNPOPULATED,
        (PageKind::Populated, 0) if idle_bytes > 0 => IDLE,
        (PageKind::Populated, 0) => EMPTY,
        (PageKind::Populated | PageKind::Reserved, used) => {
            SHARES[(used * SHARES.len()).div_ceil(snapshot.page_bytes) - 1]
        }
    }
}
