//! Machine code as tests look at it: the library as cargo builds it for release, programs that rustc makes against it, and
//! the instructions of their functions.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use iced_x86::{
    Decoder, DecoderOptions, FlowControl, Formatter, Instruction, IntelFormatter, Mnemonic, OpKind,
};
use object::{Object, ObjectSection, ObjectSymbol};

/// Runs a tool; what it prints.
pub fn run(command: &mut Command) -> String {
    let output = command.output().expect("the tool is there");
    let complaints = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}\n{complaints}");
    String::from_utf8(output.stdout).expect("tools print UTF-8")
}

/// The library, optimised, in a folder of its own: the usual one is locked by the cargo that runs this test.
fn library(target_dir: &Path) -> PathBuf {
    let manifest = concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml");
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let messages = run(Command::new(cargo)
        .args(["build", "--release", "--lib", "--message-format=json"])
        .args([
            "--package",
            "pcpu",
            "--manifest-path",
            manifest,
            "--target-dir",
        ])
        .arg(target_dir));
    let is_file = |message: &serde_json::Value| {
        let file = message["filenames"][0].as_str()?;
        (message["target"]["name"] == "pcpu" && file.ends_with(".rlib")).then(|| file.into())
    };
    let parsed = messages
        .lines()
        .filter_map(|line| serde_json::from_str(line).ok());
    parsed
        .filter_map(|message| is_file(&message))
        .next_back()
        .expect("the library is built")
}

/// What was built: the program, and its object file, which the linker has not improved yet.
pub struct Built {
    pub program: Vec<u8>,
    pub object: Vec<u8>,
    /// Where the program is.
    pub path: PathBuf,
}

/// Builds `counters.rs`, a crate, and `one_op.rs`, a program that uses it, from a folder of the tests.
pub fn build(sources: &str) -> Built {
    let temporary = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let folder = temporary.join(sources);
    std::fs::create_dir_all(&folder).expect("a folder for what is built");
    let library = library(&temporary.join("disassembly/target"));
    let dependencies = library
        .parent()
        .expect("a file is in a folder")
        .join("deps");
    let sources = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests")
        .join(sources);
    let compile = |source: &str| {
        let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
        let mut command = Command::new(rustc);
        command
            .args([
                "--edition=2024",
                "-Copt-level=3",
                "-Cpanic=abort",
                "-Ccodegen-units=1",
            ])
            .arg(format!("-Ldependency={}", dependencies.display()))
            .arg(format!("--extern=pcpu={}", library.display()))
            .arg(format!("--out-dir={}", folder.display()))
            .arg(sources.join(source));
        command
    };
    run(compile("counters.rs").arg("--crate-type=rlib"));
    let counters = folder.join("libcounters.rlib");
    run(compile("one_op.rs")
        .arg("--emit=obj,link")
        .arg(format!("--extern=counters={}", counters.display())));
    let read = |name: &str| std::fs::read(folder.join(name)).expect("rustc has written it");
    Built {
        object: read("one_op.o"),
        program: read("one_op"),
        path: folder.join("one_op"),
    }
}

/// The functions whose names begin with `op.`, by the rest of it: their instructions, and what holds them.
pub fn functions<'data>(
    file: &object::File<'data>,
) -> BTreeMap<String, (Vec<Instruction>, object::SectionIndex)> {
    let decode = |symbol: object::Symbol<'data, '_>| {
        let name = symbol.name().ok()?.strip_prefix("op.")?.to_owned();
        let index = symbol.section_index().expect("a function is somewhere");
        let section = file.section_by_index(index).expect("the section exists");
        let code = section.data_range(symbol.address(), symbol.size());
        let code = code.expect("readable").expect("in the section");
        let decoder = Decoder::with_ip(64, code, symbol.address(), DecoderOptions::NONE);
        Some((name, (decoder.into_iter().collect(), index)))
    };
    file.symbols().filter_map(decode).collect()
}

/// Panics unless there is a function for every operation on every width, on a variable of every place.
pub fn assert_complete<T>(functions: &BTreeMap<String, T>, operations: &[&str]) {
    for operation in operations {
        for width in ["u8", "u16", "u32", "u64"] {
            for place in ["here", "there", "dynamic"] {
                let name = format!("{operation}.{width}.{place}");
                assert!(functions.contains_key(&name), "no function {name}");
            }
        }
    }
}

pub fn text(instruction: &Instruction) -> String {
    let mut text = String::new();
    IntelFormatter::new().format(instruction, &mut text);
    text
}

pub fn listing(code: &[Instruction]) -> String {
    let line = |instruction| {
        format!(
            "  {:x}: {}\n",
            Instruction::ip(instruction),
            text(instruction)
        )
    };
    code.iter().map(line).collect()
}

pub fn is_call(instruction: &Instruction) -> bool {
    let flow = instruction.flow_control();
    matches!(flow, FlowControl::Call | FlowControl::IndirectCall)
}

/// Whether an operand is in memory.
pub fn has_memory(instruction: &Instruction) -> bool {
    (0..instruction.op_count()).any(|operand| instruction.op_kind(operand) == OpKind::Memory)
}

/// Whether the instruction locks the bus: an exchange with memory does without the prefix.
pub fn is_locked(instruction: &Instruction) -> bool {
    let is_exchange = instruction.mnemonic() == Mnemonic::Xchg && has_memory(instruction);
    instruction.has_lock_prefix() || is_exchange
}
