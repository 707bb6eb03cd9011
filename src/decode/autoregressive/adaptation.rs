//! How much to draft: as much as pays, by what forwards cost on this device and by how many drafts were accepted so far.
//!
//! A draft of width `w` and length `l` yields `τ = 1 + Σ_k survival[w][k]` tokens, where `survival[w][k]` is the share of drafts
//! whose first `k` tokens were right within the first `w` beams, and costs one forward of its nodes and the drafter's own work.
//! Drafts have all lengths, and what would have followed a short one that was right is not known: so survival is the product of
//! the shares right at each depth among those that came so far (Kaplan and Meier's estimator). The best shape is that with most
//! tokens a second; where plain decoding is better, nothing is drafted, and a small draft now and then looks whether that still
//! holds. Within a shape, a drafter that knows how sure it is leaves out what promises less than it costs
//! ([`Adaptation::least`]): texts that it does not know cost little, and those that it does get long drafts. Costs are data:
//! measured before the first draft, and corrected by what forwards and drafts then take ([`Adaptation::timed`]), since a machine
//! is seldom as it was. This module has no clock.

use std::sync::Arc;

use super::tree::Tree;

/// Width and length of a draft.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Candidates side by side.
    pub width: usize,
    /// Tokens one after another, the root not counted.
    pub length: usize,
}

impl Shape {
    /// Nodes of the largest tree, the root included.
    pub fn nodes_max(self) -> usize {
        1 + self.width * self.length
    }
}

/// Seconds that things take on this device.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Costs {
    /// Of a forward of so many tokens over a cache, ascending; the first is of one token.
    pub verify: Vec<(usize, f64)>,
    pub draft: Vec<DraftCost>,
}

/// What drafting in one shape takes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DraftCost {
    pub shape: Shape,
    /// Candidate tokens before prefixes are shared.
    pub candidates: usize,
    /// The drafter's own time.
    pub seconds: f64,
}

impl Costs {
    /// Of a forward of `nodes` tokens, between or beyond the measured points on straight lines.
    pub fn verify(&self, nodes: f64) -> f64 {
        let at = |index: usize| self.verify.get(index).map(|(tokens, seconds)| (*tokens as f64, *seconds));
        let above = self.verify.iter().position(|(at, _)| *at as f64 >= nodes).unwrap_or(self.verify.len().saturating_sub(1));
        match (at(above.saturating_sub(1)), at(above)) {
            (Some(low), Some(high)) if high.0 > low.0 => low.1 + (high.1 - low.1) * (nodes - low.0) / (high.0 - low.0),
            (_, Some(point)) => point.1,
            _ => 0.0,
        }
    }
}

/// Weight of the newest draft in a moving share; a sequence's first drafts weigh more, since what others saw is only a guess at it.
const NEWEST: f64 = 0.2;
/// A draft must promise to be faster by this factor; what is measured is not known better.
const MARGIN: f64 = 1.1;
/// Plain tokens before the next look at a drafter that did not pay: at first, and at most.
const REST: (usize, usize) = (16, 128);
/// Weight of the newest time in a moving cost, and how far beyond the expected a time may count: the rest is an accident.
const TIMED: (f64, f64) = (0.1, 3.0);
/// Steps after which a plain one is taken to see what it costs.
const PLAIN_EVERY: usize = 64;
/// Plain steps before the first draft of all.
const PLAIN_FIRST: usize = 4;
/// Tokens of a text's first draft, how many times as long the next may be when all of it was right, and beyond what no draft need grow. One
/// token tells a text that the drafter does not know for the least cost, and two that are right make up for it.
const FIRST: usize = 1;
const GROWTH: usize = 4;
const LONGEST: usize = 1 << 10;
/// Plain steps after a draft of which nothing was right: in a text that the drafter has been right about, and in one where it has not;
/// twice as many each time on end, and at most.
const WRONG_PAUSE: (usize, usize) = (2, 8);
const WRONG_PAUSE_MAX: usize = 64;
/// No candidate need be surer than this.
const LEAST_MAX: f64 = 0.5;
/// A drafter's time that is worth sparing, by a plain step's.
const COSTLY: f64 = 0.01;
/// Most plain steps after a draft that the drafter left empty; as many as were empty on end.
const EMPTY_PAUSE: usize = 8;
/// The draft that looks.
const LOOK: Shape = Shape { width: 1, length: 2 };

/// What has been learnt, and what follows from it.
#[derive(Clone, Debug)]
pub struct Adaptation {
    costs: Arc<Costs>,
    /// Seconds of a forward of one token; and what forwards of several take beyond that and what their further tokens were measured to.
    plain: f64,
    beyond: f64,
    /// What drafts take, by what they took when they were measured.
    drafting: f64,
    /// Steps since the last plain one.
    since_plain: usize,
    plain_steps: usize,
    /// `[width - 1][k - 1]`: share of drafts accepted to depth `k` within the first `width` beams, of those accepted to `k - 1`.
    right: Vec<Vec<f64>>,
    /// Likewise, of all drafts: what follows from `right`.
    survival: Vec<Vec<f64>>,
    /// Likewise, share of drafts that had a token at depth `k` at all: a drafter that is not sure stops early.
    offered: Vec<Vec<f64>>,
    /// Nodes by candidates: how much sharing of prefixes leaves.
    packed: f64,
    /// Tokens a second by plain decoding's, as expected of the best draft.
    gain: f64,
    /// Drafts on end that the drafter left empty, and of which nothing was right.
    empty: usize,
    wrong: usize,
    /// Whether any draft of this text had something right.
    known: bool,
    /// Longest draft so far: a text that the drafter may not know begins with short ones, which grow as they are right.
    longest: usize,
    drafts: usize,
    /// Plain steps until the next look, where drafts do not pay; and until the next draft, where the last came to nothing.
    resting: usize,
    rest: usize,
    pausing: usize,
}

impl Adaptation {
    /// Before anything has been seen: each further token is expected to be right with probability `prior`. `limit` is the largest
    /// shape that will be asked about.
    pub fn new(costs: Arc<Costs>, limit: Shape, prior: f64) -> Self {
        let offered = vec![(0..limit.length as i32).map(|depth| prior.powi(depth)).collect(); limit.width];
        let right = vec![vec![prior; limit.length]; limit.width];
        let plain = costs.verify(1.0);
        let (drafting, since_plain, plain_steps) = (1.0, 0, 0);
        Self {
            costs,
            plain,
            beyond: 0.0,
            drafting,
            since_plain,
            plain_steps,
            survival: survival(&right),
            right,
            offered,
            packed: 0.8,
            gain: 1.0,
            empty: 0,
            wrong: 0,
            known: false,
            longest: FIRST,
            drafts: 0,
            resting: 0,
            rest: REST.0,
            pausing: 0,
        }
    }

    /// What a sequence begins with: what others saw.
    pub fn fresh(&self) -> Self {
        Self {
            drafts: 0,
            resting: 0,
            rest: REST.0,
            pausing: 0,
            empty: 0,
            wrong: 0,
            known: false,
            longest: FIRST,
            ..self.clone()
        }
    }

    /// Takes in what a finished sequence saw.
    pub fn learn(&mut self, other: &Self) {
        let weight = other.drafts as f64 / (other.drafts as f64 + 20.0);
        let shares = |of: &mut Vec<Vec<f64>>, others: &[Vec<f64>]| {
            for (mine, theirs) in of.iter_mut().flatten().zip(others.iter().flatten()) {
                *mine += weight * (theirs - *mine);
            }
        };
        shares(&mut self.right, &other.right);
        shares(&mut self.offered, &other.offered);
        self.survival = survival(&self.right);
        self.packed += weight * (other.packed - self.packed);
        // Costs are the machine's, not the text's: the newest count.
        (self.plain, self.beyond, self.drafting) = (other.plain, other.beyond, other.drafting);
        (self.since_plain, self.plain_steps) = (other.since_plain, other.plain_steps);
    }

    /// Seconds of one plain step on this device.
    pub fn plain_step(&self) -> f64 {
        self.plain
    }

    /// Takes in what a forward of `nodes` tokens took in seconds.
    pub fn timed(&mut self, nodes: usize, seconds: f64) {
        let seconds = seconds.min(TIMED.1 * self.verify(nodes as f64));
        if nodes <= 1 {
            (self.since_plain, self.plain_steps) = (0, self.plain_steps + 1);
            // The first times correct a guess.
            let weight = TIMED.0.max(1.0 / (self.plain_steps as f64 + 1.0));
            self.plain += weight * (seconds - self.plain);
        } else {
            self.since_plain += 1;
            self.beyond += TIMED.0 * (seconds - self.measured(nodes as f64) - self.beyond);
        }
    }

    /// Takes in a plain step whose time cannot be told, as others ran beside it.
    pub fn plain_beside(&mut self) {
        (self.since_plain, self.plain_steps) = (0, self.plain_steps + 1);
    }

    /// Takes in what a draft took.
    pub fn drafted(&mut self, shape: Shape, seconds: f64) {
        let Some(cost) = self.costs.draft.iter().find(|cost| cost.shape == shape).filter(|cost| cost.seconds > 0.0) else {
            return;
        };
        let ratio = (seconds / cost.seconds).min(TIMED.1 * self.drafting);
        self.drafting += TIMED.0 * (ratio - self.drafting);
    }

    /// Seconds of a forward of several tokens: what each adds is as measured, and the whole as timed. (By a factor, noise in what few
    /// tokens add would be multiplied for many.)
    fn verify(&self, nodes: f64) -> f64 {
        if nodes <= 1.0 { self.plain } else { (self.measured(nodes) + self.beyond).max(self.plain) }
    }

    fn measured(&self, nodes: f64) -> f64 {
        self.plain + self.costs.verify(nodes) - self.costs.verify(1.0)
    }

    /// Tokens that a draft of `shape` is expected to yield.
    fn tokens(&self, shape: Shape) -> f64 {
        1.0 + self.survival[shape.width - 1][..shape.length].iter().sum::<f64>()
    }

    /// Seconds of a draft of which the drafter is as sure as it was so far.
    fn seconds(&self, draft: &DraftCost) -> f64 {
        let Shape { width, length } = draft.shape;
        self.seconds_of(draft, self.offered[width - 1][..length].iter().sum::<f64>() / length.max(1) as f64)
    }

    /// Of a draft with so large a share of its tokens.
    fn seconds_of(&self, draft: &DraftCost, share: f64) -> f64 {
        let packed = if draft.shape.width == 1 { 1.0 } else { self.packed };
        self.drafting * draft.seconds + self.verify(1.0 + packed * share * draft.candidates as f64)
    }

    /// The probability that a candidate must have to be worth its place in the forward: what that place costs, in the tokens that
    /// would be decoded meanwhile.
    pub fn least(&self) -> f64 {
        let place = (self.costs.verify(8.0) - self.costs.verify(1.0)) / 7.0;
        (self.gain.max(1.0) * place / self.plain.max(1e-9)).clamp(0.0, LEAST_MAX)
    }

    /// The shape within `limit` to draft next, or `None` where a plain step is better.
    pub fn choose(&mut self, limit: Shape) -> Option<Shape> {
        if self.plain_steps < PLAIN_FIRST || self.since_plain >= PLAIN_EVERY {
            return None;
        }
        if self.pausing > 0 {
            self.pausing -= 1;
            return None;
        }
        let fits = |shape: Shape| {
            shape.width <= limit.width.min(self.survival.len())
                && shape.length <= limit.length.min(self.survival.first().map_or(0, Vec::len))
        };
        let plain = self.plain;
        let drafts = || self.costs.draft.iter().filter(|draft| fits(draft.shape));
        let gains = drafts().map(|draft| (draft.shape, self.tokens(draft.shape) * plain / self.seconds(draft)));
        // Whether drafts pay is decided by the best of all. A text's first is short, whatever it brings by itself.
        let (mut gain, mut chosen) = (0.0, (0.0, None));
        for (shape, found) in gains {
            gain = found.max(gain);
            if found > chosen.0 && shape.length <= self.longest {
                chosen = (found, Some(shape));
            }
        }
        if gain >= MARGIN && (self.drafts == 0 || chosen.0 >= 1.0) {
            (self.gain, self.rest) = (gain, REST.0);
            return chosen.1;
        }
        if self.resting > 0 {
            self.resting -= 1;
            return None;
        }
        // It does not pay: rest, longer each time, then look again.
        let at_best = |draft: &DraftCost| (1 + draft.shape.length) as f64 * plain / self.seconds_of(draft, 1.0);
        let look = Shape { width: LOOK.width, length: LOOK.length.min(limit.length) };
        let looks = fits(look) && drafts().any(|draft| at_best(draft) >= MARGIN);
        (self.gain, self.resting, self.rest) = (gain, self.rest, (2 * self.rest).min(REST.1));
        looks.then_some(look)
    }

    /// Takes in that the drafter, asked for a draft of `shape`, was not sure of anything. Where asking takes time, it is asked less.
    pub fn nothing(&mut self, shape: Shape) {
        let asking = self.costs.draft.iter().find(|cost| cost.shape == shape).map_or(0.0, |cost| self.drafting * cost.seconds);
        if asking > COSTLY * self.plain {
            self.empty += 1;
            self.pausing = self.empty.min(EMPTY_PAUSE);
        }
    }

    /// Takes in how far a draft was right that had been asked for in `asked`: `path` are the nodes confirmed, the root first.
    pub fn observe(&mut self, tree: &Tree, path: &[usize], asked: Shape) {
        self.drafts += 1;
        self.empty = 0;
        if path.len() <= 1 {
            // The head may be as sure of a text that it does not know as of others: what counts is what comes of it.
            self.wrong += 1;
            self.longest = (self.longest / 2).max(1);
            let pause = if self.known { WRONG_PAUSE.0 } else { WRONG_PAUSE.1 };
            self.pausing = (pause << (self.wrong - 1).min(8)).min(WRONG_PAUSE_MAX);
        } else {
            (self.wrong, self.known) = (0, true);
            if path.len() > tree.depth() {
                self.longest = (GROWTH * self.longest).min(LONGEST);
            }
        }
        let newest = NEWEST.max(1.0 / (self.drafts as f64 + 2.0));
        let width = tree.ranks().iter().max().map_or(0, |rank| rank + 1).min(self.survival.len());
        if width > 1 {
            let packed = (tree.len() - 1) as f64 / tree.candidates().max(1) as f64;
            self.packed += NEWEST * (packed.min(1.0) - self.packed);
        }
        for beams in 1..=width {
            let right = path[1..].iter().take_while(|node| tree.ranks()[**node] < beams).count();
            let nodes = tree.ranks().iter().zip(tree.depths()).filter(|(rank, _)| **rank < beams);
            let depth = nodes.map(|(_, depth)| *depth).max().unwrap_or(0);
            let moved = |share: &mut f64, yes: bool| *share += newest * (f64::from(u8::from(yes)) - *share);
            // What would have followed a token that was wrong, or the last, is not known.
            for (at, share) in self.right[beams - 1].iter_mut().enumerate().take(asked.length.min(right + 1)) {
                moved(share, at < right);
            }
            for (at, share) in self.offered[beams - 1].iter_mut().enumerate().take(asked.length) {
                moved(share, at < depth);
            }
        }
        self.survival = survival(&self.right);
    }
}

/// The share of drafts that come to each depth, from the shares that come from one to the next; more beams are right at least as often.
fn survival(right: &[Vec<f64>]) -> Vec<Vec<f64>> {
    let mut all: Vec<Vec<f64>> = Vec::with_capacity(right.len());
    for shares in right {
        let mut come = 1.0;
        let mut survival: Vec<f64> = shares
            .iter()
            .map(|share| {
                come *= share;
                come
            })
            .collect();
        if let Some(narrower) = all.last() {
            survival.iter_mut().zip(narrower).for_each(|(share, less)| *share = share.max(*less));
        }
        all.push(survival);
    }
    all
}

#[cfg(test)]
#[path = "adaptation_tests.rs"]
mod tests;
