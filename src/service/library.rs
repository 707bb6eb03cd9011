//! Where models may be loaded from by request, and what they may take of the memory.
//!
//! Clients name models, never paths: a name is looked up among what lies in the folders. How a model is read and started is left to
//! a [`Loader`]; who is served is the registry's business.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::Served;
use crate::checkpoint::name_of;
use crate::decode::autoregressive::DrafterKind;
use crate::engine::memory;

/// Entries of a folder that are looked at.
const ENTRIES_MAX: usize = 4096;

/// What a model takes of the memory.
#[derive(Clone, Copy, Debug)]
pub struct Need {
    /// Bytes of weights, drafters' included.
    pub weights: u64,
    /// Bytes of one token in the engine.
    pub token: u64,
    /// Fewer tokens than this are no use.
    pub tokens_min: usize,
    /// Tokens that it may have in its engine.
    pub tokens: usize,
    /// Bytes that are free on its device.
    pub free: u64,
}

impl Need {
    /// Of a model that is served.
    pub fn of(model: &Served) -> Self {
        let info = &model.info;
        let drafters = info.drafters.iter().filter(|drafter| drafter.kind != DrafterKind::Chain);
        Self {
            weights: (info.weight_bytes + drafters.map(|drafter| drafter.bytes).sum::<usize>()) as u64,
            token: memory::bytes_per_token(&info.config, info.placement) as u64,
            tokens_min: info.context,
            tokens: model.engine.bounds().tokens,
            free: memory::free(info.placement.device),
        }
    }

    pub fn bytes(&self) -> u64 {
        self.weights.saturating_add(self.token.saturating_mul(self.tokens as u64))
    }

    /// With as many tokens as a budget has room for beside what is taken; else the sum that shows why it has none.
    pub fn within(self, name: &str, budget: u64, taken: &[(&str, u64)]) -> Result<Self, String> {
        let others = taken.iter().map(|(_, bytes)| bytes).sum();
        let left = budget.saturating_sub(others).min(self.free);
        let tokens = left.saturating_sub(self.weights) / self.token.max(1);
        let found = Self { tokens: self.tokens.min(usize::try_from(tokens).unwrap_or(usize::MAX)), ..self };
        if found.tokens >= self.tokens_min && self.weights <= left {
            return Ok(found);
        }
        let least = Self { tokens: self.tokens_min, ..self };
        let taken: Vec<_> = taken.iter().map(|(name, bytes)| format!("{name} {}", mebibytes(*bytes))).collect();
        Err(format!(
            "there is no room for {name}: it needs {} ({} of weights, {} for {} tokens); of the budget of {} are taken {} ({}), and \
             {} are free on the device: unload another model first",
            mebibytes(least.bytes()),
            mebibytes(self.weights),
            mebibytes(least.bytes() - self.weights),
            self.tokens_min,
            mebibytes(budget),
            mebibytes(others),
            taken.join(", "),
            mebibytes(self.free),
        ))
    }
}

/// For people to read.
pub fn mebibytes(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

/// Reads models and starts their engines.
pub trait Loader: Send + Sync {
    /// What the model there needs, by its headers alone, with as many tokens as it could ever use.
    fn measure(&self, path: &Path) -> Result<Need, String>;
    /// Loads the model there, with room for so many tokens.
    fn load(&self, path: &Path, tokens: usize) -> Result<Served, String>;
}

/// Folders of models, and a budget.
#[derive(Clone)]
pub struct Library {
    folders: Vec<PathBuf>,
    budget: u64,
    loader: Arc<dyn Loader>,
}

impl std::fmt::Debug for Library {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Library").field("folders", &self.folders).field("budget", &self.budget).finish_non_exhaustive()
    }
}

impl Library {
    /// `budget` is what all models that are served may take together, in bytes.
    pub fn new(folders: Vec<PathBuf>, budget: u64, loader: Arc<dyn Loader>) -> Self {
        Self { folders, budget, loader }
    }

    pub fn budget(&self) -> u64 {
        self.budget
    }

    /// Whatever looks like a model, with its name. Where two have the same, the first one counts.
    fn models(&self) -> Vec<(String, PathBuf)> {
        let entries = self.folders.iter().filter_map(|folder| folder.read_dir().ok()).flat_map(|dir| dir.take(ENTRIES_MAX));
        let looks_like_one = |path: &PathBuf| {
            path.join("config.json").is_file() || (path.extension().is_some_and(|ending| ending == "gguf") && path.is_file())
        };
        let mut models: Vec<_> = entries
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(looks_like_one)
            .map(|path| (name_of(&path), path))
            .collect();
        models.sort_by(|(one, _), (other, _)| one.cmp(other));
        models.dedup_by(|(one, _), (other, _)| one == other);
        models
    }

    /// What may be loaded.
    pub fn names(&self) -> Vec<String> {
        self.models().into_iter().map(|(name, _)| name).collect()
    }

    /// Where a model lies and what it needs; `None` if it is not there.
    pub fn measure(&self, name: &str) -> Result<Option<(PathBuf, Need)>, String> {
        let Some((_, path)) = self.models().into_iter().find(|(found, _)| found == name) else { return Ok(None) };
        let need = self.loader.measure(&path)?;
        Ok(Some((path, need)))
    }

    pub fn load(&self, path: &Path, tokens: usize) -> Result<Served, String> {
        self.loader.load(path, tokens)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NEED: Need = Need { weights: 20 << 20, token: 1 << 10, tokens_min: 512, tokens: 8192, free: u64::MAX };

    #[test]
    fn a_model_gets_the_tokens_that_there_is_room_for() {
        let within = |budget: u64, taken| NEED.within("new", budget << 20, &[("old", taken)]).map(|need| need.tokens);
        assert_eq!(within(128, 100 << 20), Ok(8192), "20 of weights and 8 for its tokens");
        assert_eq!(within(124, 100 << 20), Ok(4096));
        let refused = within(100, 90 << 20).unwrap_err();
        for part in [
            "new: it needs 20.5 MiB (20.0 MiB of weights, 0.5 MiB for 512 tokens)",
            "of 100.0 MiB are taken 90.0 MiB (old 90.0 MiB)",
        ] {
            assert!(refused.contains(part), "{refused}");
        }
        assert!(within(100, 200 << 20).is_err(), "more is taken than there is");
        let crowded = Need { free: 20 << 20, ..NEED };
        assert!(crowded.within("new", 1 << 30, &[]).is_err(), "others have taken the memory");
    }
}
