//! Bearer tokens: who may call, and how much. A file has their names, hashes and limits; tokens themselves are nowhere kept.
//!
//! [`Tokens::admit`] stands in front of both ports (`access` puts it there). The file can be read anew while calls run; what they count
//! for stays with the names. It knows neither gRPC's services nor HTTP's paths.

use std::collections::{BTreeMap, HashSet};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use serde::{Deserialize, Deserializer};
use sha2::{Digest, Sha256};
use subtle::{Choice, ConditionallySelectable, ConstantTimeEq};
use thiserror::Error;

/// Every token begins with it, so that one that has leaked is known for what it is.
const PREFIX: &str = "lacuna_";
/// Bytes of chance in a token.
const CHANCE: usize = 32;
const HASH_BYTES: usize = 32;
const NAME_BYTES_MAX: usize = 64;
/// Longer ones are not looked at.
const TOKEN_BYTES_MAX: usize = 512;
const ENTRIES_MAX: usize = 10_000;
/// When one that has too many requests under way may try again.
const IN_FLIGHT_RETRY: Duration = Duration::from_secs(1);

/// A file of tokens cannot be used, and why.
#[derive(Debug, Error)]
pub enum TokensError {
    #[error("cannot read {path}: {source}")]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{path}: {reason}")]
    Toml { path: PathBuf, reason: String },
    #[error("{path}:{line}: {reason}")]
    Entry { path: PathBuf, line: usize, reason: String },
    #[error("{0} has no [[token]]: nobody could call; make one with 'lacuna token NAME'")]
    Empty(PathBuf),
}

/// One token's entry in the file.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Entry {
    pub name: String,
    /// SHA-256 of the token.
    #[serde(deserialize_with = "hash")]
    sha256: [u8; HASH_BYTES],
    /// Whether it may load and unload models.
    #[serde(default)]
    pub admin: bool,
    pub requests_in_flight: Option<u32>,
    pub requests_per_minute: Option<u32>,
    pub max_new_tokens: Option<u64>,
    /// Unset: all.
    pub models: Option<Vec<String>>,
}

fn hash<'de, D: Deserializer<'de>>(deserializer: D) -> Result<[u8; HASH_BYTES], D::Error> {
    let text = String::deserialize(deserializer)?;
    let digit = |at: usize| text.as_bytes().get(at).and_then(|byte| char::from(*byte).to_digit(16));
    let byte = |at: usize| Some((digit(2 * at)? * 16 + digit(2 * at + 1)?) as u8);
    let bytes: Option<Vec<u8>> = (0..HASH_BYTES).map(byte).collect();
    let bytes = bytes.filter(|_| text.len() == 2 * HASH_BYTES).and_then(|bytes| bytes.try_into().ok());
    bytes.ok_or_else(|| serde::de::Error::custom("sha256 is not 64 hexadecimal digits"))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    token: Vec<toml::Spanned<Entry>>,
}

/// What a name has under way and has had, whatever becomes of its entry.
#[derive(Debug)]
struct Usage {
    in_flight: u32,
    /// Requests that may come at once: fills up by the minute's share.
    bucket: f64,
    filled: Instant,
}

/// The tokens in force.
#[derive(Debug)]
pub struct Tokens {
    path: PathBuf,
    entries: RwLock<Arc<Vec<Arc<Entry>>>>,
    usage: Mutex<BTreeMap<String, Usage>>,
}

/// Why a request is not let in.
#[derive(Debug, Error, PartialEq)]
pub enum Turned {
    #[error("the request has no token: send 'authorization: Bearer TOKEN'")]
    Missing,
    #[error("the request's authorization is not 'Bearer TOKEN'")]
    Malformed,
    #[error("the token is not known here")]
    Unknown,
    #[error("{name} has {limit} requests under way, and may have no more: wait for one to end")]
    InFlight { name: String, limit: u32, retry: Duration },
    #[error("{name} may send {limit} requests a minute: try again later")]
    PerMinute { name: String, limit: u32, retry: Duration },
}

impl Tokens {
    pub fn open(path: &Path) -> Result<Self, TokensError> {
        let entries = RwLock::new(Arc::new(read(path)?));
        Ok(Self { path: path.into(), entries, usage: Mutex::default() })
    }

    /// Reads the file anew, for requests to come; gives the number of tokens. If something is wrong with it, the old ones stay in force.
    pub fn reload(&self) -> Result<usize, TokensError> {
        let entries = read(&self.path)?;
        let names: HashSet<&str> = entries.iter().map(|entry| entry.name.as_str()).collect();
        let mut usage = self.usage.lock().unwrap_or_else(PoisonError::into_inner);
        usage.retain(|name, usage| usage.in_flight > 0 || names.contains(name.as_str()));
        let count = entries.len();
        *self.entries.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(entries);
        Ok(count)
    }

    /// Lets a request in by its `authorization`, if its limits allow. It counts as under way until the pass is dropped.
    pub fn admit(self: &Arc<Self>, authorization: Option<&[u8]>) -> Result<Pass, Turned> {
        let token = bearer(authorization.ok_or(Turned::Missing)?).ok_or(Turned::Malformed)?;
        let entry = self.find(token).ok_or(Turned::Unknown)?;
        self.count(&entry, Instant::now())?;
        Ok(Pass { entry, tokens: self.clone() })
    }

    /// Looks at every entry, whichever is the right one: the time that this takes says nothing of them.
    fn find(&self, token: &[u8]) -> Option<Arc<Entry>> {
        let hash: [u8; HASH_BYTES] = Sha256::digest(token).into();
        let entries = self.entries.read().unwrap_or_else(PoisonError::into_inner).clone();
        let (mut found, mut index) = (Choice::from(0), 0_u32);
        for (at, entry) in (0..).zip(entries.iter()) {
            let same = entry.sha256.ct_eq(&hash);
            index.conditional_assign(&at, same);
            found |= same;
        }
        bool::from(found).then(|| entries[index as usize].clone())
    }

    fn count(&self, entry: &Entry, now: Instant) -> Result<(), Turned> {
        let mut usage = self.usage.lock().unwrap_or_else(PoisonError::into_inner);
        let full = f64::from(entry.requests_per_minute.unwrap_or(u32::MAX));
        let new = || Usage { in_flight: 0, bucket: full, filled: now };
        let usage = usage.entry(entry.name.clone()).or_insert_with(new);
        let name = || entry.name.clone();
        if let Some(limit) = entry.requests_in_flight.filter(|limit| usage.in_flight >= *limit) {
            return Err(Turned::InFlight { name: name(), limit, retry: IN_FLIGHT_RETRY });
        }
        if let Some(limit) = entry.requests_per_minute {
            let rate = f64::from(limit) / 60.0;
            usage.bucket = (usage.bucket + rate * now.saturating_duration_since(usage.filled).as_secs_f64()).min(full);
            usage.filled = now;
            if usage.bucket < 1.0 {
                let retry = Duration::from_secs_f64((1.0 - usage.bucket) / rate);
                return Err(Turned::PerMinute { name: name(), limit, retry });
            }
            usage.bucket -= 1.0;
        }
        usage.in_flight += 1;
        Ok(())
    }
}

/// A request that was let in.
pub struct Pass {
    pub entry: Arc<Entry>,
    tokens: Arc<Tokens>,
}

impl Drop for Pass {
    fn drop(&mut self) {
        let mut usage = self.tokens.usage.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(usage) = usage.get_mut(&self.entry.name) {
            usage.in_flight = usage.in_flight.saturating_sub(1);
        }
    }
}

/// The token of `Bearer TOKEN`; the scheme's case does not matter.
fn bearer(authorization: &[u8]) -> Option<&[u8]> {
    let (scheme, token) = authorization.split_at_checked("Bearer ".len())?;
    let token = token.trim_ascii();
    let fits = scheme.eq_ignore_ascii_case(b"Bearer ") && !token.is_empty() && token.len() <= TOKEN_BYTES_MAX;
    fits.then_some(token)
}

fn read(path: &Path) -> Result<Vec<Arc<Entry>>, TokensError> {
    let text = std::fs::read_to_string(path).map_err(|source| TokensError::Read { path: path.into(), source })?;
    let line = |span: Range<usize>| text[..span.start.min(text.len())].matches('\n').count() + 1;
    // Not the error's own words, which quote the file: a token that somebody took for its hash would stand in the log.
    let file: File = toml::from_str(&text).map_err(|error| match error.span() {
        Some(span) => TokensError::Entry { path: path.into(), line: line(span), reason: error.message().into() },
        None => TokensError::Toml { path: path.into(), reason: error.message().into() },
    })?;
    if file.token.is_empty() {
        return Err(TokensError::Empty(path.into()));
    }
    let mut seen = HashSet::new();
    for (at, entry) in file.token.iter().enumerate() {
        let span = entry.span();
        let wrong = |reason| Err(TokensError::Entry { path: path.into(), line: line(span.clone()), reason });
        let entry = entry.get_ref();
        if at >= ENTRIES_MAX {
            return wrong(format!("there are more than {ENTRIES_MAX} tokens"));
        }
        if !is_name(&entry.name) {
            return wrong(format!("the name is not 1 to {NAME_BYTES_MAX} of A-Z a-z 0-9 . _ -"));
        }
        if !seen.insert(entry.name.clone().into_bytes()) || !seen.insert(entry.sha256.to_vec()) {
            return wrong(format!("{} has the name or the hash of one before it", entry.name));
        }
        let numbers = [entry.requests_in_flight.map(u64::from), entry.requests_per_minute.map(u64::from), entry.max_new_tokens];
        if numbers.contains(&Some(0)) {
            return wrong(format!("a limit of {} is 0: leave the entry out instead", entry.name));
        }
    }
    Ok(file.token.into_iter().map(|entry| Arc::new(entry.into_inner())).collect())
}

/// Whether a token may be called that.
pub fn is_name(name: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    !name.is_empty() && name.len() <= NAME_BYTES_MAX && name.bytes().all(allowed)
}

/// A new token, and its entry for the file.
pub fn make(name: &str, admin: bool) -> (String, String) {
    let token = format!("{PREFIX}{}", hex(&rand::random::<[u8; CHANCE]>()));
    let sha256 = hex(&Sha256::digest(token.as_bytes()));
    let admin = if admin { "admin = true\n" } else { "" };
    (token, format!("[[token]]\nname = \"{name}\"\nsha256 = \"{sha256}\"\n{admin}"))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn file(text: &str) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        file
    }

    fn admit(tokens: &Arc<Tokens>, token: &str) -> Result<Pass, Turned> {
        tokens.admit(Some(format!("Bearer {token}").as_bytes()))
    }

    #[test]
    fn a_made_token_is_let_in_and_no_other() {
        let ((token, entry), (other, second)) = (make("one", false), make("two", true));
        assert!(!entry.contains(&token) && token.len() == PREFIX.len() + 2 * CHANCE);
        let file = file(&format!("{entry}\n{second}"));
        let tokens = Arc::new(Tokens::open(file.path()).unwrap());
        assert_eq!(admit(&tokens, &token).unwrap().entry.name, "one");
        let two = admit(&tokens, &other).unwrap();
        assert_eq!((two.entry.name.as_str(), two.entry.admin), ("two", true));
        assert_eq!(tokens.admit(Some(format!("bEARER   {token} ").as_bytes())).unwrap().entry.name, "one");
        assert_eq!(admit(&tokens, &token[..token.len() - 1]).err(), Some(Turned::Unknown));
        assert_eq!(tokens.admit(None).err(), Some(Turned::Missing));
        for wrong in [&b"Basic abc"[..], b"Bearer ", b"Bearer", b"", b"\xff"] {
            assert_eq!(tokens.admit(Some(wrong)).err(), Some(Turned::Malformed), "{wrong:?}");
        }
    }

    #[test]
    fn limits_count_what_is_under_way_and_what_a_minute_has_seen() {
        let (token, entry) = make("one", false);
        let file = file(&format!("{entry}requests-in-flight = 2\nrequests-per-minute = 60\n"));
        let tokens = Arc::new(Tokens::open(file.path()).unwrap());
        let passes = [admit(&tokens, &token).unwrap(), admit(&tokens, &token).unwrap()];
        assert!(matches!(admit(&tokens, &token), Err(Turned::InFlight { limit: 2, .. })));
        // A reload keeps the count.
        assert_eq!(tokens.reload().unwrap(), 1);
        assert!(admit(&tokens, &token).is_err());
        drop(passes);
        let entry = tokens.find(token.as_bytes()).unwrap();
        let begun = Instant::now();
        let mut let_in = 2;
        while tokens.count(&entry, begun).is_ok() {
            let_in += 1;
            drop(Pass { entry: entry.clone(), tokens: tokens.clone() });
        }
        assert!((60..=61).contains(&let_in), "{let_in}");
        let Err(Turned::PerMinute { retry, .. }) = tokens.count(&entry, begun) else { panic!("it is let in") };
        assert!(retry > Duration::ZERO && retry <= Duration::from_secs(1), "{retry:?}");
        assert_eq!(tokens.count(&entry, begun + Duration::from_secs(1)), Ok(()));
    }

    #[test]
    fn a_broken_file_is_told_by_line_and_leaves_the_old_one_in_force() {
        let (token, entry) = make("one", false);
        let good = file(&entry);
        let tokens = Arc::new(Tokens::open(good.path()).unwrap());
        for (text, line, reason) in [
            (format!("{entry}\n[[token]]\nname = \"two\"\nsha256 = \"{token}\"\n"), 7, "sha256 is not 64 hexadecimal digits"),
            (format!("{entry}colour = 1\n"), 4, "unknown field `colour`"),
            (format!("{entry}\n{entry}"), 5, "has the name or the hash"),
            (format!("{entry}requests-per-minute = 0\n"), 1, "is 0"),
            (entry.replace("one", "o n e"), 1, "the name is not"),
            (format!("{entry}admin = 7\n"), 4, "invalid type"),
        ] {
            std::fs::write(good.path(), &text).unwrap();
            let told = tokens.reload().unwrap_err().to_string();
            assert!(told.contains(&format!(":{line}: ")) && told.contains(reason), "{told}");
            assert!(!told.contains(&token), "{told}");
        }
        std::fs::write(good.path(), "").unwrap();
        assert!(matches!(tokens.reload(), Err(TokensError::Empty(_))));
        assert!(admit(&tokens, &token).is_ok(), "the old one is in force");
    }
}
