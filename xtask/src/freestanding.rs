//! The library without its `std` feature needs nothing but `core`.
//!
//! The proof is a program that has no std, no allocator and no libc: `freestanding/main.rs`. It is no package,
//! because cargo would unify its features with those of the workspace; rustc builds it directly.
//! - If any crate below the library brought in `alloc`, rustc would miss a global allocator.
//! - If any brought in `std`, the program's panic handler would be a second one.
//! - If what the program calls ended in libc, the linker would miss the symbol.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::command::{self, Failure, build, cargo, root, rustc};
use crate::tally::Tally;

const SOURCE: &str = "xtask/freestanding/main.rs";

pub fn check() -> Result<Tally, Failure> {
    command::check(&mut Command::new(link()?))
}

/// Builds the library and the program; where the program is.
fn link() -> Result<PathBuf, Failure> {
    let artifacts = build(&mut cargo(
        "build --release --package pcpu --lib --no-default-features --features paging",
    ))?;
    let files = || artifacts.iter().flat_map(|artifact| artifact.files());
    // The library itself comes last, after what it depends on.
    let library = files()
        .filter(|file| {
            file.extension()
                .is_some_and(|extension| extension == "rlib")
        })
        .last()
        .ok_or("cargo names no library")?;
    let program = library.with_file_name("pcpu-freestanding");

    let mut rustc = Command::new(rustc());
    rustc
        .current_dir(root())
        .args(["--edition=2024", "-O", "-Cpanic=abort", "-Dwarnings"])
        .args(["-Crelocation-model=static", "-Clink-args=-nostdlib -static"])
        .arg(format!("--extern=pcpu={}", library.display()));
    for folder in files().filter_map(Path::parent) {
        rustc.arg(format!("-Ldependency={}", folder.display()));
        // An artefact that cargo hands up is a link to one in its folder of dependencies.
        rustc.arg(format!("-Ldependency={}", folder.join("deps").display()));
    }
    let status = rustc.arg(SOURCE).arg("-o").arg(&program).status()?;
    if !status.success() {
        return Err(format!("{SOURCE} does not link with the library: {status}").into());
    }
    Ok(program)
}
