//! The container: a GGUF file's metadata and tensor table (versions 2 and 3, little-endian), memory-mapped.
//!
//! Source: the GGUF specification of ggml. Every count, length and offset is held against the file's size before it is used, so
//! that a corrupt file is an error that names its key or tensor. Texts and arrays stay in the mapping until they are asked for.
//! What the keys mean is for the modules beside this one.

use std::collections::BTreeMap;
use std::ops::Range;

use super::blocks::Block;

/// Far more than any file has; they bound the tables whatever a broken header asks for.
const KEYS_MAX: u64 = 1 << 16;
const TENSORS_MAX: u64 = 1 << 17;
/// ggml's own limits.
const DIMENSIONS_MAX: u32 = 4;
const NAME_MAX: usize = 65_535;

const TEXT: u32 = 8;
const ARRAY: u32 = 9;

/// A value of the metadata. Ranges are bytes of the file.
#[derive(Clone, Debug)]
enum Entry {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Flag(bool),
    Text(Range<usize>),
    Array { kind: u32, count: usize, range: Range<usize> },
}

/// Where a tensor lies and how.
#[derive(Clone, Debug)]
pub struct Info {
    /// Slowest dimension first, as everywhere but in ggml.
    pub shape: Vec<i64>,
    pub block: Block,
    /// Bytes in the file.
    pub range: Range<usize>,
}

/// The parsed header over the bytes of its file.
pub struct Gguf<B> {
    bytes: B,
    metadata: BTreeMap<String, Entry>,
    tensors: BTreeMap<String, Info>,
}

impl<B: AsRef<[u8]>> Gguf<B> {
    pub fn parse(bytes: B) -> Result<Self, String> {
        let mut cursor = Cursor { bytes: bytes.as_ref(), at: 0 };
        if cursor.take(4).ok() != Some(b"GGUF".as_slice()) {
            return Err("it does not begin with GGUF: it is no GGUF file".into());
        }
        match cursor.u32()? {
            2 | 3 => {}
            1 => return Err("it is of GGUF version 1, which only the first months' files are: convert it anew".into()),
            other if other.swap_bytes() <= 3 => return Err("it is big-endian: convert it for little-endian machines".into()),
            other => return Err(format!("it is of GGUF version {other}: versions 2 and 3 can be read")),
        }
        let (tensor_count, key_count) = (cursor.u64()?, cursor.u64()?);
        if key_count > KEYS_MAX || tensor_count > TENSORS_MAX {
            return Err(format!("it claims {key_count} keys and {tensor_count} tensors: it is corrupt"));
        }
        let mut metadata = BTreeMap::new();
        for index in 0..key_count {
            let key = cursor.name().map_err(|e| format!("key {index} of {key_count}: {e}"))?;
            let entry = cursor.entry().map_err(|e| format!("key {key}: {e}"))?;
            if metadata.insert(key.clone(), entry).is_some() {
                return Err(format!("key {key} is there twice"));
            }
        }
        let alignment = match metadata.get("general.alignment") {
            None => 32,
            Some(Entry::Unsigned(n)) if n.is_power_of_two() && (8..=1 << 20).contains(n) => *n as usize,
            Some(other) => return Err(format!("general.alignment is {other:?}: it should be a power of two from 8")),
        };
        let mut tensors = BTreeMap::new();
        for index in 0..tensor_count {
            let name = cursor.name().map_err(|e| format!("tensor {index} of {tensor_count}: {e}"))?;
            let info = cursor.tensor().map_err(|e| format!("tensor {name}: {e}"))?;
            if tensors.insert(name.clone(), info).is_some() {
                return Err(format!("tensor {name} is there twice"));
            }
        }
        // Offsets count from the first aligned byte behind the table.
        let (data, length) = (cursor.at.next_multiple_of(alignment), cursor.bytes.len());
        for (name, info) in &mut tensors {
            let place = |n: usize| n.checked_add(data).filter(|end| *end <= length);
            match (place(info.range.start), place(info.range.end)) {
                (Some(start), Some(end)) if info.range.start % alignment == 0 => info.range = start..end,
                (Some(_), Some(_)) => return Err(format!("tensor {name} does not lie on a multiple of {alignment} bytes")),
                _ => return Err(format!("tensor {name} ends behind the file's {length} bytes: it is truncated or corrupt")),
            }
        }
        Ok(Self { bytes, metadata, tensors })
    }

    pub fn tensors(&self) -> &BTreeMap<String, Info> {
        &self.tensors
    }

    pub fn tensor_bytes(&self, info: &Info) -> &[u8] {
        &self.bytes.as_ref()[info.range.clone()]
    }

    /// The file's bytes and what is in it, for who reads tensors only.
    pub fn into_parts(self) -> (B, BTreeMap<String, Info>) {
        (self.bytes, self.tensors)
    }

    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.metadata.keys().map(String::as_str)
    }

    pub fn unsigned(&self, key: &str) -> Result<Option<u64>, String> {
        self.scalar(key, "a count", |entry| match entry {
            Entry::Unsigned(n) => Some(*n),
            Entry::Signed(n) => u64::try_from(*n).ok(),
            _ => None,
        })
    }

    /// A token's number.
    pub fn token(&self, key: &str) -> Result<Option<u32>, String> {
        let id = self.unsigned(key)?;
        id.map(|id| u32::try_from(id).map_err(|_| format!("{key} = {id} is not a token"))).transpose()
    }

    pub fn float(&self, key: &str) -> Result<Option<f64>, String> {
        self.scalar(key, "a number", |entry| match entry {
            Entry::Float(x) => Some(*x).filter(|x| x.is_finite()),
            Entry::Unsigned(n) => Some(*n as f64),
            _ => None,
        })
    }

    pub fn flag(&self, key: &str) -> Result<Option<bool>, String> {
        self.scalar(key, "true or false", |entry| match entry {
            Entry::Flag(yes) => Some(*yes),
            _ => None,
        })
    }

    pub fn text(&self, key: &str) -> Result<Option<&str>, String> {
        self.scalar(key, "a text in UTF-8", |entry| match entry {
            Entry::Text(range) => std::str::from_utf8(&self.bytes.as_ref()[range.clone()]).ok(),
            _ => None,
        })
    }

    pub fn texts(&self, key: &str) -> Result<Option<Vec<&str>>, String> {
        let Some((count, range)) = self.array(key, "texts", &[TEXT])? else { return Ok(None) };
        let mut cursor = Cursor { bytes: &self.bytes.as_ref()[..range.end], at: range.start };
        let mut texts = Vec::with_capacity(count);
        for index in 0..count {
            let range = cursor.text()?;
            let text = std::str::from_utf8(&cursor.bytes[range]).map_err(|_| format!("{key}[{index}] is not UTF-8"))?;
            texts.push(text);
        }
        Ok(Some(texts))
    }

    /// Integers of 32 bits; all that have arrays of integers here are small.
    pub fn integers(&self, key: &str) -> Result<Option<Vec<i32>>, String> {
        Ok(self.words(key, "integers of 32 bits", &[4, 5])?.map(|words| words.map(i32::from_le_bytes).collect()))
    }

    pub fn floats(&self, key: &str) -> Result<Option<Vec<f32>>, String> {
        Ok(self.words(key, "numbers in f32", &[6])?.map(|words| words.map(f32::from_le_bytes).collect()))
    }

    fn words(&self, key: &str, what: &str, kinds: &[u32]) -> Result<Option<impl Iterator<Item = [u8; 4]>>, String> {
        let found = self.array(key, what, kinds)?;
        Ok(found.map(|(_, range)| self.bytes.as_ref()[range].as_chunks::<4>().0.iter().copied()))
    }

    fn array(&self, key: &str, what: &str, kinds: &[u32]) -> Result<Option<(usize, Range<usize>)>, String> {
        self.scalar(key, &format!("an array of {what}"), |entry| match entry {
            Entry::Array { kind, count, range } if kinds.contains(kind) => Some((*count, range.clone())),
            _ => None,
        })
    }

    fn scalar<'a, T>(&'a self, key: &str, what: &str, take: impl Fn(&'a Entry) -> Option<T>) -> Result<Option<T>, String> {
        let Some(entry) = self.metadata.get(key) else { return Ok(None) };
        take(entry).map(Some).ok_or_else(|| format!("key {key} is not {what}"))
    }
}

/// Reads forward and never past the end.
struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn take(&mut self, count: u64) -> Result<&'a [u8], String> {
        let rest = &self.bytes[self.at..];
        match usize::try_from(count).ok().and_then(|count| rest.get(..count)) {
            Some(taken) => {
                self.at += taken.len();
                Ok(taken)
            }
            None => Err(format!("needs {count} bytes at byte {} of a file of {}", self.at, self.bytes.len())),
        }
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let taken = self.take(N as u64)?;
        Ok(std::array::from_fn(|i| taken[i]))
    }

    fn u32(&mut self) -> Result<u32, String> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, String> {
        self.array().map(u64::from_le_bytes)
    }

    fn text(&mut self) -> Result<Range<usize>, String> {
        let length = self.u64()?;
        self.take(length)?;
        Ok(self.at - length as usize..self.at)
    }

    /// A key's or a tensor's.
    fn name(&mut self) -> Result<String, String> {
        let range = self.text()?;
        if range.is_empty() || range.len() > NAME_MAX {
            return Err(format!("its name has {} bytes", range.len()));
        }
        std::str::from_utf8(&self.bytes[range]).map(str::to_owned).map_err(|_| "its name is not UTF-8".into())
    }

    fn entry(&mut self) -> Result<Entry, String> {
        let kind = self.u32()?;
        Ok(match kind {
            0 => Entry::Unsigned(u8::from_le_bytes(self.array()?).into()),
            1 => Entry::Signed(i8::from_le_bytes(self.array()?).into()),
            2 => Entry::Unsigned(u16::from_le_bytes(self.array()?).into()),
            3 => Entry::Signed(i16::from_le_bytes(self.array()?).into()),
            4 => Entry::Unsigned(self.u32()?.into()),
            5 => Entry::Signed(i32::from_le_bytes(self.array()?).into()),
            // The shortest decimal of an f32 is what was meant: 1e-5, not 9.999999747378752e-6.
            6 => Entry::Float(f32::from_le_bytes(self.array()?).to_string().parse().unwrap_or(f64::NAN)),
            7 => Entry::Flag(self.array::<1>()? != [0]),
            TEXT => Entry::Text(self.text()?),
            ARRAY => {
                let (kind, count) = (self.u32()?, self.u64()?);
                let start = self.at;
                match width(kind) {
                    Some(width) => {
                        let bytes = count.checked_mul(width).ok_or_else(|| format!("claims {count} elements"))?;
                        self.take(bytes)?;
                    }
                    // Each text takes some of the file, so that a count too large runs into its end.
                    None if kind == TEXT => (0..count).try_for_each(|_| self.text().map(|_| ()))?,
                    None => return Err(format!("is an array of type {kind}, which is not known")),
                }
                Entry::Array { kind, count: count as usize, range: start..self.at }
            }
            10 => Entry::Unsigned(self.u64()?),
            11 => Entry::Signed(i64::from_le_bytes(self.array()?)),
            12 => Entry::Float(f64::from_le_bytes(self.array()?)),
            other => return Err(format!("is of type {other}, which is not known")),
        })
    }

    /// A row of the tensor table; the range counts from the start of the data as yet.
    fn tensor(&mut self) -> Result<Info, String> {
        let dimensions = self.u32()?;
        if !(1..=DIMENSIONS_MAX).contains(&dimensions) {
            return Err(format!("has {dimensions} dimensions"));
        }
        let mut sizes = (0..dimensions).map(|_| self.u64()).collect::<Result<Vec<_>, _>>()?;
        let block = self.u32()?;
        let start = self.u64()?;
        let row = sizes[0];
        sizes.reverse();
        let block = Block::from_ggml(block)?;
        if row % block.elements() as u64 != 0 {
            return Err(format!("has rows of {row}, which are no whole blocks of {}", block.elements()));
        }
        let elements = sizes.iter().try_fold(1u64, |product, n| product.checked_mul(*n)).filter(|n| *n > 0);
        let bytes = elements.and_then(|n| (n / block.elements() as u64).checked_mul(block.bytes() as u64));
        let range =
            bytes.and_then(|bytes| Some(usize::try_from(start).ok()?..usize::try_from(start.checked_add(bytes)?).ok()?));
        // No dimension exceeds the product, and the product, once it fits the file, fits an i64.
        let shape = sizes.iter().map(|n| i64::try_from(*n).ok()).collect::<Option<_>>();
        let (Some(range), Some(shape)) = (range, shape) else { return Err(format!("cannot have the shape {sizes:?}")) };
        Ok(Info { shape, block, range })
    }
}

/// Bytes of a scalar in an array.
fn width(kind: u32) -> Option<u64> {
    match kind {
        0 | 1 | 7 => Some(1),
        2 | 3 => Some(2),
        4..=6 => Some(4),
        10..=12 => Some(8),
        _ => None,
    }
}
