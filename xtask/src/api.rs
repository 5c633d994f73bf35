//! The public API of the library, a line an item, in `docs/public-api.txt`: a change of it is seen in review.
//!
//! It is made from what rustdoc says of the crate with all features that it has on this machine. That form of rustdoc's
//! output is not stable, so that the version of the crate that reads it goes with that of the compiler.

use std::fs;

use crate::command::{Failure, cargo, root, target_directory};
use crate::tally::Tally;

const LISTING: &str = "docs/public-api.txt";

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
