//! Figures made of figures: accuracy under parallelism, the interval of a share, medians.

/// How steeply lost accuracy is weighed down.
const ALPHA: f64 = 3.0;
/// Percentage points below the slowest setting's accuracy from which on a setting does not count.
const LOSS_MAX: f64 = 5.0;

/// Accuracy under parallelism (AUP, by the authors of d3LLM) of `points` of tokens per forward and accuracy in percent: the
/// area under their curve, where accuracy weighs less the farther it is below `best`, the highest of all curves that are
/// compared.
///
/// `ρ₁y₁ + Σ ½ (ρᵢ − ρᵢ₋₁)(yᵢW(yᵢ) + yᵢ₋₁W(yᵢ₋₁))` with `W(y) = min(exp(−3 (1 − y / best)), 1)`, over the points in the order
/// of ρ but those with `y < y₁ − 5`. `None` without a point or where nothing was right.
pub fn aup(points: &[(f64, f64)], best: f64) -> Option<f64> {
    let mut points = points.to_vec();
    points.sort_by(|a, b| a.0.total_cmp(&b.0));
    let first = *points.first()?;
    points.retain(|point| point.1 >= first.1 - LOSS_MAX);
    let weighed = |y: f64| y * (-ALPHA * (1.0 - y / best)).exp().min(1.0);
    let area = |pair: &[(f64, f64)]| 0.5 * (pair[1].0 - pair[0].0) * (weighed(pair[1].1) + weighed(pair[0].1));
    (best > 0.0).then(|| first.0 * first.1 + points.windows(2).map(area).sum::<f64>())
}

/// Where a share lies with 95 % confidence if `passed` of `tasks` passed (Wilson's score interval), 0 to 1.
pub fn interval(passed: u64, tasks: u64) -> (f64, f64) {
    const Z: f64 = 1.959964;
    let n = tasks.max(1) as f64;
    let share = passed as f64 / n;
    let middle = share + Z * Z / (2.0 * n);
    let half = Z * (share * (1.0 - share) / n + Z * Z / (4.0 * n * n)).sqrt();
    let scale = 1.0 + Z * Z / n;
    (((middle - half) / scale).max(0.0), ((middle + half) / scale).min(1.0))
}

/// Middle and ends of several measurements.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Spread {
    pub median: f64,
    pub min: f64,
    pub max: f64,
}

impl Spread {
    /// Of an even number the mean of the middle two. `None` of nothing.
    pub fn of(mut numbers: Vec<f64>) -> Option<Self> {
        numbers.sort_by(f64::total_cmp);
        let (min, max) = (*numbers.first()?, *numbers.last()?);
        let half = numbers.len() / 2;
        let median = if numbers.len() % 2 == 1 { numbers[half] } else { 0.5 * (numbers[half - 1] + numbers[half]) };
        Some(Self { median, min, max })
    }

    /// One measurement, of which no spread is known.
    pub fn one(number: f64) -> Self {
        Self { median: number, min: number, max: number }
    }

    pub fn is_one(&self) -> bool {
        self.min == self.max
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn near(a: Option<f64>, b: f64) {
        assert!(a.is_some_and(|a| (a - b).abs() < 1e-9), "{a:?} and {b}");
    }

    #[test]
    fn the_area_as_computed_by_hand() {
        near(aup(&[(1.0, 80.0)], 80.0), 80.0);
        // Accuracy that stays the best has full weight: 1·80 + 3·80.
        near(aup(&[(4.0, 80.0), (1.0, 80.0)], 80.0), 320.0);
        // 1·80 + ½·2·(76·e^(−3·0.05) + 80).
        near(aup(&[(1.0, 80.0), (3.0, 76.0)], 80.0), 80.0 + 76.0 * (-0.15_f64).exp() + 80.0);
        // The same beside a better curve: 80 weighs e^(−3·0.2), but the first rectangle counts in full.
        let weighed = |y: f64| y * (-3.0 * (1.0 - y / 100.0)).exp();
        near(aup(&[(1.0, 80.0), (3.0, 76.0)], 100.0), 80.0 + weighed(76.0) + weighed(80.0));
        // Accuracy above the best that was handed in weighs no more than fully.
        near(aup(&[(2.0, 90.0), (3.0, 90.0)], 80.0), 270.0);
    }

    #[test]
    fn settings_that_lose_too_much_do_not_count() {
        // 74.9 is more than five points below the first, 75 is not.
        near(aup(&[(1.0, 80.0), (9.0, 74.9)], 80.0), 80.0);
        let with = 80.0 + 4.0 * (75.0 * (-3.0_f64 / 16.0).exp() + 80.0);
        near(aup(&[(1.0, 80.0), (9.0, 75.0)], 80.0), with);
        assert_eq!(aup(&[], 80.0), None);
        assert_eq!(aup(&[(1.0, 0.0)], 0.0), None);
    }

    #[test]
    fn intervals_as_tables_have_them() {
        // Wilson's interval of 81 of 263 (Newcombe 1998, table I): 0.2553 to 0.3662.
        let (low, high) = interval(81, 263);
        assert!((low - 0.2553).abs() < 5e-5 && (high - 0.3662).abs() < 5e-5, "{low} {high}");
        // 0 of 20: 0 to 0.1611.
        let (low, high) = interval(0, 20);
        assert!(low.abs() < 1e-12 && (high - 0.1611).abs() < 5e-5, "{low} {high}");
        assert_eq!(interval(0, 0).0, 0.0);
    }

    #[test]
    fn medians_of_odd_and_even_numbers() {
        assert_eq!(Spread::of(vec![3.0, 1.0, 2.0]), Some(Spread { median: 2.0, min: 1.0, max: 3.0 }));
        assert_eq!(Spread::of(vec![4.0, 1.0, 2.0, 3.0]), Some(Spread { median: 2.5, min: 1.0, max: 4.0 }));
        assert_eq!(Spread::of(vec![]), None);
    }
}
