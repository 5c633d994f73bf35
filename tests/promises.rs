//! What SECURITY.md and README.md say is so as far as that can be looked up: the tests that are named exist, the limits and
//! the oldest compiler are those of the code.

use std::fs;
use std::path::Path;

fn read(path: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// What stands between backticks.
fn quoted(line: &str) -> impl Iterator<Item = &str> {
    line.split('`').skip(1).step_by(2)
}

#[test]
fn every_test_that_is_named_exists() {
    let text = read("SECURITY.md");
    let rows = text.lines().skip_while(|line| !line.starts_with("|---"));
    let rows = rows.skip(1).take_while(|line| line.starts_with('|'));
    let mut named = 0;
    for row in rows {
        let (_, tests) = row.trim_end_matches('|').rsplit_once('|').unwrap();
        let mut tests = quoted(tests).peekable();
        assert!(tests.peek().is_some(), "a promise without a test: {row}");
        for test in tests {
            let (file, name) = test.split_once(": ").expect("a file and a test in it");
            let code = read(file);
            let start = code
                .find(&format!("fn {name}("))
                .unwrap_or_else(|| panic!("no {test}"));
            let attribute = code[..start].rfind("#[test]").expect("it is a test");
            let between = &code[attribute + "#[test]".len()..start];
            assert!(!between.contains("fn "), "{test} is no test");
            named += 1;
        }
    }
    assert!(named > 15, "{named}");
}

#[test]
fn limits_are_those_of_the_code() {
    let text = read("SECURITY.md");
    for (limit, file, constant) in [
        (
            "64 KiB (`MAX_LINE_BYTES`)",
            "cli/src/trace/lines.rs",
            "MAX_LINE_BYTES: usize = 64 << 10;",
        ),
        (
            "4 GiB (`MAX_TEXT_BYTES`)",
            "cli/src/trace/lines.rs",
            "MAX_TEXT_BYTES: u64 = 4 << 30;",
        ),
        (
            "16,777,216 (`MAX_STEPS`)",
            "cli/src/script.rs",
            "MAX_STEPS: usize = 1 << 24;",
        ),
        (
            "16 MiB",
            "kernel/src/modules/object.rs",
            "MAX_OBJECT_BYTES: usize = 16 << 20;",
        ),
        (
            "32 sections",
            "kernel/src/modules/object.rs",
            "MAX_SECTIONS: usize = 32;",
        ),
        (
            "4096 symbols",
            "kernel/src/modules/object.rs",
            "MAX_SYMBOLS: usize = 4096;",
        ),
        (
            "65,536 relocations",
            "kernel/src/modules/object.rs",
            "MAX_RELOCATIONS: usize = 1 << 16;",
        ),
        (
            "names of 256 bytes",
            "kernel/src/modules/object.rs",
            "MAX_NAME_BYTES: usize = 256;",
        ),
        (
            "16 pages of code or data (`MAX_PAGES`)",
            "kernel/src/modules/pages.rs",
            "MAX_PAGES: usize = 16;",
        ),
        (
            "8 areas of variables outside of the reserved region (`MAX_AREAS`)",
            "kernel/src/modules/dynamic.rs",
            "MAX_AREAS: usize = 8;",
        ),
    ] {
        assert!(text.contains(limit), "{limit}");
        assert!(read(file).contains(constant), "{constant}");
    }
    assert_eq!(pcpu::unit::MAX_CPUS, 8192);
}

#[test]
fn the_oldest_compiler_is_told() {
    let oldest = env!("CARGO_PKG_RUST_VERSION");
    let told = format!("Rust {oldest} or later");
    assert!(read("README.md").contains(&told), "{told}");
}
