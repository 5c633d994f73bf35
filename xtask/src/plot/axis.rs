//! An axis: its name, its marks, and where a value lies on it.

use super::ink::number;

/// An axis.
#[derive(Debug, Clone)]
pub struct Axis {
    /// What it is about.
    pub name: &'static str,
    scale: Scale,
}

#[derive(Debug, Clone)]
enum Scale {
    /// From 0 on; the marks follow from the largest value.
    Linear,
    /// Marks at these values, of which the first and the last are the ends.
    Log(Vec<f64>),
}

impl Axis {
    /// From 0 to a little more than the largest value.
    pub fn linear(name: &'static str) -> Self {
        Self {
            name,
            scale: Scale::Linear,
        }
    }

    /// Logarithmic, from the first of these marks to the last.
    pub fn log(name: &'static str, marks: &[f64]) -> Self {
        Self {
            name,
            scale: Scale::Log(marks.to_vec()),
        }
    }

    /// The marks of an axis that is to hold values up to `max`.
    pub fn marks(&self, max: f64) -> Vec<f64> {
        match &self.scale {
            Scale::Log(marks) => marks.clone(),
            Scale::Linear => {
                let step = step(max);
                let steps = (max / step).ceil().max(1.0) as u32;
                (0..=steps).map(|mark| f64::from(mark) * step).collect()
            }
        }
    }

    /// What is written at a mark.
    pub fn text(mark: f64) -> String {
        number(mark)
    }

    /// Where a value lies on an axis that is to hold values up to `max`: 0 is its start, 1 its end.
    pub fn place(&self, value: f64, max: f64) -> f64 {
        let marks = self.marks(max);
        let (first, last) = (marks[0], marks[marks.len() - 1]);
        match self.scale {
            Scale::Linear => (value - first) / (last - first),
            Scale::Log(_) => (value / first).ln() / (last / first).ln(),
        }
    }
}

/// 1, 2 or 5 times a power of ten, so that there are up to 6 steps.
fn step(max: f64) -> f64 {
    let least = max / 6.0;
    let power = 10_f64.powf(least.log10().floor());
    let steps = [1.0, 2.0, 5.0, 10.0].map(|step| step * power);
    *steps.iter().find(|&&step| step >= least).unwrap_or(&least)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_linear_axis_holds_its_values() {
        let axis = Axis::linear("ns");
        assert_eq!(
            axis.marks(527.0),
            [0.0, 100.0, 200.0, 300.0, 400.0, 500.0, 600.0]
        );
        assert_eq!(axis.marks(2.0), [0.0, 0.5, 1.0, 1.5, 2.0]);
        assert_eq!(axis.place(300.0, 527.0), 0.5);
    }

    #[test]
    fn a_log_axis_has_equal_ratios() {
        let axis = Axis::log("CPUs", &[2.0, 4.0, 16.0, 256.0]);
        let at = |value| (axis.place(value, 0.0) * 7.0).round();
        assert_eq!(
            [at(2.0), at(4.0), at(16.0), at(256.0)],
            [0.0, 1.0, 3.0, 7.0]
        );
    }
}
