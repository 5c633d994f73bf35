//! Links the kernel (no start files, no libc, placed by `kernel.ld`) and compiles its loadable modules.

use std::env;
use std::path::Path;
use std::process::Command;

/// `noexecstack` and `max-page-size` keep the segments as the script has them.
const LINK_ARGS: &[&str] = &[
    "-nostartfiles",
    "-nostdlib",
    "-static",
    "-no-pie",
    "-Wl,-z,max-page-size=4096",
    "-Wl,-z,noexecstack",
    "-Wl,--build-id=none",
];

/// Relocatable objects, which the kernel carries and loads, and what each is compiled with besides.
const MODULES: &[(&str, &[&str])] = &[
    ("by_hand", &[]),
    ("counter", &[]),
    ("far", &["-Ccode-model=large"]),
    ("large", &[]),
    ("long_data", &[]),
    ("long_variables", &[]),
    ("reader", &[]),
];

/// The addresses of a module's symbols are absolute, not looked up in a table.
const MODULE_ARGS: &[&str] = &[
    "--edition=2024",
    "--crate-type=lib",
    "--emit=obj",
    "-Copt-level=2",
    "-Cpanic=abort",
    "-Crelocation-model=static",
    "-Ccodegen-units=1",
    "-Dwarnings",
];

fn main() {
    println!("cargo::rerun-if-changed=kernel.ld");
    println!("cargo::rerun-if-changed=modules");
    if env::var_os("CARGO_FEATURE_BOOT").is_none() {
        return;
    }
    let folder = env::var("CARGO_MANIFEST_DIR").expect("cargo sets it");
    println!("cargo::rustc-link-arg-bins=-Wl,-T,{folder}/kernel.ld");
    for arg in LINK_ARGS {
        println!("cargo::rustc-link-arg-bins={arg}");
    }
    let out = env::var("OUT_DIR").expect("cargo sets it");
    for (module, args) in MODULES {
        compile(
            &Path::new(&folder).join(format!("modules/{module}.rs")),
            &Path::new(&out).join(format!("{module}.o")),
            args,
        );
    }
}

fn compile(source: &Path, object: &Path, args: &[&str]) {
    let rustc = env::var_os("RUSTC").expect("cargo sets it");
    let status = Command::new(rustc)
        .args(MODULE_ARGS)
        .args(args)
        .arg(source)
        .arg("-o")
        .arg(object)
        .status();
    assert!(
        status.is_ok_and(|status| status.success()),
        "{} does not compile",
        source.display()
    );
}
