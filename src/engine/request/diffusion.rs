//! Diffusion's settings: what a request or a model may say, and what comes of it.

use serde::Deserialize;

use super::{CFG_SCALE_MAX, GenerateOptions, Invalid, ModelInfo, STEPS_MAX, TEMPERATURE_MAX, invalid, number, sampling, whole};
use crate::decode::canvas::{Canvas, Piece};
use crate::decode::diffusion::block::SubBlocks;
use crate::decode::diffusion::cache::{Cache, CacheKind};
use crate::decode::diffusion::select::Order;
use crate::decode::diffusion::{Commit, EndOfText, Parameters};
use crate::model::family::Attention;

/// How counts are spread over steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Schedule {
    Linear,
    Timesteps,
}

/// A diffusion method's settings; also the form of `diffusion` in `generation_config.json`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DiffusionOptions {
    pub steps: Option<u64>,
    pub block_length: Option<u64>,
    pub schedule: Option<Schedule>,
    pub eps: Option<f64>,
    /// Reveal each cell on its own in the timestep schedule (Dream's `origin`).
    pub independent: Option<bool>,
    #[serde(with = "order_name")]
    pub order: Option<Order>,
    pub order_temperature: Option<f64>,
    pub threshold: Option<f64>,
    pub factor: Option<f64>,
    pub entropy_bound: Option<f64>,
    pub cfg_scale: Option<f64>,
    /// Keys used again within a block; off unless said otherwise.
    pub cache: Option<CacheChoice>,
    /// Forwards that nobody else's tokens share, where that could change a rounding.
    pub deterministic: Option<bool>,
    /// End once end-of-text stands with nothing masked before it; on unless said otherwise.
    pub finish_early: Option<bool>,
    /// Never choose end-of-text (LLaDA's `logits_eos_inf`).
    pub suppress_end: Option<bool>,
    /// Choose end-of-text late (LLaDA's `confidence_eos_eot_inf`).
    pub late_end: Option<bool>,
}

/// Whether, and how, keys are used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CacheChoice {
    Off,
    Prefix,
    Dual,
}

impl CacheChoice {
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::Off, Self::Prefix, Self::Dual].into_iter().find(|choice| choice.name() == name)
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Prefix => "prefix",
            Self::Dual => "dual",
        }
    }

    fn kind(self) -> Option<CacheKind> {
        match self {
            Self::Off => None,
            Self::Prefix => Some(CacheKind::Prefix),
            Self::Dual => Some(CacheKind::Dual),
        }
    }
}

mod order_name {
    use super::Order;
    use serde::{Deserialize, Deserializer, de::Error};

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Order>, D::Error> {
        let Some(name) = Option::<String>::deserialize(deserializer)? else { return Ok(None) };
        super::order(&name).map(Some).ok_or_else(|| D::Error::custom(format!("order '{name}' is not known")))
    }
}

/// An order by its name.
pub fn order(name: &str) -> Option<Order> {
    Some(match name {
        "confidence" => Order::Confidence,
        "margin" => Order::Margin,
        "entropy" => Order::Entropy,
        "random" => Order::Random,
        "left_to_right" => Order::LeftToRight,
        _ => return None,
    })
}

/// The method's parameters for a canvas laid out as `pieces`.
pub fn parameters(
    model: &ModelInfo,
    options: &GenerateOptions,
    canvas: &Canvas,
    pieces: &[Piece],
) -> Result<Parameters, Invalid> {
    let sampling = &options.sampling;
    let penalties = [
        ("repetition_penalty", sampling.repetition_penalty, 1.0),
        ("presence_penalty", sampling.presence_penalty, 0.0),
        ("frequency_penalty", sampling.frequency_penalty, 0.0),
    ];
    if let Some((field, ..)) = penalties.iter().find(|(_, value, neutral)| value.is_some_and(|value| value != *neutral)) {
        return invalid(field, "diffusion cannot honour it, because later tokens may come first: leave it unset");
    }
    let mut defaults = match &model.generation.diffusion {
        Some(json) => {
            DiffusionOptions::deserialize(json).or_else(|e| invalid("diffusion", format!("the model's own settings: {e}")))?
        }
        None => DiffusionOptions::default(),
    };
    if let Some(blocks) = model.config.family.blocks.as_ref().filter(|_| model.config.block_length.is_some()) {
        let rule = defaults.steps.is_some() || defaults.factor.is_some() || defaults.entropy_bound.is_some();
        defaults.threshold = defaults.threshold.or((!rule).then_some(blocks.threshold));
    }
    if fixed_behind_hole(pieces) {
        // An end-of-text inside a hole would cut off the fixed text behind it, so it is not chosen unless a request insists.
        defaults.suppress_end = defaults.suppress_end.or(Some(!model.generation.eos_token_ids.is_empty()));
    }
    let parameters = settings(model, options, defaults, canvas.len())?;
    let whole = canvas.sequence().len().next_multiple_of(parameters.block_length);
    if model.config.block_length.is_some() && whole > model.context {
        let field = if options.template.is_empty() { "max_new_tokens" } else { "template" };
        let reason = format!("prompt and canvas fill blocks of {whole} tokens, the model's context is {}", model.context);
        return invalid(field, reason);
    }
    if let Commit::Linear { steps } | Commit::Timesteps { steps, .. } | Commit::Dynamic { steps, .. } = parameters.commit {
        let blocks = match (model.config.block_length, parameters.sub_blocks) {
            (None, _) => canvas.blocks_to_fill(parameters.block_length),
            (Some(_), sub) => canvas.units_to_fill(sub.map_or(parameters.block_length, |sub| sub.length)),
        };
        if steps < blocks {
            return invalid("steps", format!("{steps} steps cannot fill {blocks} blocks: ask for more, or for longer blocks"));
        }
    }
    Ok(parameters)
}

/// Why `model` cannot do diffusion, if it cannot.
pub fn unsupported(model: &ModelInfo) -> Option<String> {
    match &model.mask_token_id {
        Err(reason) => Some(reason.clone()),
        Ok(_) if model.config.attention == Attention::Causal => {
            Some("its attention is causal; a masked model on this body says \"is_causal\": false in its config.json".into())
        }
        Ok(_) => None,
    }
}

fn fixed_behind_hole(pieces: &[Piece]) -> bool {
    let first = pieces.iter().position(|piece| matches!(piece, Piece::Hole(_)));
    first.is_some_and(|first| pieces[first..].iter().any(|piece| matches!(piece, Piece::Fixed(ids) if !ids.is_empty())))
}

fn settings(
    model: &ModelInfo,
    options: &GenerateOptions,
    defaults: DiffusionOptions,
    canvas: usize,
) -> Result<Parameters, Invalid> {
    let asked = &options.diffusion;
    // A request that says how to commit replaces the model's default rule as a whole; order and the rest fall back one by one.
    let rules = [asked.steps.is_some(), asked.threshold.is_some(), asked.factor.is_some(), asked.entropy_bound.is_some()];
    let rules = rules.iter().filter(|set| **set).count();
    // SDAR's dynamic rule is both: by threshold, and no slower than the steps.
    let dynamic = model.config.block_length.is_some() && rules == 2 && asked.steps.is_some() && asked.threshold.is_some();
    if rules > 1 && !dynamic {
        return invalid("diffusion", "steps, threshold, factor and entropy_bound exclude one another");
    }
    let rule = if rules > 0 { asked } else { &defaults };
    let order = asked.order.or(defaults.order).unwrap_or(Order::Confidence);
    let commit = commit(asked, rule, &defaults, order, canvas)?;
    let ends = model.generation.eos_token_ids.clone();
    let need_ends = |field: &'static str, set: Option<bool>| match set.unwrap_or(false) && ends.is_empty() {
        true => invalid(field, "the model names no end-of-text token"),
        false => Ok(set.unwrap_or(false)),
    };
    let mut sampling = sampling(model, &options.sampling)?;
    if need_ends("suppress_end", asked.suppress_end.or(defaults.suppress_end))? {
        sampling.forbidden.extend(&ends);
    }
    if need_ends("late_end", asked.late_end.or(defaults.late_end))? {
        sampling.unconfident.clone_from(&ends);
    }
    // Dream and the block-causal families draw and judge under the same filtered distribution; LLaDA judges under the plain one.
    sampling.filtered_confidence = model.config.shift || model.config.block_length.is_some();
    sampling.margin = order == Order::Margin;
    sampling.entropy = order == Order::Entropy || matches!(commit, Commit::EntropyBound(_));
    let block_length = whole("block_length", asked.block_length.or(defaults.block_length), u64::from(u32::MAX))?;
    let cfg_scale = number("cfg_scale", asked.cfg_scale.or(defaults.cfg_scale), 0.0..=CFG_SCALE_MAX)?.unwrap_or(0.0);
    let cache = asked.cache.or(defaults.cache);
    if cfg_scale != 0.0 && cache.is_some_and(|cache| cache != CacheChoice::Off) {
        return invalid("cache", "guidance runs whole sequences: leave one of cache and cfg_scale unset");
    }
    let (block_length, sub_blocks, cache) = match model.config.block_length {
        None => {
            let cache = cache.and_then(CacheChoice::kind).map(|kind| Cache { kind, lead: usize::from(model.config.shift) });
            (block_length.unwrap_or(canvas).min(canvas), None, cache)
        }
        Some(length) if block_length.is_some_and(|asked| asked != length) => {
            return invalid("block_length", format!("the model was trained on blocks of {length} tokens: leave it unset"));
        }
        Some(_) if cfg_scale != 0.0 => {
            return invalid("cfg_scale", "guidance runs whole sequences, a block-causal model never does: leave it unset");
        }
        Some(length) => (length, sub_blocks(model, length, cache)?, None),
    };
    Ok(Parameters {
        block_length,
        sub_blocks,
        order,
        order_temperature: number(
            "order_temperature",
            asked.order_temperature.or(defaults.order_temperature),
            0.0..=TEMPERATURE_MAX,
        )?
        .unwrap_or(0.0),
        commit,
        cfg_scale,
        cache,
        anew: model.config.block_length.is_some() && asked.cache.or(defaults.cache) == Some(CacheChoice::Off),
        deterministic: asked.deterministic.or(defaults.deterministic).unwrap_or(false),
        sampling,
        end_of_text: EndOfText { ids: ends, finish_early: asked.finish_early.or(defaults.finish_early).unwrap_or(true) },
        seed: options.sampling.seed.unwrap_or_else(rand::random),
    })
}

/// The model's own sub-blocks, in blocks of `length`; a request only says whether their keys are used again.
fn sub_blocks(model: &ModelInfo, length: usize, cache: Option<CacheChoice>) -> Result<Option<SubBlocks>, Invalid> {
    let usual = model.config.family.blocks.as_ref().and_then(|blocks| blocks.sub_block);
    let sub = model.generation.sub_block_length.or(usual.map(|usual| usual.min(length)));
    match (sub, cache) {
        (Some(sub), _) if !length.is_multiple_of(sub) => {
            invalid("sub_block_length", format!("blocks of {length} tokens do not divide into parts of {sub}"))
        }
        (Some(sub), None | Some(CacheChoice::Off | CacheChoice::Dual)) => {
            Ok(Some(SubBlocks { length: sub, cached: cache == Some(CacheChoice::Dual) }))
        }
        (None, None | Some(CacheChoice::Off)) => Ok(None),
        (Some(_), Some(CacheChoice::Prefix)) => {
            invalid("cache", "the model keeps what is before a block anyway: use dual to run parts of a block alone")
        }
        (None, Some(_)) => {
            invalid("cache", "the model keeps what is before a block anyway, and its blocks have no parts: leave it unset")
        }
    }
}

fn commit(
    asked: &DiffusionOptions,
    rule: &DiffusionOptions,
    defaults: &DiffusionOptions,
    order: Order,
    canvas: usize,
) -> Result<Commit, Invalid> {
    let counted = rule.threshold.is_none() && rule.factor.is_none() && rule.entropy_bound.is_none();
    for (field, set) in
        [("schedule", asked.schedule.is_some()), ("eps", asked.eps.is_some()), ("independent", asked.independent.is_some())]
    {
        if set && !counted {
            return invalid(field, "it goes with steps only");
        }
    }
    let compares = rule.threshold.is_some() || rule.factor.is_some();
    if compares && asked.order_temperature.or(defaults.order_temperature).is_some_and(|temperature| temperature != 0.0) {
        return invalid("order_temperature", "threshold and factor compare probabilities, not drawn scores: leave it unset");
    }
    if compares && !matches!(order, Order::Confidence | Order::Margin) {
        return invalid("order", "threshold and factor compare probabilities: use order confidence or margin with them");
    }
    if let Some(threshold) = number("threshold", rule.threshold, 0.0..=1.0)? {
        return Ok(match whole("steps", rule.steps, STEPS_MAX)? {
            Some(steps) => Commit::Dynamic { threshold, steps },
            None => Commit::Threshold(threshold),
        });
    }
    if let Some(factor) = number("factor", rule.factor, 0.0..=1000.0)? {
        return Ok(Commit::Factor(factor));
    }
    if let Some(bound) = number("entropy_bound", rule.entropy_bound, 0.0..=1000.0)? {
        return Ok(Commit::EntropyBound(bound));
    }
    let steps = whole("steps", rule.steps, STEPS_MAX)?.unwrap_or(canvas);
    let eps = number("eps", asked.eps.or(defaults.eps), 0.0..=0.5)?;
    let independent = asked.independent.or(defaults.independent);
    match asked.schedule.or(defaults.schedule).unwrap_or(Schedule::Linear) {
        Schedule::Timesteps => {
            Ok(Commit::Timesteps { steps, eps: eps.unwrap_or(1e-3), independent: independent.unwrap_or(false) })
        }
        Schedule::Linear if asked.eps.is_some() => invalid("eps", "it goes with the timestep schedule only"),
        Schedule::Linear if asked.independent == Some(true) => {
            invalid("independent", "it goes with the timestep schedule only")
        }
        Schedule::Linear => Ok(Commit::Linear { steps }),
    }
}
