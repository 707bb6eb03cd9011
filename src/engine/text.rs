//! From a growing run of committed tokens to text that may be given out: whole characters only, and nothing that may turn out to
//! be the beginning of a stop string.

use crate::checkpoint::tokenizer::Tokenizer;

/// Text that became final, with its tokens.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Released {
    pub token_ids: Vec<u32>,
    pub text: String,
    /// A stop string was met; the text ends before it.
    pub stopped: bool,
}

/// Incremental detokeniser of one sequence. What it releases, joined, is the text of all tokens up to a stop string.
///
/// A token is decoded together with the few before it, since its text may depend on them (a character in several tokens, a space
/// that only a first token lacks), and never with all: the work for a token does not grow with the text.
#[derive(Debug, Default)]
pub struct Detokenizer {
    ids: Vec<u32>,
    /// Text of all tokens; what lies behind `settled` may still change.
    text: String,
    settled: usize,
    /// Bytes of text up to each token whose text is settled.
    ends: Vec<usize>,
    /// Tokens from here to `ends.len()` are decoded once more with what follows.
    context: usize,
    stops: Vec<String>,
    released_ids: usize,
    released: usize,
    stopped: bool,
}

impl Detokenizer {
    pub fn new(stops: Vec<String>) -> Self {
        Self { stops, ..Self::default() }
    }

    /// Tokens released so far.
    pub fn released_tokens(&self) -> &[u32] {
        &self.ids[..self.released_ids]
    }

    /// Takes further tokens. `last` says that none will follow, so nothing needs to be held back any longer.
    pub fn push(&mut self, tokenizer: &Tokenizer, ids: &[u32], last: bool) -> Result<Released, String> {
        if self.stopped {
            return Ok(Released { stopped: true, ..Released::default() });
        }
        for id in ids {
            self.take(tokenizer, *id)?;
        }
        let start = self.released.min(self.text.len());
        // What may still become another character is no part of one yet.
        let complete = if last { self.text.len() } else { self.settled.max(start) };
        // A stop string may begin in text that was held back, never in text that was released. Of several the one that is complete
        // first counts, as it would if the text came character by character.
        let open = self.text.get(start..complete);
        let found = self.stops.iter().filter_map(|stop| Some((open?.find(stop.as_str())?, stop.len())));
        let stop = found.min_by_key(|(at, length)| at + length);
        let end = match stop {
            Some((at, _)) => start + at,
            None if last => self.text.len(),
            None => self.safe_end(&self.text[..complete], start),
        };
        self.stopped = stop.is_some();
        let whole = end == self.text.len() && (last || self.settled == self.text.len());
        let count = if whole { self.ids.len() } else { self.ends.partition_point(|token| *token <= end) };
        let released = Released {
            token_ids: self.ids[self.released_ids.min(count)..count].to_vec(),
            text: self.text.get(start..end).unwrap_or_default().to_owned(),
            stopped: self.stopped,
        };
        self.released_ids = count.max(self.released_ids);
        self.released = end.max(start);
        Ok(released)
    }

    /// Adds one token's text, which is settled unless it ends in what may be a part of a character.
    fn take(&mut self, tokenizer: &Tokenizer, id: u32) -> Result<(), String> {
        self.ids.push(id);
        let read = self.ends.len();
        let before = tokenizer.decode(&self.ids[self.context..read], false)?;
        let with = tokenizer.decode(&self.ids[self.context..], false)?;
        // A decoder that changes what came before leaves nothing to add; none that we know does.
        let more = with.strip_prefix(before.as_str()).unwrap_or_default();
        self.text.truncate(self.settled);
        self.text.push_str(more);
        if !more.ends_with(char::REPLACEMENT_CHARACTER) {
            self.settled = self.text.len();
            self.context = read;
            self.ends.resize(self.ids.len(), self.settled);
        }
        Ok(())
    }

    /// Where `text`, all of it settled, may be cut: before what may begin a stop string.
    fn safe_end(&self, text: &str, start: usize) -> usize {
        let begins_stop = |at: &usize| self.stops.iter().any(|stop| stop.starts_with(&text[*at..]));
        let boundaries = (start..text.len()).filter(|at| text.is_char_boundary(*at));
        let longest = self.stops.iter().map(String::len).max().unwrap_or(0);
        boundaries.filter(|at| text.len() - at < longest).find(begins_stop).unwrap_or(text.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::path::Path;
    use std::sync::LazyLock;

    static TOKENIZER: LazyLock<Tokenizer> =
        LazyLock::new(|| Tokenizer::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("models/nano")).unwrap());

    /// Pushes `ids` in parts that end at `cuts`; returns the joined text and tokens.
    fn push(stops: &[&str], ids: &[u32], cuts: &[usize]) -> (String, Vec<u32>, bool) {
        let mut detokenizer = Detokenizer::new(stops.iter().map(|stop| stop.to_string()).collect());
        let (mut text, mut tokens, mut start) = (String::new(), vec![], 0);
        let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut % (ids.len() + 1)).collect();
        cuts.sort_unstable();
        cuts.push(ids.len());
        for (index, cut) in cuts.iter().enumerate() {
            let released = detokenizer.push(&TOKENIZER, &ids[start..*cut], index + 1 == cuts.len()).unwrap();
            text.push_str(&released.text);
            tokens.extend(released.token_ids);
            if released.stopped {
                return (text, tokens, true);
            }
            start = *cut;
        }
        (text, tokens, false)
    }

    #[test]
    fn a_stop_string_across_pushes_is_found_and_not_given_out() {
        let ids = TOKENIZER.encode("return x * 3 if x", false).unwrap();
        let singles: Vec<usize> = (0..ids.len()).collect();
        assert_eq!(push(&["* 3"], &ids, &singles).0, "return x ");
        assert_eq!(push(&["* 4"], &ids, &singles), ("return x * 3 if x".into(), ids, false));
    }

    proptest! {
        /// Whatever the tokens (split characters and invalid bytes among them) and however they come.
        #[test]
        fn parts_join_to_the_whole(
            ids in prop_oneof![
                prop::collection::vec(0u32..900, 0..40),
                "[a-zäß漢🙂 ]{0,20}".prop_map(|text| TOKENIZER.encode(&text, false).unwrap()),
            ],
            cuts in prop::collection::vec(any::<usize>(), 0..10),
        ) {
            let whole = TOKENIZER.decode(&ids, false).unwrap();
            let (text, tokens, stopped) = push(&["§never§"], &ids, &cuts);
            prop_assert_eq!((text, tokens, stopped), (whole, ids, false));
        }

        #[test]
        fn nothing_at_or_behind_a_stop_string_is_given_out(
            text in "[ab ]{0,24}", stop in "[ab ]{1,3}", cuts in prop::collection::vec(any::<usize>(), 0..10),
        ) {
            let ids = TOKENIZER.encode(&text, false).unwrap();
            let expected = text.find(&stop).map_or(text.as_str(), |at| &text[..at]);
            let (found, _, stopped) = push(&[&stop], &ids, &cuts);
            prop_assert_eq!((found.as_str(), stopped), (expected, text.contains(&stop)));
        }
    }
}
