//! The documents: rustdoc has nothing to complain of, and what the Markdown files name is there.
//!
//! Looked at are links, and code between backticks or in blocks without a language: files, names of the code, the tests,
//! tasks and options of commands. A name that the check does not understand passes: it finds what was renamed or removed,
//! not what is wrong.

mod repository;

use std::fs;
use std::path::Path;

use pulldown_cmark::{CodeBlockKind, Event, Options, Parser, Tag, TagEnd};

use crate::command::{Failure, cargo, check as succeeds, root};
use crate::tally::Tally;
use crate::{USAGE, steps};
use repository::Repository;

/// The check of `cargo xtask test docs`.
pub fn check() -> Result<Tally, Failure> {
    let mut tally = succeeds(
        cargo("doc --workspace --no-deps --features pcpu/paging")
            .env("RUSTDOCFLAGS", "-D warnings"),
    )?;
    let repository = Repository::read()?;
    for document in repository.documents() {
        let text = fs::read_to_string(root().join(document))?;
        let folder = Path::new(document).parent().unwrap_or(Path::new(""));
        let dead = dead_names(&text, folder, &repository);
        for (line, name) in &dead {
            println!("{document}:{line}: there is no {name}");
        }
        tally += Tally::of(dead.is_empty());
    }
    Ok(tally)
}

/// What a document in `folder` names and is not there, with the line.
fn dead_names(text: &str, folder: &Path, repository: &Repository) -> Vec<(usize, String)> {
    let mut dead = Vec::new();
    let mut in_commands = false;
    for (event, range) in Parser::new_ext(text, Options::ENABLE_TABLES).into_offset_iter() {
        let line = text[..range.start].matches('\n').count() + 1;
        let mut tell = |line, names: Vec<String>| {
            dead.extend(names.into_iter().map(|name| (line, name)));
        };
        match event {
            Event::Start(Tag::Link { dest_url, .. } | Tag::Image { dest_url, .. }) => {
                tell(
                    line,
                    Vec::from_iter(dead_link(&dest_url, folder, repository)),
                );
            }
            Event::Start(Tag::CodeBlock(CodeBlockKind::Fenced(language))) => {
                in_commands = language.is_empty();
            }
            Event::End(TagEnd::CodeBlock) => in_commands = false,
            Event::Text(block) if in_commands => {
                for (nth, command) in block.lines().enumerate() {
                    tell(line + nth, dead_in_command(command, repository));
                }
            }
            Event::Code(code) => tell(line, dead_in_code(&code, repository)),
            _ => {}
        }
    }
    dead
}

fn dead_link(link: &str, folder: &Path, repository: &Repository) -> Option<String> {
    let path = link.split('#').next().filter(|path| !path.is_empty())?;
    let is_there = link.contains("://") || repository.has_path(&folder.join(path));
    (!is_there).then(|| format!("file {path}"))
}

/// Code between backticks: a file, a name, or a command.
fn dead_in_code(code: &str, repository: &Repository) -> Vec<String> {
    // As in a table of tests: `FILE: NAME`.
    let parts = code.split(": ");
    let dead_part = |part: &str| {
        if is_file(part, repository) {
            (!repository.has_file(part)).then(|| format!("file {part}"))
        } else {
            let name = part.split('=').next().unwrap_or(part);
            let is_there = name_in(name).is_none_or(|name| repository.has_name(name));
            (!is_there).then(|| format!("name {name}"))
        }
    };
    let mut dead: Vec<_> = parts.filter_map(dead_part).collect();
    dead.extend(dead_in_command(code, repository));
    dead
}

/// Whether it is to be a file or folder of the project: by its ending, or because it begins with one of its folders.
fn is_file(code: &str, repository: &Repository) -> bool {
    const ENDINGS: [&str; 10] = [
        ".rs", ".md", ".csv", ".s", ".ld", ".gz", ".svg", ".txt", ".toml", ".c",
    ];
    let is_plain = |char: char| char.is_ascii_alphanumeric() || "._-/".contains(char);
    let first = code.split_once('/').map(|(first, _)| first);
    !code.starts_with('/')
        && code.chars().all(is_plain)
        && (ENDINGS.iter().any(|ending| code.ends_with(ending))
            || first.is_some_and(|first| repository.has_path(Path::new(first))))
}

/// The identifier to look for, if it is one that nobody else has: one of several words, or the last of a path.
/// The dots of `a_name_that_goes_on...` stay.
fn name_in(code: &str) -> Option<&str> {
    let code = code.trim_end_matches("()").trim_end_matches('!');
    let is_word = |char: char| char.is_ascii_alphanumeric() || char == '_';
    let is_identifier = |part: &str| !part.is_empty() && part.chars().all(is_word);
    let is_path = code.trim_end_matches("...").split("::").all(is_identifier);
    let last = code.rsplit("::").next()?;
    (is_path && (code.contains("::") || last.trim_matches('_').contains('_'))).then_some(last)
}

/// What a command of cargo's, of this program, or of `pcpu` names.
fn dead_in_command(command: &str, repository: &Repository) -> Vec<String> {
    let is_setting = |word: &&str| word.contains('=') && !word.starts_with('-');
    let words: Vec<&str> = command
        .split_whitespace()
        .take_while(|word| !word.starts_with('#'))
        .skip_while(is_setting)
        .filter(|word| !word.starts_with('+'))
        .collect();
    let follows = |option: &str| {
        let at = words.iter().position(|word| *word == option)?;
        words.get(at + 1).copied()
    };
    let mut dead = Vec::new();
    for kind in ["test", "bench", "example", "package"] {
        let dead_target = follows(&format!("--{kind}"))
            .filter(|_| ["cargo", "--example"].contains(&words[0]))
            .filter(|target| !repository.has_target(kind, target));
        dead.extend(dead_target.map(|target| format!("{kind} {target}")));
    }
    match words[..] {
        ["cargo", "xtask", "test", step, ..] if !steps::any(step) => {
            dead.push(format!("step {step}"));
        }
        ["cargo", "xtask", task, ..] if !USAGE.contains(&format!("cargo xtask {task}")) => {
            dead.push(format!("task {task}"));
        }
        ["cargo", "fuzz", "run", ..] => {
            let file = |word: &&str| repository.has_file(&format!("fuzz/fuzz_targets/{word}.rs"));
            if !words[3..].iter().any(file) {
                dead.push(format!("fuzz target of {command}"));
            }
        }
        _ => {}
    }
    let is_ours = matches!(words[..], ["pcpu", ..] | ["cargo", "xtask", ..])
        || words.len() == 1 && words[0].starts_with("--");
    if is_ours {
        let is_option = |word: &&&str| word.starts_with("--") && word.len() > 2;
        let options = words.iter().filter(is_option);
        let is_dead = |option: &&&str| !repository.has_option(option);
        dead.extend(
            options
                .filter(is_dead)
                .map(|option| format!("option {option}")),
        );
    }
    dead
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dead(text: &str) -> Vec<(usize, String)> {
        let repository = Repository::of(
            &[
                "docs/guide.md",
                "src/one/two.rs",
                "fuzz/fuzz_targets/any.rs",
            ],
            "fn first_word() { clap(no_zero); } // --trace-file",
            &[("test", "models"), ("example", "shop"), ("package", "pcpu")],
        );
        dead_names(text, Path::new("docs"), &repository)
    }

    #[test]
    fn what_is_there_is_not_told() {
        for text in [
            "[one](guide.md#part), [two](../src/one/two.rs), [three](../src/), [out](https://example.org/x.rs)",
            "`two.rs`, `one/two.rs`, `src/one`, `src/one/two.rs: first_word`, `first_word()`, `any::first_word`",
            "`first_...`, `first_word=1`, `AnyWord`, `malloc`, `7 / 8`, `x.y`, `/proc/self/maps.txt`",
            "`cargo test --test models x`, `N=1 cargo run --release --example shop`, `--example shop`",
            "`cargo build --package pcpu --no-such-option`, `rustc --test nothing`",
            "`cargo xtask test docs`, `cargo xtask measure`, `cargo +nightly fuzz run --x y any`",
            "`pcpu replay [--no-zero] --trace-file F`, `--no-zero`, `other --frob`",
            "```rust\ncargo test --test nothing\n```",
        ] {
            assert_eq!(dead(text), [], "{text}");
        }
    }

    #[test]
    fn what_is_not_there_is_told_with_its_line() {
        for (text, name) in [
            ("[one](guides.md)", "file guides.md"),
            ("`three.rs`", "file three.rs"),
            ("`src/three`", "file src/three"),
            ("`two.rs: second_word`", "name second_word"),
            ("`second_word()`", "name second_word()"),
            ("`first_word::Third`", "name first_word::Third"),
            ("`second_...`", "name second_..."),
            ("`cargo test --test nothing`", "test nothing"),
            ("`cargo bench --bench models`", "bench models"),
            ("`--example nothing`", "example nothing"),
            ("```\ncargo test --test nothing # why\n```", "test nothing"),
            ("`cargo xtask test nothing`", "step nothing"),
            ("`cargo xtask nothing`", "task nothing"),
            (
                "`cargo fuzz run nothing`",
                "fuzz target of cargo fuzz run nothing",
            ),
            ("`pcpu replay --frob`", "option --frob"),
            ("`--frob`", "option --frob"),
        ] {
            let found = dead(&format!("A first line.\n\n{text}\n"));
            let line = if text.starts_with("```") { 4 } else { 3 };
            assert_eq!(found, [(line, name.to_owned())], "{text}");
        }
    }
}
