//! The public API of the library, a line an item, in `docs/public-api.txt`: a change of it is seen in review, and compared with
//! what was released last, in `docs/public-api-base.txt`.
//!
//! It is made from what rustdoc says of the crate with all features that it has on this machine. That form of rustdoc's
//! output is not stable, so that the version of the crate that reads it goes with that of the compiler.

use std::fs;

use crate::command::{Failure, cargo, git, root, target_directory};
use crate::tally::Tally;
use compat::{Difference, Version};

mod compat;

const LISTING: &str = "docs/public-api.txt";

/// The listing of the last release, below a line with its version. Nothing was released before 0.1.0: until then it is the listing
/// of an earlier revision, and the version 0.0.0.
const BASE: &str = "docs/public-api-base.txt";

/// One check: the listing is that of the code.
pub fn check() -> Result<Tally, Failure> {
    let listed = fs::read_to_string(root().join(LISTING))?;
    let public = public_api()?;
    let (listed, public): (Vec<_>, Vec<_>) = (listed.lines().collect(), public.lines().collect());
    let gone = listed.iter().filter(|line| !public.contains(line));
    gone.for_each(|line| println!("- {line}"));
    let new = public.iter().filter(|line| !listed.contains(line));
    new.for_each(|line| println!("+ {line}"));
    let held = listed == public;
    if !held {
        println!(
            "the public API is not that of {LISTING}: if it should change, run cargo xtask api"
        );
    }
    Ok(Tally::of(held))
}

/// Writes the listing anew.
pub fn write() -> Result<(), Failure> {
    let public = public_api()?;
    fs::write(root().join(LISTING), &public)?;
    println!("{LISTING}: {} lines", public.lines().count());
    Ok(())
}

/// One check: what has changed since the last release is what the version in `Cargo.toml` allows, and the changelog names what is
/// gone.
pub fn check_compat() -> Result<Tally, Failure> {
    let base = fs::read_to_string(root().join(BASE))?;
    let (head, base) = base.split_once('\n').ok_or(format!("{BASE} is empty"))?;
    let version = head.strip_prefix("# version ").and_then(Version::parse);
    let version = version
        .ok_or_else(|| format!("{BASE} begins with '{head}', not with '# version X.Y.Z'"))?;
    judge((base, version), "the last release")
}

/// Compares with a revision: its listing and its version. False if a change is more than the version allows, or not explained.
pub fn since(revision: &str) -> Result<bool, Failure> {
    let base = git(&["show", &format!("{revision}:{LISTING}")])?;
    let manifest = git(&["show", &format!("{revision}:Cargo.toml")])?;
    let tally = judge((&base, version_in(&manifest)?), revision)?;
    Ok(tally == Tally::PASS)
}

/// Records the listing as that of the version in `Cargo.toml`: when it is released.
pub fn write_base() -> Result<(), Failure> {
    let listing = fs::read_to_string(root().join(LISTING))?;
    let version = version_in(&fs::read_to_string(root().join("Cargo.toml"))?)?;
    fs::write(root().join(BASE), format!("# version {version}\n{listing}"))?;
    println!("{BASE}: version {version}");
    Ok(())
}

/// Tells what has changed since a listing and a version, and judges it.
fn judge((base, base_version): (&str, Version), name: &str) -> Result<Tally, Failure> {
    let listing = fs::read_to_string(root().join(LISTING))?;
    let changelog = fs::read_to_string(root().join("CHANGELOG.md"))?;
    let version = version_in(&fs::read_to_string(root().join("Cargo.toml"))?)?;
    let difference = Difference::between(base, &listing);
    difference.gone.iter().for_each(|line| println!("- {line}"));
    difference
        .intrusive
        .iter()
        .for_each(|line| println!("! {line}"));
    let change = difference.change();
    println!(
        "{change} since {name} ({base_version}; now {version}): {} lines gone or different, {} new that may break something, {} \
         other new ones",
        difference.gone.len(),
        difference.intrusive.len(),
        difference.new.len()
    );
    let is_within = difference.is_within(base_version, version);
    if !is_within {
        println!("version {version} does not allow {change} since {base_version}");
    }
    let unexplained = difference.unexplained(&changelog);
    for line in &unexplained {
        println!("CHANGELOG.md names it nowhere under [Unreleased], in backticks: {line}");
    }
    Ok(Tally::of(is_within && unexplained.is_empty()))
}

/// The version of the workspace's packages, in a manifest.
fn version_in(manifest: &str) -> Result<Version, Failure> {
    let line = manifest
        .lines()
        .find_map(|line| line.strip_prefix("version = \""));
    let version = line.and_then(|line| Version::parse(line.strip_suffix('"')?));
    Ok(version.ok_or("Cargo.toml has no line 'version = \"X.Y.Z\"'")?)
}

fn public_api() -> Result<String, Failure> {
    // In a folder of its own: what is allowed to use unstable options is not what everything else was built with.
    let target = target_directory()?.join("api");
    let output = cargo("rustdoc --package pcpu --lib --features paging --quiet --target-dir")
        .arg(&target)
        .args(["--", "-Zunstable-options", "--output-format=json"])
        .env("RUSTC_BOOTSTRAP", "1")
        .output()?;
    if !output.status.success() {
        let told = String::from_utf8_lossy(&output.stderr);
        return Err(format!("rustdoc: {}\n{told}", output.status).into());
    }
    let api = public_api::Builder::from_rustdoc_json(target.join("doc/pcpu.json"))
        .omit_blanket_impls(true)
        .omit_auto_trait_impls(true)
        .omit_auto_derived_impls(true)
        .build()?;
    Ok(api.to_string())
}
