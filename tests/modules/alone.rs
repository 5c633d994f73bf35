//! Tests in processes of their own, and the libraries that they load.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

/// Tells a process which test it is, and where the libraries are.
const IS_CHILD: &str = "PCPU_TEST_CHILD";
const LIBRARIES: &str = "PCPU_TEST_LIBRARIES";

/// A build of the libraries.
#[derive(Debug, Clone, Copy)]
pub enum Build {
    /// With the feature `unloadable`.
    Unloadable,
    /// Without it.
    Staying,
}

impl Build {
    fn folder(self) -> &'static str {
        match self {
            Self::Unloadable => "unloadable",
            Self::Staying => "staying",
        }
    }

    fn features(self) -> &'static [&'static str] {
        match self {
            Self::Unloadable => &["--features", "unloadable"],
            Self::Staying => &[],
        }
    }
}

/// The file of a library. One that is a copy is removed when this is dropped; who has loaded it by then keeps it.
#[derive(Debug)]
pub struct Library {
    path: PathBuf,
    is_copy: bool,
}

impl Library {
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Library {
    fn drop(&mut self) {
        if self.is_copy {
            // Nothing is wrong with the test if the file stays.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// The library of this name; `copy` tells apart files that are the same but for the system, which loads each for itself.
pub fn library(name: &str, build: Build, copy: u32) -> Library {
    let folder = std::env::var_os(LIBRARIES).expect("the parent says it");
    let folder = Path::new(&folder).join(build.folder());
    let original = folder.join(format!("lib{name}.so"));
    if copy == 0 {
        return Library {
            path: original,
            is_copy: false,
        };
    }
    let path = folder.join(format!("{name}-{}-{copy}.so", std::process::id()));
    std::fs::copy(original, &path).expect("a folder for copies");
    Library {
        path,
        is_copy: true,
    }
}

/// Runs `body` in a process of its own, which is the test `name` once more.
pub fn alone(name: &str, body: impl FnOnce()) {
    alone_with(name, |_| {}, body);
}

/// [`alone`], in a process as `prepare` wants it.
pub fn alone_with(name: &str, prepare: impl FnOnce(&mut Command), body: impl FnOnce()) {
    if let Some(output) = run(name, prepare, body) {
        assert!(output.status.success(), "{name}: {}", output.status);
    }
}

/// Runs `body` in a process of its own, which must end by a panic with this message.
pub fn alone_and_panic(name: &str, message: &str, body: impl FnOnce()) {
    if let Some(output) = run(name, |_| {}, body) {
        let complained = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "{name} does not panic");
        assert!(complained.contains(message), "{name} panics otherwise");
    }
}

/// What the process of the test did; `None` in that process.
fn run(name: &str, prepare: impl FnOnce(&mut Command), body: impl FnOnce()) -> Option<Output> {
    if std::env::var_os(IS_CHILD).is_some() {
        body();
        return None;
    }
    let mut command = Command::new(std::env::current_exe().expect("a test has a file"));
    command
        .args([name, "--exact", "--nocapture"])
        .env(IS_CHILD, "1")
        .env(LIBRARIES, libraries());
    prepare(&mut command);
    let output = command.output().expect("a test can be run");
    let printed = String::from_utf8_lossy(&output.stdout);
    print!("{printed}{}", String::from_utf8_lossy(&output.stderr));
    assert!(printed.contains("running 1 test"), "no test {name}");
    Some(output)
}

/// The folder with the libraries, which are built for the first who asks.
fn libraries() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("modules");
        for build in [Build::Unloadable, Build::Staying] {
            let to = folder.join(build.folder());
            std::fs::create_dir_all(&to).expect("a folder for what is built");
            for library in built(&folder.join("target"), build) {
                let name = library.file_name().expect("a file");
                // Not over a file that another process may have loaded.
                let new = to.join(format!("{}.new", std::process::id()));
                std::fs::copy(&library, &new).expect("cargo has written it");
                std::fs::rename(&new, to.join(name)).expect("the folder is ours");
            }
        }
        folder
    })
}

/// Has cargo build the libraries, in a folder of their own: the usual one may be locked by the cargo that runs this test.
fn built(target_dir: &Path, build: Build) -> Vec<PathBuf> {
    let manifest = concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml");
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command
        .args(["build", "--examples", "--package", "pcpu-fixtures"])
        .args(["--message-format=json", "--manifest-path", manifest])
        .args(build.features())
        .arg("--target-dir")
        .arg(target_dir);
    let output = command.output().expect("cargo is there");
    let complaints = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}\n{complaints}");
    let is_library = |message: serde_json::Value| {
        let is_example = message["target"]["kind"][0] == "example";
        let file = message["filenames"][0].as_str()?;
        (is_example && file.ends_with(".so")).then(|| file.into())
    };
    let libraries: Vec<_> = String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(|line| is_library(serde_json::from_str(line).ok()?))
        .collect();
    assert_eq!(libraries.len(), 2, "cargo names the libraries");
    libraries
}
