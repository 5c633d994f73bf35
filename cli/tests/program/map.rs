//! `pcpu map`: the text, and an SVG that is well-formed.

use std::fs;

use super::replay::{alloc, free, trace};
use super::{path, run};

#[test]
fn the_built_in_trace_as_text() {
    let text = run("map").ok();
    assert!(text.starts_with("boot8 at its peak"), "{text}");
    let chunks: Vec<_> = text.lines().filter(|line| line.contains('│')).collect();
    assert!(chunks.len() >= 2, "{text}");
    // 52 pages of static variables and 2 that are reserved.
    assert!(
        chunks[0].contains(&format!("│{}RR", "S".repeat(52))),
        "{text}"
    );
    // A unit of 256 KiB has 64 pages.
    for chunk in chunks {
        assert_eq!(
            chunk.split('│').nth(1).unwrap().chars().count(),
            64,
            "{text}"
        );
    }
}

#[test]
fn a_trace_at_its_peak() {
    let file = trace(
        "map_peak",
        &[
            alloc(0, 4096, 8, 1),
            alloc(0, 8, 8, 2),
            free(0, 1),
            alloc(0, 16, 8, 3),
        ],
    );
    let text = run(&format!("map --trace {file}")).ok();
    assert!(text.contains("at its peak, after operation 1\n"), "{text}");
    assert!(text.contains("4104 bytes are live"), "{text}");
}

/// What waits in caches is neither live nor free: the tables of the caches, and the run that an area of 8 bytes came out of.
#[test]
fn what_idles_in_caches_is_told_apart() {
    let file = trace("map_idle", &[alloc(0, 8, 8, 1)]);
    let text = run(&format!("map --trace {file}")).ok();
    assert!(text.contains(" 8 bytes are live"), "{text}");
    let figures = text.lines().nth(1).unwrap();
    // A table and the rest of a run of 32.
    let idle = format!("; {} idle in caches", 1792 + 31 * 8);
    assert!(figures.ends_with(&idle), "{figures}");
    let svg = path("map_idle.svg");
    run(&format!("map --trace {file} --svg {}", svg.display())).ok();
    let svg = fs::read_to_string(svg).unwrap();
    assert!(svg.contains("idle in caches"), "{svg}");
    assert_eq!(
        svg.matches("#c5ccd3").count(),
        2,
        "in the legend and once in the map"
    );
}

#[test]
fn files_that_cannot_be() {
    assert!(run("map --trace /no/such").error(2).contains("/no/such"));
    assert!(
        run("map --svg /no/such/map.svg")
            .error(2)
            .contains("/no/such/map.svg")
    );
}

#[test]
fn an_svg_is_well_formed() {
    let svg = path("map.svg");
    let said = run(&format!("map --svg {}", svg.display())).ok();
    assert!(said.contains(&svg.display().to_string()), "{said}");
    let text = fs::read_to_string(svg).unwrap();
    assert!(text.trim_start().starts_with("<svg "), "{}", &text[..80]);
    assert_well_formed(&text);
    for word in ["chunk 0", "chunk 1", "static", "viewBox"] {
        assert!(text.contains(word), "{word}");
    }
}

/// Every element ends where it must, every attribute is quoted, and no bare `<` or `&` stands in a text.
fn assert_well_formed(xml: &str) {
    let mut open: Vec<&str> = Vec::new();
    let mut roots = 0;
    let mut rest = xml.trim();
    while let Some((text, tail)) = rest.split_once('<') {
        assert_text(text);
        assert!(
            !open.is_empty() || text.trim().is_empty(),
            "text outside: {text}"
        );
        let (tag, tail) = split_tag(tail);
        rest = tail;
        if let Some(name) = tag.strip_prefix('/') {
            assert_eq!(open.pop(), Some(name.trim()));
            continue;
        }
        roots += u32::from(open.is_empty());
        let inner = tag.strip_suffix('/').unwrap_or(tag);
        let (name, attributes) = inner.split_once(char::is_whitespace).unwrap_or((inner, ""));
        assert!(
            !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric()),
            "element {name}"
        );
        assert_attributes(attributes);
        if !tag.ends_with('/') {
            open.push(name);
        }
    }
    assert_eq!((open, roots, rest), (vec![], 1, ""));
}

/// A tag up to its `>`, which may stand in quotes before.
fn split_tag(text: &str) -> (&str, &str) {
    let mut quote = None;
    for (at, sign) in text.char_indices() {
        match (quote, sign) {
            (None, '>') => return (&text[..at], &text[at + 1..]),
            (None, '"' | '\'') => quote = Some(sign),
            (Some(open), _) if open == sign => quote = None,
            _ => {}
        }
    }
    panic!("a tag does not end: {}", &text[..text.len().min(80)]);
}

fn assert_attributes(mut attributes: &str) {
    let mut names = Vec::new();
    while let Some((name, rest)) = attributes.split_once('=') {
        let name = name.trim();
        assert!(!names.contains(&name), "{name} twice");
        names.push(name);
        let quote = rest
            .chars()
            .next()
            .filter(|sign| ['"', '\''].contains(sign));
        let quote = quote.unwrap_or_else(|| panic!("{name} is not quoted"));
        let (value, rest) = rest[1..].split_once(quote).unwrap();
        assert_text(value);
        assert!(!value.contains('<'), "{name}={value}");
        attributes = rest;
    }
    assert_eq!(attributes.trim(), "");
}

/// Every `&` begins an entity.
fn assert_text(text: &str) {
    for entity in text.split('&').skip(1) {
        let known = ["amp;", "lt;", "gt;", "quot;", "apos;", "#"];
        assert!(
            known.iter().any(|known| entity.starts_with(known)),
            "&{entity}"
        );
    }
}
