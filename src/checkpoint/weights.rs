//! The tensors of one model, memory-mapped: a single `model.safetensors`, or shards under an index, or a GGUF file's.
//!
//! [`WeightFiles::check`] compares names, shapes and types with what the network needs before a byte is converted, so that a
//! broken checkpoint is one precise error and not a surprise at the first request.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use safetensors::tensor::{Metadata, TensorInfo};
use safetensors::{Dtype as StoredType, SafeTensors};
use tch::TchError;

use super::CheckpointError;
use super::gguf::blocks::{Block, Groups};
use super::gguf::reader::Info;
use super::quantization::{Part, Quantization, tensors};
use crate::model::blocks::Blocks;
use crate::model::linear::computes;
use crate::model::quantized::Matrix;
use crate::model::{Source, TensorSpec};
use crate::tensor::{Dtype, Kind, Placement, Tensor, shared_cache};

/// How numbers are stored.
#[derive(Clone, Copy, Debug)]
enum Stored {
    Plain(StoredType),
    /// ggml's blocks, which unpack to f32.
    Blocks(Block),
}

/// One tensor's place in a file.
struct Entry {
    file: usize,
    shape: Vec<i64>,
    stored: Stored,
    /// Byte range in the file.
    range: std::ops::Range<usize>,
    /// The rows of each of so many heads lie interleaved: 0, n/2, 1, n/2 + 1, … (llama.cpp's order).
    interleaved: Option<i64>,
}

impl Entry {
    /// Rows of `[rows, ...]` in the order in which the network has them.
    fn ordered(&self, tensor: Tensor) -> Result<Tensor, TchError> {
        let Some(heads) = self.interleaved else { return Ok(tensor) };
        let pairs = self.shape[0].checked_div(2 * heads).unwrap_or(0);
        tensor.f_view([heads, pairs, 2, -1])?.f_transpose(1, 2)?.f_reshape(tensor.size())
    }
}

/// The mapped files and where each tensor lies in them.
pub struct WeightFiles {
    files: Vec<(PathBuf, Mmap)>,
    entries: BTreeMap<String, Entry>,
    /// Which matrices are stored in fewer bits, if any.
    quantization: Option<Quantization>,
    /// Whether floats of 16 bits stay so (or become so, where nothing is lost) where the network computes in f32: they do not where a cache would keep it all in f32, as then
    /// widening costs more than bytes.
    halves: bool,
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
                let entry = Entry { file: files.len(), shape, stored: Stored::Plain(info.dtype), range, interleaved: None };
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
        Ok(Self::of(files, entries))
    }

    fn of(files: Vec<(PathBuf, Mmap)>, entries: BTreeMap<String, Entry>) -> Self {
        let elements = entries.values().map(|entry| entry.shape.iter().product::<i64>() as u64);
        let halves = elements.sum::<u64>() * size_of::<f32>() as u64 > shared_cache().unwrap_or(0);
        Self { files, entries, quantization: None, halves }
    }

    /// The tensors of a mapped GGUF file: name, place, and how many heads' rows are interleaved, if they are.
    pub(super) fn from_gguf(
        path: &Path,
        map: Mmap,
        tensors: impl Iterator<Item = (String, Info, Option<i64>)>,
    ) -> Result<Self, String> {
        let mut entries = BTreeMap::new();
        for (name, Info { shape, block, range }, interleaved) in tensors {
            let stored = match block {
                Block::F32 => Stored::Plain(StoredType::F32),
                Block::F16 => Stored::Plain(StoredType::F16),
                Block::BF16 => Stored::Plain(StoredType::BF16),
                quantized => Stored::Blocks(quantized),
            };
            if entries.insert(name.clone(), Entry { file: 0, shape, stored, range, interleaved }).is_some() {
                return Err(format!("two tensors mean {name}"));
            }
        }
        Ok(Self::of(vec![(path.into(), map)], entries))
    }

    /// The same files, whose matrices are stored as `quantization` says.
    pub fn quantized(self, quantization: Option<Quantization>) -> Self {
        Self { quantization, ..self }
    }

    /// The same files, whose floats of 16 bits stay so or not, whatever their size.
    pub fn halves(self, halves: bool) -> Self {
        Self { halves, ..self }
    }

    pub fn quantization(&self) -> Option<&Quantization> {
        self.quantization.as_ref()
    }

    /// What stands between these files and the network that `needed` describes; empty when nothing does.
    pub fn check(&self, needed: &[TensorSpec]) -> Vec<String> {
        let mut problems = Vec::new();
        let mut names = BTreeSet::new();
        for part in needed.iter().flat_map(|spec| self.parts(spec)) {
            let stored = self.entries.get(&part.name);
            match stored {
                None => problems.push(format!("tensor {} is missing", part.name)),
                Some(entry) if !part.shapes.contains(&entry.shape) => {
                    problems.push(format!("tensor {} has shape {:?}, not {:?}", part.name, entry.shape, part.shapes[0]));
                }
                Some(Entry { stored: Stored::Plain(stored), .. }) if !part.types.contains(stored) => {
                    let read: Vec<_> = part.types.iter().map(|stored| format!("{stored:?}").to_lowercase()).collect();
                    problems.push(format!("tensor {} is of type {stored:?}: {} can be read", part.name, read.join(", ")));
                }
                Some(_) => {}
            }
            names.insert(part.name);
        }
        // Old checkpoints carry rotary tables, and tied ones sometimes a copy of the embedding; both are derived, not weights.
        let derived = |name: &str| name.ends_with("rotary_emb.inv_freq") || name == "lm_head.weight";
        let extra = self.entries.keys().filter(|name| !names.contains(*name) && !derived(name));
        problems.extend(extra.map(|name| format!("tensor {name} is unexpected")));
        problems
    }

    /// The tensors that hold what `spec` describes.
    fn parts(&self, spec: &TensorSpec) -> Vec<Part> {
        match self.quantization.as_ref().and_then(|quantization| quantization.form(&spec.name)) {
            Some(form) => form.parts(spec),
            None => vec![Part { name: spec.name.clone(), shapes: vec![spec.shape.clone()], types: types(&spec.name) }],
        }
    }

    /// Bytes of all tensors as stored.
    pub fn bytes(&self) -> usize {
        self.entries.values().map(|entry| entry.range.len()).sum()
    }

    /// Bytes of a matrix when it is loaded: floats, quantised or in blocks, about as it is stored.
    pub fn loaded_bytes(&self, spec: &TensorSpec, placement: Placement) -> usize {
        let stored = |part: &Part| self.entries.get(&part.name).map_or(0, |entry| entry.range.len());
        let elements = spec.shape.iter().product::<i64>() as usize;
        match (self.quantization.as_ref().and_then(|quantization| quantization.form(&spec.name)), self.kept(spec, placement)) {
            (Some(form), _) if computes(form.scheme, placement) => self.parts(spec).iter().map(stored).sum(),
            (Some(_), _) => elements * placement.dtype.size(),
            (None, Some(Entry { stored: Stored::Blocks(block), .. })) => block.held_bytes(elements),
            (None, Some(_)) => elements * size_of::<u16>(),
            (None, None) => elements * placement.dtype.size(),
        }
    }

    /// A matrix that stays as it is stored, because nothing is lost by it and a kernel reads it.
    fn kept(&self, spec: &TensorSpec, placement: Placement) -> Option<&Entry> {
        let entry = self.entries.get(&spec.name).filter(|_| placement == Placement::CPU_F32 && spec.shape.len() == 2)?;
        let kept = match entry.stored {
            Stored::Blocks(_) => true,
            Stored::Plain(StoredType::BF16 | StoredType::F16) => self.halves,
            Stored::Plain(StoredType::F32) => self.halves && self.are_bf16(entry),
            Stored::Plain(_) => false,
        };
        kept.then_some(entry)
    }

    /// Whether every number of f32 is one of bf16's, as of a model that was trained in that and saved as f32. The first one tells nearly always.
    fn are_bf16(&self, entry: &Entry) -> bool {
        self.files[entry.file].1[entry.range.clone()].as_chunks().0.iter().all(|[low, high, _, _]| low | high == 0)
    }

    /// Types in which tensors are stored, in our names where they have one.
    pub fn stored_types(&self) -> BTreeSet<String> {
        self.type_counts().into_keys().collect()
    }

    /// Likewise, with how many tensors are of each.
    pub fn type_counts(&self) -> BTreeMap<String, usize> {
        let mut types = BTreeMap::new();
        for entry in self.entries.values() {
            let name = match entry.stored {
                Stored::Plain(stored) => format!("{stored:?}"),
                Stored::Blocks(block) => format!("{block:?}"),
            };
            *types.entry(name.to_lowercase()).or_default() += 1;
        }
        types
    }

    pub fn file_count(&self) -> usize {
        self.files.len()
    }

    /// The tensor in its stored type on the CPU; blocks come unpacked.
    pub fn stored(&self, name: &str) -> Result<Tensor, CheckpointError> {
        let Some(entry) = self.entries.get(name) else {
            return Err(CheckpointError::Problems(vec![format!("tensor {name} is missing")]));
        };
        let (path, map) = &self.files[entry.file];
        let wrong = |reason: String| CheckpointError::Weights { path: path.clone(), reason };
        let bytes = &map[entry.range.clone()];
        let tensor = match entry.stored {
            Stored::Plain(stored) => {
                let kind = kind(stored).ok_or_else(|| wrong(format!("tensor {name} is of type {stored:?}")))?;
                Tensor::f_from_data_size(bytes, &entry.shape, kind)
            }
            Stored::Blocks(block) => Tensor::f_from_slice(&block.dequantize(bytes)).and_then(|flat| flat.f_view(&*entry.shape)),
        };
        tensor.and_then(|tensor| entry.ordered(tensor)).map_err(|e| wrong(format!("tensor {name}: {e}")))
    }

    /// Loads with conversion; refuses a tensor that holds NaN or infinity.
    pub fn load(&self, name: &str, placement: Placement) -> Result<Tensor, CheckpointError> {
        let stored = self.stored(name)?;
        if !is_finite(&stored)? {
            return Err(not_finite(name));
        }
        let loaded = stored.f_to_device(placement.device)?.f_to_kind(placement.dtype.kind())?;
        if loaded.kind() != stored.kind() && !is_finite(&loaded)? {
            let dtype = placement.dtype.name();
            return Err(CheckpointError::Problems(vec![format!("tensor {name} does not fit {dtype}: use bf16 or f32")]));
        }
        Ok(loaded)
    }

    /// A matrix that stays as it is stored, if it is to; refused if it holds NaN or infinity.
    fn compact(&self, spec: &TensorSpec, placement: Placement) -> Result<Option<Matrix>, CheckpointError> {
        let Some(entry) = self.kept(spec, placement) else { return Ok(None) };
        let Stored::Blocks(block) = entry.stored else {
            let stored = self.stored(&spec.name)?;
            let stored = if stored.kind() == Kind::Float { stored.f_to_kind(Kind::BFloat16)? } else { stored };
            return if is_finite(&stored)? { Ok(Some(Matrix::Halves(stored))) } else { Err(not_finite(&spec.name)) };
        };
        let Groups { codes, scales, minima } = block.groups(&self.files[entry.file].1[entry.range.clone()]);
        if !scales.iter().chain(&minima).all(|number| number.is_finite()) {
            return Err(not_finite(&spec.name));
        }
        let rows = |tensor: Tensor| tensor.f_view([entry.shape[0], -1]).and_then(|tensor| entry.ordered(tensor));
        Ok(Some(Matrix::Blocks(Blocks {
            codes: rows(Tensor::f_from_slice(&codes)?)?,
            scales: rows(Tensor::f_from_slice(&scales)?)?,
            minima: rows(Tensor::f_from_slice(&minima)?)?,
        })))
    }

    /// A matrix as it is stored: in codes and scales, which are checked, or loaded as a tensor is.
    pub fn matrix(&self, spec: &TensorSpec, placement: Placement) -> Result<Matrix, CheckpointError> {
        let Some(form) = self.quantization.as_ref().and_then(|quantization| quantization.form(&spec.name)) else {
            return match self.compact(spec, placement)? {
                Some(matrix) => Ok(matrix),
                None => self.load(&spec.name, placement).map(Matrix::Plain),
            };
        };
        let stored = form.parts(spec).iter().map(|part| self.stored(&part.name)).collect::<Result<Vec<_>, _>>()?;
        let mut matrix = tensors::read(spec, form, &stored).map_err(|problem| CheckpointError::Problems(vec![problem]))?;
        matrix.codes = matrix.codes.f_to_device(placement.device)?;
        matrix.scales = matrix.scales.f_to_device(placement.device)?;
        Ok(Matrix::Quantized(matrix))
    }
}

fn is_finite(tensor: &Tensor) -> Result<bool, TchError> {
    Ok(tensor.f_isfinite()?.f_all()?.f_int64_value(&[])? != 0)
}

fn not_finite(name: &str) -> CheckpointError {
    CheckpointError::Problems(vec![format!("tensor {name} holds NaN or infinity")])
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

    fn matrix(&mut self, spec: &TensorSpec) -> Result<Matrix, CheckpointError> {
        let matrix = self.files.matrix(spec, self.placement)?;
        (self.loaded)(spec);
        Ok(matrix)
    }

    fn head(&mut self, spec: &TensorSpec, embedding: Option<&Tensor>) -> Result<Option<Matrix>, CheckpointError> {
        match embedding {
            None => self.matrix(spec).map(Some),
            // A head reads all of it for every row, an embedding looks some rows up: fewer bytes are for the one, floats for the other.
            Some(_) => self.files.compact(spec, self.placement),
        }
    }
}

/// Writes tensors as one safetensors file in `dtype`, atomically: a reader sees the old file or the new one. A trimmed vocabulary's
/// table is written as the whole numbers that it is; readers that look for them on their boundaries want it first.
pub fn save(path: &Path, tensors: &[(String, Tensor)], dtype: Dtype) -> Result<(), CheckpointError> {
    let specs: Vec<_> = tensors.iter().map(|(name, tensor)| TensorSpec { name: name.clone(), shape: tensor.size() }).collect();
    let mut rest = tensors.iter();
    save_each(path, &specs, dtype, &mut |spec| match rest.next() {
        Some((_, tensor)) => Ok(tensor.shallow_clone()),
        None => Err(CheckpointError::Problems(vec![format!("tensor {} is missing", spec.name)])),
    })
}

/// Likewise, with one tensor after the other asked for in the order of `specs`: no two need be in memory together.
pub fn save_each(
    path: &Path,
    specs: &[TensorSpec],
    dtype: Dtype,
    tensor: &mut dyn FnMut(&TensorSpec) -> Result<Tensor, CheckpointError>,
) -> Result<(), CheckpointError> {
    let stored = |name: &str| if name == TABLE { StoredType::I64 } else { stored_as(dtype) };
    let slot = |spec: &TensorSpec| Slot { name: spec.name.clone(), shape: spec.shape.clone(), stored: stored(&spec.name) };
    let slots: Vec<_> = specs.iter().map(slot).collect();
    save_slots(path, &slots, &mut |sink| specs.iter().try_for_each(|spec| sink.put(&spec.name, &tensor(spec)?)))
}

/// A tensor's place in a file to be written.
pub struct Slot {
    pub name: String,
    pub shape: Vec<i64>,
    pub stored: StoredType,
}

/// A file that takes its tensors in any order.
pub struct Sink<'a> {
    path: &'a Path,
    file: &'a mut (dyn WriteSeek + 'a),
    /// Those that are yet to come, with their first bytes.
    places: BTreeMap<&'a str, (&'a Slot, usize)>,
}

pub trait WriteSeek: Write + Seek {}
impl<T: Write + Seek> WriteSeek for T {}

impl Sink<'_> {
    /// Writes a tensor where its slot is, converted to what that says.
    pub fn put(&mut self, name: &str, tensor: &Tensor) -> Result<(), CheckpointError> {
        let wrong = |reason: String| CheckpointError::Weights { path: self.path.into(), reason };
        let (slot, start) = self.places.remove(name).ok_or_else(|| wrong(format!("there is no place for tensor {name}")))?;
        if tensor.size() != slot.shape {
            return Err(wrong(format!("tensor {name} has shape {:?}, not {:?}", tensor.size(), slot.shape)));
        }
        let kind = kind(slot.stored).ok_or_else(|| wrong(format!("tensor {name} is of type {:?}", slot.stored)))?;
        let tensor = tensor.f_detach()?.f_to_device(tch::Device::Cpu)?.f_to_kind(kind)?.f_contiguous()?;
        let elements = tensor.numel();
        let mut bytes = vec![0u8; elements * kind.elt_size_in_bytes()];
        tensor.f_copy_data_u8(&mut bytes, elements)?;
        let written = self.file.seek(SeekFrom::Start(start as u64)).and_then(|_| self.file.write_all(&bytes));
        written.map_err(|source| CheckpointError::Write { path: self.path.into(), source })
    }
}

/// Writes one safetensors file with the tensors of `slots`, atomically. `fill` is to put each of them.
pub fn save_slots(
    path: &Path,
    slots: &[Slot],
    fill: &mut dyn FnMut(&mut Sink) -> Result<(), CheckpointError>,
) -> Result<(), CheckpointError> {
    let wrong = |reason: String| CheckpointError::Weights { path: path.into(), reason };
    let mut end = 0;
    let places = slots.iter().map(|slot| {
        let shape: Vec<_> = slot.shape.iter().map(|n| *n as usize).collect();
        let start = end;
        end += shape.iter().product::<usize>() * slot.stored.bitsize() / 8;
        (slot.name.clone(), TensorInfo { dtype: slot.stored, shape, data_offsets: (start, end) })
    });
    let places: Vec<_> = places.collect();
    let starts: Vec<_> = places.iter().map(|(_, info)| info.data_offsets.0).collect();
    let format = Some([("format".to_string(), "pt".to_string())].into());
    let header = Metadata::new(format, places).map_err(|e| wrong(e.to_string()))?;
    let mut header = serde_json::to_vec(&header).map_err(|e| wrong(e.to_string()))?;
    // The data begins on a multiple of 8 bytes, which the format fills up to with spaces.
    header.resize(header.len().next_multiple_of(8), b' ');
    super::write_atomically_with(path, |file| {
        let mut write =
            |bytes: &[u8]| file.write_all(bytes).map_err(|source| CheckpointError::Write { path: path.into(), source });
        write(&(header.len() as u64).to_le_bytes())?;
        write(&header)?;
        let data = 8 + header.len();
        let places = slots.iter().zip(starts).map(|(slot, start)| (slot.name.as_str(), (slot, data + start))).collect();
        let mut sink = Sink { path, file, places };
        fill(&mut sink)?;
        match sink.places.first_key_value() {
            Some((name, _)) => Err(wrong(format!("tensor {name} is missing"))),
            None => Ok(()),
        }
    })
}

/// What a trimmed vocabulary's table is called.
const TABLE: &str = "d2t";

/// Types that a tensor may be stored in. The table of a trimmed vocabulary holds token ids, which no 16-bit type tells apart.
fn types(name: &str) -> &'static [StoredType] {
    if name == TABLE { &[StoredType::I64, StoredType::F32] } else { &[StoredType::F32, StoredType::F16, StoredType::BF16] }
}

/// How floats are stored.
pub fn stored_as(dtype: Dtype) -> StoredType {
    match dtype {
        Dtype::F32 => StoredType::F32,
        Dtype::F16 => StoredType::F16,
        Dtype::Bf16 => StoredType::BF16,
    }
}

fn kind(stored: StoredType) -> Option<Kind> {
    match stored {
        StoredType::I64 => Some(Kind::Int64),
        StoredType::F32 => Some(Kind::Float),
        StoredType::F16 => Some(Kind::Half),
        StoredType::BF16 => Some(Kind::BFloat16),
        StoredType::I8 => Some(Kind::Int8),
        StoredType::I32 => Some(Kind::Int),
        StoredType::F8_E4M3 => Some(Kind::Float8e4m3fn),
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
