//! The network's work between attentions, recorded once and then replayed: a step of few rows is hundreds of small kernels, and telling
//! a GPU of each takes longer than it takes the GPU to run it.
//!
//! Attention stays as it is: its shapes and addresses are another sequence's in every step. Everything between two attentions
//! ([`Transformer::piece`]) depends on the number of rows alone and is one CUDA graph, recorded for each of [`BUCKETS`] when it is first
//! met; rows are filled up to the next bucket, and what the filling comes to is dropped. Every operation of a piece treats rows by
//! themselves, so that filling changes nothing but which of the GPU's kernels libtorch chooses for the shape.
//!
//! Why this is sound:
//! - *Addresses.* A graph reads and writes where it did when it was recorded. What a piece is given (token ids, what attention found)
//!   is copied to tensors that live as long as the graphs. What it hands on lies in the memory pool that all graphs of a model share,
//!   which gives nothing back to other users while one of them lives.
//! - *Lifetimes within the pool.* While a piece is recorded, what the piece before handed on is held, and so not overwritten by it; then it is
//!   let go, and pieces further on, or of other buckets, may use its memory. That is right because pieces are replayed in the order in which
//!   they were recorded, a forward runs through all of them, and forwards do not overlap: nothing in the pool outlives its forward.
//!   Final states are copied out of it.
//! - *Streams.* The thread's own stream is CUDA's default one, which cannot be recorded; so recording happens on a side stream, between two waits for
//!   the whole device, and is preceded there by a run of the same piece for libraries to set themselves up, which they may not do during
//!   a recording. Replays go to the thread's own stream like every other operation, and are in order with attention by that.
//! - *Failures.* A bucket that cannot be recorded is run without graphs from then on, and the log says so once.
//!
//! The shim over libtorch's graph class (`cuda/graphs.cpp`) is opened at run time, when libtorch's CUDA half is.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::ptr::NonNull;
use std::rc::Rc;

use tracing::{info, warn};

use super::{Layer, ModelError, Transformer};
use crate::tensor::library::Library;
use crate::tensor::memory::{self, Answer};
use crate::tensor::{Device, Kind, Tensor};

/// Rows that pieces are recorded for; more are so much work that telling the GPU of it does not matter.
const BUCKETS: [usize; 14] = [1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512];
/// Names the shim where it does not lie beside the binary.
const LIBRARY: &str = "LACUNA_GRAPHS_LIBRARY";
const FILE: &str = "liblacuna_graphs.so";
/// Of the shim's interface.
const VERSION: c_int = 2;

fn bucket(rows: usize) -> Option<usize> {
    BUCKETS.into_iter().find(|bucket| *bucket >= rows && rows > 0)
}

/// What a piece makes: the residual stream, and what comes next, queries, keys and values or final states.
type Made = (Tensor, Tensor);

/// Something that notes work, to do it again at the same addresses.
trait Recorder {
    /// Between these two calls the thread may record.
    fn enter(&self) -> Result<(), String>;
    fn leave(&self) -> Result<(), String>;
    /// Notes `work`. What it gives is where each replay will put the same.
    fn record(&self, work: &dyn Fn() -> Result<Made, ModelError>) -> Result<(Box<dyn Recording>, Made), String>;
}

trait Recording {
    /// Does the work again; `work` is what was recorded.
    fn replay(&self, work: &dyn Fn() -> Result<Made, ModelError>) -> Result<(), ModelError>;
}

/// All pieces for some number of rows.
struct Recorded {
    /// Where pieces find token ids, `[bucket]`, and what attention found, `[bucket, heads · dim]`.
    tokens: Tensor,
    mixed: Tensor,
    pieces: Vec<Piece>,
}

struct Piece {
    recording: Box<dyn Recording>,
    /// What it puts where: views without an owner, see above.
    stream: Tensor,
    next: Tensor,
}

/// Recorded pieces of one model, by rows; `None` for a bucket that could not be recorded.
pub struct Graphs {
    // In this order: recordings go before their recorder.
    recorded: RefCell<BTreeMap<usize, Option<Recorded>>>,
    recorder: Box<dyn Recorder>,
    told: Cell<bool>,
}

// SAFETY: whoever has the graphs has all of them, with every `Rc` to their recorder and every view of its memory; libtorch and CUDA take
// calls from any thread.
unsafe impl Send for Graphs {}

impl Graphs {
    /// Opens the shim for `device`; the error says why graphs cannot be used.
    pub fn open(device: Device) -> Result<Self, String> {
        let Device::Cuda(index) = device else { return Err("graphs are for GPUs".into()) };
        Ok(Self::new(Box::new(Cuda(Rc::new(Handle::open(index)?)))))
    }

    fn new(recorder: Box<dyn Recorder>) -> Self {
        Self { recorded: RefCell::default(), recorder, told: Cell::new(false) }
    }

    /// [`Transformer::stack`] over `tokens: [rows]` by recorded pieces; `None` where there are none for so many rows.
    pub(super) fn stack(
        &self,
        model: &Transformer,
        tokens: &Tensor,
        mut mix: impl FnMut(usize, &Layer, &Tensor) -> Result<Tensor, ModelError>,
    ) -> Result<Option<Tensor>, ModelError> {
        let rows = tokens.numel();
        let Some(bucket) = bucket(rows).filter(|_| tokens.dim() == 1) else { return Ok(None) };
        let mut all = self.recorded.borrow_mut();
        let recorded = all.entry(bucket).or_insert_with(|| self.record(model, bucket));
        let Some(Recorded { tokens: ids, mixed, pieces }) = recorded else { return Ok(None) };
        let rows = rows as i64;
        ids.f_narrow(0, 0, rows)?.f_copy_(tokens)?;
        let mut stream = None;
        for (index, piece) in pieces.iter().enumerate() {
            piece.recording.replay(&|| model.piece(index, ids, stream.map(|stream| (stream, &*mixed))))?;
            stream = Some(&piece.stream);
            let next = piece.next.f_narrow(0, 0, rows)?;
            match model.layers.get(index) {
                Some(layer) => mixed.f_narrow(0, 0, rows)?.f_copy_(&mix(index, layer, &next)?)?,
                // A copy: the next forward writes there again.
                None => return Ok(Some(next.f_detach_copy()?)),
            }
        }
        Ok(None)
    }

    fn record(&self, model: &Transformer, bucket: usize) -> Option<Recorded> {
        let recorded = self.recorder.enter().and_then(|()| {
            // Whatever happens in between, what was entered is left: a panic goes on from there.
            let recorded = catch_unwind(AssertUnwindSafe(|| self.pieces(model, bucket)));
            let left = self.recorder.leave();
            left.and(recorded.unwrap_or_else(|panic| resume_unwind(panic)))
        });
        match recorded {
            Ok(recorded) => {
                info!(rows = bucket, pieces = recorded.pieces.len(), "recorded the network as CUDA graphs");
                Some(recorded)
            }
            Err(reason) if self.told.replace(true) => {
                info!(rows = bucket, reason, "CUDA graphs cannot be recorded");
                None
            }
            Err(reason) => {
                warn!(rows = bucket, reason, "CUDA graphs cannot be recorded: steps of so many rows go without");
                None
            }
        }
    }

    fn pieces(&self, model: &Transformer, bucket: usize) -> Result<Recorded, String> {
        let told = |error: ModelError| error.to_string();
        let (c, placement) = (model.config(), model.placement());
        let (rows, width) = (bucket as i64, (c.heads * c.head_dim) as i64);
        let zeros = |shape: &[i64], kind| Tensor::f_zeros(shape, (kind, placement.device)).map_err(ModelError::from);
        let tokens = zeros(&[rows], Kind::Int64).map_err(told)?;
        let mixed = zeros(&[rows, width], placement.dtype.kind()).map_err(told)?;
        let mut pieces: Vec<Piece> = Vec::with_capacity(c.layers + 1);
        // Held until the next piece has been recorded.
        let mut before: Option<Made> = None;
        for index in 0..=c.layers {
            let work = || model.piece(index, &tokens, before.as_ref().map(|(stream, _)| (stream, &mixed)));
            let (recording, made) = self.recorder.record(&work)?;
            let (stream, next) = (unowned(&made.0).map_err(told)?, unowned(&made.1).map_err(told)?);
            pieces.push(Piece { recording, stream, next });
            before = Some(made);
        }
        Ok(Recorded { tokens, mixed, pieces })
    }
}

/// The same numbers at the same place, without a hold on the memory.
fn unowned(tensor: &Tensor) -> Result<Tensor, ModelError> {
    let (size, stride) = (tensor.size(), tensor.stride());
    // SAFETY: the memory is the pool's, which outlives the recording that this view goes with.
    Ok(unsafe { Tensor::f_from_blob(tensor.data_ptr().cast(), &size, &stride, tensor.f_kind()?, tensor.device()) }?)
}

type New = unsafe extern "C" fn(c_int) -> *mut c_void;
type Begin = unsafe extern "C" fn(*mut c_void) -> *mut c_void;
type Act = unsafe extern "C" fn(*mut c_void) -> c_int;
type Free = unsafe extern "C" fn(*mut c_void);
type Text = unsafe extern "C" fn() -> *const c_char;

/// The shim's functions.
#[derive(Clone, Copy)]
struct Shim {
    error: Text,
    new: New,
    free: Free,
    enter: Act,
    leave: Act,
    begin: Begin,
    end: Act,
    replay: Act,
    drop: Free,
}

impl Shim {
    fn open() -> Result<Self, String> {
        // SAFETY: the library is the one that `cuda/graphs.cpp` makes, of the version that these types are of.
        unsafe {
            let library = Library::open(LIBRARY, FILE, (c"lacuna_graphs_version", VERSION))?;
            memory::also_give_back(library.find::<Answer>(c"lacuna_graphs_give_back")?);
            Ok(Self {
                error: library.find::<Text>(c"lacuna_graphs_error")?,
                new: library.find::<New>(c"lacuna_graphs_new")?,
                free: library.find::<Free>(c"lacuna_graphs_free")?,
                enter: library.find::<Act>(c"lacuna_graphs_enter")?,
                leave: library.find::<Act>(c"lacuna_graphs_leave")?,
                begin: library.find::<Begin>(c"lacuna_graphs_begin")?,
                end: library.find::<Act>(c"lacuna_graphs_end")?,
                replay: library.find::<Act>(c"lacuna_graphs_replay")?,
                drop: library.find::<Free>(c"lacuna_graphs_drop")?,
            })
        }
    }

    /// Why this thread's last call failed, in one line.
    fn reason(&self) -> String {
        // SAFETY: the text is the shim's own, and stays until this thread's next call.
        let text = unsafe { CStr::from_ptr((self.error)()) }.to_string_lossy();
        text.lines().next().unwrap_or("no reason given").to_owned()
    }

    fn done(&self, done: bool) -> Result<(), String> {
        if done { Ok(()) } else { Err(self.reason()) }
    }
}

/// A side stream and a memory pool.
struct Handle {
    shim: Shim,
    recorder: NonNull<c_void>,
}

impl Handle {
    fn open(device: usize) -> Result<Self, String> {
        let shim = Shim::open()?;
        let index = c_int::try_from(device).map_err(|_| format!("there is no cuda:{device}"))?;
        // SAFETY: the shim's function; it gives null for a failure.
        let recorder = NonNull::new(unsafe { (shim.new)(index) }).ok_or_else(|| shim.reason())?;
        Ok(Self { shim, recorder })
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: nobody else has it, and its graphs, which each hold this, are gone.
        unsafe { (self.shim.free)(self.recorder.as_ptr()) }
    }
}

struct Cuda(Rc<Handle>);

impl Recorder for Cuda {
    fn enter(&self) -> Result<(), String> {
        // SAFETY: the shim's functions, on its own recorder; likewise below.
        self.0.shim.done(unsafe { (self.0.shim.enter)(self.0.recorder.as_ptr()) } != 0)
    }

    fn leave(&self) -> Result<(), String> {
        self.0.shim.done(unsafe { (self.0.shim.leave)(self.0.recorder.as_ptr()) } != 0)
    }

    fn record(&self, work: &dyn Fn() -> Result<Made, ModelError>) -> Result<(Box<dyn Recording>, Made), String> {
        let shim = &self.0.shim;
        work().map(drop).map_err(|error| error.to_string())?;
        let graph = NonNull::new(unsafe { (shim.begin)(self.0.recorder.as_ptr()) }).ok_or_else(|| shim.reason())?;
        let made = work().map_err(|error| error.to_string());
        // A graph whose recording does not even end is left alone: libtorch's allocator may still look at it.
        shim.done(unsafe { (shim.end)(graph.as_ptr()) } != 0)?;
        let graph = Graph { graph, handle: self.0.clone() };
        Ok((Box::new(graph), made?))
    }
}

struct Graph {
    graph: NonNull<c_void>,
    handle: Rc<Handle>,
}

impl Recording for Graph {
    fn replay(&self, _: &dyn Fn() -> Result<Made, ModelError>) -> Result<(), ModelError> {
        let shim = &self.handle.shim;
        shim.done(unsafe { (shim.replay)(self.graph.as_ptr()) } != 0).map_err(ModelError::Torch)
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: it is the shim's own, and nobody else has it.
        unsafe { (self.handle.shim.drop)(self.graph.as_ptr()) }
    }
}

#[cfg(test)]
#[path = "graphs_tests.rs"]
mod tests;
