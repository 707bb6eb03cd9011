//! The shipped model's tokenizer: byte-level BPE, trained on the tasks' own text.
//!
//! Words (with the space before them), numbers, runs of punctuation, and a newline with its indentation are the pieces; the
//! corpus has few enough of them that nearly each becomes one token, and bytes cover whatever else a prompt may hold.

use std::path::Path;

use anyhow::{Context, Result, anyhow};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde_json::json;
use tokenizers::models::bpe::{BPE, BpeTrainerBuilder};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split as SplitPieces, SplitPattern};
use tokenizers::{AddedToken, SplitDelimiterBehavior, TokenizerImpl, models::TrainerWrapper};

use crate::checkpoint::tokenizer::Tokenizer;
use crate::checkpoint::write_atomically;
use crate::eval::nano::{self, Split};

pub const END: &str = "<|endoftext|>";
pub const MASK: &str = "<|mask|>";

const PIECES: &str = r"\n *| ?[A-Za-z_]+| ?\d+| ?[^\sA-Za-z_\d]+|\s+";
const SAMPLES: usize = 30_000;
/// Far more than the corpus needs; training stops when no pair occurs twice.
const SIZE_MAX: usize = 2048;

/// The folder's tokenizer. If it has none, `other`'s is taken over, or one is built from `seed`.
pub fn prepare(folder: &Path, other: Option<&Path>, seed: u64) -> Result<Tokenizer> {
    if !folder.join("tokenizer.json").exists() {
        match other {
            None => build(folder, seed)?,
            // The vocabulary last: it is what says that the tokenizer is there.
            Some(other) => {
                for file in ["tokenizer_config.json", "tokenizer.json"] {
                    let bytes =
                        std::fs::read(other.join(file)).with_context(|| format!("cannot read {file} of --tokenizer"))?;
                    write_atomically(&folder.join(file), &bytes)?;
                }
            }
        }
    }
    Ok(Tokenizer::open(folder)?)
}

fn build(folder: &Path, seed: u64) -> Result<()> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let corpus: Vec<String> = (0..SAMPLES)
        .map(|_| {
            let task = nano::sample(&mut rng, Split::Train);
            task.prompt + &task.solution
        })
        .collect();
    let fail = |e: tokenizers::Error| anyhow!("cannot train the tokenizer: {e}");
    let special = [END, MASK].map(|token| AddedToken::from(token, true));
    let mut trainer: TrainerWrapper = BpeTrainerBuilder::new()
        .show_progress(false)
        .vocab_size(SIZE_MAX)
        .min_frequency(2)
        .special_tokens(special.to_vec())
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .build()
        .into();
    let split = SplitPieces::new(SplitPattern::Regex(PIECES.into()), SplitDelimiterBehavior::Isolated, false).map_err(fail)?;
    let bytes = ByteLevel::new(false, false, false);
    let model: tokenizers::ModelWrapper = BPE::default().into();
    let mut tokenizer: TokenizerImpl<
        tokenizers::ModelWrapper,
        tokenizers::NormalizerWrapper,
        tokenizers::PreTokenizerWrapper,
        tokenizers::PostProcessorWrapper,
        tokenizers::DecoderWrapper,
    > = TokenizerImpl::new(model);
    tokenizer.with_pre_tokenizer(Some(Sequence::new(vec![split.into(), bytes.into()])));
    tokenizer.with_decoder(Some(ByteLevel::new(false, false, false)));
    tokenizer.train(&mut trainer, corpus.into_iter()).map_err(fail)?;
    tokenizer.save(folder.join("tokenizer.json"), true).map_err(fail).context("cannot write tokenizer.json")?;
    let settings = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": END,
        "mask_token": MASK,
        "clean_up_tokenization_spaces": false,
        "model_max_length": 256,
        // The model completes code: a conversation's last message is the prompt, a comment and a function's header.
        "chat_template": "{{ messages[-1].content }}{% if not messages[-1].content.endswith('\n') %}{{ '\n' }}{% endif %}",
    });
    Ok(write_atomically(&folder.join("tokenizer_config.json"), &serde_json::to_vec_pretty(&settings)?)?)
}
