//! A panel of bars, each with its name before it and its value after it.

use svg::node::element::{Group, Line, Rectangle};

use super::ink::{FAINT, INK, Look, Place, label, short};

/// The area of the bars within the panel.
const LEFT: f64 = 66.0;
const RIGHT: f64 = 330.0;
const TOP: f64 = 44.0;
const BOTTOM: f64 = 272.0;
const BAR_HEIGHT: f64 = 26.0;
/// What the whole width stands for.
const MAX: f64 = 2.2;

/// The panel.
pub struct Bars {
    /// What changes.
    pub title: &'static str,
    /// What is measured.
    pub subtitle: &'static str,
    /// In what.
    pub unit: &'static str,
    /// The bars, from the top.
    pub bars: Vec<Bar>,
    /// Values to compare with.
    pub marks: [(f64, &'static str); 2],
}

/// One bar. What was measured several times reaches from the least to the most.
pub struct Bar {
    name: &'static str,
    what: &'static str,
    look: Look,
    least: f64,
    most: f64,
}

impl Bar {
    /// A bar for one name, with what was done.
    pub fn new(name: &'static str, what: &'static str, look: Look, least: f64, most: f64) -> Self {
        Self {
            name,
            what,
            look,
            least,
            most,
        }
    }

    fn value(&self) -> String {
        match self.least == self.most {
            true => format!("{:.2}", self.most),
            false => format!("{:.2} to {:.2}", self.least, self.most),
        }
    }
}

impl Bars {
    /// The panel as SVG.
    pub fn draw(&self) -> Group {
        let x = |value: f64| LEFT + value.min(MAX) / MAX * (RIGHT - LEFT);
        let mut group = Group::new()
            .add(label(self.title, 0.0, -10.0, 15, INK).set("font-weight", 600))
            .add(label(self.subtitle, 0.0, 7.0, 11, FAINT));
        for (value, name) in self.marks {
            group = group
                .add(
                    Line::new()
                        .set("x1", short(x(value)))
                        .set("y1", TOP)
                        .set("x2", short(x(value)))
                        .set("y2", BOTTOM)
                        .set("stroke", FAINT)
                        .set("stroke-dasharray", "2 3"),
                )
                .add(label(name, x(value), TOP - 8.0, 11, FAINT).set("text-anchor", "middle"))
                .add(
                    label(&value.to_string(), x(value), BOTTOM + 18.0, 11, FAINT)
                        .set("text-anchor", "middle"),
                );
        }
        group = group
            .add(
                Line::new()
                    .set("x1", LEFT)
                    .set("y1", TOP)
                    .set("x2", LEFT)
                    .set("y2", BOTTOM)
                    .set("stroke", FAINT),
            )
            .add(label("0", LEFT, BOTTOM + 18.0, 11, FAINT).set("text-anchor", "middle"))
            .add(
                label(self.unit, (LEFT + RIGHT) / 2.0, BOTTOM + 36.0, 12, INK)
                    .set("text-anchor", "middle"),
            );
        let pitch = (BOTTOM - TOP) / self.bars.len().max(1) as f64;
        for (row, bar) in self.bars.iter().enumerate() {
            let middle = TOP + (row as f64 + 0.5) * pitch;
            group = bar.draw(group, middle, &x);
        }
        group
    }
}

impl Bar {
    fn draw(&self, group: Group, middle: f64, x: &impl Fn(f64) -> f64) -> Group {
        let colour = self.look.colour;
        let body = |from: f64, to: f64| {
            Rectangle::new()
                .set("x", short(x(from)))
                .set("y", short(middle - BAR_HEIGHT / 2.0))
                .set("width", short(x(to) - x(from)))
                .set("height", BAR_HEIGHT)
        };
        let group = match self.look.place {
            Place::Here => group.add(body(0.0, self.most).set("fill", colour)),
            Place::Elsewhere => group
                .add(
                    body(0.0, self.least)
                        .set("fill", colour)
                        .set("fill-opacity", 0.12),
                )
                .add(
                    body(self.least, self.most)
                        .set("fill", colour)
                        .set("fill-opacity", 0.35),
                )
                .add(
                    body(0.0, self.most)
                        .set("fill", "none")
                        .set("stroke", colour)
                        .set("stroke-width", 1.5)
                        .set("stroke-dasharray", "5 4"),
                ),
        };
        let weight = match self.look.place {
            Place::Here => 600,
            Place::Elsewhere => 400,
        };
        let value = || label(&self.value(), x(self.most) + 7.0, middle + 4.0, 12, INK);
        // A white edge below it, for it may lie over the line of a mark.
        let edge = value().set("stroke", "#ffffff").set("stroke-width", 4);
        group
            .add(
                label(self.name, LEFT - 8.0, middle, 12, colour)
                    .set("text-anchor", "end")
                    .set("font-weight", weight),
            )
            .add(label(self.what, LEFT - 8.0, middle + 13.0, 10, FAINT).set("text-anchor", "end"))
            .add(edge)
            .add(value())
    }
}
