//! What heads learn from: texts that the teacher itself writes behind prompts.
//!
//! A head must foresee its own model, not whoever wrote a corpus, so the frozen teacher continues the prompts: half of the texts
//! greedily, as most decoding is, half drawn at a temperature. Prompts of one length run side by side, so nothing is padded. The
//! texts are kept in one file of JSON lines, whose first line says what they come from; a run that was cut off goes on behind
//! the last whole group. This file knows nothing of heads.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail, ensure};
use rand::seq::SliceRandom;
use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::checkpoint::{Checkpoint, write_atomically};
use crate::eval::nano::{self, Split};
use crate::model::cache::KvCache;
use crate::model::{Layout, Segment, Transformer, manifest};
use crate::tensor::{Kind, Tensor};
use crate::train::progress;

/// Texts of nano tasks, where nothing else is said.
const USUAL_COUNT: usize = 16_384;
/// Texts that measure and never teach; of few prompts, a twentieth.
const HELD_OUT: usize = 256;
/// Texts written side by side, as long as they have no more than so many tokens together.
const GROUP: usize = 64;
const GROUP_TOKENS: usize = 16_384;

/// Which texts to have the teacher write.
#[derive(Clone, Debug)]
pub struct Settings {
    /// A file of prompts, one a line: a JSON string, an object with `prompt`, or plain text. Without it, nano tasks.
    pub prompts: Option<PathBuf>,
    /// Of the half that is drawn.
    pub temperature: f64,
    /// Longest continuation, in tokens.
    pub length: usize,
    pub count: Option<usize>,
    pub seed: u64,
}

/// A prompt and what the teacher wrote behind it, its end-of-text included if it came to one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Text {
    /// So many of the tokens are the prompt's.
    pub prompt: usize,
    pub tokens: Vec<u32>,
}

/// Texts to measure by, of prompts that training does not see, and texts to learn from.
pub struct Texts {
    pub held_out: Vec<Text>,
    pub training: Vec<Text>,
}

/// A prompt's tokens.
type Prompt = Vec<u32>;

/// Prompts of one length.
struct Group {
    prompts: Vec<Prompt>,
    temperature: f64,
}

/// Reads the texts from `file`, or has the teacher write those that are not there yet.
pub fn prepare(file: &Path, teacher: &Checkpoint, model: &Transformer, settings: &Settings) -> Result<Texts> {
    let (held_out, training) = prompts(teacher, settings)?;
    let count = held_out.len();
    let temperature = settings.temperature;
    let drawn = training.iter().enumerate().filter(|(at, _)| at % 2 == 1).map(|(_, prompt)| prompt.clone()).collect();
    let greedy = training.into_iter().step_by(2).collect();
    let mut groups = vec![];
    for (prompts, temperature) in [(held_out, 0.0), (greedy, 0.0), (drawn, temperature)] {
        groups.extend(group(prompts, temperature, settings.length, model.context())?);
    }
    let origin = origin(teacher, settings)?;
    let mut held_out = written(file, &origin, &groups)?;
    let whole = held_out.len();
    let mut out = File::options().append(true).open(file).context("cannot open the teacher's texts")?;
    let bar = progress::bar(groups.iter().map(|group| group.prompts.len() as u64).sum());
    let mut done = 0;
    for (index, group) in groups.iter().enumerate() {
        if done >= whole {
            let mut rng = ChaCha8Rng::seed_from_u64(settings.seed);
            rng.set_stream(index as u64);
            let texts = tch::no_grad(|| continue_prompts(model, group, &teacher.generation.eos_token_ids, settings, &mut rng))?;
            let lines: Vec<String> = texts.iter().map(serde_json::to_string).collect::<Result<_, _>>()?;
            out.write_all((lines.join("\n") + "\n").as_bytes()).context("cannot write the teacher's texts")?;
            held_out.extend(texts);
        }
        done += group.prompts.len();
        bar.set_position(done as u64);
        bar.set_message("the teacher writes");
    }
    bar.finish_and_clear();
    let training = held_out.split_off(count);
    Ok(Texts { held_out, training })
}

/// The prompts' tokens, held out and to learn from. The two have no prompt in common.
fn prompts(teacher: &Checkpoint, settings: &Settings) -> Result<(Vec<Prompt>, Vec<Prompt>)> {
    let encode = |text: &str| teacher.tokenizer.encode(text, false).map_err(anyhow::Error::msg);
    let mut rng = ChaCha8Rng::seed_from_u64(settings.seed);
    let Some(path) = &settings.prompts else {
        let mut draw = |count: usize, split: Split| -> Result<Vec<_>> {
            (0..count).map(|_| encode(&nano::sample(&mut rng, split).prompt)).collect()
        };
        return Ok((draw(HELD_OUT, Split::HeldOut)?, draw(settings.count.unwrap_or(USUAL_COUNT), Split::Train)?));
    };
    let file = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut all = file.lines().filter(|line| !line.trim().is_empty()).map(prompt).collect::<Result<Vec<_>>>()?;
    all.sort();
    all.dedup();
    ensure!(all.len() >= 2, "{} holds {} different prompts: give at least 2, of which one measures", path.display(), all.len());
    all.shuffle(&mut rng);
    let all = all.iter().map(|text| encode(text)).collect::<Result<Vec<_>>>()?;
    let (held_out, training) = all.split_at((all.len() / 20).clamp(1, HELD_OUT));
    let count = settings.count.unwrap_or(training.len());
    Ok((held_out.to_vec(), training.iter().cycle().take(count).cloned().collect()))
}

/// The prompt in one line of a file.
fn prompt(line: &str) -> Result<String> {
    let wrong = || anyhow!("no prompt in the line {line}: write a JSON string, an object with \"prompt\", or plain text");
    match serde_json::from_str(line) {
        Ok(Value::String(text)) => Ok(text),
        Ok(Value::Object(object)) => object.get("prompt").and_then(Value::as_str).map(str::to_owned).ok_or_else(wrong),
        _ => Ok(line.to_owned()),
    }
}

/// Puts prompts of one length together.
fn group(prompts: Vec<Prompt>, temperature: f64, length: usize, context: usize) -> Result<Vec<Group>> {
    let mut by_length = BTreeMap::<usize, Vec<Prompt>>::new();
    for prompt in prompts {
        let fits = !prompt.is_empty() && prompt.len() < context;
        ensure!(fits, "a prompt has {} tokens: it must have one, and leave room in the model's {context}", prompt.len());
        by_length.entry(prompt.len()).or_default().push(prompt);
    }
    let groups = by_length.into_iter().flat_map(|(prompt, prompts)| {
        let size = (GROUP_TOKENS / (prompt + length)).clamp(1, GROUP);
        prompts.chunks(size).map(|prompts| Group { prompts: prompts.to_vec(), temperature }).collect::<Vec<_>>()
    });
    Ok(groups.collect())
}

/// Everything that the texts follow from.
fn origin(teacher: &Checkpoint, settings: &Settings) -> Result<Value> {
    let prompts = match &settings.prompts {
        None => "nano".into(),
        Some(path) => {
            let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
            format!("{:016x}", hash(0, &bytes))
        }
    };
    Ok(json!({
        "teacher": fingerprint(teacher)?,
        "prompts": prompts,
        "texts": settings.count,
        "temperature": settings.temperature,
        "length": settings.length,
        "seed": settings.seed,
    }))
}

/// Tells a model from another of the same shape, an earlier checkpoint of itself for one: a hash of all its weights.
fn fingerprint(teacher: &Checkpoint) -> Result<String> {
    let mut state = 0;
    for spec in manifest(&teacher.config) {
        let tensor = teacher.files.stored(&spec.name)?.f_contiguous()?;
        let mut bytes = vec![0; tensor.numel() * tensor.f_kind()?.elt_size_in_bytes()];
        tensor.f_copy_data_u8(&mut bytes, tensor.numel())?;
        state = hash(state, &bytes);
    }
    Ok(format!("{state:016x}"))
}

/// FNV-1a over words of eight bytes, going on from `state`.
fn hash(state: u64, bytes: &[u8]) -> u64 {
    let word = |chunk: &[u8]| chunk.iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte));
    let start = state ^ 0xcbf2_9ce4_8422_2325;
    bytes.chunks(8).fold(start, |hash, chunk| (hash ^ word(chunk)).wrapping_mul(0x0100_0000_01b3).rotate_left(23))
}

/// The texts of whole groups that `file` holds. Makes the file if need be, and cuts off what lies behind them.
fn written(file: &Path, origin: &Value, groups: &[Group]) -> Result<Vec<Text>> {
    let old = std::fs::read_to_string(file).unwrap_or_default();
    let mut lines = old.lines();
    match lines.next().map(serde_json::from_str::<Value>) {
        Some(Ok(found)) if found == *origin => {}
        None => {}
        Some(_) => bail!(
            "{} holds texts of another teacher, or made with other settings: remove it, or name another --out",
            file.display()
        ),
    }
    // A kill may have left half a line.
    let mut texts: Vec<Text> = lines.map_while(|line| serde_json::from_str(line).ok()).collect();
    let mut whole = 0;
    for group in groups {
        if whole + group.prompts.len() > texts.len() {
            break;
        }
        whole += group.prompts.len();
    }
    texts.truncate(whole);
    let kept: Vec<String> = texts.iter().map(serde_json::to_string).collect::<Result<_, _>>()?;
    let content: String = std::iter::once(origin.to_string()).chain(kept).map(|line| line + "\n").collect();
    write_atomically(file, content.as_bytes())?;
    Ok(texts)
}

/// Writes behind all prompts of a group at once. Rows that have ended run along, and what they say is forgotten.
fn continue_prompts(
    model: &Transformer,
    group: &Group,
    ends: &[u32],
    settings: &Settings,
    rng: &mut impl Rng,
) -> Result<Vec<Text>> {
    let mut texts: Vec<Text> =
        group.prompts.iter().map(|prompt| Text { prompt: prompt.len(), tokens: prompt.clone() }).collect();
    let prompt = texts.first().map_or(0, |text| text.prompt);
    let length = settings.length.min(model.context().saturating_sub(prompt));
    let cache = |_| KvCache::new(model.config(), model.placement(), prompt + length);
    let mut caches: Vec<KvCache> = (0..texts.len()).map(cache).collect::<Result<_, _>>()?;
    let mut open = vec![true; texts.len()];
    let mut next: Vec<Vec<u32>> = group.prompts.clone();
    for _ in 0..length {
        let segment = |(tokens, cache)| Segment { tokens, layout: Layout::Causal, cache: Some(cache) };
        let hidden = model.forward(&next.iter().map(Vec::as_slice).zip(&caches).map(segment).collect::<Vec<_>>())?;
        let rows = next.first().map_or(0, Vec::len) as i64;
        for cache in &mut caches {
            cache.keep(&(0..rows as usize).collect::<Vec<_>>())?;
        }
        let last = hidden.f_view([texts.len() as i64, rows, -1])?.f_select(1, rows - 1)?;
        let chosen = choose(&model.logits(&last)?, group.temperature, rng)?;
        next = chosen.iter().map(|token| vec![*token as u32]).collect();
        for ((text, open), token) in texts.iter_mut().zip(&mut open).zip(&next).filter(|((_, open), _)| **open) {
            text.tokens.push(token[0]);
            *open = !ends.contains(&token[0]);
        }
        if !open.contains(&true) {
            break;
        }
    }
    Ok(texts)
}

/// A token for each row of `logits`: the best, or one drawn by inverting the distribution at a uniform number.
fn choose(logits: &Tensor, temperature: f64, rng: &mut impl Rng) -> Result<Vec<i64>> {
    let logits = logits.f_to_kind(Kind::Double)?;
    ensure!(logits.f_isfinite()?.f_all()?.f_int64_value(&[])? != 0, "the teacher's logits are not finite");
    let chosen = if temperature == 0.0 {
        logits.f_argmax(-1, false)?
    } else {
        let cumulated = logits.f_div_scalar(temperature)?.f_softmax(-1, Kind::Double)?.f_cumsum(-1, Kind::Double)?;
        let last = cumulated.size()[1] - 1;
        let uniform: Vec<f64> = (0..logits.size()[0]).map(|_| rng.random::<f64>()).collect();
        let place = Tensor::f_from_slice(&uniform)?.f_to_device(logits.device())?.f_unsqueeze(1)?;
        let found = place.f_searchsorted(&cumulated, false, true, "right", None::<&Tensor>)?;
        found.f_clamp_max(last)?.f_view(-1)?
    };
    Ok(Vec::try_from(&chosen.f_to_device(crate::tensor::Device::Cpu)?)?)
}
