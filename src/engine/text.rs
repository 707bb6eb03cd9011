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
#[derive(Debug, Default)]
pub struct Detokenizer {
    ids: Vec<u32>,
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
        self.ids.extend(ids);
        let text = tokenizer.decode(&self.ids, false)?;
        let start = self.released.min(text.len());
        // A stop string may begin in text that was held back, never in text that was released. Of several the one that is complete
        // first counts, as it would if the text came character by character.
        // What may still become another character is no part of one yet.
        let complete = if last { text.len() } else { text.trim_end_matches(char::REPLACEMENT_CHARACTER).len().max(start) };
        let found = self.stops.iter().filter_map(|stop| Some((text.get(start..complete)?.find(stop.as_str())?, stop.len())));
        let stop = found.min_by_key(|(at, length)| at + length);
        let end = match stop {
            Some((at, _)) => start + at,
            None if last => text.len(),
            None => self.safe_end(&text, start),
        };
        self.stopped = stop.is_some();
        let count = if end == text.len() { self.ids.len() } else { self.tokens_within(tokenizer, end)? };
        let released = Released {
            token_ids: self.ids[self.released_ids.min(count)..count].to_vec(),
            text: text.get(start..end).unwrap_or_default().to_owned(),
            stopped: self.stopped,
        };
        self.released_ids = count;
        self.released = end.max(start);
        Ok(released)
    }

    /// How many tokens have a text of at most `end` bytes. More tokens never have less text, so halving finds it.
    fn tokens_within(&self, tokenizer: &Tokenizer, end: usize) -> Result<usize, String> {
        let (mut within, mut beyond) = (self.released_ids, self.ids.len());
        while within < beyond {
            let middle = (within + beyond).div_ceil(2);
            if tokenizer.decode(&self.ids[..middle], false)?.len() <= end { within = middle } else { beyond = middle - 1 }
        }
        Ok(within)
    }

    /// Where the text may be cut: before a character that is not complete, and before what may begin a stop string.
    fn safe_end(&self, text: &str, start: usize) -> usize {
        let complete = text.trim_end_matches(char::REPLACEMENT_CHARACTER).len().max(start);
        let text = &text[..complete];
        let begins_stop = |at: &usize| self.stops.iter().any(|stop| stop.starts_with(&text[*at..]));
        let boundaries = (start..complete).filter(|at| text.is_char_boundary(*at));
        let longest = self.stops.iter().map(String::len).max().unwrap_or(0);
        boundaries.filter(|at| complete - at < longest).find(begins_stop).unwrap_or(complete)
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
