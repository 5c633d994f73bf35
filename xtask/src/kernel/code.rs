//! The machine code of the kernel, as it was linked: an operation on a static variable is one instruction with the %gs prefix on
//! the symbol itself, and no handle is loaded from memory anywhere.
//!
//! The functions to look at are those of `kernel/src/tests/one_op.rs`; the rest holds for all code of the kernel.

use std::ops::Range;
use std::path::Path;

use iced_x86::{
    Decoder, DecoderOptions, FlowControl, Formatter, Instruction, IntelFormatter, Mnemonic, OpKind,
    Register,
};
use object::{Object, ObjectSection, ObjectSymbol, SectionKind};

use crate::command::Failure;
use crate::tally::Tally;

/// The operations, and the instructions of each that touch memory.
const OPERATIONS: &[(&str, &[Mnemonic])] = &[
    ("read", &[Mnemonic::Mov]),
    ("write", &[Mnemonic::Mov]),
    ("add", &[Mnemonic::Add]),
    ("sub", &[Mnemonic::Add]),
    ("inc", &[Mnemonic::Inc]),
    ("dec", &[Mnemonic::Dec]),
    ("and", &[Mnemonic::And]),
    ("or", &[Mnemonic::Or]),
    ("xor", &[Mnemonic::Xor]),
    ("add_return", &[Mnemonic::Xadd]),
    // A first value to try, and the exchange.
    ("xchg", &[Mnemonic::Mov, Mnemonic::Cmpxchg]),
    ("cmpxchg", &[Mnemonic::Cmpxchg]),
];

/// The fewest instructions of the kernel that work on a static variable.
const LEAST_ON_STATICS: usize = 100;

/// Looks at the code of a kernel.
pub fn check(kernel: &Path) -> Result<Tally, Failure> {
    let bytes = std::fs::read(kernel)?;
    let file = object::File::parse(&*bytes)?;
    let code = Code {
        template: symbol(&file, "__per_cpu_start")?..symbol(&file, "__per_cpu_end")?,
        file,
    };
    let mut tally = Tally::default();
    for (name, expected) in OPERATIONS {
        tally += code.check_operation(name, expected)?;
    }
    tally += code.check_all()?;
    Ok(tally)
}

fn symbol(file: &object::File<'_>, name: &str) -> Result<u64, Failure> {
    let symbol = file.symbol_by_name(name);
    let symbol = symbol.ok_or_else(|| format!("the kernel has no symbol {name}"))?;
    Ok(symbol.address())
}

struct Code<'data> {
    file: object::File<'data>,
    /// Where the static variables were linked to.
    template: Range<u64>,
}

impl Code<'_> {
    fn check_operation(&self, name: &str, expected: &[Mnemonic]) -> Result<Tally, Failure> {
        let found = self.file.symbol_by_name(&format!("op.{name}"));
        let found = found.ok_or_else(|| format!("the kernel has no function op.{name}"))?;
        let index = found.section_index().ok_or("a function is in a section")?;
        let section = self.file.section_by_index(index)?;
        let bytes = section.data_range(found.address(), found.size())?;
        let code = decode(
            bytes.ok_or("a function lies in its section")?,
            found.address(),
        );
        let accesses: Vec<&Instruction> = code.iter().filter(|one| touches_memory(one)).collect();
        let held = accesses
            .iter()
            .map(|one| one.mnemonic())
            .eq(expected.iter().copied())
            && accesses.iter().all(|one| self.is_on_static(one))
            && !code.iter().any(|one| is_call(one) || one.has_lock_prefix());
        if !held {
            println!("FAILED {name}: not {expected:?} on the symbol through gs");
            code.iter().for_each(|one| println!("  {}", text(one)));
        }
        Ok(Tally::of(held))
    }

    /// What holds for all code: where a copy is reached by the address of a static variable, the address is in the instruction.
    fn check_all(&self) -> Result<Tally, Failure> {
        let (mut on_statics, mut wrong) = (0, 0);
        let sections = self.file.sections();
        for section in sections.filter(|section| section.kind() == SectionKind::Text) {
            for one in decode(section.data()?, section.address()) {
                on_statics += usize::from(touches_memory(&one) && self.is_on_static(&one));
                if self.loads_handle(&one) || self.is_astray(&one) {
                    println!("FAILED {:x}: {}", one.ip(), text(&one));
                    wrong += 1;
                }
            }
        }
        println!(
            "{on_statics} instructions work on static variables, {wrong} instructions are wrong"
        );
        Ok(Tally::of(wrong == 0 && on_statics >= LEAST_ON_STATICS))
    }

    /// Whether an instruction works on the current CPU's copy of a static variable.
    fn is_on_static(&self, one: &Instruction) -> bool {
        one.segment_prefix() == Register::GS
            && one.is_ip_rel_memory_operand()
            && self.template.contains(&one.ip_rel_memory_address())
    }

    /// Whether an instruction loads the address of a static variable from memory, as from a global offset table.
    fn loads_handle(&self, one: &Instruction) -> bool {
        if !touches_memory(one) || !one.is_ip_rel_memory_operand() || has_gs(one) {
            return false;
        }
        let address = one.ip_rel_memory_address();
        let constants = self.file.sections().filter(|section| {
            matches!(
                section.kind(),
                SectionKind::ReadOnlyData | SectionKind::Data
            )
        });
        let word = constants
            .filter_map(|section| section.data_range(address, 8).ok()?)
            .find_map(|bytes| Some(u64::from_le_bytes(bytes.try_into().ok()?)));
        // The start is a symbol of the linker script, which the kernel may look up as it likes.
        let is_handle = |word| self.template.contains(&word) && word != self.template.start;
        one.memory_size().size() == 8 && word.is_some_and(is_handle)
    }

    /// Whether an instruction goes to the template itself, which is given back, or through gs to what is no variable's place; or
    /// locks the bus for a copy.
    fn is_astray(&self, one: &Instruction) -> bool {
        if !touches_memory(one) {
            return false;
        }
        let is_relative = one.is_ip_rel_memory_operand();
        let is_in_template = is_relative && self.template.contains(&one.ip_rel_memory_address());
        match has_gs(one) {
            true => one.has_lock_prefix() || is_relative && !is_in_template,
            false => is_in_template,
        }
    }
}

fn has_gs(one: &Instruction) -> bool {
    one.segment_prefix() == Register::GS
}

fn decode(bytes: &[u8], address: u64) -> Vec<Instruction> {
    let decoder = Decoder::with_ip(64, bytes, address, DecoderOptions::NONE);
    decoder.into_iter().collect()
}

/// Whether an operand in memory is read or written.
fn touches_memory(one: &Instruction) -> bool {
    let has_memory = (0..one.op_count()).any(|operand| one.op_kind(operand) == OpKind::Memory);
    has_memory && !matches!(one.mnemonic(), Mnemonic::Lea | Mnemonic::Nop)
}

fn is_call(one: &Instruction) -> bool {
    matches!(
        one.flow_control(),
        FlowControl::Call | FlowControl::IndirectCall
    )
}

fn text(one: &Instruction) -> String {
    let mut text = String::new();
    IntelFormatter::new().format(one, &mut text);
    text
}
