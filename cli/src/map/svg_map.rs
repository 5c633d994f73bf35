//! The map as SVG: a row of pages for a chunk, and every area where it lies.
//!
//! A page is drawn as a box that its bytes fill line by line, as text does: at one line to a page, areas of 8 bytes would
//! be far below a pixel. Areas of one colour become one path, which keeps the file small.

use std::fmt::Write;
use std::ops::Range;

use svg::Document;
use svg::node::element::{Definitions, Group, Path, Pattern, Rectangle, Text, Title};

use super::snapshot::{PageKind, Snapshot};

/// Lines that a page is drawn in.
const PAGE_LINES: usize = 16;
/// Height of a line.
const LINE_HEIGHT: f64 = 4.0;
const PAGE_WIDTH: f64 = 16.0;
const PAGE_HEIGHT: f64 = PAGE_LINES as f64 * LINE_HEIGHT;
/// Smaller areas are drawn without a border.
const BORDERED_BYTES: usize = 128;
/// Between the boxes of two pages.
const PAGE_GAP: f64 = 2.0;
/// Between two chunks.
const CHUNK_GAP: f64 = 14.0;
const LEFT: f64 = 104.0;
const RIGHT: f64 = 24.0;
const TOP: f64 = 84.0;
const BOTTOM: f64 = 64.0;

const FONT: &str = "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif";
const INK: &str = "#1f2933";
const FAINT_INK: &str = "#66727f";
const FREE: &str = "#e4e8ec";
const STATIC: &str = "#9aa5b1";
const RESERVED: &str = "#b9c7d8";
/// What nobody has and is not free.
const IDLE: &str = "#c5ccd3";

/// Size classes: the largest size in bytes, the colour, the words in the legend.
const CLASSES: [(usize, &str, &str); 6] = [
    (16, "#f2b134", "up to 16 B"),
    (64, "#ec7357", "up to 64 B"),
    (256, "#c2407c", "up to 256 B"),
    (1024, "#7b3fa0", "up to 1 KiB"),
    (4096, "#2f6db5", "up to 4 KiB"),
    (usize::MAX, "#138a7e", "larger"),
];

/// The map as an SVG document.
pub fn svg(snapshot: &Snapshot) -> String {
    let width = LEFT + RIGHT + snapshot.pages as f64 * (PAGE_WIDTH + PAGE_GAP) - PAGE_GAP;
    let rows = snapshot.chunks.len() as f64;
    let height = TOP + BOTTOM + rows * (PAGE_HEIGHT + CHUNK_GAP) - CHUNK_GAP;
    let mut document = Document::new()
        .set("viewBox", (0, 0, width.ceil(), height.ceil()))
        .set("width", width.ceil())
        .set("height", height.ceil())
        .set("font-family", FONT)
        .add(Title::new(snapshot.title.as_str()))
        .add(hatching("static", STATIC, "#b4bdc7"))
        .add(hatching("reserved", RESERVED, "#d3dde9"))
        .add(
            Rectangle::new()
                .set("width", "100%")
                .set("height", "100%")
                .set("fill", "#ffffff"),
        );
    for line in heading(snapshot) {
        document = document.add(line);
    }
    for (row, &place) in snapshot.chunks.keys().enumerate() {
        let top = TOP + row as f64 * (PAGE_HEIGHT + CHUNK_GAP);
        document = document.add(chunk(snapshot, place, top));
    }
    document = document.add(legend(height - BOTTOM + 30.0));
    document.to_string() + "\n"
}

fn hatching(id: &str, dark: &str, light: &str) -> Definitions {
    let stripe = Path::new()
        .set("d", "M-1 1l2-2M0 6l6-6M5 7l2-2")
        .set("stroke", light)
        .set("stroke-width", 1.6);
    Definitions::new().add(
        Pattern::new()
            .set("id", id)
            .set("width", 6)
            .set("height", 6)
            .set("patternUnits", "userSpaceOnUse")
            .add(
                Rectangle::new()
                    .set("width", 6)
                    .set("height", 6)
                    .set("fill", dark),
            )
            .add(stripe),
    )
}

fn label(text: &str, x: f64, y: f64, size: u32, colour: &str) -> Text {
    Text::new(text)
        .set("x", x)
        .set("y", y)
        .set("font-size", size)
        .set("fill", colour)
}

fn heading(snapshot: &Snapshot) -> [Text; 2] {
    let (what, figures) = snapshot.figures();
    [
        label(what, 24.0, 36.0, 20, INK).set("font-weight", 600),
        label(&figures, 24.0, 60.0, 14, FAINT_INK),
    ]
}

fn chunk(snapshot: &Snapshot, place: u32, top: f64) -> Group {
    let map = &snapshot.chunks[&place];
    let mut group = Group::new()
        .add(label(&format!("chunk {place}"), 24.0, top + 26.0, 13, INK).set("font-weight", 600))
        .add(label(
            &format!("{} pages", snapshot.nr_populated(place)),
            24.0,
            top + 44.0,
            11,
            FAINT_INK,
        ));
    // The pages, those of a sort as one path.
    for (kind, fill) in [
        (PageKind::Static, "url(#static)"),
        (PageKind::Reserved, "url(#reserved)"),
        (PageKind::Populated, FREE),
        (PageKind::Unpopulated, "none"),
    ] {
        let mut path = String::new();
        for page in (0..snapshot.pages).filter(|&page| snapshot.kind(place, page) == kind) {
            let inset = if kind == PageKind::Unpopulated {
                0.5
            } else {
                0.0
            };
            rectangle(
                &mut path,
                page_x(page) + inset,
                top + inset,
                PAGE_WIDTH - 2.0 * inset,
                PAGE_HEIGHT - 2.0 * inset,
            );
        }
        if !path.is_empty() {
            let mut path = Path::new().set("d", path).set("fill", fill);
            if kind == PageKind::Unpopulated {
                path = path.set("stroke", "#d5dae0").set("stroke-dasharray", "2 2");
            }
            group = group.add(path);
        }
    }
    let mut idle = String::new();
    for area in &map.idle {
        draw(&mut idle, snapshot, area.clone(), top);
    }
    if !idle.is_empty() {
        group = group.add(Path::new().set("d", idle).set("fill", IDLE));
    }
    for (class, &(_, colour, _)) in CLASSES.iter().enumerate() {
        let mut path = String::new();
        for run in runs_of_class(&map.areas, class) {
            draw(&mut path, snapshot, run, top);
        }
        if !path.is_empty() {
            group = group.add(Path::new().set("d", path).set("fill", colour));
        }
    }
    group.add(borders(snapshot, &map.areas, top))
}

/// Thin lines where areas begin that are large enough to be told apart.
fn borders(snapshot: &Snapshot, areas: &[Range<usize>], top: f64) -> Path {
    let line_bytes = snapshot.page_bytes / PAGE_LINES;
    let mut path = String::new();
    for area in areas.iter().filter(|area| area.len() >= BORDERED_BYTES) {
        let (page, in_page) = (
            area.start / snapshot.page_bytes,
            area.start % snapshot.page_bytes,
        );
        let (line, in_line) = (in_page / line_bytes, in_page % line_bytes);
        let x = page_x(page) + in_line as f64 * PAGE_WIDTH / line_bytes as f64;
        let y = top + line as f64 * LINE_HEIGHT;
        let length = (area.len().min(line_bytes - in_line) as f64) * PAGE_WIDTH / line_bytes as f64;
        // Writing to a string does not fail.
        let _ = write!(
            path,
            "M{} {}v-{LINE_HEIGHT}h{}",
            round(x),
            round(y + LINE_HEIGHT),
            round(length)
        );
    }
    Path::new()
        .set("d", path)
        .set("fill", "none")
        .set("stroke", "#ffffff")
        .set("stroke-opacity", 0.55)
        .set("stroke-width", 0.5)
}

fn class_of(bytes: usize) -> usize {
    CLASSES
        .iter()
        .position(|&(largest, ..)| bytes <= largest)
        .unwrap_or(CLASSES.len() - 1)
}

/// The areas of a class; those side by side are taken together.
fn runs_of_class(areas: &[Range<usize>], class: usize) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    for area in areas.iter().filter(|area| class_of(area.len()) == class) {
        match runs.last_mut() {
            Some(run) if run.end == area.start => run.end = area.end,
            _ => runs.push(area.clone()),
        }
    }
    runs
}

fn page_x(page: usize) -> f64 {
    LEFT + page as f64 * (PAGE_WIDTH + PAGE_GAP)
}

/// Adds the lines and parts of lines that a range of bytes fills.
fn draw(path: &mut String, snapshot: &Snapshot, bytes: Range<usize>, top: f64) {
    let line_bytes = snapshot.page_bytes / PAGE_LINES;
    let mut start = bytes.start;
    while start < bytes.end {
        let page = start / snapshot.page_bytes;
        let in_page = start % snapshot.page_bytes;
        let line = in_page / line_bytes;
        let y = top + line as f64 * LINE_HEIGHT;
        // Whole lines of one page are one box.
        let page_end = (page + 1) * snapshot.page_bytes;
        let whole_lines = match start % line_bytes {
            0 => (bytes.end.min(page_end) - start) / line_bytes,
            _ => 0,
        };
        if whole_lines > 0 {
            let height = whole_lines as f64 * LINE_HEIGHT;
            rectangle(path, page_x(page), y, PAGE_WIDTH, height);
            start += whole_lines * line_bytes;
            continue;
        }
        let line_end = (start / line_bytes + 1) * line_bytes;
        let end = bytes.end.min(line_end);
        let scale = PAGE_WIDTH / line_bytes as f64;
        let x = page_x(page) + (start % line_bytes) as f64 * scale;
        rectangle(path, x, y, (end - start) as f64 * scale, LINE_HEIGHT);
        start = end;
    }
}

/// To a hundredth of a pixel.
fn round(length: f64) -> f64 {
    (length * 100.0).round() / 100.0
}

/// Adds a box to a path.
fn rectangle(path: &mut String, x: f64, y: f64, width: f64, height: f64) {
    let (x, y, width, height) = (round(x), round(y), round(width), round(height));
    // Writing to a string does not fail.
    let _ = write!(path, "M{x} {y}h{width}v{height}h-{width}z");
}

fn legend(y: f64) -> Group {
    let entries = [
        ("url(#static)", "static"),
        ("url(#reserved)", "reserved"),
        ("none", "no memory"),
        (FREE, "free"),
        (IDLE, "idle in caches"),
    ];
    let classes = CLASSES.iter().map(|&(_, colour, words)| (colour, words));
    let mut group = Group::new();
    let mut x = LEFT;
    for (fill, words) in entries.into_iter().chain(classes) {
        let mut mark = Rectangle::new()
            .set("x", x + 0.5)
            .set("y", y - 10.5)
            .set("width", 13)
            .set("height", 13)
            .set("fill", fill);
        if fill == "none" {
            mark = mark.set("stroke", "#b4bdc7").set("stroke-dasharray", "2 2");
        }
        group = group
            .add(mark)
            .add(label(words, x + 20.0, y, 13, FAINT_INK));
        x += 48.0 + 7.2 * words.len() as f64;
    }
    group
}
