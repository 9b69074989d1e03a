//! Memory for weights: pages as large as the system has, many matrices in one piece.

use std::sync::{Arc, Mutex, PoisonError};

use memmap2::MmapMut;

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

#[cfg(test)]
mod tests {
    use super::*;

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
