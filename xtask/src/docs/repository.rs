//! What there is to be named: the files of the project, the words of its code, the targets that cargo knows.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Component, Path, PathBuf};

use serde_json::Value;

use crate::command::{Failure, cargo, git, root};

/// Names in our documents that are somebody else's.
const OF_OTHERS: [&str; 1] = ["mm_cid"];

/// What there is.
#[derive(Debug, Default)]
pub struct Repository {
    files: Vec<String>,
    words: BTreeSet<String>,
    /// Kind and name.
    targets: BTreeSet<(String, String)>,
}

impl Repository {
    /// Looks it up: files that git has or would add.
    pub fn read() -> Result<Self, Failure> {
        let listed = git(&["ls-files", "--cached", "--others", "--exclude-standard"])?;
        let is_there = |file: &&str| root().join(file).exists();
        let files: Vec<_> = listed.lines().filter(is_there).map(str::to_owned).collect();
        let mut words = BTreeSet::new();
        for file in &files {
            if matches!(ending(file), "rs" | "toml" | "s" | "c" | "ld") {
                let code = fs::read_to_string(root().join(file))?;
                words.extend(words_of(&code).map(str::to_owned));
            }
        }
        words.extend(OF_OTHERS.map(str::to_owned));
        let metadata = cargo("metadata --format-version 1 --no-deps --offline").output()?;
        let metadata: Value = serde_json::from_slice(&metadata.stdout)?;
        Ok(Self {
            files,
            words,
            targets: targets_of(&metadata),
        })
    }

    /// One that is made up: files, code, and targets by kind and name.
    #[cfg(test)]
    pub fn of(files: &[&str], code: &str, targets: &[(&str, &str)]) -> Self {
        let owned = |&(kind, name): &(&str, &str)| (kind.to_owned(), name.to_owned());
        Self {
            files: files.iter().map(|&file| file.to_owned()).collect(),
            words: words_of(code).map(str::to_owned).collect(),
            targets: targets.iter().map(owned).collect(),
        }
    }

    /// The Markdown files.
    pub fn documents(&self) -> impl Iterator<Item = &str> {
        let files = self.files.iter().map(String::as_str);
        files.filter(|file| ending(file) == "md")
    }

    /// Whether a path from the root leads to a file or a folder.
    pub fn has_path(&self, path: &Path) -> bool {
        let path = normal(path);
        self.files
            .iter()
            .any(|file| Path::new(file).starts_with(&path))
    }

    /// Whether there is a file or folder whose path ends so.
    pub fn has_file(&self, end: &str) -> bool {
        let end = format!("/{}/", end.trim_end_matches('/'));
        self.files
            .iter()
            .any(|file| format!("/{file}/").contains(&end))
    }

    /// Whether the code has this word; one that ends with dots goes on.
    pub fn has_name(&self, name: &str) -> bool {
        match name.strip_suffix("...") {
            Some(start) => self.words.iter().any(|word| word.starts_with(start)),
            None => self.words.contains(name),
        }
    }

    /// Whether there is a test, benchmark, example or package of this name.
    pub fn has_target(&self, kind: &str, name: &str) -> bool {
        self.targets.contains(&(kind.to_owned(), name.to_owned()))
    }

    /// Whether the code has an option of this name: as a field of its arguments, or as it is written.
    pub fn has_option(&self, option: &str) -> bool {
        let name = option.trim_matches(['-', ']']);
        self.words.contains(name) || self.words.contains(&name.replace('-', "_"))
    }
}

fn ending(file: &str) -> &str {
    file.rsplit_once('.').map_or("", |(_, ending)| ending)
}

/// Identifiers, and words that hyphens join.
fn words_of(code: &str) -> impl Iterator<Item = &str> {
    let words = |joints: &'static str| {
        let is_end = move |char: char| !char.is_ascii_alphanumeric() && !joints.contains(char);
        code.split(is_end).map(|word| word.trim_matches('-'))
    };
    words("_").chain(words("-").filter(|word| word.contains('-')))
}

/// Without `.` and `..`.
fn normal(path: &Path) -> PathBuf {
    let mut normal = PathBuf::new();
    for component in path.components() {
        match component {
            Component::ParentDir => drop(normal.pop()),
            Component::CurDir => {}
            other => normal.push(other),
        }
    }
    normal
}

fn targets_of(metadata: &Value) -> BTreeSet<(String, String)> {
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let mut all = BTreeSet::new();
    for package in list(&metadata["packages"]) {
        all.insert(("package".to_owned(), text(&package["name"])));
        for target in list(&package["targets"]) {
            for kind in list(&target["kind"]) {
                all.insert((text(&kind), text(&target["name"])));
            }
        }
    }
    all
}
