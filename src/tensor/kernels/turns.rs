//! Kernels one after another in one launch.
//!
//! A step of one token is some sixty kernels of a few µs. To start and end the threads for each of them takes two system calls, and to make
//! a tensor for what it gives takes as long again: together more than the arithmetic (docs/LOG.md). Here the threads start once, wait
//! for one another between two kernels, awake at first, and whoever made the list says where results go.

use std::ffi::{c_uint, c_void};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Condvar, LazyLock, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::{Kernel, OPENMP, dispatch, plain};
use crate::tensor::{Kind, Tensor};

/// How often a thread looks whether the others are done before it lets whoever waits for its core have it: some 30 µs, several kernels long.
const LOOKS: usize = 2000;
/// Likewise with more threads than cores.
const LOOKS_CROWDED: usize = 20;

/// How long it goes on so before it sleeps, which is longer than the system gives another program a core for. Sooner asleep, it would be
/// woken for every kernel that the other program delays (docs/LOG.md).
const PATIENCE: Duration = Duration::from_millis(5);

static CORES: LazyLock<usize> = LazyLock::new(|| std::thread::available_parallelism().map_or(1, |cores| cores.get()));

/// Rows of numbers in plain memory, f32 or bf16.
#[derive(Clone, Copy, Debug)]
pub struct Rows {
    pub(super) data: *mut c_void,
    pub(super) count: usize,
    pub(super) width: usize,
    pub(super) half: bool,
}

impl Rows {
    /// Those of `tensor: [..., width]`, if it is one that kernels read. It must outlive what is done with them.
    pub fn of(tensor: &Tensor) -> Option<Self> {
        let width = tensor.size().last().copied().filter(|width| *width > 0)? as usize;
        let half = tensor.kind() == Kind::BFloat16;
        plain(tensor).then(|| Self { data: tensor.data_ptr(), count: tensor.numel() / width, width, half })
    }

    /// Those of numbers in plain memory, which must stay there for what is done with them.
    pub fn of_numbers(numbers: &mut [f32], width: usize) -> Self {
        Self { data: numbers.as_mut_ptr().cast(), count: numbers.len() / width.max(1), width, half: false }
    }

    /// Whether there are as many rows there, of the same type.
    pub(super) fn beside(&self, other: &Self) -> Option<()> {
        (self.count == other.count && self.half == other.half).then_some(())
    }

    /// As many rows of each of these widths, which are together as wide: first all of the first, then all of the next.
    pub fn cut<const N: usize>(self, widths: [usize; N]) -> [Self; N] {
        debug_assert_eq!(widths.iter().sum::<usize>(), self.width);
        let size = if self.half { size_of::<u16>() } else { size_of::<f32>() };
        let mut from = 0;
        widths.map(|width| {
            let data = self.data.wrapping_byte_add(from);
            from += self.count * width * size;
            Self { data, width, ..self }
        })
    }

    pub(super) fn numbers(&self) -> usize {
        self.count * self.width
    }
}

/// A kernel whose type is forgotten.
trait Turn {
    /// Does part `thread` of `threads`.
    ///
    /// # Safety
    /// As for [`Kernel::share`].
    unsafe fn take(&self, thread: usize, threads: usize);
}

impl<K: Kernel> Turn for K {
    unsafe fn take(&self, thread: usize, threads: usize) {
        unsafe { dispatch(self, thread, threads) }
    }
}

/// A list of kernels, each of which begins when the one before is done.
#[derive(Default)]
pub struct Turns {
    /// With whether it is worth all threads.
    kernels: Vec<(Box<dyn Turn>, bool)>,
    /// What lies between two kernels; those at hand are given out again.
    rooms: Vec<Vec<u64>>,
    at_hand: Vec<usize>,
    given: usize,
}

impl Turns {
    pub(super) fn push(&mut self, kernel: impl Kernel + 'static, parallel: bool) {
        self.kernels.push((Box::new(kernel), parallel));
    }

    /// From here on kernels may use the memory that those before had between them: it is as much as the largest needs, not all.
    pub(super) fn reuse(&mut self) {
        self.given = 0;
    }

    /// Memory for so many numbers, whatever they are at first, as long as the list is there. Until [`Turns::reuse`] nobody else is given it.
    pub(super) fn room<T: Copy>(&mut self, count: usize) -> *mut T {
        const { assert!(align_of::<T>() <= align_of::<u64>()) };
        let words = (count * size_of::<T>()).div_ceil(size_of::<u64>());
        let large = |at: &usize| self.rooms.get(*at).is_some_and(|room| room.len() >= words);
        let at = match self.at_hand.get(self.given).copied().filter(large) {
            Some(at) => at,
            None => {
                // A smaller one stays where it is: kernels before point to it.
                self.rooms.push(vec![0; words]);
                let at = self.rooms.len() - 1;
                match self.at_hand.get_mut(self.given) {
                    Some(smaller) => *smaller = at,
                    None => self.at_hand.push(at),
                }
                at
            }
        };
        self.given += 1;
        self.rooms[at].as_mut_ptr().cast()
    }

    /// Runs all of them.
    ///
    /// # Safety
    /// All memory that the kernels were told of must still be there, as large as they were told.
    pub unsafe fn run(&self) {
        let threads = if self.kernels.iter().any(|(_, parallel)| *parallel) { tch::get_num_threads().max(1) } else { 1 };
        match *OPENMP {
            // Within a part of some work that is split already, the other threads have their own.
            Some(openmp) if threads > 1 && unsafe { (openmp.within)() } == 0 => {
                let team = Team { turns: self, barrier: Barrier::default() };
                unsafe { (openmp.parallel)(member, std::ptr::from_ref(&team).cast_mut().cast(), threads as c_uint, 0) };
            }
            _ => self.kernels.iter().for_each(|(kernel, _)| unsafe { kernel.take(0, 1) }),
        }
    }

    /// One thread's part of all of them.
    unsafe fn share(&self, barrier: &Barrier, thread: usize, threads: usize) {
        let mut rest = self.kernels.as_slice();
        let mut begun = false;
        while !rest.is_empty() {
            let (alone, others) = rest.split_at(rest.iter().take_while(|(_, parallel)| !parallel).count());
            if begun || !alone.is_empty() {
                // What is not worth all threads is done by the one that the others wait for anyway.
                barrier.wait(threads, || alone.iter().for_each(|(kernel, _)| unsafe { kernel.take(0, 1) }));
            }
            let Some(((kernel, _), others)) = others.split_first() else { return };
            unsafe { kernel.take(thread, threads) };
            (rest, begun) = (others, true);
        }
    }
}

struct Team<'a> {
    turns: &'a Turns,
    barrier: Barrier,
}

extern "C" fn member(team: *mut c_void) {
    // SAFETY: `Turns::run` passes a team, and waits for all threads.
    unsafe {
        if let Some(openmp) = *OPENMP {
            let Team { turns, barrier } = &*team.cast::<Team>();
            turns.share(barrier, (openmp.thread)() as usize, (openmp.threads)() as usize);
        }
    }
}

/// Where threads wait until all have come.
#[derive(Default)]
struct Barrier {
    /// In lines of their own: who waits looks at one while the others write to the other.
    arrived: Line,
    turn: Line,
    asleep: AtomicUsize,
    bed: Mutex<()>,
    bell: Condvar,
}

#[derive(Default)]
#[repr(align(128))]
struct Line(AtomicUsize);

impl Barrier {
    /// The last one to come does `meanwhile`, before any of them goes on.
    fn wait(&self, threads: usize, meanwhile: impl FnOnce()) {
        let turn = self.turn.0.load(Ordering::Relaxed);
        if self.arrived.0.fetch_add(1, Ordering::AcqRel) + 1 == threads {
            meanwhile();
            self.arrived.0.store(0, Ordering::Relaxed);
            self.turn.0.store(turn.wrapping_add(1), Ordering::SeqCst);
            // Whoever goes to sleep counts itself before it looks a last time: one of the two sees the other.
            if self.asleep.load(Ordering::SeqCst) > 0 {
                drop(self.bed.lock().unwrap_or_else(PoisonError::into_inner));
                self.bell.notify_all();
            }
            return;
        }
        let over = || self.turn.0.load(Ordering::Acquire) != turn;
        let (looks, patience) = if threads > *CORES { (LOOKS_CROWDED, Duration::ZERO) } else { (LOOKS, PATIENCE) };
        for _ in 0..looks {
            if over() {
                return;
            }
            std::hint::spin_loop();
        }
        let began = Instant::now();
        while began.elapsed() < patience {
            if over() {
                return;
            }
            std::thread::yield_now();
        }
        let mut bed = self.bed.lock().unwrap_or_else(PoisonError::into_inner);
        self.asleep.fetch_add(1, Ordering::SeqCst);
        while self.turn.0.load(Ordering::SeqCst) == turn {
            bed = self.bell.wait(bed).unwrap_or_else(PoisonError::into_inner);
        }
        self.asleep.fetch_sub(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::super::lanes::Lanes;
    use super::*;

    /// Adds to each of its numbers what the next one was.
    struct Chain {
        from: *const usize,
        to: *mut usize,
        count: usize,
    }

    impl Kernel for Chain {
        unsafe fn share<V: Lanes>(&self, thread: usize, threads: usize) {
            for at in self.count * thread / threads..self.count * (thread + 1) / threads {
                unsafe { *self.to.add(at) = *self.from.add(at) + *self.from.add((at + 1) % self.count) };
            }
        }
    }

    #[test]
    fn rooms_are_used_again_when_they_are_told_to_be() {
        let mut turns = Turns::default();
        let (first, second) = (turns.room::<f32>(100), turns.room::<i8>(3));
        assert_ne!(first.cast(), second);
        turns.reuse();
        assert_eq!((turns.room::<i8>(400).cast(), turns.room::<i8>(8)), (first, second));
        turns.reuse();
        let larger = turns.room::<f32>(101);
        assert_ne!(larger, first);
        turns.reuse();
        assert_eq!((turns.room::<f32>(101), turns.room::<i8>(8)), (larger, second));
        assert_eq!(turns.rooms.len(), 3, "the smaller one is still there");
    }

    /// Every kernel reads what other threads wrote in the one before.
    #[test]
    fn each_begins_when_the_one_before_is_done() {
        const COUNT: usize = 7;
        for threads in [1, 2, 3, 5] {
            crate::tensor::set_threads(threads);
            for parallel in [|_: usize| true, |turn| turn % 2 == 0, |turn| turn % 5 == 3, |_| false] {
                let mut turns = Turns::default();
                let first = turns.room::<usize>(COUNT);
                (0..COUNT).for_each(|at| unsafe { *first.add(at) = at * at });
                let (mut from, mut expected) = (first, (0..COUNT).map(|at| at * at).collect::<Vec<_>>());
                for turn in 0..40 {
                    let to = turns.room::<usize>(COUNT);
                    turns.push(Chain { from, to, count: COUNT }, parallel(turn));
                    expected = (0..COUNT).map(|at| expected[at] + expected[(at + 1) % COUNT]).collect();
                    from = to;
                }
                for _ in 0..50 {
                    unsafe { turns.run() };
                    assert_eq!(unsafe { std::slice::from_raw_parts(from, COUNT) }, expected, "{threads} threads");
                }
            }
        }
    }
}
