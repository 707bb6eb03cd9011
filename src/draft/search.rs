//! ReDrafter's beam search on the CPU without tensors between its products: the head is so small that dispatching operations takes
//! several times as long as computing them. The same numbers as [`Redrafter::search_tensors`], within rounding.

use super::heads::Linear;
use super::redrafter::{KEPT, Redrafter, Search};
use crate::decode::autoregressive::adaptation::Shape;
use crate::model::Transformer;
use crate::model::quantized::{Quantized, Scheme};
use crate::tensor::kernels::integers::{Integers, VECTORS, Width};
use crate::tensor::kernels::linear::{product, row};
use crate::tensor::kernels::packed::Packed;
use crate::tensor::kernels::pointwise::silu;
use crate::tensor::{Kind, Tensor};

/// Numbers of a row that share a scale, where a matrix is in eight bits.
const GROUP: usize = 64;

/// Beams that go on: the state of each, its tokens and its score.
struct Beams {
    /// `[beams, hidden]`.
    states: Vec<f32>,
    tokens: Vec<Vec<u32>>,
    scores: Vec<f32>,
}

/// A head's matrices in fewer bits, which then stay in a core's own cache from step to step. Guesses are rounded a little; what becomes of
/// them is the network's business.
pub struct Narrow {
    input: Option<Small>,
    blocks: Vec<Small>,
    head: Small,
    /// `U` and `W`.
    recurrence: Option<(Small, Small)>,
}

/// A small product: its matrix in fewer bits, and its bias.
struct Small {
    matrix: Matrix,
    bias: Option<Vec<f32>>,
}

/// In eight bits where there are vectors of such, else in bf16.
enum Matrix {
    Eight(Integers),
    Sixteen(Packed),
}

impl Small {
    fn of(weight: &Tensor, bias: Option<&Tensor>) -> Option<Self> {
        let whole = || {
            let Quantized { codes, scales, .. } = Quantized::of(weight, Scheme::INT8_DYNAMIC).ok()?;
            Integers::of(Width::Eight, &codes, &scales, codes.size()[1] as usize, Some(GROUP)).ok()?
        };
        let matrix = match VECTORS.then(whole).flatten() {
            Some(weight) => Matrix::Eight(weight),
            None => Matrix::Sixteen(Packed::of(&weight.f_to_kind(Kind::BFloat16).ok()?).ok()??),
        };
        let bias = match bias {
            Some(bias) => Some(plain(bias)?),
            None => None,
        };
        Some(Self { matrix, bias })
    }

    fn product(&self, x: &[f32], rows: usize) -> Option<Vec<f32>> {
        let mut out = match &self.matrix {
            Matrix::Eight(weight) => weight.small_product(x, rows),
            Matrix::Sixteen(weight) => weight.small_product(x, rows),
        }?;
        if let Some(bias) = &self.bias {
            out.chunks_exact_mut(bias.len()).for_each(|out| out.iter_mut().zip(bias).for_each(|(out, bias)| *out += bias));
        }
        Some(out)
    }

    fn bytes(&self) -> usize {
        let matrix = match &self.matrix {
            Matrix::Eight(weight) => weight.bytes(),
            Matrix::Sixteen(weight) => weight.bytes(),
        };
        matrix + self.bias.as_ref().map_or(0, |bias| size_of_val(&bias[..]))
    }
}

/// The numbers of a vector.
fn plain(vector: &Tensor) -> Option<Vec<f32>> {
    let mut plain = vec![0f32; vector.numel()];
    row(&vector.f_view([1, -1]).ok()?, 0, &mut plain)?;
    Some(plain)
}

impl Narrow {
    /// `None` where the kernels are not in use.
    pub fn of(head: &Redrafter) -> Option<Self> {
        let linear = |linear: &Linear| Small::of(&linear.weight, linear.bias.as_ref());
        let recurrence = match head.recurrence() {
            Some((u, w)) => Some((linear(u)?, Small::of(w, None)?)),
            None => None,
        };
        let input = match head.input() {
            Some(input) => Some(linear(input)?),
            None => None,
        };
        let blocks = head.blocks().iter().map(linear).collect::<Option<_>>()?;
        Some(Self { input, blocks, head: Small::of(head.head(), None)?, recurrence })
    }

    pub fn bytes(&self) -> usize {
        let pair = self.recurrence.iter().flat_map(|(u, w)| [u, w]);
        self.input.iter().chain(&self.blocks).chain([&self.head]).chain(pair).map(Small::bytes).sum()
    }
}

/// A head, and its matrices in fewer bits if they are to be used.
#[derive(Clone, Copy)]
pub struct Searched<'a> {
    pub head: &'a Redrafter,
    pub narrow: Option<&'a Narrow>,
}

/// `x · weightᵀ + bias`, `x: [rows, inputs]`.
fn times(weight: &Tensor, narrow: Option<&Small>, bias: Option<&Tensor>, x: &[f32], rows: usize) -> Option<Vec<f32>> {
    narrow.map_or_else(|| product(weight, bias, x, rows), |narrow| narrow.product(x, rows))
}

/// As [`Redrafter::search_sure`], with a logarithm for the least probability; `None` if weights, table or context are of a kind that
/// the kernels do not read.
pub fn search(
    searched: Searched,
    model: &Transformer,
    context: &Tensor,
    root: u32,
    shape: Shape,
    least: f32,
) -> Option<Search> {
    let head = searched.head;
    let hidden = head.settings().hidden_size;
    let mut given = vec![0f32; hidden];
    row(context, 0, &mut given)?;
    let mut beams = Beams { states: advance(searched, model, &[root], None)?, tokens: vec![vec![]], scores: vec![0.0] };
    let mut ended: Vec<(Vec<u32>, f32)> = vec![];
    let mut steps = 0;
    while steps < shape.length {
        steps += 1;
        let count = beams.scores.len();
        let logits = logits(searched, &given, &beams.states, count)?;
        let rows = logits.len() / count;
        let mut candidates: Vec<(f32, usize, usize)> = vec![];
        for (beam, logits) in logits.chunks_exact(rows).enumerate() {
            let best = best(logits, shape.width.min(KEPT as usize));
            let total = total(logits, best.first()?.0);
            let score = |(logit, row): &(f32, usize)| (beams.scores[beam] + logit - total, beam, *row);
            candidates.extend(best.iter().map(score));
        }
        // Stable: of equal scores the earlier beam's and the better row's counts.
        candidates.sort_by(|a, b| b.0.total_cmp(&a.0));
        candidates.truncate(shape.width);
        let sure = candidates.partition_point(|candidate| candidate.0 >= least);
        let unsure = candidates.split_off(sure);
        for beam in 0..count {
            let goes_on = |candidates: &[(f32, usize, usize)]| candidates.iter().any(|candidate| candidate.1 == beam);
            if goes_on(&unsure) && !goes_on(&candidates) {
                ended.push((std::mem::take(&mut beams.tokens[beam]), beams.scores[beam]));
            }
        }
        let chosen: Vec<u32> = candidates.iter().map(|(_, _, row)| head.token(*row)).collect();
        let parents: Vec<usize> = candidates.iter().map(|(_, beam, _)| *beam).collect();
        let tokens = |(parent, token): (&usize, &u32)| beams.tokens[*parent].iter().copied().chain([*token]).collect();
        let tokens = parents.iter().zip(&chosen).map(tokens).collect();
        let states = match steps < shape.length && !chosen.is_empty() {
            true => {
                let before: Vec<f32> =
                    parents.iter().flat_map(|beam| &beams.states[beam * hidden..(beam + 1) * hidden]).copied().collect();
                advance(searched, model, &chosen, Some(&before))?
            }
            false => vec![],
        };
        beams = Beams { states, tokens, scores: candidates.iter().map(|candidate| candidate.0).collect() };
        if chosen.is_empty() {
            break;
        }
    }
    let live = beams.tokens.into_iter().zip(beams.scores);
    let (beams, scores) = live.chain(ended).filter(|(tokens, _)| !tokens.is_empty()).unzip();
    Some(Search { beams, scores, steps })
}

/// The next state of each beam.
fn advance(
    Searched { head, narrow }: Searched,
    model: &Transformer,
    tokens: &[u32],
    states: Option<&[f32]>,
) -> Option<Vec<f32>> {
    let hidden = head.settings().hidden_size;
    let mut embedded = vec![0f32; tokens.len() * hidden];
    for (token, embedded) in tokens.iter().zip(embedded.chunks_exact_mut(hidden)) {
        row(model.embedding(), *token as usize, embedded)?;
    }
    let Some((u, w)) = head.recurrence() else {
        if let Some(states) = states {
            embedded.iter_mut().zip(states).for_each(|(new, old)| *new += old);
        }
        return Some(embedded);
    };
    let narrow = narrow.and_then(|narrow| narrow.recurrence.as_ref());
    let mut next = times(w, narrow.map(|(_, w)| w), None, &embedded, tokens.len())?;
    let kept = match states {
        Some(states) => times(&u.weight, narrow.map(|(u, _)| u), u.bias.as_ref(), states, tokens.len())?,
        // Of the state zero nothing is left but the bias.
        None => {
            let bias = match (narrow, &u.bias) {
                (Some((u, _)), _) => u.bias.clone(),
                (None, Some(bias)) => Some(plain(bias)?),
                (None, None) => None,
            };
            bias.unwrap_or_else(|| vec![0f32; hidden]).repeat(tokens.len())
        }
    };
    next.iter_mut().zip(kept).for_each(|(next, kept)| *next += kept);
    silu(&mut next);
    Some(next)
}

/// `[beams, rows]`.
fn logits(Searched { head, narrow }: Searched, context: &[f32], states: &[f32], beams: usize) -> Option<Vec<f32>> {
    let mut x: Vec<f32> = states.chunks_exact(context.len()).flat_map(|state| context.iter().chain(state)).copied().collect();
    if let Some(input) = head.input() {
        x = times(&input.weight, narrow.and_then(|narrow| narrow.input.as_ref()), input.bias.as_ref(), &x, beams)?;
    }
    for (at, block) in head.blocks().iter().enumerate() {
        let mut inner = times(&block.weight, narrow.map(|narrow| &narrow.blocks[at]), block.bias.as_ref(), &x, beams)?;
        silu(&mut inner);
        x.iter_mut().zip(inner).for_each(|(x, inner)| *x += inner);
    }
    times(head.head(), narrow.map(|narrow| &narrow.head), None, &x, beams)
}

/// The `count` largest with their places, largest first; of equal ones the first.
fn best(logits: &[f32], count: usize) -> Vec<(f32, usize)> {
    let mut best: Vec<(f32, usize)> = Vec::with_capacity(count + 1);
    for (row, logit) in logits.iter().enumerate() {
        // Most are less than all of them.
        if best.len() < count || best.last().is_some_and(|last| last.0 < *logit) {
            best.insert(best.partition_point(|other| other.0 >= *logit), (*logit, row));
            best.truncate(count);
        }
    }
    best
}

/// Logarithm of the sum of the exponentials of the [`KEPT`] largest, of which `top` is the largest.
fn total(logits: &[f32], top: f32) -> f32 {
    let (mut all, kept) = (logits.to_vec(), KEPT as usize);
    if kept < all.len() {
        all.select_nth_unstable_by(kept, |a, b| b.total_cmp(a));
        all.truncate(kept);
    }
    all.into_iter().map(|logit| (logit - top).exp()).sum::<f32>().ln() + top
}
