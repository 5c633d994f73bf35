//! A panel of lines, each with its name at its end.

use std::fmt::Write;

use svg::node::element::{Circle, Group, Line, Path};

use super::axis::Axis;
use super::ink::{FAINT, GRID, INK, Look, Place, label, short};

/// The area of the axes within the panel.
const LEFT: f64 = 40.0;
const RIGHT: f64 = 300.0;
const TOP: f64 = 44.0;
const BOTTOM: f64 = 272.0;
/// Between the names of two lines, at least.
const NAME_PITCH: f64 = 15.0;

/// The panel.
pub struct Lines {
    /// What changes.
    pub title: &'static str,
    /// What is measured.
    pub subtitle: &'static str,
    /// From the left to the right.
    pub x: Axis,
    /// From the bottom to the top.
    pub y: Axis,
    /// The lines.
    pub series: Vec<Series>,
}

/// One line.
pub struct Series {
    /// Its name.
    pub name: &'static str,
    look: Look,
    /// From the left to the right.
    pub points: Vec<(f64, f64)>,
}

impl Series {
    /// A line through some points.
    pub fn new(name: &'static str, look: Look, points: Vec<(f64, f64)>) -> Self {
        Self { name, look, points }
    }
}

impl Lines {
    /// The panel as SVG.
    pub fn draw(&self) -> Group {
        let max = |value: fn(&(f64, f64)) -> f64| {
            let points = self.series.iter().flat_map(|series| &series.points);
            points.map(value).fold(0.0, f64::max)
        };
        let (max_x, max_y) = (max(|point| point.0), max(|point| point.1));
        let x = |value| LEFT + self.x.place(value, max_x) * (RIGHT - LEFT);
        let y = |value| BOTTOM - self.y.place(value, max_y) * (BOTTOM - TOP);
        let mut group = Group::new()
            .add(label(self.title, 0.0, -10.0, 15, INK).set("font-weight", 600))
            .add(label(self.subtitle, 0.0, 7.0, 11, FAINT));
        for mark in self.y.marks(max_y) {
            group = group
                .add(line((LEFT, y(mark)), (RIGHT, y(mark)), GRID))
                .add(
                    label(&Axis::text(mark), LEFT - 6.0, y(mark) + 4.0, 11, FAINT)
                        .set("text-anchor", "end"),
                );
        }
        for mark in self.x.marks(max_x) {
            group = group
                .add(line((x(mark), BOTTOM), (x(mark), BOTTOM + 4.0), FAINT))
                .add(
                    label(&Axis::text(mark), x(mark), BOTTOM + 18.0, 11, FAINT)
                        .set("text-anchor", "middle"),
                );
        }
        group = group
            .add(line((LEFT, BOTTOM), (RIGHT, BOTTOM), FAINT))
            .add(
                label(self.x.name, (LEFT + RIGHT) / 2.0, BOTTOM + 36.0, 12, INK)
                    .set("text-anchor", "middle"),
            )
            .add(label(self.y.name, LEFT - 6.0, TOP - 12.0, 12, INK).set("text-anchor", "end"));
        for series in &self.series {
            let points: Vec<_> = series.points.iter().map(|&(a, b)| (x(a), y(b))).collect();
            group = draw(group, series, &points);
        }
        for (series, at) in self.series.iter().zip(self.names(&y)) {
            group = group.add(
                label(series.name, RIGHT + 9.0, at + 4.0, 12, series.look.colour)
                    .set("font-weight", weight(series.look)),
            );
        }
        group
    }

    /// Where the names stand: beside the ends of the lines, but not on each other.
    fn names(&self, y: &impl Fn(f64) -> f64) -> Vec<f64> {
        let end = |series: &Series| series.points.last().map_or(BOTTOM, |point| y(point.1));
        let mut names: Vec<f64> = self.series.iter().map(end).collect();
        let mut order: Vec<usize> = (0..names.len()).collect();
        order.sort_by(|&a, &b| names[a].total_cmp(&names[b]));
        // Those that are too close spread around their middle, and what that touches joins them.
        let mut start = 0;
        while start < order.len() {
            let mut end = start + 1;
            loop {
                let group = &order[start..end];
                let middle =
                    group.iter().map(|&name| names[name]).sum::<f64>() / group.len() as f64;
                let below = middle + NAME_PITCH * group.len() as f64 / 2.0;
                match order.get(end) {
                    Some(&next) if names[next] - NAME_PITCH / 2.0 < below => end += 1,
                    _ => {
                        let top = below - NAME_PITCH * (group.len() as f64 - 0.5);
                        for (row, &name) in group.iter().enumerate() {
                            names[name] = top + row as f64 * NAME_PITCH;
                        }
                        break;
                    }
                }
            }
            start = end;
        }
        names
    }
}

fn draw(mut group: Group, series: &Series, points: &[(f64, f64)]) -> Group {
    let mut path = String::new();
    for (index, (x, y)) in points.iter().enumerate() {
        let command = if index == 0 { 'M' } else { 'L' };
        // Writing to a string does not fail.
        let _ = write!(path, "{command}{} {}", short(*x), short(*y));
    }
    let colour = series.look.colour;
    let mut path = Path::new()
        .set("d", path)
        .set("fill", "none")
        .set("stroke", colour)
        .set("stroke-linejoin", "round");
    path = match series.look.place {
        Place::Here => path.set("stroke-width", 2.5),
        Place::Elsewhere => path.set("stroke-width", 1.5).set("stroke-dasharray", "5 4"),
    };
    group = group.add(path);
    for (x, y) in points {
        let dot = Circle::new()
            .set("cx", short(*x))
            .set("cy", short(*y))
            .set("r", 3.5);
        group = group.add(match series.look.place {
            Place::Here => dot.set("fill", colour),
            Place::Elsewhere => dot
                .set("fill", "#ffffff")
                .set("stroke", colour)
                .set("stroke-width", 1.5),
        });
    }
    group
}

fn weight(look: Look) -> u32 {
    match look.place {
        Place::Here => 600,
        Place::Elsewhere => 400,
    }
}

fn line(from: (f64, f64), to: (f64, f64), colour: &str) -> Line {
    Line::new()
        .set("x1", short(from.0))
        .set("y1", short(from.1))
        .set("x2", short(to.0))
        .set("y2", short(to.1))
        .set("stroke", colour)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_do_not_stand_on_each_other() {
        let ends = [100.0, 101.0, 30.0, 112.0, 200.0];
        let look = Look::here("#000000");
        let lines = Lines {
            title: "",
            subtitle: "",
            x: Axis::linear(""),
            y: Axis::linear(""),
            series: ends
                .map(|end| Series::new("", look, vec![(0.0, end)]))
                .into(),
        };
        let names = lines.names(&|value| value);
        assert_eq!((names[2], names[4]), (30.0, 200.0));
        let mut sorted = names.clone();
        sorted.sort_by(f64::total_cmp);
        assert!(
            sorted
                .windows(2)
                .all(|pair| pair[1] - pair[0] >= NAME_PITCH - 1e-9),
            "{names:?}"
        );
        assert!(
            names[0] < names[1] && names[1] < names[3],
            "the order stays"
        );
    }
}
