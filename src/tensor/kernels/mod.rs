//! Our own kernels for forwards on the CPU.
//!
//! Every kernel computes each row in one fixed order, whatever rows are beside it and however many threads there are: a token's
//! numbers do not depend on drafts, on what is batched beside it or on the machine's load. libtorch's depend on all of these, and it
//! is slower: it reads the weights of a decoding step at a third of memory's speed, and its small operations cost more in dispatch
//! than in arithmetic (docs/LOG.md has the measurements). What is no plain case (a GPU, gradients, other types) is left to libtorch by
//! answering `None`.
//!
//! With `LACUNA_KERNELS=off` in the environment everything is left to libtorch, to compare the two or to rule the kernels out.
//!
//! Work is split over libtorch's own threads (OpenMP), so that two pools never fight for the cores.

mod attend;
pub mod attention;
mod attention_split;
pub mod codes;
pub mod compact;
pub mod fixed;
pub mod integers;
mod lanes;
pub mod linear;
pub mod packed;
pub mod pointwise;
mod product;
pub mod rounding;
pub mod rows;
mod strips;
pub mod turns;
mod words;

use std::ffi::{c_uint, c_void};
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{LazyLock, Mutex, PoisonError};

#[cfg(not(target_arch = "x86_64"))]
use self::lanes::LANES;
use self::lanes::Lanes;
use super::{Kind, Tensor};

/// Whether products, attention and searches go through these kernels at all.
pub fn in_use() -> bool {
    *FAST
}

/// Whether a tensor is of the plain kind: on the CPU, without gradients, contiguous, in f32 or bf16.
fn plain(tensor: &Tensor) -> bool {
    *FAST
        && matches!(tensor.kind(), Kind::Float | Kind::BFloat16)
        && tensor.device() == tch::Device::Cpu
        && !tensor.requires_grad()
        && tensor.is_contiguous()
}

/// Work that threads share.
trait Kernel {
    /// Does part `thread` of `threads`.
    ///
    /// # Safety
    /// The CPU must have the instructions of `V`, and the kernel's pointers must lead to as much memory as its sizes say.
    unsafe fn share<V: Lanes>(&self, thread: usize, threads: usize);
}

/// Runs a kernel on all threads, or on this one where it is too small for others.
///
/// # Safety
/// The kernel's pointers must lead to as much memory as its sizes say.
unsafe fn launch<K: Kernel>(kernel: &K, parallel: bool) {
    let threads = if parallel { tch::get_num_threads().max(1) } else { 1 };
    match *OPENMP {
        // Within a part of some work that is split already, the other threads have their own.
        Some(openmp) if threads > 1 && unsafe { (openmp.within)() } == 0 => unsafe {
            (openmp.parallel)(part::<K>, std::ptr::from_ref(kernel).cast_mut().cast(), threads as c_uint, 0);
        },
        _ => unsafe { dispatch(kernel, 0, 1) },
    }
}

extern "C" fn part<K: Kernel>(kernel: *mut c_void) {
    // SAFETY: `launch` passes a kernel of this type, and waits for all threads.
    unsafe {
        if let Some(openmp) = *OPENMP {
            dispatch(&*kernel.cast::<K>(), (openmp.thread)() as usize, (openmp.threads)() as usize);
        }
    }
}

/// Does `work` for `0..parts` on all of libtorch's own threads, which take one part after another; operations within a part run on its
/// thread alone. Gives the parts' results in order. A part that panics has the caller panic, once all have ended.
///
/// # Safety
/// What the parts share must bear being used by several threads at once, whatever its type says: tensors do where nobody writes to them.
pub unsafe fn side_by_side<T: Send, W: Fn(usize) -> T>(parts: usize, work: W) -> Vec<T> {
    let team = Team { work, next: AtomicUsize::new(0), results: (0..parts).map(|_| Mutex::new(None)).collect() };
    let threads = parts.min(tch::get_num_threads().max(1) as usize);
    match *OPENMP {
        Some(openmp) => unsafe {
            (openmp.parallel)(member::<T, W>, std::ptr::from_ref(&team).cast_mut().cast(), threads as c_uint, 0);
        },
        None => team.run(),
    }
    let result = |slot: Mutex<Option<std::thread::Result<T>>>| match slot.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(Ok(result)) => result,
        Some(Err(panic)) => std::panic::resume_unwind(panic),
        None => unreachable!("every part has been run"),
    };
    team.results.into_iter().map(result).collect()
}

/// Parts of some work, and what became of them.
struct Team<T, W> {
    work: W,
    next: AtomicUsize,
    results: Vec<Mutex<Option<std::thread::Result<T>>>>,
}

impl<T, W: Fn(usize) -> T> Team<T, W> {
    /// One thread's turn: parts as long as there are any.
    fn run(&self) {
        loop {
            let part = self.next.fetch_add(1, Ordering::Relaxed);
            let Some(slot) = self.results.get(part) else { return };
            // A panic must not run through OpenMP's frames.
            let result = std::panic::catch_unwind(AssertUnwindSafe(|| (self.work)(part)));
            *slot.lock().unwrap_or_else(PoisonError::into_inner) = Some(result);
        }
    }
}

extern "C" fn member<T, W: Fn(usize) -> T>(team: *mut c_void) {
    // SAFETY: `side_by_side` passes a team of this type, and waits for all threads.
    unsafe { &*team.cast::<Team<T, W>>() }.run();
}

#[cfg(target_arch = "x86_64")]
unsafe fn dispatch<K: Kernel>(kernel: &K, thread: usize, threads: usize) {
    unsafe {
        if std::is_x86_feature_detected!("avx512f") { wide(kernel, thread, threads) } else { middle(kernel, thread, threads) }
    }
}

#[cfg(not(target_arch = "x86_64"))]
unsafe fn dispatch<K: Kernel>(kernel: &K, thread: usize, threads: usize) {
    unsafe { kernel.share::<[f32; LANES]>(thread, threads) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx2,fma")]
unsafe fn wide<K: Kernel>(kernel: &K, thread: usize, threads: usize) {
    unsafe { kernel.share::<std::arch::x86_64::__m512>(thread, threads) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn middle<K: Kernel>(kernel: &K, thread: usize, threads: usize) {
    unsafe { kernel.share::<[std::arch::x86_64::__m256; 2]>(thread, threads) }
}

/// The entry points of the OpenMP that libtorch has loaded. Their form is fixed by GCC's ABI since 4.9.
#[derive(Clone, Copy)]
struct OpenMp {
    parallel: Parallel,
    thread: Number,
    threads: Number,
    within: Number,
}

type Parallel = unsafe extern "C" fn(extern "C" fn(*mut c_void), *mut c_void, c_uint, c_uint);
type Number = unsafe extern "C" fn() -> std::ffi::c_int;
type Pause = unsafe extern "C" fn(std::ffi::c_int) -> std::ffi::c_int;

/// A function of this name among what is loaded.
fn find(name: &std::ffi::CStr) -> Option<*mut c_void> {
    // SAFETY: a look-up by name.
    let found = unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) };
    (!found.is_null()).then_some(found)
}

/// Ends the threads that OpenMP keeps for the calling thread; it makes new ones when it needs them.
///
/// OpenMP counts all that are kept in the process. Once they are more than the cores, every team falls asleep between two operations
/// instead of waiting awake for a moment, and being woken costs more than most operations of a decoding step: a thread that has
/// loaded a model and leaves the running of it to another must not keep a team.
pub fn release_threads() {
    const SOFT: std::ffi::c_int = 1;
    if let Some(pause) = find(c"omp_pause_resource_all") {
        // SAFETY: OpenMP 5.0's function of this name. Outside of any parallel work it has no effect but the one described.
        unsafe { std::mem::transmute::<*mut c_void, Pause>(pause)(SOFT) };
    }
}

static OPENMP: LazyLock<Option<OpenMp>> = LazyLock::new(|| {
    // SAFETY: these are the functions of these names.
    unsafe {
        Some(OpenMp {
            parallel: std::mem::transmute::<*mut c_void, Parallel>(find(c"GOMP_parallel")?),
            thread: std::mem::transmute::<*mut c_void, Number>(find(c"omp_get_thread_num")?),
            threads: std::mem::transmute::<*mut c_void, Number>(find(c"omp_get_num_threads")?),
            within: std::mem::transmute::<*mut c_void, Number>(find(c"omp_in_parallel")?),
        })
    }
});

/// Whether the kernels are wanted, and this CPU multiplies and adds in one instruction; otherwise the loops above would be slow.
static FAST: LazyLock<bool> = LazyLock::new(|| {
    #[cfg(target_arch = "x86_64")]
    let fast =
        std::is_x86_feature_detected!("avx2") && std::is_x86_feature_detected!("fma") && std::is_x86_feature_detected!("f16c");
    #[cfg(not(target_arch = "x86_64"))]
    let fast = cfg!(target_arch = "aarch64");
    fast && std::env::var_os("LACUNA_KERNELS").is_none_or(|wish| wish != "off")
});

#[cfg(test)]
mod tests {
    use super::{Tensor, side_by_side};

    /// Rows, inputs, outputs, and inputs that share a scale, of products with quantised weights.
    pub const SHAPES: [(i64, i64, i64, i64); 8] = [
        (1, 64, 10, 64),
        (3, 17, 5, 17),
        (4, 576, 131, 64),
        (7, 256, 944, 256),
        (32, 100, 33, 32),
        (90, 1536, 35, 1536),
        (2, 704, 256, 128),
        (1, 601, 300, 601),
    ];

    /// Holds `product(first, rows)`, of so many of 300 rows, to what each row comes to alone: by several threads, in tiles and blocks.
    pub fn alike(product: &dyn Fn(i64, i64) -> Tensor, of: &str) {
        let alone: Vec<Tensor> = (0..300).map(|row| product(row, 1)).collect();
        for (threads, rows) in [(1, 300), (2, 300), (3, 299), (2, 87), (5, 13), (2, 7), (1, 6), (2, 5), (1, 3), (2, 2)] {
            crate::tensor::set_threads(threads);
            let first = (300 - rows) / 2;
            let expected = Tensor::cat(&alone[first as usize..(first + rows) as usize], 0);
            assert!(product(first, rows).equal(&expected), "{of}: {rows} rows on {threads} threads");
        }
    }

    #[test]
    fn parts_give_their_results_in_order_and_their_panics_to_the_caller() {
        for (threads, parts) in [(1, 3), (2, 1), (2, 2), (2, 7), (4, 0)] {
            crate::tensor::set_threads(threads);
            // SAFETY: the parts share nothing.
            let squares = unsafe { side_by_side(parts, |part| part * part) };
            assert!(squares.into_iter().eq((0..parts).map(|part| part * part)));
        }
        let panicked = std::panic::catch_unwind(|| unsafe { side_by_side(4, |part| assert_ne!(part, 2, "the third")) });
        let panic = panicked.expect_err("one part panics");
        assert!(panic.downcast_ref::<String>().is_some_and(|said| said.contains("the third")));
        assert_eq!(unsafe { side_by_side(2, |part| part) }, [0, 1], "the threads are as good as before");
    }
}
