//! Layouts of the first chunk: from arguments, and from numbers.

use clap::Parser;
use pcpu::unit::{EvenNodes, FirstChunkSpec, MAX_CPUS, UnitPlan, storage_words};
use pcpu_cli::error::CliError;
use pcpu_cli::layout::{LayoutArgs, layout};

use crate::input::Input;

#[derive(Parser)]
struct Program {
    #[command(flatten)]
    args: LayoutArgs,
}

/// Takes the bytes for the arguments of `pcpu layout`, parted by blanks.
pub fn layout_arguments(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let words = ["layout"].into_iter().chain(text.split(' '));
    let error = match Program::try_parse_from(words) {
        Ok(program) => match layout(&program.args) {
            Ok(lines) => {
                assert!(lines.contains("pcpu-alloc:"), "{lines}");
                return;
            }
            Err(error) => CliError::from(error),
        },
        // Help is no error.
        Err(error) if !error.use_stderr() => return,
        Err(error) => CliError::from(error),
    };
    assert!(!error.to_string().contains('\n'), "{error}");
}

/// Takes the bytes for the sizes of a first chunk and the shape of a machine.
pub fn unit_plan(data: &[u8]) {
    let mut input = Input(data);
    let spec = FirstChunkSpec {
        static_bytes: input.size(),
        reserved_bytes: input.size(),
        dyn_bytes: input.size(),
        atom_bytes: input.size(),
        page_bytes: input.size(),
        min_unit_bytes: input.size(),
    };
    let unit_bytes = input.size();
    let cpus = input.size() as u32;
    let nodes = input.size() as u32;
    let topology = match EvenNodes::new(cpus, nodes) {
        Ok(topology) => topology,
        Err(error) => return assert!(!error.to_string().contains('\n')),
    };
    assert!(cpus <= MAX_CPUS);
    let words = storage_words(cpus) / (1 + input.below(2));
    let mut words = vec![0; words];
    let plan = match input.byte() % 3 {
        0 => UnitPlan::embed(&spec, &topology, &mut words),
        1 => UnitPlan::page(&spec, &topology, &mut words),
        _ => UnitPlan::exact(&spec, unit_bytes, &topology, &mut words),
    };
    match plan {
        Ok(plan) => {
            let sizes = plan.sizes();
            let regions = sizes.regions();
            assert!(regions.static_vars.end <= regions.reserved.start);
            assert!(regions.reserved.end <= regions.dynamic.start);
            assert!(regions.dynamic.end <= regions.tail.start);
            assert!(regions.tail.end <= sizes.unit_bytes());
            assert!(sizes.unit_bytes().is_multiple_of(sizes.page_bytes()));
            assert!(plan.boot_log().to_string().contains("pcpu-alloc:"));
        }
        Err(error) => assert!(!error.to_string().contains('\n')),
    }
}
