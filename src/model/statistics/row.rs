//! Statistics of one row, on the CPU: a pass or two over its numbers.

use super::{History, Pick};
use crate::decode::{RowStatistics, Sampling};
use crate::tensor::kernels::rows::{Limit, Slope, heaviest, largest, peak, pick, weigh};

/// Of a row of logits, which it may change. A row with nothing to choose from, or whose numbers are not finite, has a confidence
/// that is not, either.
pub(super) fn row(logits: &mut [f32], sampling: &Sampling, choice: Pick, history: &[History]) -> RowStatistics {
    for (token, bias) in &sampling.logit_bias {
        if let Some(logit) = logits.get_mut(*token as usize) {
            *logit += bias;
        }
    }
    forbid(logits, &sampling.forbidden);
    let mut drawn = Drawn { logits, old: vec![] };
    drawn.penalise(sampling, history);
    let broken = RowStatistics { confidence: f64::NAN, ..RowStatistics::default() };
    let Some((mut best, most)) = peak(drawn.logits) else { return broken };
    let mut slope = Slope::new(most, if sampling.temperature > 0.0 { sampling.temperature } else { 1.0 });
    drawn.filter(sampling, &mut slope);
    let token = match choice {
        Pick::Best => best,
        Pick::Given(token) => token as usize,
        Pick::At(uniform) => pick(drawn.logits, slope, uniform),
    };
    let changed = !sampling.unconfident.is_empty() || !sampling.filtered_confidence && !drawn.old.is_empty();
    if !sampling.filtered_confidence {
        drawn.restore();
        slope = Slope::new(most, 1.0);
    }
    forbid(logits, &sampling.unconfident);
    if changed {
        let Some((place, most)) = peak(logits) else { return broken };
        (best, slope.best) = (place, most);
    }
    judge(logits, slope, best, token, sampling)
}

/// Logits on the way to the distribution that is drawn from, and what they were before.
struct Drawn<'a> {
    logits: &'a mut [f32],
    old: Vec<(usize, f32)>,
}

impl Drawn<'_> {
    fn set(&mut self, place: usize, logit: f32) {
        self.old.push((place, self.logits[place]));
        self.logits[place] = logit;
    }

    fn restore(&mut self) {
        for (place, logit) in self.old.drain(..).rev() {
            self.logits[place] = logit;
        }
    }

    fn penalise(&mut self, sampling: &Sampling, history: &[History]) {
        let penalties = &sampling.penalties;
        for (token, _, text) in history {
            let Some(logit) = self.logits.get(*token as usize).copied() else { continue };
            let repetition = penalties.repetition as f32;
            let scaled = if logit > 0.0 { logit / repetition } else { logit * repetition };
            let presence = if *text > 0 { penalties.presence } else { 0.0 };
            self.set(*token as usize, scaled - (presence + penalties.frequency * f64::from(*text)) as f32);
        }
    }

    /// Raises what a logit must reach to what the filters leave. Each counts what the one before it has left, the heaviest first:
    /// so the highest limit is that of all.
    fn filter(&mut self, sampling: &Sampling, slope: &mut Slope) {
        let mut least = slope.least;
        if let Some(top_p) = sampling.top_p.filter(|top_p| *top_p < 1.0) {
            let Limit { least: limit, out } = heaviest(self.logits, *slope, top_p);
            least = least.max(limit);
            out.into_iter().for_each(|place| self.set(place, f32::NEG_INFINITY));
        }
        if let Some(top_k) = sampling.top_k.filter(|top_k| (*top_k as usize) < self.logits.len()) {
            least = least.max(largest(self.logits, top_k as usize));
        }
        if let Some(min_p) = sampling.min_p {
            least = least.max(slope.best + min_p.ln() as f32 / slope.scale);
        }
        slope.least = least;
    }
}

fn judge(logits: &mut [f32], slope: Slope, best: usize, token: usize, sampling: &Sampling) -> RowStatistics {
    let count = (sampling.alternatives as usize).min(logits.len());
    let alternatives = if count > 0 { top(logits, slope, count) } else { vec![] };
    let chosen = logits.get(token).map_or(f64::NAN, |logit| slope.logarithm(*logit).exp());
    // 1 + Σ others has the sum's own precision: 1 − 10⁻⁹ and 1 − 10⁻⁸ do not tie.
    logits[best] = f32::NEG_INFINITY;
    let others = weigh(logits, slope);
    let total = 1.0 + others.total;
    let margin = || match peak(logits) {
        Some((_, second)) => (1.0 - slope.logarithm(second).exp()) / total,
        None => 1.0,
    };
    let logarithm = others.total.ln_1p();
    RowStatistics {
        token: token as u32,
        confidence: chosen / total,
        margin: if sampling.margin { margin() } else { 0.0 },
        entropy: if sampling.entropy { logarithm - others.weighted / total } else { 0.0 },
        alternatives: alternatives.into_iter().map(|(token, of)| (token, of - logarithm)).collect(),
    }
}

/// The largest logits' tokens, the largest first, and the logarithms of their weights.
fn top(logits: &[f32], slope: Slope, count: usize) -> Vec<(u32, f64)> {
    let least = largest(logits, count);
    let mut top: Vec<(u32, f32)> =
        (0..).zip(logits.iter().copied()).filter(|(_, logit): &(u32, f32)| *logit >= least).collect();
    top.sort_unstable_by(|(a, x), (b, y)| y.total_cmp(x).then(a.cmp(b)));
    top.truncate(count);
    top.into_iter().map(|(token, logit)| (token, slope.logarithm(logit))).collect()
}

fn forbid(logits: &mut [f32], tokens: &[u32]) {
    for token in tokens {
        if let Some(logit) = logits.get_mut(*token as usize) {
            *logit = f32::NEG_INFINITY;
        }
    }
}
