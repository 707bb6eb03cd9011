//! From logits to what decoding needs: chosen token, confidence, margin and entropy of each wanted row.
//!
//! Rows are worked through in chunks small enough to stay in the cache, so that no float copy of all rows' logits exists
//! (guidance, which mixes two sets of logits first, makes one). Sums of probabilities are taken in f64: two confidences of
//! 1 − 10⁻⁹ and 1 − 10⁻⁸ must not tie.

use super::ModelError;
use crate::decode::{Noise, Penalties, RowStatistics, Sampling};
use crate::tensor::{Kind, Tensor, kernels, seeded};

/// Logits worked on at a time: two rows of the largest vocabularies (one for each thread of a small machine), 1.25 MiB in f32,
/// about what second-level caches hold. One row at a time took twice as long, chunks of 4 MiB 1.2 times (docs/LOG.md).
const CHUNK: i64 = 320 * 1024;

/// Draws that a drafter made and the network verifies: row `i` of the logits judges token `i`.
pub struct Proposal {
    pub tokens: Vec<u32>,
    /// What each was drawn from, `[tokens, vocab]`, f32.
    pub probabilities: Tensor,
    /// One number from 0 to 1 for each, independent of everything else: whether it is accepted.
    pub uniforms: Vec<f64>,
}

/// What a row depends on besides its logits.
pub struct Conditions<'a> {
    pub sampling: &'a Sampling,
    pub noise: &'a Noise,
    /// As in [`crate::decode::Window::histories`].
    pub histories: &'a [Vec<(u32, u32, u32)>],
    pub proposal: Option<&'a Proposal>,
}

/// Statistics of `logits: [rows, vocab]`, in order.
pub fn statistics(logits: &Tensor, conditions: &Conditions) -> Result<Vec<RowStatistics>, ModelError> {
    let (rows, vocab) = logits.size2()?;
    if let Some(found) = best(logits, conditions)? {
        return Ok(found);
    }
    let mut found = Vec::with_capacity(rows as usize);
    // Held until the last draw.
    let _generator = match conditions.noise {
        Noise::Seed(seed) if conditions.sampling.temperature > 0.0 => Some(seeded(*seed)),
        _ => None,
    };
    let chunk = (CHUNK / vocab).clamp(1, rows.max(1));
    let mut start = 0;
    while start < rows {
        let length = chunk.min(rows - start);
        chunk_statistics(&logits.f_narrow(0, start, length)?, start as usize, conditions, &mut found)?;
        start += length;
    }
    if found.iter().any(|row| !row.confidence.is_finite()) {
        return Err(ModelError::NotFinite);
    }
    Ok(found)
}

/// Whether nothing but the best token of each row and its probability is asked: what decoding is mostly made of.
pub fn is_greedy(conditions: &Conditions) -> bool {
    let Sampling { temperature, top_k, top_p, min_p, unconfident, margin, entropy, penalties, alternatives, .. } =
        conditions.sampling;
    let filters = top_k.is_some() || top_p.is_some() || min_p.is_some() || penalties.any();
    let given = matches!(conditions.noise, Noise::Given(_));
    !(given || *temperature != 0.0 || filters || !unconfident.is_empty() || *margin || *entropy || *alternatives > 0)
}

/// Best tokens and their probabilities as the statistics of their rows.
pub fn greedy(found: &[(u32, f64)]) -> Result<Vec<RowStatistics>, ModelError> {
    if found.iter().any(|(_, confidence)| !confidence.is_finite()) {
        return Err(ModelError::NotFinite);
    }
    let row =
        |(token, confidence): &(u32, f64)| RowStatistics { token: *token, confidence: *confidence, ..RowStatistics::default() };
    Ok(found.iter().map(row).collect())
}

/// By a kernel of its own, where there is one.
fn best(logits: &Tensor, conditions: &Conditions) -> Result<Option<Vec<RowStatistics>>, ModelError> {
    if !is_greedy(conditions) {
        return Ok(None);
    }
    let found = kernels::rows::best(logits, &conditions.sampling.forbidden, &conditions.sampling.logit_bias)?;
    found.map(|found| greedy(&found)).transpose()
}

/// `first` is the place of the chunk's first row among all rows.
fn chunk_statistics(
    logits: &Tensor,
    first: usize,
    conditions: &Conditions,
    found: &mut Vec<RowStatistics>,
) -> Result<(), ModelError> {
    let sampling = conditions.sampling;
    let mut plain = logits.f_to_kind(Kind::Float)?;
    if !sampling.logit_bias.is_empty() || !sampling.forbidden.is_empty() {
        // The conversion above copies only where the type changes; what follows writes.
        plain = if logits.kind() == Kind::Float { plain.f_detach_copy()? } else { plain };
        if !sampling.logit_bias.is_empty() {
            let (ids, biases): (Vec<i64>, Vec<f32>) = sampling.logit_bias.iter().map(|(id, b)| (i64::from(*id), *b)).unzip();
            let index = Tensor::f_from_slice(&ids)?.f_to_device(plain.device())?;
            let biases = Tensor::f_from_slice(&biases)?.f_to_device(plain.device())?;
            let _ =
                plain.f_index_add_(1, &index, &biases.f_unsqueeze(0)?.f_expand([plain.size()[0], ids.len() as i64], false)?)?;
        }
        forbid(&mut plain, &sampling.forbidden)?;
    }
    // Penalties, filters and temperature make the distribution that is drawn from; LLaDA takes confidence from the plain one all
    // the same.
    let rows = plain.size()[0] as usize;
    let penalised = match conditions.histories.get(first..first + rows) {
        Some(histories) if sampling.penalties.any() => Some(penalise(&plain, histories, &sampling.penalties)?),
        _ => None,
    };
    let base = penalised.as_ref().unwrap_or(&plain);
    let drawn = filtered(base, sampling)?;
    let drawn = drawn.as_ref().unwrap_or(base);
    let token = match conditions.noise {
        Noise::Given(tokens) => {
            let tokens: Vec<i64> = tokens[first..first + rows].iter().map(|id| i64::from(*id)).collect();
            Tensor::f_from_slice(&tokens)?.f_view([-1, 1])?.f_to_device(plain.device())?
        }
        _ if sampling.temperature == 0.0 => drawn.f_argmax(-1, true)?,
        Noise::Seed(_) => {
            // argmax(logits / T + Gumbel), with the noise as −ln of an exponential, in f64 (arXiv 2409.02908).
            let noise = drawn.f_to_kind(Kind::Double)?.f_empty_like()?.f_exponential(1.0)?.f_log()?;
            drawn.f_to_kind(Kind::Double)?.f_sub(&noise)?.f_argmax(-1, true)?
        }
        Noise::Uniforms(uniforms) => draw(drawn, &uniforms[first..first + rows], first, conditions.proposal)?,
    };
    let mut judged = if sampling.filtered_confidence { drawn.shallow_clone() } else { plain.shallow_clone() };
    if !sampling.unconfident.is_empty() {
        judged = judged.f_detach_copy()?;
        forbid(&mut judged, &sampling.unconfident)?;
    }
    let best = judged.f_amax(-1, true)?;
    let shifted = judged.f_sub(&best)?;
    let weights = shifted.f_exp()?;
    let total = sums(&weights)?;
    let chosen = shifted.f_gather(-1, &token, false)?.f_to_kind(Kind::Double)?.f_exp()?;
    let mut columns = vec![token.f_to_kind(Kind::Double)?, chosen.f_div(&total)?];
    if sampling.margin {
        let (top, _) = weights.f_topk(2.min(weights.size()[1]), -1, true, true)?;
        let top = top.f_to_kind(Kind::Double)?.f_div(&total)?;
        columns.push(top.f_narrow(1, 0, 1)?.f_sub(&top.f_narrow(1, top.size()[1] - 1, 1)?)?);
    }
    if sampling.entropy {
        // −Σ p ln p with p = w / Σw and ln w = shifted; a forbidden token has w = 0 and must not become 0 · ∞.
        let weighted = sums(&weights.f_mul(&shifted.f_clamp_min(-1e4)?)?)?;
        columns.push(total.f_log()?.f_sub(&weighted.f_div(&total)?)?);
    }
    let numbers = columns.len();
    let alternatives = i64::from(sampling.alternatives).min(shifted.size()[1]) as usize;
    if alternatives > 0 {
        let (top, ids) = shifted.f_topk(alternatives as i64, -1, true, true)?;
        columns.push(ids.f_to_kind(Kind::Double)?);
        columns.push(top.f_to_kind(Kind::Double)?.f_sub(&total.f_log()?)?);
    }
    let table = Tensor::f_cat(&columns, 1)?.f_to_device(tch::Device::Cpu)?.f_contiguous()?;
    let values: Vec<f64> = Vec::try_from(&table.f_view(-1)?)?;
    found.extend(values.chunks(numbers + 2 * alternatives).map(|row| {
        let (ids, logarithms) = row[numbers..].split_at(alternatives);
        RowStatistics {
            token: row[0] as u32,
            confidence: row[1],
            margin: if sampling.margin { row[2] } else { 0.0 },
            entropy: if sampling.entropy { row[numbers - 1] } else { 0.0 },
            alternatives: ids.iter().zip(logarithms).map(|(id, logarithm)| (*id as u32, *logarithm)).collect(),
        }
    }));
    Ok(())
}

/// Sums of the rows of `[rows, vocab]`, `[rows, 1]` in f64. In two halves: libtorch sums a single long row in as many parts as it has
/// threads, but each of several in one, and a row's last bit must not depend on the rows beside it.
fn sums(rows: &Tensor) -> Result<Tensor, ModelError> {
    let (count, vocab) = rows.size2()?;
    let half = vocab / 2;
    let halves = rows.f_narrow(1, 0, 2 * half)?.f_view([count, 2, half])?.f_sum_dim_intlist(-1, false, Kind::Double)?;
    let rest = rows.f_narrow(1, 2 * half, vocab - 2 * half)?.f_to_kind(Kind::Double)?;
    Ok(Tensor::f_cat(&[halves, rest], 1)?.f_sum_dim_intlist(-1, true, Kind::Double)?)
}

/// One token for each row of `logits: [rows, vocab]`, `[rows, 1]`: where a row's number falls in its cumulated distribution.
///
/// Rows that judge a drawn token `x` first apply the ratio test (Leviathan et al., arXiv 2211.17192): it is accepted with
/// probability min(1, p(x) / q(x)); else the row's number picks from relu(p − q). The result is distributed as p either way.
fn draw(logits: &Tensor, uniforms: &[f64], first: usize, proposal: Option<&Proposal>) -> Result<Tensor, ModelError> {
    let device = logits.device();
    let column = |numbers: &[f64]| -> Result<Tensor, ModelError> {
        Ok(Tensor::f_from_slice(numbers)?.f_view([-1, 1])?.f_to_device(device)?)
    };
    let mut weights = logits.f_softmax(-1, Kind::Double)?;
    let judged = proposal.map_or(0, |proposal| proposal.tokens.len().saturating_sub(first).min(uniforms.len()));
    let mut accepted = None;
    if let (Some(proposal), true) = (proposal, judged > 0) {
        let q = proposal.probabilities.f_narrow(0, first as i64, judged as i64)?.f_to_kind(Kind::Double)?;
        let p = weights.f_narrow(0, 0, judged as i64)?;
        let tokens: Vec<i64> = proposal.tokens[first..first + judged].iter().map(|id| i64::from(*id)).collect();
        let tokens = Tensor::f_from_slice(&tokens)?.f_view([-1, 1])?.f_to_device(device)?;
        let coins = column(&proposal.uniforms[first..first + judged])?;
        let right = coins.f_mul(&q.f_gather(1, &tokens, false)?)?.f_lt_tensor(&p.f_gather(1, &tokens, false)?)?;
        let residual = p.f_sub(&q)?.f_clamp_min(0.0)?;
        // p = q to the last bit leaves nothing; then every draw is accepted, and what is picked here does not matter.
        let empty = residual.f_sum_dim_intlist(-1, true, Kind::Double)?.f_eq(0.0)?;
        let residual = residual.f_where_self(&empty.f_logical_not()?, &p)?;
        let rest = weights.f_narrow(0, judged as i64, uniforms.len() as i64 - judged as i64)?;
        weights = Tensor::f_cat(&[residual, rest], 0)?;
        accepted = Some((tokens, right));
    }
    let cumulated = weights.f_cumsum(-1, Kind::Double)?;
    let total = cumulated.f_narrow(1, cumulated.size()[1] - 1, 1)?;
    // Below the total, so that rounding cannot reach past the last token that has any weight.
    let places = column(uniforms)?.f_mul(&total)?.f_minimum(&total.f_mul_scalar(1.0 - 1e-12)?)?;
    let picked = places.f_searchsorted(&cumulated, false, true, "right", None::<&Tensor>)?;
    let Some((tokens, right)) = accepted else { return Ok(picked) };
    let head = tokens.f_where_self(&right, &picked.f_narrow(0, 0, judged as i64)?)?;
    Ok(Tensor::f_cat(&[head, picked.f_narrow(0, judged as i64, uniforms.len() as i64 - judged as i64)?], 0)?)
}

/// `logits` with each row's history held against it. Only the tokens of the histories are touched.
fn penalise(logits: &Tensor, histories: &[Vec<(u32, u32, u32)>], penalties: &Penalties) -> Result<Tensor, ModelError> {
    let vocab = logits.size()[1];
    let (mut places, mut taken) = (Vec::new(), Vec::new());
    for (row, history) in histories.iter().enumerate() {
        for (token, _, text) in history {
            places.push(row as i64 * vocab + i64::from(*token));
            let presence = if *text > 0 { penalties.presence } else { 0.0 };
            taken.push((presence + penalties.frequency * f64::from(*text)) as f32);
        }
    }
    if places.is_empty() {
        return Ok(logits.shallow_clone());
    }
    let index = Tensor::f_from_slice(&places)?.f_to_device(logits.device())?;
    let taken = Tensor::f_from_slice(&taken)?.f_to_device(logits.device())?;
    let flat = logits.f_detach_copy()?.f_view(-1)?;
    let old = flat.f_index_select(0, &index)?;
    let scaled =
        old.f_div_scalar(penalties.repetition)?.f_where_self(&old.f_gt(0.0)?, &old.f_mul_scalar(penalties.repetition)?)?;
    Ok(flat.f_index_copy(0, &index, &scaled.f_sub(&taken)?)?.f_view_as(logits)?)
}

fn forbid(logits: &mut Tensor, ids: &[u32]) -> Result<(), ModelError> {
    if !ids.is_empty() {
        let ids: Vec<i64> = ids.iter().map(|id| i64::from(*id)).collect();
        let index = Tensor::f_from_slice(&ids)?.f_to_device(logits.device())?;
        let _ = logits.f_index_fill_(1, &index, f64::NEG_INFINITY)?;
    }
    Ok(())
}

/// Logits over the temperature with all but the admitted tokens at −∞; `None` where nothing changes them.
fn filtered(plain: &Tensor, sampling: &Sampling) -> Result<Option<Tensor>, ModelError> {
    let tempered = sampling.temperature > 0.0 && sampling.temperature != 1.0;
    if !tempered && sampling.top_k.is_none() && sampling.top_p.is_none() && sampling.min_p.is_none() {
        return Ok(None);
    }
    let mut logits = if tempered { plain.f_div_scalar(sampling.temperature)? } else { plain.f_detach_copy()? };
    let vocab = logits.size()[1];
    if let Some(top_p) = sampling.top_p {
        // The smallest set that reaches top_p: a token is out if those before it reach it without it.
        let (sorted, order) = logits.f_sort(-1, true)?;
        let probability = sorted.f_softmax(-1, Kind::Float)?;
        let before = probability.f_cumsum(-1, Kind::Float)?.f_sub(&probability)?;
        let out = before.f_gt(top_p)?;
        let out = out.f_scatter(1, &order, &out)?;
        logits = logits.f_masked_fill(&out, f64::NEG_INFINITY)?;
    }
    if let Some(top_k) = sampling.top_k.filter(|k| i64::from(*k) < vocab) {
        let (top, _) = logits.f_topk(i64::from(top_k), -1, true, true)?;
        let least = top.f_narrow(1, i64::from(top_k) - 1, 1)?;
        logits = logits.f_masked_fill(&logits.f_lt_tensor(&least)?, f64::NEG_INFINITY)?;
    }
    if let Some(min_p) = sampling.min_p {
        let least = logits.f_amax(-1, true)?.f_add_scalar(min_p.ln())?;
        logits = logits.f_masked_fill(&logits.f_lt_tensor(&least)?, f64::NEG_INFINITY)?;
    }
    Ok(Some(logits))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::Device;

    fn logits(rows: &[&[f32]]) -> Tensor {
        let flat: Vec<f32> = rows.concat();
        Tensor::from_slice(&flat).view([rows.len() as i64, -1])
    }

    fn seeded(logits: &Tensor, sampling: &Sampling, seed: u64) -> Result<Vec<RowStatistics>, ModelError> {
        let noise = Noise::Seed(seed);
        super::statistics(logits, &Conditions { sampling, noise: &noise, histories: &[], proposal: None })
    }

    fn one(row: &[f32], sampling: &Sampling) -> RowStatistics {
        seeded(&logits(&[row]), sampling, 1).unwrap()[0].clone()
    }

    fn close(a: f64, b: f64) -> bool {
        (a - b).abs() < 1e-6
    }

    #[test]
    fn greedy_statistics_are_those_of_the_softmax() {
        let all = Sampling { margin: true, entropy: true, ..Sampling::default() };
        let row = one(&[1.0, 3.0, 2.0], &all);
        let weights = [1.0f64, 3.0, 2.0].map(f64::exp);
        let p = weights.map(|w| w / weights.iter().sum::<f64>());
        let entropy: f64 = p.iter().map(|p| -p * p.ln()).sum();
        assert_eq!(row.token, 1);
        assert!(close(row.confidence, p[1]) && close(row.margin, p[1] - p[2]) && close(row.entropy, entropy), "{row:?}");
    }

    #[test]
    fn near_certain_confidences_keep_their_order() {
        // 1 − 10⁻⁸ and 1 − 10⁻⁹: equal in f32.
        let rows = seeded(&logits(&[&[18.4, 0.0], &[20.7, 0.0]]), &Sampling::default(), 0).unwrap();
        assert!(rows[0].confidence < rows[1].confidence, "{rows:?}");
    }

    #[test]
    fn forbidden_tokens_have_neither_choice_nor_probability() {
        let row = one(&[5.0, 1.0, 1.0], &Sampling { forbidden: vec![0], entropy: true, ..Sampling::default() });
        assert!(row.token == 1 && close(row.confidence, 0.5) && close(row.entropy, 2f64.ln()), "{row:?}");
        let late = one(&[5.0, 1.0, 1.0], &Sampling { unconfident: vec![0], ..Sampling::default() });
        assert_eq!((late.token, late.confidence), (0, 0.0));
    }

    #[test]
    fn the_logits_given_are_not_written_to() {
        let given = logits(&[&[5.0, 1.0, 1.0]]);
        let sampling = Sampling { forbidden: vec![0], logit_bias: vec![(2, 3.0)], ..Sampling::default() };
        assert_eq!(seeded(&given, &sampling, 0).unwrap()[0].token, 2);
        assert_eq!(Vec::<f32>::try_from(given.view(-1)).unwrap(), [5.0, 1.0, 1.0]);
    }

    /// 80,000 draws, from four seeds, against softmax(logits / T) after each filter; the bound is four standard errors.
    #[test]
    fn sampling_follows_the_filtered_distribution() {
        let row = [2.0f32, 1.0, 0.5, -1.0];
        let draws = 20_000;
        let cases = [
            (Sampling { temperature: 1.0, ..Sampling::default() }, vec![0, 1, 2, 3]),
            (Sampling { temperature: 0.5, ..Sampling::default() }, vec![0, 1, 2, 3]),
            (Sampling { temperature: 1.0, top_k: Some(2), ..Sampling::default() }, vec![0, 1]),
            // Probabilities 0.60, 0.22, 0.13, 0.03: two tokens reach 0.7.
            (Sampling { temperature: 1.0, top_p: Some(0.7), ..Sampling::default() }, vec![0, 1]),
            (Sampling { temperature: 1.0, min_p: Some(0.2), ..Sampling::default() }, vec![0, 1, 2]),
        ];
        for (sampling, admitted) in cases {
            let many = Tensor::from_slice(&row).unsqueeze(0).expand([draws, 4], false).contiguous();
            let mut counts = [0f64; 4];
            for seed in 0..4 {
                for row in seeded(&many, &sampling, seed).unwrap() {
                    counts[row.token as usize] += 1.0;
                }
            }
            let drawn: f64 = counts.iter().sum();
            let weight = |token: usize| {
                if admitted.contains(&token) { f64::from(row[token] / sampling.temperature as f32).exp() } else { 0.0 }
            };
            let total: f64 = (0..4).map(weight).sum();
            for (token, count) in counts.iter().enumerate() {
                let p = weight(token) / total;
                let error = 4.0 * (p * (1.0 - p) / drawn).sqrt();
                assert!((count / drawn - p).abs() <= error, "{sampling:?} token {token}: {} for {p}", count / drawn);
            }
        }
    }

    fn drawn(row: &[f32], uniforms: &[f64], proposal: Option<&Proposal>) -> Vec<u32> {
        let many = logits(&vec![row; uniforms.len()]);
        let (sampling, noise) = (Sampling { temperature: 1.0, ..Sampling::default() }, Noise::Uniforms(uniforms.to_vec()));
        let conditions = Conditions { sampling: &sampling, noise: &noise, histories: &[], proposal };
        super::statistics(&many, &conditions).unwrap().iter().map(|row| row.token).collect()
    }

    /// Probabilities 1/10, 2/10, 3/10, 4/10, and none.
    const TENTHS: [f32; 5] = [0.0, std::f32::consts::LN_2, 1.098_612_3, 2.0 * std::f32::consts::LN_2, f32::NEG_INFINITY];

    #[test]
    fn a_number_picks_from_the_cumulated_distribution() {
        let numbers = [0.0, 0.099, 0.101, 0.299, 0.301, 0.599, 0.601, 0.999, 1.0];
        assert_eq!(drawn(&TENTHS, &numbers, None), [0, 0, 1, 1, 2, 2, 3, 3, 3]);
        let swapped = [TENTHS[4], TENTHS[3], TENTHS[0], TENTHS[4]];
        assert_eq!(drawn(&swapped, &[0.0, 0.79, 0.81, 1.0], None), [1, 1, 2, 2], "what is impossible is not picked");
    }

    #[test]
    fn a_draw_is_accepted_by_the_ratio_and_replaced_from_the_residual() {
        // q = 4/10, 3/10, 2/10, 1/10: p − q is left on the tokens 2 and 3, in parts of 1 and 3.
        let q = Tensor::from_slice(&[0.4f32, 0.3, 0.2, 0.1, 0.0]).unsqueeze(0).expand([5, 5], false);
        // Token 0 is accepted with 1/4, token 1 with 2/3, token 3 always.
        let proposal =
            Proposal { tokens: vec![0, 0, 1, 1, 3], probabilities: q, uniforms: vec![0.24, 0.26, 0.66, 0.67, 0.999] };
        // The sixth row judges nothing.
        assert_eq!(drawn(&TENTHS, &[0.9, 0.24, 0.9, 0.26, 0.0, 0.05], Some(&proposal)), [0, 2, 1, 3, 3, 0]);
    }

    #[test]
    fn noise_is_a_function_of_its_seed() {
        let logits = Tensor::zeros([8, 50], (Kind::Float, Device::Cpu));
        let sampling = Sampling { temperature: 1.0, ..Sampling::default() };
        let tokens = |seed| seeded(&logits, &sampling, seed).unwrap().iter().map(|row| row.token).collect::<Vec<_>>();
        assert_eq!(tokens(1), tokens(1));
        assert_ne!(tokens(1), tokens(2));
    }

    #[test]
    fn logits_that_are_not_finite_are_an_error() {
        assert!(matches!(seeded(&logits(&[&[f32::NAN, 1.0]]), &Sampling::default(), 0), Err(ModelError::NotFinite)));
        let all = Sampling { forbidden: vec![0, 1], ..Sampling::default() };
        assert!(matches!(seeded(&logits(&[&[1.0, 1.0]]), &all, 0), Err(ModelError::NotFinite)));
    }
}
