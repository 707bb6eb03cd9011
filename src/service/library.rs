//! Where models may be loaded from by request, and what they may take of the memory.
//!
//! Clients name models, never paths: a name is looked up among what lies in the folders. How a model is read and started is left to
//! a [`Loader`]; who is served is the registry's business.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::Served;
use crate::checkpoint::name_of;
use crate::decode::autoregressive::DrafterKind;
use crate::engine::memory::{self, Need};
use crate::tensor::free_memory;

/// Entries of a folder that are looked at.
const ENTRIES_MAX: usize = 4096;

/// What a model that is served takes.
pub fn need_of(model: &Served) -> Need {
    let info = &model.info;
    let drafters = info.drafters.iter().filter(|drafter| drafter.kind != DrafterKind::Chain);
    Need {
        weights: info.weight_bytes as u64,
        drafters: drafters.map(|drafter| drafter.bytes).sum::<usize>() as u64,
        token: memory::bytes_per_token(&info.config, info.placement) as u64,
        tokens_min: info.context,
        tokens: model.engine.bounds().tokens,
        free: free_memory(info.placement.device),
    }
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
