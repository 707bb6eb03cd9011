//! Safetensors files of one model, memory-mapped: a single `model.safetensors`, or shards under an index.
//!
//! [`WeightFiles::check`] compares names, shapes and types with what the network needs before a byte is converted, so that a
//! broken checkpoint is one precise error and not a surprise at the first request.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use safetensors::{Dtype as StoredType, SafeTensors};

use super::CheckpointError;
use crate::model::{Source, TensorSpec};
use crate::tensor::{Dtype, Kind, Placement, Tensor};

/// One tensor's place in a file.
struct Entry {
    file: usize,
    shape: Vec<i64>,
    stored: StoredType,
    /// Byte range in the file.
    range: std::ops::Range<usize>,
}

/// The mapped files and where each tensor lies in them.
pub struct WeightFiles {
    files: Vec<(PathBuf, Mmap)>,
    entries: BTreeMap<String, Entry>,
}

impl WeightFiles {
    /// Maps the folder's files and reads their headers. A truncated file or an absent shard ends here.
    pub fn open(folder: &Path) -> Result<Self, CheckpointError> {
        let index = folder.join("model.safetensors.index.json");
        let single = folder.join("model.safetensors");
        let (paths, indexed) = if index.exists() { shards(folder, &index)? } else { (vec![single], None) };
        let mut files = Vec::with_capacity(paths.len());
        let mut entries = BTreeMap::new();
        for path in paths {
            let read = |source| CheckpointError::Read { path: path.clone(), source };
            let handle = File::open(&path).map_err(read)?;
            // SAFETY: the mapping is only read; a file that another process cuts short while we load is the operator's fault
            // and raises SIGBUS, as in every loader that maps its weights.
            let map = unsafe { Mmap::map(&handle) }.map_err(read)?;
            let wrong = |reason: String| CheckpointError::Weights { path: path.clone(), reason };
            let (header, metadata) = SafeTensors::read_metadata(&map).map_err(|e| wrong(e.to_string()))?;
            let data = 8 + header;
            for (name, info) in metadata.tensors() {
                let range = data + info.data_offsets.0..data + info.data_offsets.1;
                if range.end > map.len() {
                    return Err(wrong(format!(
                        "tensor {name} ends at byte {} of a file of {}: it is truncated",
                        range.end,
                        map.len()
                    )));
                }
                let shape = info.shape.iter().map(|n| *n as i64).collect();
                let entry = Entry { file: files.len(), shape, stored: info.dtype, range };
                if entries.insert(name.clone(), entry).is_some() {
                    return Err(wrong(format!("tensor {name} is in two shards")));
                }
            }
            files.push((path, map));
        }
        if let Some(name) = indexed.iter().flatten().find(|name| !entries.contains_key(*name)) {
            return Err(CheckpointError::Weights {
                path: index,
                reason: format!("no shard holds tensor {name}, which it lists"),
            });
        }
        Ok(Self { files, entries })
    }

    /// What stands between these files and the network that `needed` describes; empty when nothing does.
    pub fn check(&self, needed: &[TensorSpec]) -> Vec<String> {
        let mut problems = Vec::new();
        let mut names = BTreeSet::new();
        for spec in needed {
            names.insert(spec.name.as_str());
            match self.entries.get(&spec.name) {
                None => problems.push(format!("tensor {} is missing", spec.name)),
                Some(entry) if entry.shape != spec.shape => {
                    problems.push(format!("tensor {} has shape {:?}, not {:?}", spec.name, entry.shape, spec.shape));
                }
                Some(entry) if kind(entry.stored).is_none() => {
                    problems.push(format!("tensor {} is of type {:?}: f32, f16 and bf16 can be read", spec.name, entry.stored));
                }
                Some(_) => {}
            }
        }
        // Old checkpoints carry rotary tables, and tied ones sometimes a copy of the embedding; both are derived, not weights.
        let derived = |name: &str| name.ends_with("rotary_emb.inv_freq") || name == "lm_head.weight";
        let extra = self.entries.keys().filter(|name| !names.contains(name.as_str()) && !derived(name));
        problems.extend(extra.map(|name| format!("tensor {name} is unexpected")));
        problems
    }

    /// Bytes of all tensors as stored.
    pub fn bytes(&self) -> usize {
        self.entries.values().map(|entry| entry.range.len()).sum()
    }

    /// Types in which tensors are stored, in our names where they have one.
    pub fn stored_types(&self) -> BTreeSet<String> {
        self.entries.values().map(|entry| format!("{:?}", entry.stored).to_lowercase()).collect()
    }

    pub fn file_count(&self) -> usize {
        self.files.len()
    }

    /// The tensor in its stored type on the CPU.
    pub fn stored(&self, name: &str) -> Result<Tensor, CheckpointError> {
        let Some(entry) = self.entries.get(name) else {
            return Err(CheckpointError::Problems(vec![format!("tensor {name} is missing")]));
        };
        let (path, map) = &self.files[entry.file];
        let wrong = |reason: String| CheckpointError::Weights { path: path.clone(), reason };
        let kind = kind(entry.stored).ok_or_else(|| wrong(format!("tensor {name} is of type {:?}", entry.stored)))?;
        Tensor::f_from_data_size(&map[entry.range.clone()], &entry.shape, kind)
            .map_err(|e| wrong(format!("tensor {name}: {e}")))
    }

    /// Loads with conversion; refuses a tensor that holds NaN or infinity.
    pub fn load(&self, name: &str, placement: Placement) -> Result<Tensor, CheckpointError> {
        let finite = |tensor: &Tensor| Ok::<_, CheckpointError>(tensor.f_isfinite()?.f_all()?.f_int64_value(&[])? != 0);
        let stored = self.stored(name)?;
        if !finite(&stored)? {
            return Err(CheckpointError::Problems(vec![format!("tensor {name} holds NaN or infinity")]));
        }
        let loaded = stored.f_to_device(placement.device)?.f_to_kind(placement.dtype.kind())?;
        if loaded.kind() != stored.kind() && !finite(&loaded)? {
            let dtype = placement.dtype.name();
            return Err(CheckpointError::Problems(vec![format!("tensor {name} does not fit {dtype}: use bf16 or f32")]));
        }
        Ok(loaded)
    }
}

/// A checkpoint as the source of a network's tensors.
pub struct WeightSource<'a> {
    pub files: &'a WeightFiles,
    pub placement: Placement,
    /// Called after each tensor, for progress.
    pub loaded: &'a mut dyn FnMut(&TensorSpec),
}

impl Source for WeightSource<'_> {
    type Error = CheckpointError;

    fn tensor(&mut self, spec: &TensorSpec) -> Result<Tensor, CheckpointError> {
        let tensor = self.files.load(&spec.name, self.placement)?;
        (self.loaded)(spec);
        Ok(tensor)
    }
}

/// Writes tensors as one safetensors file in `dtype`, atomically: a reader sees the old file or the new one.
pub fn save(path: &Path, tensors: &[(String, Tensor)], dtype: Dtype) -> Result<(), CheckpointError> {
    let stored = match dtype {
        Dtype::F32 => StoredType::F32,
        Dtype::F16 => StoredType::F16,
        Dtype::Bf16 => StoredType::BF16,
    };
    let mut parts = Vec::with_capacity(tensors.len());
    for (name, tensor) in tensors {
        let tensor = tensor.f_detach()?.f_to_device(tch::Device::Cpu)?.f_to_kind(dtype.kind())?.f_contiguous()?;
        let shape: Vec<usize> = tensor.size().iter().map(|n| *n as usize).collect();
        let mut bytes = vec![0u8; tensor.numel() * dtype.size()];
        let elements = tensor.numel();
        tensor.f_copy_data_u8(&mut bytes, elements)?;
        parts.push((name.clone(), shape, bytes));
    }
    let wrong = |reason: String| CheckpointError::Weights { path: path.into(), reason };
    let views = parts.iter().map(|(name, shape, bytes)| {
        safetensors::tensor::TensorView::new(stored, shape.clone(), bytes).map(|view| (name.as_str(), view))
    });
    let views = views.collect::<Result<Vec<_>, _>>().map_err(|e| wrong(e.to_string()))?;
    let format = Some([("format".to_string(), "pt".to_string())].into());
    let bytes = safetensors::serialize(views, format).map_err(|e| wrong(e.to_string()))?;
    super::write_atomically(path, &bytes)
}

fn kind(stored: StoredType) -> Option<Kind> {
    match stored {
        StoredType::F32 => Some(Kind::Float),
        StoredType::F16 => Some(Kind::Half),
        StoredType::BF16 => Some(Kind::BFloat16),
        _ => None,
    }
}

/// Shard files and tensor names that an index lists.
fn shards(folder: &Path, index: &Path) -> Result<(Vec<PathBuf>, Option<Vec<String>>), CheckpointError> {
    let wrong = |reason: String| CheckpointError::Weights { path: index.into(), reason };
    let json = super::config::read_json(index)?;
    let map = json.get("weight_map").and_then(|map| map.as_object()).ok_or_else(|| wrong("weight_map is missing".into()))?;
    let mut names = BTreeSet::new();
    for (tensor, shard) in map {
        let shard = shard.as_str().ok_or_else(|| wrong(format!("the shard of {tensor} is not a file name")))?;
        // A name with a path in it would let a checkpoint point outside its folder.
        if shard.contains(['/', '\\']) || shard.starts_with('.') {
            return Err(wrong(format!("shard '{shard}' is not a plain file name")));
        }
        if names.insert(shard) && !folder.join(shard).exists() {
            return Err(wrong(format!("shard {shard} is absent (tensor {tensor} is in it)")));
        }
    }
    Ok((names.iter().map(|name| folder.join(name)).collect(), Some(map.keys().cloned().collect())))
}
