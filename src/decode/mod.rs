//! Decoding as pure state machines: a [`Decoder`] says which [`Window`] it wants run, takes the statistics of the rows it asked
//! for, and answers with what changed. It knows nothing of devices, tokenizers, clients or other sequences.
//!
//! [`canvas`] tracks what is masked, fixed and committed; [`diffusion`] holds the masked-diffusion decoder and its rules,
//! [`autoregressive`] the decoder from left to right, with its drafts and their verification.

pub mod autoregressive;
pub mod canvas;
pub mod diffusion;

use crate::model::family::Attention;

/// One forward pass that a sequence asks for: query tokens, who sees whom among them, what becomes of their keys, and the rows
/// it wants to know about.
#[derive(Clone, Debug, PartialEq)]
pub struct Window {
    /// `[seq]` token ids. Without a cache they are the whole sequence; with one, what follows the positions kept in it.
    pub tokens: Vec<u32>,
    pub pattern: Pattern,
    pub purpose: Purpose,
    pub wanted: Wanted,
    /// Classifier-free guidance: a second sequence of the same length, run beside the first.
    pub guidance: Option<Guidance>,
    pub sampling: Sampling,
    pub noise: Noise,
    /// Asks for a forward of its own where rows that are run together depend on one another (the deterministic mode).
    pub alone: bool,
    /// Tokens before each wanted row, where penalties ask for them: `(token, occurrences in the prompt, occurrences since)`.
    pub histories: Vec<Vec<(u32, u32, u32)>>,
}

/// Which query tokens see which, and whether they follow a cache.
#[derive(Clone, Debug, PartialEq)]
pub enum Pattern {
    /// A whole sequence, nothing kept.
    Whole(Attention),
    /// The next tokens of a cached sequence, in order.
    Next,
    /// Candidates for the next tokens: the parent of each, the first being the root.
    Tree(Vec<usize>),
    /// The next tokens in order, filled up to so many rows and looking at the whole cache: the same shapes whatever is asked.
    Canonical(usize),
    /// Tokens at the positions from `start` on, whose keys are written to the cache there; each sees so many positions from the left.
    /// A block over what is kept, a suffix over a prefix, or a block amid the whole canvas, whose old keys it replaces.
    Span { start: usize, sees: Vec<usize> },
}

/// What a forward is for, as its cost is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    Denoise,
    Prefill,
    /// One token from one token.
    Decode,
    /// Tokens from drafts.
    Verify,
}

/// Rows of logits that a window wants statistics of.
#[derive(Clone, Debug, PartialEq)]
pub enum Wanted {
    /// What predicts the tokens at these positions, ascending. The runner finds each one's row: in shifted families that of the
    /// position before it.
    Positions(Vec<u32>),
    /// What follows each of these query tokens (indices into [`Window::tokens`]).
    Following(Vec<usize>),
}

/// Where the chance in sampled tokens comes from.
#[derive(Clone, Debug, PartialEq)]
pub enum Noise {
    /// One number from 0 to 1 for each wanted row, which picks from the cumulated distribution. Rows that would predict the same
    /// position have the same number, so that drafts never change what a seed gives.
    Uniforms(Vec<f64>),
    /// Likewise by numbers that this seeds, which is a function of the request's seed and the step alone.
    Seed(u64),
    /// There is none: these are the tokens, one for each wanted row, however probable they are.
    Given(Vec<u32>),
}

/// Logits become `unconditional + (scale + 1) · (conditional − unconditional)` (LLaDA, `generate.py`).
#[derive(Clone, Debug, PartialEq)]
pub struct Guidance {
    /// The sequence with its prompt masked.
    pub unconditional: Vec<u32>,
    pub scale: f64,
}

/// How a row of logits becomes a token and a confidence.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sampling {
    /// 0 takes the most probable token; above, one is drawn.
    pub temperature: f64,
    pub top_k: Option<u32>,
    pub top_p: Option<f64>,
    /// Tokens less probable than this share of the best one's probability are out.
    pub min_p: Option<f64>,
    /// Added to the logits of these tokens.
    pub logit_bias: Vec<(u32, f32)>,
    /// Never chosen, and without probability: the mask token, and whatever else a request rules out.
    pub forbidden: Vec<u32>,
    /// Chosen as usual, but without probability when confidences are taken, so that they come late.
    pub unconfident: Vec<u32>,
    /// Confidence under the distribution that was drawn from (Dream), not under the plain one (LLaDA).
    pub filtered_confidence: bool,
    pub margin: bool,
    pub entropy: bool,
    pub penalties: Penalties,
    /// So many of the most probable tokens are told beside the chosen one.
    pub alternatives: u32,
}

/// What tokens that have occurred lose. The defaults change nothing.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Penalties {
    /// Logits above 0 are divided by it, others multiplied, if the token occurs in prompt or text (CTRL, arXiv 1909.05858).
    pub repetition: f64,
    /// Taken off if the token occurs in the text.
    pub presence: f64,
    /// Taken off for each time that it does.
    pub frequency: f64,
}

impl Default for Penalties {
    fn default() -> Self {
        Self { repetition: 1.0, presence: 0.0, frequency: 0.0 }
    }
}

impl Penalties {
    pub fn any(&self) -> bool {
        *self != Self::default()
    }
}

/// What decoding needs to know of one row of logits. Everything over the vocabulary stays on the device.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RowStatistics {
    /// The token chosen: the best one, or the one drawn.
    pub token: u32,
    /// Its probability, 0 to 1.
    pub confidence: f64,
    /// Probability of the best token less that of the second best; 0 unless asked for.
    pub margin: f64,
    /// Entropy of the distribution in nats; 0 unless asked for.
    pub entropy: f64,
    /// The most probable tokens and the logarithms of their probabilities, as many as were asked for, best first.
    pub alternatives: Vec<(u32, f64)>,
}

/// What became of one cell of the canvas in a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// The current guess for a cell that is still masked.
    Provisional,
    /// Final, unless a later edit or remasking says otherwise.
    Committed,
    /// A committed cell got another token.
    Edited,
    /// A committed cell is masked again.
    Remasked,
}

/// One cell's change. `position` counts from the start of the canvas.
#[derive(Clone, Debug, PartialEq)]
pub struct Edit {
    pub position: usize,
    pub token: u32,
    pub status: Status,
    pub confidence: f64,
    /// As in [`RowStatistics::alternatives`].
    pub alternatives: Vec<(u32, f64)>,
}

/// What one step did.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Step {
    /// Counts from 0.
    pub step: usize,
    pub block: usize,
    pub edits: Vec<Edit>,
}

/// Why a sequence ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// End-of-text, with everything before it committed, or a stop string.
    Stop,
    /// The canvas is full.
    Length,
}

/// A sequence being decoded.
pub trait Decoder: Send {
    /// The next forward pass. Called only while [`Decoder::finished`] is `None`.
    fn window(&self) -> Window;

    /// Takes the statistics of the rows that [`Decoder::window`] wanted, in its order.
    fn advance(&mut self, rows: &[RowStatistics]) -> Step;

    fn finished(&self) -> Option<FinishReason>;

    fn canvas(&self) -> &canvas::Canvas;

    /// Positions that a cache must have room for; 0 where whole sequences are run.
    fn cache_room(&self) -> usize {
        0
    }

    /// Whether what the cache holds of the beginning depends on the tokens there alone, so that another sequence's will do.
    fn resumable(&self) -> bool {
        false
    }

    /// Told before its first window that the cache holds so many of its tokens already.
    fn resume(&mut self, _cached: usize) {}

    /// Indices of the last window's tokens whose keys stay in the cache, in the order of their positions.
    fn kept(&self) -> &[usize] {
        &[]
    }

    /// What a drafter should be asked before the next window.
    fn drafting(&mut self) -> Option<Drafting> {
        None
    }

    /// Candidates for what follows the last committed token; a drafter need not have any.
    fn propose(&mut self, _candidates: autoregressive::tree::Tree) {}

    /// Told what the last window's forward (if it ran by itself) and the drafting behind it took, in seconds: timing is somebody
    /// else's, as data.
    fn timed(&mut self, _forward: Option<f64>, _draft: f64) {}

    /// What has been learnt about the drafter.
    fn adaptation(&self) -> Option<&autoregressive::adaptation::Adaptation> {
        None
    }

    /// What drafting has come to so far.
    fn speculation(&self) -> Option<&autoregressive::Speculation> {
        None
    }
}

/// A question to a drafter: candidates for what follows the sequence so far.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Drafting {
    pub drafter: autoregressive::DrafterKind,
    /// Row, among the last window's wanted ones, after which the last committed token was chosen.
    pub row: usize,
    /// The widest and longest draft.
    pub shape: autoregressive::adaptation::Shape,
    /// Candidates that a drafter thinks less probable than this, their prefix included, are better left out; 0 keeps them all.
    pub least: f64,
    /// For drafters that draw their candidates: how, and from which stream.
    pub temperature: f64,
    pub seed: u64,
}

/// The finaliser of SplitMix64 (Steele et al., OOPSLA 2014): every bit of the input moves every bit of the result, so that a
/// generator that takes 32 bits of its seed still tells all requests and steps apart.
fn mix(seed: u64) -> u64 {
    let z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
