//! Who waits, who is decoded, and who runs in a round: a pure state machine, without a device, a clock or a channel.
//!
//! A request's demand is counted in tokens (canvas and cache together) against a budget, beside the number of requests. Places are
//! given in the order of priority and then of arrival. Whoever is first waits for room even where a smaller one behind would fit, and
//! everybody who is overtaken rises: neither large requests nor unimportant ones starve.

use std::collections::VecDeque;

/// A request's number, in the order of arrival.
pub type Id = u64;

/// So many overtakings make up for one step of priority.
const OVERTAKEN: u32 = 4;
/// So many may have their readers behind at least, however few may wait.
const LINGERING_MIN: usize = 64;
/// Prompt tokens that one round computes, all sequences together, so that a long prompt does not hold up those who decode.
pub const PREFILL_ROWS: usize = 512;

/// What may be in the engine at one time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// Sequences that are decoded together, and their tokens.
    pub resident: usize,
    pub tokens: usize,
    /// Requests that wait, and their tokens. As many, or 64 if that is more, may be complete and wait for their readers.
    pub queued: usize,
    pub queued_tokens: usize,
}

/// Why a request is not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// So many wait already.
    Requests(usize),
    /// So many tokens wait already.
    Tokens(usize),
    /// It would never fit.
    TooLarge { needed: usize, budget: usize },
}

#[derive(Clone, Copy, Debug)]
struct Waiting {
    id: Id,
    tokens: usize,
    priority: i32,
    overtaken: u32,
}

impl Waiting {
    /// Largest first; then the earliest.
    fn rank(&self) -> (i64, std::cmp::Reverse<Id>) {
        (i64::from(self.priority) * i64::from(OVERTAKEN) + i64::from(self.overtaken), std::cmp::Reverse(self.id))
    }
}

/// The engine's book-keeping of requests.
#[derive(Debug)]
pub struct Scheduler {
    bounds: Bounds,
    next: Id,
    waiting: Vec<Waiting>,
    /// With their tokens, in the order of admission.
    residents: Vec<(Id, usize)>,
    /// Complete, but not yet read to the end, in the order of completion.
    lingering: VecDeque<Id>,
}

impl Scheduler {
    pub fn new(bounds: Bounds) -> Self {
        Self { bounds, next: 0, waiting: vec![], residents: vec![], lingering: VecDeque::new() }
    }

    pub fn bounds(&self) -> Bounds {
        self.bounds
    }

    /// A request for so many tokens queues up; a higher priority goes first.
    pub fn submit(&mut self, tokens: usize, priority: i32) -> Result<Id, Refusal> {
        if tokens > self.bounds.tokens {
            return Err(Refusal::TooLarge { needed: tokens, budget: self.bounds.tokens });
        }
        let requests = self.waiting.len();
        if requests >= self.bounds.queued.max(1) {
            return Err(Refusal::Requests(requests));
        }
        let queued = self.waiting_tokens();
        // One may always wait, however long.
        if !self.waiting.is_empty() && queued + tokens > self.bounds.queued_tokens {
            return Err(Refusal::Tokens(queued));
        }
        let id = self.next;
        self.next += 1;
        self.waiting.push(Waiting { id, tokens, priority, overtaken: 0 });
        Ok(id)
    }

    /// Gives the next one its place, if there is one and room for it.
    pub fn admit(&mut self) -> Option<Id> {
        let (index, first) = self.waiting.iter().enumerate().max_by_key(|(_, waiting)| waiting.rank())?;
        let first = *first;
        if self.residents.len() >= self.bounds.resident.max(1) || first.tokens > self.room() {
            return None;
        }
        self.waiting.remove(index);
        self.waiting.iter_mut().filter(|other| other.id < first.id).for_each(|other| other.overtaken += 1);
        self.residents.push((first.id, first.tokens));
        Some(first.id)
    }

    /// A request is over, wherever it was. False if there is none of this number.
    pub fn leave(&mut self, id: Id) -> bool {
        let before = self.active();
        self.waiting.retain(|waiting| waiting.id != id);
        self.residents.retain(|(resident, _)| *resident != id);
        self.lingering.retain(|lingering| *lingering != id);
        self.active() < before
    }

    /// A resident is complete and gives up its place, but its reader has not taken everything yet. Where too many readers are behind,
    /// gives the request that has been complete for longest and has to go.
    pub fn linger(&mut self, id: Id) -> Option<Id> {
        if self.leave(id) {
            self.lingering.push_back(id);
        }
        let most = self.bounds.queued.max(LINGERING_MIN);
        if self.lingering.len() > most { self.lingering.pop_front() } else { None }
    }

    /// Requests in whatever state.
    pub fn active(&self) -> usize {
        self.waiting.len() + self.residents.len() + self.lingering.len()
    }

    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    pub fn waiting_tokens(&self) -> usize {
        self.waiting.iter().map(|waiting| waiting.tokens).sum()
    }

    pub fn residents(&self) -> usize {
        self.residents.len()
    }

    /// Tokens that the residents leave.
    pub fn room(&self) -> usize {
        self.bounds.tokens.saturating_sub(self.tokens())
    }

    /// Tokens of the residents.
    pub fn tokens(&self) -> usize {
        self.residents.iter().map(|(_, tokens)| tokens).sum()
    }
}

/// Who runs in a round, given each resident's prompt tokens to compute (0 for those who decode), in the order of admission. Whoever
/// decodes always does; of those still at their prompts the first does, and others while [`PREFILL_ROWS`] last.
pub fn round(prefills: &[usize]) -> Vec<bool> {
    let mut used = 0;
    let runs = |rows: &usize| {
        let fits = *rows == 0 || used == 0 || used + rows <= PREFILL_ROWS;
        used += if fits { *rows } else { 0 };
        fits
    };
    prefills.iter().map(runs).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;

    const BOUNDS: Bounds = Bounds { resident: 2, tokens: 100, queued: 4, queued_tokens: 150 };

    #[test]
    fn the_first_come_is_the_first_served() {
        let mut scheduler = Scheduler::new(BOUNDS);
        let ids: Vec<Id> = (0..4).map(|_| scheduler.submit(10, 0).unwrap()).collect();
        assert_eq!(scheduler.submit(10, 0), Err(Refusal::Requests(4)));
        assert_eq!((scheduler.admit(), scheduler.admit(), scheduler.admit()), (Some(ids[0]), Some(ids[1]), None));
        assert!(scheduler.leave(ids[0]) && !scheduler.leave(ids[0]));
        assert_eq!(scheduler.admit(), Some(ids[2]));
        assert_eq!((scheduler.active(), scheduler.residents(), scheduler.waiting(), scheduler.tokens()), (3, 2, 1, 20));
    }

    #[test]
    fn tokens_count_beside_requests() {
        let mut scheduler = Scheduler::new(BOUNDS);
        assert_eq!(scheduler.submit(101, 0), Err(Refusal::TooLarge { needed: 101, budget: 100 }));
        let (large, small) = (scheduler.submit(80, 0).unwrap(), scheduler.submit(30, 0).unwrap());
        let _third = scheduler.submit(40, 0).unwrap();
        assert_eq!(scheduler.submit(1, 0), Err(Refusal::Tokens(150)));
        assert_eq!(scheduler.admit(), Some(large));
        assert_eq!(scheduler.admit(), None, "30 more do not fit");
        scheduler.leave(large);
        assert_eq!(scheduler.admit(), Some(small));
        let mut scheduler = Scheduler::new(Bounds { queued_tokens: 5, ..BOUNDS });
        assert!(scheduler.submit(50, 0).is_ok(), "one may wait, however long");
    }

    #[test]
    fn a_large_request_is_not_starved_by_small_ones() {
        let mut scheduler = Scheduler::new(BOUNDS);
        let first = scheduler.submit(60, 0).unwrap();
        let large = scheduler.submit(90, 0).unwrap();
        scheduler.admit();
        let _small = scheduler.submit(10, 0).unwrap();
        assert_eq!(scheduler.admit(), None, "the small one would fit, but waits behind the large one");
        scheduler.leave(first);
        assert_eq!(scheduler.admit(), Some(large));
    }

    #[test]
    fn priority_goes_first_but_starves_nobody() {
        let mut scheduler = Scheduler::new(Bounds { resident: 1, ..BOUNDS });
        let low = scheduler.submit(1, -2).unwrap();
        let mut overtaken = 0;
        loop {
            let high = scheduler.submit(1, 0).unwrap();
            let admitted = scheduler.admit().unwrap();
            scheduler.leave(admitted);
            if admitted == low {
                scheduler.leave(high);
                break;
            }
            assert_eq!(admitted, high);
            overtaken += 1;
        }
        assert_eq!(overtaken, 2 * OVERTAKEN);
    }

    #[test]
    fn prompts_share_a_round_and_nobody_who_decodes_waits() {
        assert_eq!(round(&[0, 400, 0, 200, 100, 12]), [true, true, true, false, true, true]);
        assert_eq!(round(&[0, 4096, 1]), [true, true, false], "one prompt always goes on");
        assert_eq!(round(&[]), [false; 0]);
    }

    /// Random requests, admissions, endings and slow readers, against the plainest account of what must be true.
    #[test]
    fn nothing_is_lost_or_served_twice_and_the_budget_is_kept() {
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        enum At {
            Waiting,
            Resident,
            Lingering,
        }
        let mut cut = 0;
        for seed in 0..300 {
            let mut behind: Vec<Id> = vec![];
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            let bounds = Bounds {
                resident: rng.random_range(1..6),
                tokens: rng.random_range(10..200),
                queued: rng.random_range(1..12),
                queued_tokens: rng.random_range(0..300),
            };
            let mut scheduler = Scheduler::new(bounds);
            let mut model: BTreeMap<Id, (At, usize)> = BTreeMap::new();
            let (mut taken, mut served) = (0, BTreeSet::new());
            // Of every tenth seed nobody leaves, and readers fall behind.
            let (acts, count): (&[u32], _) = if seed % 10 == 0 { (&[0, 2, 4, 4], 1200) } else { (&[0, 1, 2, 3, 4, 5], 400) };
            for _ in 0..count {
                match acts[rng.random_range(0..acts.len())] {
                    0 | 1 => {
                        let (tokens, priority) = (rng.random_range(1..220), rng.random_range(-3..4));
                        let waiting: Vec<_> = model.values().filter(|(at, _)| *at == At::Waiting).collect();
                        let queued: usize = waiting.iter().map(|(_, tokens)| tokens).sum();
                        let fits = tokens <= bounds.tokens
                            && waiting.len() < bounds.queued
                            && (waiting.is_empty() || queued + tokens <= bounds.queued_tokens);
                        match scheduler.submit(tokens, priority) {
                            Ok(id) => {
                                assert!(fits && model.insert(id, (At::Waiting, tokens)).is_none());
                                taken += 1;
                            }
                            Err(refusal) => assert!(!fits, "{refusal:?}"),
                        }
                    }
                    2 | 3 => {
                        while let Some(id) = scheduler.admit() {
                            let (at, _) = model.get_mut(&id).expect("only what was submitted is admitted");
                            assert_eq!(*at, At::Waiting, "nobody is admitted twice");
                            *at = At::Resident;
                            assert!(served.insert(id));
                        }
                    }
                    4 => {
                        let complete = model.iter().find(|(_, (at, _))| *at == At::Resident).map(|(id, _)| *id);
                        if let Some(id) = complete {
                            let gone = scheduler.linger(id);
                            model.insert(id, (At::Lingering, 0));
                            behind.push(id);
                            behind.retain(|id| model.contains_key(id));
                            assert_eq!(
                                gone,
                                (behind.len() > LINGERING_MIN).then_some(behind[0]),
                                "the one that is behind for longest"
                            );
                            if let Some(id) = gone {
                                model.remove(&id);
                                cut += 1;
                            }
                        }
                    }
                    _ => {
                        // A client leaves, wherever its request is.
                        let index = rng.random_range(0..model.len().max(1));
                        if let Some(id) = model.keys().nth(index).copied() {
                            assert!(scheduler.leave(id));
                            model.remove(&id);
                            served.insert(id);
                        }
                    }
                }
                let count = |wanted: At| model.values().filter(|(at, _)| *at == wanted).count();
                let tokens: usize = model.values().filter(|(at, _)| *at == At::Resident).map(|(_, tokens)| tokens).sum();
                assert!(tokens <= bounds.tokens && count(At::Resident) <= bounds.resident);
                assert_eq!((scheduler.waiting(), scheduler.residents()), (count(At::Waiting), count(At::Resident)));
                assert_eq!((scheduler.tokens(), scheduler.active()), (tokens, model.len()));
            }
            // Given room, everybody gets a place.
            loop {
                while let Some(id) = scheduler.admit() {
                    assert!(served.insert(id));
                    model.insert(id, (At::Resident, 0));
                }
                let Some(id) = model.iter().find(|(_, (at, _))| *at != At::Waiting).map(|(id, _)| *id) else { break };
                assert!(scheduler.leave(id));
                model.remove(&id);
            }
            assert_eq!((scheduler.active(), model.len(), served.len()), (0, 0, taken));
        }
        assert!(cut > 0, "readers fell behind");
    }
}
