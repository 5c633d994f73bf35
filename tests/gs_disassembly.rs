//! The machine code of the operations on the current CPU's copy in a kernel, as an optimised program has it: one
//! instruction with the %gs prefix, on the symbol itself where the variable is static; no call, no LOCK, no load from the
//! global offset table.
//!
//! What is looked at is made of the files next to this one, as in `tests/disassembly.rs`. Nobody runs it.

#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

#[path = "common/machine_code.rs"]
mod machine_code;

use std::process::Command;
use std::sync::LazyLock;

use iced_x86::{Instruction, Mnemonic, Register};
use object::{Object, ObjectSection, ObjectSymbol, RelocationFlags, RelocationTarget, elf};

use machine_code::{
    Built, assert_complete, build, functions, has_memory, is_call, is_locked, listing, run, text,
};

static BUILT: LazyLock<Built> = LazyLock::new(|| build("gs_disassembly"));

/// The operations; the instructions that touch the copy; how many instructions the whole function has, its return counted.
const OPERATIONS: [(&str, &[Mnemonic], usize); 12] = [
    ("read", &[Mnemonic::Mov], 2),
    ("write", &[Mnemonic::Mov], 2),
    ("add", &[Mnemonic::Add], 2),
    ("sub", &[Mnemonic::Add], 3),
    ("inc", &[Mnemonic::Inc], 2),
    ("dec", &[Mnemonic::Dec], 2),
    ("and", &[Mnemonic::And], 2),
    ("or", &[Mnemonic::Or], 2),
    ("xor", &[Mnemonic::Xor], 2),
    ("add_return", &[Mnemonic::Xadd], 4),
    // A first value to try, then one exchange for each time that something came in between.
    ("xchg", &[Mnemonic::Mov, Mnemonic::Cmpxchg], 9),
    ("cmpxchg", &[Mnemonic::Cmpxchg], 5),
];

/// The instructions that touch memory, through %gs all of them.
fn accesses(name: &str, code: &[Instruction]) -> Vec<Instruction> {
    let accesses: Vec<_> = code.iter().filter(|one| has_memory(one)).copied().collect();
    for instruction in &accesses {
        let is_copy = instruction.segment_prefix() == Register::GS;
        // Neither touches what its operand names.
        let is_address = matches!(instruction.mnemonic(), Mnemonic::Lea | Mnemonic::Nop);
        assert!(
            is_copy || is_address,
            "{} in {name}:\n{}",
            text(instruction),
            listing(code)
        );
    }
    accesses
}

#[test]
fn an_operation_is_one_instruction() {
    let built = &*BUILT;
    // It does nothing; but it is a whole program, and starts.
    assert_eq!(run(&mut Command::new(&built.path)), "");
    let program = object::File::parse(&*built.program).expect("a program");
    let data = program
        .section_by_name(".data")
        .expect("a program has data");
    let data = data.address()..data.address() + data.size();
    let functions = functions(&program);
    assert_complete(&functions, &OPERATIONS.map(|(operation, ..)| operation));
    for (name, (code, _)) in &functions {
        let listing = || format!("{name}:\n{}", listing(code));
        assert!(!code.iter().any(is_call), "a call in {}", listing());
        assert!(!code.iter().any(is_locked), "LOCK in {}", listing());
        let operation = name.split('.').next().expect("a part");
        let found = OPERATIONS.iter().find(|(known, ..)| *known == operation);
        let Some((_, expected, length)) = found else {
            continue;
        };
        let accesses = accesses(name, code);
        let accesses: Vec<_> = accesses
            .into_iter()
            .filter(|one| one.mnemonic() != Mnemonic::Nop)
            .collect();
        // A narrow word is widened by the instruction that loads it.
        let plain = |access: &Instruction| match access.mnemonic() {
            Mnemonic::Movzx => Mnemonic::Mov,
            other => other,
        };
        let mnemonics: Vec<_> = accesses.iter().map(plain).collect();
        assert_eq!(mnemonics, *expected, "{}", listing());
        for access in accesses {
            if name.ends_with(".dynamic") {
                assert_ne!(access.memory_base(), Register::None, "{}", listing());
                assert_eq!(access.memory_displacement64(), 0, "{}", listing());
            } else {
                assert!(access.is_ip_rel_memory_operand(), "{}", listing());
                assert!(
                    data.contains(&access.ip_rel_memory_address()),
                    "{}",
                    listing()
                );
            }
        }
        // A word that is narrower than a register may have to be widened on its way.
        let is_narrow = name.contains(".u8.") || name.contains(".u16.");
        assert!(
            code.len() <= length + usize::from(is_narrow) * 2,
            "{}",
            listing()
        );
    }
    println!("{} functions", functions.len());

    let code = |name: &str| &functions[name].0;
    let count = code("count.u64.anyone");
    assert_eq!(count[0].mnemonic(), Mnemonic::Inc, "{}", listing(count));
    assert!(count[0].is_ip_rel_memory_operand() && count[0].segment_prefix() == Register::GS);
    let handle = code("handle.u64.there");
    assert_eq!(handle[0].mnemonic(), Mnemonic::Lea, "{}", listing(handle));
    assert!(data.contains(&handle[0].ip_rel_memory_address()));
    assert_eq!(handle.len(), 2, "{}", listing(handle));
    let pair = accesses("replace_pair", code("replace_pair.u64.dynamic"));
    assert_eq!(pair.len(), 1);
    assert_eq!(pair[0].mnemonic(), Mnemonic::Cmpxchg16b);
    let masked: Vec<_> = code("masked.u64.here")
        .iter()
        .map(Instruction::mnemonic)
        .collect();
    let order = [
        Mnemonic::Pushfq,
        Mnemonic::Pop,
        Mnemonic::Cli,
        Mnemonic::Inc,
        Mnemonic::Test,
        Mnemonic::Sti,
    ];
    let mut left = masked.iter();
    for mnemonic in order {
        assert!(
            left.any(|next| *next == mnemonic),
            "{mnemonic:?} in order in {masked:?}"
        );
    }
}

/// What the linker is told: a symbol relative to the code, which a position-independent kernel may contain; and the parts of
/// the section that a linker script sorts.
#[test]
fn variables_are_symbols_in_their_sections() {
    let built = &*BUILT;
    let object = object::File::parse(&*built.object).expect("an object file");
    let mut seen = 0;
    for (name, (code, section)) in functions(&object) {
        let section = object.section_by_index(section).expect("it exists");
        for (_, relocation) in section.relocations() {
            let RelocationFlags::Elf { r_type } = relocation.flags() else {
                panic!("not an ELF file");
            };
            assert_eq!(r_type, elf::R_X86_64_PC32, "{name}:\n{}", listing(&code));
            let RelocationTarget::Symbol(symbol) = relocation.target() else {
                panic!("{name}: a relocation without symbol");
            };
            let symbol = object.symbol_by_index(symbol).expect("it exists");
            // Of a variable of this crate the section is named, of another's the variable.
            let section = symbol
                .section_index()
                .and_then(|index| object.section_by_index(index).ok()?.name().ok());
            let is_variable = match section {
                Some(section) => section.starts_with(".data..percpu"),
                None => symbol.name().is_ok_and(|name| name.contains("TEMPLATE")),
            };
            assert!(is_variable, "{section:?} {:?} in {name}", symbol.name());
            seen += 1;
        }
    }
    assert!(seen >= 8 * OPERATIONS.len(), "{seen} relocations");
    for (part, align) in [
        (".data..percpu", 1),
        (".data..percpu..first", 1),
        (".data..percpu..page_aligned", 4096),
        (".data..percpu..read_mostly", 1),
        (".data..percpu..shared_aligned", 64),
    ] {
        let mut sections = object
            .sections()
            .filter(|section| section.name() == Ok(part));
        let section = sections
            .next()
            .unwrap_or_else(|| panic!("no section {part}"));
        assert!(section.align() >= align, "{part}: {}", section.align());
        assert!(section.size() >= align, "{part}: {} bytes", section.size());
        let object::SectionFlags::Elf { sh_flags } = section.flags() else {
            panic!("not an ELF file");
        };
        assert_eq!(
            sh_flags,
            u64::from(elf::SHF_ALLOC | elf::SHF_WRITE),
            "{part}"
        );
    }
}
