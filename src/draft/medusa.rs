//! Medusa: one head for each of the next tokens, all from the same hidden state, and a static tree of their best choices (Cai et
//! al., arXiv 2401.10774; `FasterDecoding/Medusa`).
//!
//! Head `k` (from 0) predicts the token `k + 2` places behind the state's own; the first of these follows the token that the
//! network itself has just chosen. Tensors carry the authors' names, in safetensors rather than a pickle.

use std::path::Path;

use super::heads::{Folder, Linear, bytes, spec};
use super::{Context, Draft, Drafter};
use crate::checkpoint::CheckpointError;
use crate::checkpoint::config::ModelConfig;
use crate::decode::autoregressive::adaptation::Shape;
use crate::decode::autoregressive::tree::Tree;
use crate::model::{ModelError, Source, TensorSpec, linear};
use crate::tensor::{Device, Kind, Placement, Tensor};

/// Best tokens of each head that the static tree may use, as in the authors' code.
const TOP: usize = 10;

/// The authors' tree of 63 nodes, from the measured accuracies of a 7B model's heads: shorter paths first, then by rank.
#[rustfmt::skip]
static MC_SIM_7B_63: [&[usize]; 63] = [
    &[0], &[1], &[2], &[3], &[4], &[5], &[6], &[7], &[8], &[9], &[0, 0], &[0, 1], &[0, 2], &[0, 3], &[0, 4], &[0, 5], &[0, 6],
    &[0, 7], &[0, 8], &[0, 9], &[1, 0], &[1, 1], &[1, 2], &[1, 3], &[1, 4], &[1, 5], &[1, 6], &[2, 0], &[2, 1], &[2, 2],
    &[3, 0], &[3, 1], &[4, 0], &[5, 0], &[6, 0], &[7, 0], &[8, 0], &[9, 0], &[0, 0, 0], &[0, 0, 1], &[0, 0, 2], &[0, 0, 3],
    &[0, 0, 4], &[0, 0, 5], &[0, 0, 6], &[0, 0, 7], &[0, 0, 8], &[0, 0, 9], &[0, 1, 0], &[0, 1, 1], &[0, 1, 2], &[0, 2, 0],
    &[0, 2, 1], &[0, 3, 0], &[0, 4, 0], &[0, 5, 0], &[0, 6, 0], &[0, 7, 0], &[1, 0, 0], &[1, 0, 1], &[2, 0, 0], &[0, 0, 0, 0],
    &[0, 0, 0, 1],
];

/// Sizes of a set of heads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    pub hidden_size: usize,
    pub vocab_size: usize,
    pub heads: usize,
    pub layers: usize,
}

impl Settings {
    /// Every tensor, head by head.
    pub fn manifest(&self) -> Vec<TensorSpec> {
        let Self { hidden_size: h, vocab_size, heads, layers } = *self;
        let head = |head: usize| {
            let block = move |layer: usize| {
                let name = |part: &str| format!("{head}.{layer}.linear.{part}");
                [spec(name("weight"), &[h, h]), spec(name("bias"), &[h])]
            };
            (0..layers).flat_map(block).chain([spec(format!("{head}.{layers}.weight"), &[vocab_size, h])])
        };
        (0..heads).flat_map(head).collect()
    }
}

struct Head {
    blocks: Vec<Linear>,
    out: Tensor,
}

/// Loaded heads.
pub struct Medusa {
    heads: Vec<Head>,
}

struct FolderSource<'a> {
    folder: &'a Folder,
    placement: Placement,
}

impl Source for FolderSource<'_> {
    type Error = CheckpointError;

    fn tensor(&mut self, spec: &TensorSpec) -> Result<Tensor, CheckpointError> {
        self.folder.tensor(&spec.name, self.placement)
    }
}

impl Medusa {
    pub fn load(path: &Path, model: &ModelConfig, placement: Placement) -> Result<Self, CheckpointError> {
        let folder = Folder::open(path)?;
        // The authors' settings tell neither size; the tensors' shapes do, and are checked below.
        for (field, own) in [("hidden_size", model.hidden_size), ("vocab_size", model.vocab_size)] {
            if folder.has(field) {
                folder.must_be(field, folder.number(field, 1 << 22)?, own)?;
            }
        }
        let settings = Settings {
            hidden_size: model.hidden_size,
            vocab_size: model.vocab_size,
            heads: folder.number("medusa_num_heads", 16)?,
            layers: folder.number("medusa_num_layers", 16)?,
        };
        folder.check(&settings.manifest())?;
        Self::new(settings, &mut FolderSource { folder: &folder, placement })
    }

    /// Builds the heads from `source`, which gives each tensor of the manifest. Autograd flows through.
    pub fn new<S: Source>(settings: Settings, source: &mut S) -> Result<Self, S::Error> {
        let mut specs = settings.manifest().into_iter();
        let mut next = || match specs.next() {
            Some(spec) => source.tensor(&spec),
            None => unreachable!("the manifest and the heads list the same tensors"),
        };
        let mut heads = Vec::with_capacity(settings.heads);
        for _ in 0..settings.heads {
            let mut blocks = Vec::with_capacity(settings.layers);
            for _ in 0..settings.layers {
                blocks.push(Linear { weight: next()?, bias: Some(next()?) });
            }
            heads.push(Head { blocks, out: next()? });
        }
        Ok(Self { heads })
    }

    pub fn heads(&self) -> usize {
        self.heads.len()
    }

    /// Logits of one head, `[rows, hidden]` to `[rows, vocab]`.
    pub fn logits(&self, head: usize, hidden: &Tensor) -> Result<Tensor, ModelError> {
        let Head { blocks, out } = &self.heads[head];
        let mut x = hidden.shallow_clone();
        for block in blocks {
            x = block.residual(&x)?;
        }
        linear(&x.f_to_kind(out.f_kind()?)?, out, None)
    }
}

/// The tree's paths, each the rank of the choice at every depth: the authors' that are no deeper than the shape's length and take no
/// choice of a rank beyond its width.
pub fn paths(shape: Shape) -> impl Iterator<Item = &'static [usize]> {
    let fits = move |path: &&[usize]| path.len() <= shape.length && path.iter().all(|rank| *rank < shape.width);
    MC_SIM_7B_63.iter().copied().filter(fits)
}

/// The candidates of `paths`, whose ranks point into each head's `best` tokens.
pub fn tree(root: u32, best: &[Vec<u32>], shape: Shape) -> Tree {
    let mut tree = Tree::root(root);
    for path in paths(shape).filter(|path| path.len() <= best.len()) {
        let tokens: Option<Vec<u32>> = path.iter().zip(best).map(|(rank, best)| best.get(*rank).copied()).collect();
        let Some((last, before)) = tokens.as_deref().and_then(|tokens| tokens.split_last()) else { continue };
        // Shorter paths stand first, so the parent is there.
        let parent = before.iter().try_fold(0, |node, token| tree.child(node, *token));
        if let Some(parent) = parent {
            tree.propose(parent, *last, path.iter().copied().max().unwrap_or(0));
        }
    }
    tree
}

impl Drafter for Medusa {
    fn draft(&self, context: &Context) -> Result<Draft, ModelError> {
        let shape = context.asked.shape;
        let heads = self.heads.len().min(shape.length);
        let top = shape.width.min(TOP) as i64;
        let mut rows = Vec::with_capacity(heads);
        for head in 0..heads {
            rows.push(self.logits(head, context.hidden)?);
        }
        if rows.is_empty() {
            return Ok(Draft { tree: Tree::root(context.root()), proposal: None, forwards: 0 });
        }
        let (_, best) = Tensor::f_cat(&rows, 0)?.f_to_kind(Kind::Float)?.f_topk(top, -1, true, true)?;
        let best: Vec<i64> = Vec::try_from(&best.f_to_device(Device::Cpu)?.f_contiguous()?.f_view(-1)?)?;
        let best: Vec<Vec<u32>> = best.chunks(top as usize).map(|row| row.iter().map(|id| *id as u32).collect()).collect();
        Ok(Draft { tree: tree(context.root(), &best, shape), proposal: None, forwards: heads })
    }

    fn limit(&self) -> Shape {
        Shape { width: TOP, length: self.heads.len() }
    }

    fn usual(&self) -> Shape {
        Shape { width: 3, length: self.heads.len() }
    }

    fn bytes(&self) -> usize {
        self.heads.iter().map(|head| head.blocks.iter().map(Linear::bytes).sum::<usize>() + bytes(&head.out)).sum()
    }

    fn nodes(&self, shape: Shape) -> usize {
        paths(shape).count()
    }
}
