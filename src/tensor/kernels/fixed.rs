//! Tensors that stay where they are, as a model's weights do.

use std::ffi::c_void;
use std::ops::Deref;

use super::turns::Rows;
use crate::tensor::Tensor;

/// A tensor that is looked up once, and not anew for every forward: libtorch reads three objects to find one's numbers, and behind a model that
/// comes from memory no cache has those of its hundreds of weights any more (docs/LOG.md).
#[derive(Debug)]
pub struct Fixed {
    tensor: Tensor,
    address: *mut c_void,
    rows: Option<Rows>,
}

// SAFETY: the pointers lead into the tensor, which may go to another thread.
unsafe impl Send for Fixed {}

impl Fixed {
    /// A contiguous tensor. Nobody may give it other memory later.
    pub fn of(tensor: Tensor) -> Self {
        Self { address: tensor.data_ptr(), rows: Rows::of(&tensor), tensor }
    }

    /// The same tensor under another handle.
    pub fn shallow_clone(&self) -> Self {
        Self { tensor: self.tensor.shallow_clone(), ..*self }
    }

    /// Where its numbers begin.
    pub(super) fn address(&self) -> *mut c_void {
        self.address
    }

    /// Where its bytes begin, and how many there are.
    pub fn memory(&self) -> (usize, usize) {
        (self.address as usize, self.tensor.numel() * self.tensor.kind().elt_size_in_bytes())
    }

    /// Its rows, if kernels read them.
    pub fn rows(&self) -> Option<Rows> {
        self.rows
    }
}

impl Deref for Fixed {
    type Target = Tensor;

    fn deref(&self) -> &Tensor {
        &self.tensor
    }
}
