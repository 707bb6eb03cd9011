//! ReDrafter's beam search, and chains of its tokens, on the CPU without tensors between its products: the head is so small that dispatching operations takes
//! several times as long as computing them. A step of all beams is one list of kernels. The same numbers as
//! [`Redrafter::search_tensors`], within rounding.

use super::heads::Linear;
use super::redrafter::{KEPT, Redrafter, Search};
use crate::decode::autoregressive::adaptation::Shape;
use crate::model::Transformer;
use crate::model::quantized::{Quantized, Scheme};
use crate::tensor::kernels::fixed::Fixed;
use crate::tensor::kernels::integers::{Integers, VECTORS, Width};
use crate::tensor::kernels::linear::row;
use crate::tensor::kernels::packed::Packed;
use crate::tensor::kernels::pointwise::{activate, add_bias};
use crate::tensor::kernels::turns::{Rows, Turns};
use crate::tensor::{Kind, Tensor};

/// Numbers of a row that share a scale, where a matrix is in eight bits.
const GROUP: usize = 64;

/// A head's matrices as the search multiplies by them.
pub struct Matrices {
    input: Option<Product>,
    blocks: Vec<Product>,
    head: Product,
    /// `[W U]`, which an embedding and a state are multiplied by side by side.
    recurrence: Option<Product>,
}

/// A matrix, and its bias.
struct Product {
    matrix: Matrix,
    bias: Option<Fixed>,
}

enum Matrix {
    Whole(Packed),
    Eight(Integers),
}

impl Matrices {
    /// The head's own numbers; `None` where kernels do not read them.
    pub fn exact(head: &Redrafter) -> Option<Self> {
        Self::of(head, |weight| Some(Matrix::Whole(Packed::of(&weight.f_to_kind(Kind::Float).ok()?).ok()??)))
    }

    /// In fewer bits where there are vectors of such, so that they stay in a core's own cache from step to step. Guesses are rounded a
    /// little; what becomes of them is the network's business.
    pub fn narrow(head: &Redrafter) -> Option<Self> {
        let eight = |weight: &Tensor| {
            let Quantized { codes, scales, .. } = Quantized::of(weight, Scheme::INT8_DYNAMIC).ok()?;
            let whole = Integers::of(Width::Eight, &codes, &scales, codes.size()[1] as usize, Some(GROUP));
            whole.ok()?.map(Matrix::Eight)
        };
        VECTORS.then(|| Self::of(head, eight)).flatten().or_else(|| Self::exact(head))
    }

    fn of(head: &Redrafter, matrix: impl Fn(&Tensor) -> Option<Matrix>) -> Option<Self> {
        let product = |weight: &Tensor, bias: Option<&Tensor>| {
            let bias = match bias {
                Some(bias) => Some(Fixed::of(bias.f_to_kind(Kind::Float).ok()?.f_contiguous().ok()?)),
                None => None,
            };
            Some(Product { matrix: matrix(weight)?, bias })
        };
        let linear = |linear: &Linear| product(&linear.weight, linear.bias.as_ref());
        // The largest first: where kernels do not read it, nothing else is made.
        let last = product(head.head(), None)?;
        let recurrence = match head.recurrence() {
            Some((u, w)) => Some(product(&Tensor::f_cat(&[w, &u.weight], 1).ok()?, u.bias.as_ref())?),
            None => None,
        };
        let input = match head.input() {
            Some(input) => Some(linear(input)?),
            None => None,
        };
        let blocks = head.blocks().iter().map(linear).collect::<Option<_>>()?;
        Some(Self { input, blocks, head: last, recurrence })
    }

    /// The same weights under another handle.
    pub fn shallow_clone(&self) -> Self {
        Self {
            input: self.input.as_ref().map(Product::shallow_clone),
            blocks: self.blocks.iter().map(Product::shallow_clone).collect(),
            head: self.head.shallow_clone(),
            recurrence: self.recurrence.as_ref().map(Product::shallow_clone),
        }
    }

    pub fn bytes(&self) -> usize {
        self.input.iter().chain(&self.blocks).chain([&self.head]).chain(&self.recurrence).map(Product::bytes).sum()
    }
}

impl Product {
    fn shallow_clone(&self) -> Self {
        let matrix = match &self.matrix {
            Matrix::Whole(weight) => Matrix::Whole(weight.shallow_clone()),
            Matrix::Eight(weight) => Matrix::Eight(weight.shallow_clone()),
        };
        Self { matrix, bias: self.bias.as_ref().map(Fixed::shallow_clone) }
    }

    /// The product itself, without the bias.
    fn turn(&self, x: Rows, out: Rows, turns: &mut Turns) -> Option<()> {
        match &self.matrix {
            Matrix::Whole(weight) => weight.turn(x, out, turns),
            Matrix::Eight(weight) => weight.turn(x, out, turns),
        }
    }

    /// The bias, if it has one; `None` if kernels do not read it.
    fn bias(&self) -> Option<Option<Rows>> {
        self.bias.as_ref().map_or(Some(None), |bias| bias.rows().map(Some))
    }

    fn bytes(&self) -> usize {
        let matrix = match &self.matrix {
            Matrix::Whole(weight) => weight.bytes(),
            Matrix::Eight(weight) => weight.bytes(),
        };
        matrix + self.bias.as_deref().map_or(0, super::heads::bytes)
    }
}

/// As [`Redrafter::search_sure`], with a logarithm for the least probability; `None` if table or context are of a kind that the kernels
/// do not read.
pub fn search(
    head: &Redrafter,
    matrices: &Matrices,
    model: &Transformer,
    context: &Tensor,
    root: u32,
    shape: Shape,
    least: f32,
) -> Option<Search> {
    let mut stage = Stage::new(head, matrices, model, context, shape.width)?;
    // The beams that go on: what each has chosen, its score, the last choice, and the beam of the step before that it goes on from.
    let (mut beams, mut scores) = (vec![vec![]], vec![0f32]);
    let (mut last, mut parents) = (vec![root], vec![]);
    let mut ended: Vec<(Vec<u32>, f32)> = vec![];
    let mut steps = 0;
    while steps < shape.length && !last.is_empty() {
        steps += 1;
        let logits = stage.step(&last, &parents)?;
        let rows = logits.len() / last.len();
        let mut candidates: Vec<(f32, usize, usize)> = vec![];
        for (beam, logits) in logits.chunks_exact(rows).enumerate() {
            let best = best(logits, shape.width.min(KEPT as usize));
            let total = total(logits, best.first()?.0);
            candidates.extend(best.iter().map(|(logit, row)| (scores[beam] + logit - total, beam, *row)));
        }
        // Stable: of equal scores the earlier beam's and the better row's counts.
        candidates.sort_by(|a, b| b.0.total_cmp(&a.0));
        candidates.truncate(shape.width);
        let unsure = candidates.split_off(candidates.partition_point(|candidate| candidate.0 >= least));
        last = candidates.iter().map(|(_, _, row)| head.token(*row)).collect();
        parents = candidates.iter().map(|(_, beam, _)| *beam).collect();
        let tokens = |(parent, token): (&usize, &u32)| [beams[*parent].as_slice(), &[*token]].concat();
        let longer = parents.iter().zip(&last).map(tokens).collect();
        for (beam, (tokens, score)) in std::mem::replace(&mut beams, longer).into_iter().zip(scores).enumerate() {
            if unsure.iter().any(|candidate| candidate.1 == beam) && !parents.contains(&beam) {
                ended.push((tokens, score));
            }
        }
        scores = candidates.iter().map(|candidate| candidate.0).collect();
    }
    let all = beams.into_iter().zip(scores).chain(ended);
    let (beams, scores) = all.filter(|(tokens, _)| !tokens.is_empty()).unzip();
    Some(Search { beams, scores, steps })
}

/// `length` tokens one after another, each the one of the row that `choose` takes by its place and its logits, fewer where it takes none; `None` as for
/// [`search`].
pub fn follow(
    head: &Redrafter,
    matrices: &Matrices,
    model: &Transformer,
    context: &Tensor,
    root: u32,
    length: usize,
    mut choose: impl FnMut(usize, &[f32]) -> Option<usize>,
) -> Option<Vec<u32>> {
    let mut stage = Stage::new(head, matrices, model, context, 1)?;
    let (mut tokens, mut last) = (vec![], root);
    for place in 0..length {
        let logits = stage.step(&[last], if place == 0 { &[] } else { &[0] })?;
        let Some(row) = choose(place, logits) else { break };
        last = head.token(row);
        tokens.push(last);
    }
    Some(tokens)
}

/// What lies between a step's products, `[beams, ...]` each.
struct Stage<'a> {
    matrices: &'a Matrices,
    model: &'a Transformer,
    hidden: usize,
    exit: usize,
    /// A beam's last token's embedding, and the head's state before.
    from: Vec<f32>,
    /// The network's state, and the head's.
    x: Vec<f32>,
    y: Vec<f32>,
    inner: Vec<f32>,
    logits: Vec<f32>,
}

impl<'a> Stage<'a> {
    fn new(head: &Redrafter, matrices: &'a Matrices, model: &'a Transformer, context: &Tensor, width: usize) -> Option<Self> {
        let (settings, width) = (head.settings(), width.max(1));
        let (hidden, exit) = (settings.hidden_size, settings.exit_dim);
        let mut x = vec![0f32; width * 2 * hidden];
        let (first, others) = x.split_at_mut(2 * hidden);
        row(context, 0, &mut first[..hidden])?;
        others.chunks_exact_mut(2 * hidden).for_each(|x| x.copy_from_slice(first));
        let numbers = |each: usize| vec![0f32; width * each];
        let (from, y, inner) = (numbers(2 * hidden), numbers(exit), numbers(hidden.max(exit)));
        Some(Self { matrices, model, hidden, exit, from, x, y, inner, logits: numbers(settings.rows) })
    }

    /// Logits of the token behind each beam, `[beams, rows]`, from its last one and the beam before that it goes on from; at first from none.
    fn step(&mut self, tokens: &[u32], parents: &[usize]) -> Option<&[f32]> {
        let Self { matrices, hidden, exit, .. } = *self;
        let count = tokens.len();
        for (at, (token, from)) in tokens.iter().zip(self.from.chunks_exact_mut(2 * hidden)).enumerate() {
            let (embedding, state) = from.split_at_mut(hidden);
            row(self.model.embedding(), *token as usize, embedding)?;
            match parents.get(at) {
                Some(parent) => state.copy_from_slice(&self.x[(2 * parent + 1) * hidden..][..hidden]),
                None => state.fill(0.0),
            }
        }
        let rows = |numbers: &mut [f32], width: usize| Rows::of_numbers(&mut numbers[..count * width], width);
        let mut turns = Turns::default();
        let x = rows(&mut self.x, 2 * hidden);
        match &matrices.recurrence {
            Some(recurrence) => {
                let inner = rows(&mut self.inner, hidden);
                recurrence.turn(rows(&mut self.from, 2 * hidden), inner, &mut turns)?;
                activate(inner, recurrence.bias()?, None, x, hidden, &mut turns)?;
            }
            None => {
                for (from, x) in self.from.chunks_exact(2 * hidden).zip(self.x.chunks_exact_mut(2 * hidden)).take(count) {
                    let (embedding, state) = from.split_at(hidden);
                    x[hidden..].iter_mut().zip(embedding).zip(state).for_each(|((x, embedding), state)| *x = embedding + state);
                }
            }
        }
        let mut y = x;
        if let Some(input) = &matrices.input {
            y = rows(&mut self.y, exit);
            input.turn(x, y, &mut turns)?;
            if let Some(bias) = input.bias()? {
                add_bias(y, bias, &mut turns)?;
            }
        }
        for block in &matrices.blocks {
            let (inner, out) = (rows(&mut self.inner, exit), rows(&mut self.y, exit));
            block.turn(y, inner, &mut turns)?;
            activate(inner, block.bias()?, Some(y), out, 0, &mut turns)?;
            y = out;
        }
        let width = self.logits.len() / (self.x.len() / (2 * hidden));
        matrices.head.turn(y, rows(&mut self.logits, width), &mut turns)?;
        // SAFETY: all that the kernels were told of is the stage's own, or belongs to the matrices.
        unsafe { turns.run() };
        Some(&self.logits[..count * width])
    }
}

/// The `count` largest with their places, largest first; of equal ones the first.
pub(super) fn best(logits: &[f32], count: usize) -> Vec<(f32, usize)> {
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
