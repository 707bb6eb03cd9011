//! Statistics of rows by libtorch, operation by operation: on a GPU, and wherever else our own kernels do not run.
//!
//! Nothing here waits for the device or reads from it: what comes is a table that stays there until all of a forward's tables are
//! copied at once.

use super::{History, ModelError, Pick, Proposal};
use crate::decode::{Penalties, RowStatistics, Sampling};
use crate::tensor::{Device, Kind, Tensor, upload};

/// Logits worked on at a time on the CPU: two rows of the largest vocabularies (one for each thread of a small machine), 1.25 MiB in
/// f32, about what second-level caches hold. One row at a time took twice as long, chunks of 4 MiB 1.2 times (docs/LOG.md).
const CHUNK: i64 = 320 * 1024;
/// On a GPU, 64 MiB in f32: rows enough to fill it, and small beside the weights.
const CHUNK_ON_GPU: i64 = 16 << 20;

/// Rows that are judged alike.
pub(super) struct Rows<'a> {
    pub sampling: &'a Sampling,
    pub picks: Vec<Pick>,
    /// One for each row where penalties ask, else none.
    pub histories: Vec<&'a [History]>,
    pub proposal: Option<&'a Proposal>,
}

/// The columns of a table, each of one number for each row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Columns {
    margin: bool,
    entropy: bool,
    alternatives: usize,
}

impl Columns {
    pub fn of(sampling: &Sampling, vocab: i64) -> Self {
        let alternatives = i64::from(sampling.alternatives).min(vocab) as usize;
        Self { margin: sampling.margin, entropy: sampling.entropy, alternatives }
    }

    /// Numbers of one row.
    pub fn count(&self) -> usize {
        2 + usize::from(self.margin) + usize::from(self.entropy) + 2 * self.alternatives
    }

    pub fn read(&self, row: &[f64]) -> RowStatistics {
        let (mut numbers, lists) =
            (row[..self.count() - 2 * self.alternatives].iter().copied(), &row[self.count() - 2 * self.alternatives..]);
        let (ids, logarithms) = lists.split_at(self.alternatives);
        let mut next = |there: bool| if there { numbers.next().unwrap_or(f64::NAN) } else { 0.0 };
        RowStatistics {
            token: next(true) as u32,
            confidence: next(true),
            margin: next(self.margin),
            entropy: next(self.entropy),
            alternatives: ids.iter().zip(logarithms).map(|(id, logarithm)| (*id as u32, *logarithm)).collect(),
        }
    }
}

/// Statistics of `logits: [rows, vocab]`, `[rows, columns]` in f64, on their device.
pub(super) fn table(logits: &Tensor, rows: &Rows) -> Result<Tensor, ModelError> {
    let (count, vocab) = logits.size2()?;
    let chunk = if logits.device() == Device::Cpu { CHUNK } else { CHUNK_ON_GPU };
    let chunk = (chunk / vocab.max(1)).clamp(1, count.max(1));
    let indices = Indices::new(rows.sampling, logits.device())?;
    let mut tables = vec![];
    let mut start = 0;
    while start < count {
        let length = chunk.min(count - start);
        tables.push(chunk_table(&logits.f_narrow(0, start, length)?, start as usize, rows, &indices)?);
        start += length;
    }
    Ok(Tensor::f_cat(&tables, 0)?)
}

/// Tokens that are treated apart, on the device.
struct Indices {
    biases: Option<(Tensor, Tensor)>,
    forbidden: Option<Tensor>,
    unconfident: Option<Tensor>,
}

impl Indices {
    fn new(sampling: &Sampling, device: Device) -> Result<Self, ModelError> {
        let index = |ids: &[u32]| -> Result<Option<Tensor>, ModelError> {
            let ids: Vec<i64> = ids.iter().map(|id| i64::from(*id)).collect();
            Ok(if ids.is_empty() { None } else { Some(upload(&ids, device)?) })
        };
        let (ids, biases): (Vec<u32>, Vec<f32>) = sampling.logit_bias.iter().copied().unzip();
        let biases = match index(&ids)? {
            Some(ids) => Some((ids, upload(&biases, device)?)),
            None => None,
        };
        Ok(Self { biases, forbidden: index(&sampling.forbidden)?, unconfident: index(&sampling.unconfident)? })
    }
}

/// `first` is the place of the chunk's first row among all rows.
fn chunk_table(logits: &Tensor, first: usize, all: &Rows, indices: &Indices) -> Result<Tensor, ModelError> {
    let sampling = all.sampling;
    let mut plain = logits.f_to_kind(Kind::Float)?;
    let rows = plain.size()[0] as usize;
    if indices.biases.is_some() || indices.forbidden.is_some() {
        // The conversion above copies only where the type changes; what follows writes.
        plain = if logits.kind() == Kind::Float { plain.f_detach_copy()? } else { plain };
        if let Some((ids, biases)) = &indices.biases {
            let biases = biases.f_unsqueeze(0)?.f_expand([rows as i64, biases.size()[0]], false)?;
            let _ = plain.f_index_add_(1, ids, &biases)?;
        }
        forbid(&mut plain, indices.forbidden.as_ref())?;
    }
    // Penalties, filters and temperature make the distribution that is drawn from; LLaDA takes confidence from the plain one all
    // the same.
    let penalised = match all.histories.get(first..first + rows) {
        Some(histories) => Some(penalise(&plain, histories, &sampling.penalties)?),
        None => None,
    };
    let base = penalised.as_ref().unwrap_or(&plain);
    let drawn = filtered(base, sampling)?;
    let drawn = drawn.as_ref().unwrap_or(base);
    let token = choose(drawn, &all.picks[first..first + rows], first, all.proposal)?;
    let mut judged = if sampling.filtered_confidence { drawn.shallow_clone() } else { plain.shallow_clone() };
    if let Some(unconfident) = &indices.unconfident {
        judged = judged.f_detach_copy()?;
        forbid(&mut judged, Some(unconfident))?;
    }
    judge(&judged, &token, &Columns::of(sampling, logits.size()[1]))
}

/// The token of each row, `[rows, 1]`.
fn choose(logits: &Tensor, picks: &[Pick], first: usize, proposal: Option<&Proposal>) -> Result<Tensor, ModelError> {
    let mut tokens = vec![];
    let mut uniforms = vec![];
    for pick in picks {
        match pick {
            Pick::Given(token) => tokens.push(i64::from(*token)),
            Pick::At(uniform) => uniforms.push(*uniform),
            Pick::Best => {}
        }
    }
    match (tokens.is_empty(), uniforms.is_empty()) {
        (false, _) => Ok(upload(&tokens, logits.device())?.f_view([-1, 1])?),
        (_, false) => draw(logits, &uniforms, first, proposal),
        _ => Ok(logits.f_argmax(-1, true)?),
    }
}

/// What is told of each row.
fn judge(judged: &Tensor, token: &Tensor, asked: &Columns) -> Result<Tensor, ModelError> {
    let best = judged.f_amax(-1, true)?;
    let shifted = judged.f_sub(&best)?;
    let weights = shifted.f_exp()?;
    let total = sums(&weights)?;
    let chosen = shifted.f_gather(-1, token, false)?.f_to_kind(Kind::Double)?.f_exp()?;
    let mut columns = vec![token.f_to_kind(Kind::Double)?, chosen.f_div(&total)?];
    if asked.margin {
        let (top, _) = weights.f_topk(2.min(weights.size()[1]), -1, true, true)?;
        let top = top.f_to_kind(Kind::Double)?.f_div(&total)?;
        columns.push(top.f_narrow(1, 0, 1)?.f_sub(&top.f_narrow(1, top.size()[1] - 1, 1)?)?);
    }
    if asked.entropy {
        // −Σ p ln p with p = w / Σw and ln w = shifted; a forbidden token has w = 0 and must not become 0 · ∞.
        let weighted = sums(&weights.f_mul(&shifted.f_clamp_min(-1e4)?)?)?;
        columns.push(total.f_log()?.f_sub(&weighted.f_div(&total)?)?);
    }
    if asked.alternatives > 0 {
        let (top, ids) = shifted.f_topk(asked.alternatives as i64, -1, true, true)?;
        columns.push(ids.f_to_kind(Kind::Double)?);
        columns.push(top.f_to_kind(Kind::Double)?.f_sub(&total.f_log()?)?);
    }
    Ok(Tensor::f_cat(&columns, 1)?)
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
    let column = |numbers: &[f64]| -> Result<Tensor, ModelError> { Ok(upload(numbers, device)?.f_view([-1, 1])?) };
    let mut weights = logits.f_softmax(-1, Kind::Double)?;
    let judged = proposal.map_or(0, |proposal| proposal.tokens.len().saturating_sub(first).min(uniforms.len()));
    let mut accepted = None;
    if let (Some(proposal), true) = (proposal, judged > 0) {
        let q = proposal.probabilities.f_narrow(0, first as i64, judged as i64)?.f_to_kind(Kind::Double)?;
        let p = weights.f_narrow(0, 0, judged as i64)?;
        let tokens: Vec<i64> = proposal.tokens[first..first + judged].iter().map(|id| i64::from(*id)).collect();
        let tokens = upload(&tokens, device)?.f_view([-1, 1])?;
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
fn penalise(logits: &Tensor, histories: &[&[History]], penalties: &Penalties) -> Result<Tensor, ModelError> {
    let vocab = logits.size()[1];
    let (mut places, mut taken) = (Vec::new(), Vec::new());
    for (row, history) in histories.iter().enumerate() {
        for (token, _, text) in *history {
            places.push(row as i64 * vocab + i64::from(*token));
            let presence = if *text > 0 { penalties.presence } else { 0.0 };
            taken.push((presence + penalties.frequency * f64::from(*text)) as f32);
        }
    }
    if places.is_empty() {
        return Ok(logits.shallow_clone());
    }
    let index = upload(&places, logits.device())?;
    let taken = upload(&taken, logits.device())?;
    let flat = logits.f_detach_copy()?.f_view(-1)?;
    let old = flat.f_index_select(0, &index)?;
    let scaled =
        old.f_div_scalar(penalties.repetition)?.f_where_self(&old.f_gt(0.0)?, &old.f_mul_scalar(penalties.repetition)?)?;
    Ok(flat.f_index_copy(0, &index, &scaled.f_sub(&taken)?)?.f_view_as(logits)?)
}

fn forbid(logits: &mut Tensor, index: Option<&Tensor>) -> Result<(), ModelError> {
    if let Some(index) = index {
        let _ = logits.f_index_fill_(1, index, f64::NEG_INFINITY)?;
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
