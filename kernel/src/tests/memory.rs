//! What the rest stands on: no page both written and executed, the borders of the image, stacks, the red zone.

use core::arch::asm;
use core::sync::atomic::{AtomicU64, Ordering};

use x86_64::structures::paging::page_table::PageTableEntry;
use x86_64::structures::paging::{PageTable, PageTableFlags, PhysFrame};

use super::{Test, Why};
use crate::cpus::local_apic::{self, TimerKind};
use crate::memory::paging;
use crate::memory::{PHYSICAL_MAP, USER, image};
use crate::{boot, ensure, interrupts, probe};

pub const TESTS: &[Test] = &[
    Test::new(
        "no mapping is both written and executed, or open by mistake",
        no_writable_code,
    ),
    Test::new(
        "code and constants cannot be written",
        constants_are_read_only,
    ),
    Test::new(
        "the page below the boot stack is not mapped",
        boot_stack_is_guarded,
    ),
    Test::new("an interrupt leaves the red zone alone", red_zone_survives),
];

fn no_writable_code() -> Result<(), Why> {
    for root in [paging::root(), boot::page_tables()] {
        let leaves = walk(root, 4, PageTableFlags::WRITABLE, 0)?;
        ensure!(leaves > 100, "only {leaves} mappings were found");
    }
    Ok(())
}

/// Walks a table; returns how many mappings it leads to. `above` has the rights that the tables above leave, with the
/// bit against execution if one of them has it.
fn walk(frame: PhysFrame, level: u8, above: PageTableFlags, address: usize) -> Result<usize, Why> {
    use PageTableFlags as F;
    let mut leaves = 0;
    // CPUs that never came share tables, side by side.
    let mut last = (PageTableEntry::new(), 0);
    // SAFETY: a table of the kernel, which nobody changes meanwhile.
    let table: &PageTable = unsafe { &*paging::table(frame) };
    for (index, entry) in table.iter().enumerate() {
        let flags = entry.flags();
        if !flags.contains(F::PRESENT) {
            continue;
        }
        let address = address | index << (12 + 9 * (usize::from(level) - 1));
        let rights = (above & flags & F::WRITABLE) | ((above | flags) & F::NO_EXECUTE);
        if level == 1 || flags.contains(F::HUGE_PAGE) {
            leaves += 1;
            ensure!(
                rights != F::WRITABLE,
                "{address:#x} can be written and executed"
            );
            // The tables above may let a user in; the last one decides.
            ensure!(
                !flags.contains(F::USER_ACCESSIBLE) || (USER..PHYSICAL_MAP).contains(&address),
                "{address:#x} is open to users"
            );
        } else if !is_same(entry, &last.0) {
            let below = PhysFrame::containing_address(entry.addr());
            last = (entry.clone(), walk(below, level - 1, rights, address)?);
            leaves += last.1;
        } else {
            leaves += last.1;
        }
    }
    Ok(leaves)
}

/// Whether two entries lead to the same, with the same rights.
fn is_same(one: &PageTableEntry, other: &PageTableEntry) -> bool {
    let rights =
        |entry: &PageTableEntry| entry.flags() - PageTableFlags::ACCESSED - PageTableFlags::DIRTY;
    one.addr() == other.addr() && rights(one) == rights(other)
}

fn constants_are_read_only() -> Result<(), Why> {
    for part in [image::text(), image::rodata()] {
        for address in [part.start as usize, PHYSICAL_MAP + part.start as usize] {
            ensure!(probe::read(address).is_ok(), "{address:#x} is not mapped");
            // SAFETY: constants are what they stay.
            let result = unsafe { probe::rewrite(address) };
            ensure!(result.is_err(), "{address:#x} can be written");
        }
    }
    let data = image::data().start as usize;
    // SAFETY: only this CPU runs something, and it is here.
    let result = unsafe { probe::rewrite(data) };
    ensure!(result.is_ok(), "{data:#x} cannot be written");
    Ok(())
}

fn boot_stack_is_guarded() -> Result<(), Why> {
    let stack = image::boot_stack().start as usize;
    ensure!(probe::read(stack).is_ok(), "the stack is not mapped");
    ensure!(
        probe::read(stack - 1).is_err(),
        "something lies below the stack"
    );
    Ok(())
}

/// Keeps a pattern below the stack pointer while the timer interrupts.
fn red_zone_survives() -> Result<(), Why> {
    static TICKS: AtomicU64 = AtomicU64::new(0);
    interrupts::on_timer(Some(|_| {
        TICKS.fetch_add(1, Ordering::Relaxed);
    }));
    local_apic::start_timer(TimerKind::Periodic, 20_000);
    let mut damaged = 0;
    while TICKS.load(Ordering::Relaxed) < 100 {
        let found: u64;
        // SAFETY: the 128 bytes below the stack pointer are this function's to use: it calls nothing meanwhile.
        unsafe {
            asm!(
                "mov qword ptr [rsp - 8], {pattern}",
                "mov qword ptr [rsp - 64], {pattern}",
                "mov qword ptr [rsp - 128], {pattern}",
                "mov ecx, 1000",
                "2: dec ecx",
                "jnz 2b",
                "mov {found}, qword ptr [rsp - 8]",
                "and {found}, qword ptr [rsp - 64]",
                "and {found}, qword ptr [rsp - 128]",
                pattern = in(reg) u64::MAX, found = out(reg) found, out("ecx") _);
        }
        damaged += u64::from(found != u64::MAX);
    }
    local_apic::stop_timer();
    interrupts::on_timer(None);
    ensure!(damaged == 0, "changed {damaged} times");
    Ok(())
}
