//! Runs [`Window`]s on the device, those of many sequences in one forward: network, vocabulary head on the wanted rows, statistics.
//! [`round`] puts it together with what stays on the device between a sequence's steps: its cache, and the draft that its next
//! forward verifies.

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::time::{Duration, Instant};

use super::sequence::Sequence;
use super::{Event, StepError};
use crate::checkpoint::tokenizer::Tokenizer;
use crate::decode::{Pattern, RowStatistics, Wanted, Window};
use crate::draft::{Context, Drafters};
use crate::model::cache::KvCache;
use crate::model::statistics::{Conditions, Ledger, Part, Proposal};
use crate::model::{Layout, ModelError, Segment, Transformer};
use crate::telemetry::meter::{Meter, Phase};
use crate::tensor::{Kind, TchError, Tensor, upload};

/// Rows of one forward: enough to fill any device with work, few enough for their activations to be small beside the weights.
const ROWS_MAX: usize = 2048;
/// Logits that exist at one time, unless one window alone wants more.
pub const LOGITS_MAX: usize = 1 << 25;

/// Where a forward's time went; of a shared one, a window's part by its rows.
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
    /// Final hidden states of all wanted rows of the forward, `[rows, hidden]`, and the place of its first one.
    states: Rc<Tensor>,
    first: usize,
    pub timing: Timing,
    /// Sequences that the network saw: two under guidance.
    pub forwards: usize,
    /// Windows that were run together, this one included.
    pub beside: usize,
}

impl Outcome {
    /// Final hidden state of a wanted row, `[1, hidden]`.
    pub fn hidden(&self, row: usize) -> Result<Tensor, TchError> {
        // Within the window's own, so that no other's is given for a row that it has not.
        self.states.f_narrow(0, self.first as i64, self.rows.len() as i64)?.f_narrow(0, row as i64, 1)
    }
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
        let cache = if room > 0 { Some(KvCache::new(model.config(), model.placement(), room)?) } else { None };
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

/// One window, and what its sequence keeps on the device.
#[derive(Clone, Copy)]
pub struct Ask<'a> {
    pub window: &'a Window,
    pub residence: &'a Residence,
}

impl Ask<'_> {
    fn conditions(&self) -> Conditions<'_> {
        let Window { sampling, noise, histories, .. } = self.window;
        Conditions { sampling, noise, histories, proposal: self.residence.proposal.as_ref() }
    }

    /// Rows that it adds to a forward.
    fn rows(&self) -> usize {
        self.window.tokens.len() * self.sequences()
    }

    fn sequences(&self) -> usize {
        1 + usize::from(self.window.guidance.is_some())
    }
}

/// Runs `window` by itself; the statistics are those of its wanted rows, in order. Keys are written to `residence`'s cache.
pub fn run(model: &Transformer, window: &Window, residence: &Residence) -> Result<Outcome, ModelError> {
    match run_all(model, &[Ask { window, residence }])?.pop() {
        Some(outcome) => outcome,
        None => Err(ModelError::Torch("a window came to nothing".into())),
    }
}

/// Runs all windows in one forward. The outer error is the forward's; an inner one is a window's own (numbers that are not finite).
pub fn run_all(model: &Transformer, asks: &[Ask]) -> Result<Vec<Result<Outcome, ModelError>>, ModelError> {
    run_parts(model, asks, || {})
}

/// [`run_all`], with `settle` after each part: a GPU computes on while the next part is being told to it, so that whoever wants the
/// parts' own times has to wait there.
pub fn run_parts(model: &Transformer, asks: &[Ask], settle: impl Fn()) -> Result<Vec<Result<Outcome, ModelError>>, ModelError> {
    tch::no_grad(|| {
        let started = Instant::now();
        let tokens: Vec<Vec<u32>> = asks.iter().map(|ask| tokens(model, ask.window)).collect();
        let segments: Vec<Segment> = asks.iter().zip(&tokens).flat_map(|(ask, tokens)| segments(model, ask, tokens)).collect();
        let (mut first, mut rows) = (0, vec![]);
        let mut places = Vec::with_capacity(asks.len());
        for (ask, tokens) in asks.iter().zip(&tokens) {
            let wanted = wanted(model, ask.window, tokens.len())?;
            places.push((rows.len(), wanted.len()));
            for sequence in 0..ask.sequences() {
                rows.extend(wanted.iter().map(|row| (first + sequence * tokens.len() + row) as i64));
            }
            first += tokens.len() * ask.sequences();
        }
        // Before the network: so the copy need not wait for it. Where every row is wanted, there is nothing to choose.
        let all = rows.iter().copied().eq(0..first as i64);
        let chosen = if all { None } else { Some(upload(&rows, model.placement().device)?) };
        let states = model.forward(&segments)?;
        let states = Rc::new(match chosen {
            Some(chosen) => states.f_index_select(0, &chosen)?,
            None => states,
        });
        settle();
        let forward = started.elapsed();
        let mine = |time: Duration, part: usize, all: usize| time.mul_f64(part as f64 / all.max(1) as f64);
        let (mut ledger, mut judging) = (Ledger::new(model.fused()), Duration::ZERO);
        let mut heads = Vec::with_capacity(asks.len());
        for group in groups(&places, model.config().vocab_size) {
            let (from, count) = (places[group.start].0, rows_of(asks, &places, group.clone()));
            let began = Instant::now();
            let logits = match count {
                0 => None,
                _ if count == rows.len() => Some(model.logits(&states)?),
                _ => Some(model.logits(&states.f_narrow(0, from as i64, count as i64)?)?),
            };
            settle();
            let head = began.elapsed();
            heads.extend(group.clone().map(|index| mine(head, places[index].1 * asks[index].sequences(), count)));
            let began = Instant::now();
            if let Some(logits) = &logits {
                judge(&mut ledger, asks, &places, group, logits)?;
            }
            judging += began.elapsed();
        }
        let began = Instant::now();
        let mut found: Vec<Result<Vec<RowStatistics>, ModelError>> = asks.iter().map(|_| Ok(vec![])).collect();
        for (index, rows) in ledger.read()? {
            found[index] = rows;
        }
        judging += began.elapsed();
        let outcome = |(index, found): (usize, Result<Vec<RowStatistics>, ModelError>)| {
            let (ask, (at, wanted)) = (&asks[index], places[index]);
            let timing = Timing {
                forward: mine(forward, ask.rows(), first),
                head: heads[index],
                statistics: mine(judging, wanted * ask.sequences(), rows.len()),
            };
            Ok(Outcome {
                rows: found?,
                states: states.clone(),
                first: at,
                timing,
                forwards: ask.sequences(),
                beside: asks.len(),
            })
        };
        Ok(found.into_iter().enumerate().map(outcome).collect())
    })
}

/// Windows whose wanted rows go through the head together, so that their logits stay within [`LOGITS_MAX`]; at least one.
fn groups(places: &[(usize, usize)], vocab_size: usize) -> Vec<Range<usize>> {
    let mut groups: Vec<Range<usize>> = vec![];
    for (index, (at, rows)) in places.iter().enumerate() {
        match groups.last_mut() {
            Some(group) if (at + rows - places[group.start].0) * vocab_size <= LOGITS_MAX => group.end = index + 1,
            _ => groups.push(index..index + 1),
        }
    }
    groups
}

fn rows_of(asks: &[Ask], places: &[(usize, usize)], group: Range<usize>) -> usize {
    group.map(|index| places[index].1 * asks[index].sequences()).sum()
}

/// Puts the statistics of a group's windows into `ledger`: `logits` are those of the group's rows, and of each window's under guidance
/// those without the prompt stand behind the others.
fn judge(
    ledger: &mut Ledger,
    asks: &[Ask],
    places: &[(usize, usize)],
    group: Range<usize>,
    logits: &Tensor,
) -> Result<(), ModelError> {
    let from = places[group.start].0;
    let mut parts = vec![];
    for index in group {
        let (ask, (at, wanted)) = (&asks[index], places[index]);
        // A window of fixed width had its filling run as well, which nobody asks about.
        let rows = if let Wanted::Following(rows) = &ask.window.wanted { rows.len() } else { wanted };
        let part = Part { index, at: at - from, rows, conditions: ask.conditions() };
        match &ask.window.guidance {
            Some(guidance) => {
                let half = |at: usize| logits.f_narrow(0, at as i64, wanted as i64)?.f_to_kind(Kind::Float);
                let unconditional = half(part.at + wanted)?;
                let difference = half(part.at)?.f_sub(&unconditional)?;
                let mixed = unconditional.f_add(&difference.f_mul_scalar(guidance.scale + 1.0)?)?;
                ledger.add(&mixed, &[Part { at: 0, ..part }])?;
            }
            None => parts.push(part),
        }
    }
    ledger.add(logits, &parts)
}

/// The window's tokens, with filling where it wants a fixed width and rows depend on their neighbours.
fn tokens(model: &Transformer, window: &Window) -> Vec<u32> {
    let mut tokens = window.tokens.clone();
    if let (Pattern::Canonical(rows), false) = (&window.pattern, model.rows_are_independent()) {
        tokens.resize(tokens.len().max(*rows), 0);
    }
    tokens
}

/// Two segments under guidance, else one.
fn segments<'a>(model: &Transformer, ask: &Ask<'a>, tokens: &'a [u32]) -> impl Iterator<Item = Segment<'a>> {
    let cache = ask.residence.cache.as_ref();
    let (layout, cache) = match &ask.window.pattern {
        Pattern::Whole(attention) => (Layout::Whole(*attention), None),
        Pattern::Next => (Layout::Causal, cache),
        Pattern::Tree(parents) => (Layout::Tree(parents), cache),
        Pattern::Canonical(_) if model.rows_are_independent() => (Layout::Causal, cache),
        Pattern::Canonical(_) => (Layout::Canonical(ask.window.tokens.len()), cache),
        Pattern::Span { start, sees } => (Layout::Span { start: *start, sees }, cache),
    };
    let unconditional = ask.window.guidance.as_ref().map(|guidance| Segment { tokens: &guidance.unconditional, layout, cache });
    std::iter::once(Segment { tokens, layout, cache }).chain(unconditional)
}

/// The window's rows whose logits are wanted. One of fixed width takes all of them through the head, since a product's last bit may
/// depend on how many rows it has.
fn wanted(model: &Transformer, window: &Window, length: usize) -> Result<Vec<usize>, ModelError> {
    let start = if let Pattern::Span { start, .. } = window.pattern { start } else { 0 };
    let shift = usize::from(model.config().shift);
    match (&window.wanted, &window.pattern) {
        (Wanted::Following(_), Pattern::Canonical(_)) if !model.rows_are_independent() => Ok((0..length).collect()),
        (Wanted::Following(rows), _) => Ok(rows.clone()),
        (Wanted::Positions(positions), _) => {
            let row = |position: &u32| match (*position as usize).checked_sub(shift) {
                // The first position of all has no row before it; the originals take its own.
                None => Ok(0),
                Some(at) if (start..start + length).contains(&at) => Ok(at - start),
                Some(_) => Err(ModelError::Torch(format!("no row of the window predicts position {position}"))),
            };
            positions.iter().map(row).collect()
        }
    }
}

/// A sequence, what it keeps on the device, and the window that it asks for.
pub struct Member<'a> {
    pub sequence: &'a mut Sequence,
    pub residence: &'a mut Residence,
    pub window: Window,
}

/// One step of every sequence: windows run together where they can, what each makes of its own, caches brought in line, the next
/// drafts. Gives each one's events, or what went wrong with it; no sequence's trouble is another's. Forwards are counted into `meter`.
pub fn round(
    model: &Transformer,
    drafters: &Drafters,
    members: Vec<Member>,
    tokenizer: &Tokenizer,
    meter: Option<&Meter>,
) -> Vec<Result<Vec<Event>, StepError>> {
    let asks: Vec<Ask> = members.iter().map(|member| Ask { window: &member.window, residence: &*member.residence }).collect();
    let mut outcomes: Vec<Result<Outcome, StepError>> = Vec::with_capacity(asks.len());
    for forward in forwards(model, &asks) {
        let together = &asks[forward];
        let began = Instant::now();
        match guarded(|| Ok(run_all(model, together)?)) {
            Ok(found) => {
                if let Some(meter) = meter {
                    let phase = Phase::of(together.iter().map(|ask| ask.window.purpose));
                    meter.forward(phase, together.iter().map(Ask::sequences).sum(), began.elapsed());
                }
                outcomes.extend(found.into_iter().map(|outcome| outcome.map_err(StepError::from)));
            }
            Err(reason) if together.len() == 1 => outcomes.push(Err(reason)),
            // Somebody's window breaks the forward: each for itself shows whose. What was written to caches is written again.
            Err(_) => outcomes.extend(together.iter().map(|ask| guarded(|| Ok(run(model, ask.window, ask.residence)?)))),
        }
    }
    let each = members.into_iter().zip(outcomes);
    each.map(|(member, outcome)| {
        let outcome = outcome?;
        guarded(|| finish(model, drafters, member, &outcome, tokenizer))
    })
    .collect()
}

/// Which of the asks run together: in order, as many as `ROWS_MAX` allows, and by itself whatever wants to be.
pub fn forwards(model: &Transformer, asks: &[Ask]) -> Vec<Range<usize>> {
    let alone = |ask: &Ask| ask.window.alone && !model.rows_are_independent();
    let mut forwards: Vec<Range<usize>> = vec![];
    let mut rows = 0;
    for (index, ask) in asks.iter().enumerate() {
        let joins = index > 0 && !alone(ask) && !alone(&asks[index - 1]) && rows + ask.rows() <= ROWS_MAX;
        match forwards.last_mut() {
            Some(forward) if joins => forward.end = index + 1,
            _ => {
                forwards.push(index..index + 1);
                rows = 0;
            }
        }
        rows += ask.rows();
    }
    forwards
}

/// One whole step of one sequence.
pub fn step(
    model: &Transformer,
    drafters: &Drafters,
    sequence: &mut Sequence,
    residence: &mut Residence,
    tokenizer: &Tokenizer,
) -> Result<Vec<Event>, StepError> {
    let Some(window) = sequence.window() else { return Ok(vec![]) };
    round(model, drafters, vec![Member { sequence, residence, window }], tokenizer, None).pop().unwrap_or(Ok(vec![]))
}

/// What a sequence makes of its window.
fn finish(
    model: &Transformer,
    drafters: &Drafters,
    member: Member,
    outcome: &Outcome,
    tokenizer: &Tokenizer,
) -> Result<Vec<Event>, StepError> {
    let Member { sequence, residence, window } = member;
    let mut events = sequence.advance(outcome, window.purpose, tokenizer).map_err(StepError::Text)?;
    let aside = settle(model, drafters, sequence, residence, outcome)?;
    sequence.account(outcome, aside);
    events.extend(sequence.finish());
    Ok(events)
}

/// Runs one sequence's work so that a panic in it is that sequence's error.
pub(super) fn guarded<T>(work: impl FnOnce() -> Result<T, StepError>) -> Result<T, StepError> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or(Err(StepError::Panic))
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
            let hidden = outcome.hidden(asked.row)?;
            let draft = drafters.draft(&Context { model, tokens: sequence.known(), hidden: &hidden, asked })?;
            aside.draft = started.elapsed();
            aside.draft_forwards = draft.forwards;
            residence.proposal = draft.proposal;
            sequence.propose(draft.tree);
        }
        Ok(aside)
    })
}
