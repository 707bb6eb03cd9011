//! Autoregressive settings: what a request or a model may say, and what comes of it.

use serde::Deserialize;

use super::{GenerateOptions, Invalid, ModelInfo, invalid, sampling, whole};
use crate::decode::autoregressive::adaptation::Shape;
use crate::decode::autoregressive::{DrafterKind, Drafts, NODES_MAX, Parameters};
use crate::decode::canvas::Piece;
use crate::engine::scheduler::PREFILL_ROWS;
use crate::model::family::Attention;

/// Longest draft, whatever the drafter.
pub const DRAFT_LENGTH_MAX: u64 = 16;
/// Candidates side by side, at most.
pub const BEAM_WIDTH_MAX: u64 = 10;

/// Who drafts, if anyone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DrafterChoice {
    /// One token at a time.
    Off,
    Use(DrafterKind),
}

impl DrafterChoice {
    pub fn from_name(name: &str) -> Option<Self> {
        if name == "none" { Some(Self::Off) } else { DrafterKind::from_name(name).map(Self::Use) }
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Off => "none",
            Self::Use(kind) => kind.name(),
        }
    }
}

/// An autoregressive method's settings; also the form of `autoregressive` in `generation_config.json`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AutoregressiveOptions {
    #[serde(deserialize_with = "drafter_name")]
    pub drafter: Option<DrafterChoice>,
    /// Tokens of the longest draft.
    pub draft_length: Option<u64>,
    /// Candidates side by side in the widest draft.
    pub beam_width: Option<u64>,
    /// Draft less where that is faster; on unless said otherwise, save for drawn chains.
    pub adapt: Option<bool>,
    /// Forwards of one shape throughout.
    pub deterministic: Option<bool>,
    /// Never choose end-of-text.
    pub suppress_end: Option<bool>,
    /// Prompt tokens run at a time.
    pub prefill_chunk: Option<u64>,
}

fn drafter_name<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<DrafterChoice>, D::Error> {
    let Some(name) = Option::<String>::deserialize(deserializer)? else { return Ok(None) };
    DrafterChoice::from_name(&name).map(Some).ok_or_else(|| serde::de::Error::custom(format!("drafter '{name}' is not known")))
}

/// Why `model` cannot decode from left to right, if it cannot.
pub fn unsupported(model: &ModelInfo) -> Option<String> {
    (model.config.attention != Attention::Causal).then(|| "its attention is bidirectional".into())
}

/// The method's parameters. `given` tokens stand before what is to be written.
pub fn parameters(model: &ModelInfo, options: &GenerateOptions, given: usize, pieces: &[Piece]) -> Result<Parameters, Invalid> {
    let asked = &options.autoregressive;
    let defaults = match &model.generation.autoregressive {
        Some(json) => AutoregressiveOptions::deserialize(json)
            .or_else(|e| invalid("autoregressive", format!("the model's own settings: {e}")))?,
        None => AutoregressiveOptions::default(),
    };
    if given == 0 {
        return invalid("prompt", "there is no token to go on from: give a prompt of at least one");
    }
    let holes = pieces.iter().filter(|piece| matches!(piece, Piece::Hole(_))).count();
    if holes != 1 || !matches!(pieces.last(), Some(Piece::Hole(_))) {
        return invalid("template", "decoding from left to right fills one hole, at the end: use diffusion to fill others");
    }
    let mut sampling = sampling(model, &options.sampling)?;
    let ends = model.generation.eos_token_ids.clone();
    if asked.suppress_end.or(defaults.suppress_end).unwrap_or(false) {
        if ends.is_empty() {
            return invalid("suppress_end", "the model names no end-of-text token");
        }
        sampling.forbidden.extend(&ends);
    }
    let drafts = drafts(model, asked, &defaults, sampling.temperature)?;
    Ok(Parameters {
        ends,
        chunk: whole("prefill_chunk", asked.prefill_chunk.or(defaults.prefill_chunk), PREFILL_ROWS as u64)?
            .unwrap_or(PREFILL_ROWS),
        seed: options.sampling.seed.unwrap_or_else(rand::random),
        deterministic: asked.deterministic.or(defaults.deterministic).unwrap_or(false),
        drafts,
        sampling,
    })
}

fn drafts(
    model: &ModelInfo,
    asked: &AutoregressiveOptions,
    defaults: &AutoregressiveOptions,
    temperature: f64,
) -> Result<Option<Drafts>, Invalid> {
    let DrafterChoice::Use(drafter) = asked.drafter.or(defaults.drafter).unwrap_or(DrafterChoice::Off) else {
        let set = [
            ("draft_length", asked.draft_length.is_some()),
            ("beam_width", asked.beam_width.is_some()),
            ("adapt", asked.adapt.is_some()),
        ];
        return match set.into_iter().find(|(_, set)| *set) {
            Some((field, _)) => invalid(field, "nobody drafts: name a drafter too, or leave it unset"),
            None => Ok(None),
        };
    };
    let Some(info) = model.drafters.iter().find(|info| info.kind == drafter) else {
        let known: Vec<_> = model.drafters.iter().map(|info| info.kind.name()).collect();
        let reason = format!("model {} has no {}; it has {}", model.name, drafter.name(), known.join(", "));
        return invalid("drafter", reason);
    };
    let drawn = drafter == DrafterKind::Chain && temperature > 0.0;
    if drawn && asked.adapt == Some(true) {
        return invalid("adapt", "the text of a drawn chain depends on how long it is, and so would on timing: leave it unset");
    }
    let adapt = !drawn && asked.adapt.or(defaults.adapt).unwrap_or(true);
    let usual = if adapt { info.limit } else { info.usual };
    let length = whole("draft_length", asked.draft_length.or(defaults.draft_length), DRAFT_LENGTH_MAX)?;
    let width = whole("beam_width", asked.beam_width.or(defaults.beam_width), BEAM_WIDTH_MAX)?;
    let shape = Shape { width: width.unwrap_or(usual.width), length: length.unwrap_or(usual.length) };
    if shape.width > info.limit.width {
        return invalid("beam_width", format!("{} drafts at most {} side by side", drafter.name(), info.limit.width));
    }
    if shape.length > info.limit.length {
        return invalid("draft_length", format!("{} drafts at most {} tokens", drafter.name(), info.limit.length));
    }
    // The widest of the longest: what both together allow, within the bound on one forward.
    let length = shape.length.min((NODES_MAX - 1) / shape.width);
    Ok(Some(Drafts { drafter, shape: Shape { length, ..shape }, adapt }))
}
