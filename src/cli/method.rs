//! Flags that say how to decode, turned into the options that any front end can express. What they mean together is not checked
//! here: [`crate::engine::request::validate`] does that, for the service too.

use clap::Args;
use serde::Deserialize;

use crate::decode::diffusion::select::Order;
use crate::engine::request::{
    AutoregressiveOptions, CacheChoice, DiffusionOptions, DrafterChoice, MethodKind, SamplingOptions, Schedule, TemplatePiece,
    order,
};

/// How the canvas is filled. Unset means the model's own default.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Diffusion")]
pub struct DiffusionFlags {
    /// Commit in equal parts over so many steps
    #[arg(long, value_name = "N", group = "rule")]
    steps: Option<u64>,
    /// Commit every cell whose score reaches this, and at least one
    #[arg(long, value_name = "P", group = "rule")]
    threshold: Option<f64>,
    /// Commit the n best cells while (n + 1)(1 - score of the n-th) stays below this
    #[arg(long, value_name = "F", group = "rule")]
    factor: Option<f64>,
    /// Commit the best cells while their entropies, save the largest, sum to at most this
    #[arg(long, value_name = "NATS", group = "rule")]
    entropy_bound: Option<f64>,
    /// Cells of a block; blocks are filled from left to right
    #[arg(long, value_name = "N")]
    block_length: Option<u64>,
    /// How --steps spreads: linear or timesteps
    #[arg(long, value_parser = schedule)]
    schedule: Option<Schedule>,
    /// Last timestep
    #[arg(long)]
    eps: Option<f64>,
    /// Reveal each cell on its own in the timestep schedule
    #[arg(long)]
    independent: bool,
    /// What comes first: confidence, margin, entropy, random or left_to_right
    #[arg(long, value_parser = order_flag)]
    order: Option<Order>,
    /// Draw the order by softmax(score / T)
    #[arg(long, value_name = "T")]
    order_temperature: Option<f64>,
    /// Scale of classifier-free guidance; 0 is off
    #[arg(long, value_name = "SCALE")]
    cfg_scale: Option<f64>,
    /// Use keys again within a block: off, prefix or dual. Faster, but not exact
    #[arg(long, value_parser = cache)]
    cache: Option<CacheChoice>,
    /// Go on filling behind a finished text
    #[arg(long)]
    no_finish_early: bool,
    /// Never choose end-of-text; with --method autoregressive too
    #[arg(long)]
    suppress_end: bool,
    /// Choose end-of-text late
    #[arg(long)]
    late_end: bool,
}

/// What a request is told of either method. One flag is both methods': it goes where the method is.
pub fn methods(
    diffusion: &DiffusionFlags,
    autoregressive: &AutoregressiveFlags,
) -> (Option<MethodKind>, DiffusionOptions, AutoregressiveOptions) {
    let method = autoregressive.method();
    let (mut diffusion, mut autoregressive) = (diffusion.options(), autoregressive.options());
    if method == Some(MethodKind::Autoregressive) {
        autoregressive.suppress_end = diffusion.suppress_end.take();
    }
    (method, diffusion, autoregressive)
}

impl DiffusionFlags {
    fn options(&self) -> DiffusionOptions {
        let set = |flag: bool| flag.then_some(true);
        DiffusionOptions {
            steps: self.steps,
            block_length: self.block_length,
            schedule: self.schedule,
            eps: self.eps,
            independent: set(self.independent),
            order: self.order,
            order_temperature: self.order_temperature,
            threshold: self.threshold,
            factor: self.factor,
            entropy_bound: self.entropy_bound,
            cfg_scale: self.cfg_scale,
            finish_early: self.no_finish_early.then_some(false),
            suppress_end: set(self.suppress_end),
            late_end: set(self.late_end),
            cache: self.cache,
            deterministic: None,
        }
    }
}

/// Decoding from left to right. Unset means the model's own default.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Autoregressive")]
pub struct AutoregressiveFlags {
    /// diffusion or autoregressive [default: diffusion if the model can]
    #[arg(long, value_parser = method)]
    method: Option<MethodKind>,
    /// Who drafts: none, redrafter, medusa, chain or lookup
    #[arg(long, value_name = "NAME", value_parser = drafter)]
    drafter: Option<DrafterChoice>,
    #[command(flatten)]
    drafts: DraftFlags,
}

impl AutoregressiveFlags {
    fn options(&self) -> AutoregressiveOptions {
        AutoregressiveOptions { drafter: self.drafter, ..self.drafts.options() }
    }

    /// The method asked for; a drafter says it too.
    fn method(&self) -> Option<MethodKind> {
        self.method.or(self.drafter.map(|_| MethodKind::Autoregressive))
    }
}

/// How drafts are made, whoever makes them.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Autoregressive")]
pub struct DraftFlags {
    /// Tokens of the longest draft
    #[arg(long, value_name = "N")]
    draft_length: Option<u64>,
    /// Candidates side by side in the widest draft
    #[arg(long, value_name = "N")]
    beam_width: Option<u64>,
    /// Always draft as much as that, whether it pays or not
    #[arg(long)]
    no_adapt: bool,
    /// Run every step in forwards of one shape, so that drafts cannot change a text by as much as a rounding
    #[arg(long)]
    deterministic: bool,
    /// Prompt tokens run at a time, at most 512
    #[arg(long, value_name = "N")]
    prefill_chunk: Option<u64>,
}

impl DraftFlags {
    pub fn options(&self) -> AutoregressiveOptions {
        AutoregressiveOptions {
            drafter: None,
            draft_length: self.draft_length,
            beam_width: self.beam_width,
            adapt: self.no_adapt.then_some(false),
            deterministic: self.deterministic.then_some(true),
            suppress_end: None,
            prefill_chunk: self.prefill_chunk,
        }
    }
}

/// How tokens are chosen. Unset means the model's own default.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Sampling")]
pub struct SamplingFlags {
    /// 0 takes the most probable token
    #[arg(long, value_name = "T")]
    temperature: Option<f64>,
    #[arg(long, value_name = "P")]
    top_p: Option<f64>,
    #[arg(long, value_name = "K")]
    top_k: Option<u32>,
    #[arg(long, value_name = "P")]
    min_p: Option<f64>,
    /// Divides the logits of tokens that have occurred; autoregressive only
    #[arg(long, value_name = "P")]
    repetition_penalty: Option<f64>,
    /// Taken off the logits of tokens that occur in the text; autoregressive only
    #[arg(long, value_name = "P")]
    presence_penalty: Option<f64>,
    /// Likewise, for each time
    #[arg(long, value_name = "P")]
    frequency_penalty: Option<f64>,
    /// The same seed gives the same text
    #[arg(long)]
    seed: Option<u64>,
}

impl SamplingFlags {
    pub fn options(&self) -> SamplingOptions {
        SamplingOptions {
            temperature: self.temperature,
            top_p: self.top_p,
            top_k: self.top_k,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            presence_penalty: self.presence_penalty,
            frequency_penalty: self.frequency_penalty,
            logit_bias: vec![],
            seed: self.seed,
            logprobs: None,
        }
    }
}

fn method(name: &str) -> Result<MethodKind, String> {
    match name {
        "diffusion" => Ok(MethodKind::Diffusion),
        "autoregressive" => Ok(MethodKind::Autoregressive),
        _ => Err("use diffusion or autoregressive".into()),
    }
}

fn cache(name: &str) -> Result<CacheChoice, String> {
    CacheChoice::from_name(name).ok_or_else(|| "use off, prefix or dual".into())
}

fn drafter(name: &str) -> Result<DrafterChoice, String> {
    DrafterChoice::from_name(name).ok_or_else(|| "use none, redrafter, medusa, chain or lookup".into())
}

fn schedule(name: &str) -> Result<Schedule, String> {
    match name {
        "linear" => Ok(Schedule::Linear),
        "timesteps" => Ok(Schedule::Timesteps),
        _ => Err("use linear or timesteps".into()),
    }
}

fn order_flag(name: &str) -> Result<Order, String> {
    order(name).ok_or_else(|| "use confidence, margin, entropy, random or left_to_right".into())
}

/// A whole canvas template from one flag.
#[derive(Clone, Debug)]
pub struct Template(pub Vec<TemplatePiece>);

/// `["def f(x):\n", 16, "\n"]`, or with the kinds spelled out: `[{"text": "…"}, {"hole": 16}, {"tokens": [1, 2]}]`.
pub fn template(json: &str) -> Result<Template, String> {
    #[derive(Deserialize)]
    #[serde(rename_all = "snake_case")]
    enum Kind {
        Text(String),
        Hole(u64),
        Tokens(Vec<u32>),
    }
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Entry {
        Text(String),
        Hole(u64),
        Kind(Kind),
    }
    let entries: Vec<Entry> = serde_json::from_str(json)
        .map_err(|e| format!("{e}: write a list of texts and hole lengths, as in [\"x = \", 8, \"\\n\"]"))?;
    let piece = |entry| match entry {
        Entry::Text(text) | Entry::Kind(Kind::Text(text)) => TemplatePiece::Text(text),
        Entry::Hole(length) | Entry::Kind(Kind::Hole(length)) => TemplatePiece::Hole(length),
        Entry::Kind(Kind::Tokens(ids)) => TemplatePiece::Tokens(ids),
    };
    Ok(Template(entries.into_iter().map(piece).collect()))
}

/// `text:…`, `hole:16` or `tokens:1,2,3`.
pub fn piece(text: &str) -> Result<TemplatePiece, String> {
    match text.split_once(':') {
        Some(("text", text)) => Ok(TemplatePiece::Text(text.into())),
        Some(("hole", length)) => length.parse().map(TemplatePiece::Hole).map_err(|e| format!("hole '{length}': {e}")),
        Some(("tokens", ids)) => {
            let ids = ids.split(',').map(|id| id.trim().parse().map_err(|e| format!("token id '{id}': {e}")));
            ids.collect::<Result<_, _>>().map(TemplatePiece::Tokens)
        }
        _ => Err("write text:…, hole:N or tokens:N,N,…".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn templates_in_both_forms() {
        let pieces = vec![TemplatePiece::Text("x = ".into()), TemplatePiece::Hole(8), TemplatePiece::Tokens(vec![1, 2])];
        assert_eq!(template(r#"["x = ", 8, {"tokens": [1, 2]}]"#).unwrap().0, pieces);
        assert_eq!(template(r#"[{"text": "x = "}, {"hole": 8}, {"tokens": [1, 2]}]"#).unwrap().0, pieces);
        assert_eq!(["text:x = ", "hole:8", "tokens:1, 2"].map(|text| piece(text).unwrap()).to_vec(), pieces);
        for wrong in ["{", "[-1]", r#"[{"hole": "8"}]"#, r#"[{"gap": 8}]"#] {
            assert!(template(wrong).is_err(), "{wrong}");
        }
        for wrong in ["", "hole:", "hole:-1", "tokens:", "gap:8"] {
            assert!(piece(wrong).is_err(), "{wrong}");
        }
    }
}
