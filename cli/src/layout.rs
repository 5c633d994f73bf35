//! `pcpu layout`: the first chunk that given sizes and CPUs make, as Linux prints it at boot.
//!
//! All values are taken as text and read here, so that nonsense of every sort ends in one line that names the
//! value and the limit.

use clap::Args;
use pcpu::unit::{
    CpuId, FirstChunkKind, FirstChunkSpec, MAX_CPUS, NodeMap, UnitPlan, storage_words,
};

use crate::error::CliError;
use crate::output::print;

/// Print the layout of the first chunk as Linux 6.1 does at boot
///
/// Sizes are in bytes and take the suffixes K and M. A CPU list is like 0-3,8. --static, --reserved, --dyn, --atom and
/// at least one --node must be given.
#[derive(Args, Debug)]
pub struct LayoutArgs {
    /// Size of the static per-CPU variables
    #[arg(long = "static", value_name = "N", allow_hyphen_values = true)]
    static_size: Option<String>,
    /// Size of the room for the static variables of modules
    #[arg(long, value_name = "N", allow_hyphen_values = true)]
    reserved: Option<String>,
    /// Dynamic size that is requested, before rounding; at least 12K are used
    #[arg(long = "dyn", value_name = "N", allow_hyphen_values = true)]
    dyn_size: Option<String>,
    /// Areas of units are multiples of it (2M on x86-64)
    #[arg(long, value_name = "N", allow_hyphen_values = true)]
    atom: Option<String>,
    /// Page size, 4K to 64K
    #[arg(
        long,
        value_name = "N",
        default_value = "4096",
        allow_hyphen_values = true
    )]
    page_size: String,
    /// No unit is smaller
    #[arg(
        long,
        value_name = "N",
        default_value = "32768",
        allow_hyphen_values = true
    )]
    min_unit: String,
    /// Builder of the first chunk: embed, or page as with percpu_alloc=page
    ///
    /// With page, as in Linux, the dynamic size that is requested is 12K and atoms are single pages, whatever --dyn and
    /// --atom say; both must be given all the same.
    #[arg(
        long,
        value_name = "embed|page",
        default_value = "embed",
        allow_hyphen_values = true
    )]
    first_chunk: String,
    /// CPUs that are local to each other; once for every group
    #[arg(long = "node", value_name = "CPULIST", allow_hyphen_values = true)]
    nodes: Vec<String>,
}

/// Prints the layout.
///
/// # Errors
/// One line, if the arguments make no layout or it can't be written.
pub fn run(args: &LayoutArgs) -> Result<(), CliError> {
    let lines = layout(args)?;
    print(&format!("{lines}\n"))
}

/// The lines of the layout that the arguments make.
///
/// # Errors
/// One line that names the value at fault and its limit.
pub fn layout(args: &LayoutArgs) -> Result<String, String> {
    let spec = FirstChunkSpec {
        static_bytes: parse_required("--static", args.static_size.as_deref())?,
        reserved_bytes: parse_required("--reserved", args.reserved.as_deref())?,
        dyn_bytes: parse_required("--dyn", args.dyn_size.as_deref())?,
        atom_bytes: parse_required("--atom", args.atom.as_deref())?,
        page_bytes: parse_size("--page-size", &args.page_size)?,
        min_unit_bytes: parse_size("--min-unit", &args.min_unit)?,
    };
    let kind = parse_kind(&args.first_chunk)?;
    if args.nodes.is_empty() {
        return Err("0 CPUs are possible: give at least one --node CPULIST".into());
    }
    let groups = args
        .nodes
        .iter()
        .map(|list| parse_cpulist("--node", list))
        .collect::<Result<Vec<_>, _>>()?;
    let mut nodes = vec![None; MAX_CPUS as usize];
    let topology =
        NodeMap::from_groups(&groups, &mut nodes).map_err(|error| format!("--node: {error}"))?;
    let mut words = vec![0; storage_words(MAX_CPUS)];
    let plan = match kind {
        FirstChunkKind::Embed => UnitPlan::embed(&spec, &topology, &mut words),
        FirstChunkKind::Page => UnitPlan::page(&spec, &topology, &mut words),
    };
    Ok(plan
        .map_err(|error| error.to_string())?
        .boot_log()
        .to_string())
}

fn parse_kind(text: &str) -> Result<FirstChunkKind, String> {
    match text {
        "embed" => Ok(FirstChunkKind::Embed),
        "page" => Ok(FirstChunkKind::Page),
        _ => Err(format!(
            "--first-chunk '{}': it is embed or page",
            text.escape_debug()
        )),
    }
}

fn parse_required(option: &str, text: Option<&str>) -> Result<usize, String> {
    parse_size(
        option,
        text.ok_or_else(|| format!("{option} N is missing"))?,
    )
}

/// A number of bytes, with the suffix K or M.
fn parse_size(option: &str, text: &str) -> Result<usize, String> {
    let (digits, shift) = match text.strip_suffix(['K', 'k']) {
        Some(digits) => (digits, 10),
        None => text
            .strip_suffix(['M', 'm'])
            .map_or((text, 0), |digits| (digits, 20)),
    };
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(format!(
            "{option} '{}': a size is a number of bytes, with K or M behind it if need be",
            text.escape_debug()
        ));
    }
    digits
        .parse::<usize>()
        .ok()
        .and_then(|number| number.checked_mul(1 << shift))
        .ok_or_else(|| {
            format!(
                "{option} {text}: too large, the limit is {} bytes",
                usize::MAX
            )
        })
}

/// A list of CPUs and ranges of CPUs, as in `0-3,8`.
fn parse_cpulist(option: &str, text: &str) -> Result<Vec<CpuId>, String> {
    let fail = |what: &str| Err(format!("{option} '{}': {what}", text.escape_debug()));
    if text.is_empty() {
        return fail("the list has 0 CPUs, at least 1 is needed");
    }
    let mut cpus = Vec::new();
    for item in text.split(',') {
        let (first, last) = item.split_once('-').unwrap_or((item, item));
        if [first, last]
            .iter()
            .any(|id| id.is_empty() || !id.bytes().all(|byte| byte.is_ascii_digit()))
        {
            return fail(&format!(
                "'{}' is no CPU and no range of CPUs, a list is like 0-3,8",
                item.escape_debug()
            ));
        }
        // Checked before a range is expanded; what no integer holds is too high in any case.
        let highest = MAX_CPUS - 1;
        let parse = |id: &str| {
            id.parse::<u32>()
                .ok()
                .filter(|&id| id <= highest)
                .ok_or_else(|| id.to_owned())
        };
        let (first, last) = match (parse(first), parse(last)) {
            (Ok(first), Ok(last)) => (first, last),
            (Err(id), _) | (_, Err(id)) => {
                return fail(&format!(
                    "CPU {id} is too high, the highest CPU id is {highest}"
                ));
            }
        };
        if first > last {
            return fail(&format!(
                "the range {first}-{last} is reversed, its end is at least {first}"
            ));
        }
        // A list that repeats itself is refused before it grows.
        if cpus.len() + (last - first) as usize >= MAX_CPUS as usize {
            return fail(&format!("the list has more than {MAX_CPUS} CPUs"));
        }
        cpus.extend((first..=last).map(CpuId::new));
    }
    Ok(cpus)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Program {
        #[command(flatten)]
        layout: LayoutArgs,
    }

    /// The output for a command line.
    fn print(line: &str) -> Result<String, String> {
        let words =
            std::iter::once("pcpu").chain(line.split(' ').map(|word| word.trim_matches('\'')));
        layout(
            &Program::try_parse_from(words)
                .map_err(|error| error.to_string())?
                .layout,
        )
    }

    const SIZES: &str = "--static 208K --reserved 8K --dyn 28K --atom 2M";

    #[test]
    fn prints_what_linux_prints() {
        assert_eq!(
            print(&format!("{SIZES} --node 3-7 --node 0-2")).unwrap(),
            "percpu: Embedded 61 pages/cpu s212992 r8192 d28672 u1048576\n\
             pcpu-alloc: s212992 r8192 d28672 u1048576 alloc=1*2097152\n\
             pcpu-alloc: [0] 0 1 [0] 2 - [1] 3 4 [1] 5 6\n\
             pcpu-alloc: [1] 7 -"
        );
        assert_eq!(
            print(&format!("{SIZES} --first-chunk page --node 0,2 --node 1,3")).unwrap(),
            "percpu: 57 4K pages/cpu s212992 r8192 d12288\n\
             pcpu-alloc: s212992 r8192 d12288 u233472 alloc=57*4096\n\
             pcpu-alloc: [0] 0 [0] 1 [0] 2 [0] 3"
        );
    }

    #[test]
    fn one_line_names_value_and_limit() {
        let cases = [
            (
                "--node 0-3 --node 2",
                "CPU 2 is listed twice, the limit is once",
            ),
            ("--node 0,0", "CPU 0 is listed twice"),
            (
                "--node 9000",
                "CPU 9000 is too high, the highest CPU id is 8191",
            ),
            (
                "--node 0-4294967296",
                "CPU 4294967296 is too high, the highest CPU id is 8191",
            ),
            ("--node 0-8191,0-8191", "more than 8192 CPUs"),
            ("--node ''", "0 CPUs"),
            ("--node 0 --node ''", "0 CPUs"),
            (
                "--node 3-1",
                "the range 3-1 is reversed, its end is at least 3",
            ),
            ("--node 0,", "'' is no CPU"),
            ("--node -1", "'-1' is no CPU"),
            ("--node 1-2-3", "'1-2-3' is no CPU"),
            ("--node +1", "'+1' is no CPU"),
            (
                "--node 0 --page-size 3000",
                "page size 3000 is not a power of two from 4096 to 65536",
            ),
            (
                "--node 0 --page-size 128K",
                "page size 131072 is not a power of two from 4096 to 65536",
            ),
            ("--node 0 --page-size 0", "page size 0"),
            (
                "--node 0 --page-size 64K --min-unit 4K",
                "unit size 4096 is too small, at least 32768",
            ),
            (
                "--node 0 --min-unit 0",
                "unit size 0 is too small, at least 32768 bytes",
            ),
            (
                "--node 0 --first-chunk pages",
                "'pages': it is embed or page",
            ),
        ];
        for (line, want) in cases {
            let error = print(&format!("{SIZES} {line}")).expect_err(line);
            assert!(
                error.contains(want) && !error.contains('\n'),
                "{line}: {error}"
            );
        }
        let cases = [
            (
                "--static 0 --reserved 0 --dyn 99999999999999999999 --atom 4K",
                "--dyn 99999999999999999999",
            ),
            (
                "--static 0 --reserved 0 --dyn 18446744073709551615K --atom 4K",
                "limit is 18446744073709551615",
            ),
            (
                "--static 0 --reserved 0 --dyn 18446744073709551615 --atom 4K",
                "limit is 9223372036854775807",
            ),
            (
                "--static -1 --reserved 0 --dyn 0 --atom 4K",
                "--static '-1'",
            ),
            (
                "--static 1G --reserved 0 --dyn 0 --atom 4K",
                "--static '1G'",
            ),
            ("--static K --reserved 0 --dyn 0 --atom 4K", "--static 'K'"),
            ("--static '' --reserved 0 --dyn 0 --atom 4K", "--static ''"),
            (
                "--static 0 --reserved 6 --dyn 0 --atom 4K",
                "reserved size 6 is not a multiple of 4",
            ),
            (
                "--static 0 --reserved 0 --dyn 0 --atom 0",
                "atom size 0 is not a positive multiple",
            ),
            (
                "--static 0 --reserved 0 --dyn 0 --atom 5000",
                "atom size 5000 is not a positive multiple",
            ),
            ("--static 0 --reserved 0 --dyn 0", "--atom N is missing"),
        ];
        for (line, want) in cases {
            let error = print(&format!("{line} --node 0")).expect_err(line);
            assert!(
                error.contains(want) && !error.contains('\n'),
                "{line}: {error}"
            );
        }
        assert!(print(SIZES).unwrap_err().contains("0 CPUs"));
    }

    #[test]
    fn a_missing_size_is_named() {
        let sizes = ["--static 1K", "--reserved 0", "--dyn 0", "--atom 4K"];
        for missing in 0..sizes.len() {
            let others = sizes
                .iter()
                .enumerate()
                .filter(|(index, _)| *index != missing);
            let line = others
                .map(|(_, text)| *text)
                .chain(["--node 0"])
                .collect::<Vec<_>>()
                .join(" ");
            let option = sizes[missing].split(' ').next().unwrap();
            assert_eq!(print(&line).unwrap_err(), format!("{option} N is missing"));
        }
    }
}
