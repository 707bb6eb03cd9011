//! Weights in pages of two megabytes.
//!
//! A decoding step reads all weights once, and has each of their pages looked up: of four kilobytes there are tens of thousands, more than the
//! core has places for, and a virtual machine walks two tables for each. With large pages a step is 7 % shorter (docs/LOG.md). The
//! allocator gives small ones; the system is asked to put their contents into large ones, where they lie, once a model is complete.
//! What it cannot do it leaves, and nothing but time is lost.

/// Bytes of a large page.
const PAGE: usize = 2 << 20;

/// Has memory that begins there and has so many bytes put into large pages, with what lies beside it in the first and the last one.
pub fn enlarge(memory: impl Iterator<Item = (usize, usize)>) {
    #[cfg(target_os = "linux")]
    for page in pages(memory) {
        let at = page as *mut libc::c_void;
        // SAFETY: hints, which change no content, and fail where there is no such memory.
        unsafe {
            // From Linux 6.1 on at once; before, when the system comes by.
            if libc::madvise(at, PAGE, MADV_COLLAPSE) != 0 {
                libc::madvise(at, PAGE, libc::MADV_HUGEPAGE);
            }
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = memory;
}

/// Not all C libraries have a name for it.
#[cfg(target_os = "linux")]
const MADV_COLLAPSE: libc::c_int = 25;

/// Where the large pages begin that hold any of it, each once.
#[cfg(any(target_os = "linux", test))]
fn pages(memory: impl Iterator<Item = (usize, usize)>) -> Vec<usize> {
    let mut pages: Vec<usize> =
        memory.flat_map(|(from, bytes)| (from / PAGE..(from + bytes).div_ceil(PAGE)).map(|page| page * PAGE)).collect();
    pages.sort_unstable();
    pages.dedup();
    pages
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_page_is_there_once() {
        let memory = [(3 * PAGE + 5, PAGE), (7 * PAGE, PAGE), (4 * PAGE + 9, 1), (PAGE, 0), (2 * PAGE - 1, 1)];
        assert_eq!(pages(memory.into_iter()), [PAGE, 3 * PAGE, 4 * PAGE, 7 * PAGE]);
    }

    #[test]
    fn what_lies_in_a_page_stays() {
        let numbers: Vec<u64> = (0..1 << 20).collect();
        let bytes = size_of_val(&numbers[..]);
        // Memory that is not there is passed over.
        enlarge([(numbers.as_ptr() as usize + 3, bytes - 3), (PAGE, 2 * PAGE)].into_iter());
        assert!(numbers.into_iter().eq(0..1 << 20));
    }
}
