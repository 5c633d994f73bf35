//! The steps of `cargo xtask test`, cheap ones first, and how they are run.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use crate::command::{Failure, Program, cargo, check, check_tests};
use crate::tally::Tally;
use crate::{api, docs, freestanding, kernel, layout, replay, soak};

/// One step: a name to pick it by, what it shows, and how.
struct Step {
    name: &'static str,
    shows: &'static str,
    run: fn() -> Result<Tally, Failure>,
}

const STEPS: &[Step] = &[
    Step {
        name: "format",
        shows: "all code is formatted",
        run: || {
            check(&mut cargo(
                "fmt --all --check -- xtask/freestanding/main.rs kernel/modules/by_hand.rs \
                 kernel/modules/counter.rs kernel/modules/far.rs kernel/modules/large.rs \
                 kernel/modules/long_data.rs kernel/modules/long_variables.rs kernel/modules/reader.rs \
                 fuzz/fuzz_targets/arguments.rs fuzz/fuzz_targets/audited.rs fuzz/fuzz_targets/object.rs fuzz/fuzz_targets/operations.rs \
                 fuzz/fuzz_targets/plan.rs fuzz/fuzz_targets/trace.rs",
            ))
        },
    },
    Step {
        name: "clippy",
        shows: "no warning anywhere",
        run: || {
            check(&mut cargo(
                "clippy --workspace --all-targets --features pcpu/paging -- -D warnings",
            ))
        },
    },
    Step {
        name: "clippy-no-std",
        shows: "no warning in the library without std",
        run: || {
            check(&mut cargo(
                "clippy --package pcpu --no-default-features -- -D warnings",
            ))
        },
    },
    Step {
        name: "clippy-paging",
        shows: "no warning in the library with page tables, without std",
        run: || {
            check(&mut cargo(
                "clippy --package pcpu --no-default-features --features paging -- -D warnings",
            ))
        },
    },
    Step {
        name: "clippy-kernel",
        shows: "no warning in the kernel",
        run: || {
            check(&mut cargo(
                "clippy --package pcpu-kernel --features boot -- -D warnings",
            ))
        },
    },
    Step {
        name: "freestanding",
        shows: "a program without std, alloc and libc links the library and runs",
        run: freestanding::check,
    },
    Step {
        name: "docs",
        shows: "the documentation builds without a warning, and what documents name is there",
        run: docs::check,
    },
    Step {
        name: "api",
        shows: "the public API is the one that docs/public-api.txt lists",
        run: api::check,
    },
    Step {
        name: "compat",
        shows: "what has changed of the public API is what version and changelog say",
        run: api::check_compat,
    },
    Step {
        name: "tests",
        shows: "unit, integration, property and doc tests",
        run: || {
            check_tests(&mut cargo(
                "test --workspace --exclude pcpu-models --features pcpu/paging --no-fail-fast",
            ))
        },
    },
    Step {
        name: "tests-release",
        shows: "the library's tests hold for optimised code",
        run: || {
            check_tests(&mut cargo(
                "test --release --package pcpu --features paging --tests --no-fail-fast",
            ))
        },
    },
    Step {
        name: "models",
        shows: "what is done without the lock holds in every order of steps",
        run: || check_tests(&mut cargo("test --package pcpu-models models::")),
    },
    Step {
        name: "soak",
        shows: "a million operations on all CPUs, with signals and children",
        run: soak::check_short,
    },
    Step {
        name: "demo",
        shows: "all checks of the demo hold on this machine",
        run: || check(&mut Program::build()?.run("demo")),
    },
    Step {
        name: "layout",
        shows: "the program prints first chunks as real kernels did",
        run: layout::check,
    },
    Step {
        name: "replay",
        shows: "real traces: nothing is refused, packing is no worse than Linux's",
        run: replay::check,
    },
    Step {
        name: "kernel-code",
        shows: "an operation of the kernel on a static variable is one instruction",
        run: kernel::check_code,
    },
    Step {
        name: "kernel-bench",
        shows: "operations of the kernel take the instructions that they took",
        run: kernel::results::check,
    },
    Step {
        name: "kernel-1",
        shows: "a kernel uses the library: 1 CPU",
        run: || kernel::check_args("--cpus 1"),
    },
    Step {
        name: "kernel-4",
        shows: "4 CPUs, units of as many pages as the first chunk needs",
        run: || kernel::check_with_log("--cpus 4 --page"),
    },
    Step {
        name: "kernel-trace-4",
        shows: "4 CPUs replay a recorded trace at once",
        run: || kernel::check_trace("--cpus 4", "traces/boot8.trace.gz"),
    },
    Step {
        name: "kernel-trace-64",
        shows: "64 CPUs on 4 nodes replay the trace of 32 at once",
        run: || kernel::check_trace("--cpus 64 --nodes 4", "traces/numa32.trace.gz"),
    },
    Step {
        name: "kernel-64",
        shows: "64 CPUs on 4 nodes",
        run: || kernel::check_with_log("--cpus 64 --nodes 4"),
    },
    Step {
        name: "kernel-possible",
        shows: "238 CPUs that never come cost hardly any memory",
        run: kernel::check_possible,
    },
    Step {
        name: "kernel-icount",
        shows: "interrupts at every instruction",
        run: || kernel::check_args("--cpus 2 --icount"),
    },
    Step {
        name: "kernel-no-cache",
        shows: "interrupts at every instruction, and all else, where every request takes the lock",
        run: || kernel::check_args("--cpus 4 --icount --no-cache"),
    },
    Step {
        name: "kernel-dies",
        shows: "a kernel that faults says so and fails",
        run: kernel::check_deaths,
    },
];

/// The names of all steps.
pub fn names() -> String {
    let names: Vec<&str> = STEPS.iter().map(|step| step.name).collect();
    names.join(", ")
}

/// Whether there is a step whose name contains `filter`.
pub fn any(filter: &str) -> bool {
    chosen(filter).next().is_some()
}

/// Runs the steps whose name contains `filter`, also after one has failed, and closes with the sums.
pub fn run(filter: &str) -> ExitCode {
    let mut sum = Tally::default();
    let mut summary = Vec::new();
    for step in chosen(filter) {
        println!("\n==> {}: {}", step.name, step.shows);
        let start = Instant::now();
        let tally = (step.run)().unwrap_or_else(|failure| {
            println!("{failure}");
            Tally::FAIL
        });
        sum += tally;
        summary.push((step.name, tally, start.elapsed()));
    }
    close(&summary, sum)
}

fn chosen(filter: &str) -> impl Iterator<Item = &'static Step> {
    STEPS.iter().filter(move |step| step.name.contains(filter))
}

fn close(summary: &[(&str, Tally, Duration)], sum: Tally) -> ExitCode {
    println!("\n==> summary");
    for (name, tally, time) in summary {
        let mark = if tally.failed == 0 { "ok" } else { "FAILED" };
        println!(
            "{name:<14} {:>7.1} s  {mark:<6}  {tally}",
            time.as_secs_f64()
        );
    }
    println!("\n{sum}");
    exit_code(sum)
}

/// What a run that came to this sum exits with.
pub fn exit_code(sum: Tally) -> ExitCode {
    if sum.failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
