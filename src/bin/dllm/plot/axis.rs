//! Axes of the plot: their ranges, and ticks at round values.

use super::Point;

/// Range and scale of an axis.
#[derive(Debug)]
pub struct Axis {
    low: f64,
    high: f64,
    /// Set for a logarithmic scale.
    pub log: bool,
}

impl Axis {
    /// Returns the axis of tokens per second; logarithmic if the speeds differ by more than a factor of 4.
    pub fn for_speeds(points: &[Point]) -> Axis {
        let speeds = || points.iter().map(|p| p.tokens_per_second);
        let (low, high) = (speeds().fold(f64::INFINITY, f64::min), speeds().fold(0.0, f64::max));
        if low > 0.0 && high > 4.0 * low {
            let margin = (high / low).powf(0.06);
            return Axis { low: low / margin, high: high * margin, log: true };
        }
        let margin = (0.06 * (high - low)).max(0.05 * high).max(1e-9);
        Axis { low: (low - margin).max(0.0), high: high + margin, log: false }
    }

    /// Returns the axis of accuracy, which includes all intervals.
    pub fn for_percents(points: &[Point]) -> Axis {
        let low = points.iter().map(|p| p.interval().0).fold(100.0, f64::min);
        let high = points.iter().map(|p| p.interval().1).fold(0.0, f64::max);
        let margin = 0.05 * (high - low);
        Axis { low: (low - margin).max(0.0), high: (high + margin).min(100.0), log: false }
    }

    /// Returns the position of a value, from 0 at the low end to 1 at the high one.
    pub fn position(&self, value: f64) -> f64 {
        let scale = |v: f64| if self.log { v.log10() } else { v };
        (scale(value) - scale(self.low)) / (scale(self.high) - scale(self.low))
    }

    /// Returns round values from end to end, with their labels.
    pub fn ticks(&self) -> Vec<(f64, String)> {
        let decimals = |exponent: i32| usize::try_from(-exponent).unwrap_or(0);
        if self.log {
            let exponents = || self.low.log10().floor() as i32..=self.high.log10().ceil() as i32;
            let ticks = |digits: &[f64]| -> Vec<(f64, String)> {
                let all = exponents().flat_map(|e| digits.iter().map(move |d| (e, d * 10f64.powi(e))));
                let inside = all.filter(|(_, value)| (self.low..=self.high).contains(value));
                inside.map(|(e, value)| (value, format!("{value:.0$}", decimals(e)))).collect()
            };
            let fine = ticks(&[1.0, 2.0, 5.0]);
            return if fine.len() > 10 { ticks(&[1.0]) } else { fine };
        }
        let about = (self.high - self.low) / 5.0;
        let exponent = about.log10().floor() as i32;
        let power = 10f64.powi(exponent);
        let (digit, exponent) = match about / power {
            ..=1.0 => (1.0, exponent),
            ..=2.0 => (2.0, exponent),
            ..=5.0 => (5.0, exponent),
            _ => (10.0, exponent + 1),
        };
        let step = digit * power;
        let (first, last) = ((self.low / step - 1e-9).ceil() as i64, (self.high / step + 1e-9).floor() as i64);
        (first..=last).map(|i| (i as f64 * step, format!("{:.1$}", i as f64 * step, decimals(exponent)))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ticks(low: f64, high: f64, log: bool) -> String {
        let ticks = Axis { low, high, log }.ticks();
        ticks.into_iter().map(|(_, tick)| tick).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn ticks_are_round() {
        assert_eq!(ticks(0.0, 100.0, false), "0 20 40 60 80 100");
        assert_eq!(ticks(61.3, 98.9, false), "70 80 90");
        assert_eq!(ticks(94.2, 96.8, false), "95 96");
        assert_eq!(ticks(99.61, 100.0, false), "99.7 99.8 99.9 100.0");
        assert_eq!(ticks(95.0, 105.0, false), "96 98 100 102 104");
        assert_eq!(ticks(70.0, 1300.0, true), "100 200 500 1000");
        assert_eq!(ticks(0.015, 0.3, true), "0.02 0.05 0.1 0.2");
        assert_eq!(ticks(0.5, 20000.0, true), "1 10 100 1000 10000");
    }
}
