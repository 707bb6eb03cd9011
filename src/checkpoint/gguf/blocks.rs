//! How ggml stores numbers: plain floats, and blocks of small integers under shared scales.
//!
//! Layouts and the order of every f32 operation are those of ggml's `dequantize_row_*` reference (and of the `gguf` Python
//! package), so the values are the same to the bit. Nothing here knows of files or tensors.

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

    /// The numbers in `bytes`, whole blocks of them.
    pub fn dequantize(self, bytes: &[u8]) -> Vec<f32> {
        let unpack: fn(&[u8], &mut Vec<f32>) = match self {
            Self::F32 => |b, out| out.push(f32::from_le_bytes([b[0], b[1], b[2], b[3]])),
            Self::F16 => |b, out| out.push(half_at(b, 0)),
            Self::BF16 => |b, out| out.push(bf16::from_le_bytes([b[0], b[1]]).to_f32()),
            Self::Q4_0 => |b, out| {
                let scale = half_at(b, 0);
                out.extend(nibbles(&b[2..]).map(|q| scale * (q as f32 - 8.0)));
            },
            Self::Q4_1 => |b, out| {
                let (scale, min) = (half_at(b, 0), half_at(b, 2));
                out.extend(nibbles(&b[4..]).map(|q| scale * q as f32 + min));
            },
            Self::Q5_0 => |b, out| {
                let (scale, high) = (half_at(b, 0), [b[2], b[3], b[4], b[5]]);
                out.extend(fives(&b[6..], high).map(|q| scale * (q as f32 - 16.0)));
            },
            Self::Q5_1 => |b, out| {
                let (scale, min, high) = (half_at(b, 0), half_at(b, 2), [b[4], b[5], b[6], b[7]]);
                out.extend(fives(&b[8..], high).map(|q| scale * q as f32 + min));
            },
            Self::Q8_0 => |b, out| {
                let scale = half_at(b, 0);
                out.extend(b[2..].iter().map(|q| scale * (*q as i8) as f32));
            },
            Self::Q4_K => |b, out| eighths(b, None, &b[16..], out),
            Self::Q5_K => |b, out| eighths(b, Some(&b[16..48]), &b[48..], out),
            Self::Q6_K => q6_k,
        };
        let mut out = Vec::with_capacity(bytes.len() / self.bytes() * self.elements());
        bytes.chunks_exact(self.bytes()).for_each(|block| unpack(block, &mut out));
        out
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
fn eighths(block: &[u8], high: Option<&[u8]>, low: &[u8], out: &mut Vec<f32>) {
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
        let (s, m) = (scale * s as f32, min * m as f32);
        let quarter = &low[group / 2 * 32..][..32];
        out.extend(quarter.iter().enumerate().map(|(l, byte)| {
            let q = byte >> (group % 2 * 4) & 15 | high.map_or(0, |high| high[l] >> group & 1) << 4;
            s * q as f32 - m
        }));
    }
}

/// Two halves of 128 elements, each of four runs of 32 whose low 4 bits share bytes two by two and whose high 2 bits share
/// bytes four by four; 16 elements share a signed scale.
fn q6_k(block: &[u8], out: &mut Vec<f32>) {
    let scale = half_at(block, 208);
    for part in 0..2 {
        let (low, high, scales) = (&block[part * 64..][..64], &block[128 + part * 32..][..32], &block[192 + part * 8..][..8]);
        for run in 0..4 {
            out.extend((0..32).map(|l| {
                let q = low[l + run % 2 * 32] >> (run / 2 * 4) & 15 | (high[l] >> (run * 2) & 3) << 4;
                scale * (scales[l / 16 + run * 2] as i8) as f32 * (q as f32 - 32.0)
            }));
        }
    }
}
