//! Keys and values of what a sequence has run already, so that a forward runs its new tokens only.
//!
//! Room is taken once, for the longest that the sequence may become. A forward writes behind what is kept and then says how much
//! of it stays: all (prefill, a plain step), or one path of a tree of candidates ([`KvCache::keep`]). The cache knows nothing of
//! tokens; [`super::Transformer::forward`] is its one writer.

use super::ModelError;
use crate::checkpoint::config::ModelConfig;
use crate::tensor::kernels::attention::{self, Slots};
use crate::tensor::{Device, Kind, Placement, Tensor, upload};

/// Keys (rotated) and values of every layer.
///
/// For our own kernel on the CPU they lie in that order, a head's positions side by side. For libtorch, and on a GPU, a position's keys and values of a
/// layer are one row in memory, and rows begin at multiples of their size: so rows of any two caches of a model are so many whole
/// rows apart, and one kernel can attend over all of them ([`crate::tensor::flash::ragged`]).
pub struct KvCache {
    /// `[layers, 2, kv_heads, capacity, head_dim]`: one tensor, so that a path is kept in one selection for all layers.
    data: Tensor,
    /// Views of `data` for each layer, `[2, kv_heads, capacity, head_dim]`, for libtorch; and for our own kernel. One of them is empty: a short
    /// request's cache would take longer to make than to fill.
    layers: Vec<Tensor>,
    slots: Vec<Slots>,
    length: usize,
}

impl KvCache {
    /// Room for `capacity` positions.
    pub fn new(config: &ModelConfig, placement: Placement, capacity: usize) -> Result<Self, ModelError> {
        let own = attention::fits(placement.dtype.kind(), placement.device, config.head_dim);
        Self::of(config, placement, capacity, own)
    }

    /// For our `own` kernel, or for libtorch.
    pub(super) fn of(config: &ModelConfig, placement: Placement, capacity: usize, own: bool) -> Result<Self, ModelError> {
        let shape = [config.layers, 2, config.kv_heads, capacity, config.head_dim].map(|n| n as i64);
        let options = (placement.dtype.kind(), placement.device);
        // libtorch's attention also multiplies what a mask hides, which therefore has to be a number; our kernel never looks there.
        let data = if own { Tensor::f_empty(shape, options)? } else { by_rows(shape, options)? };
        let slots = if own { Slots::of_layers(&data) } else { vec![] };
        let views = if slots.is_empty() { config.layers as i64 } else { 0 };
        let layers = (0..views).map(|layer| data.f_get(layer)).collect::<Result<_, _>>()?;
        Ok(Self { data, layers, slots, length: 0 })
    }

    /// Positions kept.
    pub fn len(&self) -> usize {
        self.length
    }

    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Positions that there is room for.
    pub fn capacity(&self) -> usize {
        self.data.size()[3] as usize
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.data.numel() * self.data.kind().elt_size_in_bytes()
    }

    /// All of a layer's keys and values, for a kernel that writes them itself.
    pub(super) fn slots(&self, layer: usize) -> Option<&Slots> {
        self.slots.get(layer)
    }

    /// Where the rows of keys and values begin that are in memory one behind the other, layer by layer; 0 where they are not.
    pub(super) fn address(&self) -> usize {
        if self.slots.is_empty() { self.data.data_ptr() as usize } else { 0 }
    }

    /// Writes keys and values of `layer` (`[seq, 2, kv_heads, head_dim]`) from position `start` on, and gives the first `visible`
    /// positions of both, `[1, kv_heads, visible, head_dim]`. What is kept grows with [`KvCache::keep`] only.
    pub(super) fn write(
        &self,
        layer: usize,
        start: usize,
        new: &Tensor,
        visible: usize,
    ) -> Result<(Tensor, Tensor), ModelError> {
        self.layer(layer)?.f_narrow(2, start as i64, new.size()[0])?.f_copy_(&new.f_permute([1, 2, 0, 3])?)?;
        self.seen(layer, visible)
    }

    /// What [`KvCache::write`] gives, where somebody else has written.
    pub(super) fn seen(&self, layer: usize, visible: usize) -> Result<(Tensor, Tensor), ModelError> {
        let layer = self.layer(layer)?;
        let seen = |which: i64| layer.f_narrow(0, which, 1)?.f_narrow(2, 0, visible as i64);
        Ok((seen(0)?, seen(1)?))
    }

    fn layer(&self, layer: usize) -> Result<Tensor, ModelError> {
        Ok(match self.layers.get(layer) {
            Some(view) => view.shallow_clone(),
            None => self.data.f_get(layer as i64)?,
        })
    }

    /// Of the tokens that the last forward wrote, keeps those with these indices, in this order; the others are forgotten.
    pub fn keep(&mut self, path: &[usize]) -> Result<(), ModelError> {
        let start = self.length as i64;
        let in_place = path.iter().enumerate().all(|(at, index)| at == *index);
        if let (false, Some(last)) = (in_place, path.iter().max()) {
            let index: Vec<i64> = path.iter().map(|index| *index as i64).collect();
            let index = upload(&index, self.data.device())?;
            let kept = self.data.f_narrow(3, start, *last as i64 + 1)?.f_index_select(3, &index)?;
            self.data.f_narrow(3, start, path.len() as i64)?.f_copy_(&kept)?;
        }
        self.length += path.len();
        Ok(())
    }

    /// A copy of `count` positions from `start` on, `[layers, 2, kv_heads, count, head_dim]`.
    pub fn slice(&self, start: usize, count: usize) -> Result<Tensor, ModelError> {
        Ok(self.data.f_narrow(3, start as i64, count as i64)?.f_detach_copy()?)
    }

    /// Takes over the first `count` positions of what [`KvCache::slice`] gave, behind what is kept.
    pub fn append(&mut self, data: &Tensor, count: usize) -> Result<(), ModelError> {
        if self.length + count > self.capacity() {
            return Err(ModelError::CacheFull { needed: self.length + count, capacity: self.capacity() });
        }
        if !attention::fill(&self.slots, self.length, data, count) {
            let taken = data.f_narrow(3, 0, count as i64)?;
            self.data.f_narrow(3, self.length as i64, count as i64)?.f_copy_(&taken)?;
        }
        self.length += count;
        Ok(())
    }

    /// Random keys and values of `count` positions, as if so many tokens had been run and kept: for measurements.
    pub fn fill(&mut self, count: usize) -> Result<(), ModelError> {
        let capacity = self.capacity();
        if count > capacity {
            return Err(ModelError::CacheFull { needed: count, capacity });
        }
        let _ = self.data.f_narrow(3, 0, count as i64)?.f_normal_(0.0, 1.0)?;
        self.length = count;
        Ok(())
    }

    /// Forgets everything from position `length` on.
    pub fn truncate(&mut self, length: usize) {
        self.length = self.length.min(length);
    }

    /// Keys and values kept, `[layers, 2, kv_heads, len, head_dim]` in f32, for comparisons.
    pub fn kept(&self) -> Result<Tensor, ModelError> {
        Ok(self.data.f_narrow(3, 0, self.length as i64)?.f_to_kind(Kind::Float)?)
    }
}

/// Zeros of `[layers, 2, kv_heads, capacity, head_dim]` that lie as `[layers, capacity, 2, kv_heads, head_dim]`, from a multiple of such a row's size on.
fn by_rows([layers, two, kv_heads, capacity, dim]: [i64; 5], options: (Kind, Device)) -> Result<Tensor, ModelError> {
    let row = two * kv_heads * dim;
    let (numbers, size) = (layers * capacity * row, options.0.elt_size_in_bytes());
    let memory = Tensor::f_zeros([numbers + row], options)?;
    let row_bytes = row as usize * size;
    let beyond = memory.data_ptr() as usize % row_bytes;
    // A whole number of elements: both the memory and rows begin at one.
    let skipped = if beyond == 0 { 0 } else { (row_bytes - beyond) / size };
    let rows = memory.f_narrow(0, skipped as i64, numbers)?.f_view([layers, capacity, two, kv_heads, dim])?;
    Ok(rows.f_permute([0, 2, 3, 1, 4])?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_any_two_caches_are_whole_rows_apart() {
        for (kv_heads, dim, kind) in
            [(2, 16, Kind::Float), (3, 64, Kind::BFloat16), (8, 128, Kind::BFloat16), (5, 24, Kind::Float)]
        {
            let row_bytes = 2 * kv_heads as usize * dim as usize * kind.elt_size_in_bytes();
            let caches: Vec<Tensor> =
                [7, 20, 1].map(|capacity| by_rows([3, 2, kv_heads, capacity, dim], (kind, Device::Cpu)).unwrap()).into();
            for (cache, capacity) in caches.iter().zip([7usize, 20, 1]) {
                let address = |of: &Tensor| of.data_ptr() as usize;
                assert_eq!(address(cache) % row_bytes, 0);
                // Layer 2, the last position, values of head 1.
                let there = cache.get(2).get(1).get(1).get(capacity as i64 - 1);
                let row = 2 * capacity + capacity - 1;
                let value = (kv_heads + 1) as usize * dim as usize * kind.elt_size_in_bytes();
                assert_eq!(address(&there), address(cache) + row * row_bytes + value);
            }
        }
    }
}
