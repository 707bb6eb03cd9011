//! Decoding as pure state machines: a [`Decoder`] says which [`Window`] it wants run, takes the statistics of the rows it asked
//! for, and answers with what changed. It knows nothing of devices, tokenizers, clients or other sequences.
//!
//! [`canvas`] tracks what is masked, fixed and committed; [`diffusion`] holds the masked-diffusion decoder and its rules.

pub mod canvas;
pub mod diffusion;

use crate::model::family::Attention;

/// One forward pass that a sequence asks for: query tokens, who sees whom among them, and the rows it wants to know about.
///
/// The query is the whole sequence from position 0; key/value caching will add where it starts and what becomes of its keys.
#[derive(Clone, Debug, PartialEq)]
pub struct Window {
    /// `[seq]` token ids.
    pub tokens: Vec<u32>,
    pub attention: Attention,
    /// Positions whose token is to be predicted, ascending. The runner finds each one's row of logits: in shifted families
    /// that of the position before it.
    pub positions: Vec<u32>,
    /// Classifier-free guidance: a second sequence of the same length, run beside the first.
    pub guidance: Option<Guidance>,
    pub sampling: Sampling,
    /// Seeds the noise of this step; a function of the request's seed and the step alone.
    pub noise_seed: u64,
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
    /// 0 takes the most probable token; above, one is drawn with Gumbel noise.
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
}

/// What decoding needs to know of one row of logits. Everything over the vocabulary stays on the device.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RowStatistics {
    /// The token chosen: the best one, or the one drawn.
    pub token: u32,
    /// Its probability, 0 to 1.
    pub confidence: f64,
    /// Probability of the best token less that of the second best; 0 unless asked for.
    pub margin: f64,
    /// Entropy of the distribution in nats; 0 unless asked for.
    pub entropy: f64,
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
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Edit {
    pub position: usize,
    pub token: u32,
    pub status: Status,
    pub confidence: f64,
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
}
