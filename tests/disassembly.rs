//! The machine code of the operations on the current CPU's copy, as an optimised program has it: nothing but the
//! restartable sequence, inlined; no call, no LOCKed instruction, no load from the global offset table.
//!
//! The program is made of two files next to this one, by `rustc` against the library as cargo builds it for release:
//! `counters.rs`, a crate that defines static variables, and `one_op.rs`, a program with a function for every operation.
//! They are no targets of the package, for nobody but this test wants them.

#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

#[path = "common/machine_code.rs"]
mod machine_code;

use std::collections::{BTreeMap, HashSet};
use std::ops::Range;
use std::process::Command;

use iced_x86::{FlowControl, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, Register};
use object::{Object, ObjectSection, ObjectSymbol, RelocationFlags, RelocationTarget, elf};

use machine_code::{assert_complete, build, is_call, is_locked, listing, run, text};

/// From the instruction that announces the section to the one that commits, both counted.
const MAX_INSTRUCTIONS: usize = 8;

/// Where `rseq_cs` and `cpu_id` lie in the area that a thread shares with the kernel.
const RSEQ_CS: u64 = 8;
const CPU_ID: u64 = 4;

const OPERATIONS: [&str; 12] = [
    "read",
    "write",
    "add",
    "sub",
    "inc",
    "dec",
    "and",
    "or",
    "xor",
    "add_return",
    "xchg",
    "cmpxchg",
];

/// Operations on more than one word: longer, and no less free of calls.
const ON_WORDS: [&str; 7] = [
    "pair.read.u64.here",
    "pair.read.u64.there",
    "pair.cmpxchg.u64.here",
    "pair.cmpxchg.u64.there",
    "stack.push.Node.here",
    "stack.pop.Node.here",
    "buffer.append.u64.here",
];

/// Operations on slots, and how many instructions there are at most from the announcement to the commit.
const ON_SLOTS: [(&str, usize); 3] = [
    ("slot.take.u64.dynamic", 20),
    ("slot.put.u64.dynamic", 15),
    ("slot.replace.u64.dynamic", 12),
];

/// The sections of static variables besides the plain one.
const SECTIONS: [&str; 4] = ["first", "page_aligned", "read_mostly", "cache_aligned"];

/// A function's instructions, and the section that holds them.
type Code = (Vec<Instruction>, object::SectionIndex);

/// The functions of the operations, by name.
fn functions<'data>(file: &object::File<'data>) -> BTreeMap<String, Code> {
    let functions = machine_code::functions(file);
    assert_complete(&functions, &OPERATIONS);
    for operation in OPERATIONS {
        for section in SECTIONS {
            let name = format!("{operation}.u64.{section}");
            assert!(functions.contains_key(&name), "no function {name}");
        }
    }
    for place in ["here", "there"].into_iter().chain(SECTIONS) {
        let name = format!("handle.u64.{place}");
        assert!(functions.contains_key(&name), "no function {name}");
    }
    for name in ON_WORDS.into_iter().chain(ON_SLOTS.map(|(name, _)| name)) {
        assert!(functions.contains_key(name), "no function {name}");
    }
    functions
}

/// Whether the instruction accesses this word of the rseq area, and how.
fn rseq_access(instruction: &Instruction, displacement: u64) -> bool {
    instruction.memory_segment() == Register::FS
        && instruction.mnemonic() == Mnemonic::Mov
        && instruction.memory_displacement64() == displacement
}

/// Whether the instruction writes to memory other than the thread's own.
fn commits(instruction: &Instruction) -> bool {
    let mut factory = InstructionInfoFactory::new();
    let is_write = |access| {
        matches!(
            access,
            OpAccess::Write | OpAccess::ReadWrite | OpAccess::CondWrite | OpAccess::ReadCondWrite
        )
    };
    let used = factory.info(instruction).used_memory();
    used.iter().any(|memory| {
        is_write(memory.access())
            && memory.segment() != Register::FS
            && memory.base() != Register::RSP
            && memory.base() != Register::RIP
    })
}

fn is_jump_elsewhere(instruction: &Instruction) -> bool {
    instruction.flow_control() == FlowControl::IndirectBranch
}

/// Looks for a way from one instruction to one that `is_end`, without a call: the indices of its instructions. Ways out of
/// the function count as calls.
fn way(
    code: &[Instruction],
    from: usize,
    is_end: impl Fn(&Instruction) -> bool,
) -> Option<Vec<usize>> {
    let index_of = |address| {
        code.iter()
            .position(|instruction| instruction.ip() == address)
    };
    let mut seen = HashSet::new();
    let mut ways = vec![vec![from]];
    while let Some(way) = ways.pop() {
        let &last = way.last()?;
        if is_end(&code[last]) {
            return Some(way);
        }
        if !seen.insert(last) {
            continue;
        }
        let next = (last + 1 < code.len()).then_some(last + 1);
        let target = || index_of(code[last].near_branch_target());
        let nexts = match code[last].flow_control() {
            FlowControl::Next => [next, None],
            FlowControl::UnconditionalBranch => [target(), None],
            FlowControl::ConditionalBranch => [target(), next],
            _ => [None, None],
        };
        ways.extend(nexts.into_iter().flatten().map(|next| {
            let mut way = way.clone();
            way.push(next);
            way
        }));
    }
    None
}

/// A handle is an address relative to the code and a distance that is a static of ours: no call, no branch.
fn check_handle(name: &str, code: &[Instruction]) {
    let is_straight = |instruction: &Instruction| {
        let flow = instruction.flow_control();
        matches!(flow, FlowControl::Next | FlowControl::Return)
    };
    let reads = |instruction: &&Instruction| {
        instruction.is_ip_rel_memory_operand() && instruction.mnemonic() != Mnemonic::Lea
    };
    let listing = listing(code);
    assert!(code.iter().all(is_straight), "{name}:\n{listing}");
    assert_eq!(code.iter().filter(reads).count(), 1, "{name}:\n{listing}");
    assert!(code.len() <= 4, "{name}:\n{listing}");
}

/// Checks one function of the program; returns how many instructions its section takes up to the commit, or all of them
/// where there is none.
fn check(name: &str, code: &[Instruction], got: &[Range<u64>]) -> usize {
    let listing = || format!("{name}:\n{}", listing(code));
    for instruction in code {
        assert!(!is_locked(instruction), "LOCK in {}", listing());
        if instruction.is_ip_rel_memory_operand() {
            let address = instruction.ip_rel_memory_address();
            let is_in_got = got.iter().any(|table| table.contains(&address));
            // Calls of the slow way may go through it; the fast way has none, as is checked below.
            assert!(
                !is_in_got || is_call(instruction) || is_jump_elsewhere(instruction),
                "{} reads the GOT in {}",
                text(instruction),
                listing()
            );
        }
    }
    if name.starts_with("handle.") {
        check_handle(name, code);
        return code.len();
    }
    let is_read = name.starts_with("read.") || name.starts_with("pair.read.");
    let begins = |instruction: &Instruction| match is_read {
        // Nothing to commit, nothing to announce.
        true => rseq_access(instruction, CPU_ID),
        false => rseq_access(instruction, RSEQ_CS),
    };
    let Some(start) = code.iter().position(begins) else {
        panic!("no section in {}", listing());
    };
    // The end of the section: where the copy is written, or read.
    let is_end = |instruction: &Instruction| match is_read {
        true => {
            instruction.memory_index() != Register::None
                && instruction.memory_segment() != Register::FS
        }
        false => commits(instruction),
    };
    let straight = code[start..].iter().position(is_end);
    let Some(length) = straight.map(|index| index + 1) else {
        panic!("no commit in {}", listing());
    };
    assert!(
        code[start..][..length]
            .iter()
            .all(|instruction| !is_call(instruction))
    );
    let is_return = |instruction: &Instruction| instruction.flow_control() == FlowControl::Return;
    let before = way(code, 0, begins);
    let after = way(code, start + length - 1, is_return);
    assert!(
        before.is_some(),
        "a call before the section of {}",
        listing()
    );
    assert!(after.is_some(), "a call after the section of {}", listing());
    length
}

/// In the object file: what the functions want from the global offset table, by calls of the slow way only.
fn check_object(object: &object::File<'_>) {
    const FROM_GOT: [u32; 4] = [
        elf::R_X86_64_GOTPCREL,
        elf::R_X86_64_GOTPCRELX,
        elf::R_X86_64_REX_GOTPCRELX,
        elf::R_X86_64_GOTPCREL64,
    ];
    for (name, (code, section)) in functions(object) {
        let section = object
            .section_by_index(section)
            .expect("the section exists");
        for (offset, relocation) in section.relocations() {
            let RelocationFlags::Elf { r_type } = relocation.flags() else {
                panic!("not an ELF file");
            };
            let user = code
                .iter()
                .find(|user| (user.ip()..user.next_ip()).contains(&offset));
            let Some(user) = user.filter(|_| FROM_GOT.contains(&r_type)) else {
                continue;
            };
            let RelocationTarget::Symbol(symbol) = relocation.target() else {
                panic!("{name}: a relocation without symbol");
            };
            let symbol = object
                .symbol_by_index(symbol)
                .and_then(|symbol| symbol.name());
            assert!(
                is_call(user) || is_jump_elsewhere(user),
                "{symbol:?} comes from the GOT in {name}:\n{}",
                listing(&code)
            );
        }
    }
}

/// An operation on a part of a variable takes the instructions of one on a variable of its own, and one that adds the
/// place of the part, before the section.
fn check_parts(functions: &BTreeMap<String, Code>) {
    let length = |name: &str| {
        let (code, _) = &functions[name];
        let is_return =
            |instruction: &Instruction| instruction.flow_control() == FlowControl::Return;
        let way = way(code, 0, is_return).expect("it returns");
        (way.len(), listing(code))
    };
    for (part, whole) in [
        ("add.u64.static_field", "add.u64.here"),
        ("add.u64.static_element", "add.u64.here"),
        ("read.u64.static_field", "read.u64.here"),
        ("add.u64.owner_field", "add.u64.owner"),
    ] {
        let ((of_part, part_code), (of_whole, whole_code)) = (length(part), length(whole));
        println!("{part}: {of_part} instructions, {whole}: {of_whole}");
        assert!(
            of_part <= of_whole + 1,
            "{part}:\n{part_code}\n{whole}:\n{whole_code}"
        );
    }
}

#[test]
fn an_operation_is_its_section() {
    let built = build("disassembly");
    assert_eq!(run(&mut Command::new(&built.path)), "42\n");
    let object = object::File::parse(&*built.object).expect("an object file");
    check_object(&object);

    let program = object::File::parse(&*built.program).expect("a program");
    let tables = program.sections().filter(|section| {
        let name = section.name();
        name.is_ok_and(|name| name.starts_with(".got"))
    });
    let got: Vec<_> = tables
        .map(|table| table.address()..table.address() + table.size())
        .collect();
    assert!(!got.is_empty(), "a program has a GOT");
    let mut lengths = BTreeMap::<_, Vec<_>>::new();
    let functions = functions(&program);
    check_parts(&functions);
    for (name, (code, _)) in functions {
        let operation = name.rsplitn(3, '.').last().expect("a part").to_owned();
        let length = check(&name, &code, &got);
        lengths
            .entry(operation)
            .or_default()
            .push((length, name, code));
    }
    for (operation, lengths) in lengths {
        let (length, name, code) = lengths
            .iter()
            .max_by_key(|(length, ..)| length)
            .expect("one");
        println!(
            "{operation}: {length} instructions from the announcement to the commit, {} functions",
            lengths.len()
        );
        let is_bounded = OPERATIONS.contains(&&*operation)
            && !["xchg", "add_return", "cmpxchg"].contains(&&*operation);
        let of_slots = ON_SLOTS.iter().find(|(of_slots, _)| of_slots == name);
        let limit = of_slots.map_or(MAX_INSTRUCTIONS, |&(_, limit)| limit);
        assert!(
            !(is_bounded || of_slots.is_some()) || *length <= limit,
            "{length} instructions in {name}:\n{}",
            listing(code)
        );
    }
}
