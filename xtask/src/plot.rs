//! `cargo xtask plot`: `docs/figures.svg`, drawn from the files in `benches/results/` and nothing else.
//!
//! Three panels: what an allocation costs with more live areas, with more CPUs, with more threads. What was measured on this
//! machine in the same run is solid; what others measured elsewhere is hollow and dashed.

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use svg::Document;
use svg::node::element::{Group, Rectangle, Title};

use crate::command::{Failure, root};
use crate::measure::{self, Figure, Yardstick};

mod axis;
mod bars;
mod ink;
mod lines;

use axis::Axis;
use bars::{Bar, Bars};
use ink::{FAINT, FONT, INK, Look, label};
use lines::{Lines, Series};

const WIDTH: f64 = 1200.0;
const HEIGHT: f64 = 452.0;
const LEFT: f64 = 24.0;
/// From the left edge of one panel to that of the next.
const PANEL_PITCH: f64 = 398.0;
const PANEL_TOP: f64 = 84.0;

const OURS: Look = Look::here("#2f6db5");
const MALLOC: Look = Look::here("#8693a0");
const BARE: Look = Look::here("#138a7e");
const LINUX: Look = Look::elsewhere("#d9622b");
const LIBRSEQ: Look = Look::elsewhere("#7b3fa0");

fn file() -> PathBuf {
    root().join("docs/figures.svg")
}

/// Draws the plot.
pub fn run() -> ExitCode {
    match draw() {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("{failure}");
            ExitCode::FAILURE
        }
    }
}

/// [`run`], as part of something else.
pub fn draw() -> Result<(), Failure> {
    fs::write(file(), plot()?)?;
    println!("{}", file().display());
    Ok(())
}

/// What all panels are made of.
struct Data {
    figures: Vec<Figure>,
    yardsticks: Vec<Yardstick>,
}

/// The plot of the files.
fn plot() -> Result<String, Failure> {
    let mut figures = measure::read_figures()?;
    // Those of the first method: restartable sequences, where there are any.
    let method = figures.first().ok_or("there are no figures")?.method;
    figures.retain(|figure| figure.method == method);
    let data = Data {
        figures,
        yardsticks: measure::read_yardsticks()?,
    };
    let machine = measure::read_machine()?;
    let what = |name: &str| {
        let found = machine.iter().find(|(what, _)| what == name);
        found.map_or("?", |(_, is)| is.as_str())
    };
    let here = format!(
        "Solid: {} with {} CPUs, Linux {}, {}; medians of one run.",
        what("cpu"),
        what("cores"),
        what("kernel"),
        what("glibc")
    );
    let panel = |number: f64, group: Group| {
        let x = LEFT + number * PANEL_PITCH;
        group.set("transform", format!("translate({x} {PANEL_TOP})"))
    };
    let document = Document::new()
        .set("viewBox", (0, 0, WIDTH, HEIGHT))
        .set("width", WIDTH)
        .set("height", HEIGHT)
        .set("font-family", FONT)
        .add(Title::new("What an allocation costs"))
        .add(Rectangle::new().set("width", "100%").set("height", "100%").set("fill", "#ffffff"))
        .add(label("What allocating and freeing costs", LEFT, 36.0, 20, INK).set("font-weight", 600))
        .add(panel(0.0, live(&data).draw()))
        .add(panel(1.0, cpus(&data).draw()))
        .add(panel(2.0, threads(&data).draw()))
        .add(label(&here, LEFT, HEIGHT - 34.0, 12, FAINT))
        .add(label(
            "Dashed, hollow: another machine (Intel Xeon, Sapphire Rapids, 2 CPUs): Linux 6.1's allocator run in user space, and \
             librseq's memory pool. Compare shapes, not heights.",
            LEFT,
            HEIGHT - 16.0,
            12,
            FAINT,
        ));
    Ok(document.to_string() + "\n")
}

/// A random one of so many live areas is replaced.
fn live(data: &Data) -> Lines {
    let is_row = |figure: &&Figure| figure.row == "churn" && !figure.zeroed;
    // This machine's own CPUs: they have the most rows.
    let rows = |cpus| {
        let figures = data.figures.iter().filter(is_row);
        figures.filter(|figure| figure.cpus == cpus).count()
    };
    let figures = data.figures.iter().filter(is_row);
    let cpus = figures
        .map(|figure| figure.cpus)
        .max_by_key(|&cpus| rows(cpus))
        .flatten();
    let of_machine = |figure: &&Figure| is_row(figure) && figure.cpus == cpus;
    let x = |figure: &Figure| figure.live.map(|live| live as f64);
    let linux = |yardstick: &&Yardstick| {
        yardstick.row == "churn"
            && !yardstick.zeroed
            && yardstick.cpus == Some(16)
            && yardstick.unit == "ns"
    };
    Lines {
        title: "by live areas",
        subtitle: "one of mixed sizes replaced, not zeroed (Linux: 16 CPUs)",
        x: Axis::log("live areas", &[100.0, 1e3, 1e4, 1e5, 1e6]),
        y: Axis::linear("ns"),
        series: vec![
            Series::new(
                "Linux",
                LINUX,
                data.yardsticks(linux, |y| y.live.map(|live| live as f64)),
            ),
            Series::new("pcpu", OURS, data.ours(of_machine, x)),
            Series::new("malloc", MALLOC, data.other(of_machine, "malloc+free", x)),
        ],
    }
}

/// A pair of 8 bytes, zeroed on so many CPUs.
fn cpus(data: &Data) -> Lines {
    let is_row = |figure: &&Figure| figure.row == "pair" && figure.zeroed && figure.size == Some(8);
    let x = |figure: &Figure| figure.cpus.map(f64::from);
    let yardstick = |who: &'static str| {
        move |yardstick: &&Yardstick| {
            yardstick.who.starts_with(who)
                && yardstick.row == "pair"
                && yardstick.zeroed
                && yardstick.unit == "ns"
        }
    };
    let cpus = |yardstick: &Yardstick| yardstick.cpus.map(f64::from);
    Lines {
        title: "by CPUs",
        subtitle: "8 bytes (librseq: 64) allocated and freed, zeroed on every CPU",
        x: Axis::log("CPUs", &[2.0, 16.0, 64.0, 256.0]),
        y: Axis::log("ns", &[1.0, 10.0, 100.0, 1e3, 1e4]),
        series: vec![
            Series::new("Linux", LINUX, data.yardsticks(yardstick("Linux"), cpus)),
            Series::new(
                "librseq",
                LIBRSEQ,
                data.yardsticks(yardstick("librseq"), cpus),
            ),
            Series::new("pcpu", OURS, data.ours(is_row, x)),
            Series::new("bare loop", BARE, data.other(is_row, "bare-loop", x)),
        ],
    }
}

/// What two threads do together by what one does.
fn threads(data: &Data) -> Bars {
    let is_row = |figure: &&&Figure| figure.row == "two-threads-by-one" && figure.size == Some(8);
    let ours = data.figures.iter().find(|figure| is_row(&figure));
    let malloc = |figure: &&Figure| {
        is_row(&figure) && figure.compared_with.as_deref() == Some("malloc+free")
    };
    let malloc = data
        .figures
        .iter()
        .find(malloc)
        .and_then(|figure| figure.value);
    let mut bars: Vec<Bar> = Vec::new();
    bars.extend(ours.map(|figure| Bar::new("pcpu", "8 B", OURS, figure.pcpu, figure.pcpu)));
    bars.extend(malloc.map(|value| Bar::new("malloc", "8 B", MALLOC, value, value)));
    for (who, name, what, look) in [
        ("Linux", "Linux", "8 B", LINUX),
        ("librseq", "librseq", "64 B", LIBRSEQ),
    ] {
        let is_whose = |yardstick: &&Yardstick| {
            yardstick.row == "two-threads-by-one" && yardstick.who.starts_with(who)
        };
        let yardstick = data.yardsticks.iter().find(is_whose);
        bars.extend(yardstick.map(|found| Bar::new(name, what, look, found.worst, found.value)));
    }
    Bars {
        title: "by threads",
        subtitle: "pairs of two threads together, by those of one; not zeroed",
        unit: "times one thread",
        bars,
        marks: [(1.0, "one thread"), (2.0, "ideal")],
    }
}

type Points = Vec<(f64, f64)>;

impl Data {
    /// Our figures of some rows.
    fn ours(
        &self,
        is_row: impl Fn(&&Figure) -> bool,
        x: impl Fn(&Figure) -> Option<f64>,
    ) -> Points {
        let figures = self.figures.iter().filter(is_row);
        sorted(figures.filter_map(|figure| Some((x(figure)?, figure.pcpu))))
    }

    /// The figures of one that they are compared with.
    fn other(
        &self,
        is_row: impl Fn(&&Figure) -> bool,
        name: &str,
        x: impl Fn(&Figure) -> Option<f64>,
    ) -> Points {
        let figures = self.figures.iter().filter(is_row);
        let figures = figures.filter(|figure| figure.compared_with.as_deref() == Some(name));
        sorted(figures.filter_map(|figure| Some((x(figure)?, figure.value?))))
    }

    /// The figures of others.
    fn yardsticks(
        &self,
        is_row: impl Fn(&&Yardstick) -> bool,
        x: impl Fn(&Yardstick) -> Option<f64>,
    ) -> Points {
        let yardsticks = self.yardsticks.iter().filter(is_row);
        sorted(yardsticks.filter_map(|yardstick| Some((x(yardstick)?, yardstick.value))))
    }
}

/// From the left to the right; a figure that stands beside several others is one point.
fn sorted(points: impl Iterator<Item = (f64, f64)>) -> Points {
    let mut points: Points = points.collect();
    points.sort_by(|a, b| a.0.total_cmp(&b.0));
    points.dedup();
    points
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_plot_is_that_of_the_figures() {
        let drawn = fs::read_to_string(file()).expect("the plot is there");
        assert!(
            drawn == plot().expect("the figures are there"),
            "docs/figures.svg is not what benches/results/ gives: cargo xtask plot"
        );
    }

    #[test]
    fn every_series_has_points() {
        let data = Data {
            figures: measure::read_figures().unwrap(),
            yardsticks: measure::read_yardsticks().unwrap(),
        };
        for panel in [live(&data), cpus(&data)] {
            for series in &panel.series {
                assert!(series.points.len() > 1, "{} {}", panel.title, series.name);
            }
        }
        assert_eq!(threads(&data).bars.len(), 4);
    }
}
