//! What a change of the listing means to users: additive or breaking, and whether version and changelog say so.
//!
//! It goes by the lines of two listings, and errs on the side of breaking: a line that is gone or different breaks somebody; so may
//! a new item of a trait, a new field or variant of a type that is not `#[non_exhaustive]`. What a listing does not show (auto traits,
//! behaviour, the order of arguments of one type) is not seen.

use std::collections::BTreeSet;
use std::fmt;

/// A version, as far as it says what may change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    major: u64,
    minor: u64,
    patch: u64,
}

impl Version {
    /// Three numbers with points between them.
    pub fn parse(text: &str) -> Option<Self> {
        let mut numbers = text.split('.').map(str::parse);
        let mut next = || numbers.next()?.ok();
        let (major, minor, patch) = (next()?, next()?, next()?);
        numbers.next().is_none().then_some(Self {
            major,
            minor,
            patch,
        })
    }

    /// What may change from `base` to here, by the rules of cargo: the first number that is not 0 stands for breaking changes.
    fn allows_since(self, base: Self) -> Change {
        let breaking = |version: Self| match version {
            Self { major: 1.., .. } => (version.major, 0),
            Self { minor: 1.., .. } => (0, version.minor),
            // What was never released promises nothing.
            Self { patch, .. } => (0, patch),
        };
        if self > base && breaking(self) != breaking(base) {
            Change::Breaking
        } else if self > base {
            Change::Additive
        } else {
            Change::None
        }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

/// How much changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Change {
    None,
    Additive,
    Breaking,
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "no change",
            Self::Additive => "an additive change",
            Self::Breaking => "a breaking change",
        })
    }
}

/// The lines that differ.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Difference<'a> {
    /// Gone, or different now.
    pub gone: Vec<&'a str>,
    /// New, and nobody need care.
    pub new: Vec<&'a str>,
    /// New in a trait, or in a type whose fields or variants users may name all of.
    pub intrusive: Vec<&'a str>,
}

impl<'a> Difference<'a> {
    /// From the listing `base` to the listing `now`.
    pub fn between(base: &'a str, now: &'a str) -> Self {
        let lines = |text: &'a str| text.lines().collect::<BTreeSet<_>>();
        let (old, new) = (lines(base), lines(now));
        let named = |words: &[&str]| -> BTreeSet<String> {
            let is_one = |line: &&str| words.iter().any(|word| line.starts_with(word));
            base.lines().filter(is_one).filter_map(path).collect()
        };
        let traits = named(&["pub trait ", "pub unsafe trait "]);
        // Without `#[non_exhaustive]` before it.
        let types = named(&["pub struct ", "pub enum ", "pub union "]);
        let is_intrusive = |line: &&str| {
            let parent = path(line).and_then(|path| Some(path.rsplit_once("::")?.0.to_owned()));
            // Fields and variants stand without a keyword.
            let is_part = line.starts_with("pub pcpu::");
            let of = if is_part { &types } else { &traits };
            !line.starts_with("impl") && parent.is_some_and(|parent| of.contains(&parent))
        };
        let added = once(now).filter(|line| !old.contains(line));
        let (intrusive, harmless) = added.partition(is_intrusive);
        Self {
            gone: once(base).filter(|line| !new.contains(line)).collect(),
            new: harmless,
            intrusive,
        }
    }

    /// What it is to users.
    pub fn change(&self) -> Change {
        if !self.gone.is_empty() || !self.intrusive.is_empty() {
            Change::Breaking
        } else if !self.new.is_empty() {
            Change::Additive
        } else {
            Change::None
        }
    }

    /// Whether the version `now` allows it, where the version `base` was before.
    pub fn is_within(&self, base: Version, now: Version) -> bool {
        self.change() <= now.allows_since(base)
    }

    /// The lines that break something and whose item the changelog's section of unreleased changes does not name in backticks.
    pub fn unexplained(&self, changelog: &str) -> Vec<&'a str> {
        let named = named_as_unreleased(changelog);
        let breaking = self.gone.iter().chain(&self.intrusive).copied();
        let is_named = |line: &&str| {
            let item = path(line).and_then(|path| Some(path.rsplit_once("::")?.1.to_owned()));
            item.is_none_or(|item| named.contains(item.as_str()))
        };
        breaking.filter(|line| !is_named(line)).collect()
    }
}

/// The lines of a listing, each once: what is re-exported stands there twice.
fn once(listing: &str) -> impl Iterator<Item = &str> {
    let mut seen = BTreeSet::new();
    listing.lines().filter(move |line| seen.insert(*line))
}

/// The path of the item that a line is of, without generics: of the type itself for an implementation.
fn path(line: &str) -> Option<String> {
    let from = match line.strip_prefix("impl") {
        Some(rest) => match rest.rsplit_once(" for ") {
            Some((_, of)) => of,
            None => outside_generics(rest),
        },
        None => line,
    };
    let from = &from[from.find("pcpu::")?..];
    let mut depth = 0_usize;
    let mut path = String::new();
    let mut rest = from.chars().peekable();
    while let Some(letter) = rest.next() {
        match letter {
            '<' => depth += 1,
            '>' => depth = depth.saturating_sub(1),
            _ if depth > 0 => {}
            ':' if rest.peek() == Some(&':') => {
                rest.next();
                path.push_str("::");
            }
            letter if letter.is_alphanumeric() || letter == '_' => path.push(letter),
            _ => break,
        }
    }
    Some(path)
}

/// What follows the generics that a text may begin with.
fn outside_generics(text: &str) -> &str {
    let mut depth = 0_usize;
    for (at, letter) in text.char_indices() {
        match letter {
            '<' => depth += 1,
            '>' if !text[..at].ends_with('-') => depth = depth.saturating_sub(1),
            _ if depth == 0 => return &text[at..],
            _ => {}
        }
    }
    text
}

/// The words in backticks of the changelog's section of unreleased changes.
fn named_as_unreleased(changelog: &str) -> BTreeSet<&str> {
    let section = changelog
        .split("\n## ")
        .find(|section| section.starts_with("[Unreleased]"));
    let spans = section.unwrap_or("").split('`').skip(1).step_by(2);
    spans
        .flat_map(|span| span.split(|letter: char| !letter.is_alphanumeric() && letter != '_'))
        .filter(|word| !word.is_empty())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: &str = "\
pub mod pcpu
pub trait pcpu::Hook
pub fn pcpu::Hook::event(&self)
pub struct pcpu::Open
pub pcpu::Open::bytes: usize
#[non_exhaustive] pub struct pcpu::Closed
pub pcpu::Closed::bytes: usize
impl<T> pcpu::Owner<T>
pub fn pcpu::Owner<T>::sum(&self) -> u64
impl<T> core::ops::drop::Drop for pcpu::Owner<T>
";

    fn with(line: &str) -> String {
        format!("{BASE}{line}\n")
    }

    fn without(line: &str) -> String {
        BASE.replace(&format!("{line}\n"), "")
    }

    #[test]
    fn what_is_new_and_what_is_gone() {
        let same = Difference::between(BASE, BASE);
        assert_eq!((same.change(), same), (Change::None, Difference::default()));
        for (line, change) in [
            ("pub fn pcpu::free()", Change::Additive),
            ("pub fn pcpu::Owner<T>::max(&self) -> u64", Change::Additive),
            ("pub pcpu::Closed::pages: usize", Change::Additive),
            ("pub fn pcpu::Open::pages(&self)", Change::Additive),
            ("pub pcpu::Other::pages: usize", Change::Additive),
            ("impl<T> core::fmt::Debug for pcpu::Open", Change::Additive),
            ("pub pcpu::Open::pages: usize", Change::Breaking),
            ("pub fn pcpu::Hook::more(&self)", Change::Breaking),
        ] {
            let now = with(line);
            assert_eq!(Difference::between(BASE, &now).change(), change, "{line}");
        }
        for line in BASE.lines() {
            let now = without(line);
            let difference = Difference::between(BASE, &now);
            assert_eq!(difference.change(), Change::Breaking);
            assert_eq!(difference.gone, [line]);
        }
        let now = BASE.replace("-> u64", "-> u32");
        let changed = Difference::between(BASE, &now);
        assert_eq!((changed.gone.len(), changed.new.len()), (1, 1));
    }

    #[test]
    fn versions_allow_what_cargo_says() {
        let version = |text| Version::parse(text).unwrap();
        for (base, now, change) in [
            ("0.0.0", "0.1.0", Change::Breaking),
            ("0.1.0", "0.1.0", Change::None),
            ("0.1.0", "0.1.1", Change::Additive),
            ("0.1.9", "0.2.0", Change::Breaking),
            ("0.2.0", "0.1.0", Change::None),
            ("0.9.0", "1.0.0", Change::Breaking),
            ("1.2.3", "1.2.4", Change::Additive),
            ("1.2.3", "1.3.0", Change::Additive),
            ("1.2.3", "2.0.0", Change::Breaking),
        ] {
            assert_eq!(
                version(now).allows_since(version(base)),
                change,
                "{base} {now}"
            );
            let grown = with("pub fn pcpu::free()");
            let difference = Difference::between(BASE, &grown);
            let is_within = difference.is_within(version(base), version(now));
            assert_eq!(is_within, change >= Change::Additive);
        }
        for text in ["", "1", "1.2", "1.2.3.4", "1.2.x", "v1.2.3"] {
            assert_eq!(Version::parse(text), None, "{text}");
        }
    }

    #[test]
    fn the_changelog_names_what_breaks() {
        let now = without("pub fn pcpu::Owner<T>::sum(&self) -> u64");
        let difference = Difference::between(BASE, &now);
        let line = "pub fn pcpu::Owner<T>::sum(&self) -> u64";
        for (changelog, is_named) in [
            (
                "# Changelog\n\n## [Unreleased]\n\n- `Owner::sum` is gone.\n\n## [0.1.0]\n",
                true,
            ),
            (
                "# Changelog\n\n## [Unreleased]\n\n- sum is gone.\n\n## [0.1.0]\n",
                false,
            ),
            (
                "# Changelog\n\n## [Unreleased]\n\n- `summary`\n\n## [0.1.0]\n",
                false,
            ),
            (
                "# Changelog\n\n## [Unreleased]\n\n## [0.1.0]\n\n- `Owner::sum`\n",
                false,
            ),
            ("", false),
        ] {
            let expected = if is_named { vec![] } else { vec![line] };
            assert_eq!(difference.unexplained(changelog), expected, "{changelog}");
        }
    }

    #[test]
    fn paths_of_lines() {
        for (line, expected) in [
            ("pub mod pcpu::allocator", "pcpu::allocator"),
            (
                "pub fn pcpu::A<B, R>::free(&self, pcpu::Other) -> pcpu::E",
                "pcpu::A::free",
            ),
            (
                "#[non_exhaustive] pub enum pcpu::AllocError",
                "pcpu::AllocError",
            ),
            (
                "pub pcpu::Policy::upkeep: pcpu::UpkeepBy",
                "pcpu::Policy::upkeep",
            ),
            ("impl<'a, T: pcpu::Word> pcpu::Part<'a, T>", "pcpu::Part"),
            (
                "impl core::convert::From<pcpu::Small> for pcpu::Large",
                "pcpu::Large",
            ),
            (
                "pub const pcpu::unit::MAX_CPUS: u32",
                "pcpu::unit::MAX_CPUS",
            ),
        ] {
            assert_eq!(path(line).as_deref(), Some(expected));
        }
        assert_eq!(path("pub mod pcpu"), None);
    }
}
