//! ReDrafter: a recurrent head whose beam search proposes candidates (Zhang et al., arXiv 2403.09919; `apple/ml-recurrent-drafting`).
//!
//! From `s₀ = 0` and the embedding `e_t` of each token, `s_t = silu(W e_t + U s_{t−1} + b)` (or `e_t + s_{t−1}` without the
//! recurrent weights); the next token's logits are `head([c; s_t])`, where `c` is the network's final hidden state behind the last
//! choice. Checkpoints are the authors' own. `draft_vocab_size` adds a trimmed vocabulary: the head then has so many rows, and
//! `d2t` says how far each row's token lies behind its row (EAGLE-3's convention).

use std::path::Path;

use super::chain::Chain;
use super::heads::{Folder, Linear, bytes, spec};
use super::search::Matrices;
use super::{Context, Draft, Drafter, search};
use crate::checkpoint::CheckpointError;
use crate::checkpoint::config::ModelConfig;
use crate::decode::autoregressive::adaptation::Shape;
use crate::decode::autoregressive::tree::Tree;
use crate::model::{ModelError, Source, TensorSpec, Transformer, linear};
use crate::tensor::{Device, Dtype, Kind, Placement, Tensor};

/// Candidates that a beam may go on with; the authors' `warp_logits` keeps so many and forgets the rest.
pub(super) const KEPT: i64 = 50;

/// Sizes and kind of a head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    pub hidden_size: usize,
    pub exit_dim: usize,
    pub layers: usize,
    /// Rows of the head: the model's vocabulary, or a part of it.
    pub rows: usize,
    /// Whether the rows are a part of the vocabulary, with `d2t` to say which.
    pub trimmed: bool,
    pub recurrent: bool,
}

impl Settings {
    /// Every tensor of the checkpoint, in the order in which [`Redrafter::new`] asks for them.
    pub fn manifest(&self) -> Vec<TensorSpec> {
        let Self { hidden_size: h, exit_dim: e, layers, rows, trimmed, recurrent } = *self;
        let mut specs = vec![];
        if 2 * h != e {
            specs.extend([spec("input_proj.weight", &[e, 2 * h]), spec("input_proj.bias", &[e])]);
        }
        for layer in 0..layers {
            specs.push(spec(format!("lm_head.{layer}.linear.weight"), &[e, e]));
            specs.push(spec(format!("lm_head.{layer}.linear.bias"), &[e]));
        }
        specs.push(spec(format!("lm_head.{layers}.weight"), &[rows, e]));
        if recurrent {
            specs.extend([spec("rnn_u.weight", &[h, h]), spec("rnn_u.bias", &[h]), spec("rnn_w.weight", &[h, h])]);
        }
        if trimmed {
            specs.push(spec("d2t", &[rows]));
        }
        specs
    }
}

/// A loaded head.
pub struct Redrafter {
    settings: Settings,
    input: Option<Linear>,
    blocks: Vec<Linear>,
    head: Tensor,
    /// `U` with its bias, and `W`.
    recurrence: Option<(Linear, Tensor)>,
    /// The token of each of the head's rows, where they are trimmed; on the device, and at hand.
    tokens: Option<Tensor>,
    ids: Option<Vec<u32>>,
}

/// Beams of one search: tokens behind the root, best beam first, and their logarithmic scores.
#[derive(Clone, Debug, PartialEq)]
pub struct Search {
    pub beams: Vec<Vec<u32>>,
    pub scores: Vec<f32>,
    /// Tokens that the head foresaw one after another.
    pub steps: usize,
}

struct FolderSource<'a> {
    folder: &'a Folder,
    placement: Placement,
}

impl Source for FolderSource<'_> {
    type Error = CheckpointError;

    fn tensor(&mut self, spec: &TensorSpec) -> Result<Tensor, CheckpointError> {
        let placement = if spec.name == "d2t" { Placement { dtype: Dtype::F32, ..self.placement } } else { self.placement };
        self.folder.tensor(&spec.name, placement)
    }
}

impl Redrafter {
    /// Reads the authors' layout and checks it against `model`.
    pub fn load(path: &Path, model: &ModelConfig, placement: Placement) -> Result<Self, CheckpointError> {
        let folder = Folder::open(path)?;
        folder.must_be("hidden_size", folder.number("hidden_size", 1 << 16)?, model.hidden_size)?;
        folder.must_be("vocab_size", folder.number("vocab_size", 1 << 22)?, model.vocab_size)?;
        let trimmed = folder.has("draft_vocab_size");
        let settings = Settings {
            hidden_size: model.hidden_size,
            exit_dim: folder.number("exit_dim", 1 << 17)?,
            layers: folder.number("num_draft_layers", 64)?,
            rows: if trimmed { folder.number("draft_vocab_size", model.vocab_size)? } else { model.vocab_size },
            trimmed,
            recurrent: folder.flag("rnn", false),
        };
        folder.check(&settings.manifest())?;
        // A head is small; on the CPU narrower numbers would save nothing.
        let dtype = if placement.device == Device::Cpu { Dtype::F32 } else { placement.dtype };
        let placement = Placement { dtype, ..placement };
        let head = Self::new(settings, &mut FolderSource { folder: &folder, placement })?;
        if let Some(tokens) = &head.tokens {
            let mut ids: Vec<i64> = Vec::try_from(&tokens.f_to_device(Device::Cpu)?)?;
            if ids.iter().any(|id| *id < 0 || *id >= model.vocab_size as i64) {
                return folder.wrong(format!("d2t leads outside the model's vocabulary of {}", model.vocab_size));
            }
            // Drawn chains must know what they were drawn from, token by token.
            ids.sort_unstable();
            if let Some(pair) = ids.windows(2).find(|pair| pair[0] == pair[1]) {
                return folder.wrong(format!("d2t leads to token {} from two rows", pair[0]));
            }
        }
        Ok(head)
    }

    /// Builds the head from `source`, which gives each tensor of the manifest. Autograd flows through.
    pub fn new<S: Source>(settings: Settings, source: &mut S) -> Result<Self, S::Error> {
        let mut specs = settings.manifest().into_iter();
        let mut next = || match specs.next() {
            Some(spec) => source.tensor(&spec),
            None => unreachable!("the manifest and the head list the same tensors"),
        };
        let mut linear = || -> Result<Linear, S::Error> { Ok(Linear { weight: next()?, bias: Some(next()?) }) };
        let input = if 2 * settings.hidden_size != settings.exit_dim { Some(linear()?) } else { None };
        let blocks = (0..settings.layers).map(|_| linear()).collect::<Result<_, _>>()?;
        let head = next()?;
        let recurrence =
            if settings.recurrent { Some((Linear { weight: next()?, bias: Some(next()?) }, next()?)) } else { None };
        let tokens = if settings.trimmed { Some(rows_to_tokens(&next()?)?) } else { None };
        let ids = tokens.as_ref().map(ids).transpose()?;
        Ok(Self { settings, input, blocks, head, recurrence, tokens, ids })
    }

    /// The same weights under another handle.
    pub fn shallow_clone(&self) -> Self {
        Self {
            settings: self.settings,
            input: self.input.as_ref().map(Linear::shallow_clone),
            blocks: self.blocks.iter().map(Linear::shallow_clone).collect(),
            head: self.head.shallow_clone(),
            recurrence: self.recurrence.as_ref().map(|(u, w)| (u.shallow_clone(), w.shallow_clone())),
            tokens: self.tokens.as_ref().map(Tensor::shallow_clone),
            ids: self.ids.clone(),
        }
    }

    pub fn settings(&self) -> Settings {
        self.settings
    }

    pub(super) fn input(&self) -> Option<&Linear> {
        self.input.as_ref()
    }

    pub(super) fn blocks(&self) -> &[Linear] {
        &self.blocks
    }

    pub(super) fn head(&self) -> &Tensor {
        &self.head
    }

    /// `U` with its bias, and `W`.
    pub(super) fn recurrence(&self) -> Option<(&Linear, &Tensor)> {
        self.recurrence.as_ref().map(|(u, w)| (u, w))
    }

    /// The token of a row of the head.
    pub(super) fn token(&self, row: usize) -> u32 {
        self.ids.as_ref().map_or(row as u32, |ids| ids[row])
    }

    /// The next state, `[rows, hidden]`, from the last tokens' embeddings and the state before; `None` is the state zero.
    pub fn advance(&self, embedding: &Tensor, state: Option<&Tensor>) -> Result<Tensor, ModelError> {
        let Some((u, w)) = &self.recurrence else {
            return Ok(match state {
                Some(state) => embedding.f_add(state)?,
                None => embedding.shallow_clone(),
            });
        };
        let input = linear(&embedding.f_to_kind(w.f_kind()?)?, w, None)?;
        let kept = match (state, &u.bias) {
            (Some(state), _) => u.forward(state)?,
            (None, Some(bias)) => bias.shallow_clone(),
            (None, None) => return Ok(input.f_silu()?),
        };
        Ok(input.f_add(&kept)?.f_silu()?)
    }

    /// Logits of the next token, `[rows, head rows]`, from the network's state and the head's, `[rows, hidden]` each.
    pub fn logits(&self, context: &Tensor, state: &Tensor) -> Result<Tensor, ModelError> {
        let mut x = Tensor::f_cat(&[&context.f_to_kind(state.f_kind()?)?, state], -1)?;
        if let Some(input) = &self.input {
            x = input.forward(&x)?;
        }
        for block in &self.blocks {
            x = block.residual(&x)?;
        }
        linear(&x.f_to_kind(self.head.f_kind()?)?, &self.head, None)
    }

    /// Embeddings of tokens `[rows]` from the model's table.
    pub fn embed(model: &Transformer, tokens: &Tensor) -> Result<Tensor, ModelError> {
        Ok(Tensor::f_embedding(model.embedding(), tokens, -1, false, false)?)
    }

    /// Rows of the head to tokens of the model.
    pub fn tokens(&self, rows: &Tensor) -> Result<Tensor, ModelError> {
        Ok(match &self.tokens {
            Some(tokens) => tokens.f_index_select(0, rows)?,
            None => rows.shallow_clone(),
        })
    }

    /// Probabilities over the head's rows, `[rows, head rows]`, spread over the model's vocabulary.
    pub fn spread(&self, probabilities: Tensor, vocab_size: usize) -> Result<Tensor, ModelError> {
        let Some(tokens) = &self.tokens else { return Ok(probabilities) };
        let shape = [probabilities.size()[0], vocab_size as i64];
        let zeros = Tensor::f_zeros(shape, (probabilities.f_kind()?, probabilities.device()))?;
        Ok(zeros.f_index_copy(1, tokens, &probabilities)?)
    }

    /// The `shape.width` best continuations of `root` by `shape.length` tokens. `context` is `[1, hidden]`.
    pub fn search(&self, model: &Transformer, context: &Tensor, root: u32, shape: Shape) -> Result<Search, ModelError> {
        self.search_sure(model, context, root, shape, 0.0)
    }

    /// Likewise, without candidates less probable than `least`: a beam ends before them. (Only where the kernels read the head: to
    /// look at a score on another device would take longer than to go on.) The matrices are prepared anew each time, which [`Beams`]
    /// does once.
    pub fn search_sure(
        &self,
        model: &Transformer,
        context: &Tensor,
        root: u32,
        shape: Shape,
        least: f64,
    ) -> Result<Search, ModelError> {
        self.search_by(Matrices::exact(self).as_ref(), model, context, root, (shape, least))
    }

    /// By `matrices`, where kernels read all of it.
    fn search_by(
        &self,
        matrices: Option<&Matrices>,
        model: &Transformer,
        context: &Tensor,
        root: u32,
        (shape, least): (Shape, f64),
    ) -> Result<Search, ModelError> {
        match matrices.and_then(|by| search::search(self, by, model, context, root, shape, least.ln() as f32)) {
            Some(found) => Ok(found),
            None => self.search_tensors(model, context, root, shape),
        }
    }

    /// [`Redrafter::search`] on whatever device the head is.
    pub fn search_tensors(&self, model: &Transformer, context: &Tensor, root: u32, shape: Shape) -> Result<Search, ModelError> {
        let device = context.device();
        let kept = KEPT.min(self.settings.rows as i64);
        let root = Tensor::f_from_slice(&[i64::from(root)])?.f_to_device(device)?;
        // One beam until the first choice: the others would be copies of it.
        let mut state = self.advance(&Self::embed(model, &root)?, None)?;
        let mut scores: Option<Tensor> = None;
        let mut steps: Vec<Tensor> = Vec::with_capacity(2 * shape.length);
        for step in 0..shape.length {
            let beams = state.size()[0];
            let logits = self.logits(&context.f_expand([beams, -1], false)?, &state)?.f_to_kind(Kind::Float)?;
            let (best, rows) = logits.f_topk(kept, -1, true, true)?;
            let mut total = best.f_log_softmax(-1, Kind::Float)?;
            if let Some(scores) = &scores {
                total = total.f_add(&scores.f_unsqueeze(1)?)?;
            }
            let width = (shape.width as i64).min(beams * kept);
            let (score, place) = total.f_view(-1)?.f_topk(width, 0, true, true)?;
            let tokens = self.tokens(&rows.f_view(-1)?.f_index_select(0, &place)?)?;
            let parents = place.f_div_scalar_mode(kept, "floor")?;
            if step + 1 < shape.length {
                state = self.advance(&Self::embed(model, &tokens)?, Some(&state.f_index_select(0, &parents)?))?;
            }
            scores = Some(score);
            steps.extend([tokens, parents]);
        }
        let Some(scores) = scores else { return Ok(Search { beams: vec![], scores: vec![], steps: 0 }) };
        let scores: Vec<f32> = Vec::try_from(&scores.f_to_device(Device::Cpu)?)?;
        let all = Tensor::f_cat(&steps, 0)?.f_to_device(Device::Cpu)?;
        Ok(Search { beams: trace(&Vec::<i64>::try_from(&all)?, &steps, scores.len()), scores, steps: shape.length })
    }

    pub fn bytes(&self) -> usize {
        let linears = self.input.iter().chain(&self.blocks).chain(self.recurrence.as_ref().map(|(u, _)| u));
        linears.map(Linear::bytes).sum::<usize>() + bytes(&self.head) + self.recurrence.as_ref().map_or(0, |(_, w)| bytes(w))
    }
}

/// `d2t` to the tokens themselves.
fn rows_to_tokens(offsets: &Tensor) -> Result<Tensor, ModelError> {
    let rows = Tensor::f_arange(offsets.size()[0], (Kind::Int64, offsets.device()))?;
    Ok(rows.f_add(&offsets.f_round()?.f_to_kind(Kind::Int64)?)?)
}

/// What a tensor of tokens holds. Those below 0 are no tokens, and refused by whoever knows the vocabulary.
fn ids(tokens: &Tensor) -> Result<Vec<u32>, ModelError> {
    let ids: Vec<i64> = Vec::try_from(&tokens.f_to_device(Device::Cpu)?)?;
    Ok(ids.into_iter().map(|id| u32::try_from(id).unwrap_or(u32::MAX)).collect())
}

/// The tokens of each beam, from each step's tokens and the beams that they go on from.
fn trace(flat: &[i64], steps: &[Tensor], width: usize) -> Vec<Vec<u32>> {
    let mut ends = Vec::with_capacity(steps.len());
    let mut end = 0;
    for step in steps {
        ends.push(end);
        end += step.size()[0] as usize;
    }
    let beam = |last: usize| {
        let (mut beam, mut at) = (vec![], last);
        for pair in ends.chunks(2).rev() {
            beam.push(flat[pair[0] + at] as u32);
            at = flat[pair[1] + at] as usize;
        }
        beam.reverse();
        beam
    };
    (0..width).map(beam).collect()
}

/// The head's beam search as a drafter.
pub struct Beams {
    head: Redrafter,
    matrices: Option<Matrices>,
}

impl Beams {
    /// Searches by matrices in fewer bits where that is faster. Guesses may differ from the head's own where two are nearly as good.
    pub fn new(head: Redrafter) -> Self {
        Self { matrices: Matrices::narrow(&head), head }
    }

    /// The head's tokens in a chain, by the same matrices.
    pub fn chain(&self) -> Chain {
        Chain::new(self.head.shallow_clone(), self.matrices.as_ref().map(Matrices::shallow_clone))
    }

    /// Searches by the head's own numbers.
    pub fn exact(head: Redrafter) -> Self {
        Self { matrices: Matrices::exact(&head), head }
    }
}

impl Drafter for Beams {
    fn draft(&self, context: &Context) -> Result<Draft, ModelError> {
        let (asked, root) = (context.asked, context.root());
        let matrices = self.matrices.as_ref();
        let found = self.head.search_by(matrices, context.model, context.hidden, root, (asked.shape, asked.least))?;
        let tree = Tree::from_beams(root, found.beams.iter().map(Vec::as_slice));
        Ok(Draft { tree, proposal: None, forwards: found.steps })
    }

    fn limit(&self) -> Shape {
        Shape { width: 4, length: 8 }
    }

    fn usual(&self) -> Shape {
        Shape { width: 4, length: 4 }
    }

    fn bytes(&self) -> usize {
        self.head.bytes() + self.matrices.as_ref().map_or(0, Matrices::bytes)
    }
}
