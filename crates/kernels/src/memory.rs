//! Memory for weights: pages as large as the system has, many matrices in one piece.

use std::mem::MaybeUninit;
use std::sync::{Arc, Mutex, PoisonError};

use memmap2::MmapMut;
use rayon::prelude::*;

use crate::room::Room;

/// Bytes asked of the system at once. Large pages need pieces much larger than they are.
const PIECE: usize = 64 << 20;
/// Addresses are a multiple of a line of the cache.
const ALIGN: usize = 64;

/// Hands out parts of large pieces of memory. A piece is given back when all of its parts are gone.
#[derive(Debug, Default)]
pub(crate) struct Arena {
    current: Mutex<Option<Piece>>,
}

#[derive(Debug)]
struct Piece {
    memory: Arc<Mapped>,
    n_used: usize,
}

#[derive(Debug)]
struct Mapped {
    start: *mut u8,
    n_bytes: usize,
    _map: MmapMut,
}

// SAFETY: an address and its length; what lies there is reached through parts, which do not overlap.
unsafe impl Send for Mapped {}
// SAFETY: as above.
unsafe impl Sync for Mapped {}

/// Bytes that start as zeros and belong to their holder alone.
#[derive(Debug)]
pub(crate) struct Part {
    memory: Arc<Mapped>,
    from: usize,
    n_bytes: usize,
}

impl Mapped {
    fn new(n_bytes: usize) -> Option<Self> {
        let mut map = MmapMut::map_anon(n_bytes).ok()?;
        // Fewer misses in the table of pages; where it fails, pages are small.
        #[cfg(target_os = "linux")]
        let _ = map.advise(memmap2::Advice::HugePage);
        Some(Self {
            start: map.as_mut_ptr(),
            n_bytes,
            _map: map,
        })
    }
}

impl Arena {
    /// `n_bytes` of memory; `None` when the system has none left, or for none.
    pub(crate) fn take(&self, n_bytes: usize) -> Option<Part> {
        if n_bytes >= PIECE / 4 {
            let memory = Arc::new(Mapped::new(n_bytes)?);
            return Some(Part {
                memory,
                from: 0,
                n_bytes,
            });
        }
        if n_bytes == 0 {
            return None;
        }
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        let fits = |piece: &Piece| piece.memory.n_bytes - piece.n_used >= n_bytes;
        if !current.as_ref().is_some_and(fits) {
            *current = Some(Piece {
                memory: Arc::new(Mapped::new(PIECE)?),
                n_used: 0,
            });
        }
        let piece = current.as_mut()?;
        let from = piece.n_used;
        piece.n_used = (from + n_bytes).next_multiple_of(ALIGN).min(PIECE);
        Some(Part {
            memory: Arc::clone(&piece.memory),
            from,
            n_bytes,
        })
    }
}

impl AsRef<[u8]> for Part {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: inside of the mapping, which lives as long; only the holder of the part writes to it, through `&mut`.
        unsafe { std::slice::from_raw_parts(self.memory.start.add(self.from), self.n_bytes) }
    }
}

impl AsMut<[u8]> for Part {
    fn as_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above; parts do not overlap.
        unsafe { std::slice::from_raw_parts_mut(self.memory.start.add(self.from), self.n_bytes) }
    }
}

/// Values that more than one thread clears.
const MANY: usize = 1 << 18;
/// Values that one thread clears at a time.
const SOME: usize = 1 << 16;

/// `n` zeros; of many, every thread of the current rayon pool clears its share.
///
/// `vec![0.0; n]` clears memory that was used before on the calling thread, while the others wait. Where tasks write all
/// of their part, [`Room`] is faster.
#[must_use]
pub fn zeros(n: usize) -> Vec<f32> {
    if n < MANY {
        return vec![0.0; n];
    }
    let mut room = Room::new(n);
    let pieces = room.whole().chunks(SOME);
    pieces.into_par_iter().for_each(|piece| {
        piece.zeros();
    });
    room.finish()
}

/// Makes `values` `n` long by `write`, which is given room for them. What was there is lost.
///
/// # Safety
/// `write` writes all of them.
pub(crate) unsafe fn rewrite<T: Copy>(
    values: &mut Vec<T>,
    n: usize,
    write: impl FnOnce(&mut [MaybeUninit<T>]),
) {
    values.clear();
    if n > values.capacity() {
        *values = with_room(n);
    }
    write(&mut values.spare_capacity_mut()[..n]);
    // SAFETY: the caller's contract.
    unsafe { values.set_len(n) };
}

/// Nothing yet, with room for `n` values, which is a large piece where there are many.
pub(crate) fn with_room<T>(n: usize) -> Vec<T> {
    let mut values = Vec::with_capacity(n);
    if n * size_of::<T>() >= MANY * size_of::<f32>() {
        ask_for_large_pages(values.spare_capacity_mut());
    }
    values
}

/// Asks the system for large pages under `room`, where it gives them on request only: fewer faults when it is touched
/// first, and fewer misses in the table of pages ever after.
fn ask_for_large_pages<T>(room: &mut [MaybeUninit<T>]) {
    #[cfg(target_os = "linux")]
    {
        /// A multiple of every size that small pages have.
        const PAGE: usize = 64 << 10;
        let (start, n_bytes) = (room.as_mut_ptr().cast::<u8>(), size_of_val(room));
        let skipped = start.align_offset(PAGE).min(n_bytes);
        let len = (n_bytes - skipped) / PAGE * PAGE;
        if len > 0 {
            let start = start.wrapping_add(skipped).cast();
            // SAFETY: whole pages inside of `room`, which is ours alone; the advice changes no contents. Where it fails,
            // pages are small.
            unsafe { libc::madvise(start, len, libc::MADV_HUGEPAGE) };
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = room;
}

/// Tells the C library to keep freed memory instead of giving it back to the system.
///
/// For a program that frees and takes the same large pieces over and over, as training does: pages that the system
/// hands out anew have to be cleared and entered in tables, 4 KiB at a time. Its memory stays at its peak until it ends.
/// Nothing happens elsewhere than on Linux with glibc.
pub fn keep_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        /// The largest that glibc takes.
        const LARGEST_PIECE: libc::c_int = 32 << 20;
        // SAFETY: sets numbers that the allocator reads; any values are allowed.
        unsafe {
            libc::mallopt(libc::M_MMAP_THRESHOLD, LARGEST_PIECE);
            libc::mallopt(libc::M_TRIM_THRESHOLD, libc::c_int::MAX);
            libc::mallopt(libc::M_TOP_PAD, 64 << 20);
            // Arenas of further threads give back what they free, whatever the numbers above say.
            libc::mallopt(libc::M_ARENA_MAX, 1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeros_are_what_was_asked_for() {
        for n in [0, 1, SOME, MANY - 1, MANY, MANY + 3 * SOME + 7] {
            let zeros = zeros(n);
            assert!(zeros.len() == n && zeros.iter().all(|x| *x == 0.0));
        }
    }

    #[test]
    fn what_is_rewritten_keeps_its_room() {
        let mut values = Vec::new();
        let write = |n: usize, value: u64, values: &mut Vec<u64>| {
            // SAFETY: all are written.
            unsafe { rewrite(values, n, |room| room.fill(MaybeUninit::new(value))) };
        };
        for n in [5, MANY + 7, 3, 0, 9] {
            write(n, n as u64, &mut values);
            assert!(values.len() == n && values.iter().all(|x| *x == n as u64));
        }
        assert!(values.capacity() >= MANY + 7);
    }

    #[test]
    fn parts_are_apart_and_outlive_the_arena() {
        let arena = Arena::default();
        let sizes = [
            1,
            64,
            1000,
            PIECE,
            PIECE / 5,
            PIECE / 5,
            PIECE / 5,
            PIECE / 5,
            PIECE / 5,
            7,
        ];
        let mut parts: Vec<Part> = sizes.iter().map(|n| arena.take(*n).unwrap()).collect();
        assert!(arena.take(0).is_none());
        drop(arena);
        for (i, part) in parts.iter_mut().enumerate() {
            assert_eq!(part.as_ref().as_ptr().addr() % ALIGN, 0);
            let bytes = part.as_mut();
            assert!(bytes.first() == Some(&0) && bytes.last() == Some(&0));
            bytes.fill(i as u8 + 1);
        }
        for (i, (part, n)) in parts.iter().zip(sizes).enumerate() {
            let bytes = part.as_ref();
            assert_eq!(
                (bytes.len(), bytes[0], bytes[n - 1]),
                (n, i as u8 + 1, i as u8 + 1)
            );
        }
    }
}
