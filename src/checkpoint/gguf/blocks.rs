//! How ggml stores numbers: plain floats, and blocks of small integers under shared scales.
//!
//! Layouts are those of ggml's `dequantize_row_*` reference (and of the `gguf` Python package), and so are the values, to the bit (but for
//! the sign of a zero). Nothing here knows of files or tensors.

use half::{bf16, f16};

/// A storage type that can be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(non_camel_case_types)] // ggml's own names
pub enum Block {
    F32,
    F16,
    BF16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q4_K,
    Q5_K,
    Q6_K,
}

impl Block {
    pub const ALL: [Self; 11] = [
        Self::F32,
        Self::F16,
        Self::BF16,
        Self::Q4_0,
        Self::Q4_1,
        Self::Q5_0,
        Self::Q5_1,
        Self::Q8_0,
        Self::Q4_K,
        Self::Q5_K,
        Self::Q6_K,
    ];

    /// Number in `enum ggml_type`, elements of a block, and its bytes.
    fn layout(self) -> (u32, usize, usize) {
        match self {
            Self::F32 => (0, 1, 4),
            Self::F16 => (1, 1, 2),
            Self::Q4_0 => (2, 32, 18),
            Self::Q4_1 => (3, 32, 20),
            Self::Q5_0 => (6, 32, 22),
            Self::Q5_1 => (7, 32, 24),
            Self::Q8_0 => (8, 32, 34),
            Self::Q4_K => (12, 256, 144),
            Self::Q5_K => (13, 256, 176),
            Self::Q6_K => (14, 256, 210),
            Self::BF16 => (30, 1, 2),
        }
    }

    /// The type of that number; the error names those that cannot be read.
    pub fn from_ggml(id: u32) -> Result<Self, String> {
        Self::ALL.into_iter().find(|block| block.layout().0 == id).ok_or_else(|| {
            let known: Vec<_> = Self::ALL.iter().map(|block| format!("{block:?}")).collect();
            format!("type {} cannot be read: {} can", unread(id), known.join(", "))
        })
    }

    pub fn elements(self) -> usize {
        self.layout().1
    }

    pub fn bytes(self) -> usize {
        self.layout().2
    }

    /// Elements that share a scale; none of plain floats.
    pub fn group(self) -> Option<usize> {
        match self {
            Self::F32 | Self::F16 | Self::BF16 => None,
            Self::Q6_K => Some(16),
            _ => Some(32),
        }
    }

    /// About how many bytes a matrix of so many elements takes that stays in these blocks: codes of four or eight bits, and two numbers a group
    /// ([`crate::tensor::kernels::compact`]).
    pub fn held_bytes(self, elements: usize) -> usize {
        let Some(group) = self.group() else { return elements * self.bytes() };
        let codes = if matches!(self, Self::Q4_0 | Self::Q4_1 | Self::Q4_K) { elements / 2 } else { elements };
        // Products of two scales do not fit 16 bits.
        let scale = if matches!(self, Self::Q4_K | Self::Q5_K | Self::Q6_K) { size_of::<f32>() } else { size_of::<f16>() };
        codes + elements / group * 2 * scale
    }

    /// The numbers in `bytes`, whole blocks of them.
    pub fn dequantize(self, bytes: &[u8]) -> Vec<f32> {
        let numbers = bytes.chunks_exact(self.bytes());
        match (self, self.group()) {
            (Self::F16, _) => numbers.map(|b| half_at(b, 0)).collect(),
            (Self::BF16, _) => numbers.map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
            (_, None) => numbers.map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
            (_, Some(group)) => {
                let Groups { codes, scales, minima } = self.groups(bytes);
                let shared = scales.iter().zip(&minima);
                codes
                    .chunks_exact(group)
                    .zip(shared)
                    .flat_map(|(codes, (s, m))| codes.iter().map(move |q| s * f32::from(*q) + m))
                    .collect()
            }
        }
    }

    /// What whole blocks in `bytes` consist of. Of plain floats, nothing.
    pub fn groups(self, bytes: &[u8]) -> Groups {
        let unpack: fn(&[u8], &mut Groups) = match self {
            Self::F32 | Self::F16 | Self::BF16 => return Groups::default(),
            Self::Q4_0 => |b, out| out.put(half_at(b, 0), -8.0 * half_at(b, 0), nibbles(&b[2..])),
            Self::Q4_1 => |b, out| out.put(half_at(b, 0), half_at(b, 2), nibbles(&b[4..])),
            Self::Q5_0 => |b, out| out.put(half_at(b, 0), -16.0 * half_at(b, 0), fives(&b[6..], [b[2], b[3], b[4], b[5]])),
            Self::Q5_1 => |b, out| out.put(half_at(b, 0), half_at(b, 2), fives(&b[8..], [b[4], b[5], b[6], b[7]])),
            Self::Q8_0 => |b, out| {
                let scale = half_at(b, 0);
                out.put(scale, -128.0 * scale, b[2..].iter().map(|q| q.wrapping_add(128)));
            },
            Self::Q4_K => |b, out| eighths(b, None, &b[16..], out),
            Self::Q5_K => |b, out| eighths(b, Some(&b[16..48]), &b[48..], out),
            Self::Q6_K => q6_k,
        };
        let elements = bytes.len() / self.bytes() * self.elements();
        let groups = elements / self.group().unwrap_or(1);
        let mut out = Groups {
            codes: Vec::with_capacity(elements),
            scales: Vec::with_capacity(groups),
            minima: Vec::with_capacity(groups),
        };
        bytes.chunks_exact(self.bytes()).for_each(|block| unpack(block, &mut out));
        out
    }
}

/// Codes without signs, and of each group what they share: a number is `code · scale + minimum`. The product is exact in f32, and so is what a
/// code without its sign has too much: the sum is rounded as ggml rounds it.
#[derive(Debug, Default)]
pub struct Groups {
    pub codes: Vec<u8>,
    pub scales: Vec<f32>,
    pub minima: Vec<f32>,
}

impl Groups {
    fn put(&mut self, scale: f32, minimum: f32, codes: impl Iterator<Item = u8>) {
        self.scales.push(scale);
        self.minima.push(minimum);
        self.codes.extend(codes);
    }
}

/// What ggml calls a type that we do not read.
fn unread(id: u32) -> String {
    let name = match id {
        9 => "Q8_1",
        10 => "Q2_K",
        11 => "Q3_K",
        15 => "Q8_K",
        16 => "IQ2_XXS",
        17 => "IQ2_XS",
        18 => "IQ3_XXS",
        19 => "IQ1_S",
        20 => "IQ4_NL",
        21 => "IQ3_S",
        22 => "IQ2_S",
        23 => "IQ4_XS",
        24 => "I8",
        25 => "I16",
        26 => "I32",
        27 => "I64",
        28 => "F64",
        29 => "IQ1_M",
        34 => "TQ1_0",
        35 => "TQ2_0",
        39 => "MXFP4",
        _ => return format!("number {id}"),
    };
    name.into()
}

fn half_at(bytes: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32()
}

/// All low halves of the bytes, then all high ones.
fn nibbles(bytes: &[u8]) -> impl Iterator<Item = u8> {
    bytes.iter().map(|b| b & 15).chain(bytes.iter().map(|b| b >> 4))
}

/// Nibbles with a fifth bit each, from a mask of 32 bits.
fn fives(bytes: &[u8], high: [u8; 4]) -> impl Iterator<Item = u8> {
    let high = u32::from_le_bytes(high);
    nibbles(bytes).enumerate().map(move |(at, q)| q | ((high >> at & 1) as u8) << 4)
}

/// Q4_K and Q5_K: eight groups of 32, each with a scale and a minimum of 6 bits under two of the block's own. Byte `l` of the
/// quarter `k` holds element `l` of group `2k` (low half) and of `2k + 1`; bit `g` of byte `l` of `high` is a fifth bit.
fn eighths(block: &[u8], high: Option<&[u8]>, low: &[u8], out: &mut Groups) {
    let (scale, min) = (half_at(block, 0), half_at(block, 2));
    let packed = &block[4..16];
    for group in 0..8 {
        let (s, m) = match group {
            0..4 => (packed[group] & 63, packed[group + 4] & 63),
            _ => {
                let joint = packed[group + 4];
                (joint & 15 | packed[group - 4] >> 6 << 4, joint >> 4 | packed[group] >> 6 << 4)
            }
        };
        let quarter = low[group / 2 * 32..][..32].iter().enumerate();
        let codes = quarter.map(|(l, byte)| byte >> (group % 2 * 4) & 15 | high.map_or(0, |high| high[l] >> group & 1) << 4);
        out.put(scale * s as f32, -(min * m as f32), codes);
    }
}

/// Two halves of 128 elements, each of four runs of 32 whose low 4 bits share bytes two by two and whose high 2 bits share
/// bytes four by four; 16 elements share a signed scale.
fn q6_k(block: &[u8], out: &mut Groups) {
    let scale = half_at(block, 208);
    for part in 0..2 {
        let (low, high, scales) = (&block[part * 64..][..64], &block[128 + part * 32..][..32], &block[192 + part * 8..][..8]);
        for (group, own) in scales.iter().enumerate() {
            let (run, scale) = (group / 2, scale * (*own as i8) as f32);
            let elements = group % 2 * 16..(group % 2 + 1) * 16;
            let codes = elements.map(|l| low[l + run % 2 * 32] >> (run / 2 * 4) & 15 | (high[l] >> (run * 2) & 3) << 4);
            out.put(scale, -32.0 * scale, codes);
        }
    }
}
