//! Our own kernels for the few rows of a decoding step on the CPU, where libtorch is far from the floor.
//!
//! A step's products are bound by memory, and libtorch reads a matrix at a third of its speed; the small operations between them
//! cost more in dispatch than in arithmetic (docs/LOG.md has the measurements). Every kernel computes each row in one fixed order,
//! whatever rows are beside it and however many threads there are: a token's numbers do not depend on drafts, on batches or on the
//! machine's load. What is no plain case (a GPU, gradients, other types, many rows) is left to libtorch by answering `None`.
//!
//! With `LACUNA_KERNELS=off` in the environment everything is left to libtorch, to compare the two or to rule the kernels out.
//!
//! Work is split over libtorch's own threads (OpenMP), so that two pools never fight for the cores.

pub mod attention;
pub mod linear;
pub mod pointwise;
pub mod rows;

use std::ffi::{c_uint, c_void};
use std::sync::LazyLock;

use super::{Kind, Tensor};

/// Beyond so many rows libtorch's blocked products are faster.
pub const ROWS_MAX: usize = 32;
/// Lanes of a running sum: a vector register of AVX-512 in f32.
const LANES: usize = 16;

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
        Some(openmp) if threads > 1 => unsafe {
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
#[target_feature(enable = "avx2,fma")]
unsafe fn middle<K: Kernel>(kernel: &K, thread: usize, threads: usize) {
    unsafe { kernel.share::<[std::arch::x86_64::__m256; 2]>(thread, threads) }
}

/// [`LANES`] running sums. Every kind computes the same numbers, fused multiply-adds lane by lane.
///
/// # Safety
/// The CPU must have the kind's instructions, and pointers lead to as many elements.
trait Lanes: Copy {
    unsafe fn zero() -> Self;
    unsafe fn splat(value: f32) -> Self;
    unsafe fn load(from: *const f32) -> Self;
    unsafe fn load_bf16(from: *const u16) -> Self;
    unsafe fn multiply_add(self, by: Self, sum: Self) -> Self;
    unsafe fn store(self) -> [f32; LANES];

    /// Sum of the lanes, halves onto halves.
    #[inline(always)]
    unsafe fn total(self) -> f32 {
        fold(unsafe { self.store() })
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{LANES, Lanes};

    impl Lanes for __m512 {
        #[inline(always)]
        unsafe fn zero() -> Self {
            unsafe { _mm512_setzero_ps() }
        }

        #[inline(always)]
        unsafe fn splat(value: f32) -> Self {
            unsafe { _mm512_set1_ps(value) }
        }

        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            unsafe { _mm512_loadu_ps(from) }
        }

        #[inline(always)]
        unsafe fn load_bf16(from: *const u16) -> Self {
            unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast())))) }
        }

        #[inline(always)]
        unsafe fn multiply_add(self, by: Self, sum: Self) -> Self {
            unsafe { _mm512_fmadd_ps(self, by, sum) }
        }

        #[inline(always)]
        unsafe fn total(self) -> f32 {
            unsafe { _mm512_reduce_add_ps(self) }
        }

        #[inline(always)]
        unsafe fn store(self) -> [f32; LANES] {
            let mut lanes = [0.0; LANES];
            unsafe { _mm512_storeu_ps(lanes.as_mut_ptr(), self) };
            lanes
        }
    }

    impl Lanes for [__m256; 2] {
        #[inline(always)]
        unsafe fn zero() -> Self {
            unsafe { [_mm256_setzero_ps(); 2] }
        }

        #[inline(always)]
        unsafe fn splat(value: f32) -> Self {
            unsafe { [_mm256_set1_ps(value); 2] }
        }

        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            unsafe { [_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))] }
        }

        #[inline(always)]
        unsafe fn load_bf16(from: *const u16) -> Self {
            let widen = |from: *const u16| unsafe {
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()))))
            };
            unsafe { [widen(from), widen(from.add(8))] }
        }

        #[inline(always)]
        unsafe fn multiply_add(self, by: Self, sum: Self) -> Self {
            unsafe { [_mm256_fmadd_ps(self[0], by[0], sum[0]), _mm256_fmadd_ps(self[1], by[1], sum[1])] }
        }

        #[inline(always)]
        unsafe fn store(self) -> [f32; LANES] {
            let mut lanes = [0.0; LANES];
            unsafe {
                _mm256_storeu_ps(lanes.as_mut_ptr(), self[0]);
                _mm256_storeu_ps(lanes.as_mut_ptr().add(8), self[1]);
            }
            lanes
        }
    }
}

/// For CPUs whose vectors the compiler finds by itself.
impl Lanes for [f32; LANES] {
    #[inline(always)]
    unsafe fn zero() -> Self {
        [0.0; LANES]
    }

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        [value; LANES]
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        unsafe { from.cast::<Self>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Self {
        unsafe { from.cast::<[u16; LANES]>().read_unaligned() }.map(Stored::widen)
    }

    #[inline(always)]
    unsafe fn multiply_add(self, by: Self, sum: Self) -> Self {
        std::array::from_fn(|lane| self[lane].mul_add(by[lane], sum[lane]))
    }

    #[inline(always)]
    unsafe fn store(self) -> [f32; LANES] {
        self
    }
}

/// A type that weights are stored in.
trait Stored: Copy {
    unsafe fn load<V: Lanes>(from: *const Self) -> V;
    fn widen(self) -> f32;
    fn narrow(value: f32) -> Self;
}

impl Stored for f32 {
    #[inline(always)]
    unsafe fn load<V: Lanes>(from: *const Self) -> V {
        unsafe { V::load(from) }
    }

    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }

    #[inline(always)]
    fn narrow(value: f32) -> Self {
        value
    }
}

/// bf16 is the upper half of an f32.
impl Stored for u16 {
    #[inline(always)]
    unsafe fn load<V: Lanes>(from: *const Self) -> V {
        unsafe { V::load_bf16(from) }
    }

    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self) << 16)
    }

    #[inline(always)]
    fn narrow(value: f32) -> Self {
        half::bf16::from_f32(value).to_bits()
    }
}

/// The scalar product of `length` numbers: whole vectors lane by lane, then the rest one by one.
#[inline(always)]
unsafe fn dot<V: Lanes, T: Stored>(stored: *const T, with: *const f32, length: usize) -> f32 {
    let whole = length / LANES * LANES;
    unsafe {
        let mut sum = V::zero();
        let mut at = 0;
        while at < whole {
            sum = T::load::<V>(stored.add(at)).multiply_add(V::load(with.add(at)), sum);
            at += LANES;
        }
        let mut total = sum.total();
        for at in whole..length {
            total = (*stored.add(at)).widen().mul_add(*with.add(at), total);
        }
        total
    }
}

/// Sum of the lanes, halves onto halves.
#[inline(always)]
fn fold(mut lanes: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] += lanes[lane + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// The exponential, to about two units in the last place; written so that a loop over it becomes vectors (the range reduction and
/// polynomial of Cephes' `expf`).
#[inline(always)]
fn exp(x: f32) -> f32 {
    let x = x.clamp(-87.0, 88.0);
    let n = (x * std::f32::consts::LOG2_E).round_ties_even();
    // ln 2 in two parts, the first short enough for the product to be exact.
    let r = n.mul_add(2.121_944_4e-4, n.mul_add(-0.693_359_4, x));
    let mut p = 1.987_569_2e-4f32;
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_6e-1, 5e-1] {
        p = p.mul_add(r, c);
    }
    let p = p.mul_add(r * r, r) + 1.0;
    p * f32::from_bits(((n as i32 + 127) << 23) as u32)
}

/// The entry points of the OpenMP that libtorch has loaded. Their form is fixed by GCC's ABI since 4.9.
#[derive(Clone, Copy)]
struct OpenMp {
    parallel: Parallel,
    thread: Number,
    threads: Number,
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
        })
    }
});

/// Whether the kernels are wanted, and this CPU multiplies and adds in one instruction; otherwise the loops above would be slow.
static FAST: LazyLock<bool> = LazyLock::new(|| {
    #[cfg(target_arch = "x86_64")]
    let fast = std::is_x86_feature_detected!("avx2") && std::is_x86_feature_detected!("fma");
    #[cfg(not(target_arch = "x86_64"))]
    let fast = cfg!(target_arch = "aarch64");
    fast && std::env::var_os("LACUNA_KERNELS").is_none_or(|wish| wish != "off")
});

#[cfg(test)]
mod tests {
    #[test]
    fn the_exponential_is_right_to_a_few_units() {
        for step in -8700..=800 {
            let x = step as f32 / 100.0;
            let (ours, right) = (super::exp(x), f64::from(x).exp());
            assert!((f64::from(ours) - right).abs() <= 4e-7 * right, "exp({x}) = {ours}, not {right}");
        }
        assert!(super::exp(f32::NEG_INFINITY) < 1e-37);
    }
}
