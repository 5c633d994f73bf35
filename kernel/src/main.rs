//! A small kernel that uses `pcpu`, and its tests.
//!
//! It shows what a kernel has to do to have per-CPU variables, and proves that they work there: it boots on QEMU, finds
//! CPUs, memory and nodes, sets `pcpu` up before there is any heap ([`percpu`]), starts all CPUs, runs its tests and exits.
//!
//! | part | job |
//! |---|---|
//! | [`boot`] | from QEMU's entry to Rust |
//! | [`machine`] | CPUs, memory, nodes and distances, from ACPI |
//! | [`memory`] | frames, page tables, stacks |
//! | [`percpu`] | the per-CPU variables: the part to copy |
//! | [`interrupts`] | descriptor tables, the entry of all vectors, exceptions |
//! | [`cpus`] | local APICs, starting the CPUs, work for all of them |
//! | [`modules`] | loadable modules with per-CPU variables of their own |
//! | [`user`] | ring 3 and the way back |
//! | [`tests`], [`probe`], [`bench`] | what is shown and counted |

#![no_std]
#![no_main]

mod bench;
mod boot;
mod cpus;
mod exit;
mod interrupts;
mod machine;
mod mem_functions;
mod memory;
mod modules;
mod percpu;
mod probe;
mod serial;
mod tests;
mod user;

use boot::start_info::StartInfo;
use cpus::{bring_up, local_apic};
use memory::{frames, paging};

/// Called by the boot code, on the boot stack.
extern "C" fn kernel_main(start_info: u32) -> ! {
    serial::init();
    interrupts::tables::init_boot();
    // SAFETY: the boot code passes on what QEMU gave; the boot tables map the first 4 GiB.
    let info = unsafe { StartInfo::read(start_info as usize) };
    let machine = machine::discover(info);
    frames::init(machine);
    paging::init(machine);
    println!(
        "{} possible CPUs, {} nodes, {} MiB free",
        machine.cpus().len(),
        machine.nr_nodes(),
        frames::free_count() >> 8
    );

    percpu::set_up(machine);
    local_apic::map();
    bring_up::init_boot_cpu(machine);
    percpu::free_template();
    user::map(machine);
    bring_up::start(machine, bring_up::at_boot(machine));
    println!("{} CPUs online", cpus::work::nr_online());
    println!("{} frames for per-CPU memory", percpu::frames_held());

    if let Some(name) = machine.start_info.option("die") {
        tests::death::die_of(name);
    }
    if machine.start_info.option("bench").is_some() {
        bring_up::start(machine, bring_up::latecomer(machine).into_iter());
        bench::run();
        exit::exit(exit::Outcome::Passed);
    }
    exit::exit(tests::run_all())
}
