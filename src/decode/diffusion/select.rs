//! Selection rules: which masked cells to commit, as pure functions of their scores.
//!
//! A rule sees candidates only; it knows neither canvas nor logits. Ties go to the leftmost cell.

use crate::decode::RowStatistics;

/// What makes a cell come early.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// High probability of the chosen token (LLaDA's "low-confidence remasking", Dream's `maskgit_plus`).
    Confidence,
    /// Large distance between the two best tokens (Dream's `topk_margin`).
    Margin,
    /// Low entropy (Dream's `entropy`).
    Entropy,
    Random,
    LeftToRight,
}

/// How many cells to commit.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Rule {
    /// So many.
    Count(usize),
    /// Each on its own with this probability (Dream's `origin`); possibly none.
    Probability(f64),
    /// Every cell whose score reaches the threshold, and in any case the best (Fast-dLLM, arXiv 2505.22618), or so many of them.
    Threshold { threshold: f64, least: usize },
    /// The largest `n` with `(n + 1) · (1 − score of the n-th) < factor`, and at least one (Fast-dLLM).
    Factor(f64),
    /// The `n` best whose entropies, save the largest of them, sum to at most the bound, and at least one (EB-sampler,
    /// arXiv 2505.24857).
    EntropyBound(f64),
}

/// A masked cell that may be committed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Candidate {
    /// Larger comes first.
    pub score: f64,
    pub entropy: f64,
}

impl Candidate {
    /// Scores a row. `uniform` is the cell's own draw from [0, 1) and counts for random order and order temperature;
    /// `cell` its place from the left.
    pub fn new(order: Order, row: &RowStatistics, uniform: f64, cell: usize, order_temperature: f64) -> Self {
        let score = match order {
            Order::Confidence => row.confidence,
            Order::Margin => row.margin,
            Order::Entropy => -row.entropy,
            Order::Random => return Self { score: uniform, entropy: row.entropy },
            Order::LeftToRight => return Self { score: -(cell as f64), entropy: row.entropy },
        };
        // Drawing without replacement by softmax(score / temperature) is taking the largest of score / temperature + Gumbel.
        let score = if order_temperature > 0.0 {
            score / order_temperature - (-uniform.max(f64::MIN_POSITIVE).ln()).ln()
        } else {
            score
        };
        Self { score, entropy: row.entropy }
    }
}

/// Indices of the candidates to commit, best first. `uniforms` holds each candidate's draw for [`Rule::Probability`].
pub fn select(candidates: &[Candidate], rule: Rule, uniforms: &[f64]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..candidates.len()).collect();
    let score = |index: &usize| candidates[*index].score;
    // A stable sort by total order: ties keep the leftmost first, and NaN (refused before it gets here) could not panic.
    order.sort_by(|a, b| score(b).total_cmp(&score(a)));
    let count = match rule {
        Rule::Count(count) => count,
        Rule::Probability(probability) => {
            order.sort_unstable();
            order.retain(|index| uniforms[*index] < probability);
            order.len()
        }
        Rule::Threshold { threshold, least } => {
            order.iter().take_while(|index| score(index) >= threshold).count().max(least).max(1)
        }
        Rule::Factor(factor) => {
            let reaches = |n: &usize| (*n as f64 + 1.0) * (1.0 - score(&order[n - 1])) < factor;
            (1..=order.len()).take_while(reaches).last().unwrap_or(1)
        }
        Rule::EntropyBound(bound) => {
            let (mut sum, mut largest) = (0.0, 0.0f64);
            let within = order.iter().take_while(|index| {
                let entropy = candidates[**index].entropy;
                sum += entropy;
                largest = largest.max(entropy);
                sum - largest <= bound
            });
            within.count().max(1)
        }
    };
    order.truncate(count);
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidates(scores: &[f64]) -> Vec<Candidate> {
        scores.iter().map(|score| Candidate { score: *score, entropy: 1.0 - score }).collect()
    }

    #[test]
    fn count_takes_the_best_and_the_leftmost_of_equals() {
        let found = select(&candidates(&[0.2, 0.9, 0.5, 0.9]), Rule::Count(3), &[]);
        assert_eq!(found, [1, 3, 2]);
        assert_eq!(select(&candidates(&[0.2]), Rule::Count(0), &[]), [0usize; 0]);
        assert_eq!(select(&candidates(&[0.2]), Rule::Count(9), &[]), [0]);
    }

    #[test]
    fn threshold_always_commits_one_or_as_many_as_it_must() {
        let rule = |least| Rule::Threshold { threshold: 0.9, least };
        assert_eq!(select(&candidates(&[0.2, 0.3, 0.1]), rule(0), &[]), [1]);
        assert_eq!(select(&candidates(&[0.95, 0.3, 0.9]), rule(1), &[]), [0, 2]);
        assert_eq!(select(&candidates(&[0.2, 0.3, 0.1, 0.25]), rule(3), &[]), [1, 3, 0]);
        assert_eq!(select(&candidates(&[0.95, 0.3, 0.9]), rule(9), &[]), [0, 2, 1]);
        assert_eq!(select(&[], rule(1), &[]), [0usize; 0]);
    }

    #[test]
    fn factor_stops_at_the_first_that_fails_even_at_the_end() {
        // (n + 1)(1 − c): 2 · 0.01, 3 · 0.05, 4 · 0.4; with factor 1 the third fails, though it is the last.
        assert_eq!(select(&candidates(&[0.99, 0.95, 0.6]), Rule::Factor(1.0), &[]), [0, 1]);
        assert_eq!(select(&candidates(&[0.1, 0.2]), Rule::Factor(1.0), &[]), [1]);
    }

    #[test]
    fn entropy_bound_counts_all_but_the_largest() {
        // Entropies 0.05, 0.1, 0.5: sums without the largest are 0, 0.05, 0.15.
        let found = candidates(&[0.9, 0.95, 0.5]);
        assert_eq!(select(&found, Rule::EntropyBound(0.1), &[]), [1, 0]);
        assert_eq!(select(&found, Rule::EntropyBound(0.2), &[]), [1, 0, 2]);
        assert_eq!(select(&found, Rule::EntropyBound(0.0), &[]), [1]);
        // By score, not by entropy: the second best is too uncertain to stand beside two others.
        let mixed = [(0.9, 0.1), (0.8, 0.6), (0.7, 0.05)].map(|(score, entropy)| Candidate { score, entropy });
        assert_eq!(select(&mixed, Rule::EntropyBound(0.12), &[]), [0, 1]);
        assert_eq!(select(&mixed, Rule::EntropyBound(0.16), &[]), [0, 1, 2]);
    }

    #[test]
    fn an_order_temperature_draws_the_order_by_softmax() {
        let row = |confidence| RowStatistics { confidence, ..RowStatistics::default() };
        let score = |confidence, uniform| Candidate::new(Order::Confidence, &row(confidence), uniform, 0, 0.5).score;
        // A grid of draws in place of random ones: the share of the square in which the first of two cells wins.
        let grid: Vec<f64> = (0..400).map(|n| (f64::from(n) + 0.5) / 400.0).collect();
        let wins = grid.iter().map(|a| grid.iter().filter(|b| score(0.9, *a) > score(0.4, **b)).count()).sum::<usize>();
        let share = wins as f64 / (grid.len() * grid.len()) as f64;
        let softmax = 1.0 / (1.0 + f64::exp((0.4 - 0.9) / 0.5));
        assert!((share - softmax).abs() < 0.01, "{share} {softmax}");
        assert_eq!(Candidate::new(Order::Confidence, &row(0.9), 0.3, 0, 0.0).score, 0.9);
    }

    #[test]
    fn probability_may_commit_none() {
        assert_eq!(select(&candidates(&[0.2, 0.9]), Rule::Probability(0.5), &[0.7, 0.6]), [0usize; 0]);
        assert_eq!(select(&candidates(&[0.2, 0.9]), Rule::Probability(0.5), &[0.4, 0.6]), [0]);
    }
}
