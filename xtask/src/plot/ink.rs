//! How things look: colours, text, numbers.

use svg::node::element::Text;

/// The fonts, of which a browser has one.
pub const FONT: &str = "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif";
/// For what is to be read.
pub const INK: &str = "#1f2933";
/// For what may be read.
pub const FAINT: &str = "#66727f";
/// For the lines of a grid.
pub const GRID: &str = "#e4e8ec";

/// How a series looks.
#[derive(Debug, Clone, Copy)]
pub struct Look {
    /// Its colour.
    pub colour: &'static str,
    /// Where it was measured.
    pub place: Place,
}

/// Where something was measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// On the machine that the plot is about: solid.
    Here,
    /// On another: hollow and dashed.
    Elsewhere,
}

impl Look {
    /// Measured here.
    pub const fn here(colour: &'static str) -> Self {
        Self {
            colour,
            place: Place::Here,
        }
    }

    /// Measured elsewhere.
    pub const fn elsewhere(colour: &'static str) -> Self {
        Self {
            colour,
            place: Place::Elsewhere,
        }
    }
}

/// A line of text.
pub fn label(text: &str, x: f64, y: f64, size: u32, colour: &str) -> Text {
    Text::new(text)
        .set("x", short(x))
        .set("y", short(y))
        .set("font-size", size)
        .set("fill", colour)
}

/// A coordinate to a tenth.
pub fn short(value: f64) -> f64 {
    (value * 10.0).round() / 10.0
}

/// A number of an axis: 1,000,000 is 1M.
pub fn number(value: f64) -> String {
    match value {
        1e6.. => format!("{}M", value / 1e6),
        1e4.. => format!("{}k", value / 1e3),
        1e3.. => format!("{},{:03}", (value / 1e3) as u32, value as u32 % 1000),
        _ => format!("{value}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short() {
        let cases = [
            (0.0, "0"),
            (0.5, "0.5"),
            (256.0, "256"),
            (1000.0, "1,000"),
            (5050.0, "5,050"),
            (1e5, "100k"),
            (1e6, "1M"),
        ];
        for (value, text) in cases {
            assert_eq!(number(value), text);
        }
    }
}
