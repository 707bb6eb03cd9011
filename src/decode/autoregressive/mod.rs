//! Decoding from left to right: a [`Decoder`] that prefills its prompt in chunks and then commits one token a step, or several
//! where a drafter's candidates turn out to be what the network chooses.
//!
//! [`tree`] holds candidates and the walk that verifies them, [`adaptation`] decides how much to draft, [`scoring`] reads a text that
//! is given. The machine keeps count of what the cache holds; it has no cache, no drafter and no clock.

pub mod adaptation;
pub mod scoring;
pub mod tree;

use std::collections::BTreeMap;

use super::canvas::{Canvas, Cell};
use super::{
    Decoder, Drafting, Edit, FinishReason, Noise, Pattern, Purpose, RowStatistics, Sampling, Status, Step, Wanted, Window, mix,
};
use adaptation::{Adaptation, Shape};
use tree::Tree;

/// Rows of every forward in the deterministic mode: a token and seven drafts.
pub const CANONICAL_ROWS: usize = 8;
/// Candidate tokens of one draft, shared prefixes counted once.
pub const NODES_MAX: usize = 64;

/// Who proposes candidates. The code behind each is one file of [`crate::draft`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum DrafterKind {
    /// A recurrent head's beam search (Zhang et al., arXiv 2403.09919).
    Redrafter,
    /// One head for each of the next tokens, and a static tree of their best (Cai et al., arXiv 2401.10774).
    Medusa,
    /// The recurrent head's own draws, one after another, verified by the ratio test.
    Chain,
    /// What followed the last few tokens where they stood before (prompt lookup); needs no training.
    Lookup,
}

impl DrafterKind {
    pub const ALL: [Self; 4] = [Self::Redrafter, Self::Medusa, Self::Chain, Self::Lookup];

    pub fn name(self) -> &'static str {
        match self {
            Self::Redrafter => "redrafter",
            Self::Medusa => "medusa",
            Self::Chain => "chain",
            Self::Lookup => "lookup",
        }
    }

    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }
}

/// How much a request lets a drafter propose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Drafts {
    pub drafter: DrafterKind,
    /// The widest and longest draft.
    pub shape: Shape,
    /// Draft less, or nothing, where that is faster by the costs measured and the acceptance seen. Without it every draft has
    /// the full shape.
    pub adapt: bool,
}

/// Settings of one autoregressive request, already validated.
#[derive(Clone, Debug, PartialEq)]
pub struct Parameters {
    pub sampling: Sampling,
    /// Tokens that end the text.
    pub ends: Vec<u32>,
    /// Prompt tokens run at a time.
    pub chunk: usize,
    pub seed: u64,
    /// Run every step in forwards of one shape, so that drafts cannot change a text by so much as a rounding.
    pub deterministic: bool,
    pub drafts: Option<Drafts>,
}

/// What drafting has come to.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Speculation {
    /// Forwards that verified at least one candidate.
    pub drafts: usize,
    /// Candidate tokens before shared prefixes were joined.
    pub candidates: usize,
    /// Candidate tokens verified: the nodes of all trees but their roots.
    pub drafted: usize,
    pub accepted: usize,
    /// Drafts of which exactly so many tokens were accepted.
    pub accepted_exactly: Vec<usize>,
}

impl Speculation {
    /// Tokens that a verifying forward yields: those accepted, and the one that the network chose behind them.
    pub fn acceptance_length(&self) -> f64 {
        if self.drafts == 0 { 0.0 } else { 1.0 + self.accepted as f64 / self.drafts as f64 }
    }

    /// Share of drafts whose first, second, … token was accepted.
    pub fn acceptance_by_position(&self) -> Vec<f64> {
        let reached = |position: usize| self.accepted_exactly[position + 1..].iter().sum::<usize>() as f64;
        (0..self.accepted_exactly.len().saturating_sub(1)).map(|at| reached(at) / self.drafts.max(1) as f64).collect()
    }

    fn record(&mut self, tree: &Tree, accepted: usize) {
        self.drafts += 1;
        self.candidates += tree.candidates();
        self.drafted += tree.len() - 1;
        self.accepted += accepted;
        self.accepted_exactly.resize(self.accepted_exactly.len().max(tree.depth() + 1), 0);
        self.accepted_exactly[accepted] += 1;
    }

    /// Sums over requests.
    pub fn add(&mut self, other: &Self) {
        self.drafts += other.drafts;
        self.candidates += other.candidates;
        self.drafted += other.drafted;
        self.accepted += other.accepted;
        self.accepted_exactly.resize(self.accepted_exactly.len().max(other.accepted_exactly.len()), 0);
        self.accepted_exactly.iter_mut().zip(&other.accepted_exactly).for_each(|(sum, count)| *sum += count);
    }
}

/// A text being continued.
pub struct Autoregressive {
    parameters: Parameters,
    canvas: Canvas,
    /// Positions whose keys the cache holds.
    cached: usize,
    /// The last committed token and the candidates behind it.
    tree: Tree,
    /// What [`Decoder::kept`] answers.
    kept: Vec<usize>,
    /// Row, among those wanted last, after which the last committed token was chosen.
    row: usize,
    adaptation: Option<Adaptation>,
    /// Tokens of the last forward behind the prompt, whose time is still to be told, and the draft asked for after it.
    ran: Option<usize>,
    asked: Option<Shape>,
    speculation: Speculation,
    step: usize,
}

impl Autoregressive {
    /// `canvas` has a prompt or fixed text, then one hole that reaches to its end. `adaptation` is asked where the drafts adapt.
    pub fn new(parameters: Parameters, canvas: Canvas, adaptation: Option<Adaptation>) -> Self {
        let tree = Tree::root(0);
        let mut decoder = Self {
            parameters,
            canvas,
            cached: 0,
            tree,
            kept: vec![],
            row: 0,
            adaptation,
            ran: None,
            asked: None,
            speculation: Speculation::default(),
            step: 0,
        };
        decoder.tree = Tree::root(decoder.last());
        decoder
    }

    /// Tokens known: prompt, fixed text and what is committed.
    fn known(&self) -> usize {
        self.canvas.prompt_len() + self.canvas.frontier()
    }

    fn last(&self) -> u32 {
        self.known().checked_sub(1).map_or(0, |at| self.canvas.sequence()[at])
    }

    /// Tokens that may still be committed.
    fn remaining(&self) -> usize {
        self.canvas.len() - self.canvas.frontier()
    }

    /// Known tokens that the next window runs: a chunk of the prompt, or the last one.
    fn next_chunk(&self) -> usize {
        (self.known() - self.cached).min(self.parameters.chunk.max(1))
    }

    /// Nodes of the largest window behind the prompt. It decides the cache's room, on which a deterministic forward's shape
    /// depends: there, nobody's drafts may change it. Static trees have other sizes than width times length.
    fn nodes_max(&self) -> usize {
        match self.parameters.drafts {
            _ if self.parameters.deterministic => CANONICAL_ROWS,
            None => 1,
            Some(Drafts { shape, .. }) if shape.width == 1 => 1 + shape.length,
            Some(_) => NODES_MAX,
        }
    }

    fn prefilling(&self) -> bool {
        self.known() - self.cached > 1 || self.step == 0
    }

    /// One number for each output position, the same however it is reached.
    fn uniforms(&self, depths: impl Iterator<Item = usize>) -> Noise {
        let first = self.canvas.frontier();
        Noise::Uniforms(depths.map(|depth| uniform(self.parameters.seed, first + depth)).collect())
    }

    /// The occurrences of every token before what follows `path`, if penalties ask.
    fn history(&self, path: &[u32]) -> Vec<(u32, u32, u32)> {
        let mut counts: BTreeMap<u32, (u32, u32)> = BTreeMap::new();
        let (given, cells) = (self.canvas.prompt_len(), self.canvas.cells());
        for (at, token) in self.canvas.sequence()[..self.known()].iter().enumerate() {
            let count = counts.entry(*token).or_default();
            let generated = at >= given && cells[at - given] == Cell::Committed;
            if generated { count.1 += 1 } else { count.0 += 1 }
        }
        path.iter().for_each(|token| counts.entry(*token).or_default().1 += 1);
        counts.into_iter().map(|(token, (prompt, text))| (token, prompt, text)).collect()
    }

    fn histories(&self, nodes: std::ops::Range<usize>) -> Vec<Vec<(u32, u32, u32)>> {
        let asked = self.parameters.sampling.penalties.any();
        nodes.filter(|_| asked).map(|node| self.history(&self.tree.path(node))).collect()
    }

    fn prefill_window(&self) -> Window {
        let chunk = self.next_chunk();
        let complete = self.cached + chunk == self.known();
        Window {
            tokens: self.canvas.sequence()[self.cached..self.cached + chunk].to_vec(),
            pattern: Pattern::Next,
            purpose: Purpose::Prefill,
            wanted: Wanted::Following(if complete { vec![chunk - 1] } else { vec![] }),
            guidance: None,
            sampling: self.parameters.sampling.clone(),
            noise: self.uniforms((0..usize::from(complete)).map(|_| 0)),
            alone: self.parameters.deterministic,
            histories: self.histories(0..usize::from(complete)),
        }
    }

    fn commit(&mut self, token: u32) {
        self.canvas.commit(self.canvas.frontier(), token);
    }
}

/// From 0 up to 1, 53 bits of it.
pub(crate) fn uniform(seed: u64, position: usize) -> f64 {
    (mix(seed ^ mix(position as u64)) >> 11) as f64 / (1u64 << 53) as f64
}

impl Decoder for Autoregressive {
    fn window(&self) -> Window {
        if self.prefilling() {
            return self.prefill_window();
        }
        let nodes = self.tree.len();
        let chain = self.tree.parents().iter().enumerate().skip(1).all(|(node, parent)| parent + 1 == node);
        let pattern = match (self.parameters.deterministic, chain) {
            (true, _) => Pattern::Canonical(CANONICAL_ROWS),
            (false, true) => Pattern::Next,
            (false, false) => Pattern::Tree(self.tree.parents().to_vec()),
        };
        Window {
            tokens: self.tree.tokens().to_vec(),
            pattern,
            purpose: if nodes > 1 { Purpose::Verify } else { Purpose::Decode },
            wanted: Wanted::Following((0..nodes).collect()),
            guidance: None,
            sampling: self.parameters.sampling.clone(),
            noise: self.uniforms(self.tree.depths().iter().copied()),
            alone: self.parameters.deterministic,
            histories: self.histories(0..nodes),
        }
    }

    fn advance(&mut self, rows: &[RowStatistics]) -> Step {
        let mut chosen: Vec<&RowStatistics> = Vec::new();
        self.ran = (!self.prefilling()).then(|| self.tree.len());
        let asked = self.asked.take();
        if self.prefilling() {
            self.kept = (0..self.next_chunk()).collect();
            self.cached += self.kept.len();
            if self.cached < self.known() {
                return Step { step: self.step, block: 0, edits: vec![] };
            }
            self.row = 0;
            chosen.push(&rows[0]);
        } else {
            let ends = &self.parameters.ends;
            self.kept = self.tree.walk(|node| rows[node].token, |token| ends.contains(&token), self.remaining());
            self.cached += self.kept.len();
            self.row = self.kept.last().copied().unwrap_or(0);
            if !self.tree.is_empty() {
                self.speculation.record(&self.tree, self.kept.len() - 1);
                // What the end of the text cut off was neither right nor wrong.
                let ended = self.kept.last().is_some_and(|node| ends.contains(&rows[*node].token));
                if let (false, Some(adaptation), Some(asked)) = (ended, &mut self.adaptation, asked) {
                    adaptation.observe(&self.tree, &self.kept, asked);
                }
            }
            chosen.extend(self.kept.iter().map(|node| &rows[*node]));
        }
        let first = self.canvas.frontier();
        let edits: Vec<Edit> = chosen
            .into_iter()
            .enumerate()
            .map(|(depth, row)| Edit {
                position: first + depth,
                token: row.token,
                status: Status::Committed,
                confidence: row.confidence,
                alternatives: row.alternatives.clone(),
            })
            .collect();
        edits.iter().for_each(|edit| self.commit(edit.token));
        self.tree = Tree::root(self.last());
        self.step += 1;
        Step { step: self.step - 1, block: 0, edits }
    }

    fn finished(&self) -> Option<FinishReason> {
        match self.canvas.first_end(&self.parameters.ends) {
            Some(_) => Some(FinishReason::Stop),
            None => (self.remaining() == 0).then_some(FinishReason::Length),
        }
    }

    fn canvas(&self) -> &Canvas {
        &self.canvas
    }

    fn cache_room(&self) -> usize {
        self.canvas.sequence().len() + self.nodes_max()
    }

    fn resumable(&self) -> bool {
        true
    }

    fn resume(&mut self, cached: usize) {
        debug_assert!(self.step == 0 && cached < self.known(), "something has to say what comes first");
        self.cached = cached;
    }

    fn kept(&self) -> &[usize] {
        &self.kept
    }

    fn drafting(&mut self) -> Option<Drafting> {
        let drafts = self.parameters.drafts?;
        // The last token of all is the network's own.
        let room = self.remaining().saturating_sub(1);
        if self.finished().is_some() || self.prefilling() || room == 0 {
            return None;
        }
        let mut shape = match &mut self.adaptation {
            Some(adaptation) => adaptation.choose(drafts.shape)?,
            None => drafts.shape,
        };
        if self.parameters.deterministic {
            shape = Shape { width: 1, length: shape.length.min(CANONICAL_ROWS - 1) };
        }
        shape.length = shape.length.min(room);
        self.asked = Some(shape);
        Some(Drafting {
            drafter: drafts.drafter,
            row: self.row,
            shape,
            least: self.adaptation.as_ref().map_or(0.0, Adaptation::least),
            temperature: self.parameters.sampling.temperature,
            seed: mix(self.parameters.seed ^ !mix(self.step as u64)),
        })
    }

    fn propose(&mut self, candidates: Tree) {
        debug_assert_eq!(candidates.tokens()[0], self.last(), "candidates follow the last committed token");
        if let (true, Some(adaptation), Some(asked)) = (candidates.is_empty(), &mut self.adaptation, self.asked) {
            adaptation.nothing(asked);
        }
        let tree = if self.parameters.deterministic { candidates.first_path() } else { candidates };
        self.tree = tree.cut(self.remaining().saturating_sub(1), self.nodes_max());
    }

    fn timed(&mut self, forward: Option<f64>, draft: f64) {
        if let Some(adaptation) = &mut self.adaptation {
            match (self.ran, forward) {
                (Some(nodes), Some(forward)) => adaptation.timed(nodes, forward),
                (Some(1), None) => adaptation.plain_beside(),
                _ => {}
            }
            if let Some(shape) = self.asked {
                adaptation.drafted(shape, draft);
            }
        }
    }

    fn adaptation(&self) -> Option<&Adaptation> {
        self.adaptation.as_ref()
    }

    fn speculation(&self) -> Option<&Speculation> {
        self.parameters.drafts.map(|_| &self.speculation)
    }
}
