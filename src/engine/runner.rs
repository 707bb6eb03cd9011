//! Runs one [`Window`] on the device: network, vocabulary head on the wanted rows, statistics. [`step`] puts it together with what
//! stays on the device between a sequence's steps: its cache, and the draft that its next forward verifies.

use std::time::{Duration, Instant};

use super::sequence::Sequence;
use crate::decode::{Pattern, RowStatistics, Wanted, Window};
use crate::draft::{Context, Drafters};
use crate::model::cache::KvCache;
use crate::model::statistics::{Conditions, Proposal, statistics};
use crate::model::{Layout, ModelError, Transformer};
use crate::tensor::{Kind, Tensor};

/// Where a forward's time went.
#[derive(Clone, Copy, Debug, Default)]
pub struct Timing {
    /// The network up to the final hidden states.
    pub forward: Duration,
    /// The vocabulary head on the wanted rows.
    pub head: Duration,
    /// Logits to statistics.
    pub statistics: Duration,
}

impl Timing {
    pub fn total(&self) -> Duration {
        self.forward + self.head + self.statistics
    }
}

/// What came of a window.
pub struct Outcome {
    pub rows: Vec<RowStatistics>,
    /// Final hidden states of the wanted rows, `[rows, hidden]`.
    pub hidden: Tensor,
    pub timing: Timing,
    /// Sequences that the network saw: two under guidance.
    pub forwards: usize,
}

/// What a sequence keeps on the device.
#[derive(Default)]
pub struct Residence {
    pub cache: Option<KvCache>,
    /// Of the draft that the next window verifies.
    pub proposal: Option<Proposal>,
}

impl Residence {
    /// Takes the room that `sequence` will need.
    pub fn new(model: &Transformer, sequence: &Sequence) -> Result<Self, ModelError> {
        let room = sequence.cache_room();
        let cache = if room > 0 { Some(KvCache::new(model.config(), model.placement(), 1, room)?) } else { None };
        Ok(Self { cache, proposal: None })
    }
}

/// Time of the parts of a step that are not the window's own.
#[derive(Clone, Copy, Debug, Default)]
pub struct Aside {
    /// Keeping the accepted path in the cache.
    pub commit: Duration,
    pub draft: Duration,
    /// Sequences that the drafter's network saw.
    pub draft_forwards: usize,
}

/// Runs `window`; the statistics are those of its wanted rows, in order. Keys are written to `residence`'s cache, behind what it keeps.
pub fn run(model: &Transformer, window: &Window, residence: &Residence) -> Result<Outcome, ModelError> {
    tch::no_grad(|| {
        let started = Instant::now();
        let device = model.placement().device;
        let tokens = tokens(model, window)?;
        let hidden = match (&window.pattern, &residence.cache) {
            (Pattern::Whole(attention), _) => model.hidden(&tokens, *attention)?,
            (Pattern::Next, Some(cache)) => model.extend(&tokens, Layout::Causal, cache)?,
            (Pattern::Tree(parents), Some(cache)) => model.extend(&tokens, Layout::Tree(parents), cache)?,
            (Pattern::Canonical(_), Some(cache)) => model.extend(&tokens, Layout::Canonical(window.tokens.len()), cache)?,
            (_, None) => return Err(ModelError::Torch("a window that follows a cache was run without one".into())),
        };
        let forward = started.elapsed();

        let rows = rows(model, window);
        let wanted = rows.len();
        let rows = Tensor::f_from_slice(&rows)?.f_to_device(device)?;
        let of = |sequence: i64| -> Result<Tensor, ModelError> { Ok(hidden.f_get(sequence)?.f_index_select(0, &rows)?) };
        let states = of(0)?;
        if wanted == 0 {
            let timing = Timing { forward, ..Timing::default() };
            return Ok(Outcome { rows: vec![], hidden: states, timing, forwards: 1 });
        }
        let mut logits = model.logits(&states)?;
        if let Some(guidance) = &window.guidance {
            let unconditional = model.logits(&of(1)?)?.f_to_kind(Kind::Float)?;
            let difference = logits.f_to_kind(Kind::Float)?.f_sub(&unconditional)?;
            logits = unconditional.f_add(&difference.f_mul_scalar(guidance.scale + 1.0)?)?;
        }
        let used = used_rows(window, wanted);
        let logits = logits.f_narrow(0, 0, used as i64)?;
        let head = started.elapsed() - forward;

        let conditions = Conditions {
            sampling: &window.sampling,
            noise: &window.noise,
            histories: &window.histories,
            proposal: residence.proposal.as_ref(),
        };
        let rows = statistics(&logits, &conditions)?;
        let timing = Timing { forward, head, statistics: started.elapsed() - forward - head };
        Ok(Outcome { rows, hidden: states, timing, forwards: 1 + usize::from(window.guidance.is_some()) })
    })
}

/// `[sequences, seq]` on the device: two sequences under guidance, and filling where the window wants a fixed width.
fn tokens(model: &Transformer, window: &Window) -> Result<Tensor, ModelError> {
    let vocab_size = model.config().vocab_size;
    let mut tokens: Vec<i64> = window.tokens.iter().map(|id| i64::from(*id)).collect();
    let mut length = tokens.len();
    if let Pattern::Canonical(rows) = window.pattern {
        length = length.max(rows);
        tokens.resize(length, 0);
    }
    if let Some(guidance) = &window.guidance {
        tokens.extend(guidance.unconditional.iter().map(|id| i64::from(*id)));
    }
    if let Some(id) = tokens.iter().copied().find(|id| *id >= vocab_size as i64) {
        return Err(ModelError::TokenOutOfRange { id, vocab_size });
    }
    Ok(Tensor::f_from_slice(&tokens)?.f_view([-1, length as i64])?.f_to_device(model.placement().device)?)
}

/// Rows of the hidden states to turn into logits. A window of fixed width takes all of its rows through the head, since a product's
/// last bit may depend on how many rows it has.
fn rows(model: &Transformer, window: &Window) -> Vec<i64> {
    match (&window.wanted, &window.pattern) {
        (Wanted::Following(_), Pattern::Canonical(width)) => (0..*width.max(&window.tokens.len()) as i64).collect(),
        (Wanted::Following(rows), _) => rows.iter().map(|row| *row as i64).collect(),
        (Wanted::Positions(positions), _) => {
            let shift = i64::from(model.config().shift);
            positions.iter().map(|position| (i64::from(*position) - shift).max(0)).collect()
        }
    }
}

fn used_rows(window: &Window, all: usize) -> usize {
    match &window.wanted {
        Wanted::Following(rows) => rows.len(),
        Wanted::Positions(_) => all,
    }
}

/// One whole step of `sequence`: its window, what it makes of it, the cache brought in line, the next draft. Gives the events.
pub fn step(
    model: &Transformer,
    drafters: &Drafters,
    sequence: &mut Sequence,
    residence: &mut Residence,
    tokenizer: &crate::checkpoint::tokenizer::Tokenizer,
) -> Result<Vec<super::Event>, super::StepError> {
    let Some(window) = sequence.window() else { return Ok(vec![]) };
    let outcome = run(model, &window, residence)?;
    let mut events = sequence.advance(&outcome, window.purpose, tokenizer).map_err(super::StepError::Text)?;
    let aside = settle(model, drafters, sequence, residence, &outcome)?;
    sequence.account(outcome.timing.total(), aside);
    events.extend(sequence.finish());
    Ok(events)
}

/// Keeps what `sequence` accepted and asks its drafter for more.
fn settle(
    model: &Transformer,
    drafters: &Drafters,
    sequence: &mut Sequence,
    residence: &mut Residence,
    outcome: &Outcome,
) -> Result<Aside, ModelError> {
    let mut aside = Aside::default();
    let Some(cache) = &mut residence.cache else { return Ok(aside) };
    tch::no_grad(|| {
        let started = Instant::now();
        cache.keep(sequence.kept())?;
        aside.commit = started.elapsed();
        residence.proposal = None;
        if let Some(asked) = sequence.drafting() {
            let started = Instant::now();
            let hidden = outcome.hidden.f_narrow(0, asked.row as i64, 1)?;
            let draft = drafters.draft(&Context { model, tokens: sequence.known(), hidden: &hidden, asked })?;
            aside.draft = started.elapsed();
            aside.draft_forwards = drafters.get(asked.drafter).map_or(0, |drafter| drafter.forwards(asked.shape));
            residence.proposal = draft.proposal;
            sequence.propose(draft.tree);
        }
        Ok(aside)
    })
}
