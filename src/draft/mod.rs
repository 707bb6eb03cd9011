//! Drafters: whatever proposes candidates for the next tokens, which one forward of the network then verifies.
//!
//! A [`Drafter`] is one file and one entry in [`Drafters::load`]. It turns what is known of a sequence (its tokens, and the hidden
//! state behind the last choice) into a [`Draft`]; it never decides what is emitted, so it can cost time but not correctness.
//! Heads are read from the folders under a model's `drafters/`, or wherever they are said to be.

pub mod chain;
pub mod heads;
pub mod lookup;
pub mod measure;
pub mod medusa;
pub mod redrafter;
pub mod search;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use crate::checkpoint::CheckpointError;
use crate::checkpoint::config::ModelConfig;
use crate::decode::Drafting;
use crate::decode::autoregressive::adaptation::{Adaptation, Costs, Shape};
use crate::decode::autoregressive::tree::Tree;
use crate::decode::autoregressive::{DrafterKind, NODES_MAX};
use crate::model::statistics::Proposal;
use crate::model::{ModelError, Transformer};
use crate::tensor::{Placement, Tensor};

/// What a drafter goes by.
pub struct Context<'a> {
    pub model: &'a Transformer,
    /// Every token known; candidates follow the last.
    pub tokens: &'a [u32],
    /// `[1, hidden]`: the network's final state (after the last norm) at the position before the last token.
    pub hidden: &'a Tensor,
    pub asked: Drafting,
}

impl Context<'_> {
    /// The token that candidates follow.
    pub fn root(&self) -> u32 {
        self.tokens.last().copied().unwrap_or(0)
    }
}

/// Candidates, and what they were drawn from where they were drawn.
pub struct Draft {
    pub tree: Tree,
    /// For a chain of drawn tokens: row `i` judges the token behind node `i`.
    pub proposal: Option<Proposal>,
    /// Sequences that the drafter's own network saw.
    pub forwards: usize,
}

/// Proposes candidates.
pub trait Drafter: Send {
    fn draft(&self, context: &Context) -> Result<Draft, ModelError>;

    /// The largest draft that makes sense.
    fn limit(&self) -> Shape;

    /// What a draft has when a request does not say, and does not adapt.
    fn usual(&self) -> Shape;

    /// Probability that a further token is right, before anything has been seen.
    fn prior(&self) -> f64 {
        0.75
    }

    /// Candidate tokens of a draft.
    fn nodes(&self, shape: Shape) -> usize {
        shape.width * shape.length
    }

    /// Bytes of weights.
    fn bytes(&self) -> usize {
        0
    }
}

/// What requests may ask of a drafter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DrafterInfo {
    pub kind: DrafterKind,
    pub limit: Shape,
    pub usual: Shape,
    /// Bytes of weights; a chain's are the ReDrafter's own.
    pub bytes: usize,
}

struct Entry {
    drafter: Box<dyn Drafter>,
    /// What drafts have come to so far; `None` until costs are measured.
    adaptation: Option<Adaptation>,
}

/// The drafters of one model.
pub struct Drafters {
    entries: BTreeMap<DrafterKind, Entry>,
    /// Cost of forwards by their number of tokens, measured once.
    verify: Option<Vec<(usize, f64)>>,
}

impl Default for Drafters {
    /// Those that need no weights.
    fn default() -> Self {
        let mut drafters = Self { entries: BTreeMap::new(), verify: None };
        drafters.add(DrafterKind::Lookup, Box::new(lookup::Lookup));
        drafters
    }
}

impl Drafters {
    /// Reads what lies in `folder`: `redrafter` (which gives the chain too) and `medusa`. Heads that do not fit the
    /// model are an error that names the setting.
    pub fn load(folder: &Path, config: &ModelConfig, placement: Placement) -> Result<Self, CheckpointError> {
        let mut drafters = Self::default();
        let redrafter = folder.join("redrafter");
        if redrafter.is_dir() {
            let beams = redrafter::Beams::new(redrafter::Redrafter::load(&redrafter, config, placement)?);
            drafters.add(DrafterKind::Chain, Box::new(beams.chain()));
            drafters.add(DrafterKind::Redrafter, Box::new(beams));
        }
        let medusa = folder.join("medusa");
        if medusa.is_dir() {
            drafters.add(DrafterKind::Medusa, Box::new(medusa::Medusa::load(&medusa, config, placement)?));
        }
        Ok(drafters)
    }

    pub fn add(&mut self, kind: DrafterKind, drafter: Box<dyn Drafter>) {
        self.entries.insert(kind, Entry { drafter, adaptation: None });
    }

    pub fn infos(&self) -> Vec<DrafterInfo> {
        let info = |(kind, entry): (&DrafterKind, &Entry)| {
            let (limit, usual) = (entry.drafter.limit(), entry.drafter.usual());
            DrafterInfo { kind: *kind, limit, usual, bytes: entry.drafter.bytes() }
        };
        self.entries.iter().map(info).collect()
    }

    pub fn get(&self, kind: DrafterKind) -> Option<&dyn Drafter> {
        self.entries.get(&kind).map(|entry| &*entry.drafter)
    }

    /// Asks the drafter that `context` names. One that is not there proposes nothing.
    pub fn draft(&self, context: &Context) -> Result<Draft, ModelError> {
        match self.get(context.asked.drafter) {
            Some(drafter) => drafter.draft(context),
            None => Ok(Draft { tree: Tree::root(context.root()), proposal: None, forwards: 0 }),
        }
    }

    /// What a new sequence knows about a drafter. Measures this device's costs when asked for the first time.
    pub fn adaptation(&mut self, kind: DrafterKind, model: &Transformer) -> Result<Option<Adaptation>, ModelError> {
        if self.verify.is_none() {
            self.verify = Some(measure::verify(model)?);
        }
        let verify = self.verify.clone().unwrap_or_default();
        let Some(entry) = self.entries.get_mut(&kind) else { return Ok(None) };
        if entry.adaptation.is_none() {
            let draft = measure::draft(model, &*entry.drafter, kind)?;
            entry.adaptation =
                Some(Adaptation::new(Arc::new(Costs { verify, draft }), entry.drafter.limit(), entry.drafter.prior()));
        }
        Ok(entry.adaptation.as_ref().map(Adaptation::fresh))
    }

    /// Takes in what a finished sequence saw.
    pub fn learn(&mut self, kind: DrafterKind, seen: &Adaptation) {
        if let Some(adaptation) = self.entries.get_mut(&kind).and_then(|entry| entry.adaptation.as_mut()) {
            adaptation.learn(seen);
        }
    }

    /// Seconds of a forward by its number of tokens, once measured.
    pub fn costs(&self) -> &[(usize, f64)] {
        self.verify.as_deref().unwrap_or_default()
    }
}

/// Shapes within `limit` that drafts may take: lengths as they come, widths thinning out.
pub fn shapes(limit: Shape) -> Vec<Shape> {
    let widths = [1, 2, 3, 4, 6, 8, 10].into_iter().filter(|width| *width <= limit.width);
    let shapes = widths.flat_map(|width| (1..=limit.length).map(move |length| Shape { width, length }));
    shapes.filter(|shape| shape.nodes_max() <= NODES_MAX).collect()
}
