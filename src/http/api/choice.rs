//! One choice: the events of its generation become what clients of this kind of API append, or put in the place of what they had.
//!
//! A whole answer is its deltas joined, so that streaming and not streaming cannot differ. It knows no JSON.

use std::sync::Arc;

use tonic::Status;

use super::ask::Ask;
use crate::checkpoint::tokenizer::Tokenizer;
use crate::engine::request::ModelInfo;
use crate::service::proto::generate_event::Event;
use crate::service::proto::{Cell, Committed, Edit, EditStatus, FinishReason, Finished, GenerateEvent, Started, Usage};
use crate::service::status;

/// What a masked cell that nobody has a guess for looks like in a draft.
pub const MASK: char = '░';

/// What one event adds to a choice.
#[derive(Debug, Default)]
pub struct Delta {
    pub index: u64,
    pub seed: u64,
    /// The first of its choice.
    pub first: bool,
    /// To append; or the whole text so far, if drafts are wanted.
    pub text: String,
    pub tokens: Vec<Token>,
    pub end: Option<End>,
}

/// A token that was chosen, and how probable it was.
#[derive(Clone, Debug)]
pub struct Token {
    pub text: String,
    pub logprob: f64,
    /// Best first.
    pub alternatives: Vec<(String, f64)>,
    /// Characters of the choice's text before it.
    pub offset: usize,
}

/// How a choice ended.
#[derive(Clone, Debug)]
pub struct End {
    pub reason: FinishReason,
    pub usage: Usage,
}

/// One choice on its way.
pub struct Choice {
    index: u64,
    seed: u64,
    model: Arc<ModelInfo>,
    /// Alternatives wanted beside each token, if tokens are.
    alternatives: Option<usize>,
    /// Where text stands behind the gap: it is the client's own and stays out of the answer.
    gap: Option<Gap>,
    draft: Option<Draft>,
    /// The text so far, as the client is to have it.
    text: String,
}

impl Choice {
    pub fn new(index: u64, ask: &Ask, model: Arc<ModelInfo>) -> Self {
        Self {
            index,
            seed: 0,
            model,
            alternatives: ask.logprobs.map(|alternatives| alternatives as usize),
            gap: ask.suffix.then(Gap::default),
            draft: ask.diffusing.then(Draft::default),
            text: String::new(),
        }
    }

    /// What an event adds, if it adds anything.
    pub fn take(&mut self, event: GenerateEvent) -> Result<Option<Delta>, Status> {
        match event.event {
            Some(Event::Started(started)) => self.started(started),
            Some(Event::Step(step)) => self.edited(&step.edits),
            Some(Event::Committed(committed)) => self.committed(committed),
            Some(Event::Finished(finished)) => Ok(Some(self.finished(finished))),
            None => Ok(None),
        }
    }

    fn started(&mut self, started: Started) -> Result<Option<Delta>, Status> {
        self.seed = started.sampling.and_then(|sampling| sampling.seed).unwrap_or_default();
        if let Some(gap) = &mut self.gap {
            gap.length = started.canvas.iter().filter(|cell| cell.masked).count();
        }
        if let Some(draft) = &mut self.draft {
            let shown = self.gap.as_ref().map_or(started.canvas.len(), |gap| gap.length);
            draft.begin(&started.canvas[..shown], &self.model.generation.eos_token_ids);
        }
        // Worth a delta even without text: the request has its place.
        let text = self.drafted()?.unwrap_or_default();
        Ok(Some(Delta { first: true, ..self.delta(text) }))
    }

    fn edited(&mut self, edits: &[Edit]) -> Result<Option<Delta>, Status> {
        if let Some(draft) = &mut self.draft {
            edits.iter().for_each(|edit| draft.edit(edit));
        }
        Ok(self.drafted()?.map(|text| self.delta(text)))
    }

    fn committed(&mut self, committed: Committed) -> Result<Option<Delta>, Status> {
        let tokens = self.tokens(&committed);
        let text = match &mut self.gap {
            Some(gap) => gap.take(&committed, &self.model.tokenizer).map_err(|reason| undecodable(&reason))?,
            None => committed.text,
        };
        self.text.push_str(&text);
        let worth = self.draft.is_none() && !(text.is_empty() && tokens.is_empty());
        Ok(worth.then(|| Delta { tokens, ..self.delta(text) }))
    }

    fn finished(&mut self, finished: Finished) -> Delta {
        let reason = finished.reason();
        // The last draft is the text itself, which a stop string may have cut.
        let text = if self.draft.is_some() { self.text.clone() } else { String::new() };
        Delta { end: Some(End { reason, usage: finished.usage.unwrap_or_default() }), ..self.delta(text) }
    }

    fn delta(&self, text: String) -> Delta {
        Delta { index: self.index, seed: self.seed, text, ..Delta::default() }
    }

    /// The draft, where it has changed.
    fn drafted(&mut self) -> Result<Option<String>, Status> {
        let tokenizer = &self.model.tokenizer;
        let text = self.draft.as_mut().map(|draft| draft.text(tokenizer)).transpose();
        text.map(Option::flatten).map_err(|reason| undecodable(&reason))
    }

    fn tokens(&self, committed: &Committed) -> Vec<Token> {
        let Some(wanted) = self.alternatives else { return vec![] };
        let mut offset = self.text.chars().count();
        let mut tokens = vec![];
        for found in &committed.logprobs {
            let text = self.model.tokenizer.token_text(found.token_id);
            let next = offset + text.chars().count();
            // Text that was given has no probability, for nobody chose it.
            if let Some(logprob) = found.logprob {
                let alternatives = found.alternatives.iter().take(wanted);
                let alternatives = alternatives.map(|other| (other.text.clone(), other.logprob)).collect();
                tokens.push(Token { text, logprob, alternatives, offset });
            }
            offset = next;
        }
        tokens
    }
}

fn undecodable(reason: &str) -> Status {
    status::fault(reason, None)
}

/// The gap before a text that is given: what is committed is both, and only the gap's is an answer.
#[derive(Default)]
struct Gap {
    length: usize,
    /// Its tokens.
    ids: Vec<u32>,
    /// What has been committed, the text behind the gap included.
    text: String,
    given: usize,
}

impl Gap {
    fn take(&mut self, committed: &Committed, tokenizer: &Tokenizer) -> Result<String, String> {
        self.text.push_str(&committed.text);
        self.ids.extend(committed.token_ids.iter().take(self.length - self.ids.len()));
        // Text may be ahead of its tokens, but only by less than one token: before the last of the gap it is all the gap's.
        let end = match self.ids.len() == self.length {
            true => tokenizer.decode(&self.ids, false)?.len().min(self.text.len()),
            false => self.text.len(),
        };
        let text = self.text.get(self.given..end).unwrap_or_default().to_owned();
        self.given = end.max(self.given);
        Ok(text)
    }
}

/// The canvas as it stands, guesses included.
#[derive(Default)]
struct Draft {
    cells: Vec<DraftCell>,
    ends: Vec<u32>,
    /// The last text given, so that none is given twice.
    given: Option<String>,
}

#[derive(Clone, Copy)]
struct DraftCell {
    /// A committed token or a guess.
    token: Option<u32>,
    committed: bool,
}

impl Draft {
    fn begin(&mut self, canvas: &[Cell], ends: &[u32]) {
        let cell = |cell: &Cell| DraftCell { token: (!cell.masked).then_some(cell.token_id), committed: !cell.masked };
        self.cells = canvas.iter().map(cell).collect();
        self.ends = ends.to_vec();
    }

    fn edit(&mut self, edit: &Edit) {
        let Some(cell) = self.cells.get_mut(edit.position as usize) else { return };
        *cell = match edit.status() {
            EditStatus::Committed | EditStatus::Edited => DraftCell { token: Some(edit.token_id), committed: true },
            EditStatus::Provisional => DraftCell { token: Some(edit.token_id), committed: false },
            EditStatus::Remasked | EditStatus::Unspecified => DraftCell { token: None, committed: false },
        };
    }

    /// The draft's text up to a committed end, if it differs from the last one.
    fn text(&mut self, tokenizer: &Tokenizer) -> Result<Option<String>, String> {
        let ended = |cell: &DraftCell| cell.committed && cell.token.is_some_and(|token| self.ends.contains(&token));
        let shown = self.cells.iter().position(ended).unwrap_or(self.cells.len());
        let mut text = String::new();
        for run in self.cells[..shown].chunk_by(|one, next| one.token.is_some() == next.token.is_some()) {
            let ids: Vec<u32> = run.iter().filter_map(|cell| cell.token).collect();
            match ids.is_empty() {
                true => text.extend(std::iter::repeat_n(MASK, run.len())),
                false => text.push_str(&tokenizer.decode(&ids, false)?),
            }
        }
        let changed = self.given.as_ref() != Some(&text);
        self.given = Some(text);
        Ok(self.given.clone().filter(|_| changed))
    }
}
